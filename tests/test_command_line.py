"""Wrong input: one line that names the flag and what to type, exit code 2, before anything is started."""

import dataclasses
import multiprocessing as mp
import os
import subprocess
import sys

import pytest
import tyro
from conftest import REPOSITORY

import vaco_async_mujoco
from vaco_async_mujoco import Args, UsageError, train, validate

BAD = [
    ({"total_timesteps": 0}, "--total-timesteps 0: must be a number from 1 to"),
    ({"num_actors": 0}, "--num-actors 0: must be a number from 1 to"),
    ({"num_actors": -3}, "--num-actors -3: must be a number from 1 to"),
    ({"num_envs": 0}, "--num-envs 0: must be a number from 1 to"),
    ({"num_steps": 1}, "--num-steps 1: must be a number from 2 to"),
    ({"rollouts_per_batch": 0}, "--rollouts-per-batch 0: must be a number from 1 to"),
    ({"num_minibatches": 0}, "--num-minibatches 0: must be a number from 1 to"),
    ({"update_epochs": 0}, "--update-epochs 0: must be a number from 1 to"),
    ({"num_minibatches": 33}, "type --num-minibatches 32"),
    ({"num_minibatches": 4096}, "type --num-minibatches 512"),
    ({"num_envs": 3, "num_steps": 5, "num_minibatches": 4}, "type --num-minibatches 3"),
    ({"lag": 4}, "type --lag-schedule fixed"),
    ({"lag": -1, "lag_schedule": "fixed"}, "--lag -1: must be a number from 0 to"),
    ({"learning_rate": -3e-4}, "--learning-rate -0.0003: must be a number from 0 to"),
    ({"learning_rate": float("nan")}, "--learning-rate nan: must be a number"),
    ({"learning_rate": float("inf")}, "--learning-rate inf: must be a number"),
    ({"gamma": 1.1}, "--gamma 1.1: must be a number from 0 to 1"),
    ({"gamma": float("nan")}, "--gamma nan: must be a number from 0 to 1"),
    ({"gae_lambda": -0.1}, "--gae-lambda -0.1: must be a number from 0 to 1"),
    ({"ent_coef": -0.1}, "--ent-coef -0.1: must be a number from 0 to"),
    ({"vf_coef": -1.0}, "--vf-coef -1.0: must be a number from 0 to"),
    ({"max_grad_norm": -0.5}, "--max-grad-norm -0.5: must be a number from 1e-09 to"),
    ({"rho_bar": -0.1}, "--rho-bar -0.1: must be a number from 0 to"),
    ({"c_bar": -1.0}, "--c-bar -1.0: must be a number from 0 to"),
    ({"tv_threshold": -0.1}, "--tv-threshold -0.1: must be a number from 0 to"),
    ({"num_actors": 1000}, "--num-actors 1000: must be a number from 1 to 256"),
    ({"num_steps": 200_000_000}, "--num-steps 200000000: must be a number from 2 to 100000"),
    ({"rollouts_per_batch": 200_000}, "--rollouts-per-batch 200000: must be a number from 1 to 1024"),
    ({"num_steps": 100_000, "num_envs": 256}, "makes batches of 25600000 samples"),
    ({"lag": 100_000, "lag_schedule": "fixed"}, "--lag 100000: must be a number from 0 to 10000"),
    ({"env_id": "dm_control/cheetah-run-v0"}, "CheetahRun-v1"),
    ({"seed": -1}, "--seed -1: must be a number from 0 to 2147483647"),
    ({"seed": 2**31}, "--seed 2147483648: must be a number from 0 to 2147483647"),
    ({"env_id": "HalfCheeta-v4"}, "HalfCheetah-v4"),
    ({"env_id": "Hopper"}, "Hopper-v4"),
    ({"env_id": "Pong-v5"}, "floating-point Box action space"),
    ({"env_id": "CartPole-v1"}, "floating-point Box action space"),
    ({"env_id": "Sudoku-v0"}, "floating-point Box action space"),
    ({"env_id": ""}, "floating-point Box action space"),
]


@pytest.mark.parametrize(("flags", "expected"), BAD, ids=lambda part: str(part)[:40])
def test_wrong_flags_are_named_with_what_to_type(flags, expected):
    with pytest.raises(UsageError) as caught:
        validate(Args(**flags))
    message = str(caught.value)
    assert expected in message and "\n" not in message
    assert any(message.startswith(f"--{name.replace('_', '-')} ") for name in flags)


def test_compiling_without_a_compiler_is_refused(monkeypatch):
    # torch looks for no other, whatever is there
    monkeypatch.setattr(vaco_async_mujoco.shutil, "which", lambda name: name if name == "clang++" else None)
    for compiler in ("g++", "my-c++"):
        monkeypatch.setenv("CXX", compiler)
        with pytest.raises(UsageError) as caught:
            validate(Args(compile=True))
        assert str(caught.value) == f"--compile: needs {compiler}; type --no-compile"
    validate(Args())


def test_every_flag_has_a_help_text(capsys):
    with pytest.raises(SystemExit) as caught:
        tyro.cli(Args, args=["--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for field in dataclasses.fields(Args):
        _, _, rest = text.partition(f" --{field.name.replace('_', '-')}")
        help_text, _, _ = rest.partition("(default:")
        assert len(help_text.split()) > 2, f"--{field.name} has no help text"


def test_the_advice_for_minibatches_works():
    for num_envs, num_steps, num_minibatches in ((3, 5, 4), (7, 13, 32), (16, 128, 33), (2, 2, 9)):
        args = Args(num_envs=num_envs, num_steps=num_steps, num_minibatches=num_minibatches)
        with pytest.raises(UsageError) as caught:
            validate(args)
        args.num_minibatches = int(str(caught.value).split()[-1])
        validate(args)


def test_nothing_is_started_or_written_for_wrong_flags():
    with pytest.raises(UsageError):
        train(Args(lag=4))
    assert not mp.active_children() and not os.listdir(".")


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("vaco_async_mujoco", ["--lag", "4"]),
        ("vaco_async_mujoco", ["--env-id", "HalfCheeta-v4"]),
        ("vaco_async_mujoco", ["--tv-threshold", "nan"]),
        ("vaco_async_mujoco", ["--num-minibatches", "33"]),
        ("ppo_async_baseline", ["--lag", "4"]),
        ("ppo_async_baseline", ["--env-id", "Pang-v5"]),
        ("impala_baseline", ["--num-minibatches", "5"]),
        ("impala_baseline", ["--env-id", "Pang-v5"]),
    ],
)
def test_the_program_says_it_in_one_line_and_exits_with_2(script, flags):
    command = [sys.executable, REPOSITORY / f"{script}.py", *flags]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and not result.stdout
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith(f"error: {flags[0]} ")


@pytest.mark.parametrize("flags", [["--lag", "many"], ["--lag-schedule", "often"], ["--no-such-flag", "1"]])
def test_what_is_no_flag_or_no_value_exits_with_2(flags):
    command = [sys.executable, REPOSITORY / "vaco_async_mujoco.py", *flags]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and flags[0].strip("-") in result.stderr and "Traceback" not in result.stderr
