"""VACO for language models: asynchronous GRPO on math problems, under policy lag, in one file.

"Align and Filter: Improving Performance in Asynchronous On-Policy RL", arXiv 2603.01365. Actors generate with old
versions of the model (*policy lag*). GRPO (arXiv 2402.03300) has no critic, so of VACO's two halves the *filter* acts,
on tokens: when the total variation between the model being optimised (pi) and the one that generated (beta) is over a
budget, the gradients that would raise it are dropped. No clipping.

    python vaco_async_llm.py                                              # a tiny model made on the spot, sums
    python vaco_async_llm.py --objective grpo                             # clipped ratios in place of the filter
    python vaco_async_llm.py --lag-schedule fixed --lag 4                 # every batch by the model of 4 batches ago
    python vaco_async_llm.py --model HuggingFaceTB/SmolLM2-135M-Instruct --task gsm8k --max-new-tokens 256

  PolicyStore: the last versions of the model, flat float32, in shared memory  <-- publish, once per batch --+
        | copy one version, once per rollout                                                                 |
        v                                                                                                    |
  actor 0 .. actor N-1: generate and score  <--- tickets (slot, version), through pipes ---  learner (train)
        | fill one slot: prompts, completions, log-probs, mask, rewards, version                             ^
        v                                                                                                    |
  Completions: preallocated slots in shared memory  --- slot numbers, through pipes -------------------------+
"""

import contextlib
import copy
import difflib
import hashlib
import importlib
import itertools
import json
import math
import multiprocessing as mp
import os
import re
import signal
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

with contextlib.suppress(ImportError):  # `validate` says what is missing
    import reasoning_gym
    import tokenizers
    import transformers

LATEST = -1  # as a ticket's version: the newest one at the moment the rollout begins
NUM_PROBLEMS = 2**20  # of a procedural task, for training; then they come again


@dataclass
class Args:
    exp_name: str = os.path.basename(__file__)[: -len(".py")]  # the name of this experiment
    seed: int = 1  # seed of the training problems, the sampling, the minibatches and the tiny model
    torch_deterministic: bool = True  # if toggled, `torch.backends.cudnn.deterministic=True`
    cuda: bool = True  # if toggled, the learner runs on the GPU when there is one
    actor_device: Literal["cpu", "cuda"] = "cpu"  # where actors generate; they may share the learner's GPU
    learner_threads: int = 1  # CPU threads of the learner
    actor_nice: int = 0  # niceness of the actors, up to 19: on cores that they share, the learner goes first
    save_model: bool = False  # if toggled, model and tokenizer are saved in runs/{run_name}/model, as transformers does

    # tiny: a small Llama made on the spot, with characters as tokens, warm-started on solved problems; else what
    # transformers loads: a hub id, a folder, or a GGUF file, with its tokenizer and chat template
    model: str = "tiny"
    warm_start_batches: int = 350  # supervised batches of 128 solved problems that the tiny model begins with
    # share of these problems that are solved wrongly, one too high, where the answer is an integer: what reinforcement
    # then has to find out is which of two solutions is right
    warm_start_errors: float = 0.6
    # a task of reasoning-gym, scored by its own verifier, or gsm8k, which needs the package datasets
    task: str = "chain_sum"
    task_config: str = ""  # the task's options, as JSON; none: two or three one-digit terms for chain_sum
    system_prompt: str = ""  # the system message, for models whose chat template has one
    max_prompt_tokens: int = 256  # the longest prompt that a slot can hold
    max_new_tokens: int = 6  # where a completion is cut
    temperature: float = 1.0  # the sampling temperature: the policy is what is sampled from, in actors and learner
    top_k: int = 0  # sample from the k most likely tokens only; 0: from all

    total_batches: int = 200  # batches to train on
    eval_interval: int = 25  # batches from one evaluation to the next
    eval_size: int = 400  # held-out problems, answered greedily; no training problem has the same question

    # Actors decide how old the data is when it arrives (backward lag)

    num_actors: int = 1  # generating processes; free running, data is about num_actors / rollouts_per_batch batches old
    prompts_per_rollout: int = 32  # problems per rollout
    group_size: int = 8  # completions per problem, whose rewards are compared with one another
    rollouts_per_batch: int = 1  # rollouts per batch, of prompts_per_rollout * group_size completions each
    # async: free running; fixed: lockstep, every batch is exactly `lag` versions old; mixture: lockstep, the version of
    # each rollout is drawn uniformly from the last `lag + 1`
    lag_schedule: Literal["async", "fixed", "mixture"] = "async"
    lag: int = 0  # policy lag of the lockstep schedules, in versions; there is one version per batch

    # The number of updates decides how far the policy moves on one batch (forward lag)

    update_epochs: int = 1  # passes over each batch
    num_minibatches: int = 2  # minibatches, that is gradient steps, per pass
    learning_rate: float = 1e-4  # the learning rate of Adam
    warmup_batches: int = 20  # batches in which the learning rate rises: Adam's first steps are large and blind
    anneal_lr: bool = True  # if toggled, the learning rate falls linearly to 0 over total_batches
    kl_coef: float = 0.0  # coefficient of the KL divergence to the model before training, per token
    max_grad_norm: float = 1.0  # the largest norm of a gradient

    objective: Literal["vaco", "grpo"] = "vaco"  # what holds the policy back: the filter, or clipped ratios
    # vaco: the budget on the total variation of a token, 1/2 mean |pi/beta - 1|: THE 1/2 IS INCLUDED
    tv_threshold: float = 0.02
    clip_coef: float = 0.2  # grpo: ratios are clipped to 1 - clip_coef .. 1 + clip_coef


class UsageError(Exception):
    """Flags that cannot work; the message is one line that names the flag and what to type instead."""


def check(args, name, holds, advice):
    """Raise UsageError about the flag `name` unless `holds`."""
    if not holds:
        raise UsageError(f"--{name.replace('_', '-')} {getattr(args, name)}: {advice}")


def validate(args):
    """Check all flags and packages, before any process starts. Raises UsageError."""
    lowest = dict.fromkeys(("learner_threads", "max_prompt_tokens", "max_new_tokens", "eval_interval", "eval_size"), 1)
    lowest |= dict.fromkeys(("num_actors", "prompts_per_rollout", "rollouts_per_batch", "num_minibatches"), 1)
    lowest |= {"update_epochs": 1, "group_size": 2, "temperature": 1e-3, "max_grad_norm": 1e-9}
    highest = {"seed": 2**31 - 1, "actor_nice": 19, "num_actors": 256, "lag": 10_000, "eval_size": 10_000}
    highest |= {"learner_threads": 1024, "prompts_per_rollout": 4096, "group_size": 1024, "rollouts_per_batch": 1024}
    highest |= {"max_prompt_tokens": 2**17, "max_new_tokens": 2**17, "warm_start_errors": 1}
    for name, value in vars(args).items():
        if isinstance(value, (int, float)):
            low, high = lowest.get(name, 0), highest.get(name, 10**12)
            check(args, name, low <= value <= high, f"must be a number from {low} to {high}")
    advice = "the async schedule cannot hold a lag; type --lag-schedule fixed (or mixture), or vary --num-actors"
    check(args, "lag", args.lag == 0 or args.lag_schedule != "async", advice)
    completions = args.rollouts_per_batch * args.prompts_per_rollout * args.group_size
    advice = f"more than the {completions} completions of a batch"
    check(args, "num_minibatches", args.num_minibatches <= completions, advice)
    no_gpu = args.actor_device == "cuda" and not torch.cuda.is_available()
    check(args, "actor_device", not no_gpu, "there is no GPU that torch can use; type --actor-device cpu")
    needed = {"transformers": "model", "reasoning_gym": "task"}
    needed |= {"gguf": "model"} if args.model.endswith(".gguf") else {}
    needed |= {"datasets": "task"} if args.task == "gsm8k" else {}
    for package, name in needed.items():
        pip_name = package.replace("_", "-")
        advice = f"needs the package {pip_name}; type pip install {pip_name}, or pip install -r requirements-llm.txt"
        try:
            importlib.import_module(package)
        except ImportError:
            check(args, name, False, advice)


class Problems:
    """The problems of a task: `test`, a list of entries for evaluation, and endlessly many for training, by number.

    An entry is a dict with `question` and `answer`. A procedural task makes its problems from seeds, which are disjoint
    for training and test, and for all `--seed`s below 1024; the test problems are the same for all seeds. A training
    problem that asks the same as a test problem is passed over. Raises UsageError for a task that is not there.
    """

    def __init__(self, args):
        self.args = args
        if args.task == "gsm8k":
            self.load_gsm8k()
            return
        names = reasoning_gym.factory.DATASETS
        close = ", ".join(difflib.get_close_matches(args.task, names, n=3, cutoff=0))
        check(args, "task", args.task in names, f"no task of reasoning-gym, and not gsm8k; closest: {close}")
        default = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1} if args.task == "chain_sum" else {}
        try:
            create = partial(
                reasoning_gym.create_dataset, args.task, **json.loads(args.task_config or "null") or default
            )
            self.train = create(seed=args.seed % 1024 * NUM_PROBLEMS, size=NUM_PROBLEMS)
            self.test = list(create(seed=1024 * NUM_PROBLEMS, size=args.eval_size))
        except Exception as error:  # no JSON, an option that is not there, a value that the task refuses
            check(args, "task_config", False, f"{args.task} does not take it: {one_line(error)}")
        self.verify = self.train.score_answer
        self.held_out = {entry["question"] for entry in self.test}

    def load_gsm8k(self):
        """Grade school math, arXiv 2110.14168; an answer is right if its last number is."""
        import datasets

        def entries(split):
            rows = datasets.load_dataset("openai/gsm8k", "main", split=split)
            return [{"question": row["question"], "answer": last_number(row["answer"])} for row in rows]

        try:
            self.train, self.test = entries("train"), entries("test")[: self.args.eval_size]
        except Exception as error:
            check(self.args, "task", False, f"its data is not there, and cannot be loaded: {one_line(error)}")
        np.random.default_rng(self.args.seed).shuffle(self.train)
        self.verify = lambda answer, entry: last_number(answer) == entry["answer"]
        self.held_out = {entry["question"] for entry in self.test}

    def __getitem__(self, number):
        """A training problem, by its number from 0 on."""
        entry = self.train[number % len(self.train)]
        while entry["question"] in self.held_out:
            number += 7919
            entry = self.train[number % len(self.train)]
        return entry

    def score(self, text, entry):
        """What the task's verifier gives a completion, 0 to 1: for what stands in its last <answer> </answer>, if it
        has that; else for its last number, if the answer is a number; else for all of it."""
        answer = reasoning_gym.utils.extract_answer(text)
        if answer is None:
            answer = last_number(text) if last_number(entry["answer"]) == entry["answer"] else text.strip()
        return float(self.verify(answer, entry))


def last_number(text):
    """The last number of a text, without thousands separators, "" if there is none: "#### 1,250" -> "1250"."""
    numbers = re.findall(r"-?\d+(?:\.\d+)?", text.replace(",", ""))
    return numbers[-1].removesuffix(".0") if numbers else ""


def one_line(error):
    """The first line of an error's message, or its name."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


def tiny_model(problems):
    """A Llama of 0.7M parameters and its tokenizer: one token for every ASCII character, and one for the words that all
    questions begin with, which say nothing."""
    questions = [problems[number]["question"] for number in range(256)]
    first, last = min(questions), max(questions)  # in the order of the alphabet: between them, none differs earlier
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    start = "".join(character for character, _ in same).rpartition(" ")[0]
    characters = ["\n", *map(chr, range(32, 127))]
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", "<unk>", *characters])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.decoder = tokenizers.decoders.Fuse()
    backend.add_tokens([tokenizers.AddedToken(start, normalized=False)] if start else [])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    tokenizer.chat_template = "{{ messages[-1]['content'] }}{{ '\n' }}"
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    return transformers.AutoModelForCausalLM.from_config(config), tokenizer


def load_model(args, problems):
    """The model of the flags, in float32, and its tokenizer. Raises UsageError if transformers cannot load it."""
    transformers.utils.logging.disable_progress_bar()
    if args.model == "tiny":
        return tiny_model(problems)
    source = {"pretrained_model_name_or_path": args.model}
    if args.model.endswith(".gguf"):
        check(args, "model", os.path.isfile(args.model), "there is no such file")
        folder, file = os.path.split(os.path.abspath(args.model))
        source = {"pretrained_model_name_or_path": folder, "gguf_file": file}
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    except Exception as error:  # many kinds: no such folder or id, no network, a broken file, a missing package
        check(args, "model", False, f"neither tiny nor what transformers can load: {one_line(error)}")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return model, tokenizer


class Agent(nn.Module):
    """A causal language model and its tokenizer as a policy: it samples completions, and gives their log-probabilities,
    both at the same temperature and with the same truncation. A completion ends with a stop token, or is cut."""

    def __init__(self, config, tokenizer, stop_tokens, args):
        super().__init__()
        self.model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        self.tokenizer, self.stop_tokens, self.args = tokenizer, stop_tokens, args
        self.eval()  # no dropout: it would pass for policy lag

    def encode(self, questions):
        """Questions to token ids in the model's chat format, padded on the left: ids and mask (bool) [n, P]."""
        system = [{"role": "system", "content": self.args.system_prompt}] if self.args.system_prompt else []
        chats = [[*system, {"role": "user", "content": question}] for question in questions]
        if self.tokenizer.chat_template:
            texts = self.tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
        else:  # a base model
            texts = ["\n".join(message["content"] for message in chat) + "\n" for chat in chats]
        # A chat format brings its special tokens with it
        special = not self.tokenizer.chat_template
        settings = {"padding": True, "padding_side": "left", "return_tensors": "pt", "add_special_tokens": special}
        encoded = self.tokenizer(texts, **settings)
        return encoded.input_ids, encoded.attention_mask.bool()

    def decode(self, tokens, mask):
        """The texts of completions [S, L], without special tokens."""
        rows = [row[valid].tolist() for row, valid in zip(tokens, mask, strict=True)]
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True)

    def get_logprobs(self, logits):
        """Logits to log-probabilities of what is sampled from, [..., vocabulary]; -inf where it is truncated."""
        logits = logits.float() / self.args.temperature
        if 0 < self.args.top_k < logits.shape[-1]:
            logits = logits.masked_fill(logits < logits.topk(self.args.top_k).values[..., -1:], -math.inf)
        return logits.log_softmax(-1)

    @torch.no_grad()
    def generate(self, prompts, prompt_mask, group_size=1, generator=None):
        """Sample `group_size` completions of each prompt [n, P], the most likely tokens if `generator` is None.

        Returns tokens, their log-probabilities, and mask (true up to the stop token, included), [n * group_size, L].
        """
        # Every prompt is read once, then its keys and values are copied for the group
        positions = (prompt_mask.long().cumsum(1) - 1).clamp(min=0)
        inputs = {"input_ids": prompts, "attention_mask": prompt_mask.long(), "position_ids": positions}
        output = self.model(**inputs, use_cache=True, logits_to_keep=1)
        cache, logits = output.past_key_values, output.logits.repeat_interleave(group_size, 0)  # [S, 1, vocabulary]
        cache.batch_repeat_interleave(group_size)
        attention = prompt_mask.long().repeat_interleave(group_size, 0)
        positions = attention.sum(1, keepdim=True)
        stop_tokens = torch.tensor(self.stop_tokens, device=prompts.device)
        unfinished, columns = torch.ones(len(logits), dtype=torch.bool, device=prompts.device), []
        while True:
            logprobs = self.get_logprobs(logits[:, -1])  # [S, vocabulary]
            if generator is None:
                tokens = logprobs.argmax(-1, keepdim=True)
            else:
                tokens = torch.multinomial(logprobs.exp(), 1, generator=generator)  # [S, 1]
            tokens = tokens.masked_fill(~unfinished.unsqueeze(1), self.tokenizer.pad_token_id)
            columns.append((tokens, logprobs.gather(1, tokens), unfinished))
            unfinished = unfinished & ~torch.isin(tokens[:, 0], stop_tokens)
            if len(columns) == self.args.max_new_tokens or not unfinished.any():
                break
            attention = torch.cat([attention, torch.ones_like(positions)], 1)
            inputs = {"input_ids": tokens, "attention_mask": attention, "position_ids": positions}
            logits = self.model(**inputs, past_key_values=cache, use_cache=True).logits
            positions = positions + 1
        tokens, logprobs, mask = zip(*columns, strict=True)
        return torch.cat(tokens, 1), torch.cat(logprobs, 1), torch.stack(mask, 1)

    def evaluate(self, prompts, prompt_mask, tokens, mask):
        """Log-probabilities of completions, and entropies of what each token was drawn from, [M, L]; both mean nothing
        outside the mask."""
        attention = torch.cat([prompt_mask, mask], 1).long()  # [M, P + L]
        positions = (attention.cumsum(1) - 1).clamp(min=0)
        inputs = {"input_ids": torch.cat([prompts, tokens], 1), "attention_mask": attention, "position_ids": positions}
        # The token at t is predicted by the logits at t - 1
        logits = self.model(**inputs, use_cache=False, logits_to_keep=tokens.shape[1] + 1).logits[:, :-1]
        logprobs = self.get_logprobs(logits)  # [M, L, vocabulary]
        with torch.no_grad():
            entropies = torch.special.entr(logprobs.exp()).sum(-1)
        return logprobs.gather(2, tokens.unsqueeze(2)).squeeze(2), entropies


def warm_start(args, agent, problems):
    """Train the tiny model on solved problems, so that reinforcement has something to improve. The result is kept in
    runs/warm_starts, for runs with the same seed and task."""
    flags = ("seed", "task", "task_config", "warm_start_batches", "warm_start_errors")
    settings = ([getattr(args, flag) for flag in flags], args.eval_size, agent.model.config.to_dict())
    digest = hashlib.sha256(repr((settings, torch.__version__)).encode()).hexdigest()[:16]
    path = f"runs/warm_starts/{digest}.pt"
    if os.path.exists(path):
        agent.load_state_dict(torch.load(path, weights_only=True))
        return
    optimizer, rng = torch.optim.AdamW(agent.parameters(), lr=1e-3, weight_decay=0.01), np.random.default_rng(args.seed)
    batches = tqdm(range(args.warm_start_batches), desc="warm start", unit="batch", disable=not sys.stderr.isatty())
    for batch in batches:
        first = NUM_PROBLEMS // 2 + batch * 128  # reinforcement takes them from 0 on
        entries = [problems[number] for number in range(first, first + 128)]
        prompts, prompt_mask = agent.encode([entry["question"] for entry in entries])
        solutions = [solution(entry["answer"], rng.random() < args.warm_start_errors) for entry in entries]
        answers = agent.tokenizer([text + agent.tokenizer.eos_token for text in solutions]).input_ids
        tokens = nn.utils.rnn.pad_sequence(list(map(torch.tensor, answers)), batch_first=True, padding_value=-100)
        attention = torch.cat([prompt_mask, tokens >= 0], 1).long()
        loss = agent.model(
            input_ids=torch.cat([prompts, tokens.clamp(min=0)], 1),
            attention_mask=attention,
            position_ids=(attention.cumsum(1) - 1).clamp(min=0),
            labels=torch.cat([torch.full_like(prompts, -100), tokens], 1),
        ).loss
        progress = batch / args.warm_start_batches
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, (batch + 1) / 50) * (1 - progress)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(agent.parameters(), 1.0)
        optimizer.step()
    os.makedirs("runs/warm_starts", exist_ok=True)
    torch.save(agent.state_dict(), f"{path}.{os.getpid()}")
    os.replace(f"{path}.{os.getpid()}", path)  # other runs may make the same one at this moment


def solution(answer, wrong):
    """An answer to learn from: if `wrong`, one too high, where it is an integer."""
    return str(int(answer) + 1) if wrong and re.fullmatch(r"-?\d+", answer) else answer


def accuracy(agent, problems, device):
    """Share of the test problems that the most likely completion solves."""
    right = 0
    for first in range(0, len(problems.test), 64):
        entries = problems.test[first : first + 64]
        prompts, prompt_mask = agent.encode([entry["question"] for entry in entries])
        tokens, _, mask = agent.generate(prompts.to(device), prompt_mask.to(device))
        scores = map(problems.score, agent.decode(tokens, mask), entries)
        right += sum(score >= 1 for score in scores)
    return right / len(problems.test)


def group_advantages(rewards, group_size):
    """GRPO (arXiv 2402.03300, section 4.1.2): rewards [S], group after group -> advantages (r - mean) / (std + 1e-6)
    [S], and whether the rewards of its group vary [S]: where they do not, the advantage is 0."""
    groups = rewards.view(-1, group_size)
    varies = (groups != groups[:, :1]).any(1, keepdim=True)
    centred = groups - groups.mean(1, keepdim=True)
    advantages = centred / (groups.std(1, correction=0, keepdim=True) + 1e-6)
    return torch.where(varies, advantages, 0).flatten(), varies.expand_as(groups).flatten()


def tv_filter(ratios, advantages, tv_threshold, anchor_ratios=None):
    """Filter: drop the gradients that raise the total variation, once it is over budget (VACO, arXiv 2603.01365).

        D      = 1/2 mean_i |r_i - anchor_i|     estimates TV(pi, anchor policy): TV = 1/2 E_beta |pi/beta - 1|
        keep_i = 1                               if D <= tv_threshold
                 1[A_i (r_i - anchor_i) <= 0]    otherwise

    The sign: grad r A = r A grad log pi, and grad 1/2 |r - anchor| = 1/2 sign(r - anchor) r grad log pi, so ascent on
    the surrogate r A of a sample raises its share of D exactly if A (r - anchor) > 0.

    Takes valid rows only: ratios pi/beta [M] without gradient; advantages [M] as the loss uses them, since normalising
    changes signs; the budget on D, the 1/2 included; anchor_ratios pi_T/beta [M], to measure from the learner's policy
    pi_T, where None is 1, the behaviour policy. Returns keep [M], boolean, and tv, the scalar tensor D.
    """
    moved = ratios - (1 if anchor_ratios is None else anchor_ratios)
    tv = 0.5 * moved.abs().mean()
    return (tv <= tv_threshold) | (advantages * moved <= 0), tv


def vaco_loss(ratios, advantages, keep):
    """-1/M sum_i keep_i r_i A_i over [M] samples. Dropped ones count in M, so they shorten the step (2603.01365)."""
    return -torch.where(keep, ratios * advantages, 0).mean()


def clip_loss(ratios, advantages, clip_coef):
    """PPO-clip, arXiv 1707.06347, eq. 7: mean of max(-r A, -clip(r, 1 - eps, 1 + eps) A) over [M] samples."""
    return torch.max(-ratios * advantages, -ratios.clamp(1 - clip_coef, 1 + clip_coef) * advantages).mean()


def llm_minibatch(
    agent, args, prompts, prompt_mask, tokens, mask, behavior_logprobs, advantages, reference_logprobs=None
):
    """Forward pass of one gradient step: M completions of a batch -> loss (scalar), {what is logged: scalar tensor}.
    All means are over tokens within the mask."""
    newlogprobs, entropies = agent.evaluate(prompts, prompt_mask, tokens, mask)  # [M, L]
    newlogprobs = newlogprobs[mask]  # [K], as all that follows
    log_ratios = log_ratio(newlogprobs, behavior_logprobs[mask])
    ratios = log_ratios.exp()  # pi/beta
    advantages = advantages.unsqueeze(1).expand_as(mask)[mask]
    keep, tv = tv_filter(ratios.detach(), advantages, args.tv_threshold)
    if args.objective == "vaco":
        policy_loss = vaco_loss(ratios, advantages, keep)
    else:
        policy_loss = clip_loss(ratios, advantages, args.clip_coef)
        keep = (advantages * (ratios - 1) <= 0) | ((ratios - 1).abs() <= args.clip_coef)
    with torch.no_grad():
        logs = {
            "losses/policy_loss": policy_loss.detach(),
            "losses/entropy": entropies[mask].mean(),
            "losses/old_approx_kl": -log_ratios.mean(),
            "losses/approx_kl": (ratios - 1 - log_ratios).mean(),
            "filter/gate_open": (tv > args.tv_threshold).float(),
            "filter/dropped": 1 - keep.float().mean(),
        }
    if reference_logprobs is None:
        return policy_loss, logs
    to_reference = log_ratio(reference_logprobs[mask], newlogprobs)
    reference_kl = (to_reference.exp() - 1 - to_reference).mean()  # the estimator k3 of KL(pi, reference), ibid.
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
    """Preallocated slots for rollouts of n prompts and S = n * group_size completions, in shared memory. A slot's
    `rollout` is the number of the rollout that it is for: prompts and sampling noise follow from it."""

    def __init__(self, args, num_slots):
        n, P, L = args.prompts_per_rollout, args.max_prompt_tokens, args.max_new_tokens
        S = n * args.group_size
        self.prompts = torch.zeros(num_slots, n, P, dtype=torch.long)
        self.prompt_mask = torch.zeros(num_slots, n, P, dtype=torch.bool)
        self.tokens = torch.zeros(num_slots, S, L, dtype=torch.long)
        self.logprobs = torch.zeros(num_slots, S, L)
        self.mask = torch.zeros(num_slots, S, L, dtype=torch.bool)
        self.rewards = torch.zeros(num_slots, S)
        self.version, self.rollout = torch.zeros(num_slots).long(), torch.zeros(num_slots).long()
        for tensor in vars(self).values():
            tensor.share_memory_()

    def fill(self, slot, prompts, prompt_mask, tokens, logprobs, mask, rewards):
        """Write a rollout, with prompts of any length P' <= P and completions of any length L' <= L."""
        P, L = prompts.shape[1], tokens.shape[1]
        if self.prompts.shape[2] < P:
            raise ValueError(f"a prompt has {P} tokens: type --max-prompt-tokens {P}, or more")
        self.prompt_mask[slot], self.mask[slot] = False, False
        self.prompts[slot, :, -P:], self.prompt_mask[slot, :, -P:] = prompts, prompt_mask
        self.tokens[slot, :, :L], self.logprobs[slot, :, :L], self.mask[slot, :, :L] = tokens, logprobs, mask
        self.rewards[slot] = rewards

    def batch(self, slots, device):
        """Copy slots to the device as one batch [S * len(slots), ...], with no more padding than it needs."""
        fields = {name: tensor[slots].flatten(0, 1) for name, tensor in vars(self).items() if tensor.ndim > 1}
        batch = SimpleNamespace(**fields)
        first = batch.prompt_mask.any(0).int().argmax()
        length = batch.mask.any(0).sum()
        group_size = len(batch.tokens) // len(batch.prompts)
        for name in ("prompts", "prompt_mask"):
            setattr(batch, name, getattr(batch, name)[:, first:].repeat_interleave(group_size, 0))
        for name in ("tokens", "logprobs", "mask"):
            setattr(batch, name, getattr(batch, name)[:, :length])
        return SimpleNamespace(**{name: tensor.to(device) for name, tensor in vars(batch).items()})


def generation_actor(args, index, make_agent, make_problems, store, completions, learner):
    """An actor process: for every ticket, load one policy version and fill one slot with it.

    Through the connection `learner`, tickets (slot, version) come in. Out go None once ready, for every ticket (slot,
    seconds waited, seconds taken), and a traceback if anything fails.
    """
    torch.set_num_threads(1)
    os.nice(args.actor_nice)
    try:
        agent, problems = make_agent().to(args.actor_device), make_problems()
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
        learner.send(traceback.format_exc())


actor = generation_actor  # what `Actors` starts


def collect_rollout(args, agent, problems, completions, slot):
    """Generate and score the completions of one slot. Problems and noise depend on seed and rollout number alone."""
    rollout, n, device = completions.rollout[slot].item(), args.prompts_per_rollout, args.actor_device
    seed = int(np.random.default_rng((args.seed, rollout, 1)).integers(2**63))
    generator = torch.Generator(device).manual_seed(seed)
    entries = [problems[number] for number in range(rollout * n, (rollout + 1) * n)]
    prompts, prompt_mask = agent.encode([entry["question"] for entry in entries])
    tokens, logprobs, mask = agent.generate(prompts.to(device), prompt_mask.to(device), args.group_size, generator)
    solved = [entry for entry in entries for _ in range(args.group_size)]
    rewards = torch.tensor(list(map(problems.score, agent.decode(tokens, mask), solved)))
    completions.fill(slot, prompts, prompt_mask, tokens, logprobs, mask, rewards)


def ticket_version(args, rollout):
    """The policy version that must collect a rollout (counted from 0): the definition of the lag schedules. The draws
    of `mixture` depend on seed and rollout alone; early on they are uniform over the versions that exist."""
    batch = rollout // args.rollouts_per_batch
    if args.lag_schedule == "async":
        return LATEST
    if args.lag_schedule == "fixed":
        return max(batch - args.lag, 0)
    return batch - int(np.random.default_rng((args.seed, rollout)).integers(min(args.lag, batch) + 1))


class Actors:
    """The actor processes, a pipe to each, and the tickets: who collects what with which policy version.

    A slot belongs to one actor for good. Rollout j goes to actor j mod N, which fills its slots in turn. A free slot
    has a ticket as soon as the policy version exists, so actors collect while the learner trains; they are paced by the
    number of slots, nothing is dropped. Batch v is made, lockstep, of the R rollouts from v R on, in this order, so
    that nothing depends on timing; async, of the R that were finished first.
    """

    def __init__(self, args, slots_per_actor):
        self.args, self.slots_per_actor, self.arrivals = args, slots_per_actor, 0
        self.issued = [0] * args.num_actors  # tickets given to each actor so far
        self.rollout_in = {}  # slot -> the rollout that it is for, until it is free again
        self.finished = {}  # place in the order of training -> what the actor sent
        self.processes, self.connections = [], []

    def start(self, make_agent, make_envs, store, rollouts):
        """Start the actors, with the arguments of `actor`, and block until all are ready."""
        # forkserver copies a process that has done all imports: actors start much sooner than by spawn, in less memory
        context = mp.get_context("forkserver" if "forkserver" in mp.get_all_start_methods() else "spawn")
        context.set_forkserver_preload(["torch", "envpool", "numpy", "gymnasium", "tyro", "torch.utils.tensorboard"])
        # Ctrl-C reaches every process of a terminal: actors inherit that they leave it to the learner. The resource
        # tracker must run before, because starting it would lift the block
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            for index in range(self.args.num_actors):
                ours, theirs = context.Pipe()
                arguments = (self.args, index, make_agent, make_envs, store, rollouts, theirs)
                self.processes.append(context.Process(target=actor, args=arguments, name=f"actor {index}", daemon=True))
                self.processes[-1].start()
                theirs.close()  # so that the pipe ends with the actor
                self.connections.append(ours)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        ready = 0
        while ready < self.args.num_actors:
            ready += len(self.receive())

    def receive(self, timeout=None):
        """Block until actors send something; returns a list of it. Raises RuntimeError if an actor failed or died."""
        messages = []
        for connection in wait(self.connections, timeout):
            process = self.processes[self.connections.index(connection)]
            try:
                messages.append(connection.recv())
            except (EOFError, ConnectionError):
                process.join(10)
                raise RuntimeError(f"{process.name} died, exit code {process.exitcode} (-n: signal n)") from None
            if isinstance(messages[-1], str):
                raise RuntimeError(f"{process.name} failed:\n{messages[-1]}")
        return messages

    def issue(self, newest, freed=()):
        """Send out each ticket whose slot is free and whose policy version is there: `newest` is the last, `freed` are
        slots that have been copied and may be filled again."""
        for slot in freed:
            self.rollout_in.pop(slot)
        for index, connection in enumerate(self.connections):
            while True:
                rollout = index + self.issued[index] * self.args.num_actors
                slot = index * self.slots_per_actor + self.issued[index] % self.slots_per_actor
                version = ticket_version(self.args, rollout)
                if slot in self.rollout_in or version > newest:
                    break
                with contextlib.suppress(ConnectionError):  # `receive` tells of a dead actor
                    connection.send((slot, version))
                self.rollout_in[slot] = rollout
                self.issued[index] += 1

    def collect(self, batch):
        """Block until the rollouts of a batch are there; returns what actors sent, in the order of training."""
        places = range(batch * self.args.rollouts_per_batch, (batch + 1) * self.args.rollouts_per_batch)
        while True:
            complete = all(place in self.finished for place in places)
            messages = self.receive(timeout=0 if complete else None)
            for message in messages:
                place = self.arrivals if self.args.lag_schedule == "async" else self.rollout_in[message[0]]
                self.finished[place] = message
                self.arrivals += 1
            if complete and not messages:
                return [self.finished.pop(place) for place in places]

    def stop(self):
        """End the actors at once: they hold nothing worth waiting for."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


def train(args):
    """Train a model and return it, as an `Agent`: a whole run, from the flags (`Args`) to the summary line. Raises
    UsageError if the flags cannot work, RuntimeError if an actor or the arithmetic failed."""
    validate(args)
    run_name = f"{args.task}__{args.exp_name}__{args.seed}__{int(time.time())}"
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    torch.set_num_threads(args.learner_threads)
    device = torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")

    problems = Problems(args)
    model, tokenizer = load_model(args, problems)
    stops = np.atleast_1d(getattr(model.generation_config, "eos_token_id", None) or tokenizer.eos_token_id).tolist()
    make_agent = partial(Agent, model.config, tokenizer, sorted({*stops, tokenizer.eos_token_id}), args)
    agent = make_agent()
    agent.model.load_state_dict(model.state_dict())
    del model
    started = time.perf_counter()
    if args.model == "tiny":
        warm_start(args, agent, problems)
    warm_start_seconds = time.perf_counter() - started
    agent.to(device)
    reference = copy.deepcopy(agent) if args.kl_coef else None
    optimizer = torch.optim.AdamW(agent.parameters(), lr=args.learning_rate, weight_decay=0)
    store = PolicyStore(agent, num_versions=max(args.lag + 1, 2))
    store.publish(agent, 0)
    # As many slots as one batch needs, and at least one per actor: more would make data older, and nothing faster
    slots_per_actor = math.ceil(args.rollouts_per_batch / args.num_actors)
    num_slots = args.num_actors * slots_per_actor
    completions = Completions(args, num_slots)
    for slot in range(num_slots):  # the first rollouts, as `Actors.issue` deals them out
        completions.rollout[slot] = slot // slots_per_actor + slot % slots_per_actor * args.num_actors
    actors = Actors(args, slots_per_actor)

    def logprobs_of(agent, *rows):
        """Log-probabilities [M, L] of completions, as many at a time as in a gradient step."""
        parts = zip(*(row.split(math.ceil(len(row) / args.num_minibatches)) for row in rows), strict=True)
        with torch.no_grad():
            return torch.cat([agent.evaluate(*part)[0] for part in parts])

    writer = SummaryWriter(f"runs/{run_name}")
    table = "\n".join(f"|{name}|{value}|" for name, value in vars(args).items())
    writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}")
    progress = tqdm(total=args.total_batches, unit="batch", disable=not sys.stderr.isatty(), dynamic_ncols=True)
    version, next_line, tokens_seen = 0, 0, 0
    seconds = Counter()  # over the whole run
    accuracies = [accuracy(agent, problems, device)]
    writer.add_scalar("charts/accuracy", accuracies[0], 0)
    print(f"accuracy before training: {accuracies[0]:.1%} of {len(problems.test)} held-out problems", flush=True)
    try:
        if args.total_batches:
            actors.start(make_agent, partial(Problems, args), store, completions)
            actors.issue(newest=0)
        batch_time = time.perf_counter()
        while version < args.total_batches:
            # COLLECT a batch, copy it, and let its slots be filled again while we train
            asked = time.perf_counter()
            slots, waits, acts = map(list, zip(*actors.collect(batch=version), strict=True))
            learner_wait = time.perf_counter() - asked
            batch = completions.batch(slots, device)  # prompts [S, P], tokens [S, L], rewards [S], ...
            lags = (version - completions.version[slots]).float()  # [R]
            completions.rollout[slots] += num_slots
            actors.issue(newest=version, freed=slots)

            # ALIGN: advantages within groups, once per batch; without a critic there is no more to align
            advantages, varies = group_advantages(batch.rewards, args.group_size)  # [S]
            # Completions without advantage have no gradient: they go no further, but count in the mean
            used = (varies | (args.kl_coef > 0)).nonzero().squeeze(-1)  # [M]
            rows = (batch.prompts, batch.prompt_mask, batch.tokens, batch.mask, batch.logprobs, advantages)
            rows = [row.index_select(0, used) for row in rows]
            mask, behavior_logprobs = rows[3], rows[4]  # [M, L]
            share, updates, scalars = len(used) / len(advantages), [], {}
            lr = args.learning_rate * (1 - version / args.total_batches if args.anneal_lr else 1)
            lr *= min((version + 1) / max(args.warmup_batches, 1), 1)
            optimizer.param_groups[0]["lr"] = lr
            if share > 0:
                learner_ratios = log_ratio(logprobs_of(agent, *rows[:4])[mask], behavior_logprobs[mask]).exp()  # [K]
                rows += [logprobs_of(reference, *rows[:4])] if args.kl_coef else []

            # FILTER: minibatch updates of pi
            for _ in range(args.update_epochs if share > 0 else 0):
                for mb in torch.randperm(len(used), device=device).tensor_split(min(args.num_minibatches, len(used))):
                    loss, update = llm_minibatch(agent, args, *(row.index_select(0, mb) for row in rows))
                    optimizer.zero_grad()
                    (share * loss).backward()
                    nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                    optimizer.step()
                    updates.append(update)

            # PUBLISH the next version
            if share > 0:
                scalars = {name: torch.stack([u[name] for u in updates]).mean().item() for name in updates[0]}
                final_ratios = log_ratio(logprobs_of(agent, *rows[:4])[mask], behavior_logprobs[mask]).exp()  # [K]
                scalars |= {
                    "lag/tv_backward": 0.5 * (learner_ratios - 1).abs().mean().item(),
                    "lag/tv_forward": 0.5 * (final_ratios - learner_ratios).abs().mean().item(),
                    "lag/tv_total": 0.5 * (final_ratios - 1).abs().mean().item(),
                    "lag/ess": (learner_ratios.mean().square() / learner_ratios.square().mean()).item(),
                }
            if not all(map(math.isfinite, scalars.values())):
                raise RuntimeError(f"not finite in the batch of version {version}: {scalars}")
            version += 1
            store.publish(agent, version)
            actors.issue(newest=version)

            # LOG, against batches
            now = time.perf_counter()
            batch_seconds, batch_time = now - batch_time, now
            tokens_seen += batch.mask.sum().item()
            seconds.update(learner_wait=learner_wait, waits=sum(waits), actors=sum(waits + acts), total=batch_seconds)
            scalars |= {
                "charts/reward": batch.rewards.mean().item(),
                "charts/completion_length": batch.mask.sum(1).float().mean().item(),
                "charts/learning_rate": lr,
                "charts/tokens_per_second": tokens_seen / seconds["total"],
                "filter/groups_without_variance": 1 - varies.float().mean().item(),
                "lag/versions_mean": lags.mean().item(),
                "lag/versions_max": lags.max().item(),
                "stats/learner_wait": learner_wait / batch_seconds,
                "stats/actor_wait": sum(waits) / sum(waits + acts),
                "stats/rollout_time": sum(acts) / len(acts),
                "stats/update_time": batch_seconds - learner_wait,
                "stats/queue_size": len(actors.finished),
            }
            if version % args.eval_interval == 0 or version == args.total_batches:
                scalars["charts/accuracy"] = accuracy(agent, problems, device)
                accuracies.append(scalars["charts/accuracy"])
                shown = slice(0, 4 * args.group_size, args.group_size)
                questions = agent.decode(batch.prompts[shown], batch.prompt_mask[shown])
                answers, rewards = agent.decode(batch.tokens[shown], batch.mask[shown]), batch.rewards[shown].tolist()
                lines = [f"|{q!r}|{a!r}|{r:.2f}|" for q, a, r in zip(questions, answers, rewards, strict=True)]
                writer.add_text("samples", "\n".join(["|prompt|completion|reward|\n|-|-|-|", *lines]), version)
                batch_time = time.perf_counter()  # evaluation is no part of the next batch
            for name, value in scalars.items():
                writer.add_scalar(name, value, version)
            status = (
                f"accuracy {accuracies[-1]:.1%}, reward {scalars['charts/reward']:.3f}, lag {lags.mean().item():.1f}"
            )
            status += f", TV {scalars.get('lag/tv_total', 0):.4f}, dropped {scalars.get('filter/dropped', 0):.1%}"
            progress.set_postfix_str(status, refresh=False)
            progress.update()
            if progress.disable and now >= next_line:
                print(f"batch {version}/{args.total_batches}, {status}", flush=True)
                next_line = now + 5
        if args.save_model:
            agent.model.save_pretrained(f"runs/{run_name}/model")
            agent.tokenizer.save_pretrained(f"runs/{run_name}/model")
    finally:
        actors.stop()
        progress.close()
        writer.close()
    waited = seconds["learner_wait"] / max(seconds["total"], 1e-9), seconds["waits"] / max(seconds["actors"], 1e-9)
    print(
        f"{args.task}, seed {args.seed}: accuracy {accuracies[0]:.1%} -> {accuracies[-1]:.1%} of {len(problems.test)} "
        f"held-out problems; {version} batches, {tokens_seen} tokens in {seconds['total']:.1f} s after a warm start "
        f"of {warm_start_seconds:.1f} s; learner waited {waited[0]:.1%} of the time, actors {waited[1]:.1%}; logs in "
        f"runs/{run_name}"
    )
    return agent


if __name__ == "__main__":
    try:
        train(tyro.cli(Args))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
