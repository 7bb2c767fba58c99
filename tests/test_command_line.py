"""Wrong flags: one line that names the flag, exit code 2, before anything is started or written."""

import dataclasses
import os
import re
import subprocess
import sys

import pytest
import tyro
from conftest import REPOSITORY

from vaco_async_mujoco import Args

AT_LEAST_ONE = ("total_timesteps", "num_actors", "num_envs", "num_steps", "rollouts_per_batch", "num_minibatches")
BAD = [
    *({name: 0} for name in (*AT_LEAST_ONE, "update_epochs")),
    *({name: -1} for name in ("num_actors", "lag", "seed", "checkpoint_interval")),
    *({name: -0.1} for name in ("learning_rate", "gamma", "gae_lambda", "ent_coef", "vf_coef", "max_grad_norm")),
    *({name: -0.1} for name in ("rho_bar", "c_bar", "tv_threshold")),
    {"num_minibatches": 1024},  # minibatches of 2 samples
    {"lag": 4},  # without a lockstep schedule
    {"resume": "nowhere"},
    *({"env_id": env_id} for env_id in ("", "HalfCheeta-v4", "dm_control/cheetah-run-v0", "nowhere:Env-v0")),
    *({"env_id": env_id} for env_id in ("Pong-v5", "CartPole-v1")),  # have discrete actions
]


@pytest.mark.parametrize("flags", BAD, ids=str)
def test_wrong_flags_are_named_in_one_line(flags):
    with pytest.raises(ValueError) as caught:
        Args(**flags)
    ((name, value),) = flags.items()
    assert str(caught.value).startswith(f"--{name.replace('_', '-')} {value}")
    assert "\n" not in str(caught.value)


def test_every_flag_has_a_help_text(capsys):
    with pytest.raises(SystemExit) as caught:
        tyro.cli(Args, args=["--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for field in dataclasses.fields(Args):
        _, _, rest = text.partition(f" --{field.name.replace('_', '-')}")
        help_text, _, _ = rest.partition("(default:")
        assert len(help_text.split()) > 2, f"--{field.name} has no help text"


def test_without_docstrings_there_is_help():
    command = [sys.executable, "-OO", REPOSITORY / "vaco_async_mujoco.py", "--help"]
    assert subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.parametrize(
    ("script", "flags", "advice"),
    [
        ("vaco_async_mujoco", ["--lag", "4"], "--lag-schedule fixed"),
        ("vaco_async_mujoco", ["--env-id", "HalfCheeta-v4"], "HalfCheeta"),
        ("vaco_async_mujoco", ["--env-id", "CartPole-v1"], "Discrete(2)"),
        ("vaco_async_mujoco", ["--resume", "nowhere"], "checkpoint.pt"),
        ("vaco_async_mujoco", ["--total-timesteps", "1e6"], "1e6"),
        ("vaco_async_mujoco", ["--lag-schedule", "often"], "mixture"),
        ("vaco_async_mujoco", ["--no-such-flag", "1"], "--help"),
        ("vaco_async_atari", ["--env-id", "Pang-v5"], "Pong-v5"),
        ("ppo_async_baseline", ["--env-id", "BreakoutNoFrameskip-v4"], "BreakoutNoFrameskip"),
        ("impala_baseline", ["--num-minibatches", "17"], "16 sequences"),
    ],
)
def test_the_program_exits_with_2_and_leaves_nothing(script, flags, advice):
    command = [sys.executable, REPOSITORY / f"{script}.py", *flags]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and not result.stdout and not os.listdir(".")
    message = " ".join(re.sub("[│╭╮╰╯─]", "", result.stderr).split())
    assert flags[0] in message and advice in message
    assert "Traceback" not in message
