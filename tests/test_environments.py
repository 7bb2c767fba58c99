"""Environments that users bring: spaces, scales, and what they do wrong. And flags given from Python."""

import multiprocessing as mp
import re
from pathlib import Path

import gymnasium as gym
import numpy as np
import odd_envs
import pytest
import torch
from conftest import REPOSITORY

import ppo_async_baseline
import vaco_async_llm
import vaco_async_mujoco
from vaco_async_mujoco import Args, ContinuousEnvs, continuous_sizes, train

SHORT = {"num_actors": 1, "num_envs": 4, "num_steps": 32, "num_minibatches": 4, "lag_schedule": "fixed"}
ONE = gym.spaces.Discrete(3)
SPACES = [
    (ONE, 3),
    (gym.spaces.Tuple((gym.spaces.MultiBinary(3), gym.spaces.MultiDiscrete([2, 3]))), 8),
    (gym.spaces.Dict(a=gym.spaces.Box(-1, 1, (2, 2)), b=gym.spaces.Tuple((ONE, ONE))), 10),
    (gym.spaces.Box(0, 255, (4, 4), np.uint8), 16),
    (gym.spaces.Box(-1, 1, ()), 1),
]


@pytest.fixture(autouse=True)
def found_by_actors(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "tests")


def short_run(env_id, **flags):
    return train(Args(env_id=f"odd_envs:{env_id}", **SHORT | {"total_timesteps": 600} | flags))


@pytest.mark.parametrize(("space", "size"), SPACES, ids=str)
def test_observations_are_flattened_as_gymnasium_does(space, size):
    gym.register("Sampled-v0", odd_envs.Sampled, kwargs={"space": space})
    envs = ContinuousEnvs("Sampled-v0", 2, seed=5)
    space.seed(6)
    assert envs.obs.shape == (2, size) and envs.obs.dtype == np.float32
    np.testing.assert_allclose(envs.obs[1], np.ravel(gym.spaces.flatten(space, space.sample())), rtol=1e-6)
    envs.step(np.zeros((2, 2)))
    assert envs.obs.shape == (2, size)
    del gym.registry["Sampled-v0"]


def test_what_cannot_be_used_says_why_in_one_line():
    gym.register("Sampled-v0", odd_envs.Sampled, kwargs={"space": gym.spaces.Sequence(ONE)})
    reasons = {
        "Sampled-v0": "its observations, Sequence",
        "odd_envs:Unmade-v0": "RuntimeError: licence server does not answer",
        "CartPole-v1": r"its actions are Discrete\(2\)",
        "nowhere:Env-v0": "ModuleNotFoundError",
        "odd_envs:Texts-v0": r"its observations, Text\(",
        "HalfCheetah": "envpool has HalfCheetah-v5",
        "Pendulum": "envpool has Pendulum-v1",
        "ALE/Breakout-v5": r"envpool has Breakout-v5, a game: see vaco_async_atari.py",
    }
    for env_id, reason in reasons.items():
        with pytest.raises(ValueError, match=f"^--env-id {env_id}.*{reason}") as caught:
            continuous_sizes(env_id)
        assert "\n" not in str(caught.value)
    del gym.registry["Sampled-v0"]


def test_an_environment_with_growing_infos_trains():
    short_run("Growing-v0")


def test_observations_of_any_finite_size_train():
    agent = short_run("Huge-v0")
    assert all(torch.isfinite(tensor).all() for tensor in agent.state_dict().values()) and agent.obs_std.max() > 1e38


def test_the_unit_of_rewards_does_not_matter(capsys):
    one, other = short_run("Plain-v0"), short_run("Micro-v0")
    plain, micro = map(float, re.findall(r"return (\S+) after", capsys.readouterr().out))
    assert micro == pytest.approx(plain / 2**20, rel=1e-4)
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(tensor, other.state_dict()[name], msg=name)


def test_an_environment_that_raises_at_once_ends_the_run_with_one_traceback(capfd):
    with pytest.raises(SystemExit) as caught:
        short_run("Raising-v0")
    reason, errors = str(caught.value), capfd.readouterr().err
    assert re.search(r"actor \d, or its environment, raised RuntimeError: no such joint, for the second time", reason)
    assert "\n" not in reason and errors.count("Traceback") == 1 and "in step" in errors
    assert "restart 1" in errors and "restart 2" not in errors and "--resume" not in errors


def train_in_a_daemon(queue):
    try:
        short_run("Plain-v0")
    except RuntimeError as error:
        queue.put(str(error))


def test_a_daemonic_process_is_told_what_to_use():
    context = mp.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=train_in_a_daemon, args=(queue,), daemon=True)
    process.start()
    process.join()
    assert "ProcessPoolExecutor" in queue.get()


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        (vaco_async_mujoco, {"lag_schedule": "Fixed", "lag": 4}),
        (vaco_async_mujoco, {"tv_anchor": "Learner"}),
        (vaco_async_mujoco, {"num_steps": 16.5}),
        (vaco_async_mujoco, {"norm_adv": 1}),
        (vaco_async_mujoco, {"env_id": None}),
        (vaco_async_mujoco, {"seed": "1"}),
        (vaco_async_mujoco, {"learning_rate": float("nan")}),
        (ppo_async_baseline, {"objective": "KL"}),
        (vaco_async_llm, {"objective": "GRPO"}),
    ],
    ids=str,
)
def test_flags_from_python_are_judged_as_typed_ones(script, flags):
    with pytest.raises(ValueError, match=next(iter(flags)).replace("_", "[-_]")):
        script.Args(**flags)


def test_numbers_of_numpy_become_pythons():
    rate = np.logspace(-4, -3, 3)[0]
    train(Args(**SHORT, env_id="Pendulum-v1", total_timesteps=np.float64(128), learning_rate=rate, seed=np.int64(3)))
    saved = torch.load(next(Path("runs").glob("*/checkpoint.pt")), weights_only=True)["args"]
    assert [type(saved[name]) for name in ("total_timesteps", "learning_rate", "seed")] == [int, float, int]
    assert isinstance(Args(gamma=1).gamma, float)
