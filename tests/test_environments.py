"""Environments that users bring: spaces, scales, and what they do wrong. And flags given from Python."""

import re

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
        "Sampled-v0": "",  # gymnasium's reasons for what it cannot flatten are not always good ones
        "odd_envs:Unmade-v0": "RuntimeError.*licence server",
        "CartPole-v1": r"its actions are Discrete\(2\)",
        "nowhere:Env-v0": "ModuleNotFoundError",
    }
    for env_id, reason in reasons.items():
        with pytest.raises(ValueError, match=f"^--env-id {env_id}.*{reason}") as caught:
            continuous_sizes(env_id)
        assert "\n" not in str(caught.value)
    del gym.registry["Sampled-v0"]


def test_observations_of_any_finite_size_train():
    agent = short_run("Huge-v0")
    assert all(torch.isfinite(tensor).all() for tensor in agent.state_dict().values()) and agent.obs_std.max() > 1e38


def test_the_unit_of_rewards_does_not_matter(capsys):
    one, other = short_run("Plain-v0"), short_run("Micro-v0")
    plain, micro = map(float, re.findall(r"return (\S+) after", capsys.readouterr().out))
    assert micro == pytest.approx(plain / 2**20, rel=1e-4)
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(tensor, other.state_dict()[name], msg=name)


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        (vaco_async_mujoco, {"lag_schedule": "Fixed", "lag": 4}),
        (vaco_async_mujoco, {"tv_anchor": "Learner"}),
        (vaco_async_mujoco, {"num_steps": 16.5}),
        (vaco_async_mujoco, {"norm_adv": 1.0}),
        (vaco_async_mujoco, {"total_timesteps": 1e6}),
        (vaco_async_mujoco, {"learning_rate": np.float64(1e-3)}),  # a checkpoint could not hold it
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
