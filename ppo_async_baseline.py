"""PPO-clip, PPO-KL, SPO and decoupled PPO under policy lag: baselines for VACO, in one file.

What differs from vaco_async_mujoco.py is the objective (`--objective`), and that Atari games are played too. Actors act
with old versions of the policy (*policy lag*); advantages are GAE on the learner's critic, on data as old as it is.

    python ppo_async_baseline.py                                # PPO-clip, HalfCheetah-v4
    python ppo_async_baseline.py --objective kl --lag-schedule mixture --lag 8  # PPO-KL, lag
    python ppo_async_baseline.py --env-id Pong-v5               # Atari, with its own defaults
    python ppo_async_baseline.py --lag-schedule fixed --lag 0 --num-actors 1    # synchronous PPO
    python ppo_async_baseline.py --evaluate runs/RUN/ppo_async_baseline.cleanrl_model

  PolicyStore: the last versions of the policy, flat float32, in shared memory  <-- publish, once per batch --+
        | copy one version, once per rollout                                                                  |
        v                                                                                                     |
  actor 0 .. actor N-1: processes, one envpool each  <--- tickets (slot, version), through pipes ---  learner (train)
        | fill one slot: obs, action, log-prob, reward, terminated, truncated, valid, version                 ^
        v                                                                                                     |
  Rollouts: preallocated slots in shared memory  --- slot numbers and episode statistics, through pipes ------+

The method ends with `train`: read down to there. Below it are services that `train` calls, the same in every script:
`Actors` (processes, pipes, replacements), the checks of flags, several learners, checkpoints, models, evaluation.
"""

import contextlib
import ctypes.util
import difflib
import importlib.util
import io
import itertools
import math
import multiprocessing as mp
import os
import re
import shutil
import signal
import sys
import threading
import time
import traceback
import warnings
import zipfile
from collections import Counter, deque
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from types import SimpleNamespace
from typing import Literal

import envpool
import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import tyro
from gymnasium.wrappers.utils import RunningMeanStd
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

LATEST = -1  # as a ticket's version: the newest one at the moment the rollout begins
PRELOAD = ["torch", "envpool", "numpy", "gymnasium", "tyro", "torch.utils.tensorboard"]  # once for all actors
# Set by torchrun: which of several learners this is, of all and on this host, and how many there are
RANK, LOCAL_RANK = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))


# The flags that None leaves to the domain: CleanRL's PPO, but for MuJoCo's 16 environments of 128 steps, not 1 of 2048
DEFAULTS = {  # flag: (continuous control, Atari)
    "total_timesteps": (1_000_000, 10_000_000),
    "num_envs": (16, 8),
    "update_epochs": (10, 4),
    "num_minibatches": (32, 4),
    "learning_rate": (3e-4, 2.5e-4),
    "ent_coef": (0.0, 0.01),
    "clip_coef": (0.2, 0.1),
}


@dataclass
class Args:
    exp_name: str = os.path.basename(__file__)[: -len(".py")]  # the name of this experiment
    seed: int = 1  # seed of networks, minibatches, action noise and environments
    torch_deterministic: bool = True  # if toggled, `torch.backends.cudnn.deterministic=True`
    cuda: bool = True  # if toggled, the learner runs on the GPU when there is one; actors act on the CPU
    compile: bool = False  # if toggled, the loss is compiled: faster after half a minute; needs g++, or CXX
    actor_nice: int = 0  # niceness of the actors, up to 19: on cores that they share, the learner goes first
    learner_threads: int = 1  # CPU threads of the learner; the MLPs do not gain from more, the CNN does

    # a task of envpool (MuJoCo, dm_control, ...), or any environment of gymnasium (yours: my_module:MyEnv-v0 imports
    # my_module, which registers it), with a floating-point Box action space, or an Atari game (Pong-v5, ...). Flags
    # whose help gives two defaults, continuous control's and Atari's, follow it
    env_id: str = "HalfCheetah-v4"
    total_timesteps: int | None = None  # environment steps to train for; 1M, Atari 10M (frame skip not counted)
    episodic_life: bool = True  # Atari: if toggled, a lost life ends an episode, but for the score
    reward_clip: bool = True  # Atari: if toggled, the learner sees the sign of rewards; scores are raw
    repeat_action_probability: float = 0.0  # Atari: the probability of a sticky action
    bf16: bool = False  # Atari: if toggled, the CNN computes in bfloat16, in learner and actors

    track: bool = False  # if toggled, curves, flags and code go to Weights & Biases, too: pip install wandb
    wandb_project_name: str = "vaco"  # the project there
    wandb_entity: str | None = None  # the user or team there; None: your default
    save_model: bool = False  # if toggled, the run ends by saving runs/{run}/{exp_name}.cleanrl_model and evaluating it
    # train nothing, evaluate this .cleanrl_model, or the checkpoint in this run's folder: with the most likely actions,
    # then with sampled ones. Its flags hold, but for those typed
    evaluate: str = ""
    eval_episodes: int = 10  # whole episodes per evaluation, one in each of as many environments
    # if toggled, an evaluation films its first episode as mp4: pip install imageio-ffmpeg. Means --save-model, too
    capture_video: bool = False

    checkpoint_interval: int = 0  # batches between checkpoints; 0: only at the end, and at Ctrl-C or SIGTERM
    # go on from a checkpoint: a run's folder, or a file. Its flags hold; total_timesteps, num_actors and those on how
    # the machine is used may be given anew
    resume: str = ""
    actor_timeout: float = 120.0  # seconds after which an actor that sends nothing counts as stuck
    max_actor_restarts: int = 10  # actors that died, failed or got stuck are started again, this often in total
    # under torchrun: seconds after which a learner that does not answer ends the run; replacing actors takes long, too
    learner_timeout: float = 300.0

    # Actors decide how old the data is when it arrives (backward lag)

    num_actors: int = 4  # actor processes (per learner); data is about num_actors / rollouts_per_batch versions old
    num_envs: int | None = None  # environments per actor; 16, Atari 8
    num_steps: int = 128  # steps per environment in one rollout
    rollouts_per_batch: int = 1  # rollouts per batch, which has rollouts_per_batch * num_steps * num_envs samples
    # async: free running; fixed: lockstep, every batch is exactly `lag` versions old; mixture: lockstep, the version of
    # each rollout is drawn uniformly from the last `lag + 1`
    lag_schedule: Literal["async", "fixed", "mixture"] = "async"
    lag: int = 0  # policy lag of the lockstep schedules, in versions; there is one version per batch

    # The number of updates decides how far the policy moves on one batch (forward lag)

    update_epochs: int | None = None  # passes over each batch; 10, Atari 4
    num_minibatches: int | None = None  # minibatches, that is gradient steps, per pass; 32, Atari 4
    learning_rate: float | None = None  # the learning rate of Adam; 3e-4, Atari 2.5e-4
    anneal_lr: bool = True  # if toggled, the learning rate falls linearly to 0 over total_timesteps
    gamma: float = 0.99  # the discount factor
    gae_lambda: float = 0.95  # lambda of GAE
    norm_adv: bool = True  # if toggled, advantages are normalised per minibatch
    ent_coef: float | None = None  # coefficient of the entropy bonus; 0, Atari 0.01
    vf_coef: float = 0.5  # coefficient of the value loss
    max_grad_norm: float = 0.5  # the largest norm of a gradient

    # clip: PPO's clipped surrogate; kl: a penalty b KL(beta, pi); spo: Simple Policy Optimization; decoupled: clipped
    # from the learner's policy at the batch's arrival, importance-weighted from there to the policy that acted
    objective: Literal["clip", "kl", "spo", "decoupled"] = "clip"
    clip_coef: float | None = None  # clip, decoupled: how far the ratio may go from 1; 0.2, Atari 0.1
    target_kl: float | None = None  # any objective: no further pass once KL(beta, pi), backward lag and all, is over it
    kl_target: float = 0.03  # kl: what KL(beta, pi) per batch is steered to; a Gaussian TV of 0.1 is a KL of 0.032
    kl_coef: float = 1.0  # kl: the penalty's coefficient b at the start; it stays between 1e-4 and 1e4
    adapt_kl: bool = True  # kl: if toggled, b is doubled and halved to follow kl_target
    spo_eps: float = 0.2  # spo: the surrogate of a sample is largest at a ratio of 1 + sign(A) spo_eps
    max_importance: float = 10.0  # decoupled: upper bound of the importance weight pi_T/beta


class ContinuousEnvs:
    """The environments of one actor: C copies of a task; observations (dicts too) flattened to `obs` [C, D].

    The task is envpool's, or else gymnasium's. Both reset on the *next* step: the observation that comes with the end
    of an episode is its true last one, and the step after it ignores the action and returns the first observation of
    the next episode. That dummy step is no data, whatever its reward: `valid` [C] is False where the coming step is
    one. Environment i has seed + i.
    """

    fps = 30  # of videos

    def __init__(self, env_id, num_envs, seed, **options):
        self.valid, self.returns, self.lengths = np.ones(num_envs, dtype=bool), np.zeros(num_envs), np.zeros(num_envs)
        if env_id in envpool.list_all_envs():
            self.envs = envpool.make(env_id, "gymnasium", num_envs=num_envs, num_threads=1, seed=seed, **options)
            obs, info = self.envs.reset()
            # An envpool built for another numpy returned the values of one environment for all of them
            assert np.array_equal(info["env_id"], np.arange(num_envs)), f"envpool mixed up: {info['env_id']}"
        else:  # resets on the next step, too
            self.envs = gym.make_vec(env_id, num_envs, vectorization_mode="sync", **options)
            obs, _ = self.envs.reset(seed=seed)
        self.obs = self.flatten(obs)

    def flatten(self, obs):
        if isinstance(obs, dict):
            return np.concatenate([self.flatten(part) for part in obs.values()], axis=1)
        return obs.reshape(len(self.valid), -1).astype(np.float32)

    def write_obs(self, out, t):
        """Write the observation before step t to a slot (`Rollouts.arrays`), in the form in which it is kept."""
        out.obs[t] = self.obs

    def step(self, actions):
        """Actions [C, A] -> rewards, terminated, truncated [C], (return, length) of each ended episode.

        Clips the actions to the action space: envpool would charge the control cost of the unclipped ones.
        """
        space = self.envs.single_action_space
        actions = np.clip(actions.reshape(-1, *space.shape), space.low, space.high).astype(space.dtype)
        obs, rewards, terminated, truncated, _ = self.envs.step(actions)
        self.returns, self.lengths = self.returns + rewards * self.valid, self.lengths + self.valid
        self.obs, done = self.flatten(obs), terminated | truncated
        episodes = list(zip(self.returns[done], self.lengths[done], strict=True))
        self.ended = np.flatnonzero(done)  # in which environment each episode was
        self.returns[done], self.lengths[done], self.valid = 0, 0, ~done
        return rewards, terminated, truncated, episodes


class AtariEnvs:
    """The environments of one actor: C copies of an Atari game, `obs` [C, 84, 84, 4] uint8, the last 4 grey frames.

    envpool resets on the *next* step, which is a dummy: see `valid` [C]. With episodic_life a lost life is a terminated
    step for the learner, while returns and lengths are of whole games, in raw score. All else is envpool's default and
    the usual one: 4 frames per step, minimal action set, games cut after 27000 steps, up to 30 no-ops and fire at the
    start (with episodic_life after a lost life, too).
    """

    fps = 15  # of videos: one frame of four

    def __init__(self, env_id, num_envs, seed, **options):
        self.envs = envpool.make(env_id, "gymnasium", num_envs=num_envs, num_threads=1, seed=seed, **options)
        self.valid, self.returns, self.lengths = np.ones(num_envs, dtype=bool), np.zeros(num_envs), np.zeros(num_envs)
        self.over, self.ages = np.zeros(num_envs, dtype=bool), np.zeros(num_envs, dtype=np.uint8)
        obs, info = self.envs.reset()
        self.obs, self.lives = np.moveaxis(obs, 1, -1), info["lives"]
        assert np.array_equal(info["env_id"], np.arange(num_envs)), f"envpool mixed up: {info['env_id']}"

    def write_obs(self, out, t):
        """Write the newest frame before step t to a slot, at its start also the three before: 1/4 of all stacks."""
        if t == 0:
            out.obs[:3] = np.moveaxis(self.obs[..., :3], -1, 0)
        out.obs[t + 3], out.ages[t] = self.obs[..., 3], self.ages

    def step(self, actions):
        """Actions [C] -> rewards, terminated, truncated [C], (score, length) of each game that ended."""
        obs, rewards, terminated, truncated, info = self.envs.step(actions.astype(np.int32))
        # A game can also end unseen, in the no-ops of a dummy step after a lost life: then there are more lives again
        unseen = ~self.valid & ~self.over & (info["lives"] > self.lives)
        self.ages = np.minimum(self.ages + 1, 3) * ~(self.over | unseen)  # frames before, of the same game
        episodes = list(zip(self.returns[unseen], self.lengths[unseen], strict=True))
        self.returns, self.lengths = self.returns * ~unseen + info["reward"], self.lengths * ~unseen + self.valid
        self.over, self.valid = info["terminated"].astype(bool) | truncated, ~(terminated | truncated)
        episodes += zip(self.returns[self.over], self.lengths[self.over], strict=True)
        self.ended = np.concatenate([np.flatnonzero(unseen), np.flatnonzero(self.over)])  # where each game was
        self.returns[self.over], self.lengths[self.over], self.lives = 0, 0, info["lives"]
        self.obs = np.moveaxis(obs, 1, -1)
        return rewards, terminated, truncated, episodes


def stack_frames(frames, ages):
    """The stacks that `AtariEnvs.write_obs` took apart: frames [T + 4, N, 84, 84] -> [T + 1, N, 84, 84, 4].

    ages [T + 1, N] counts earlier frames of the same game, up to 3: envpool repeats the first where there are fewer.
    """
    N = frames.shape[1]
    back = torch.arange(3, -1, -1, device=frames.device).minimum(ages.long().unsqueeze(-1))  # [T + 1, N, 4]
    rows = torch.arange(3, len(frames), device=frames.device).view(-1, 1, 1) - back
    index = rows * N + torch.arange(N, device=frames.device).view(1, -1, 1)
    # 7 times faster than frames[rows, columns], which copies byte by byte
    stacks = frames.flatten(0, 1).index_select(0, index.flatten()).view(*index.shape, *frames.shape[2:])
    return stacks.movedim(2, -1).contiguous()  # channels last, once for all gradient steps


class RewardScaler:
    """Divides rewards by the standard deviation of the discounted return, in the manner of gymnasium's NormalizeReward.

    It lives in the learner, on the raw rewards of the slots: one scale for all actors, whatever their lag, and for all
    learners (`update_statistics`).
    """

    def __init__(self, num_actors, num_envs, gamma):
        self.gamma, self.statistics = gamma, RunningMeanStd(shape=())
        self.running = np.zeros((num_actors, num_envs))  # discounted returns, carried across the rollouts of an actor

    def discounted(self, actor, rollout):
        """The discounted returns at all valid steps of one slot (as of `Rollouts.arrays`) of an actor: [samples]."""
        returns = np.zeros(rollout.rewards.shape)  # [T, C]
        self.running[actor] *= not rollout.fresh
        for t in range(len(returns)):
            self.running[actor] = (self.gamma * self.running[actor] + rollout.rewards[t]) * rollout.valid[t]
            returns[t] = self.running[actor]
        return returns[rollout.valid]

    def scale(self, rewards):
        return (rewards / math.sqrt(self.statistics.var + 1e-8)).clamp(-10, 10)


def layer_init(layer, std=2**0.5, bias_const=0.0):
    nn.init.orthogonal_(layer.weight, std)
    nn.init.constant_(layer.bias, bias_const)
    return layer


class Agent(nn.Module):
    """Policy and critic: Gaussian, one deviation for all states, two MLPs, 64-64 tanh; Atari: categorical, Nature CNN.

    The observation statistics are part of the policy, as buffers: published, saved and loaded with the weights, frozen
    while a version acts and while a batch trains.
    """

    def __init__(self, obs_size, action_size, atari, bf16=False, trained=True):
        super().__init__()
        self.atari, self.bf16 = atari, bf16
        if atari:
            convolutions = [layer_init(nn.Conv2d(*shape)) for shape in ((4, 32, 8, 4), (32, 64, 4, 2), (64, 64, 3, 1))]
            layers = [layer for convolution in convolutions for layer in (convolution, nn.ReLU())]
            self.network = nn.Sequential(*layers, nn.Flatten(), layer_init(nn.Linear(64 * 7 * 7, 512)), nn.ReLU())
            self.actor, self.critic = layer_init(nn.Linear(512, action_size), 0.01), layer_init(nn.Linear(512, 1), 1)
            # Convolutions are faster where the channels of a pixel are neighbours in memory
            self.to(memory_format=torch.channels_last)
            if bf16 and not trained:  # an actor's: rounded once per version, not at every step
                self.network.to(torch.bfloat16)
            # On a GPU they would round to TF32; beside actors on the CPU that would pass for policy lag
            torch.backends.cudnn.allow_tf32 = False
            return

        def mlp(out_size, std):
            hidden = [layer_init(nn.Linear(obs_size, 64)), nn.Tanh(), layer_init(nn.Linear(64, 64)), nn.Tanh()]
            return nn.Sequential(*hidden, layer_init(nn.Linear(64, out_size), std=std))

        self.critic, self.actor = mlp(1, std=1.0), mlp(action_size, std=0.01)
        self.actor_logstd = nn.Parameter(torch.zeros(action_size))
        self.register_buffer("obs_mean", torch.zeros(obs_size))
        self.register_buffer("obs_var", torch.ones(obs_size))

    def normalize(self, obs):
        """Raw to normalised observations [..., D], which all methods take but `act`; frames stay as they are."""
        return obs if self.atari else ((obs - self.obs_mean) / torch.sqrt(self.obs_var + 1e-8)).clamp(-10, 10)

    def features(self, obs):
        """What policy and critic have in common: [..., 512] for Atari, the normalised observations otherwise."""
        if self.atari:
            dtype = torch.bfloat16 if self.bf16 else torch.float32
            with torch.autocast(obs.device.type, torch.bfloat16, enabled=self.bf16):
                # In parts, because a whole batch at once, as for the values, would be as large as its float32 copy
                parts = (part.to(dtype).movedim(-1, 1) / 255 for part in obs.flatten(0, -4).split(512))
                hidden = torch.cat([self.network(part) for part in parts])
            return hidden.float().unflatten(0, obs.shape[:-3])
        return obs

    def get_value(self, obs):
        return self.critic(self.features(obs)).squeeze(-1)

    def get_logprob(self, policy, actions):
        """Joint log-probability [...] of unclipped actions, given logits or means [..., A]."""
        if self.atari:
            return policy.log_softmax(-1).gather(-1, actions.unsqueeze(-1)).squeeze(-1)
        z = (actions - policy) * torch.exp(-self.actor_logstd)
        return (-0.5 * z.square() - self.actor_logstd - 0.5 * math.log(2 * math.pi)).sum(-1)

    def act(self, obs, generator=None):
        """Raw observations [C, ...] -> sampled or, without a generator, the most likely actions [C] or [C, A], and
        log-probabilities [C]."""
        policy = self.actor(self.features(self.normalize(obs)))
        if generator is None:
            actions = policy.argmax(-1) if self.atari else policy
        elif self.atari:
            actions = torch.multinomial(policy.log_softmax(-1).exp(), 1, generator=generator).squeeze(-1)
        else:
            actions = policy + torch.exp(self.actor_logstd) * torch.randn(policy.shape, generator=generator)
        return actions, self.get_logprob(policy, actions)

    def evaluate(self, obs, actions):
        """Normalised obs [..., D], actions [...] -> log-probabilities [...], mean entropy (scalar), values [...]."""
        features = self.features(obs)
        policy, values = self.actor(features), self.critic(features).squeeze(-1)
        if self.atari:
            logprobs = policy.log_softmax(-1)
            entropy = -(logprobs.exp() * logprobs).sum(-1).mean()
        else:
            entropy = (self.actor_logstd + 0.5 * math.log(2 * math.pi * math.e)).sum()
        return self.get_logprob(policy, actions), entropy, values


@torch.no_grad()
def gae(rewards, values, terminated, dones, gamma, lam):
    """Critic targets and advantages: GAE(lambda), arXiv 1506.02438, on the learner's critic, whoever acted.

        delta_t = r_t + gamma (1 - terminated_t) V_{t+1} - V_t,   A_t = delta_t + gamma lam (1 - done_t) A_{t+1}

    Takes rewards [T, N]; values [T + 1, N], with the bootstrap row; terminated (where bootstrapping stops) and dones
    (where traces stop) [T, N] of 0 and 1. Returns targets A_t + V_t and A_t, [T, N]; in dummy rows they mean nothing.
    """
    deltas = rewards + gamma * (1 - terminated) * values[1:] - values[:-1]
    advantages = torch.zeros_like(values)  # [T + 1, N]
    for t in reversed(range(len(rewards))):
        advantages[t] = deltas[t] + gamma * lam * (1 - dones[t]) * advantages[t + 1]
    return advantages[:-1] + values[:-1], advantages[:-1]


def clip_loss(ratios, advantages, clip_coef):
    """PPO-clip, arXiv 1707.06347, eq. 7: mean of max(-r A, -clip(r, 1 - eps, 1 + eps) A) over [M] samples."""
    return torch.max(-ratios * advantages, -ratios.clamp(1 - clip_coef, 1 + clip_coef) * advantages).mean()


def kl_loss(ratios, log_ratios, advantages, kl_coef):
    """PPO-KL, arXiv 1707.06347, eq. 8: mean of -r A + b ((r - 1) - log r), whose second part estimates KL(beta, pi)."""
    return (-ratios * advantages + kl_coef * (ratios - 1 - log_ratios)).mean()


def adapted_kl_coef(kl_coef, kl, kl_target):
    """PPO-KL's coefficient for the next batch, arXiv 1707.06347, section 4: doubled or halved to steer the KL. Bounded
    here, because under lag the KL follows only some batches later."""
    kl_coef = kl_coef * 2 if kl > 1.5 * kl_target else kl_coef / 2 if kl < kl_target / 1.5 else kl_coef
    return min(max(kl_coef, 1e-4), 1e4)


def spo_loss(ratios, advantages, spo_eps):
    """SPO, arXiv 2401.16025: mean of -(r A - |A| (r - 1)^2 / (2 eps)), at its best where r = 1 + sign(A) eps."""
    return -(ratios * advantages - advantages.abs() * (ratios - 1).square() / (2 * spo_eps)).mean()


def decoupled_loss(log_ratios, learner_log_ratios, advantages, clip_coef, max_importance):
    """Decoupled PPO, arXiv 2110.00641: clipped around the proximal policy pi_T, weighted by pi_T/beta (capped). Takes
    log pi/beta, log pi_T/beta and advantages, [M] each."""
    proximal = (log_ratios - learner_log_ratios).exp()  # pi/pi_T
    surrogate = torch.max(-proximal * advantages, -proximal.clamp(1 - clip_coef, 1 + clip_coef) * advantages)
    return (learner_log_ratios.exp().clamp(max=max_importance) * surrogate).mean()


def ppo_minibatch(agent, args, kl_coef, advantages, obs, actions, behavior_logprobs, learner_log_ratios, targets):
    """Forward pass of one gradient step: M valid rows of a batch -> loss (scalar), {what is logged: scalar tensor}."""
    newlogprobs, entropy, newvalues = agent.evaluate(obs, actions)
    log_ratios = newlogprobs - behavior_logprobs  # [M]
    ratios = log_ratios.exp()  # [M], pi/beta
    if args.objective == "clip":
        policy_loss = clip_loss(ratios, advantages, args.clip_coef)
    elif args.objective == "kl":
        policy_loss = kl_loss(ratios, log_ratios, advantages, kl_coef)
    elif args.objective == "spo":
        policy_loss = spo_loss(ratios, advantages, args.spo_eps)
    else:
        settings = (advantages, args.clip_coef, args.max_importance)
        policy_loss = decoupled_loss(log_ratios, learner_log_ratios, *settings)
    value_loss = 0.5 * (newvalues - targets).square().mean()
    loss = policy_loss - args.ent_coef * entropy + args.vf_coef * value_loss
    with torch.no_grad():
        clipped_ratios = (log_ratios - learner_log_ratios).exp() if args.objective == "decoupled" else ratios
        logs = {
            "losses/policy_loss": policy_loss.detach(),
            "losses/value_loss": value_loss.detach(),
            "losses/entropy": entropy.detach(),
            "losses/old_approx_kl": -log_ratios.mean(),
            "losses/approx_kl": (ratios - 1 - log_ratios).mean(),  # joschu.net/blog/kl-approx.html
            "losses/clipfrac": ((clipped_ratios - 1).abs() > args.clip_coef).float().mean(),
        }
    return loss, logs


class PolicyStore:
    """The last published versions of a policy, one flat float32 row each, in shared memory.

    One writer (the learner), many readers, no lock that a killed process could leave taken: a row's stamp is away while
    the row is written, and a copy counts if the stamp was right before and after it (on x86, stores appear in order).
    """

    def __init__(self, agent, num_versions):
        size = sum(tensor.numel() for tensor in agent.state_dict().values())
        self.rows = torch.zeros(num_versions, size).share_memory_()
        self.stamps = torch.full((num_versions,), -1).share_memory_()  # the version in each row
        self.latest = torch.tensor(-1).share_memory_()

    def publish(self, agent, version):
        """Store the agent's parameters and buffers as `version`, over the oldest one."""
        row = version % len(self.rows)
        self.stamps[row] = -1
        self.rows[row] = torch.cat([tensor.flatten() for tensor in agent.state_dict().values()])
        self.stamps[row] = version
        self.latest.fill_(version)

    def load(self, agent, version):
        """Copy a version, or the LATEST, into the agent; returns its number. Raises LookupError if it is not there."""
        while True:
            wanted = self.latest.item() if version == LATEST else version
            row = wanted % len(self.rows)
            before, copy, after = self.stamps[row].item(), self.rows[row].clone(), self.stamps[row].item()
            if before == after == wanted:
                break
            if version != LATEST:
                raise LookupError(f"policy version {version} is not in the store, which has {self.stamps.tolist()}")
        tensors = list(agent.state_dict().values())
        for tensor, part in zip(tensors, copy.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))
        return wanted


class Rollouts:
    """Preallocated slots for rollouts of T steps of C environments, in shared memory: [slots, T, C, ...]. Actions and
    observations (with those after the last step) are given as zeros, in the shape and type of a slot. Rewards are as
    paid, actions unclipped, log-probabilities of the version that acted; dummy steps are not `valid`; a `fresh` rollout
    is the first of its actor."""

    def __init__(self, num_slots, actions, **observations):
        numbers, flags = torch.zeros(actions.shape[:2]), torch.zeros(actions.shape[:2], dtype=torch.bool)
        fields = observations | {"actions": actions, "logprobs": numbers, "rewards": numbers}
        fields |= {"terminated": flags, "truncated": flags, "valid": flags}
        fields |= {"version": torch.tensor(0), "fresh": torch.tensor(False)}
        for name, field in fields.items():
            setattr(self, name, torch.zeros(num_slots, *field.shape, dtype=field.dtype).share_memory_())

    def arrays(self, slot):
        """NumPy views of one slot, by name: cheaper to fill step by step than tensors."""
        return SimpleNamespace(**{name: tensor[slot].numpy() for name, tensor in vars(self).items()})

    def batch(self, slots, device):
        """Copy slots to the device as one time-major batch: [T (observations: more), N, ...], N = len(slots) * C."""
        fields = {name: tensor for name, tensor in vars(self).items() if tensor.ndim > 1}
        return SimpleNamespace(**{n: t[slots].transpose(0, 1).flatten(1, 2).to(device) for n, t in fields.items()})


def actor(args, index, generation, pause, make_agent, make_envs, store, rollouts, learner):
    """An actor process: after a pause, for every ticket, load one policy version and fill one slot with it.

    Through the connection `learner`, tickets (slot, version) come in. Out go None once ready, for every ticket (slot,
    [(return, length) of each ended episode], seconds waited, seconds taken), and a traceback if anything fails.
    """
    torch.set_num_threads(1)
    os.nice(args.actor_nice)
    leave_with_parent()
    time.sleep(pause)
    warnings.filterwarnings("ignore", message=".*precision lowered")  # gymnasium's, of float64 bounds of float32 spaces
    try:
        seed, fresh = actor_seed(args, index, generation), True
        agent, envs, generator = make_agent(), make_envs(seed=seed), torch.Generator().manual_seed(seed)
        learner.send(None)
        while True:
            asked = time.perf_counter()
            slot, version = learner.recv()
            begun = time.perf_counter()
            out, episodes = rollouts.arrays(slot), []
            out.version[...], out.fresh[...], fresh = store.load(agent, version), fresh, False
            with torch.inference_mode():
                for t in range(len(out.rewards)):
                    envs.write_obs(out, t)
                    actions, logprobs = agent.act(torch.from_numpy(envs.obs), generator)
                    out.actions[t], out.logprobs[t], out.valid[t] = actions.numpy(), logprobs.numpy(), envs.valid
                    out.rewards[t], out.terminated[t], out.truncated[t], ended = envs.step(out.actions[t])
                    episodes += ended
            envs.write_obs(out, t + 1)
            learner.send((slot, episodes, begun - asked, time.perf_counter() - begun))
    except (EOFError, ConnectionError):
        pass  # the learner is gone
    except Exception:
        learner.send(f"has failed:\n{traceback.format_exc()}")


def actor_seed(args, index, generation=0):
    """Seed of an actor's action noise and of its first environment. envpool gives environment i this seed + i, in 31
    bits: the blocks of all actors, of all `--seed`s below 2^15, and of all learners, up to 2^16 environments in total,
    are disjoint. An actor that takes the place of another, as of `generation` 1, plays other episodes: its seed is
    drawn."""
    index += RANK * args.num_actors
    if generation:
        return int(np.random.default_rng((args.seed, index, generation)).integers(2**31 - args.num_envs))
    return (args.seed * 2**16 + index * args.num_envs) % 2**31


def ticket_version(args, rollout):
    """The policy version that must collect a rollout (counted from 0): the definition of the lag schedules. The draws
    of `mixture` depend on seed and rollout alone; early on they are uniform over the versions that exist."""
    batch = rollout // args.rollouts_per_batch
    if args.lag_schedule == "async":
        return LATEST
    if args.lag_schedule == "fixed":
        return max(batch - args.lag, 0)
    draw = np.random.default_rng((args.seed, global_rollout(args, rollout)))
    return batch - int(draw.integers(min(args.lag, batch) + 1))


def global_rollout(args, rollout):
    """The number of a rollout of this learner, counted over all learners: those of a batch follow one another."""
    batch, place = divmod(rollout, args.rollouts_per_batch)
    return (batch * WORLD_SIZE + RANK) * args.rollouts_per_batch + place


def train(args):
    """Train an agent and return it: a whole run, from the flags (`Args`) to the summary line. Raises UsageError if the
    flags cannot work, RunError if it cannot go on, KeyboardInterrupt or SystemExit after SIGINT or SIGTERM."""
    args = replace(args)  # the caller's stays as it is
    validate(args)
    connect(args)
    folder, resume, again = run_folder(args, args.env_id)
    if resume:
        folder, saved = load_checkpoint(resume)
        check_resume(args, saved, again)
    # Before what takes long, since it may fail, and before the writer, to which it listens
    tracked = start_tracking(args, folder) if args.track and RANK == 0 else None
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    torch.set_num_threads(args.learner_threads)
    device = device_of("cuda" if torch.cuda.is_available() and args.cuda else "cpu")

    make_agent, make_envs = build(args)
    obs_size, action_size, atari, *_ = make_agent.args
    if atari:
        keep_freed_memory()
    agent = make_agent().to(device)
    same_start(agent, args.seed)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    minibatch_loss = torch.compile(ppo_minibatch, dynamic=True) if args.compile else ppo_minibatch
    obs_statistics = RunningMeanStd(shape=obs_size)
    reward_scaler = RewardScaler(args.num_actors, args.num_envs, args.gamma)
    store = PolicyStore(agent, num_versions=max(args.lag + 1, 2))
    store.publish(agent, 0)
    # As many slots as one batch needs, and at least one per actor: more would make data older, and nothing faster
    slots_per_actor = math.ceil(args.rollouts_per_batch / args.num_actors)
    T, C = args.num_steps, args.num_envs
    if atari:
        frames, ages = torch.zeros(T + 4, C, 84, 84, dtype=torch.uint8), torch.zeros(T + 1, C, dtype=torch.uint8)
        fields = {"obs": frames, "ages": ages, "actions": torch.zeros(T, C, dtype=torch.int64)}
    else:
        fields = {"obs": torch.zeros(T + 1, C, obs_size), "actions": torch.zeros(T, C, action_size)}
    rollouts = Rollouts(args.num_actors * slots_per_actor, **fields)

    global_step, version, last_returns, seconds = 0, 0, deque(maxlen=100), Counter()  # seconds: over the whole run
    kl_coef = torch.tensor(args.kl_coef, device=device)  # a tensor: --compile would take a number for a constant
    trained = (agent, optimizer, store, (obs_statistics, reward_scaler.statistics))
    if resume:
        restore(saved, *trained)
        global_step, version = saved["global_step"], saved["version"]
        last_returns.extend(saved["last_returns"])
        seconds.update(saved["seconds"])
        kl_coef.fill_(saved["kl_coef"])

    def save():
        counters = {"global_step": global_step, "version": version, "last_returns": list(last_returns)}
        counters["kl_coef"] = kl_coef.item()
        save_checkpoint(folder, args, *trained, **counters, seconds=dict(seconds))

    actors = Actors(args, slots_per_actor, version)
    if RANK == 0:
        writer = SummaryWriter(folder, purge_step=global_step + 1 if resume else None)
        table = "\n".join(f"|{name}|{value}|" for name, value in vars(args).items())
        writer.add_custom_scalars(LAYOUT)
        writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}")
    hidden = None if RANK == 0 else True  # None: where there is no terminal
    progress = tqdm(total=args.total_timesteps, initial=global_step, unit="step", dynamic_ncols=True, disable=hidden)
    next_line = 0
    try:
        actors.start(partial(make_agent, trained=False), partial(make_envs, C), store, rollouts)
        actors.issue(newest=version)
        batch_time = time.perf_counter()
        while global_step < args.total_timesteps:
            # COLLECT a batch, copy it, and let its slots be filled again while we train
            asked = time.perf_counter()
            collected = actors.collect(batch=version)
            if not all(gather(bool(collected))):  # learners end together, after the same batch
                break
            slots, ended, waits, acts = map(list, zip(*collected, strict=True))
            learner_wait = time.perf_counter() - asked
            batch = rollouts.batch(slots, device)  # [T (observations: more), N, ...]
            lags = (version - rollouts.version[slots]).tolist()  # [R]
            returns = []
            for slot in slots:
                index, rollout = slot // slots_per_actor, rollouts.arrays(slot)
                check_finite(f"from actor {index}, after step {global_step}", vars(rollout), folder)
                if not atari:
                    returns.append(reward_scaler.discounted(index, rollout))
            update_statistics(reward_scaler.statistics, returns)
            actors.issue(newest=version, freed=slots)

            # ESTIMATE advantages by the learner's critic, once per batch
            with torch.no_grad():
                obs = stack_frames(batch.obs, batch.ages) if atari else agent.normalize(batch.obs)  # [T + 1, N, ...]
                learner_logprobs, _, values = agent.evaluate(obs[:-1], batch.actions)  # [T, N]
                values = torch.cat([values, agent.get_value(obs[-1:])])  # [T + 1, N]
                learner_log_ratios = learner_logprobs - batch.logprobs  # [T, N], log pi_T/beta
            rewards = batch.rewards if atari else reward_scaler.scale(batch.rewards)  # [T, N]
            terminated, dones = batch.terminated.float(), (batch.terminated | batch.truncated).float()  # [T, N]
            targets, advantages = gae(rewards, values, terminated, dones, args.gamma, args.gae_lambda)  # [T, N]
            # Dummy steps end here: of T * N rows, the B valid ones go on, [B, ...]
            rows = (obs[:-1], batch.actions, batch.logprobs, learner_log_ratios, targets, advantages)
            valid = batch.valid.flatten().nonzero().squeeze(-1)  # [B]
            rows = [row.flatten(0, 1).index_select(0, valid) for row in rows]
            *rows, b_advantages = rows
            b_obs, b_actions, b_behavior_logprobs, b_learner_log_ratios, b_targets = rows
            b_values, b_learner_ratios = values[:-1][batch.valid], b_learner_log_ratios.exp()

            # OPTIMISE: minibatch updates of pi
            lr = args.learning_rate * (1 - global_step / args.total_timesteps if args.anneal_lr else 1)
            optimizer.param_groups[0]["lr"] = lr
            samples = sum(gather(len(b_obs)))  # of all learners
            share, shares = len(b_obs) / samples, minibatch_shares(len(b_obs), args.num_minibatches, device)
            updates, weights = [], []
            for _ in range(args.update_epochs):
                # Each row once per epoch; the minibatches' sizes differ by one at most
                minibatches = torch.randperm(len(b_obs)).to(device).tensor_split(args.num_minibatches)
                advantages = [b_advantages.index_select(0, mb) for mb in minibatches]
                if args.norm_adv:
                    advantages = normalize_advantages(advantages, shares)
                for mb, mb_advantages, mb_share in zip(minibatches, advantages, shares, strict=True):
                    mb_rows = (row.index_select(0, mb) for row in rows)
                    loss, update = minibatch_loss(agent, args, kl_coef, mb_advantages, *mb_rows)
                    optimizer.zero_grad()
                    loss.backward()
                    average_gradients(agent, mb_share)
                    update["losses/grad_norm"] = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                    optimizer.step()
                    updates.append(update)
                    weights.append(mb_share / share)  # 1 for a single learner
                kl = torch.stack([update["losses/approx_kl"] for update in updates[-args.num_minibatches :]])
                if args.target_kl is not None and global_mean(share, kl) > args.target_kl:
                    break

            # PUBLISH the next version: new weights, and observation statistics that include this batch
            weights, names = torch.stack(weights), updates[0]
            means = {n: (weights * torch.stack([update[n] for update in updates])).mean().item() for n in names}
            with torch.no_grad():
                final_log_ratios = agent.evaluate(b_obs, b_actions)[0] - b_behavior_logprobs  # [B], log pi/beta
                final_ratios = final_log_ratios.exp()
                kl = global_mean(share, final_ratios - 1 - final_log_ratios).item()
            used_kl_coef = kl_coef.item()
            if args.objective == "kl" and args.adapt_kl:
                kl_coef.fill_(adapted_kl_coef(used_kl_coef, kl, args.kl_target))
            if not atari:
                update_statistics(obs_statistics, [batch.obs[:-1][batch.valid].double().cpu().numpy()])
                agent.obs_mean.copy_(torch.from_numpy(obs_statistics.mean))
                agent.obs_var.copy_(torch.from_numpy(obs_statistics.var))
            check_finite(f"in the batch after step {global_step}", means | agent.state_dict(), folder)
            version += 1
            store.publish(agent, version)
            actors.issue(newest=version)
            global_step += samples

            # LOG, against environment steps: means over all learners
            now = time.perf_counter()
            batch_seconds, batch_time = now - batch_time, now
            seconds.update(learner_wait=learner_wait, waits=sum(waits), actors=sum(waits + acts), total=batch_seconds)
            means |= {
                "losses/explained_variance": 1 - ((b_targets - b_values).var() / b_targets.var()).item(),
                "lag/tv_backward": 0.5 * (b_learner_ratios - 1).abs().mean().item(),
                "lag/tv_forward": 0.5 * (final_ratios - b_learner_ratios).abs().mean().item(),
                "lag/tv_total": 0.5 * (final_ratios - 1).abs().mean().item(),
                "lag/ess": (b_learner_ratios.mean().square() / b_learner_ratios.square().mean()).item(),
                "stats/learner_wait": learner_wait / batch_seconds,
                "stats/actor_wait": sum(waits) / sum(waits + acts),
                "stats/rollout_time": sum(acts) / len(acts),
                "stats/update_time": batch_seconds - learner_wait,
                "stats/queue_size": len(actors.finished),
            }
            scalars = global_means(share, means) | {"charts/learning_rate": lr}
            scalars["losses/kl_coef"] = used_kl_coef
            scalars["charts/SPS"] = global_step / seconds["total"]
            everyone = zip(*gather((lags, ended, [actors.restarts])), strict=True)
            lags, ended, restarts = (list(itertools.chain(*parts)) for parts in everyone)
            scalars["lag/versions_mean"], scalars["lag/versions_max"] = np.mean(lags), max(lags)
            scalars["stats/actor_restarts"] = sum(restarts)
            episodes = [episode for part in ended for episode in part]
            if episodes:
                scalars["charts/episodic_return"], scalars["charts/episodic_length"] = np.mean(episodes, axis=0)
                last_returns.extend(float(episode_return) for episode_return, _ in episodes)
            for name, value in scalars.items() if RANK == 0 else ():
                writer.add_scalar(name, value, global_step)
            recent = recent_return(last_returns)
            lag, tv, kl = (scalars[name] for name in ("lag/versions_mean", "lag/tv_total", "losses/approx_kl"))
            status = f"{recent}, lag {lag:.1f}, TV {tv:.3f}, KL {kl:.4f}"
            progress.set_postfix_str(status, refresh=False)
            progress.update(min(global_step, args.total_timesteps) - progress.n)
            if progress.disable and RANK == 0 and now >= next_line and not actors.end:  # where there is no terminal
                sps = f"{scalars['charts/SPS']:.0f} SPS"
                print(f"step {global_step}/{args.total_timesteps}, {sps}, {status}", flush=True)
                next_line = now + 5
            if args.checkpoint_interval and version % args.checkpoint_interval == 0:
                save()
        save()
    finally:
        actors.stop()
        progress.close()
        with contextlib.suppress(OSError):  # on a full disk, too, what ended the run is what to tell
            if RANK == 0:
                writer.close()
    if global_step < args.total_timesteps:
        if RANK == 0:
            tell(f"stopped at step {global_step}; --resume {folder} goes on from there")
        raise actors.end or RunError(f"another learner has ended the run, at step {global_step}")
    summary = (
        f"{args.env_id}, seed {args.seed}: {global_step} steps in {seconds['total']:.1f} s, "
        f"{global_step / seconds['total']:.0f} SPS, {recent_return(last_returns)}, mean of "
        f"{len(last_returns)} episodes; learner waited {seconds['learner_wait'] / seconds['total']:.1%} of the time, "
        f"actors {seconds['waits'] / seconds['actors']:.1%}; logs in {folder}"
    )
    if RANK == 0:
        print(summary)
    if dist.is_initialized():
        dist.destroy_process_group()
    if RANK == 0 and (args.save_model or args.capture_video):
        model = f"{folder}/{args.exp_name}.cleanrl_model"
        save_model(model, args, agent)
        print(f"model saved to {model}", flush=True)
        results = evaluate(replace(args, evaluate=model, resume="", track=False, save_model=False))
        with contextlib.closing(SummaryWriter(folder)) as writer:
            for name, returns in results.items():
                writer.add_scalar(f"eval/{name}_return", np.mean(returns), global_step)
    if tracked:
        tracked.finish()  # a run that ends otherwise is ended by wandb, as failed
    return agent


class Actors:
    """The actor processes, a pipe to each, and the tickets: who collects what with which policy version.

    A slot belongs to one actor for good. Rollout j goes to actor j mod N, which fills its slots in turn. A free slot
    has a ticket as soon as the policy version exists, so actors collect while the learner trains; they are paced by the
    number of slots, nothing is dropped. Batch v is made, lockstep, of the R rollouts from v R on, in this order, so
    that nothing depends on timing; async, of the R that were finished first.

    An actor that dies, fails or gets stuck is replaced by one with fresh environments, which collects from the start
    what was asked for and not delivered. `end` is what must end the run, if anything must: an exception.
    """

    def __init__(self, args, slots_per_actor, version=0):
        N, done = args.num_actors, version * args.rollouts_per_batch  # rollouts of the batches before `version`
        self.args, self.slots_per_actor, self.arrivals = args, slots_per_actor, done
        self.first_version, self.restarts, self.end, self.signalled, self.handlers = version, 0, None, 0.0, {}
        self.issued = [len(range(index, done, N)) for index in range(N)]  # tickets given to each actor so far
        self.rollout_in = {}  # slot -> the rollout that it is for, until it is free again
        self.finished = {}  # place in the order of training -> what the actor sent
        self.processes, self.connections = {}, {}  # by the actor's index
        self.owed = [deque() for _ in range(N)]  # what each actor has to answer: None, to be ready, and tickets
        self.heard = [0.0] * N  # when each last sent something, or got something to do
        self.failures = [0] * N  # of each since its last rollout

    def start(self, *arguments):
        """Start the actors, with the arguments of `actor` from make_agent on, and block until all are ready. Until
        `stop`, signals end the run in good order."""
        # forkserver copies a process that has done all imports: actors start much sooner than by spawn, in less memory
        self.context = mp.get_context("forkserver" if "forkserver" in mp.get_all_start_methods() else "spawn")
        self.context.set_forkserver_preload(PRELOAD)
        self.arguments = arguments
        if threading.current_thread() is threading.main_thread():  # Python allows it there only
            numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGCONT)
            self.handlers = {number: signal.signal(number, self.on_signal) for number in numbers}
        for index in range(self.args.num_actors):
            self.launch(index)
        while any(self.owed) and not self.end:
            self.receive(timeout=0.5)

    def on_signal(self, number, _):
        """End the run after the batch in hand; at the second signal at once."""
        if number == signal.SIGCONT:  # the job was suspended: that actors sent nothing for long means nothing
            self.heard = [time.perf_counter()] * len(self.heard)
            return
        end, now = KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number), time.perf_counter()
        if not self.end:
            self.end, self.signalled = end, now
        elif now > self.signalled + 1:  # else it is the same one, from a scheduler and from torchrun
            raise end

    def launch(self, index, pause=0):
        """Start an actor, which waits for `pause` seconds first, and send it the tickets that its predecessor left."""
        # Ctrl-C, and a scheduler's SIGTERM, can reach every process: actors inherit that they leave them to the
        # learner. The resource tracker must run before, because starting it would lift the block
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            self.connections[index], theirs = self.context.Pipe()
            arguments = (self.args, index, self.first_version + self.restarts, pause, *self.arguments, theirs)
            process = self.context.Process(target=actor, args=arguments, name=f"actor {index}", daemon=True)
            process.start()
            self.processes[index] = process
            theirs.close()  # so that the pipe ends with the actor
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
        tickets = [ticket for ticket in self.owed[index] if ticket]
        with contextlib.suppress(ConnectionError):  # `receive` tells of a dead actor
            for ticket in tickets:
                self.connections[index].send(ticket)
        self.owed[index], self.heard[index] = deque([None, *tickets]), time.perf_counter() + pause

    def replace(self, index, problem):
        """Report what is wrong with an actor and start its successor, or let the run end."""
        self.processes[index].kill()
        self.processes[index].join()
        self.restarts += 1
        self.failures[index] += 1
        if self.restarts > self.args.max_actor_restarts:
            self.end = self.end or RunError(f"actor {index} {problem}\nThis is more than --max-actor-restarts allows")
            return
        pause = min(2 ** (self.failures[index] - 1) - 1, 15)  # 0, 1, 3, 7, 15, 15, ... until it delivers
        tell(f"actor {index} {problem}\nrestart {self.restarts}, in {pause} s")
        try:
            self.launch(index, pause)
        except (OSError, EOFError) as error:  # no memory, no descriptors, or no forkserver
            self.end = self.end or RunError(f"actor {index} {problem}\nAnother cannot be started: {error!r}")

    def receive(self, timeout):
        """Wait for `timeout` seconds, or until actors send something; returns what came about rollouts. Replaces actors
        that have died, failed, or sent nothing for too long."""
        ready, now, messages = wait(self.connections.values(), timeout), time.perf_counter(), []
        for index, connection in self.connections.items():
            if connection in ready:
                self.heard[index] = now
                try:
                    message = connection.recv()
                except (EOFError, OSError):
                    self.processes[index].join(10)
                    code = self.processes[index].exitcode or 0
                    message = f"has died: {signal.Signals(-code).name if code < 0 else f'exit code {code}'}"
            elif self.owed[index] and now - self.heard[index] > self.args.actor_timeout:
                message = f"has sent nothing for {self.args.actor_timeout:g} s (--actor-timeout)"
            else:
                continue
            if isinstance(message, str):
                self.replace(index, message)
            elif self.owed[index].popleft():  # else it is ready
                self.failures[index] = 0
                messages.append(message)
        return messages

    def issue(self, newest, freed=()):
        """Send out each ticket whose slot is free and whose policy version is there: `newest` is the last, `freed` are
        slots that have been copied and may be filled again."""
        for slot in freed:
            self.rollout_in.pop(slot)
        for index, connection in self.connections.items():
            while True:
                rollout = index + self.issued[index] * self.args.num_actors
                slot = index * self.slots_per_actor + self.issued[index] % self.slots_per_actor
                version = ticket_version(self.args, rollout)
                if slot in self.rollout_in or version > newest:
                    break
                if not self.owed[index]:
                    self.heard[index] = time.perf_counter()
                self.owed[index].append((slot, version))
                with contextlib.suppress(ConnectionError):  # `receive` tells of a dead actor
                    connection.send((slot, version))
                self.rollout_in[slot] = rollout
                self.issued[index] += 1

    def collect(self, batch):
        """Block until the rollouts of a batch are there; returns what actors sent, in the order of training. Returns
        nothing if the run must end."""
        places = range(batch * self.args.rollouts_per_batch, (batch + 1) * self.args.rollouts_per_batch)
        while not self.end:
            complete = all(place in self.finished for place in places)
            messages = self.receive(timeout=0 if complete else 0.5)
            for message in messages:
                place = self.arrivals if self.args.lag_schedule == "async" else self.rollout_in[message[0]]
                self.finished[place] = message
                self.arrivals += 1
            if complete and not messages:
                return [self.finished.pop(place) for place in places]
        return []

    def stop(self):
        """End the actors at once: they hold nothing worth waiting for."""
        for process in self.processes.values():
            process.kill()
        for process in self.processes.values():
            process.join()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


# The groups of flags in --help, by the first flag of each
HEADINGS = {
    "exp_name": "run and machine",
    "env_id": "environment",
    "track": "tracking and evaluation",
    "checkpoint_interval": "checkpoints and faults",
    "num_actors": "actors: how old data is when it arrives (backward lag)",
    "update_epochs": "learner: how far the policy moves on one batch (forward lag)",
    "objective": "objective",
}

# What stands side by side under "Custom scalars" in TensorBoard
LAYOUT = {
    "policy lag": {
        "return": ["Multiline", ["charts/episodic_return"]],
        "lag in versions": ["Multiline", ["lag/versions_mean", "lag/versions_max"]],
        "total variation": ["Multiline", ["lag/tv_backward", "lag/tv_forward", "lag/tv_total"]],
        "KL": ["Multiline", ["losses/old_approx_kl", "losses/approx_kl"]],
        "share of time spent waiting": ["Multiline", ["stats/learner_wait", "stats/actor_wait"]],
    }
}


class UsageError(Exception):
    """Flags that cannot work; the message is one line that names the flag and what to type instead."""


class RunError(RuntimeError):
    """A run that cannot go on; the message says what failed, where, and what is saved."""


def tell(text):
    """Print to stderr. Ctrl-C may have ended what it is piped to, which must not keep a run from saving."""
    with contextlib.suppress(OSError):
        print(f"learner {RANK}: {text}" if WORLD_SIZE > 1 else text, file=sys.stderr, flush=True)


def check(args, name, holds, advice):
    """Raise UsageError about the flag `name` unless `holds`."""
    value = getattr(args, name)
    typed = f"--{'no-' * (value is False)}{name.replace('_', '-')}{'' if isinstance(value, bool) else f' {value}'}"
    if not holds:
        raise UsageError(f"{typed}: {advice}")


def validate(args):
    """Fill in the flags that the domain decides, and check all, before any process starts. Raises UsageError."""
    atari = atari_actions(args.env_id) is not None
    for name, defaults in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, defaults[atari])
    counts = ("total_timesteps", "num_actors", "num_envs", "rollouts_per_batch", "num_minibatches", "update_epochs")
    lowest = dict.fromkeys(counts, 1) | {"num_steps": 2, "max_grad_norm": 1e-9}  # one step could be all dummies
    lowest |= {"learner_threads": 1, "kl_target": 1e-9, "spo_eps": 1e-9, "max_importance": 1e-9, "kl_coef": 1e-4}
    lowest |= {"actor_timeout": 1, "learner_timeout": 1, "eval_episodes": 1}
    highest = {"seed": 2**31 - 1, "gamma": 1, "gae_lambda": 1, "num_actors": 256, "num_envs": 256, "num_steps": 100_000}
    highest |= {"rollouts_per_batch": 1024, "lag": 500 if atari else 10_000, "repeat_action_probability": 1}
    highest |= {"learner_threads": 256, "actor_nice": 19, "eval_episodes": 256}
    for name, value in vars(args).items():
        if isinstance(value, (int, float)):
            low, high = lowest.get(name, 0), highest.get(name, 10**12)
            check(args, name, low <= value <= high, f"must be a number from {low} to {high}")
    check(args, "exp_name", not {"/", ":"} & {*args.exp_name}, "names a folder and a file; leave out / and :")
    gpus, here = torch.cuda.device_count() if args.cuda else 0, int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    advice = f"there are {gpus} GPUs for {here} learners; type --nproc-per-node {gpus}, or --no-cuda"
    check(args, "cuda", not gpus or gpus >= here, advice)
    advice = f"must be more than the --actor-timeout of {args.actor_timeout:g}, so that stuck actors are replaced first"
    check(args, "learner_timeout", WORLD_SIZE == 1 or args.learner_timeout > args.actor_timeout, advice)
    advice = "the async schedule cannot hold a lag; type --lag-schedule fixed (or mixture), or vary --num-actors"
    check(args, "lag", args.lag == 0 or args.lag_schedule != "async", advice)
    compiler = os.environ.get("CXX", "g++")  # where torch looks
    check(args, "compile", not args.compile or shutil.which(compiler), f"needs {compiler}; type --no-compile")
    check(args, "compile", not (args.compile and atari), "gains nothing with the CNN of Atari; type --no-compile")
    for name, package in (("track", "wandb"), ("capture_video", "imageio_ffmpeg")):
        found = not getattr(args, name) or importlib.util.find_spec(package)
        check(args, name, found, f"type pip install {package.replace('_', '-')}, or leave the flag out")
    advice = "an evaluation neither goes on with a run nor makes one: leave out --resume, --track and --save-model"
    check(args, "evaluate", not args.evaluate or not (args.resume or args.track or args.save_model), advice)
    tickets = math.ceil(args.rollouts_per_batch / args.num_actors)  # at once, which must fit into a pipe
    check(args, "num_actors", tickets <= 128, f"type --num-actors {math.ceil(args.rollouts_per_batch / 128)} or more")
    samples = args.rollouts_per_batch * args.num_steps * args.num_envs
    limit = 2**17 if atari else 2**22
    check(args, "num_steps", samples <= limit, f"makes batches of {samples} samples, more than {limit}")
    for name in ("episodic_life", "reward_clip", "repeat_action_probability", "bf16"):
        unset = getattr(args, name) == getattr(Args, name)
        check(args, name, atari or unset, f"is for Atari games, which {args.env_id} is not")
    divisors = [n for n in range(1, samples // 4 + 1) if samples % n == 0] or [1]
    nearest = min(divisors, key=lambda n: abs(n - args.num_minibatches))
    advice = f"cannot split the {samples} samples of a batch evenly, 4 or more each; type --num-minibatches {nearest}"
    check(args, "num_minibatches", args.num_minibatches in divisors, advice)
    import_environment(args)
    if continuous_sizes(args.env_id) is None and not atari:
        closest = closest_tasks(args.env_id, lambda task: continuous_sizes(task) or atari_actions(task))
        advice = "no Atari game, nor a task (of envpool or gymnasium) with a floating-point Box action space (one of "
        advice += f"your own: my_module:{args.env_id}); closest: {', '.join(closest)}"
        check(args, "env_id", False, advice)


def import_environment(args):
    """Import the module of "module:MyEnv-v0", which registers the environment. Raises UsageError."""
    module, colon, _ = args.env_id.rpartition(":")
    try:
        importlib.import_module(module or ".") if colon else None
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        check(args, "env_id", False, f"cannot import {module} ({reason}); PYTHONPATH must have its folder")


def closest_tasks(env_id, supported):
    """The envpool tasks that are spelled most like `env_id`, of those for which `supported` is true; at most three."""
    tasks = {re.sub(r"\W", "", task).lower(): task for task in envpool.list_all_envs()}
    similar = difflib.get_close_matches(re.sub(r"\W", "", env_id).lower(), tasks, n=50, cutoff=0)
    return list(itertools.islice((tasks[name] for name in similar if supported(tasks[name])), 3))


def continuous_sizes(env_id):
    """(observation size, action size) of an envpool task or a gymnasium environment with a floating-point Box action
    space; None of any other. "module:MyEnv-v0" imports the module, which registers the environment."""

    def size(space):
        if isinstance(space, gym.spaces.Dict):
            return sum(map(size, space.values()))
        if space.shape is None:
            raise gym.error.Error(f"{space} has no shape")
        return math.prod(space.shape)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if env_id in envpool.list_all_envs():
                spec = envpool.make_spec(env_id)
                obs_space, action_space = spec.gymnasium_observation_space, spec.gymnasium_action_space
            else:
                with contextlib.closing(gym.make(env_id)) as env:
                    obs_space, action_space = env.observation_space, env.action_space
        sizes = size(obs_space), size(action_space)
    except (gym.error.Error, ImportError, RuntimeError):  # unknown, or without the libraries or files that it needs
        return None
    floats = isinstance(action_space, gym.spaces.Box) and np.issubdtype(action_space.dtype, np.floating)
    return sizes if floats else None


def atari_actions(env_id):
    """The number of actions of an envpool Atari game; None of any other task."""
    try:
        spec = envpool.make_spec(env_id)
    except Exception:  # unknown, or without the system libraries or files that it needs
        return None
    return int(spec.action_space.n) if hasattr(spec.config, "full_action_space") else None


def leave_with_parent():
    """Let this process end with the one that started it, however that ends, also from the middle of a rollout."""
    parent_ends = [mp.parent_process().sentinel]
    threading.Thread(target=lambda: wait(parent_ends) and os._exit(1), daemon=True).start()


def connect(args):
    """Join the other learners, where torchrun has started several. Raises RunError if one does not come."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: leave with torchrun, however it ends
    if WORLD_SIZE > 1 and not dist.is_initialized():
        gpus = args.cuda and torch.cuda.is_available()
        if gpus:
            torch.cuda.set_device(LOCAL_RANK)
        try:
            store = job_store(args)
            # Learners that were started again must not find the addresses of those before
            store = dist.PrefixStore(f"attempt {this_attempt(store, args.learner_timeout)}", store)
            timeout = timedelta(seconds=args.learner_timeout)
            dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", None, timeout, WORLD_SIZE, RANK, store)
        except (RuntimeError, ValueError) as error:
            reason = f"{error}".partition("\n")[0][:300]
            raise RunError(f"cannot join the learners, or one has not come in --learner-timeout ({reason})") from None


def job_store(args):
    """What all learners share, also with those before them that torchrun has started again."""
    return next(dist.rendezvous("env://", timeout=timedelta(seconds=args.learner_timeout)))[0]


def this_attempt(store, timeout):
    """A number that the learners now running share, and none before them: a learner may have died before it came here,
    so they cannot count for themselves. The first one counts, and confirms whom it has met. Raises RuntimeError."""
    if RANK == 0:
        attempt = store.add("attempts", 1)
        here = [store.get(f"learner {rank} of attempt {attempt}").decode() for rank in range(1, WORLD_SIZE)]
        store.set(f"learners of attempt {attempt}", "|".join(here))
        return attempt
    me, deadline = f"{os.uname().nodename} {os.getpid()} {time.time_ns()}", time.monotonic() + timeout
    while time.monotonic() < deadline:
        attempt = store.add("attempts", 0)
        store.set(f"learner {RANK} of attempt {attempt}", me)
        met = f"learners of attempt {attempt}"
        if store.check([met]) and me in store.get(met).decode().split("|"):
            return attempt
        time.sleep(0.1)
    raise RuntimeError("the first learner has not come")


def run_folder(args, subject):
    """The folder of this run, where to resume from ("" to begin), and whether torchrun has started the learners again.
    Raises UsageError if they have different flags."""
    for flags in gather(vars(args)):
        for name, value in flags.items():
            advice = f"another learner has {value}; all must have the same flags"
            check(args, name, value == getattr(args, name), advice)
    name = f"runs/{re.sub('[/:]', '-', subject)}__{args.exp_name}__{args.seed}"
    resume, again, folder = args.resume, False, ""
    if resume:
        folder = resume if os.path.isdir(resume) else os.path.dirname(resume) or "."
    if "TORCHELASTIC_RUN_ID" in os.environ and RANK == 0:
        with exchange():
            store = job_store(args)
            again = store.check([f"folder of {name}"])
            if again:
                folder = store.get(f"folder of {name}").decode()
                resume = folder if os.path.exists(f"{folder}/checkpoint.pt") else resume
                tell(f"started again, going on from {resume or 'the beginning: no checkpoint (--checkpoint-interval)'}")
            folder = folder or new_folder(name)
            store.set(f"folder of {name}", folder)
    if RANK == 0:
        folder = folder or new_folder(name)
    return from_first((folder, resume, again))


def new_folder(name):
    """Make the folder of a new run, which has the time in its name, and return its path. Runs of one name that begin in
    the same second get the seconds after it."""
    for begun in itertools.count(int(time.time())):
        with contextlib.suppress(FileExistsError):
            os.makedirs(folder := f"{name}__{begun}")
            return folder


@contextlib.contextmanager
def exchange():
    """Around what needs all learners: raises RunError if one has ended or does not answer (by gloo; NCCL ends the
    process)."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        reason = f"{error}".partition("\n")[0][:300]
        raise RunError(f"another learner has ended, or has not answered in --learner-timeout ({reason})") from None


def same_start(agent, seed):
    """Give all learners the weights of the first, since hosts may round differently, and minibatches of their own."""
    agent.load_state_dict(from_first({name: tensor.cpu() for name, tensor in agent.state_dict().items()}))
    if RANK > 0:
        torch.manual_seed(int(np.random.default_rng((seed, RANK)).integers(2**63)))


def gather(value):
    """The `value`s of all learners, in the order of their ranks: a list. Raises RunError."""
    values = [value]
    if WORLD_SIZE > 1:
        values = [None] * WORLD_SIZE
        with exchange():
            dist.all_gather_object(values, value)
    return values


def from_first(value):
    """The `value` of the learner with rank 0, in every learner. Raises RunError."""
    box = [value]
    if WORLD_SIZE > 1:
        with exchange():
            dist.broadcast_object_list(box, src=0, device="cpu")
    return box[0]


def all_sum(tensor):
    """A tensor, changed in place to its sum over all learners, the same to the last bit in each. Raises RunError."""
    return all_reduce(tensor) if WORLD_SIZE > 1 else tensor


def all_reduce(tensor):
    with exchange():
        dist.all_reduce(tensor)
    return tensor


# Compiled code would not catch its errors. In learners only: it imports for a second, and each actor imports this file
if WORLD_SIZE > 1 and mp.current_process().name == "MainProcess":
    all_reduce = torch.compiler.disable(all_reduce)


def global_mean(share, x):
    """Mean of x [M], which needs no gradient, over a minibatch of which the `share` in x is this learner's."""
    return all_sum(share * x.mean())


def global_means(share, means):
    """{name: mean over the samples of this learner, a `share` of all} -> {name: mean over all learners' samples}."""
    totals = all_sum(share * torch.tensor(list(means.values()), dtype=torch.float64))
    return dict(zip(means, totals.tolist(), strict=True))


def minibatch_shares(rows, num_minibatches, device):
    """This learner's share of each minibatch, if each learner splits its rows evenly: [num_minibatches]."""
    sizes = torch.tensor([len(part) for part in torch.arange(rows).tensor_split(num_minibatches)])
    return (sizes / all_sum(sizes.clone())).to(device)


def normalize_advantages(advantages, shares):
    """Advantages of all minibatches of an epoch, [M] each: minus the mean, over the standard deviation of the minibatch
    of all learners, in which this one's are a share each."""

    def means(parts):
        return all_sum(shares * torch.stack([part.mean() for part in parts]))

    centred = [part - mean for part, mean in zip(advantages, means(advantages), strict=True)]
    variances = means([part.square() for part in centred])
    return [part / (variance.sqrt() + 1e-8) for part, variance in zip(centred, variances, strict=True)]


def average_gradients(agent, share):
    """Replace the gradients of a minibatch's mean loss by their mean over all learners: one flat all-reduce."""
    if WORLD_SIZE > 1:
        gradients = [parameter.grad for parameter in agent.parameters()]
        flat = all_sum(share * torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


def update_statistics(statistics, parts):
    """Take `parts`, [samples, ...] arrays, of all learners into a RunningMeanStd: the same one in each of them."""
    moments = [(part.mean(axis=0), part.var(axis=0), len(part)) for part in parts]
    for moment in itertools.chain(*gather(moments)):
        statistics.update_from_moments(*moment)


def recent_return(returns):
    """What the progress shows of the last episodes' returns."""
    return f"return {np.mean(returns):.1f}" if returns else "no return yet"


def check_finite(place, values, folder):
    """Raise RunError with the names of those of `values`, {name: number, array or tensor}, that are not finite."""
    broken = [name for name, value in values.items() if not torch.isfinite(torch.as_tensor(value)).all()]
    if broken:
        kept = f"{folder}/checkpoint.pt"
        kept = kept if os.path.exists(kept) else "there is none"
        raise RunError(f"not finite {place}: {', '.join(broken)}; the last good checkpoint: {kept}")


def save_checkpoint(folder, args, agent, optimizer, store, statistics, **counters):
    """Write all that a run needs to go on to `folder`/checkpoint.pt, of tensors, numbers and text alone:
    torch.load(weights_only=True) reads it. The first learner writes for all. Raises RunError."""
    state = {"script": os.path.basename(__file__), "args": vars(args), "rng": gather(torch.get_rng_state())}
    if RANK > 0:
        return
    state |= {"agent": agent.state_dict(), "optimizer": optimizer.state_dict(), "store": vars(store)}
    state["statistics"] = [{n: torch.as_tensor(np.asarray(v)) for n, v in vars(s).items()} for s in statistics]
    write_file(f"{folder}/checkpoint.pt", state | counters)


def write_file(path, state):
    """Write `path` so that it is whole at every moment: the old one or the new. Raises RunError."""
    content = io.BytesIO()
    torch.save(state, content)
    try:
        with open(f"{path}.tmp", "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.tmp", path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.remove(f"{path}.tmp")
        raise RunError(f"cannot write {path} ({error.strerror}); what was there before is as it was") from None


def load_checkpoint(path):
    """A run's folder and the content of its checkpoint, given the folder or the file. The first learner reads it for
    all. Raises UsageError."""
    found = None
    if RANK == 0:
        try:
            found = read_file(path, "resume", "optimizer")
        except UsageError as error:
            found = error
    found = from_first(found)
    if isinstance(found, UsageError):
        raise found
    return found


def read_file(path, flag, needed):
    """(folder, content) of a file that this script has written, which has the entry `needed`; of a folder, of the
    checkpoint in it. Raises UsageError."""
    file = os.path.join(path, "checkpoint.pt") if os.path.isdir(path) else path
    script = os.path.basename(__file__)
    try:
        with zipfile.ZipFile(file) as archive:  # torch compares no checksums
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} is damaged")
        state = torch.load(file, map_location="cpu", weights_only=True)
        if state["script"] == script:
            state["args"], _ = Args(**state["args"]), state[needed]
    except Exception as error:  # files that are something else make torch raise all sorts
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:150]
        raise UsageError(f"--{flag} {path}: cannot be read; type a run's folder, or a file in it ({reason})") from None
    if state["script"] != script:
        raise UsageError(f"--{flag} {path}: a file of {state['script']}, not of {script}")
    return os.path.dirname(file) or ".", state


def restore(state, agent, optimizer, store, statistics):
    """Put back what `save_checkpoint` took, but for the counters."""
    if len(state["rng"]) > RANK:  # there may be more learners than before
        torch.set_rng_state(state["rng"][RANK])
    agent.load_state_dict(state["agent"])
    optimizer.load_state_dict(state["optimizer"])
    for name, tensor in state["store"].items():
        getattr(store, name).copy_(tensor)
    for s, saved in zip(statistics, state["statistics"], strict=True):
        vars(s).update({name: tensor.numpy() for name, tensor in saved.items()})


def check_resume(args, state, again=False):
    """Raise UsageError if a run cannot go on with these flags: those that are not on the use of the machine must be the
    checkpoint's."""
    if not again:  # torchrun starts complete runs again, too, if a learner dies at the very end
        advice = f"the checkpoint is at step {state['global_step']}; type a larger number"
        check(args, "total_timesteps", args.total_timesteps > state["global_step"], advice)
    free = {"total_timesteps", "num_actors", "checkpoint_interval", "resume", "actor_timeout", "max_actor_restarts"}
    free |= {"cuda", "torch_deterministic", "compile", "actor_nice", "actor_device", "learner_threads"}
    free |= {"track", "wandb_project_name", "wandb_entity", "save_model", "eval_episodes", "capture_video"}
    free |= {"learner_timeout"}
    for name, before in vars(state["args"]).items():
        advice = f"the checkpoint's is {before}; leave the flag out, or start a new run"
        same = same_task(args.env_id, before) if name == "env_id" else getattr(args, name) == before
        check(args, name, same or name in free, advice)


def keep_freed_memory():
    """Let the C library keep large blocks when they are freed. By default glibc hands them to the kernel, and every
    page of the next one costs a fault: with batches of frames, a fifth of the learner's time."""
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        library = ctypes.CDLL("libc.so.6")
        library.mallopt(-3, 2**30) or library.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD; 32 MiB is most to older ones
        library.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def same_task(env_id, other):
    """Whether two ids can mean one environment: a program that registers it leaves out "module:"."""
    (module, _, name), (other_module, _, other_name) = env_id.rpartition(":"), other.rpartition(":")
    return name == other_name and (module == other_module or not (module and other_module))


def device_of(name):
    """The device that `cpu` or `cuda` means for this learner and its actors."""
    return torch.device(f"cuda:{LOCAL_RANK}" if name == "cuda" else name)


def build_domain(args):
    """The functions that make an agent, and the environments of one actor from (their number, seed)."""
    names = ("episodic_life", "reward_clip", "repeat_action_probability")
    if num_actions := atari_actions(args.env_id):
        make_envs = partial(AtariEnvs, args.env_id, **{name: getattr(args, name) for name in names})
        return partial(Agent, 0, num_actions, True, args.bf16), make_envs
    return partial(Agent, *continuous_sizes(args.env_id), False), partial(ContinuousEnvs, args.env_id)


build = build_domain  # what `train`, `save_model` and `evaluate` call


def start_tracking(args, folder):
    """Begin, or go on with, a run of Weights & Biases: TensorBoard's curves go there, too. Raises UsageError."""
    import wandb

    name = os.path.basename(os.path.normpath(folder))
    where = {"project": args.wandb_project_name, "entity": args.wandb_entity, "name": name, "id": name[-128:]}
    try:
        return wandb.init(**where, resume="allow", config=vars(args), sync_tensorboard=True, save_code=True)
    except wandb.Error as error:
        text = " ".join(str(error).split()).rstrip(".")
        raise UsageError(f"--track: {text}; type WANDB_MODE=offline before the command to do without") from None


def save_model(path, args, agent):
    """Write all that it takes to act to `path`: flags, the agent's arguments, weights and observation statistics.
    Raises RunError."""
    weights = {name: tensor.cpu() for name, tensor in agent.state_dict().items()}
    script, sizes = os.path.basename(__file__), build(args)[0].args
    write_file(path, {"script": script, "args": vars(args), "sizes": sizes, "agent": weights})


def load_model(path):
    """The flags and the weights in a file of `save_model`, or in a checkpoint. Flags that say how the run was made, not
    what it made, have their defaults. Raises UsageError."""
    state = read_file(path, "evaluate", "agent")[1]
    other = {"resume", "evaluate", "track", "save_model", "capture_video", "compile", "actor_device"}
    defaults = {name: value for name, value in vars(Args()).items() if name in other}
    return replace(state["args"], **defaults), state["agent"]


def play(agent, envs, generator=None, see=None):
    """One whole episode in each environment: its return, [C]. Actions are sampled with the generator, the most likely
    ones without. `see` is called with each frame [height, width, 3] of environment 0. Raises RunError."""
    first = {}
    with torch.inference_mode():
        while len(first) < len(envs.valid):
            if max(envs.lengths) >= 100_000:
                raise RunError("an episode does not end within 100000 steps: its environment needs a time limit")
            if see:
                see(np.ascontiguousarray(envs.envs.render()[0]))
            actions, _ = agent.act(torch.from_numpy(envs.obs), generator)
            *_, episodes = envs.step(actions.numpy())
            for index, (episode_return, _) in zip(envs.ended, episodes, strict=True):
                first.setdefault(int(index), float(episode_return))
    return [first[index] for index in range(len(first))]


def film(agent, make_envs, path):
    """Film one episode to `path`, in a process of its own: MuJoCo ends the one in which it cannot render."""
    import imageio_ffmpeg

    leave_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # `evaluate` ends this process
    try:
        envs = make_envs(render_mode="rgb_array")
        height, width, _ = envs.envs.render()[0].shape
        writer = imageio_ffmpeg.write_frames(f"{path}.part.mp4", (width, height), fps=envs.fps, macro_block_size=2)
        writer.send(None)
        (episode_return,) = play(agent, envs, see=writer.send)
        writer.close()
        os.replace(f"{path}.part.mp4", path)
        print(f"video of a deterministic episode, return {episode_return:.1f}: {path}")
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {error}")


def evaluate(args):
    """Play `args.eval_episodes` whole episodes of the model `args.evaluate` with the most likely actions, and as many
    with sampled ones; statistics are frozen. Prints and returns {"deterministic": returns, "sampled": returns}. Raises
    UsageError; RunError, if episodes do not end."""
    validate(args)
    warnings.filterwarnings("ignore", message=".*precision lowered")
    saved, weights = load_model(args.evaluate)
    advice = f"the model has learnt {saved.env_id}: type that"
    check(args, "env_id", same_task(args.env_id, saved.env_id), advice)
    make_agent, make_envs = build(args)
    agent = make_agent()
    agent.load_state_dict(weights)
    print(f"evaluating {args.evaluate} on {args.env_id}, {args.eval_episodes} episodes of each kind", flush=True)
    seed = int(np.random.default_rng(args.seed).integers(2**31 - args.eval_episodes))  # other episodes than in training
    results = {}
    for name, generator in (("deterministic", None), ("sampled", torch.Generator().manual_seed(seed))):
        returns = results[name] = play(agent, make_envs(args.eval_episodes, seed), generator)
        each = " ".join(f"{episode_return:.1f}" for episode_return in returns)
        print(
            f"evaluation, {name}: return {np.mean(returns):.1f} +- {np.std(returns):.1f} of {len(returns)}: {each}",
            flush=True,
        )
    if args.capture_video:
        name = os.path.join(args.evaluate, "checkpoint") if os.path.isdir(args.evaluate) else args.evaluate
        path = f"{os.path.splitext(name)[0]}.mp4"
        process = mp.get_context("spawn").Process(target=film, args=(agent, partial(make_envs, 1, seed), path))
        print(f"filming one episode: {path}; where no GPU renders, a long one takes minutes", flush=True)
        preloaded = os.environ.get("LD_PRELOAD", "")  # MuJoCo looks for libEGL by a name that envpool's copy has not
        os.environ["LD_PRELOAD"] = f"{ctypes.util.find_library('EGL') or ''} {preloaded}"
        process.start()
        os.environ["LD_PRELOAD"] = preloaded
        try:
            process.join()
        finally:
            process.kill()
            with contextlib.suppress(OSError):
                os.remove(f"{path}.part.mp4")  # what there is of a film that was not finished
        if process.exitcode:
            needed = "; MuJoCo needs EGL, libegl1 and libgl1-mesa-dri" if args.env_id in envpool.list_all_envs() else ""
            tell(f"no video: {args.env_id} cannot be rendered here{needed}")
    return results


def typed_flags():
    """The flags of the command line; with --resume or --evaluate, the file's are the defaults. Raises UsageError."""
    out, box = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(box):
            args = tyro.cli(Args)
            if args.resume:
                connect(args)
                args = tyro.cli(Args, default=replace(load_checkpoint(args.resume)[1]["args"], resume=args.resume))
            elif args.evaluate:
                args = tyro.cli(Args, default=replace(load_model(args.evaluate)[0], evaluate=args.evaluate))
            return args
    except SystemExit as end:
        if end.code == 0:  # --help
            print(helpful(out.getvalue()))
            raise
        text = box.getvalue().partition("\n")[2]  # without the title
        text = re.sub(r"[\s│╰╯]*(─|-){4,}[\s│╰╯]*", "; ", text)  # rules between parts
        raise UsageError(re.sub(r"[\s│]+", " ", text).strip(" ;")) from None


def helpful(text):
    """tyro's help, with the examples from the top of this file before it, and headings between the groups of flags."""
    for name, heading in HEADINGS.items():
        flag = f"\n  --{name.replace('_', '-')}"
        text = text.replace(flag, f"\n\n {heading}{flag}", 1)
    examples = "".join(re.findall("^    python .*\n", __doc__, re.MULTILINE))
    return f"{__doc__.splitlines()[0]}\n\nExamples:\n{examples}\n{text}"


if __name__ == "__main__":
    try:
        flags = typed_flags()
        if not flags.evaluate:
            train(flags)
        elif RANK == 0:
            evaluate(flags)
    except (UsageError, RunError, OSError) as error:
        if LOCAL_RANK == 0 or not isinstance(error, UsageError):  # which all learners of a host have in common
            tell(f"error: {error}")
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)
