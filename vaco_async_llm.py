"""VACO for language models: asynchronous GRPO on math problems, under policy lag, in one file.

"Align and Filter: Improving Performance in Asynchronous On-Policy RL", arXiv 2603.01365. Actors generate with old
versions of the model (*policy lag*). GRPO (arXiv 2402.03300) has no critic, so of VACO's two halves the *filter* acts,
on tokens: when the total variation between the model being optimised (pi) and an anchor is over a budget, the
gradients that would raise it are dropped. No clipping. The anchor is the model at the batch's arrival (pi_T), which did
better here than the one that generated (beta), the other scripts' default.

    python vaco_async_llm.py                               # a tiny model made on the spot, sums
    python vaco_async_llm.py --objective grpo              # clipped ratios in place of the filter
    python vaco_async_llm.py --lag-schedule fixed --lag 4  # by the model of 4 batches ago
    python vaco_async_llm.py --model ID_OR_FOLDER ...      # its flags: docs/language-models.md

  PolicyStore: the last versions of the model, in shared memory  <--- publish, once per batch ---  learner (train)
        | copy one version, once per rollout                                                        |        ^
  actor 0 .. actor N-1: generate and score  <--- tickets (rollout, version), through pipes ---------+        |
        | fill one slot: prompts, completions, log-probabilities, masks, rewards                             |
  completions: slots in shared memory  --- which are full, through pipes  -----------------------------------+
"""

import contextlib
import copy
import hashlib
import json
import math
import multiprocessing as mp
import os
import re
import signal
import sys
import threading
import time
import zlib
from collections import deque
from dataclasses import dataclass
from decimal import Decimal
from functools import cache, cached_property, partial
from multiprocessing.connection import wait
from typing import Literal, get_args, get_type_hints

import numpy as np
import reasoning_gym
import torch
import torch.nn as nn
import transformers
import tyro
from torch.utils.tensorboard import SummaryWriter

LATEST = -1  # as a ticket's version: the newest one at the moment the rollout begins
NUM_PROBLEMS = 2**20  # of a procedural task, for training; then they come again
# Tasks whose verifiers run completions as code
EVALUATING = {"binary_matrix", "countdown", "intermediate_integration", "n_queens", "polynomial_multiplication"}
EVALUATING |= {"puzzle24", "simple_integration", "spiral_matrix", "string_insertion"}


@dataclass
class Args:
    exp_name: str = os.path.basename(__file__)[: -len(".py")]  # the name of this experiment
    seed: int = 1  # seed of the training problems, the sampling, the minibatches and the tiny model
    cuda: bool = True  # if toggled, the learner runs on the GPU when there is one
    actor_device: Literal["cpu", "cuda"] = "cpu"  # where actors generate; they may share the learner's GPU
    learner_threads: int = 1  # CPU threads of the learner
    actor_threads: int = 1  # CPU threads of each actor; a large model has work for more
    actor_nice: int = 0  # niceness of the actors, up to 19: on cores that they share, the learner goes first
    track: bool = False  # if toggled, curves, flags and code go to Weights & Biases, too (WANDB_PROJECT, WANDB_ENTITY)
    save_model: bool = False  # if toggled, the run ends by saving its model as transformers does: runs/{run}/model
    checkpoint_interval: int = 0  # batches between checkpoints; 0: only at the end, and at Ctrl-C or SIGTERM
    resume: str = ""  # the folder of a run to go on with; its flags are kept, except those given again
    actor_timeout: float = 600.0  # seconds for one rollout, after which an actor counts as stuck; 0: no limit

    # tiny: a small Llama, warm-started on solved problems; else what transformers loads, by its hub id or folder
    model: str = "tiny"
    warm_start_batches: int = 1000  # supervised batches of 128 solved problems that the tiny model begins with, at most
    warm_start_accuracy: float = 0.5  # it stops once this share of the last 1024 problems is solved at first sight
    task: str = "chain_sum"  # of reasoning-gym, scored by its own verifier, or gsm8k, which needs the package datasets
    task_config: str = ""  # the task's options, as JSON; chain_sum has two or three one-digit terms if it says no other
    system_prompt: str = ""  # the system message, for models whose chat template has one
    max_prompt_tokens: int = 256  # the longest prompt that a slot can hold; longer training problems are passed over
    max_new_tokens: int = 6  # where a completion is cut
    temperature: float = 1.0  # the sampling temperature: the policy is what is sampled from, in actors and learner
    total_batches: int = 500  # batches to train on
    eval_interval: int = 50  # batches from one evaluation to the next
    eval_size: int = 400  # held-out problems, answered greedily; no training problem has the same question

    num_actors: int = 1  # generating processes; data is about num_actors / rollouts_per_batch batches old
    prompts_per_rollout: int = 64  # problems per rollout
    group_size: int = 4  # completions per problem, whose rewards are compared with one another
    rollouts_per_batch: int = 1  # rollouts per batch, of prompts_per_rollout * group_size completions each
    # free running; every batch exactly `lag` versions old; each rollout by one of the last `lag + 1`, drawn uniformly
    lag_schedule: Literal["async", "fixed", "mixture"] = "async"
    lag: int = 0  # policy lag of the lockstep schedules, in versions; there is one version per batch

    update_epochs: int = 1  # passes over each batch; the more, the further the policy moves on it (forward lag)
    num_minibatches: int = 2  # minibatches, that is gradient steps, per pass
    learning_rate: float = 1.5e-4  # the learning rate of Adam
    warmup_batches: int = 10  # batches in which the learning rate rises: Adam's first steps are large and blind
    anneal_lr: bool = True  # if toggled, the learning rate falls linearly to 0 over total_batches
    kl_coef: float = 0.0  # coefficient of the KL divergence to the model before training, per token
    max_grad_norm: float = 1.0  # the largest norm of a gradient

    # what holds the policy back: the filter, ratios clipped around the policy that generated, or around that at arrival
    objective: Literal["vaco", "grpo", "decoupled"] = "vaco"
    filter: bool = True  # vaco: if toggled, gradients that raise the total variation are dropped while over budget
    tv_threshold: float = 0.005  # vaco: the budget, 1/2 mean |pi - anchor|/beta of a token: THE 1/2 IS INCLUDED
    # vaco: measured from the policy at the batch's arrival, or the one that generated (0.1 was the best budget there)
    tv_anchor: Literal["behavior", "learner"] = "learner"
    clip_coef: float = 0.2  # grpo, decoupled: ratios are clipped to 1 - clip_coef .. 1 + clip_coef

    def __post_init__(self):
        at_least_1 = ("num_", "total_", "prompts_", "rollouts_", "update_", "eval_", "max_prompt", "max_new")
        for name, hint in get_type_hints(Args).items():
            value = getattr(self, name)
            choices = get_args(hint) or (hint,)  # of a Literal, or types
            if value not in choices and type(value) not in choices and not (float in choices and type(value) is int):
                raise ValueError(f"--{name.replace('_', '-')} {value!r}: must be one of {choices}")
            lowest = {"group_size": 2, "temperature": 0.001}.get(name, int(name.startswith(at_least_1)))
            if type(value) in (int, float) and not value >= lowest:
                raise ValueError(f"--{name.replace('_', '-')} {value}: must be at least {lowest}")
        if self.lag and self.lag_schedule == "async":
            raise ValueError(f"--lag {self.lag}: needs --lag-schedule fixed or mixture; async varies by --num-actors")
        if self.num_minibatches > self.rollouts_per_batch * self.prompts_per_rollout * self.group_size:
            raise ValueError(f"--num-minibatches {self.num_minibatches}: a batch has not so many completions")
        if self.actor_device == "cuda" and not (self.cuda and torch.cuda.is_available()):
            raise ValueError("--actor-device cuda: needs a GPU, and not --no-cuda")
        if self.resume and not os.path.exists(f"{self.resume}/checkpoint.pt"):
            raise ValueError(f"--resume {self.resume}: is not the folder of a run, with a checkpoint.pt")
        if self.task in EVALUATING:
            raise ValueError(f"--task {self.task}: its verifier runs completions as code")
        if self.task != "gsm8k":
            make_problems(self.task, self.task_config, self.seed % 1024 * NUM_PROBLEMS)


@cache
def make_problems(task, task_config, seed):
    """The problems of a procedural task of reasoning-gym. Raises ValueError if it has none with these options."""
    options = {"size": NUM_PROBLEMS}
    if task == "chain_sum":
        options |= {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1}
    elif task in ("acre", "word_ladder"):  # acre makes all at once, which takes long; word_ladder takes no more
        options["size"] = 20000
    try:
        return reasoning_gym.create_dataset(task, seed=seed, **options | json.loads(task_config or "{}"))
    except Exception as error:  # no such task, no JSON, an option that is not there, a value that the task refuses
        raise ValueError(f"--task {task}: cannot make problems with options '{task_config}': {error}") from None


def held_out(question):
    """Whether a question is kept for evaluation. A quarter is, by a checksum of its words with their signs, sorted: so
    8 + 7 and 7 + 8 are kept together."""
    words = sorted(re.findall(r"(-?)\s*(\w+)", question))
    return zlib.crc32(repr(words).encode()) % 4 == 0


class Problems:
    """The problems of a task: `test`, a list of entries for evaluation, and endlessly many for training, by number.

    An entry is a dict with `question` and `answer`. Of a procedural task a quarter is held out, together with what has
    the same terms in another order: none of it is trained on, and the test problems, the same for all `--seed`s, are of
    it, each once."""

    def __init__(self, args):
        self.args = args
        if args.task == "gsm8k":  # arXiv 2110.14168
            import datasets

            splits = [datasets.load_dataset("openai/gsm8k", "main", split=split) for split in ("train", "test")]
            self.train, test = ([row | {"answer": last_number(row["answer"])} for row in split] for split in splits)
            np.random.default_rng(args.seed).shuffle(self.train)
            self.test = test[: args.eval_size]
            self.held_out = {entry["question"] for entry in self.test}.__contains__
            self.verify = lambda answer, entry: as_number(answer) == as_number(entry["answer"])
        else:
            self.train = make_problems(args.task, args.task_config, args.seed % 1024 * NUM_PROBLEMS)
            self.held_out = held_out
            self.verify = self.train.score_answer

    @cached_property
    def test(self):
        """`--eval-size` problems, or fewer, if the task does not have so many."""
        entries = make_problems(self.args.task, self.args.task_config, 1024 * NUM_PROBLEMS)
        found = {}
        for number in range(min(16 * self.args.eval_size, len(entries))):
            entry = entries[number]  # made anew at each access
            if self.held_out(entry["question"]):
                found.setdefault(entry["question"], entry)
            if len(found) == self.args.eval_size:
                break
        return list(found.values())

    def find(self, number, fits=lambda question: True):
        """The training problem of a number; if that one is held out or does not fit, another in its place."""
        for _ in range(1000):
            entry = self.train[number % len(self.train)]
            if not self.held_out(entry["question"]) and fits(entry["question"]):
                return entry
            number += 7919
        sys.exit(f"--task {self.args.task}: has so few questions that all are held out, or too long")

    def score(self, text, entry):
        """What the task's verifier gives a completion, 0 to 1: for what stands in its last <answer> </answer>, if it
        has that; else for its last number, if the answer is a number; else for all of it. Numbers are right or wrong:
        the library would pay for right digits in a wrong number. What a verifier cannot judge in 5 seconds of CPU time
        gets 0."""
        answer = reasoning_gym.utils.extract_answer(text)
        expected = entry["answer"] or ""
        number = re.fullmatch(r"-?(0|[1-9]\d*|[1-9]\d{0,2}(,\d{3})+)(\.\d+)?", expected)
        if answer is None:
            answer = last_number(text) if number else text.strip()
        if number and as_number(answer) == as_number(expected):
            return 1.0
        score = verify_in_time(self.verify, answer, entry)
        return float(score >= 1) if number else score


def last_number(text):
    """The last number of a text, without thousands separators, "" if there is none: "#### 1,250" -> "1250". A number at
    the end of an expression does not count, because it is not the expression's value: "15/5" -> ""."""
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text.replace("\N{MINUS SIGN}", "-"))
    operator = r"((?<=[\d)])[ \t]*[-+*/^][ \t]*)?"
    numbers = re.findall(operator + r"(-?[ \t]?(?:\d+(?:\.\d+)?|(?<![\w.])\.\d+)(?:[eE]-?\d+)?)", text)
    operator, number = numbers[-1] if numbers else ("", "")
    return "" if operator else re.sub(r"\s|\.0$", "", number)


def as_number(text):
    """The value of what `last_number` finds: "$18.00" is 18. If there is none, NaN, which equals nothing."""
    return Decimal(last_number(text) or "NaN")


def verify_in_time(verify, answer, entry, seconds=5):
    """What a verifier gives an answer: 0 if it fails, or takes more CPU time, so the machine's load changes nothing."""
    signal.signal(signal.SIGVTALRM, lambda *_: sys.exit())  # passes every `except Exception` of a verifier
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 0.1)  # again, if it is caught in spite of all
        return float(verify(answer, entry))
    except (Exception, SystemExit):  # not every verifier takes whatever a model may say
        return 0.0
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


class Agent(nn.Module):
    """A causal language model and its tokenizer as a policy: it samples completions, and gives their log-probabilities,
    both at the same temperature. A completion ends with a stop token, or is cut."""

    def __init__(self, config, generation_config, tokenizer, args, device="cpu"):
        super().__init__()
        self.model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        self.model.generation_config = generation_config
        self.tokenizer = tokenizer
        self.args = args
        self.eval()  # no dropout: it would pass for policy lag
        self.to(device)

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
        settings = {"max_new_tokens": self.args.max_new_tokens, "do_sample": sample, "output_scores": sample}
        # Without `top_k`, transformers would sample from the 50 most likely tokens alone
        settings |= {"temperature": self.args.temperature, "top_k": 0} if sample else {}
        attention = prompt_mask.long()
        output = self.model.generate(prompts, attention_mask=attention, return_dict_in_generate=True, **settings)
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
        logprobs = logits.log_softmax(-1)
        entropies = torch.special.entr(logprobs.detach().exp()).sum(-1) if with_entropies else None
        return logprobs.gather(2, tokens.unsqueeze(2)).squeeze(2), entropies

    @torch.no_grad()
    def get_logprobs(self, num_parts, *rows):
        """Log-probabilities [M, L] as of `evaluate`, without gradient, and in parts, because logits are large."""
        parts = zip(*(row.tensor_split(num_parts) for row in rows), strict=True)
        return torch.cat([self.evaluate(*part, with_entropies=False)[0] for part in parts])


def load_language_model(args, problems):
    """The model of the flags, in float32, and its tokenizer. `tiny` is a Llama of 0.7M parameters, with a token for
    every byte, and one for the words that all questions begin with, which say nothing."""
    if args.model == "tiny":
        tokenizer = transformers.ByT5Tokenizer(extra_ids=0)
        questions = [problems.find(number)["question"] for number in range(256)]
        start = os.path.commonprefix(questions).rpartition(" ")[0]  # noqa: RUF071, these are no paths
        tokenizer.add_tokens([start] if start else [])
        settings = {"vocab_size": len(tokenizer), "max_position_embeddings": 1024, "tie_word_embeddings": True}
        settings |= {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
        settings |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    if args.max_prompt_tokens + args.max_new_tokens > room:
        sys.exit(f"--max-prompt-tokens and --max-new-tokens: {args.model} has room for {room} tokens, both included")
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    # The format of a base model, which has none
    plain = "{{ bos_token }}{% for message in messages %}{{ message['content'] + '\n' }}{% endfor %}"
    tokenizer.chat_template = tokenizer.chat_template or plain
    stops = {*np.atleast_1d(model.generation_config.eos_token_id).tolist(), tokenizer.eos_token_id} - {None}
    settings = {"eos_token_id": sorted(stops), "pad_token_id": tokenizer.pad_token_id}
    model.generation_config = transformers.GenerationConfig(**settings)  # and none of its own rules for sampling
    return model, tokenizer


def warm_start(args, agent, problems):
    """Train the tiny model on solved problems, so that reinforcement has something to improve, and stop early. The
    result is kept in runs/warm_starts, for runs with the same seed and task."""
    key = [args.seed, args.task, args.task_config, args.system_prompt, args.warm_start_batches]
    key += [args.warm_start_accuracy, agent.model.config.to_dict(), "held out in whatever order"]
    key += [module.__version__ for module in (torch, transformers, reasoning_gym)]
    path = f"runs/warm_starts/{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.pt"
    if os.path.exists(path):
        agent.load_state_dict(torch.load(path, weights_only=True))
        print(f"warm start: {path}", flush=True)
        return
    optimizer = torch.optim.AdamW(agent.parameters(), lr=1e-3, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.02, total_iters=50)
    solved = deque(maxlen=8)
    for batch in range(args.warm_start_batches):
        first = NUM_PROBLEMS // 2 + batch * 128  # reinforcement takes them from 0 on
        entries = [problems.find(number) for number in range(first, first + 128)]
        prompts, prompt_mask = agent.encode([entry["question"] for entry in entries])
        texts = [entry["answer"] + agent.tokenizer.eos_token for entry in entries]
        settings = {"add_special_tokens": False, "padding": True, "padding_side": "right", "return_tensors": "pt"}
        answers = agent.tokenizer(texts, **settings)
        if answers.input_ids.shape[1] > args.max_new_tokens:
            sys.exit(f"--max-new-tokens {args.max_new_tokens}: an answer has {answers.input_ids.shape[1]}")
        ids = torch.cat([prompts, answers.input_ids], 1)
        attention = torch.cat([prompt_mask, answers.attention_mask], 1)
        labels = ids.masked_fill(attention == 0, -100)
        labels[:, : prompts.shape[1]] = -100
        output = agent.model(input_ids=ids, attention_mask=attention, labels=labels)
        right = output.logits[:, :-1].argmax(-1) == labels[:, 1:]
        solved.append((right | (labels[:, 1:] < 0)).all(1).float().mean().item())
        if batch % 50 == 0:
            print(f"warm start: solves {np.mean(solved):.1%} after {batch} batches", flush=True)
        if np.mean(solved) >= args.warm_start_accuracy:
            break
        optimizer.zero_grad()
        output.loss.backward()
        nn.utils.clip_grad_norm_(agent.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    os.makedirs("runs/warm_starts", exist_ok=True)
    torch.save(agent.state_dict(), f"{path}.{os.getpid()}")
    os.replace(f"{path}.{os.getpid()}", path)  # other runs may make the same one at this moment


def accuracy(agent, problems, device, sample=False):
    """Share of the test problems that the most likely completion, or a sampled one, solves."""
    right = 0
    for first in range(0, len(problems.test), 64):
        entries = problems.test[first : first + 64]
        prompts, prompt_mask = agent.encode([entry["question"] for entry in entries])
        tokens, _, mask = agent.generate(prompts.to(device), prompt_mask.to(device), sample)
        right += sum(score >= 1 for score in map(problems.score, agent.decode(tokens, mask), entries))
    return right / len(problems.test)


def group_advantages(rewards, group_size):
    """GRPO (arXiv 2402.03300, section 4.1.2): rewards [S], group after group -> advantages (r - mean) / (std + 1e-6)
    [S], and the share of groups whose rewards do not vary: their advantages are 0."""
    groups = rewards.view(-1, group_size)
    same = (groups == groups[:, :1]).all(1, keepdim=True)
    advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, correction=0, keepdim=True) + 1e-6)
    return advantages.masked_fill(same, 0).flatten(), same.float().mean()


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


def llm_minibatch(agent, args, advantages, inputs, behavior_logprobs, learner_logprobs, reference_logprobs=None):
    """Forward pass of one gradient step: M completions of a batch -> loss (scalar), {what is logged: scalar tensor}.
    All means are over the K tokens within the mask."""
    newlogprobs, entropies = agent.evaluate(*inputs)  # [M, L]
    mask = inputs[-1]
    newlogprobs = newlogprobs[mask]  # [K], as all that follows
    behavior_logprobs = behavior_logprobs[mask]
    log_ratios = newlogprobs - behavior_logprobs
    ratios = log_ratios.exp()  # pi/beta
    advantages = advantages.unsqueeze(1).expand_as(mask)[mask]
    learner_logprobs = learner_logprobs[mask]
    learner_ratios = (learner_logprobs - behavior_logprobs).exp()
    anchor_ratios = learner_ratios if args.tv_anchor == "learner" else 1.0
    keep, tv = tv_filter(ratios.detach(), advantages, args.tv_threshold, anchor_ratios)
    if args.objective == "vaco":
        keep = keep | (not args.filter)
        # Dropped tokens count in the mean, so they shorten the step
        policy_loss = -torch.where(keep, ratios * advantages, 0).mean()
    else:  # PPO-clip, arXiv 1707.06347
        proximal_ratios = ratios
        importance = 1.0
        if args.objective == "decoupled":  # clipped around the policy at arrival, weighted by it over beta: 2110.00641
            proximal_ratios = (newlogprobs - learner_logprobs).exp()
            importance = learner_ratios.clamp(max=10)
        clipped_ratios = proximal_ratios.clamp(1 - args.clip_coef, 1 + args.clip_coef)
        policy_loss = (importance * torch.max(-proximal_ratios * advantages, -clipped_ratios * advantages)).mean()
        keep = (advantages * (proximal_ratios - 1) <= 0) | ((proximal_ratios - 1).abs() <= args.clip_coef)
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
    # The same estimator, of KL(pi, reference), but on tokens that beta drew
    to_reference = reference_logprobs[mask] - newlogprobs
    reference_kl = (to_reference.exp() - 1 - to_reference).mean()
    return policy_loss + args.kl_coef * reference_kl, logs | {"losses/reference_kl": reference_kl.detach()}


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


def generator(args, index, first_version, make_agent, load_problems, store, completions, learner):
    """An actor process. Takes tickets (rollout, version) from the connection `learner`, loads that version of
    the model, fills the rollout's slot, and sends (rollout, version, seconds waited, seconds taken). What is in a
    rollout depends on its number and version alone, not on `index` and `first_version`."""
    for number in (signal.SIGINT, signal.SIGTERM):  # may reach every process: it is the learner that ends the run
        signal.signal(number, signal.SIG_IGN)
    # Leave with the learner, however it ends, also from the middle of a rollout
    threading.Thread(target=lambda: wait([mp.parent_process().sentinel]) and os._exit(1), daemon=True).start()
    signal.setitimer(signal.ITIMER_REAL, args.actor_timeout)  # at the alarm, the process ends
    torch.set_num_threads(args.actor_threads)
    os.nice(args.actor_nice)
    agent = make_agent()
    problems = load_problems()
    while True:
        signal.setitimer(signal.ITIMER_REAL, 0)
        wait_start = time.perf_counter()
        rollout, version = learner.recv()
        act_start = time.perf_counter()
        signal.setitimer(signal.ITIMER_REAL, args.actor_timeout)
        version = store.load(agent, version)
        out = {name: field[rollout % len(field)] for name, field in completions.items()}
        generate_rollout(args, agent, problems, rollout, out)
        learner.send((rollout, version, act_start - wait_start, time.perf_counter() - act_start))


def generate_rollout(args, agent, problems, rollout, out):
    """Fill one slot, {name: tensor}: generate and score completions, as seed and the rollout's number say alone."""
    torch.manual_seed(int(np.random.default_rng((args.seed, rollout, 1)).integers(2**63)))
    first = rollout * args.prompts_per_rollout
    entries = [problems.find(first + i, agent.fits) for i in range(args.prompts_per_rollout)]
    entries = [entry for entry in entries for _ in range(args.group_size)]
    prompts, prompt_mask = agent.encode([entry["question"] for entry in entries])
    device = agent.model.device
    tokens, logprobs, mask = agent.generate(prompts.to(device), prompt_mask.to(device))
    for field in out.values():
        field.zero_()
    out["prompts"][:, -prompts.shape[1] :] = prompts
    out["prompt_mask"][:, -prompts.shape[1] :] = prompt_mask
    out["tokens"][:, : tokens.shape[1]] = tokens
    out["logprobs"][:, : tokens.shape[1]] = logprobs
    out["mask"][:, : tokens.shape[1]] = mask
    out["rewards"][:] = torch.tensor(list(map(problems.score, agent.decode(tokens, mask), entries)))


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


def check_finite(place, numbers):
    """End the run if any of `numbers`, {name: tensor}, is not finite."""
    broken = [name for name, value in numbers.items() if not torch.isfinite(value).all()]
    if broken:
        sys.exit(f"not finite: {', '.join(broken)} {place}")


def train(args):
    """Train a model and return it, as an `Agent`: a whole run, from the flags (`Args`) to the summary line. Raises
    SystemExit if the run ends early: after SIGINT or SIGTERM, or because of actors or numbers that fail."""
    new_folder = f"runs/{args.task}__{args.exp_name}__{args.seed}__{int(1000 * time.time())}"
    folder = os.path.normpath(args.resume or new_folder)
    if args.track:
        import wandb

        run_id = os.path.basename(folder)
        wandb.init(id=run_id, name=run_id, resume="allow", config=vars(args), sync_tensorboard=True, save_code=True)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.learner_threads)
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")

    problems = Problems(args)
    model, tokenizer = load_language_model(args, problems)
    make_agent = partial(Agent, model.config, model.generation_config, tokenizer, args)
    make_actor_agent = partial(make_agent, device if args.actor_device == "cuda" else "cpu")
    agent = make_agent()
    agent.model.load_state_dict(model.state_dict())
    del model
    if args.model == "tiny" and (args.kl_coef or not args.resume):  # a run that goes on has its own weights
        warm_start(args, agent, problems)
    agent.to(device)
    reference = copy.deepcopy(agent) if args.kl_coef else None
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, fused=True)
    store = PolicyStore(agent, num_versions=max(args.lag + 1, 2))
    store.publish(agent, 0)
    # As many slots as one batch needs, and at least one per actor: more would make data older, and nothing faster
    S = args.num_actors * math.ceil(args.rollouts_per_batch / args.num_actors)
    size = (S, args.prompts_per_rollout * args.group_size)
    completions = {  # prompts end, and completions begin, at the border between the two
        "prompts": torch.zeros(*size, args.max_prompt_tokens, dtype=torch.long).share_memory_(),
        "prompt_mask": torch.zeros(*size, args.max_prompt_tokens, dtype=torch.bool).share_memory_(),
        "tokens": torch.zeros(*size, args.max_new_tokens, dtype=torch.long).share_memory_(),
        "mask": torch.zeros(*size, args.max_new_tokens, dtype=torch.bool).share_memory_(),
        "logprobs": torch.zeros(*size, args.max_new_tokens).share_memory_(),  # of the version that generated
        "rewards": torch.zeros(*size).share_memory_(),
    }

    global_step = 0  # tokens of completions that were trained on
    version = 0
    accuracies = []  # before training, and at each evaluation
    modules = {"agent": agent, "optimizer": optimizer, "store": store}
    checkpoint = f"{folder}/checkpoint.pt"
    if args.resume:
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
        for name, module in modules.items():
            module.load_state_dict(saved[name])
        torch.set_rng_state(saved["rng"])
        global_step = saved["global_step"]
        version = saved["version"]
        accuracies = saved["accuracies"]
        del saved  # it may be gigabytes

    def save():
        """Write all that the run needs to go on. The file is whole at every moment: the old one or the new."""
        state = {name: module.state_dict() for name, module in modules.items()} | {"rng": torch.get_rng_state()}
        state |= {"args": vars(args), "global_step": global_step, "version": version, "accuracies": accuracies}
        torch.save(state, f"{checkpoint}.tmp")
        os.replace(f"{checkpoint}.tmp", checkpoint)

    writer = SummaryWriter(folder, purge_step=version + 1 if args.resume else None)
    table = "\n".join(f"|{name}|{value}|" for name, value in vars(args).items())
    writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}")
    actors = Actors(args, S, version, generator, make_actor_agent, partial(Problems, args), store, completions)
    try:
        if not args.resume:
            accuracies.append(accuracy(agent, problems, device))
            writer.add_scalar("charts/accuracy", accuracies[0], 0)
        first_step = global_step
        train_seconds = 0.0
        batch_start = time.perf_counter()
        while version < args.total_batches:
            # COLLECT a batch, copy it, and let its slots be filled again while we train
            wait_start = time.perf_counter()
            collected = actors.collect(batch=version)
            if actors.stop_reasons:
                break
            learner_wait = time.perf_counter() - wait_start
            collected, versions, wait_times, act_times = map(list, zip(*collected, strict=True))
            slots = [rollout % S for rollout in collected]
            batch = {name: field[slots].flatten(0, 1) for name, field in completions.items()}  # S of all rollouts
            actors.issue(newest=version, freed=collected)
            check_finite(f"in the data of batch {version}", batch)
            # Without columns that are padding alone
            prompt_columns = batch["prompt_mask"].any(0)
            b_prompts = batch["prompts"][:, prompt_columns].to(device)  # [S, P]
            b_prompt_mask = batch["prompt_mask"][:, prompt_columns].to(device)
            columns = batch["mask"].any(0)
            b_tokens = batch["tokens"][:, columns].to(device)  # [S, L]
            b_mask = batch["mask"][:, columns].to(device)
            b_behavior_logprobs = batch["logprobs"][:, columns].to(device)

            # ALIGN: advantages within groups, once per batch; without a critic there is no more to align
            b_advantages, without_variance = group_advantages(batch["rewards"].to(device), args.group_size)  # [S]
            inputs = (b_prompts, b_prompt_mask, b_tokens, b_mask)
            b_learner_logprobs = agent.get_logprobs(args.num_minibatches, *inputs)  # [S, L]
            learner_ratios = (b_learner_logprobs - b_behavior_logprobs)[b_mask].exp()  # [K], pi_T/beta
            b_logprobs = [b_behavior_logprobs, b_learner_logprobs]
            if reference:
                b_logprobs.append(reference.get_logprobs(args.num_minibatches, *inputs))

            # FILTER: minibatch updates of pi
            lr = args.learning_rate * (1 - version / args.total_batches if args.anneal_lr else 1)
            lr *= min((version + 1) / max(args.warmup_batches, 1), 1)
            optimizer.param_groups[0]["lr"] = lr
            minibatch_logs = []
            for _ in range(args.update_epochs):
                rows = torch.randperm(len(b_advantages)).to(device)
                for mb in rows.tensor_split(args.num_minibatches):
                    mb_inputs = [field[mb] for field in inputs]
                    mb_logprobs = [logprobs[mb] for logprobs in b_logprobs]
                    loss, logs = llm_minibatch(agent, args, b_advantages[mb], mb_inputs, *mb_logprobs)
                    optimizer.zero_grad()
                    loss.backward()
                    logs["losses/grad_norm"] = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                    optimizer.step()
                    minibatch_logs.append(logs)

            # PUBLISH the next version
            final_logprobs = agent.get_logprobs(args.num_minibatches, *inputs)
            final_ratios = (final_logprobs - b_behavior_logprobs)[b_mask].exp()  # [K], pi/beta
            means = {name: torch.stack([logs[name] for logs in minibatch_logs]).mean() for name in minibatch_logs[0]}
            check_finite(f"in batch {version}", means | agent.state_dict())
            version += 1
            store.publish(agent, version)
            actors.issue(newest=version)
            global_step += len(final_ratios)

            # LOG, against batches
            batch_seconds = time.perf_counter() - batch_start
            train_seconds += batch_seconds
            stops = torch.tensor(agent.model.generation_config.eos_token_id, device=device)
            scalars = means | {
                "charts/reward": batch["rewards"].mean(),
                "charts/cut": 1 - (torch.isin(b_tokens, stops) & b_mask).any(1).float().mean(),
                "charts/completion_length": len(final_ratios) / len(b_mask),
                "filter/groups_without_variance": without_variance,
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
            scalars["charts/tokens_per_second"] = (global_step - first_step) / train_seconds
            if version % args.eval_interval == 0 or version == args.total_batches:
                accuracies.append(accuracy(agent, problems, device))
                scalars["charts/accuracy"] = accuracies[-1]
                shown = slice(0, 4 * args.group_size, args.group_size)
                questions = agent.decode(b_prompts[shown], b_prompt_mask[shown])
                answers = agent.decode(b_tokens[shown], b_mask[shown])
                rows = zip(questions, answers, batch["rewards"][shown], strict=True)
                lines = [f"|{question!r}|{answer!r}|{reward:.2f}|" for question, answer, reward in rows]
                writer.add_text("samples", "\n".join(["|prompt|completion|reward|\n|-|-|-|", *lines]), version)
            for name, value in scalars.items():
                writer.add_scalar(name, value, version)
            if args.checkpoint_interval and version % args.checkpoint_interval == 0:
                save()
            with contextlib.suppress(BrokenPipeError):  # what the output is piped to may have ended, as by Ctrl-C
                measured = "lag/tv_forward" if args.tv_anchor == "learner" else "lag/tv_total"
                names = ("charts/tokens_per_second", "charts/reward", "lag/versions_mean", measured)
                speed, reward, lag, tv = (scalars[name] for name in names)
                line = f"batch {version}, {speed:.0f} tokens/s, accuracy {accuracies[-1]:.1%}, reward {reward:.3f}"
                print(f"{line}, lag {lag:.1f}, TV {tv:.4f}", flush=True)
            batch_start = time.perf_counter()  # evaluation is no part of the next batch
        save()
    finally:
        actors.stop()
        writer.close()
    if version < args.total_batches:
        with contextlib.suppress(OSError):  # Ctrl-C may have ended what the output is piped to
            print(f"stopped at batch {version}; --resume {folder} goes on from there", file=sys.stderr)
        sys.exit(actors.stop_reasons[0])
    change = f"{accuracies[0]:.1%} -> {accuracies[-1]:.1%} of {len(problems.test)} held-out problems"
    print(f"{args.task}, seed {args.seed}: accuracy {change} after {version} batches; logs, weights: {folder}")
    if args.save_model:
        agent.model.save_pretrained(f"{folder}/model")
        agent.tokenizer.save_pretrained(f"{folder}/model")
        print(f"model saved; to evaluate it: python benchmark/evaluate.py {folder}")
    return agent


if __name__ == "__main__":
    resume = re.search(r".*--resume[=\0]([^\0]+)", "\0".join(sys.argv))
    options = {}
    if resume and os.path.exists(f"{resume[1]}/checkpoint.pt"):  # the flags of that run are the defaults
        flags = torch.load(f"{resume[1]}/checkpoint.pt", mmap=True, weights_only=True)["args"]
        options["default"] = Args(**flags | {"resume": resume[1]})
    train(tyro.cli(Args, description=__doc__, **options))
