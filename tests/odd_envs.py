"""Environments that users may bring, for test_environments.py; actors import this file, too."""

import gymnasium as gym
import numpy as np


class Scaled(gym.Env):
    """Move to the origin; observations and rewards come in any scale."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,))
    action_space = gym.spaces.Box(-1, 1, (2,))

    def __init__(self, obs_scale=1.0, reward_scale=1.0):
        self.obs_scale = obs_scale
        self.reward_scale = reward_scale

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = self.np_random.uniform(-1, 1, 2)
        return np.float32(self.obs_scale * self.place), {}

    def step(self, action):
        self.place = np.clip(self.place + 0.2 * action, -1, 1)
        return np.float32(self.obs_scale * self.place), -self.reward_scale * np.abs(self.place).sum(), False, False, {}


class Unmade(Scaled):
    def __init__(self):
        raise RuntimeError("licence server\ndoes not answer")


class Sampled(Scaled):
    """Observations are drawn from a space."""

    def __init__(self, space):
        self.observation_space = space

    def reset(self, *, seed=None, options=None):
        self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, False, {}


gym.register("Plain-v0", Scaled, max_episode_steps=20)
gym.register("Huge-v0", Scaled, max_episode_steps=20, kwargs={"obs_scale": 3e38})
gym.register("Micro-v0", Scaled, max_episode_steps=20, kwargs={"reward_scale": 2.0**-20})
gym.register("Unmade-v0", Unmade)
