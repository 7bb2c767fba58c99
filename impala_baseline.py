"""IMPALA under policy lag: a baseline for VACO, on the same actors, in one file.

"IMPALA: Scalable Distributed Deep-RL with Importance Weighted Actor-Learner Architectures", arXiv 1802.01561. V-trace
with the current policy and critic at every gradient step, on minibatches of whole sequences; one pass over the data.
The picture at the top of vaco_async_mujoco.py shows how actors and learner work together here, too.

    python impala_baseline.py                                 # HalfCheetah-v4, free running
    python impala_baseline.py --lag-schedule mixture --lag 8  # by one of the last 9 versions, reproducible
    python impala_baseline.py --env-id Pong-v5                # Atari, with its own defaults
    python impala_baseline.py --update-epochs 20              # as many updates as PPO (Atari: 16)
"""

import contextlib
import math
import multiprocessing as mp
import os
import random
import re
import signal
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing.connection import wait
from typing import Literal, get_args, get_type_hints

import envpool
import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import tyro
from gymnasium.wrappers.utils import RunningMeanStd
from torch.utils.tensorboard import SummaryWriter

LATEST = -1  # as a ticket's version: the newest one at the moment the rollout begins
# What flags are that are None. Continuous control: tuned a little on HalfCheetah-v4 (docs/results.md). Atari: the
# paper's optimiser, losses and batch of 32 x 20 samples
CONTINUOUS = {"total_timesteps": 1_000_000, "num_envs": 16, "num_steps": 128, "rollouts_per_batch": 1}
CONTINUOUS |= {"num_minibatches": 16, "learning_rate": 2e-3, "gae_lambda": 0.95, "sum_loss": False, "ent_coef": 0.0}
CONTINUOUS |= {"max_grad_norm": 0.5}
ATARI = {"total_timesteps": 10_000_000, "num_envs": 8, "num_steps": 20, "rollouts_per_batch": 4}
ATARI |= {"num_minibatches": 1, "learning_rate": 6e-4, "gae_lambda": 1.0, "sum_loss": True, "ent_coef": 0.01}
ATARI |= {"max_grad_norm": 40.0}


@dataclass
class Args:
    exp_name: str = os.path.basename(__file__)[: -len(".py")]  # the name of this experiment
    seed: int = 1  # seed of networks, minibatches, action noise and environments
    cuda: bool = True  # if toggled, the learner runs on the GPU when there is one; actors act on the CPU
    actor_nice: int = 0  # niceness of the actors, up to 19: on cores that they share, the learner goes first
    learner_threads: int = 1  # CPU threads of the learner; the MLPs do not gain from more, the CNN does
    track: bool = False  # if toggled, curves, flags and code go to Weights & Biases, too (WANDB_PROJECT, WANDB_ENTITY)
    checkpoint_interval: int = 0  # batches between checkpoints; 0: only at the end, and at Ctrl-C or SIGTERM
    resume: str = ""  # the folder of a run to go on with; its flags are kept, except those given again
    actor_timeout: float = 120.0  # seconds for one rollout, after which an actor counts as stuck; 0: no limit

    env_id: str = "HalfCheetah-v4"  # a continuous task (yours: my_module:MyEnv-v0), or an Atari game (Pong-v5)
    total_timesteps: int | None = None  # environment steps to train for, not counting skipped frames
    episodic_life: bool = True  # Atari: if toggled, a lost life ends an episode for the learner
    reward_clip: bool = True  # Atari: if toggled, the learner sees the sign of rewards; scores are raw
    repeat_action_probability: float = 0.0  # Atari: the probability of a sticky action
    bf16: bool = False  # Atari: if toggled, the CNN computes in bfloat16, in learner and actors
    num_actors: int = 4  # actor processes; data is about num_actors / rollouts_per_batch versions old
    num_envs: int | None = None  # environments per actor
    num_steps: int | None = None  # steps per environment in one rollout
    rollouts_per_batch: int | None = None  # rollouts per batch, which has rollouts_per_batch * num_envs sequences
    # free running; every batch exactly `lag` versions old; each rollout by one of the last `lag + 1`, drawn uniformly
    lag_schedule: Literal["async", "fixed", "mixture"] = "async"
    lag: int = 0  # policy lag of the lockstep schedules, in versions; there is one version per batch

    update_epochs: int = 1  # passes over each batch; the more, the further the policy moves on it (forward lag)
    num_minibatches: int | None = None  # minibatches of whole sequences, that is gradient steps, per pass
    learning_rate: float | None = None  # the learning rate of Adam; Atari: of RMSprop
    sum_loss: bool | None = None  # if True, losses are sums over a minibatch, as published; if False, means
    anneal_lr: bool = True  # if toggled, the learning rate falls linearly to 0 over total_timesteps
    log_std_init: float = -0.5  # continuous control: log standard deviation of the Gaussian policy at the start
    gamma: float = 0.99  # the discount factor
    gae_lambda: float | None = None  # the trace decay of V-trace, 1 being IMPALA's own
    ent_coef: float | None = None  # coefficient of the entropy bonus
    vf_coef: float = 0.5  # coefficient of the value loss
    max_grad_norm: float | None = None  # the largest norm of a gradient

    rho_bar: float = 1.0  # upper bound of the importance weight of a temporal difference, and of the policy gradient's
    c_bar: float = 1.0  # upper bound of the importance weight by which a trace is carried on

    def __post_init__(self):
        for name, value in (ATARI if is_atari(self.env_id) else CONTINUOUS).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        for name, hint in get_type_hints(Args).items():
            value = getattr(self, name)
            choices = get_args(hint) or (hint,)  # of a Literal, or types
            if value not in choices and type(value) not in choices and not (float in choices and type(value) is int):
                raise ValueError(f"--{name.replace('_', '-')} {value!r}: must be one of {choices}")
            lowest = 2 if name == "num_steps" else name.startswith(("num_", "total_", "rollouts_", "update_"))
            if type(value) in (int, float) and name != "log_std_init" and not value >= lowest:
                raise ValueError(f"--{name.replace('_', '-')} {value}: must be at least {int(lowest)}")
        if self.lag and self.lag_schedule == "async":
            raise ValueError(f"--lag {self.lag}: needs --lag-schedule fixed or mixture; async varies by --num-actors")
        sequences = self.rollouts_per_batch * self.num_envs
        if sequences < self.num_minibatches:
            raise ValueError(f"--num-minibatches {self.num_minibatches}: a batch has {sequences} sequences")
        if self.resume and not os.path.exists(f"{self.resume}/checkpoint.pt"):
            raise ValueError(f"--resume {self.resume}: is not the folder of a run, with a checkpoint.pt")
        if not is_atari(self.env_id):
            continuous_sizes(self.env_id)


class ContinuousEnvs:
    """The environments of one actor: C copies of a task of envpool or gymnasium; environment i has seed + i.

    `obs` [C, D], float32, are the observations now, dicts flattened. Both libraries reset on the *next* step: the last
    observation of an episode is the true one, and the step after it ignores the action and returns the first of the
    next episode. That dummy step is no data, whatever its reward: `valid` [C] is False where the coming step is one."""

    def __init__(self, env_id, num_envs, seed, gamma=1.0, **options):
        self.gamma = gamma
        self.valid = np.ones(num_envs, dtype=bool)
        self.discounted = np.zeros(num_envs)  # return of each episode so far: its deviation is the scale of rewards
        self.totals = np.zeros((num_envs, 2))  # return and length of each episode so far
        if env_id in envpool.list_all_envs():
            self.envs = envpool.make(env_id, "gymnasium", num_envs=num_envs, num_threads=1, seed=seed, **options)
            obs, _ = self.envs.reset()
        else:
            envs = gym.make_vec(env_id, num_envs, vectorization_mode="sync", **options)
            self.envs = gym.wrappers.vector.FlattenObservation(envs)
            obs, _ = self.envs.reset(seed=seed)
        self.obs = self.flatten(obs)
        self.space = self.envs.single_action_space
        if not isinstance(self.space, gym.spaces.Box) or not np.issubdtype(self.space.dtype, np.floating):
            raise ValueError(f"its actions are {self.space}, not continuous")
        bounded = np.isfinite(self.space.low) & np.isfinite(self.space.high)
        self.low = np.where(bounded, self.space.low, -1)  # where actions of -1 and 1 are
        self.high = np.where(bounded, self.space.high, 1)

    def flatten(self, obs):
        if isinstance(obs, dict):
            return np.concatenate([self.flatten(part) for part in obs.values()], axis=1)
        return obs.reshape(len(self.valid), -1).astype(np.float32)

    def step(self, actions):
        """Actions [C, A] -> {what the learner needs of this step: [C]}, [return, length] of each ended episode."""
        actions = self.low + (actions.reshape(-1, *self.space.shape) + 1) / 2 * (self.high - self.low)
        # envpool would charge the control cost of unclipped actions
        actions = np.clip(actions, self.space.low, self.space.high).astype(self.space.dtype)
        obs, rewards, terminated, truncated, _ = self.envs.step(actions)
        self.obs = self.flatten(obs)
        self.discounted = (self.gamma * self.discounted + rewards) * self.valid
        self.totals += np.stack([rewards * self.valid, self.valid], axis=1)
        done = terminated | truncated
        episodes = self.totals[done].tolist()
        self.totals[done] = 0
        self.valid = ~done
        fields = {"rewards": rewards, "discounted": self.discounted, "terminated": terminated, "truncated": truncated}
        return fields, episodes


class AtariEnvs:
    """The environments of one actor: C copies of an Atari game; environment i has seed + i.

    `obs` [C, 84, 84, 4], uint8, are the last 4 grey frames. envpool resets on the *next* step, which is a dummy: see
    `valid` [C]. With episodic_life a lost life is a terminated step for the learner, while `totals` are of whole games,
    in raw score. All else is envpool's default (docs/atari.md)."""

    def __init__(self, env_id, num_envs, seed, **options):
        self.valid = np.ones(num_envs, dtype=bool)
        self.over = np.zeros(num_envs, dtype=bool)  # whether the last step has ended a game
        self.totals = np.zeros((num_envs, 2))  # score and length of each game so far
        self.envs = envpool.make(env_id, "gymnasium", num_envs=num_envs, num_threads=1, seed=seed, **options)
        obs, info = self.envs.reset()
        self.obs = np.moveaxis(obs, 1, -1)
        self.lives = info["lives"]

    def step(self, actions):
        """Actions [C] -> {what the learner needs of this step: [C]}, [score, length] of each ended game."""
        obs, rewards, terminated, truncated, info = self.envs.step(actions.astype(np.int32))
        # A game can also end unseen, in the no-ops of a dummy step after a lost life: then there are more lives again
        unseen = ~self.valid & ~self.over & (info["lives"] > self.lives)
        episodes = self.totals[unseen].tolist()
        self.totals[unseen] = 0
        self.totals += np.stack([info["reward"], self.valid], axis=1)
        self.over = info["terminated"].astype(bool) | truncated
        episodes += self.totals[self.over].tolist()
        self.totals[self.over] = 0
        self.valid = ~(terminated | truncated)
        self.lives = info["lives"]
        self.obs = np.moveaxis(obs, 1, -1)
        return {"rewards": rewards, "terminated": terminated, "truncated": truncated}, episodes


@cache
def continuous_sizes(env_id):
    """(observation size, action size) of a task. Raises ValueError, with the reason, if it cannot be trained on."""
    try:
        envs = ContinuousEnvs(env_id, num_envs=1, seed=0)
    except Exception as error:  # whatever its constructor raises
        raise ValueError(f"--env-id {env_id} cannot be used: {error!r}") from None
    return envs.obs.shape[1], math.prod(envs.space.shape)


def is_atari(env_id):
    """Whether a task is an Atari game of envpool."""
    return env_id in envpool.list_all_envs() and hasattr(envpool.make_spec(env_id).config, "full_action_space")


def layer_init(layer, std=2**0.5, bias_const=0.0):
    nn.init.orthogonal_(layer.weight, std)
    nn.init.constant_(layer.bias, bias_const)
    return layer


class MlpAgent(nn.Module):
    """Gaussian policy with a state-independent standard deviation, and critic: two MLPs, 64-64 tanh.

    The observation statistics are buffers: published and saved with the weights, frozen while a version acts."""

    def __init__(self, obs_size, action_size, log_std_init=-0.5):
        super().__init__()

        def mlp(out_size, std):
            hidden = [layer_init(nn.Linear(obs_size, 64)), nn.Tanh(), layer_init(nn.Linear(64, 64)), nn.Tanh()]
            return nn.Sequential(*hidden, layer_init(nn.Linear(64, out_size), std=std))

        self.critic = mlp(1, std=1.0)
        self.actor_mean = mlp(action_size, std=0.01)
        self.actor_logstd = nn.Parameter(log_std_init * torch.ones(action_size))
        self.register_buffer("obs_mean", torch.zeros(obs_size))
        self.register_buffer("obs_std", torch.ones(obs_size))

    def normalize(self, obs):
        """Raw to normalised observations [..., D], which all methods take but `act`."""
        return ((obs - self.obs_mean) / self.obs_std).clamp(-10, 10)

    @torch.no_grad()
    def set_statistics(self, mean, std, first):
        """Replace the observation statistics [D] and fit the first layers to them, or every batch would move the policy
        without a gradient. Not made up for: the `first` ones, deviations that double or halve, and clamping."""
        mean = torch.as_tensor(mean).to(self.obs_mean)
        std = torch.as_tensor(std).to(self.obs_std)
        growth = std / self.obs_std
        known = (growth > 0.5) & (growth < 2) & (not first)
        for layer in (self.critic[0], self.actor_mean[0]):
            layer.bias += layer.weight @ torch.where(known, (mean - self.obs_mean) / self.obs_std, 0)
            layer.weight *= torch.where(known, growth, 1)
        self.obs_mean.copy_(mean)
        self.obs_std.copy_(std)

    def get_value(self, obs):
        return self.critic(obs).squeeze(-1)

    def get_logprob(self, mean, actions):
        """Joint log-probability, summed over the action's dimensions, of unclipped actions: [..., A] -> [...]."""
        z = (actions - mean) * torch.exp(-self.actor_logstd)
        return (-0.5 * z.square() - self.actor_logstd - 0.5 * math.log(2 * math.pi)).sum(-1)

    def act(self, obs, greedy=False):
        """Raw observations [C, D] -> sampled (or the most likely) actions [C, A], and their log-probabilities [C]."""
        mean = self.actor_mean(self.normalize(obs))
        noise = torch.zeros_like(mean) if greedy else torch.randn(mean.shape)
        actions = mean + torch.exp(self.actor_logstd) * noise
        return actions, self.get_logprob(mean, actions)

    def evaluate(self, obs, actions):
        """Observations [..., D], actions [..., A] -> log-probabilities [...], entropy (one for all), values [...]."""
        entropy = (self.actor_logstd + 0.5 * math.log(2 * math.pi * math.e)).sum()
        return self.get_logprob(self.actor_mean(obs), actions), entropy, self.get_value(obs)


class CnnAgent(nn.Module):
    """Categorical policy and critic on one Nature CNN (doi 10.1038/nature14236), for stacks of frames [..., 84, 84, 4].

    With `bf16` the CNN computes in bfloat16 in learner and actors alike: in the learner alone, its rounding would look
    like policy lag. All else is float32."""

    def __init__(self, action_size, bf16=False):
        super().__init__()
        self.bf16 = bf16
        self.network = nn.Sequential(
            layer_init(nn.Conv2d(4, 32, 8, stride=4)),
            nn.ReLU(),
            layer_init(nn.Conv2d(32, 64, 4, stride=2)),
            nn.ReLU(),
            layer_init(nn.Conv2d(64, 64, 3)),
            nn.ReLU(),
            nn.Flatten(),
            layer_init(nn.Linear(64 * 7 * 7, 512)),
            nn.ReLU(),
        )
        self.actor = layer_init(nn.Linear(512, action_size), std=0.01)
        self.critic = layer_init(nn.Linear(512, 1), std=1.0)
        # On a GPU they would round to TF32; beside actors on the CPU that would pass for policy lag
        torch.backends.cudnn.allow_tf32 = False

    def normalize(self, obs):
        return obs  # as they are: `features` takes bytes, which are a quarter of the memory

    def features(self, obs):
        """Frames [..., 84, 84, 4] uint8 -> what policy and critic have in common, [..., 512]."""
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=self.bf16):
            # In parts, because a whole batch at once, as for the values, would be as large as its float32 copy
            parts = (part.to(dtype).movedim(-1, 1) / 255 for part in obs.flatten(0, -4).split(512))
            hidden = torch.cat([self.network(part) for part in parts])
        return hidden.float().unflatten(0, obs.shape[:-3])

    def get_value(self, obs):
        return self.critic(self.features(obs)).squeeze(-1)

    def act(self, obs, greedy=False):
        """Frames [C, 84, 84, 4] -> sampled (or the most likely) actions, and their log-probabilities, [C]."""
        logprobs = self.actor(self.features(obs)).log_softmax(-1)
        actions = logprobs.argmax(-1, keepdim=True) if greedy else torch.multinomial(logprobs.exp(), 1)
        return actions.squeeze(-1), logprobs.gather(-1, actions).squeeze(-1)

    def evaluate(self, obs, actions):
        """Frames [..., 84, 84, 4], actions [...] -> log-probabilities, entropies, values, all [...]."""
        features = self.features(obs)
        logprobs = self.actor(features).log_softmax(-1)
        entropies = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(-1, actions.unsqueeze(-1)).squeeze(-1), entropies, self.critic(features).squeeze(-1)


@torch.no_grad()
def vtrace(log_ratios, rewards, values, terminated, dones, gamma, lam, rho_bar=1.0, c_bar=1.0):
    """Align: critic targets v_t, and advantages A_t of the learner's policy pi_T on data of the behaviour policy beta.

        delta_t = r_t + gamma (1 - terminated_t) V_{t+1} - V_t
        acc_t   = min(rho_bar, rho_t) delta_t + gamma lam (1 - done_t) min(c_bar, rho_t) acc_{t+1},     acc_T = 0
        v_t     = V_t + acc_t
        A_t     = delta_t + gamma lam (1 - done_t) acc_{t+1}

    IMPALA does this at every gradient step (arXiv 1802.01561, section 4.1), VACO once per batch (arXiv 2603.01365). It
    is GAE if rho = 1. A_t has no rho_t of its own: the losses bring it. Dummy rows reach no other row.
    Takes log rho_t = log pi_T/beta [T, N]; rewards [T, N]; the learner's values V [T + 1, N], with the bootstrap row;
    terminated (bootstrapping stops) and dones (traces stop) [T, N], 0 or 1. Returns targets and advantages [T, N]."""
    rhos = log_ratios.exp()
    discounts = gamma * lam * (1 - dones)
    deltas = rewards + gamma * (1 - terminated) * values[1:] - values[:-1]
    clipped_deltas = rhos.clamp(max=rho_bar) * deltas
    decays = discounts * rhos.clamp(max=c_bar)
    acc = [torch.zeros_like(values[-1])]  # of the last row first; a list: writing rows of a tensor takes twice the time
    for clipped_delta, decay in zip(clipped_deltas.flip(0), decays.flip(0), strict=True):
        acc.append(clipped_delta + decay * acc[-1])
    acc = torch.stack(acc[::-1])  # [T + 1, N]
    return values[:-1] + acc[:-1], deltas + discounts * acc[1:]


def impala_loss(logprobs, ratios, advantages, rho_bar):
    """Policy gradient, arXiv 1802.01561, section 4.2: mean of -min(rho_bar, r) A log pi over [M] samples. Only logprobs
    have a gradient; ratios are pi/beta, and A_t = r_t + gamma v_{t+1} - V_t comes from `vtrace`, with gae_lambda 1."""
    return -(ratios.clamp(max=rho_bar) * advantages * logprobs).mean()


def impala_minibatch(agent, args, obs, actions, behavior_logprobs, rewards, terminated, dones, valid):
    """Forward pass of one gradient step, V-trace included: n sequences, obs [T + 1, n, ...], the rest [T, n, ...], of
    which the M valid rows count -> loss (scalar), {what is logged: scalar tensor}."""
    newlogprobs, entropies, newvalues = agent.evaluate(obs[:-1], actions)  # [T, n]
    with torch.no_grad():
        bootstrap = agent.get_value(obs[-1:])  # [1, n]
    log_ratios = newlogprobs - behavior_logprobs  # [T, n], log pi/beta
    values = torch.cat([newvalues, bootstrap])  # [T + 1, n]
    bounds = (args.gamma, args.gae_lambda, args.rho_bar, args.c_bar)
    targets, advantages = vtrace(log_ratios, rewards, values, terminated, dones, *bounds)  # [T, n]
    log_ratios = log_ratios[valid].detach()  # [M]: dummy steps end here
    ratios = log_ratios.exp()
    policy_loss = impala_loss(newlogprobs[valid], ratios, advantages[valid], args.rho_bar)
    value_loss = 0.5 * (newvalues - targets)[valid].square().mean()
    entropy_loss = entropies.expand_as(newvalues)[valid].mean()
    loss = policy_loss - args.ent_coef * entropy_loss + args.vf_coef * value_loss
    if args.sum_loss:
        loss = loss * valid.sum()
    with torch.no_grad():
        logs = {
            "losses/policy_loss": policy_loss.detach(),
            "losses/value_loss": value_loss.detach(),
            "losses/entropy": entropy_loss.detach(),
            "losses/old_approx_kl": -log_ratios.mean(),
            "losses/approx_kl": (ratios - 1 - log_ratios).mean(),  # joschu.net/blog/kl-approx.html
            "losses/explained_variance": 1 - (targets - newvalues)[valid].var() / targets[valid].var(),
        }
    return loss, logs


class PolicyStore(nn.Module):
    """The last published versions of a policy, one flat float32 row each, in shared memory.

    One writer (the learner), many readers, no lock that a killed process could leave taken: a row has no number while
    it is written, and a copy counts if the number was right before and after it (on x86, stores appear in order)."""

    def __init__(self, agent, num_versions):
        super().__init__()
        size = sum(tensor.numel() for tensor in agent.state_dict().values())
        self.register_buffer("rows", torch.zeros(num_versions, size))
        self.register_buffer("versions", torch.full((num_versions,), -1))  # the one in each row
        self.share_memory()

    def publish(self, agent, version):
        """Store the agent's parameters and buffers as `version`, over the oldest one."""
        row = version % len(self.rows)
        self.versions[row] = -1
        self.rows[row] = torch.cat([tensor.flatten() for tensor in agent.state_dict().values()])
        self.versions[row] = version

    def load(self, agent, version):
        """Copy a version, which must be among the last ones, or the LATEST into the agent; returns its number."""
        while True:
            wanted = self.versions.max().item() if version == LATEST else version
            row = wanted % len(self.rows)
            whole = self.versions[row].item() == wanted
            weights = self.rows[row].clone()
            if whole and self.versions[row].item() == wanted:
                break
        tensors = list(agent.state_dict().values())
        for tensor, part in zip(tensors, weights.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))
        return wanted


def actor(args, index, first_version, make_agent, make_envs, store, rollouts, learner):
    """An actor process. Takes tickets (rollout, version) from the connection `learner`, loads that version of
    the policy, fills the rollout's slot, and sends (rollout, version, [[return, length] of each ended episode], seconds
    waited, seconds taken). With `first_version` in the seed, a resumed run does not play its first episodes again."""
    for number in (signal.SIGINT, signal.SIGTERM):  # may reach every process: it is the learner that ends the run
        signal.signal(number, signal.SIG_IGN)
    # Leave with the learner, however it ends, also from the middle of a rollout
    threading.Thread(target=lambda: wait([mp.parent_process().sentinel]) and os._exit(1), daemon=True).start()
    signal.setitimer(signal.ITIMER_REAL, args.actor_timeout)  # at the alarm, the process ends
    torch.set_num_threads(1)
    os.nice(args.actor_nice)
    seed = int(np.random.default_rng((args.seed, first_version, index)).integers(2**31 - 2**16))
    random.seed(seed)  # environments may draw from any of these
    np.random.seed(seed)
    torch.manual_seed(seed)
    agent = make_agent()
    envs = make_envs(seed=seed)
    while True:
        signal.setitimer(signal.ITIMER_REAL, 0)
        wait_start = time.perf_counter()
        rollout, version = learner.recv()
        act_start = time.perf_counter()
        signal.setitimer(signal.ITIMER_REAL, args.actor_timeout)
        version = store.load(agent, version)
        out = {name: field[rollout % len(field)].numpy() for name, field in rollouts.items()}  # views: cheap to fill
        episodes = []
        with torch.inference_mode():
            for t in range(args.num_steps):
                out["obs"][t] = envs.obs
                out["valid"][t] = envs.valid
                actions, logprobs = agent.act(torch.from_numpy(envs.obs))
                out["actions"][t] = actions.numpy()
                out["logprobs"][t] = logprobs.numpy()
                fields, ended = envs.step(out["actions"][t])
                for name, field in fields.items():
                    out[name][t] = field
                episodes += ended
        out["obs"][args.num_steps] = envs.obs
        learner.send((rollout, version, episodes, act_start - wait_start, time.perf_counter() - act_start))


def ticket(args, rollout):
    """(rollout, policy version) for a rollout, counted from 0. The version is what makes the lag schedule. `mixture`
    draws by seed and rollout alone, in the first batches among the versions that exist so far."""
    batch = rollout // args.rollouts_per_batch
    if args.lag_schedule == "async":
        return rollout, LATEST
    if args.lag_schedule == "fixed":
        return rollout, max(batch - args.lag, 0)
    draw = np.random.default_rng((args.seed, rollout)).integers(min(args.lag, batch) + 1)
    return rollout, batch - int(draw)


class Actors:
    """The actor processes, a pipe to each, and the tickets: who collects what with which policy version.

    Rollout j goes to actor j mod N and slot j mod S, S being a multiple of N. It has a ticket as soon as its slot is
    free and its policy version exists, so actors collect while the learner trains. `stop_reasons` says why the run must
    end, as sys.exit takes it: 130 after SIGINT, 143 after SIGTERM, or what has become of an actor."""

    def __init__(self, args, num_slots, version, target, *arguments):
        self.args = args
        self.num_slots = num_slots
        self.waiting = [deque() for _ in range(args.num_actors)]  # rollouts whose slots are free, of each actor
        self.finished = {}  # rollout -> what the actor sent, in the order of arrival
        self.stop_reasons = []
        self.handlers = {number: signal.signal(number, self.on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        self.processes = []
        self.connections = []
        # forkserver copies a process that has done all imports: actors start much sooner than by spawn, in less memory
        context = mp.get_context("forkserver")
        slow = ("torch", "envpool", "gymnasium", "tyro", "torch.utils.tensorboard", "transformers", "reasoning_gym")
        context.set_forkserver_preload([name for name in slow if name in sys.modules])  # what this script imports
        for index in range(args.num_actors):
            connection, learner = context.Pipe()
            process = context.Process(target=target, args=(args, index, version, *arguments, learner), daemon=True)
            process.name = f"actor {index}"
            process.start()
            learner.close()  # so that the pipe ends with the actor
            self.processes.append(process)
            self.connections.append(connection)
        self.issue(version, [version * args.rollouts_per_batch - number for number in range(num_slots, 0, -1)])

    def on_signal(self, number, _):
        self.stop_reasons.append(128 + number)
        signal.signal(number, self.handlers[number])  # a second one does not wait for the batch

    def issue(self, newest, freed=()):
        """Send out each ticket whose slot is free and whose policy version is there: `newest` is the last one, `freed`
        are rollouts that have been copied out of their slots."""
        for rollout in freed:
            self.waiting[rollout % self.args.num_actors].append(rollout + self.num_slots)
        for connection, waiting in zip(self.connections, self.waiting, strict=True):
            while waiting and ticket(self.args, waiting[0])[1] <= newest:
                with contextlib.suppress(ConnectionError):  # the actor has died, as `collect` will see
                    connection.send(ticket(self.args, waiting.popleft()))

    def collect(self, batch):
        """Block until the rollouts of a batch are there; returns what actors sent, lockstep in the order of the
        rollouts, so that nothing depends on timing, async in that of arrival. Returns nothing if the run must end."""
        size = self.args.rollouts_per_batch
        while not self.stop_reasons:
            rollouts = range(batch * size, (batch + 1) * size)
            if self.args.lag_schedule == "async" and len(self.finished) >= size:
                rollouts = list(self.finished)[:size]
            complete = all(rollout in self.finished for rollout in rollouts)
            for connection in wait(self.connections, timeout=0 if complete else 0.5):  # signals do not end a wait
                try:
                    message = connection.recv()
                    self.finished[message[0]] = message
                except (EOFError, OSError):
                    process = self.processes[self.connections.index(connection)]
                    process.join()
                    stuck = process.exitcode == -signal.SIGALRM
                    end = "was stuck (--actor-timeout)" if stuck else f"died with exit code {process.exitcode}"
                    self.stop_reasons.append(f"{process.name} {end}")
            if complete:
                return [self.finished.pop(rollout) for rollout in rollouts]
        return []

    def stop(self):
        """End the actors at once: they hold nothing worth waiting for."""
        for process in self.processes:
            process.kill()
            process.join()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


def gradient(minibatch_loss, agent, args, *rows):
    """One gradient step, up to the optimiser: the gradient [P] of minibatch_loss(agent, args, *rows), no longer than
    args.max_grad_norm, and what is logged."""
    loss, logs = minibatch_loss(agent, args, *rows)
    vector = torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(agent.parameters()))])
    norm = vector.norm()
    return vector * (args.max_grad_norm / (norm + 1e-6)).clamp(max=1), logs | {"losses/grad_norm": norm}


def check_finite(place, numbers):
    """End the run if any of `numbers`, {name: tensor}, is not finite."""
    broken = [name for name, value in numbers.items() if not torch.isfinite(value).all()]
    if broken:
        sys.exit(f"not finite: {', '.join(broken)} {place}")


def train(args):
    """Train an agent and return it: a whole run, from the flags (`Args`) to the summary line. Raises SystemExit if the
    run ends early: after SIGINT or SIGTERM, or because of actors or numbers that fail."""
    env_id = args.env_id.replace("/", "-").replace(":", "-")
    new_folder = f"runs/{env_id}__{args.exp_name}__{args.seed}__{int(1000 * time.time())}"
    folder = os.path.normpath(args.resume or new_folder)
    if args.track:
        import wandb

        run_id = os.path.basename(folder)
        wandb.init(id=run_id, name=run_id, resume="allow", config=vars(args), sync_tensorboard=True, save_code=True)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = True
    torch.set_num_threads(args.learner_threads)
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")

    # As many slots as one batch needs, and at least one per actor: more would make data older, and nothing faster
    S = args.num_actors * math.ceil(args.rollouts_per_batch / args.num_actors)
    T, C = args.num_steps, args.num_envs
    atari = is_atari(args.env_id)
    if atari:
        make_agent = partial(CnnAgent, int(envpool.make_spec(args.env_id).action_space.n), args.bf16)
        options = {name: getattr(args, name) for name in ("episodic_life", "reward_clip", "repeat_action_probability")}
        make_envs = partial(AtariEnvs, args.env_id, C, **options)
        obs = torch.zeros(S, T + 1, C, 84, 84, 4, dtype=torch.uint8)
        actions = torch.zeros(S, T, C, dtype=torch.int64)
        statistics = {}
    else:
        obs_size, action_size = continuous_sizes(args.env_id)
        make_agent = partial(MlpAgent, obs_size, action_size, args.log_std_init)
        make_envs = partial(ContinuousEnvs, args.env_id, C, gamma=args.gamma)
        obs = torch.zeros(S, T + 1, C, obs_size)
        actions = torch.zeros(S, T, C, action_size)
        statistics = {"obs": RunningMeanStd(shape=obs_size), "returns": RunningMeanStd(epsilon=0, shape=())}
    rollouts = {
        "obs": obs.share_memory_(),  # raw, with those after the last step
        "actions": actions.share_memory_(),  # unclipped
        "logprobs": torch.zeros(S, T, C).share_memory_(),  # of the version that acted
        "rewards": torch.zeros(S, T, C).share_memory_(),  # as paid
        "discounted": torch.zeros(S, T, C).share_memory_(),  # continuous control: return of the episode so far
    }
    for name in ("terminated", "truncated", "valid"):
        rollouts[name] = torch.zeros(S, T, C, dtype=torch.bool).share_memory_()
    agent = make_agent().to(device)
    # The parameters become views of one vector [P], which is stepped faster
    weights = nn.Parameter(torch.cat([parameter.detach().flatten() for parameter in agent.parameters()]))
    nn.utils.vector_to_parameters(weights.data, agent.parameters())
    if atari:  # torch adds eps to the root, TensorFlow under it; the published value is kept, as in torchbeast
        optimizer = torch.optim.RMSprop([weights], lr=args.learning_rate, alpha=0.99, eps=0.01)
    else:
        optimizer = torch.optim.Adam([weights], lr=args.learning_rate, eps=1e-5, fused=True)
    store = PolicyStore(agent, num_versions=max(args.lag + 1, 2))
    store.publish(agent, 0)

    global_step = 0
    version = 0
    last_returns = deque(maxlen=100)
    modules = {"agent": agent, "optimizer": optimizer, "store": store}
    checkpoint = f"{folder}/checkpoint.pt"
    if args.resume:
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
        for name, module in modules.items():
            module.load_state_dict(saved[name])
        for name, moments in statistics.items():
            vars(moments).update({moment: np.asarray(value) for moment, value in saved[name].items()})
        torch.set_rng_state(saved["rng"])
        global_step = saved["global_step"]
        version = saved["version"]
        last_returns.extend(saved["last_returns"])

    def save():
        """Write all that the run needs to go on. The file is whole at every moment: the old one or the new."""
        state = {name: module.state_dict() for name, module in modules.items()} | {"rng": torch.get_rng_state()}
        state |= {"args": vars(args), "global_step": global_step, "version": version}
        state["last_returns"] = list(last_returns)
        for name, moments in statistics.items():
            state[name] = {moment: np.asarray(value).tolist() for moment, value in vars(moments).items()}
        torch.save(state, f"{checkpoint}.tmp")
        os.replace(f"{checkpoint}.tmp", checkpoint)

    writer = SummaryWriter(folder, purge_step=global_step + 1 if args.resume else None)
    table = "\n".join(f"|{name}|{value}|" for name, value in vars(args).items())
    writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}")
    actors = Actors(args, S, version, actor, make_agent, make_envs, store, rollouts)
    try:
        first_step = global_step
        train_start = batch_start = time.perf_counter()
        while global_step < args.total_timesteps:
            # COLLECT a batch, copy it, and let its slots be filled again while we train
            wait_start = time.perf_counter()
            collected = actors.collect(batch=version)
            if actors.stop_reasons:
                break
            learner_wait = time.perf_counter() - wait_start
            collected, versions, episodes, wait_times, act_times = map(list, zip(*collected, strict=True))
            slots = [rollout % S for rollout in collected]
            for slot in slots:
                numbers = {name: field[slot] for name, field in rollouts.items()}
                check_finite(f"from actor {slot % args.num_actors}, after step {global_step}", numbers)
            # Time-major, [T (obs: T + 1), N, ...], with the N = R * C environments of R rollouts
            batch = {name: field[slots].transpose(0, 1).flatten(1, 2).to(device) for name, field in rollouts.items()}
            actors.issue(newest=version, freed=collected)

            # MEASURE the lag on arrival
            valid = batch["valid"]  # [T, N], with B valid rows: the others are dummy steps
            with torch.no_grad():
                obs = agent.normalize(batch["obs"])  # [T + 1, N, ...]
                learner_logprobs, _, _ = agent.evaluate(obs[:-1], batch["actions"])  # [T, N]
            learner_ratios = (learner_logprobs - batch["logprobs"])[valid].exp()  # [B], pi_T/beta
            rewards = batch["rewards"]  # [T, N]
            if not atari:
                statistics["returns"].update(batch["discounted"][valid].double().cpu().numpy())
                scale = math.sqrt(statistics["returns"].var) or 1.0
                rewards = (rewards / scale).clamp(-10, 10)
            terminated = batch["terminated"].float()  # [T, N]
            dones = (batch["terminated"] | batch["truncated"]).float()  # [T, N]

            # OPTIMISE: minibatches of whole sequences, V-trace with the current policy and critic in each
            lr = args.learning_rate * (1 - global_step / args.total_timesteps if args.anneal_lr else 1)
            optimizer.param_groups[0]["lr"] = lr
            columns = (obs, batch["actions"], batch["logprobs"], rewards, terminated, dones, valid)
            minibatch_logs = []
            for _ in range(args.update_epochs):
                sequences = torch.randperm(valid.shape[1]).to(device)
                for mb in sequences.tensor_split(args.num_minibatches):
                    mb_columns = [column.index_select(1, mb) for column in columns]
                    weights.grad, logs = gradient(impala_minibatch, agent, args, *mb_columns)
                    optimizer.step()
                    minibatch_logs.append(logs)

            # PUBLISH the next version: new weights, and observation statistics that include this batch
            with torch.no_grad():
                final_logprobs, _, _ = agent.evaluate(obs[:-1], batch["actions"])
            final_ratios = (final_logprobs - batch["logprobs"])[valid].exp()  # [B], pi/beta
            if not atari:
                statistics["obs"].update(batch["obs"][:-1][valid].double().cpu().numpy())
                agent.set_statistics(statistics["obs"].mean, np.sqrt(statistics["obs"].var + 1e-8), first=version == 0)
            means = {name: torch.stack([logs[name] for logs in minibatch_logs]).mean() for name in minibatch_logs[0]}
            losses = {name: mean for name, mean in means.items() if name != "losses/explained_variance"}  # maybe 0 / 0
            check_finite(f"in the batch after step {global_step}", losses | agent.state_dict())
            version += 1
            store.publish(agent, version)
            actors.issue(newest=version)
            global_step += len(learner_ratios)

            # LOG, against environment steps
            batch_seconds = time.perf_counter() - batch_start
            batch_start += batch_seconds
            scalars = means | {
                "charts/learning_rate": lr,
                "lag/versions_mean": version - 1 - np.mean(versions),
                "lag/versions_max": version - 1 - min(versions),
                "lag/tv_backward": 0.5 * (learner_ratios - 1).abs().mean(),
                "lag/tv_forward": 0.5 * (final_ratios - learner_ratios).abs().mean(),
                "lag/tv_total": 0.5 * (final_ratios - 1).abs().mean(),
                "lag/ess": learner_ratios.mean().square() / learner_ratios.square().mean(),
                "stats/learner_wait": learner_wait / batch_seconds,
                "stats/actor_wait": sum(wait_times) / sum(wait_times + act_times),
                "stats/rollout_time": np.mean(act_times),
                "stats/update_time": batch_seconds - learner_wait,
                "stats/queue_size": len(actors.finished),
            }
            scalars["charts/SPS"] = (global_step - first_step) / (batch_start - train_start)
            ended = [episode for rollout in episodes for episode in rollout]
            if ended:
                scalars["charts/episodic_return"], scalars["charts/episodic_length"] = np.mean(ended, axis=0)
                last_returns.extend(float(episode_return) for episode_return, _ in ended)
            for name, value in scalars.items():
                writer.add_scalar(name, value, global_step)
            if args.checkpoint_interval and version % args.checkpoint_interval == 0:
                save()
            with contextlib.suppress(BrokenPipeError):  # what the output is piped to may have ended, as by Ctrl-C
                sps, lag, tv = (scalars[name] for name in ("charts/SPS", "lag/versions_mean", "lag/tv_total"))
                recent = np.mean(last_returns or [math.nan])
                print(f"step {global_step}, {sps:.0f} SPS, return {recent:.6g}, lag {lag:.1f}, TV {tv:.3f}", flush=True)
        save()
    finally:
        actors.stop()
        writer.close()
    if global_step < args.total_timesteps:
        with contextlib.suppress(OSError):  # Ctrl-C may have ended what the output is piped to
            print(f"stopped at step {global_step}; --resume {folder} goes on from there", file=sys.stderr)
        sys.exit(actors.stop_reasons[0])
    recent = np.mean(last_returns or [math.nan])
    print(f"{args.env_id}, seed {args.seed}: return {recent:.6g} after {global_step} steps; logs, weights: {folder}")
    return agent


if __name__ == "__main__":
    resume = re.search(r".*--resume[=\0]([^\0]+)", "\0".join(sys.argv))
    options = {}
    if resume and os.path.exists(f"{resume[1]}/checkpoint.pt"):  # the flags of that run are the defaults
        flags = torch.load(f"{resume[1]}/checkpoint.pt", mmap=True, weights_only=True)["args"]
        options["default"] = Args(**flags | {"resume": resume[1]})
    train(tyro.cli(Args, description=__doc__, **options))
