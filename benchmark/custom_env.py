"""An environment of your own: `train` on it, and a loop of your own around `vtrace` and `tv_filter`."""

import sys
from copy import deepcopy

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
from torch.distributions import Normal

sys.path.append(f"{sys.path[0]}/..")  # where the scripts are
from vaco_async_mujoco import Args, train, tv_filter, vtrace


class Reach(gym.Env):
    """Move a point to a goal; observations are both places, far from normalised."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (4,))
    action_space = gym.spaces.Box(-1, 1, (2,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.point = self.np_random.uniform(-1, 1, 2)
        self.goal = self.np_random.uniform(-1, 1, 2)
        return self.observe(), {}

    def observe(self):
        return (50 + 10 * np.concatenate([self.point, self.goal])).astype(np.float32)

    def step(self, action):
        self.point = np.clip(self.point + 0.2 * action, -1, 1)
        reward = -float(np.abs(self.point - self.goal).sum())
        return self.observe(), reward, False, False, {}


gym.register("Reach-v0", Reach, max_episode_steps=30)  # at the top level, since actors import this file, too


def collect(envs, beta, seed):
    """Whole episodes by the policy beta: observations [T + 1, N, 4], normalised; actions [T, N, 2]; rewards [T, N]."""
    first, _ = envs.reset(seed=seed)
    obs = [torch.from_numpy(first - 50) / 10]
    actions = []
    rewards = []
    for _ in range(30):
        action = torch.normal(beta(obs[-1]).detach(), 0.5)
        observed, reward, *_ = envs.step(action.clamp(-1, 1).numpy())
        obs.append(torch.from_numpy(observed - 50) / 10)
        actions.append(action)
        rewards.append(torch.from_numpy(reward).float())
    return torch.stack(obs), torch.stack(actions), torch.stack(rewards)


def train_by_hand():
    """VACO in a loop of its own, on data of the policy of one version ago."""
    envs = gym.make_vec("Reach-v0", 16, vectorization_mode="sync")
    policy = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 2))
    critic = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 1))
    optimizer = torch.optim.Adam([*policy.parameters(), *critic.parameters()], lr=2e-3)
    newest = deepcopy(policy)
    for batch in range(200):
        beta = newest
        newest = deepcopy(policy)
        obs, actions, rewards = collect(envs, beta, seed=16 * batch)

        def logprobs_of(network, obs=obs, actions=actions):
            return Normal(network(obs[:-1]), 0.5).log_prob(actions).sum(-1)

        # Align: once per batch
        with torch.no_grad():
            behavior_logprobs = logprobs_of(beta)
            log_rhos = logprobs_of(policy) - behavior_logprobs
            values = critic(obs).squeeze(-1)
        never = torch.zeros_like(rewards)  # no state is terminal, and no episode ends within a batch
        targets, advantages = vtrace(log_rhos, rewards, values, never, never, 0.99, 0.95, 1.0, 1.0)
        # Filter: at every gradient step
        for _ in range(10):
            ratios = (logprobs_of(policy) - behavior_logprobs).exp()
            keep, tv = tv_filter(ratios.detach(), advantages, tv_threshold=0.1)
            policy_loss = -(keep * ratios * advantages).mean()
            value_loss = (critic(obs[:-1]).squeeze(-1) - targets).square().mean()
            optimizer.zero_grad()
            (policy_loss + value_loss).backward()
            optimizer.step()
        if batch in (0, 199):
            print(f"a loop of your own, batch {batch}: return {rewards.sum(0).mean():.1f}, total variation {tv:.3f}")


if __name__ == "__main__":
    train(Args(env_id="Reach-v0", total_timesteps=40_000, num_actors=2))
    train_by_hand()
