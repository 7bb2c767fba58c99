"""CleanRL's ppo_continuous_action, written from its description, defaults and eager code; for its speed alone.

With one environment of gymnasium and 2048 steps, as published, or with 16 of envpool and 128 steps, the manner of its
ppo_atari_envpool. See https://docs.cleanrl.dev/rl-algorithms/ppo.
"""

import sys

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
from torch.distributions.normal import Normal
from torch.utils.tensorboard import SummaryWriter

manner, total_steps, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
num_envs, num_steps = (1, 2048) if manner == "gymnasium" else (16, 128)


class EnvpoolEnvs:
    """16 environments of envpool, with observations and rewards normalised as gymnasium's wrappers do it."""

    def __init__(self):
        import envpool
        from gymnasium.wrappers.utils import RunningMeanStd

        self.envs = envpool.make("HalfCheetah-v4", "gymnasium", num_envs=num_envs, seed=1)
        self.obs_statistics = RunningMeanStd(shape=17)
        self.return_statistics = RunningMeanStd(shape=())
        self.returns = np.zeros(num_envs)

    def normalize(self, obs):
        self.obs_statistics.update(obs)
        return np.clip((obs - self.obs_statistics.mean) / np.sqrt(self.obs_statistics.var + 1e-8), -10, 10)

    def reset(self, seed):
        obs, info = self.envs.reset()
        return self.normalize(obs), info

    def step(self, actions):
        obs, rewards, terminated, truncated, info = self.envs.step(np.clip(actions, -1, 1).astype(np.float64))
        self.returns = self.returns * 0.99 * (1 - terminated) + rewards
        self.return_statistics.update(self.returns)
        rewards = np.clip(rewards / np.sqrt(self.return_statistics.var + 1e-8), -10, 10)
        return self.normalize(obs), rewards, terminated, truncated, info


def make_env():
    env = gym.wrappers.ClipAction(gym.wrappers.RecordEpisodeStatistics(gym.make("HalfCheetah-v4")))
    env = gym.wrappers.NormalizeObservation(env)
    env = gym.wrappers.TransformObservation(env, lambda obs: np.clip(obs, -10, 10), env.observation_space)
    return gym.wrappers.TransformReward(gym.wrappers.NormalizeReward(env), lambda reward: np.clip(reward, -10, 10))


def layer_init(layer, std=2**0.5):
    nn.init.orthogonal_(layer.weight, std)
    nn.init.constant_(layer.bias, 0.0)
    return layer


class Agent(nn.Module):
    def __init__(self):
        super().__init__()

        def mlp(size, std):
            hidden = [layer_init(nn.Linear(17, 64)), nn.Tanh(), layer_init(nn.Linear(64, 64)), nn.Tanh()]
            return nn.Sequential(*hidden, layer_init(nn.Linear(64, size), std))

        self.critic = mlp(1, 1.0)
        self.actor_mean = mlp(6, 0.01)
        self.actor_logstd = nn.Parameter(torch.zeros(1, 6))

    def get_action_and_value(self, obs, action=None):
        mean = self.actor_mean(obs)
        probs = Normal(mean, torch.exp(self.actor_logstd.expand_as(mean)))
        if action is None:
            action = probs.sample()
        return action, probs.log_prob(action).sum(1), probs.entropy().sum(1), self.critic(obs)


def main():
    torch.set_num_threads(1)
    envs = EnvpoolEnvs() if manner == "envpool" else gym.vector.SyncVectorEnv([make_env])
    agent = Agent()
    optimizer = torch.optim.Adam(agent.parameters(), lr=3e-4, eps=1e-5)
    writer = SummaryWriter(folder)
    shape = (num_steps, num_envs)
    obs, actions = torch.zeros(*shape, 17), torch.zeros(*shape, 6)
    logprobs, rewards, dones, values = (torch.zeros(shape) for _ in range(4))
    next_obs = torch.Tensor(envs.reset(seed=1)[0])
    next_done = torch.zeros(num_envs)
    global_step = 0
    while global_step < total_steps:
        optimizer.param_groups[0]["lr"] = 3e-4 * (1 - global_step / total_steps)
        for step in range(num_steps):
            global_step += num_envs
            obs[step], dones[step] = next_obs, next_done
            with torch.no_grad():
                action, logprobs[step], _, value = agent.get_action_and_value(next_obs)
                values[step] = value.flatten()
            actions[step] = action
            next_obs, reward, terminated, truncated, _ = envs.step(action.numpy())
            rewards[step] = torch.tensor(reward).view(-1)
            next_obs, next_done = torch.Tensor(next_obs), torch.Tensor(np.logical_or(terminated, truncated))
        with torch.no_grad():
            next_value = agent.critic(next_obs).reshape(1, -1)
            advantages, last = torch.zeros_like(rewards), 0
            for t in reversed(range(num_steps)):
                nonterminal = 1.0 - (next_done if t == num_steps - 1 else dones[t + 1])
                after = next_value if t == num_steps - 1 else values[t + 1]
                delta = rewards[t] + 0.99 * after * nonterminal - values[t]
                advantages[t] = last = delta + 0.99 * 0.95 * nonterminal * last
            returns = advantages + values
        b_obs, b_actions, b_logprobs = obs.flatten(0, 1), actions.flatten(0, 1), logprobs.flatten()
        b_advantages, b_returns, b_values = advantages.flatten(), returns.flatten(), values.flatten()
        indices, clipfracs = np.arange(2048), []
        for _ in range(10):
            np.random.shuffle(indices)
            for start in range(0, 2048, 64):
                mb = indices[start : start + 64]
                _, newlogprob, entropy, newvalue = agent.get_action_and_value(b_obs[mb], b_actions[mb])
                logratio = newlogprob - b_logprobs[mb]
                ratio = logratio.exp()
                with torch.no_grad():
                    old_approx_kl, approx_kl = (-logratio).mean(), ((ratio - 1) - logratio).mean()
                    clipfracs.append(((ratio - 1.0).abs() > 0.2).float().mean().item())
                mb_advantages = b_advantages[mb]
                mb_advantages = (mb_advantages - mb_advantages.mean()) / (mb_advantages.std() + 1e-8)
                pg_loss = torch.max(-mb_advantages * ratio, -mb_advantages * torch.clamp(ratio, 0.8, 1.2)).mean()
                newvalue = newvalue.view(-1)
                v_clipped = b_values[mb] + torch.clamp(newvalue - b_values[mb], -0.2, 0.2)
                v_loss_max = torch.max((newvalue - b_returns[mb]) ** 2, (v_clipped - b_returns[mb]) ** 2)
                loss = pg_loss - 0.0 * entropy.mean() + 0.5 * 0.5 * v_loss_max.mean()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
                optimizer.step()
        for name, number in (("old_approx_kl", old_approx_kl), ("approx_kl", approx_kl), ("loss", loss)):
            writer.add_scalar(f"losses/{name}", number.item(), global_step)
        writer.add_scalar("losses/clipfrac", np.mean(clipfracs), global_step)


if __name__ == "__main__":
    main()
