"""VACO for language models: asynchronous GRPO on math problems, under policy lag, in one file.

"Align and Filter: Improving Performance in Asynchronous On-Policy RL", arXiv 2603.01365. Actors generate with old
versions of the model (*policy lag*). GRPO (arXiv 2402.03300) has no critic, so of VACO's two halves the *filter* acts,
on tokens: when the total variation between the model being optimised (pi) and an anchor is over a budget, the
gradients that would raise it are dropped. No clipping. The anchor is the model at the batch's arrival (pi_T), which did
better here than the one that generated (beta), the other scripts' default.

    python vaco_async_llm.py                               # a tiny model made on the spot, sums
    python vaco_async_llm.py --objective grpo              # clipped ratios in place of the filter
    python vaco_async_llm.py --lag-schedule fixed --lag 4  # by the model of 4 batches ago
    python vaco_async_llm.py --model ID_OR_FOLDER ...  # its flags: docs/language-models.md

  PolicyStore: the last versions of the model, flat float32, in shared memory  <-- publish, once per batch --+
        | copy one version, once per rollout                                                                 |
        v                                                                                                    |
  actor 0 .. actor N-1: generate and score  <--- tickets (slot, version), through pipes ---  learner (train)
        | fill one slot: prompts, completions, log-probs, masks, rewards, version                            ^
        v                                                                                                    |
  Completions: preallocated slots in shared memory  --- slot numbers, through pipes -------------------------+

The method ends with `train`: read down to there. Below it are services that `train` calls, the same in every script:
`Actors` (processes, pipes, replacements), the checks of flags, several learners, checkpoints, models, evaluation.
"""

import contextlib
import copy
import ctypes
import difflib
import hashlib
import importlib
import inspect
import io
import itertools
import json
import logging
import math
import multiprocessing as mp
import os
import re
import resource
import signal
import sys
import threading
import time
import traceback
import zipfile
import zlib
from collections import Counter, deque
from dataclasses import dataclass, replace
from datetime import timedelta
from decimal import Decimal
from functools import cached_property, partial
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

with contextlib.suppress(ImportError):  # `validate` says what is missing
    import reasoning_gym
    import transformers

LATEST = -1  # as a ticket's version: the newest one at the moment the rollout begins
PRELOAD = ["torch", "transformers", "reasoning_gym", "tyro", "torch.utils.tensorboard"]  # once for all actors
# Set by torchrun: which of several learners this is, of all and on this host, and how many there are
RANK, LOCAL_RANK = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
FLAGS_FILE = "vaco_flags.json"  # beside a saved model
NUM_PROBLEMS = 2**20  # of a procedural task, for training; then they come again
# Tasks whose verifiers run completions as code of Python or sympy: they get nothing but plain expressions and lists
EVALUATING = {"binary_matrix", "countdown", "intermediate_integration", "n_queens", "polynomial_multiplication"}
EVALUATING |= {"puzzle24", "simple_integration", "spiral_matrix", "string_insertion"}
FUNCTIONS = {"sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh"}  # that expressions may call
FUNCTIONS |= {"exp", "log", "sqrt", "Abs", "Integral"}


@dataclass
class Args:
    exp_name: str = os.path.basename(__file__)[: -len(".py")]  # the name of this experiment
    seed: int = 1  # seed of the training problems, the sampling, the minibatches and the tiny model
    torch_deterministic: bool = True  # if toggled, `torch.backends.cudnn.deterministic=True`
    cuda: bool = True  # if toggled, the learner runs on the GPU when there is one
    actor_device: Literal["cpu", "cuda"] = "cpu"  # where actors generate; they may share the learner's GPU
    learner_threads: int = 1  # CPU threads of the learner
    actor_threads: int = 1  # CPU threads of each actor; a large model has work for more
    actor_nice: int = 0  # niceness of the actors, up to 19: on cores that they share, the learner goes first

    # tiny: a small Llama made on the spot, with characters as tokens, warm-started on solved problems; else what
    # transformers loads: a hub id, a folder, or a GGUF file, with its tokenizer and chat template
    model: str = "tiny"
    warm_start_batches: int = 1000  # supervised batches of 128 solved problems that the tiny model begins with, at most
    # the warm start stops as soon as the tiny model solves this share of the last 1024 problems before it has learnt
    # from them, so that there is more to learn
    warm_start_accuracy: float = 0.5
    # a task of reasoning-gym, scored by its own verifier, or gsm8k, which needs the package datasets. Some verifiers
    # evaluate completions as code, of which only plain expressions are let through: no sandbox
    task: str = "chain_sum"
    task_config: str = ""  # the task's options, as JSON; chain_sum has two or three one-digit terms if it says no other
    system_prompt: str = ""  # the system message, for models whose chat template has one
    max_prompt_tokens: int = 256  # the longest prompt that a slot can hold; longer training problems are passed over
    max_new_tokens: int = 6  # where a completion is cut
    temperature: float = 1.0  # the sampling temperature: the policy is what is sampled from, in actors and learner
    top_k: int = 0  # sample from the k most likely tokens only; 0: from all

    total_batches: int = 500  # batches to train on
    eval_interval: int = 50  # batches from one evaluation to the next
    eval_size: int = 400  # held-out problems, answered greedily; no training problem has the same question

    track: bool = False  # if toggled, curves, flags and code go to Weights & Biases, too: pip install wandb
    wandb_project_name: str = "vaco"  # the project there
    wandb_entity: str | None = None  # the user or team there; None: your default
    save_model: bool = False  # if toggled, the run ends by saving runs/{run}/model, as transformers does, and its flags
    # train nothing, answer the held-out problems with a saved model, the model of a run's folder, or whatever --model
    # takes: with the most likely completions, then with sampled ones. The flags saved with it hold, but for those typed
    evaluate: str = ""

    checkpoint_interval: int = 0  # batches between checkpoints; 0: only at the end, and at Ctrl-C or SIGTERM
    # go on from a checkpoint: a run's folder, or a file. Its flags hold; total_batches, num_actors and those on how the
    # machine is used may be given anew
    resume: str = ""
    actor_timeout: float = 600.0  # seconds after which an actor that sends nothing counts as stuck
    max_actor_restarts: int = 10  # actors that died, failed or got stuck are started again, this often in total
    # under torchrun: seconds after which a learner that does not answer ends the run; warm start, evaluation and
    # replacing actors take long, too
    learner_timeout: float = 1800.0

    # Actors decide how old the data is when it arrives (backward lag)

    num_actors: int = 1  # generating processes (per learner); data is about num_actors / rollouts_per_batch batches old
    prompts_per_rollout: int = 64  # problems per rollout
    group_size: int = 4  # completions per problem, whose rewards are compared with one another
    rollouts_per_batch: int = 1  # rollouts per batch, of prompts_per_rollout * group_size completions each
    # async: free running; fixed: lockstep, every batch is exactly `lag` versions old; mixture: lockstep, the version of
    # each rollout is drawn uniformly from the last `lag + 1`
    lag_schedule: Literal["async", "fixed", "mixture"] = "async"
    lag: int = 0  # policy lag of the lockstep schedules, in versions; there is one version per batch

    # The number of updates decides how far the policy moves on one batch (forward lag)

    update_epochs: int = 1  # passes over each batch
    num_minibatches: int = 2  # minibatches, that is gradient steps, per pass
    learning_rate: float = 1.5e-4  # the learning rate of Adam
    warmup_batches: int = 10  # batches in which the learning rate rises: Adam's first steps are large and blind
    anneal_lr: bool = True  # if toggled, the learning rate falls linearly to 0 over total_batches
    kl_coef: float = 0.0  # coefficient of the KL divergence to the model before training, per token
    max_grad_norm: float = 1.0  # the largest norm of a gradient

    objective: Literal["vaco", "grpo"] = "vaco"  # what holds the policy back: the filter, or clipped ratios
    # vaco: if toggled, gradients that raise the total variation are dropped while it is over budget
    filter: bool = True
    # vaco: the budget on the total variation of a token, 1/2 mean |pi - anchor|/beta: THE 1/2 IS INCLUDED
    tv_threshold: float = 0.005
    # vaco: where the total variation is measured from: learner, the policy at the batch's arrival (forward lag alone),
    # or behavior, the policy that generated (backward and forward lag; of the budgets tried 0.1 did best there)
    tv_anchor: Literal["behavior", "learner"] = "learner"
    clip_coef: float = 0.2  # grpo: ratios are clipped to 1 - clip_coef .. 1 + clip_coef


class Problems:
    """The problems of a task: `test`, a list of entries for evaluation, and endlessly many for training, by number.

    An entry is a dict with `question` and `answer`. A procedural task makes its problems from seeds, which are disjoint
    for training and test, and for all `--seed`s below 1024. Besides, a quarter of all questions, by their checksums, is
    held out: none of it is trained on, and the test problems, the same for all seeds, are of it, each once. Raises
    UsageError for a task that is not there.
    """

    def __init__(self, args):
        self.args = args
        if args.task == "gsm8k":
            self.train, self.test = load_gsm8k(args)
            self.held_out = {entry["question"] for entry in self.test}.__contains__
            self.verify = lambda answer, entry: as_number(answer) == as_number(entry["answer"])
        else:
            self.train = make_problems(args, args.seed % 1024 * NUM_PROBLEMS)
            self.held_out = lambda question: zlib.crc32(question.encode()) % 4 == 0
            self.verify = self.train.score_answer

    @cached_property
    def test(self):
        """`--eval-size` problems, or fewer, if the task does not have so many."""
        entries, found = make_problems(self.args, 1024 * NUM_PROBLEMS), {}
        for number in range(min(16 * self.args.eval_size, len(entries))):
            if self.held_out((entry := entries[number])["question"]):  # made anew at each access
                found.setdefault(entry["question"], entry)
            if len(found) == self.args.eval_size:
                break
        check(self.args, "task", found, "has so few questions that none can be held out")
        return list(found.values())

    def __getitem__(self, number):
        return self.find(number)

    def find(self, number, fits=lambda question: True):
        """A training problem, by its number from 0 on; another one in place of what is held out, or does not fit."""
        for _ in range(1000):
            question = (entry := self.train[number % len(self.train)])["question"]
            if not self.held_out(question) and fits(question):
                return entry
            number += 7919
        check(self.args, "task", False, "has so few questions that all are held out, or too long")

    def score(self, text, entry):
        """What the task's verifier gives a completion, 0 to 1: for what stands in its last <answer> </answer>, if it
        has that; else for its last number, if the answer is a number; else for all of it. Numbers are right or wrong:
        the library would pay for right digits in a wrong number. What a verifier must not evaluate, or cannot judge in
        5 seconds of CPU time, gets 0."""
        answer, expected = reasoning_gym.utils.extract_answer(text), entry["answer"] or ""
        number = re.fullmatch(r"-?(0|[1-9]\d*|[1-9]\d{0,2}(,\d{3})+)(\.\d+)?", expected)
        if answer is None:
            answer = last_number(text) if number else text.strip()
        if number and as_number(answer) == as_number(expected):
            return 1.0
        if self.args.task in EVALUATING:
            return verify_apart(self.verify, answer, entry) if is_plain(answer) else 0.0
        try:
            with time_limit(5):
                score = float(self.verify(answer, entry))
        except (Exception, TimeIsUp):  # not every verifier takes whatever a model may say
            return 0.0
        return float(score >= 1) if number else score


def last_number(text):
    """The last number of a text, without thousands separators, "" if there is none: "#### 1,250" -> "1250". What an
    expression ends with is none, because it is not its value: "15/5" -> ""."""
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text.replace("\N{MINUS SIGN}", "-"))
    numbers = re.findall(
        r"((?<=[\d)])[ \t]*[-+*/^][ \t]*)?(-?[ \t]?(?:\d+(?:\.\d+)?|(?<![\w.])\.\d+)(?:[eE]-?\d+)?)", text
    )
    operator, number = numbers[-1] if numbers else ("", "")
    return "" if operator else re.sub(r"\s|\.0$", "", number)


def as_number(text):
    """The value of what `last_number` finds: "$18.00" is 18. None if there is none."""
    number = last_number(text)
    return Decimal(number) if number else None


class Agent(nn.Module):
    """A causal language model and its tokenizer as a policy: it samples completions, and gives their log-probabilities,
    both at the same temperature and with the same truncation. A completion ends with a stop token, or is cut."""

    def __init__(self, config, generation_config, tokenizer, args):
        super().__init__()
        self.model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        self.model.generation_config = generation_config
        self.tokenizer, self.args = tokenizer, args
        self.eval()  # no dropout: it would pass for policy lag

    def encode(self, questions):
        """Questions to token ids in the model's chat format, padded on the left: ids and mask (bool) [n, P]."""
        system = [{"role": "system", "content": self.args.system_prompt}] if self.args.system_prompt else []
        chats = [[*system, {"role": "user", "content": question}] for question in questions]
        settings = {"add_generation_prompt": True, "padding": True, "return_dict": True, "return_tensors": "pt"}
        encoded = self.tokenizer.apply_chat_template(chats, **settings)
        return encoded["input_ids"], encoded["attention_mask"].bool()

    def fits(self, question):
        """Whether a slot can hold the prompt."""
        return self.encode([question])[0].shape[1] <= self.args.max_prompt_tokens

    def decode(self, tokens, mask):
        """The texts of completions [S, L], without special tokens."""
        rows = [row[valid].tolist() for row, valid in zip(tokens, mask, strict=True)]
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True)

    @torch.no_grad()
    def generate(self, prompts, prompt_mask, sample=True):
        """Sample a completion of each prompt [S, P] with torch's global generator, or take the most likely tokens.
        Returns tokens, their log-probabilities if sampled, and mask (true up to the stop token, included), [S, L]."""
        settings = {"do_sample": sample, "max_new_tokens": self.args.max_new_tokens}
        settings |= {"temperature": self.args.temperature, "top_k": self.args.top_k} if sample else {}
        settings |= {"return_dict_in_generate": True, "output_scores": sample}
        output = self.model.generate(prompts, attention_mask=prompt_mask.long(), **settings)
        tokens = output.sequences[:, prompts.shape[1] :]
        stops = torch.isin(tokens, torch.tensor(self.model.generation_config.eos_token_id, device=tokens.device)).int()
        mask = stops.cumsum(1) == stops
        if not sample:
            return tokens, None, mask
        scores = zip(output.scores, tokens.split(1, dim=1), strict=True)  # [S, vocabulary], [S, 1]; token by token
        logprobs = torch.cat([score.float().log_softmax(-1).gather(1, token) for score, token in scores], 1)
        return tokens, logprobs.masked_fill(~mask, 0), mask

    def evaluate(self, prompts, prompt_mask, tokens, mask, with_entropies=True):
        """Log-probabilities of completions, and entropies of what each token was drawn from, or None, [M, L]; both mean
        nothing outside the mask."""
        attention = torch.cat([prompt_mask, mask], 1).long()  # [M, P + L]
        positions = (attention.cumsum(1) - 1).clamp(min=0)
        inputs = {"input_ids": torch.cat([prompts, tokens], 1), "attention_mask": attention, "position_ids": positions}
        # The token at t is predicted by the logits at t - 1
        logits = self.model(**inputs, use_cache=False, logits_to_keep=tokens.shape[1] + 1).logits[:, :-1]
        logits = logits.float() / self.args.temperature  # [M, L, vocabulary]
        if 0 < self.args.top_k < logits.shape[-1]:
            logits = logits.masked_fill(logits < logits.topk(self.args.top_k).values[..., -1:], -math.inf)
        logprobs = logits.log_softmax(-1)
        entropies = torch.special.entr(logprobs.detach().exp()).sum(-1) if with_entropies else None
        return logprobs.gather(2, tokens.unsqueeze(2)).squeeze(2), entropies

    @torch.no_grad()
    def get_logprobs(self, num_parts, *rows):
        """Log-probabilities [M, L] as of `evaluate`, without gradient, and in parts, because logits are large."""
        parts = zip(*(row.tensor_split(num_parts) for row in rows), strict=True)
        return torch.cat([self.evaluate(*part, with_entropies=False)[0] for part in parts])


def warm_start(args, agent, problems):
    """Train the tiny model on solved problems, so that reinforcement has something to improve, and stop early. The
    result is kept in runs/warm_starts, for runs with the same seed and task."""
    settings = (args.seed, args.task, task_options(args), args.system_prompt, args.warm_start_batches)
    settings += (args.warm_start_accuracy, agent.model.config.to_dict(), agent.tokenizer.chat_template, NUM_PROBLEMS)
    settings += tuple(map(inspect.getsource, (warm_start, Problems, make_problems, tiny_model)))
    settings += (torch.__version__, transformers.__version__, reasoning_gym.__version__)
    digest = hashlib.sha256(repr(settings).encode()).hexdigest()[:16]
    path = f"runs/warm_starts/{digest}.pt"
    if os.path.exists(path):
        agent.load_state_dict(torch.load(path, weights_only=True))
        print(f"warm start: {path}", flush=True)
        return
    print("warm start: a few minutes of supervised learning", flush=True)
    optimizer = torch.optim.AdamW(agent.parameters(), lr=1e-3, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.02, total_iters=50)
    solved = deque(maxlen=8)
    for batch in tqdm(range(args.warm_start_batches), desc="warm start", unit="batch", disable=None):
        first = NUM_PROBLEMS // 2 + batch * 128  # reinforcement takes them from 0 on
        entries = [problems[number] for number in range(first, first + 128)]
        prompts, prompt_mask = agent.encode([entry["question"] for entry in entries])
        ends = [entry["answer"] + agent.tokenizer.eos_token for entry in entries]
        settings = {"add_special_tokens": False, "padding": True, "padding_side": "right", "return_tensors": "pt"}
        answers = agent.tokenizer(ends, **settings)
        ids = torch.cat([prompts, answers.input_ids], 1)
        attention = torch.cat([prompt_mask, answers.attention_mask], 1)
        labels = ids.masked_fill(attention == 0, -100)
        labels[:, : prompts.shape[1]] = -100
        output = agent.model(input_ids=ids, attention_mask=attention, labels=labels)
        right = output.logits[:, :-1].argmax(-1) == labels[:, 1:]
        solved.append((right | (labels[:, 1:] < 0)).all(1).float().mean().item())
        if np.mean(solved) >= args.warm_start_accuracy:
            break
        optimizer.zero_grad()
        output.loss.backward()
        nn.utils.clip_grad_norm_(agent.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    else:
        batch = args.warm_start_batches
    os.makedirs("runs/warm_starts", exist_ok=True)
    torch.save(agent.state_dict(), f"{path}.{os.getpid()}")
    os.replace(f"{path}.{os.getpid()}", path)  # other runs may make the same one at this moment
    print(f"warm start: solved {np.mean(solved):.1%} after {batch} batches, kept as {path}", flush=True)


def accuracy(agent, problems, device, sample=False):
    """Share of the test problems that the most likely completion, or a sampled one, solves."""
    right = 0
    for first in range(0, len(problems.test), 64):
        entries = problems.test[first : first + 64]
        prompts, prompt_mask = agent.encode([entry["question"] for entry in entries])
        tokens, _, mask = agent.generate(prompts.to(device), prompt_mask.to(device), sample)
        right += sum(score >= 1 for score in map(problems.score, agent.decode(tokens, mask), entries))
    return right / len(problems.test)


def tv_filter(ratios, advantages, tv_threshold, anchor_ratios=None, mean=torch.mean):
    """Filter: drop the gradients that raise the total variation, once it is over budget (VACO, arXiv 2603.01365).

        D      = 1/2 mean_i |r_i - anchor_i|     estimates TV(pi, anchor policy): TV = 1/2 E_beta |pi/beta - 1|
        keep_i = 1                               if D <= tv_threshold
                 1[A_i (r_i - anchor_i) <= 0]    otherwise

    The sign: grad r A = r A grad log pi, and grad 1/2 |r - anchor| = 1/2 sign(r - anchor) r grad log pi, so ascent on
    the surrogate r A of a sample raises its share of D exactly if A (r - anchor) > 0.

    Takes valid rows only: ratios pi/beta [M] without gradient; advantages [M] as the loss uses them, since normalising
    changes signs; the budget on D, the 1/2 included; anchor_ratios pi_T/beta [M], to measure from the learner's policy
    pi_T, where None is 1, the behaviour policy; mean, how to average over a minibatch that several learners share.
    Returns keep [M], boolean, and tv, the scalar tensor D.
    """
    moved = ratios - (1 if anchor_ratios is None else anchor_ratios)
    tv = 0.5 * mean(moved.abs())
    return (tv <= tv_threshold) | (advantages * moved <= 0), tv


def vaco_loss(ratios, advantages, keep):
    """-1/M sum_i keep_i r_i A_i over [M] samples. Dropped ones count in M, so they shorten the step (2603.01365)."""
    return -torch.where(keep, ratios * advantages, 0).mean()


def clip_loss(ratios, advantages, clip_coef):
    """PPO-clip, arXiv 1707.06347, eq. 7: mean of max(-r A, -clip(r, 1 - eps, 1 + eps) A) over [M] samples."""
    return torch.max(-ratios * advantages, -ratios.clamp(1 - clip_coef, 1 + clip_coef) * advantages).mean()


def group_advantages(rewards, group_size):
    """GRPO (arXiv 2402.03300, section 4.1.2): rewards [S], group after group -> advantages (r - mean) / (std + 1e-6)
    [S], and the share of groups whose rewards do not vary: their advantages are 0."""
    groups = rewards.view(-1, group_size)
    same = (groups == groups[:, :1]).all(1, keepdim=True)
    advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, correction=0, keepdim=True) + 1e-6)
    return advantages.masked_fill(same, 0).flatten(), same.float().mean().item()


def llm_minibatch(
    agent, args, share, prompts, prompt_mask, tokens, mask, behavior_logprobs, learner_logprobs, advantages,
    reference_logprobs=None,
):  # fmt: skip
    """Forward pass of one gradient step: M completions of a batch, which have the `share` of this learner in the tokens
    of the minibatch of all (1 if it is alone) -> loss (scalar), {what is logged: scalar tensor}. All means are over
    tokens within the mask."""
    newlogprobs, entropies = agent.evaluate(prompts, prompt_mask, tokens, mask)  # [M, L]
    newlogprobs = newlogprobs[mask]  # [K], as all that follows
    behavior_logprobs = behavior_logprobs[mask]
    log_ratios = log_ratio(newlogprobs, behavior_logprobs)
    ratios = log_ratios.exp()  # pi/beta
    advantages = advantages.unsqueeze(1).expand_as(mask)[mask]
    mean = partial(global_mean, share)  # over the minibatch of all learners
    learner_ratios = log_ratio(learner_logprobs[mask], behavior_logprobs).exp()
    anchor_ratios = learner_ratios if args.tv_anchor == "learner" else None
    keep, tv = tv_filter(ratios.detach(), advantages, args.tv_threshold, anchor_ratios, mean)
    if args.objective == "vaco":
        keep = keep | (not args.filter)
        policy_loss = vaco_loss(ratios, advantages, keep)
    else:
        policy_loss = clip_loss(ratios, advantages, args.clip_coef)
        keep = (advantages * (ratios - 1) <= 0) | ((ratios - 1).abs() <= args.clip_coef)
    with torch.no_grad():
        logs = {
            "losses/policy_loss": policy_loss.detach(),
            "losses/entropy": entropies[mask].mean(),
            "losses/old_approx_kl": -log_ratios.mean(),
            "losses/approx_kl": (ratios - 1 - log_ratios).mean(),  # joschu.net/blog/kl-approx.html
            "filter/gate_open": (tv > args.tv_threshold).float(),
            "filter/dropped": 1 - keep.float().mean(),
        }
    if reference_logprobs is None:
        return policy_loss, logs
    # Where `--top-k` excludes a token, from the policy, the reference or both, KL is infinite or undefined: left out
    reference_logprobs = reference_logprobs[mask]
    shared = torch.isfinite(newlogprobs) & torch.isfinite(reference_logprobs)
    to_reference = log_ratio(*(torch.where(shared, x, 0) for x in (reference_logprobs, newlogprobs)))
    # The same estimator, of KL(pi, reference), but on tokens that beta drew
    reference_kl = (to_reference.exp() - 1 - to_reference).mean()
    return policy_loss + args.kl_coef * reference_kl, logs | {"losses/reference_kl": reference_kl.detach()}


def log_ratio(logprobs, behavior_logprobs):
    """log pi/beta. With `--top-k`, pi may exclude a token that beta drew: its ratio, 0, has a finite log here."""
    return (logprobs - behavior_logprobs).clamp(-20, 20)


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


class Completions:
    """Preallocated slots for rollouts of S completions, in shared memory: prompts end, and completions begin, at the
    border between the two. `rollout` is the number of the rollout that a slot is for: problems and sampling noise
    follow from it."""

    def __init__(self, args, num_slots):
        S, P, L = args.prompts_per_rollout * args.group_size, args.max_prompt_tokens, args.max_new_tokens
        self.prompts, self.tokens = torch.zeros(num_slots, S, P).long(), torch.zeros(num_slots, S, L).long()
        self.prompt_mask, self.mask = self.prompts.bool(), self.tokens.bool()
        self.logprobs, self.rewards = torch.zeros(num_slots, S, L), torch.zeros(num_slots, S)
        self.version, self.rollout = torch.zeros(num_slots).long(), torch.zeros(num_slots).long()
        for tensor in vars(self).values():
            tensor.share_memory_()

    def batch(self, slots, device):
        """Copy slots to the device as one batch [S * len(slots), ...], without columns that are padding alone."""
        batch = {name: tensor[slots].flatten(0, 1) for name, tensor in vars(self).items() if tensor.ndim > 1}
        prompt_columns, columns = batch["prompt_mask"].any(0), batch["mask"].any(0)
        for name, tensor in batch.items():
            if tensor.ndim > 1:
                tensor = tensor[:, prompt_columns if name.startswith("prompt") else columns]
            batch[name] = tensor.to(device)
        return SimpleNamespace(**batch)


def generation_actor(args, index, generation, pause, make_agent, make_problems, store, completions, learner):
    """An actor process: after a pause, for every ticket, load one policy version and fill one slot with it.

    Through the connection `learner`, tickets (slot, version) come in. Out go None once ready, for every ticket (slot,
    seconds waited, seconds taken), and a traceback if anything fails. An actor that takes the place of another, as of
    `generation` 1, does the same as it would have done.
    """
    torch.set_num_threads(args.actor_threads)
    os.nice(args.actor_nice)
    leave_with_parent()
    time.sleep(pause)
    try:
        agent, problems = make_agent().to(device_of(args.actor_device)), make_problems()
        learner.send(None)
        while True:
            asked = time.perf_counter()
            slot, version = learner.recv()
            begun = time.perf_counter()
            completions.version[slot] = store.load(agent, version)
            collect_rollout(args, agent, problems, completions, slot)
            learner.send((slot, begun - asked, time.perf_counter() - begun))
    except (EOFError, ConnectionError):
        pass  # the learner is gone
    except Exception:
        learner.send(f"has failed:\n{traceback.format_exc()}")


actor = generation_actor  # what `Actors` starts


def collect_rollout(args, agent, problems, completions, slot):
    """Generate and score the completions of one slot. Problems and noise depend on seed and rollout number alone."""
    rollout = global_rollout(args, completions.rollout[slot].item())
    n, device = args.prompts_per_rollout, device_of(args.actor_device)
    torch.manual_seed(int(np.random.default_rng((args.seed, rollout, 1)).integers(2**63)))
    entries = [problems.find(number, agent.fits) for number in range(rollout * n, (rollout + 1) * n)]
    entries = [entry for entry in entries for _ in range(args.group_size)]
    prompts, prompt_mask = agent.encode([entry["question"] for entry in entries])
    tokens, logprobs, mask = agent.generate(prompts.to(device), prompt_mask.to(device))
    P, L = prompts.shape[1], tokens.shape[1]
    completions.prompt_mask[slot], completions.mask[slot] = False, False
    completions.prompts[slot, :, -P:], completions.prompt_mask[slot, :, -P:] = prompts, prompt_mask
    completions.tokens[slot, :, :L], completions.logprobs[slot, :, :L] = tokens, logprobs
    completions.mask[slot, :, :L] = mask
    completions.rewards[slot] = torch.tensor(list(map(problems.score, agent.decode(tokens, mask), entries)))


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
    """Train a model and return it, as an `Agent`: a whole run, from the flags (`Args`) to the summary line. Raises
    UsageError if the flags cannot work, RunError if it cannot go on, KeyboardInterrupt or SystemExit after SIGINT or
    SIGTERM."""
    validate(args)
    connect(args)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    torch.set_num_threads(args.learner_threads)
    device = device_of("cuda" if torch.cuda.is_available() and args.cuda else "cpu")

    problems = Problems(args)
    model, tokenizer = load_language_model(args, problems)
    make_agent = partial(Agent, model.config, model.generation_config, tokenizer, args)
    agent = make_agent()
    agent.model.load_state_dict(model.state_dict())
    del model
    check_lengths(args, agent, problems)
    # After all that may refuse the flags, which would leave an empty folder
    folder, resume, again = run_folder(args, args.task)
    if resume:
        folder, saved = load_checkpoint(resume)
        check_resumed_batches(args, saved, again)
    # Before what takes long, since it may fail, and before the writer, to which it listens
    tracked = start_tracking(args, folder) if args.track and RANK == 0 else None
    if args.model == "tiny" and (args.kl_coef or not resume) and RANK == 0:
        warm_start(args, agent, problems)
    same_start(agent, args.seed)
    agent.to(device)
    reference = copy.deepcopy(agent) if args.kl_coef else None
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, fused=True)
    store = PolicyStore(agent, num_versions=max(args.lag + 1, 2))
    store.publish(agent, 0)
    # As many slots as one batch needs, and at least one per actor: more would make data older, and nothing faster
    slots_per_actor = math.ceil(args.rollouts_per_batch / args.num_actors)
    num_slots = args.num_actors * slots_per_actor
    completions = Completions(args, num_slots)

    version, tokens_seen, accuracies, seconds = 0, 0, [], Counter()  # seconds: over the whole run
    trained = (agent, optimizer, store, ())
    if resume:
        restore(saved, *trained)
        version, tokens_seen, accuracies = saved["version"], saved["tokens_seen"], saved["accuracies"]
        seconds.update(saved["seconds"])
    done = version * args.rollouts_per_batch
    for rollout in range(done, done + num_slots):  # the next rollouts, as `Actors.issue` deals them out
        index, turn = rollout % args.num_actors, rollout // args.num_actors
        completions.rollout[index * slots_per_actor + turn % slots_per_actor] = rollout

    def save():
        counters = {"version": version, "tokens_seen": tokens_seen, "accuracies": accuracies}
        save_checkpoint(folder, args, *trained, **counters, seconds=dict(seconds))

    actors = Actors(args, slots_per_actor, version)
    if not resume:
        accuracies.append(accuracy(agent, problems, device))
    if RANK == 0:
        writer = SummaryWriter(folder, purge_step=version + 1 if resume else None)
        table = "\n".join(f"|{name}|{value}|" for name, value in vars(args).items())
        writer.add_custom_scalars(LAYOUT)
        writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}")
        if not resume:
            writer.add_scalar("charts/accuracy", accuracies[0], 0)
            print(
                f"accuracy before training: {accuracies[0]:.1%} of {len(problems.test)} held-out problems", flush=True
            )
    hidden = None if RANK == 0 else True  # None: where there is no terminal
    progress = tqdm(total=args.total_batches, initial=version, unit="batch", dynamic_ncols=True, disable=hidden)
    next_line = 0
    try:
        actors.start(make_agent, partial(Problems, args), store, completions)
        actors.issue(newest=version)
        batch_time = time.perf_counter()
        while version < args.total_batches:
            # COLLECT a batch, copy it, and let its slots be filled again while we train
            asked = time.perf_counter()
            collected = actors.collect(batch=version)
            if not all(gather(bool(collected))):  # learners end together, after the same batch
                break
            slots, waits, acts = map(list, zip(*collected, strict=True))
            learner_wait = time.perf_counter() - asked
            batch = completions.batch(slots, device)  # prompts [S, P], tokens [S, L], rewards [S], ...
            lags = (version - completions.version[slots]).tolist()  # [R]
            check_finite(f"in the data of batch {version}", vars(batch), folder)
            completions.rollout[slots] += num_slots
            actors.issue(newest=version, freed=slots)

            # ALIGN: advantages within groups, once per batch; without a critic there is no more to align
            advantages, without_variance = group_advantages(batch.rewards, args.group_size)  # [S]
            inputs, mask = (batch.prompts, batch.prompt_mask, batch.tokens, batch.mask), batch.mask
            learner_logprobs = agent.get_logprobs(args.num_minibatches, *inputs)  # [S, L], as all log-probabilities
            learner_ratios = log_ratio(learner_logprobs, batch.logprobs)[mask].exp()  # [K], pi_T/beta of all tokens
            rows = [*inputs, batch.logprobs, learner_logprobs, advantages]
            if reference:
                rows.append(reference.get_logprobs(args.num_minibatches, *inputs))

            # FILTER: minibatch updates of pi
            lr = args.learning_rate * (1 - version / args.total_batches if args.anneal_lr else 1)
            lr *= min((version + 1) / max(args.warmup_batches, 1), 1)
            optimizer.param_groups[0]["lr"] = lr
            samples = sum(gather(len(learner_ratios)))  # tokens of all learners
            share = len(learner_ratios) / samples
            updates, weights = [], []
            for _ in range(args.update_epochs):
                minibatches = torch.randperm(len(advantages)).to(device).tensor_split(args.num_minibatches)
                sizes = torch.stack([mask.index_select(0, mb).sum() for mb in minibatches])  # tokens, and
                shares = sizes / all_sum(sizes.clone())  # the share in those of all learners
                for mb, mb_share in zip(minibatches, shares, strict=True):
                    loss, update = llm_minibatch(agent, args, mb_share, *(row.index_select(0, mb) for row in rows))
                    optimizer.zero_grad()
                    loss.backward()
                    average_gradients(agent, mb_share)
                    update["losses/grad_norm"] = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                    optimizer.step()
                    updates.append(update)
                    weights.append(mb_share / share)  # 1 for a single learner

            # PUBLISH the next version
            weights, names = torch.stack(weights), updates[0]
            means = {n: (weights * torch.stack([update[n] for update in updates])).mean().item() for n in names}
            final_logprobs = agent.get_logprobs(args.num_minibatches, *inputs)
            final_ratios = log_ratio(final_logprobs, batch.logprobs)[mask].exp()  # [K], pi/beta
            check_finite(f"in the batch after version {version}", means | agent.state_dict(), folder)
            version += 1
            store.publish(agent, version)
            actors.issue(newest=version)
            tokens_seen += samples

            # LOG, against batches: means over all learners
            now = time.perf_counter()
            batch_seconds, batch_time = now - batch_time, now
            seconds.update(learner_wait=learner_wait, waits=sum(waits), actors=sum(waits + acts), total=batch_seconds)
            means |= {
                "lag/tv_backward": 0.5 * (learner_ratios - 1).abs().mean().item(),
                "lag/tv_forward": 0.5 * (final_ratios - learner_ratios).abs().mean().item(),
                "lag/tv_total": 0.5 * (final_ratios - 1).abs().mean().item(),
                "lag/ess": (learner_ratios.mean().square() / learner_ratios.square().mean()).item(),
                "stats/learner_wait": learner_wait / batch_seconds,
                "stats/actor_wait": sum(waits) / sum(waits + acts),
                "stats/rollout_time": sum(acts) / len(acts),
                "stats/update_time": batch_seconds - learner_wait,
                "stats/queue_size": len(actors.finished),
            }
            stops = torch.tensor(agent.model.generation_config.eos_token_id, device=device)
            of_completions = {
                "charts/reward": batch.rewards.mean().item(),
                "charts/cut": 1 - (torch.isin(batch.tokens, stops) & mask).any(1).float().mean().item(),
                "filter/groups_without_variance": without_variance,
            }
            scalars = global_means(share, means) | global_means(1 / WORLD_SIZE, of_completions)
            scalars["charts/learning_rate"] = lr
            scalars["charts/completion_length"] = samples / (len(mask) * WORLD_SIZE)
            scalars["charts/tokens_per_second"] = tokens_seen / seconds["total"]
            everyone = zip(*gather((lags, [actors.restarts])), strict=True)
            lags, restarts = (list(itertools.chain(*parts)) for parts in everyone)
            scalars["lag/versions_mean"], scalars["lag/versions_max"] = np.mean(lags), max(lags)
            scalars["stats/actor_restarts"] = sum(restarts)
            if version % args.eval_interval == 0 or version == args.total_batches:
                scalars["charts/accuracy"] = accuracy(agent, problems, device)
                accuracies.append(scalars["charts/accuracy"])
                shown = slice(0, 4 * args.group_size, args.group_size)
                questions = agent.decode(batch.prompts[shown], batch.prompt_mask[shown])
                answers, rewards = agent.decode(batch.tokens[shown], mask[shown]), batch.rewards[shown].tolist()
                lines = [f"|{q!r}|{a!r}|{r:.2f}|" for q, a, r in zip(questions, answers, rewards, strict=True)]
                if RANK == 0:
                    writer.add_text("samples", "\n".join(["|prompt|completion|reward|\n|-|-|-|", *lines]), version)
                batch_time = time.perf_counter()  # evaluation is no part of the next batch
            for name, value in scalars.items() if RANK == 0 else ():
                writer.add_scalar(name, value, version)
            status = f"accuracy {accuracies[-1]:.1%}, reward {scalars['charts/reward']:.3f}, lag {np.mean(lags):.1f}"
            moved = scalars["lag/tv_forward" if args.tv_anchor == "learner" else "lag/tv_total"]
            status += f", TV {moved:.4f}, dropped {scalars['filter/dropped']:.1%}"
            progress.set_postfix_str(status, refresh=False)
            progress.update()
            if progress.disable and RANK == 0 and now >= next_line and not actors.end:  # where there is no terminal
                print(f"batch {version}/{args.total_batches}, {status}", flush=True)
                next_line = now + 5
            if args.checkpoint_interval and version % args.checkpoint_interval == 0:
                save()
        save()
        if args.save_model and RANK == 0:
            agent.model.save_pretrained(f"{folder}/model")
            agent.tokenizer.save_pretrained(f"{folder}/model")
            with open(f"{folder}/model/{FLAGS_FILE}", "w") as file:
                json.dump(vars(args), file, indent=1)
    finally:
        actors.stop()
        progress.close()
        with contextlib.suppress(OSError):  # on a full disk, too, what ended the run is what to tell
            if RANK == 0:
                writer.close()
    if version < args.total_batches:
        if RANK == 0:
            tell(f"stopped at batch {version}; --resume {folder} goes on from there")
        raise actors.end or RunError(f"another learner has ended the run, at batch {version}")
    summary = (
        f"{args.task}, seed {args.seed}: accuracy {accuracies[0]:.1%} -> {accuracies[-1]:.1%} of {len(problems.test)} "
        f"held-out problems; {version} batches, {tokens_seen} tokens in {seconds['total']:.1f} s; learner waited "
        f"{seconds['learner_wait'] / seconds['total']:.1%} of the time, actors "
        f"{seconds['waits'] / seconds['actors']:.1%}; logs in {folder}"
    )
    if RANK == 0:
        print(summary)
    if dist.is_initialized():
        dist.destroy_process_group()
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
    "model": "model and task",
    "total_batches": "length and evaluation",
    "track": "tracking and evaluation",
    "checkpoint_interval": "checkpoints and faults",
    "num_actors": "actors: how old data is when it arrives (backward lag)",
    "update_epochs": "learner: how far the policy moves on one batch (forward lag)",
    "objective": "objective: gradients filtered, or ratios clipped",
}

# What stands side by side under "Custom scalars" in TensorBoard
LAYOUT = {
    "policy lag": {
        "accuracy": ["Multiline", ["charts/accuracy", "charts/reward"]],
        "lag in versions": ["Multiline", ["lag/versions_mean", "lag/versions_max"]],
        "total variation": ["Multiline", ["lag/tv_backward", "lag/tv_forward", "lag/tv_total"]],
        "filter": ["Multiline", ["filter/gate_open", "filter/dropped"]],
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
    """Check all flags and packages, before any process starts. Raises UsageError."""
    lowest = dict.fromkeys(("learner_threads", "max_prompt_tokens", "max_new_tokens", "eval_interval", "eval_size"), 1)
    lowest |= dict.fromkeys(("num_actors", "prompts_per_rollout", "rollouts_per_batch", "num_minibatches"), 1)
    lowest |= {"update_epochs": 1, "group_size": 2, "temperature": 1e-3, "max_grad_norm": 1e-9, "actor_timeout": 1}
    lowest |= {"total_batches": 1, "learner_timeout": 1, "warm_start_batches": 1, "actor_threads": 1}
    highest = {"seed": 2**31 - 1, "actor_nice": 19, "num_actors": 256, "lag": 10_000, "eval_size": 10_000}
    highest |= {"actor_threads": 1024, "learner_threads": 1024}
    highest |= {"prompts_per_rollout": 4096, "group_size": 1024, "rollouts_per_batch": 1024}
    highest |= {"max_prompt_tokens": 2**17, "max_new_tokens": 2**17, "warm_start_accuracy": 1}
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
    advice = "an evaluation neither goes on with a run nor makes one: leave out --resume, --track and --save-model"
    check(args, "evaluate", not args.evaluate or not (args.resume or args.track or args.save_model), advice)
    check(args, "task_config", not (args.task_config and args.task == "gsm8k"), "gsm8k has no options; leave it out")
    tickets = math.ceil(args.rollouts_per_batch / args.num_actors)  # at once, which must fit into a pipe
    check(args, "num_actors", tickets <= 128, f"type --num-actors {math.ceil(args.rollouts_per_batch / 128)} or more")
    completions = args.rollouts_per_batch * args.prompts_per_rollout * args.group_size
    advice = f"more than the {completions} completions of a batch"
    check(args, "num_minibatches", args.num_minibatches <= completions, advice)
    no_gpu = args.actor_device == "cuda" and not torch.cuda.is_available()
    check(args, "actor_device", not no_gpu, "there is no GPU that torch can use; type --actor-device cpu")
    needed = {"transformers": "model", "reasoning_gym": "task"}
    needed |= {"gguf": "model"} if args.model.endswith(".gguf") else {}
    needed |= {"datasets": "task"} if args.task == "gsm8k" else {}
    needed |= {"wandb": "track"} if args.track else {}
    for package, name in needed.items():
        pip_name = package.replace("_", "-")
        try:
            importlib.import_module(package)
        except ImportError:
            listed = "" if package in ("datasets", "wandb") else ", or pip install -r requirements-llm.txt"
            check(args, name, False, f"needs the package {pip_name}; type pip install {pip_name}{listed}")


def task_options(args):
    """The options of a procedural task, {name: value}: those of the flag, over this script's own for some tasks."""
    own = {
        "chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1},
        "acre": {"size": 20000},  # which makes all at once, and that takes long
        "word_ladder": {"size": 20000},  # which takes no more
    }
    return {"size": NUM_PROBLEMS} | own.get(args.task, {}) | json.loads(args.task_config or "{}")


def check_lengths(args, agent, problems):
    """Raise UsageError if held-out problems, or the first ones for training, have prompts, or, for the tiny model,
    answers that the flags leave no room for, or if the model itself has too little."""
    entries = [*problems.test, *(problems[number] for number in range(256))]
    try:
        longest = agent.encode([entry["question"] for entry in entries])[0].shape[1]
    except Exception as error:  # raised by the template's own code
        check(args, "model", False, f"its chat template takes no such messages: {one_line(error)}")
    check(args, "max_prompt_tokens", longest <= args.max_prompt_tokens, f"a prompt has {longest}; type that, or more")
    room = getattr(agent.model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    advice = f"with --max-prompt-tokens {args.max_prompt_tokens}, more than the {room} tokens that the model takes"
    check(args, "max_new_tokens", args.max_prompt_tokens + args.max_new_tokens <= room, advice)
    if args.model == "tiny":
        written = all(isinstance(entry["answer"], str) for entry in entries)
        check(args, "task", written, "has no written answers that a tiny model could begin with; type --model")
        longest = max(len(agent.tokenizer(entry["answer"]).input_ids) for entry in entries)
        advice = f"an answer has {longest}, the end included; type that, or more"
        check(args, "max_new_tokens", longest <= args.max_new_tokens, advice)


def device_of(name):
    """The device that `cpu` or `cuda` means for this learner and its actors."""
    return torch.device(f"cuda:{LOCAL_RANK}" if name == "cuda" else name)


def one_line(error):
    """An error's name and the first line of its message."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def tiny_model(problems):
    """A Llama of 0.7M parameters and its tokenizer: one token for every character (every byte, if it is not ASCII), and
    one for the words that all questions begin with, which say nothing."""
    tokenizer = transformers.ByT5Tokenizer(extra_ids=0)
    questions = zip(*(problems[number]["question"] for number in range(256)), strict=False)  # character by character
    start = "".join(same[0] for same in itertools.takewhile(lambda place: len(set(place)) == 1, questions))
    start = start.rpartition(" ")[0]
    tokenizer.add_tokens([start] if start else [])
    settings = {"vocab_size": len(tokenizer), "max_position_embeddings": 1024, "tie_word_embeddings": True}
    settings |= {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    settings |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)), tokenizer


def load_language_model(args, problems):
    """The model of the flags, in float32, and its tokenizer. Raises UsageError if transformers cannot load it."""
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # without a network it would warn at every attempt
    flag = "evaluate" if args.evaluate == args.model else "model"  # that named it
    source = {"pretrained_model_name_or_path": args.model}
    if args.model.endswith(".gguf"):
        check(args, flag, os.path.isfile(args.model), "there is no such file")
        folder, file = os.path.split(os.path.abspath(args.model))
        source = {"pretrained_model_name_or_path": folder, "gguf_file": file}
    elif os.path.isdir(args.model) and args.model != "tiny":
        there = os.path.isfile(f"{args.model}/model/config.json")
        advice = (
            f"has no config.json; type {args.model}/model" if there else "has no config.json: --save-model makes one"
        )
        check(args, flag, os.path.isfile(f"{args.model}/config.json"), advice)
    else:
        is_path = args.model.startswith(("/", ".", "~", "runs/")) or args.model.count("/") > 1  # a hub id has one /
        check(args, flag, not is_path, "there is no such folder")
    try:
        if args.model == "tiny":
            model, tokenizer = tiny_model(problems)
        else:
            model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
            tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    except Exception as error:  # many kinds: no such folder or id, no network, a broken file, a missing package
        check(args, flag, False, f"neither tiny nor what transformers can load: {one_line(error)}")
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or tokenizer.eos_token
    # The format of a base model, which has none
    plain = "{{ bos_token }}{% for message in messages %}{{ message['content'] + '\n' }}{% endfor %}"
    tokenizer.chat_template = tokenizer.chat_template or plain
    stops = {*np.atleast_1d(model.generation_config.eos_token_id).tolist(), tokenizer.eos_token_id} - {None}
    check(args, flag, stops and tokenizer.pad_token, "its tokenizer has no end-of-text token, or nothing to pad with")
    settings = {"eos_token_id": sorted(stops), "pad_token_id": tokenizer.pad_token_id}
    model.generation_config = transformers.GenerationConfig(**settings)  # and none of its own rules for sampling
    return model, tokenizer


def make_problems(args, seed):
    """The problems of a procedural task. Raises UsageError."""
    names = reasoning_gym.factory.DATASETS
    close = ", ".join(difflib.get_close_matches(args.task, names, n=3, cutoff=0))
    check(args, "task", args.task in names, f"no task of reasoning-gym, and not gsm8k; closest: {close}")
    try:
        return reasoning_gym.create_dataset(args.task, seed=seed, **task_options(args))
    except Exception as error:  # no JSON, an option that is not there, a value that the task refuses
        check(args, "task_config" if args.task_config else "task", False, f"cannot make problems: {one_line(error)}")


class TimeIsUp(BaseException):
    """In no `except Exception` of a verifier's."""


@contextlib.contextmanager
def time_limit(seconds):
    """Raise TimeIsUp in what takes more CPU time: the load of the machine changes nothing. Python allows it in the main
    thread only."""

    def stop(*_):
        raise TimeIsUp(f"more than {seconds} s of CPU time")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 0.1)  # again, if it is caught in spite of all
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def is_plain(text):
    """Whether a text is safe to evaluate: a list of words and numbers, or an expression that calls FUNCTIONS alone and
    has no strings, which functions of sympy would evaluate, no attributes, and nothing to index."""
    if re.fullmatch(r"[\w\s,.'\"\[\]-]*", text) and not re.search(r"\.\s*[^\W\d]", text):
        return True
    expression = re.fullmatch(r"[\w\s,.()+*/^-]*", text) and not re.search(r"__|\.\s*[^\W\d]", text)
    return bool(expression and {*re.findall(r"(\w+|\))\s*\(", text)} <= FUNCTIONS)


def verify_apart(verify, answer, entry, seconds=5, gigabytes=1.0):
    """What a verifier that evaluates answers gives one, in a copy of this process, which the system ends after as much
    CPU time, and which gets no more than as much new memory: 0 if it fails. Some answers are short and endless."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
            with contextlib.suppress(OSError):  # in other systems than Linux memory has no such limit
                data = re.search(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())
                limit = int(data[1]) * 2**10 + int(gigabytes * 2**30)
                resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
            os.write(write, str(float(verify(answer, entry))).encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read) as pipe:
        score = pipe.read()
    os.waitpid(child, 0)
    return float(score or 0)


def load_gsm8k(args):
    """Training and test problems of grade school math, arXiv 2110.14168. Raises UsageError if they are not there."""
    import datasets

    splits = []
    try:
        for split in ("train", "test"):
            rows = datasets.load_dataset("openai/gsm8k", "main", split=split)
            splits.append([{"question": row["question"], "answer": last_number(row["answer"])} for row in rows])
    except Exception as error:
        check(args, "task", False, f"its data is not there, and cannot be loaded: {one_line(error)}")
    np.random.default_rng(args.seed).shuffle(splits[0])
    return splits[0], splits[1][: args.eval_size]


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


def average_gradients(agent, share):
    """Replace the gradients of a minibatch's mean loss by their mean over all learners: one flat all-reduce."""
    if WORLD_SIZE > 1:
        gradients = [parameter.grad for parameter in agent.parameters()]
        flat = all_sum(share * torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


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


def check_resumed_batches(args, state, again=False):
    """Raise UsageError if a run cannot go on with these flags: those that are not on the use of the machine must be the
    checkpoint's."""
    if not again:  # torchrun starts complete runs again, too, if a learner dies at the very end
        advice = f"the checkpoint is at batch {state['version']}; type a larger number"
        check(args, "total_batches", args.total_batches > state["version"], advice)
    free = {"total_batches", "num_actors", "checkpoint_interval", "resume", "actor_timeout", "max_actor_restarts"}
    free |= {"cuda", "torch_deterministic", "actor_nice", "actor_device", "actor_threads", "learner_threads"}
    free |= {"save_model", "learner_timeout", "track", "wandb_project_name", "wandb_entity"}
    for name, before in vars(state["args"]).items():
        advice = f"the checkpoint's is {before}; leave the flag out, or start a new run"
        check(args, name, name in free or getattr(args, name) == before, advice)


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


def is_run(path):
    """Whether a path is a run's folder or its checkpoint, and not a model."""
    return path.endswith(".pt") or os.path.isfile(os.path.join(path, "checkpoint.pt"))


def saved_flags(path):
    """The flags that a model was saved with, or the defaults; those that say how the run was made have their defaults
    always. Raises UsageError."""
    other = ("resume", "evaluate", "track", "save_model", "actor_device")
    if is_run(path):
        defaults = {name: value for name, value in vars(Args()).items() if name in other}
        return replace(read_file(path, "evaluate", "agent")[1]["args"], **defaults)
    file = os.path.join(path, FLAGS_FILE)
    try:
        with open(file) if os.path.exists(file) else io.StringIO("{}") as text:
            flags = json.load(text)
            return Args(**{name: value for name, value in flags.items() if name not in other})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UsageError(f"--evaluate {path}: {FLAGS_FILE} cannot be read ({one_line(error)})") from None


def evaluate_model(args):
    """Answer the held-out problems with the model `args.evaluate`: the most likely completions, then sampled ones.
    Prints and returns {"greedy": share solved, "sampled": share solved}. Raises UsageError."""
    check(args, "evaluate", args.evaluate != "tiny", "untrained; type the folder of a saved model")
    state = read_file(args.evaluate, "evaluate", "agent")[1] if is_run(args.evaluate) else None
    args = args if state else replace(args, model=args.evaluate)
    validate(args)
    torch.set_num_threads(args.learner_threads)
    torch.manual_seed(args.seed)
    device = device_of("cuda" if torch.cuda.is_available() and args.cuda else "cpu")
    problems, results = Problems(args), {}
    model, tokenizer = load_language_model(args, problems)
    agent = Agent(model.config, model.generation_config, tokenizer, args).to(device)
    try:
        agent.load_state_dict(state["agent"] if state else {f"model.{k}": v for k, v in model.state_dict().items()})
    except RuntimeError:
        check(args, "model", False, f"not the architecture of {args.evaluate}; leave the flag out")
    for name, sample in (("greedy", False), ("sampled", True)):
        share = results[name] = accuracy(agent, problems, device, sample)
        error = math.sqrt(share * (1 - share) / len(problems.test))  # standard error
        print(
            f"evaluation, {name}: accuracy {share:.1%} +- {error:.1%} of {len(problems.test)} held-out problems",
            flush=True,
        )
    return results


def parsed_flags():
    """The flags of the command line; with --resume or --evaluate, the saved ones are the defaults. Raises
    UsageError."""
    out, box = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(box):
            args = tyro.cli(Args)
            if args.resume:
                connect(args)
                args = tyro.cli(Args, default=replace(load_checkpoint(args.resume)[1]["args"], resume=args.resume))
            elif args.evaluate:
                args = tyro.cli(Args, default=replace(saved_flags(args.evaluate), evaluate=args.evaluate))
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
        flags = parsed_flags()
        if not flags.evaluate:
            train(flags)
        elif RANK == 0:
            evaluate_model(flags)
    except (UsageError, RunError, OSError) as error:
        if LOCAL_RANK == 0 or not isinstance(error, UsageError):  # which all learners of a host have in common
            tell(f"error: {error}")
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)
