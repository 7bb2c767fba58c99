"""VACO on Atari: asynchronous on-policy reinforcement learning under policy lag, in one file.

"Align and Filter: Improving Performance in Asynchronous On-Policy RL", arXiv 2603.01365. What differs from
vaco_async_mujoco.py is the environment (stacks of frames, lives), the agent (one CNN for policy and critic) and the
hyperparameters (PPO's for Atari); the algorithm is the same, line by line.

    python vaco_async_atari.py                                    # Pong-v5, 4 actors, free running
    python vaco_async_atari.py --env-id Breakout-v5 --bf16        # bfloat16: faster on some processors
    python vaco_async_atari.py --lag-schedule mixture --lag 8     # by one of the last 9 versions, reproducible

  PolicyStore: the last versions of the policy, in shared memory  <--- publish, once per batch ---  learner (train)
        | copy one version, once per rollout                                                         |        ^
  actor 0 .. actor N-1: processes, one envpool each  <--- tickets (rollout, version), through pipes -+        |
        | fill one slot: obs, actions, logprobs, rewards, terminated, truncated, valid                        |
  rollouts: slots in shared memory  --- which are full, and episode statistics, through pipes  ---------------+
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
from functools import partial
from multiprocessing.connection import wait
from typing import Literal, get_args, get_type_hints

import envpool
import numpy as np
import torch
import torch.nn as nn
import tyro
from torch.utils.tensorboard import SummaryWriter

LATEST = -1  # as a ticket's version: the newest one at the moment the rollout begins


@dataclass
class Args:
    exp_name: str = os.path.basename(__file__)[: -len(".py")]  # the name of this experiment
    seed: int = 1  # seed of networks, minibatches, action noise and environments
    cuda: bool = True  # if toggled, the learner runs on the GPU when there is one; actors act on the CPU
    bf16: bool = False  # if toggled, the CNN computes in bfloat16, in learner and actors; parameters stay float32
    learner_threads: int = 1  # CPU threads of the learner; where actors share its cores, with --actor-nice 19
    actor_nice: int = 0  # niceness of the actors, up to 19: on cores that they share, the learner goes first
    track: bool = False  # if toggled, curves, flags and code go to Weights & Biases, too (WANDB_PROJECT, WANDB_ENTITY)
    checkpoint_interval: int = 0  # batches between checkpoints; 0: only at the end, and at Ctrl-C or SIGTERM
    resume: str = ""  # the folder of a run to go on with; its flags are kept, except those given again
    actor_timeout: float = 120.0  # seconds for one rollout, after which an actor counts as stuck; 0: no limit

    env_id: str = "Pong-v5"  # any Atari game of envpool: Breakout-v5, MsPacman-v5, ...
    total_timesteps: int = 10_000_000  # environment steps to train for; one is 4 frames
    episodic_life: bool = True  # if toggled, a lost life ends an episode for the learner; scores are of whole games
    reward_clip: bool = True  # if toggled, the learner sees the sign of rewards; scores are raw
    repeat_action_probability: float = 0.0  # the probability of a sticky action, in place of the chosen one
    num_actors: int = 4  # actor processes; data is about num_actors / rollouts_per_batch versions old
    num_envs: int = 8  # environments per actor
    num_steps: int = 128  # steps per environment in one rollout
    rollouts_per_batch: int = 1  # rollouts per batch, which has rollouts_per_batch * num_steps * num_envs samples
    # free running; every batch exactly `lag` versions old; each rollout by one of the last `lag + 1`, drawn uniformly
    lag_schedule: Literal["async", "fixed", "mixture"] = "async"
    lag: int = 0  # policy lag of the lockstep schedules, in versions; there is one version per batch

    update_epochs: int = 4  # passes over each batch; the more, the further the policy moves on it (forward lag)
    num_minibatches: int = 4  # minibatches, that is gradient steps, per pass
    learning_rate: float = 2.5e-4  # the learning rate of Adam
    anneal_lr: bool = True  # if toggled, the learning rate falls linearly to 0 over total_timesteps
    gamma: float = 0.99  # the discount factor
    gae_lambda: float = 0.95  # the trace decay of the advantages; 1 gives IMPALA's plain V-trace
    norm_adv: bool = True  # if toggled, advantages are normalised per minibatch, before the filter
    ent_coef: float = 0.01  # coefficient of the entropy bonus
    vf_coef: float = 0.5  # coefficient of the value loss
    max_grad_norm: float = 0.5  # the largest norm of a gradient

    align: bool = True  # if toggled, V-trace aligns advantages with the learner's policy; --no-align: GAE on stale data
    rho_bar: float = 1.0  # V-trace: upper bound of the importance weight of a temporal difference
    c_bar: float = 1.0  # V-trace: upper bound of the importance weight by which a trace is carried on
    filter: bool = True  # if toggled, gradients that raise the total variation are dropped while it is over budget
    # the budget on the total variation itself, 1/2 mean |pi/beta - 1|: THE 1/2 IS INCLUDED. With 0.2
    # Pong is hardly learnt in 1M steps; PPO's clip range of 0.1 for Atari allows 0.05
    tv_threshold: float = 0.05
    # measured from the policy that acted (backward and forward lag), or the learner's at the batch's arrival (forward)
    tv_anchor: Literal["behavior", "learner"] = "behavior"

    def __post_init__(self):
        for name, hint in get_type_hints(Args).items():
            value = getattr(self, name)
            choices = get_args(hint) or (hint,)  # of a Literal, or types
            if value not in choices and type(value) not in choices and not (float in choices and type(value) is int):
                raise ValueError(f"--{name.replace('_', '-')} {value!r}: must be one of {choices}")
            lowest = 2 if name == "num_steps" else name.startswith(("num_", "total_", "rollouts_", "update_"))
            if type(value) in (int, float) and not value >= lowest:
                raise ValueError(f"--{name.replace('_', '-')} {value}: must be at least {int(lowest)}")
        if self.lag and self.lag_schedule == "async":
            raise ValueError(f"--lag {self.lag}: needs --lag-schedule fixed or mixture; async varies by --num-actors")
        samples = self.rollouts_per_batch * self.num_steps * self.num_envs
        if samples < 4 * self.num_minibatches:
            raise ValueError(f"--num-minibatches {self.num_minibatches}: must leave 4 of {samples} samples to each")
        if self.resume and not os.path.exists(f"{self.resume}/checkpoint.pt"):
            raise ValueError(f"--resume {self.resume}: is not the folder of a run, with a checkpoint.pt")
        atari_actions(self.env_id)


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


def is_atari(env_id):
    """Whether a task is an Atari game of envpool."""
    return env_id in envpool.list_all_envs() and hasattr(envpool.make_spec(env_id).config, "full_action_space")


def atari_actions(env_id):
    """The number of actions of an Atari game. Raises ValueError if envpool has no such game."""
    if not is_atari(env_id):
        raise ValueError(f"--env-id {env_id}: is no Atari game of envpool, such as Pong-v5")
    return int(envpool.make_spec(env_id).action_space.n)


def layer_init(layer, std=2**0.5, bias_const=0.0):
    nn.init.orthogonal_(layer.weight, std)
    nn.init.constant_(layer.bias, bias_const)
    return layer


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


def tv_filter(ratios, advantages, tv_threshold, anchor_ratios=1.0):
    """Filter: drop the gradients that raise the total variation, once it is over budget (VACO, arXiv 2603.01365).

        D      = 1/2 mean_i |r_i - anchor_i|     estimates TV(pi, anchor policy): TV = 1/2 E_beta |pi/beta - 1|
        keep_i = 1 if D <= tv_threshold, else 1[A_i (r_i - anchor_i) <= 0]

    The sign: grad r A = r A grad log pi, and grad 1/2 |r - anchor| = 1/2 sign(r - anchor) r grad log pi, so ascent on
    the surrogate r A of a sample raises its share of D exactly if A (r - anchor) > 0.
    Takes, of valid rows only, ratios pi/beta [M] without gradient; advantages [M] as the loss uses them, since
    normalising changes signs; the budget on D, the 1/2 included; anchor_ratios: 1, or, to measure from the learner's
    policy pi_T, pi_T/beta [M]. Returns keep [M], boolean, and D, a scalar tensor."""
    deviations = ratios - anchor_ratios
    tv = 0.5 * deviations.abs().mean()
    return (tv <= tv_threshold) | (advantages * deviations <= 0), tv


def vaco_minibatch(agent, args, advantages, obs, actions, behavior_logprobs, learner_ratios, targets):
    """Forward pass of one gradient step: M valid rows of a batch -> loss (scalar), {what is logged: scalar tensor}."""
    if args.norm_adv:
        advantages = advantages - advantages.mean()
        advantages = advantages / (advantages.square().mean().sqrt() + 1e-8)
    newlogprobs, entropy, newvalues = agent.evaluate(obs, actions)
    log_ratios = newlogprobs - behavior_logprobs  # [M]
    ratios = log_ratios.exp()  # [M], pi/beta
    anchor_ratios = learner_ratios if args.tv_anchor == "learner" else 1.0
    keep, tv = tv_filter(ratios.detach(), advantages, args.tv_threshold, anchor_ratios)
    keep = keep | (not args.filter)
    # Dropped samples count in the mean, so they shorten the step
    policy_loss = -torch.where(keep, ratios * advantages, 0).mean()
    value_loss = 0.5 * (newvalues - targets).square().mean()
    entropy_loss = entropy.mean()
    loss = policy_loss - args.ent_coef * entropy_loss + args.vf_coef * value_loss
    with torch.no_grad():
        logs = {
            "losses/policy_loss": policy_loss.detach(),
            "losses/value_loss": value_loss.detach(),
            "losses/entropy": entropy_loss.detach(),
            "losses/old_approx_kl": -log_ratios.mean(),
            "losses/approx_kl": (ratios - 1 - log_ratios).mean(),  # joschu.net/blog/kl-approx.html
            "filter/gate_open": (tv > args.tv_threshold).float(),
            "filter/dropped": 1 - keep.float().mean(),
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

    make_agent = partial(CnnAgent, atari_actions(args.env_id), args.bf16)
    options = {name: getattr(args, name) for name in ("episodic_life", "reward_clip", "repeat_action_probability")}
    make_envs = partial(AtariEnvs, args.env_id, args.num_envs, **options)
    agent = make_agent().to(device)
    # The parameters become views of one vector [P], which is stepped faster
    weights = nn.Parameter(torch.cat([parameter.detach().flatten() for parameter in agent.parameters()]))
    nn.utils.vector_to_parameters(weights.data, agent.parameters())
    optimizer = torch.optim.Adam([weights], lr=args.learning_rate, eps=1e-5, fused=True)
    store = PolicyStore(agent, num_versions=max(args.lag + 1, 2))
    store.publish(agent, 0)
    # As many slots as one batch needs, and at least one per actor: more would make data older, and nothing faster
    S = args.num_actors * math.ceil(args.rollouts_per_batch / args.num_actors)
    T, C = args.num_steps, args.num_envs
    rollouts = {
        "obs": torch.zeros(S, T + 1, C, 84, 84, 4, dtype=torch.uint8).share_memory_(),  # with those after the last step
        "actions": torch.zeros(S, T, C, dtype=torch.int64).share_memory_(),
        "logprobs": torch.zeros(S, T, C).share_memory_(),  # of the version that acted
        "rewards": torch.zeros(S, T, C).share_memory_(),  # as paid
    }
    for name in ("terminated", "truncated", "valid"):
        rollouts[name] = torch.zeros(S, T, C, dtype=torch.bool).share_memory_()

    global_step = 0
    version = 0
    last_returns = deque(maxlen=100)
    modules = {"agent": agent, "optimizer": optimizer, "store": store}
    checkpoint = f"{folder}/checkpoint.pt"
    if args.resume:
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
        for name, module in modules.items():
            module.load_state_dict(saved[name])
        torch.set_rng_state(saved["rng"])
        global_step = saved["global_step"]
        version = saved["version"]
        last_returns.extend(saved["last_returns"])

    def save():
        """Write all that the run needs to go on. The file is whole at every moment: the old one or the new."""
        state = {name: module.state_dict() for name, module in modules.items()} | {"rng": torch.get_rng_state()}
        state |= {"args": vars(args), "global_step": global_step, "version": version}
        state["last_returns"] = list(last_returns)
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

            # ALIGN: advantages of the learner's policy pi_T, on data of the behaviour policies, once per batch
            with torch.no_grad():
                obs = agent.normalize(batch["obs"])  # [T + 1, N, 84, 84, 4]
                learner_logprobs, _, values = agent.evaluate(obs[:-1], batch["actions"])  # [T, N]
                values = torch.cat([values, agent.get_value(obs[-1:])])  # [T + 1, N]
            learner_log_ratios = learner_logprobs - batch["logprobs"]  # [T, N], log pi_T/beta
            log_rhos = learner_log_ratios if args.align else torch.zeros_like(learner_log_ratios)
            valid = batch["valid"]  # [T, N], with B valid rows: the others are dummy steps
            terminated = batch["terminated"].float()  # [T, N]
            dones = (batch["terminated"] | batch["truncated"]).float()  # [T, N]
            bounds = (args.gamma, args.gae_lambda, args.rho_bar, args.c_bar)
            targets, advantages = vtrace(log_rhos, batch["rewards"], values, terminated, dones, *bounds)  # [T, N]
            # Dummy steps end here: the valid rows go on, [B, ...]
            b_obs = obs[:-1][valid]
            b_actions = batch["actions"][valid]
            b_behavior_logprobs = batch["logprobs"][valid]
            b_learner_ratios = learner_log_ratios[valid].exp()
            b_advantages = advantages[valid]
            b_targets = targets[valid]

            # FILTER: minibatch updates of pi
            lr = args.learning_rate * (1 - global_step / args.total_timesteps if args.anneal_lr else 1)
            optimizer.param_groups[0]["lr"] = lr
            b_fields = (b_advantages, b_obs, b_actions, b_behavior_logprobs, b_learner_ratios, b_targets)
            minibatch_logs = []
            for _ in range(args.update_epochs):
                rows = torch.randperm(len(b_obs)).to(device)
                for mb in rows.tensor_split(args.num_minibatches):
                    mb_fields = [field.index_select(0, mb) for field in b_fields]
                    weights.grad, logs = gradient(vaco_minibatch, agent, args, *mb_fields)
                    optimizer.step()
                    minibatch_logs.append(logs)

            # PUBLISH the next version
            with torch.no_grad():
                final_ratios = (agent.evaluate(b_obs, b_actions)[0] - b_behavior_logprobs).exp()  # [B], pi/beta
            means = {name: torch.stack([logs[name] for logs in minibatch_logs]).mean() for name in minibatch_logs[0]}
            check_finite(f"in the batch after step {global_step}", means | agent.state_dict())
            version += 1
            store.publish(agent, version)
            actors.issue(newest=version)
            global_step += len(b_obs)

            # LOG, against environment steps
            batch_seconds = time.perf_counter() - batch_start
            batch_start += batch_seconds
            scalars = means | {
                "losses/explained_variance": 1 - (b_targets - values[:-1][valid]).var() / b_targets.var(),
                "charts/learning_rate": lr,
                "lag/versions_mean": version - 1 - np.mean(versions),
                "lag/versions_max": version - 1 - min(versions),
                "lag/tv_backward": 0.5 * (b_learner_ratios - 1).abs().mean(),
                "lag/tv_forward": 0.5 * (final_ratios - b_learner_ratios).abs().mean(),
                "lag/tv_total": 0.5 * (final_ratios - 1).abs().mean(),
                "lag/ess": b_learner_ratios.mean().square() / b_learner_ratios.square().mean(),
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
