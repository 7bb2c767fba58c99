"""An environment of your own: `train` on it, and a loop of your own around `vtrace` and `tv_filter`."""

import sys
from copy import deepcopy

import gymnasium as gym
import numpy as np
import torch
from torch.distributions import Normal
from torch.nn import Linear, Sequential, Tanh

sys.path.append(f"{sys.path[0]}/..")  # where the scripts are
from vaco_async_mujoco import Args, train, tv_filter, vtrace


class Reach(gym.Env):
    """Move a point to a goal; observations are both places, far from normalised."""

    observation_space, action_space = gym.spaces.Box(-np.inf, np.inf, (4,)), gym.spaces.Box(-1, 1, (2,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.point, self.goal = self.np_random.uniform(-1, 1, (2, 2))
        return self.step(np.zeros(2))[0], {}

    def step(self, action):
        self.point = np.clip(self.point + 0.2 * action, -1, 1)
        obs = (50 + 10 * np.concatenate([self.point, self.goal])).astype(np.float32)
        return obs, -float(np.abs(self.point - self.goal).sum()), False, False, {}


gym.register("Reach-v0", Reach, max_episode_steps=30)  # at the top level, since actors import this file, too

if __name__ == "__main__":
    train(Args(env_id="Reach-v0", total_timesteps=40_000, num_actors=2))
    # A loop of your own: actions by the policy of one version ago, whole episodes
    envs = gym.make_vec("Reach-v0", 16, vectorization_mode="sync")
    policy, critic = (Sequential(Linear(4, 64), Tanh(), Linear(64, size)) for size in (2, 1))
    optimizer, newest = torch.optim.Adam([*policy.parameters(), *critic.parameters()], lr=2e-3), deepcopy(policy)
    for batch in range(100):
        beta, newest = newest, deepcopy(policy)
        obs, actions, rewards = torch.zeros(31, 16, 4), torch.zeros(30, 16, 2), torch.zeros(30, 16)
        obs[0] = torch.from_numpy(envs.reset(seed=16 * batch)[0] - 50) / 10
        for t in range(30):
            actions[t] = torch.normal(beta(obs[t]).detach(), 0.5)
            observed, paid, *_ = envs.step(actions[t].clamp(-1, 1).numpy())
            obs[t + 1], rewards[t] = torch.from_numpy(observed - 50) / 10, torch.from_numpy(paid)
        with torch.no_grad():
            behavior, learner = (Normal(net(obs[:-1]), 0.5).log_prob(actions).sum(-1) for net in (beta, policy))
            no, values = torch.zeros(30, 16), critic(obs).squeeze(-1)  # nothing terminates
        targets, advantages = vtrace(learner - behavior, rewards, values, no, no, 0.99, 0.95, 1.0, 1.0)
        for _ in range(10):
            ratios = (Normal(policy(obs[:-1]), 0.5).log_prob(actions).sum(-1) - behavior).exp()
            keep, tv = tv_filter(ratios.detach(), advantages, tv_threshold=0.2)
            loss = (critic(obs[:-1]).squeeze(-1) - targets).square().mean() - (keep * ratios * advantages).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if batch in (0, 99):
            print(f"a loop of your own, batch {batch}: return {rewards.sum(0).mean():.1f}, total variation {tv:.3f}")
