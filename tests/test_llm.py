"""The language-model script: tokens, masks, groups, filter, verifier, whole runs, and wrong input."""

import contextlib
import importlib
import inspect
import json
import math
import multiprocessing as mp
import os
import re
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import vaco_async_llm
from vaco_async_llm import (
    Actors,
    Agent,
    Args,
    Problems,
    as_number,
    generate_rollout,
    group_advantages,
    last_number,
    llm_minibatch,
    load_language_model,
    train,
    verify_in_time,
    warm_start,
)

needed = {"reason": "needs pip install -r requirements-llm.txt"}
tokenizers, transformers = (pytest.importorskip(name, **needed) for name in ("tokenizers", "transformers"))
pytest.importorskip("reasoning_gym", **needed)

SMALL = Args(
    prompts_per_rollout=6,
    group_size=4,
    total_batches=5,
    eval_interval=2,
    eval_size=20,
    num_minibatches=2,
    lag_schedule="fixed",
)


def make_agent(args):
    """(Problems, Agent), before training."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    problems = Problems(args)
    model, tokenizer = load_language_model(args, problems)
    agent = Agent(model.config, model.generation_config, tokenizer, args)
    agent.model.load_state_dict(model.state_dict())
    return problems, agent


@pytest.fixture(scope="session")
def warm_model(tmp_path_factory):
    """A folder with a tiny model that solves some problems, but not all."""
    folder = tmp_path_factory.mktemp("warm")
    before = os.getcwd()
    os.chdir(folder)
    problems, agent = make_agent(SMALL)
    warm_start(replace(SMALL, warm_start_batches=40), agent, problems)
    os.chdir(before)
    agent.model.save_pretrained(folder / "model")
    agent.tokenizer.save_pretrained(folder / "model")
    return str(folder / "model")


def read_run():
    """The curves of the only run here, {tag: [values]}, and its folder."""
    (run,) = (path for path in Path("runs").iterdir() if path.name != "warm_starts")
    events = EventAccumulator(str(run))
    events.Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}, run


def collected(agent, problems, args, rollouts=(0,)):
    """A batch of some rollouts, through slots, without columns that are padding alone."""
    rows = args.prompts_per_rollout * args.group_size
    slots = []
    for number in rollouts:
        P, L = args.max_prompt_tokens, args.max_new_tokens
        slot = {"prompts": torch.ones(rows, P).long(), "prompt_mask": torch.ones(rows, P).bool()}
        slot |= {"tokens": torch.ones(rows, L).long(), "mask": torch.ones(rows, L).bool()}
        slot |= {"logprobs": torch.ones(rows, L), "rewards": torch.ones(rows)}  # what was there before must go
        generate_rollout(args, agent, problems, number, slot)
        slots.append(slot)
    batch = SimpleNamespace(**{name: torch.cat([slot[name] for slot in slots]) for name in slots[0]})
    batch.prompts = batch.prompts[:, batch.prompt_mask.any(0)]
    batch.prompt_mask = batch.prompt_mask[:, batch.prompt_mask.any(0)]
    batch.tokens = batch.tokens[:, batch.mask.any(0)]
    batch.logprobs = batch.logprobs[:, batch.mask.any(0)]
    batch.mask = batch.mask[:, batch.mask.any(0)]
    return batch


def minibatch(agent, args, batch, advantages, *reference_logprobs):
    """The loss and the logs of a batch whose policy has not changed since it was generated."""
    inputs = (batch.prompts, batch.prompt_mask, batch.tokens, batch.mask)
    return llm_minibatch(agent, args, advantages, inputs, batch.logprobs, batch.logprobs, *reference_logprobs)


@pytest.fixture(scope="session")
def gpt2_model(tmp_path_factory):
    """A folder with a model that tells positions apart, which Llama does not as long as distances are the same."""
    folder = str(tmp_path_factory.mktemp("gpt2"))
    tokenizer = transformers.ByT5Tokenizer(extra_ids=0)
    settings = {
        "vocab_size": 259,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 512,
        "initializer_range": 0.2,
    }
    torch.manual_seed(0)
    settings |= {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("model", "temperature"), [("warm", 1.0), ("warm", 0.7), ("gpt2", 1.0)])
def test_zero_lag_ratio_is_one(model, temperature, request):
    """Per token, with prompts and completions of different lengths, in two rollouts with different padding; and the
    same numbers come from one sequence at a time without any padding, cache or mask."""
    task_config = json.dumps({"min_terms": 2, "max_terms": 5, "min_digits": 1, "max_digits": 4})
    model = request.getfixturevalue(f"{model}_model")
    args = replace(SMALL, model=model, temperature=temperature, task_config=task_config)
    problems, agent = make_agent(args)
    agent.model.generation_config.eos_token_id += list(range(50, 60))  # some completions end early, whatever the model
    batch = collected(agent, problems, args, rollouts=(0, 3))
    lengths = batch.mask.sum(1)
    assert lengths.min() < lengths.max() and len(set(batch.prompt_mask.sum(1).tolist())) > 2
    logprobs = agent.get_logprobs(3, batch.prompts, batch.prompt_mask, batch.tokens, batch.mask)
    assert (logprobs - batch.logprobs)[batch.mask].abs().max() < 1e-4
    for i in range(0, 48, 7):
        prompt, length = batch.prompts[i][batch.prompt_mask[i]], lengths[i]
        sequence = torch.cat([prompt, batch.tokens[i, :length]])
        with torch.no_grad():
            logits = agent.model(input_ids=sequence[None]).logits[0, len(prompt) - 1 : -1] / temperature
        expected = torch.distributions.Categorical(logits=logits).log_prob(batch.tokens[i, :length])
        torch.testing.assert_close(batch.logprobs[i, :length], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_tokens_are_drawn_with_the_probabilities_that_are_recorded(temperature, warm_model):
    args = replace(SMALL, model=warm_model, temperature=temperature, max_new_tokens=1)
    _, agent = make_agent(args)
    prompts, prompt_mask = agent.encode(["1 + 1 ="])
    tokens, logprobs, _ = agent.generate(prompts.expand(5000, -1), prompt_mask.expand(5000, -1))
    total = 0
    for token in tokens.unique():
        drawn = tokens == token
        total += logprobs[drawn][0].exp()
        assert drawn.float().mean() == pytest.approx(logprobs[drawn][0].exp().item(), abs=0.03)
    assert len(tokens.unique()) > 5
    assert total == pytest.approx(1, abs=0.02)


def test_completions_end_with_the_first_stop_token_or_are_cut():
    problems, agent = make_agent(SMALL)
    stops = [agent.tokenizer.eos_token_id, *range(20, 100)]  # so that many end, at different places
    agent.model.generation_config.eos_token_id = stops
    batch = collected(agent, problems, SMALL)
    assert 0 < batch.mask.sum(1).min() < batch.mask.sum(1).max() <= SMALL.max_new_tokens
    for tokens, mask in zip(batch.tokens.tolist(), batch.mask.tolist(), strict=True):
        end = next((t + 1 for t, token in enumerate(tokens) if token in stops), len(tokens))
        assert mask == [t < end for t in range(len(tokens))]
    prompts = agent.decode(batch.prompts, batch.prompt_mask)
    expected = [problems.find(i // 4)["question"] + "\n" for i in range(24)]
    assert prompts == expected  # nothing of a prompt is lost, and groups stay together


def test_rewards_are_those_of_each_completion(warm_model):
    problems, agent = make_agent(replace(SMALL, model=warm_model))
    batch = collected(agent, problems, SMALL, rollouts=(0, 1))
    answers = agent.decode(batch.tokens, batch.mask)
    rewards = [problems.score(answer, problems.find(i // 4)) for i, answer in enumerate(answers)]
    assert batch.rewards.tolist() == rewards != rewards[::-1] and 0 < sum(rewards) < 48


def test_each_rollout_has_noise_of_its_own(warm_model):
    problems, agent = make_agent(replace(SMALL, model=warm_model))
    problems.find = lambda number, fits=None: problems.train[0]
    batch = collected(agent, problems, SMALL, rollouts=(0, 1, 0))
    first, second, again = batch.tokens.split(24)
    assert torch.equal(first, again) and not torch.equal(first, second)
    other = collected(agent, problems, replace(SMALL, seed=2)).tokens
    assert not torch.equal(first[:, : other.shape[1]], other)


def test_a_models_own_rules_for_sampling_do_not_hold(warm_model):
    shutil.copytree(warm_model, "model")
    rules = json.loads(Path("model/generation_config.json").read_text())
    rules |= {"do_sample": True, "top_p": 0.5, "repetition_penalty": 1.3}
    Path("model/generation_config.json").write_text(json.dumps(rules))
    problems, agent = make_agent(replace(SMALL, model="model"))
    batch = collected(agent, problems, SMALL)
    logprobs = agent.get_logprobs(1, batch.prompts, batch.prompt_mask, batch.tokens, batch.mask)
    assert (logprobs - batch.logprobs)[batch.mask].abs().max() < 1e-4


def test_the_system_prompt_comes_first():
    _, agent = make_agent(replace(SMALL, system_prompt="Be brief."))
    assert agent.decode(*agent.encode(["1 + 1 ="])) == ["Be brief.\n1 + 1 =\n"]


def test_what_the_mask_excludes_changes_nothing(warm_model):
    problems, agent = make_agent(replace(SMALL, model=warm_model))
    batch = collected(agent, problems, SMALL)
    advantages = torch.randn(24)
    assert not batch.mask.all() and not batch.prompt_mask.all()

    def gradients():
        agent.zero_grad()
        loss, logs = minibatch(agent, SMALL, batch, advantages, batch.logprobs - 0.1)
        loss.backward()
        return [loss.detach(), *logs.values(), *(parameter.grad.clone() for parameter in agent.parameters())]

    clean = gradients()
    batch.prompts[~batch.prompt_mask], batch.tokens[~batch.mask] = 50, 51
    batch.logprobs[~batch.mask] = -7.0
    for before, after in zip(clean, gradients(), strict=True):
        torch.testing.assert_close(before, after, atol=1e-6, rtol=1e-4)


def test_group_advantages_by_hand():
    rewards = torch.tensor([1.0, 0, 0, 1, 0.5, 0.5, 0.5, 0.5, 1, 0, 0, 0])
    advantages, without_variance = group_advantages(rewards, 4)
    third = [0.75 / (3**0.5 / 4), *[-0.25 / (3**0.5 / 4)] * 3]
    torch.testing.assert_close(advantages, torch.tensor([1.0, -1, -1, 1, 0, 0, 0, 0, *third]), atol=1e-4, rtol=1e-4)
    assert without_variance == pytest.approx(1 / 3)
    assert not group_advantages(torch.full((7,), 0.1), 7)[0].any()  # though their mean is not 0.1, by rounding


class FixedAgent:
    """Gives the log-probabilities it is told to."""

    def __init__(self, logprobs):
        self.logprobs = logprobs

    def evaluate(self, *_):
        return self.logprobs, torch.ones_like(self.logprobs)


RATIOS = torch.tensor([[1.5, 1.1, 9.0], [0.5, 1.0, 1.3]])  # the 9 is outside the mask
MASK = torch.tensor([[True, True, False], [True, True, True]])
LEARNER_RATIOS = torch.tensor([[1.5, 1.0, 0.1], [0.8, 1.0, 1.0]])
ADVANTAGES = torch.tensor([1.0, -2.0])  # D = 1/2 (.5 + .1 + .5 + 0 + .3) / 5 = 0.14


def minibatch_by_hand(args, reference_logprobs=None):
    logprobs, behavior = (RATIOS.log() - 1).requires_grad_(), torch.full((2, 3), -1.0)
    inputs = (None, None, None, MASK)
    learner = LEARNER_RATIOS.log() - 1
    loss, logs = llm_minibatch(FixedAgent(logprobs), args, ADVANTAGES, inputs, behavior, learner, reference_logprobs)
    loss.backward()
    return loss.item(), logprobs.grad, {name: value.item() for name, value in logs.items()}


@pytest.mark.parametrize(
    ("threshold", "kept"),
    [
        (0.141, [[1, 1, 0], [1, 1, 1]]),  # under the budget: all tokens of the mask
        (0.139, [[0, 0, 0], [0, 1, 1]]),  # over it: of A (r - 1) = .5 .1; 1 0 -.6 those that are not positive
    ],
)
def test_filter_by_hand_over_tokens(threshold, kept):
    loss, gradient, logs = minibatch_by_hand(Args(tv_threshold=threshold, tv_anchor="behavior"))
    kept = torch.tensor(kept)
    terms = RATIOS * ADVANTAGES[:, None] * kept
    assert loss == pytest.approx(-terms.sum().item() / 5)
    torch.testing.assert_close(gradient, -terms / 5)
    assert logs["filter/gate_open"] == (threshold < 0.14)
    assert logs["filter/dropped"] == pytest.approx(1 - kept.sum().item() / 5)


def test_filter_is_off_or_anchored_at_the_learner_by_flag():
    terms = RATIOS * ADVANTAGES[:, None] / 5
    _, gradient, logs = minibatch_by_hand(Args(tv_threshold=0.01, filter=False))
    torch.testing.assert_close(gradient, -terms * MASK)
    assert logs["filter/dropped"] == 0 and logs["filter/gate_open"] == 1
    # D = 1/2 (0 + .1 + .3 + 0 + .3) / 5 = 0.07 from the learner's policy; A (r - pi_T/beta) = 0 .1; .6 0 -.6
    for threshold, kept in ((0.071, [[1, 1, 0], [1, 1, 1]]), (0.069, [[1, 0, 0], [0, 1, 1]])):
        _, gradient, _ = minibatch_by_hand(Args(tv_threshold=threshold, tv_anchor="learner"))
        torch.testing.assert_close(gradient, -terms * torch.tensor(kept))


def test_grpo_without_clipping_is_vaco_without_the_filter():
    vaco = minibatch_by_hand(Args(filter=False))
    grpo = minibatch_by_hand(Args(objective="grpo", clip_coef=1e6))
    assert vaco[0] == grpo[0] and torch.equal(vaco[1], grpo[1])


def test_grpo_by_hand_over_tokens():
    loss, gradient, logs = minibatch_by_hand(Args(objective="grpo", clip_coef=0.2))
    # A > 0: 1.5 is clipped at 1.2; A < 0: 0.5 is clipped at 0.8
    assert loss == pytest.approx(-(1.2 + 1.1 - 2 * (0.8 + 1.0 + 1.3)) / 5)
    expected = -torch.tensor([[0, 1.1, 0], [0, -2.0, -2.6]]) / 5
    torch.testing.assert_close(gradient, expected)
    assert logs["filter/dropped"] == pytest.approx(2 / 5)


def test_decoupled_by_hand_over_tokens():
    loss, gradient, logs = minibatch_by_hand(Args(objective="decoupled", clip_coef=0.2))
    # pi/pi_T is 1 1.1; 0.625 1 1.3, of which 0.625 is clipped at 0.8; its weight pi_T/beta is 0.8
    assert loss == pytest.approx(-(1.5 + 1.1 - 2 * (0.8 * 0.8 + 1.0 + 1.3)) / 5)
    torch.testing.assert_close(gradient, -torch.tensor([[1.5, 1.1, 0], [0, -2.0, -2.6]]) / 5)
    assert logs["filter/dropped"] == pytest.approx(1 / 5)


def test_reference_kl_by_hand():
    """The estimator k3, exp(d) - 1 - d with d = log reference - log pi, over the tokens of the mask."""
    difference = torch.tensor([[0.3, -0.2, 5.0], [0.0, 0.1, -0.4]])
    args = Args(tv_threshold=1, kl_coef=0.5)
    plain, _, _ = minibatch_by_hand(args)
    loss, _, logs = minibatch_by_hand(args, reference_logprobs=RATIOS.log() - 1 + difference)
    expected = np.mean([math.exp(d) - 1 - d for d in (0.3, -0.2, 0.0, 0.1, -0.4)])
    assert logs["losses/reference_kl"] == pytest.approx(expected, rel=1e-4)
    assert loss == pytest.approx(plain + 0.5 * expected, rel=1e-4)


def test_verifier_on_known_answers():
    problems = Problems(Args(eval_size=3))
    entry = {"question": "", "answer": "12", "metadata": {}}
    for text in ("12", " 12\n", "12.0", "The sum is 12.", "3 + 9 = 12", "<answer>12</answer> or 13", "+12"):
        assert problems.score(text, entry) == 1, text
    for text in ("", "13", "-12", "112", "12 or 13", "<answer>13</answer> 12", "<answer></answer> 12", "twelve"):
        assert problems.score(text, entry) == 0, text
    assert problems.score("5 - 8 is -3", {"question": "", "answer": "-3", "metadata": {}}) == 1
    decimal = {"question": "", "answer": "12.0", "metadata": {}}
    thousands = {"question": "", "answer": "1,250", "metadata": {}}
    bits = {"question": "", "answer": "0110", "metadata": {}}
    problems.verify = lambda answer, entry: answer == entry["answer"]
    for text, expected, score in (
        ("It is 12.0", decimal, 1),
        ("12", decimal, 1),
        ("12.5", decimal, 0),
        ("1,2", entry, 0),
        ("It is 1250", thousands, 1),
        ("<answer>1,250</answer>", thousands, 1),
        ("1,25", thousands, 0),
        ("0110", bits, 1),
        ("110", bits, 0),  # digits, not a number
    ):
        assert problems.score(text, expected) == score, (text, expected)
    words = Problems(Args(task="letter_counting", eval_size=3))
    assert words.score(words.test[0]["answer"], words.test[0]) == 1
    factors = Problems(Args(task="prime_factorization", eval_size=3))  # its verifier raises on words
    assert factors.score("three", factors.test[0]) == 0 < factors.score(factors.test[0]["answer"], factors.test[0])


def test_tasks_with_few_problems():
    """word_ladder refuses more than 20000; `size` is an option like all others."""
    words = Problems(Args(task="word_ladder", eval_size=3))
    assert words.score(words.test[0]["answer"], words.test[0]) == 1 and len(words.train) == 20000
    few = Problems(Args(task="letter_counting", task_config='{"size": 40}', eval_size=100))
    assert 1 < len(few.test) < 40 and few.find(10**6)["question"] not in {entry["question"] for entry in few.test}


@pytest.mark.parametrize("swallows", [(), Exception], ids=["", "a verifier that swallows errors"])
def test_a_verifier_that_does_not_end_gives_0(swallows):
    start = time.process_time()

    def verify(answer, entry):
        for _ in range(2):
            with contextlib.suppress(swallows):
                while time.process_time() < start + 3:
                    pass
        return 1.0

    assert verify_in_time(verify, "", {}, seconds=0.2) == 0 and time.process_time() < start + 2
    assert verify_in_time(lambda *_: time.sleep(0.5) or 1.0, "", {}, seconds=0.2) == 1  # waiting is no CPU time
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)


def test_tasks_whose_verifiers_run_completions_as_code_are_refused():
    found = {
        name
        for name, (task, _) in vaco_async_llm.reasoning_gym.factory.DATASETS.items()
        if re.search(r"\b(eval|exec|parse_expr|sympify)\(", inspect.getsource(task.score_answer))
    }
    assert found - {"number_sorting"} == vaco_async_llm.EVALUATING  # which evaluates the right answer only
    for task in found & vaco_async_llm.EVALUATING:
        with pytest.raises(ValueError, match=f"--task {task}: "):
            Args(task=task)


def test_the_warm_start_stops_as_soon_as_enough_new_problems_are_solved(warm_model):
    """Solved means what it means in `accuracy`: by the most likely completion."""
    args = replace(SMALL, model=warm_model, warm_start_batches=1)
    problems, agent = make_agent(args)
    entries = [problems.find(number) for number in range(2**19, 2**19 + 128)]
    tokens, _, mask = agent.generate(*agent.encode([entry["question"] for entry in entries]), sample=False)
    answers = agent.decode(tokens, mask)
    share = float(np.mean([answer == entry["answer"] for answer, entry in zip(answers, entries, strict=True)]))
    assert 0 < share < 1
    before = agent.model.model.norm.weight.clone()
    warm_start(replace(args, warm_start_accuracy=share), agent, problems)
    assert torch.equal(agent.model.model.norm.weight, before)
    warm_start(replace(args, warm_start_accuracy=share + 0.004), agent, problems)
    assert not torch.equal(agent.model.model.norm.weight, before)


def test_numbers_are_read_as_in_gsm8k():
    texts = {"#### 1,250": "1250", "$3.50 in all.": "3.50", "no": "", "5-7 = -2.": "-2", "4.0": "4", "1 then 2": "2"}
    texts |= {
        "\N{MINUS SIGN}3": "-3",
        "so - 3": "-3",
        "5 - 8 is -3": "-3",
        "1.\n- 3": "-3",
        ".5": ".5",
        "is 1e3": "1e3",
    }
    texts |= {"15/5": "", "5-2": "", "5 - 2": "", "(4)+3": "", "10^1000": "", "+12": "12", "v.5": "5"}  # not a value
    assert {text: last_number(text) for text in texts} == texts
    assert as_number(".5") == as_number("0.50") and as_number("1e3") == as_number("1,000")
    assert as_number("$18.00") == as_number("18") != as_number("-18") and as_number("eighteen") != as_number("no")


def test_gsm8k_through_datasets(monkeypatch):
    splits = {
        "train": [{"question": f"q{i}", "answer": f"so\n#### {i}"} for i in range(9)],
        "test": [{"question": "t", "answer": "2*600=<<2*600=1200>>1200\n#### 1,200"}],
    }
    fake = SimpleNamespace(load_dataset=lambda path, name, split: splits[split])
    monkeypatch.setitem(sys.modules, "datasets", fake)
    problems = Problems(Args(task="gsm8k"))
    assert {problems.find(number)["answer"] for number in range(9)} == set("012345678")
    assert problems.score("It is $1,200.", problems.test[0]) == 1 and problems.score("1200 or 5", problems.test[0]) == 0


def test_gsm8k_from_files_in_its_format():
    """Through the real library, which takes a local folder of this name for the data set."""
    pytest.importorskip("datasets", reason="optional: needs pip install datasets")
    folder = Path("openai/gsm8k")
    folder.mkdir(parents=True)
    files = [{"split": split, "path": f"{split}.jsonl"} for split in ("train", "test")]
    folder.joinpath("README.md").write_text(
        f"---\nconfigs: {json.dumps([{'config_name': 'main', 'data_files': files}])}\n---\n"
    )
    for split, first in (("train", 0), ("test", 90)):
        rows = [
            {
                "question": f"Ann has {i} figs and buys 2. How many now?",
                "answer": f"{i}+2=<<{i}+2={i + 2}>>\n#### {i + 2}",
            }
            for i in range(first, first + 12)
        ]
        folder.joinpath(f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = Problems(Args(task="gsm8k", eval_size=5))
    assert len(problems.test) == 5 and {problems.find(number)["answer"] for number in range(12)} == set(
        map(str, range(2, 14))
    )
    assert problems.score("90 + 2 = 92", problems.test[0]) == 1 > problems.score("91", problems.test[0])


def test_training_and_test_problems_are_disjoint():
    args = Args(eval_size=300)
    problems, other = Problems(args), Problems(replace(args, seed=2))
    held_out = {entry["question"] for entry in problems.test}
    questions = [problems.find(number)["question"] for number in range(1000)]
    assert len(held_out) == len(problems.test) == 300
    assert not held_out & set(questions)

    def terms(question):
        """Signed numbers in order of size: the same for "1 + 2 - 3" and "2 - 3 + 1"."""
        _, _, numbers = question.rpartition(": ")
        return sorted(re.findall(r"[+-] \d", f"+ {numbers}"))

    trained_on = [terms(question) for question in questions]
    assert all(len(numbers) in (2, 3) for numbers in trained_on)
    assert not any(terms(question) in trained_on for question in held_out)
    assert any(problems.train[number]["question"] in held_out for number in range(1000))  # they had to be passed over
    assert questions == [problems.find(number)["question"] for number in range(1000)]
    assert questions != [other.find(number)["question"] for number in range(1000)]
    assert [entry["question"] for entry in other.test] == [entry["question"] for entry in problems.test]


def test_a_step_makes_good_answers_likelier(warm_model):
    problems, agent = make_agent(replace(SMALL, model=warm_model))
    batch = collected(agent, problems, replace(SMALL, group_size=16), rollouts=range(4))
    advantages, without_variance = group_advantages(batch.rewards, 16)
    assert without_variance < 1
    for objective in ("vaco", "grpo"):
        agent.zero_grad()
        loss, _ = minibatch(agent, replace(SMALL, objective=objective), batch, advantages)
        loss.backward()
        moved = Agent(agent.model.config, agent.model.generation_config, agent.tokenizer, SMALL)
        moved.load_state_dict(agent.state_dict())
        with torch.no_grad():
            for parameter, trained in zip(moved.parameters(), agent.parameters(), strict=True):
                parameter.sub_(0.1 * trained.grad)
            logprobs, _ = moved.evaluate(batch.prompts, batch.prompt_mask, batch.tokens, batch.mask)
            change = (logprobs - batch.logprobs) * batch.mask
        assert (change.sum(1) * advantages).sum() > 0


@pytest.mark.parametrize(("schedule", "lag"), [("async", 0), ("mixture", 2)])
def test_every_schedule_trains_to_the_end(schedule, lag, warm_model, monkeypatch, capsys):
    batches, check = [], vaco_async_llm.check_finite

    def recorded_check(place, numbers):
        if "prompts" in numbers:
            batches.append(SimpleNamespace(**numbers))
        check(place, numbers)

    monkeypatch.setattr(vaco_async_llm, "check_finite", recorded_check)
    args = replace(SMALL, model=warm_model, lag_schedule=schedule, lag=lag, num_actors=2)
    agent = train(replace(args, kl_coef=0.01, warmup_batches=3))
    assert all(torch.isfinite(tensor).all() for tensor in agent.state_dict().values())
    curves, run = read_run()
    expected = {
        "charts": {"accuracy", "reward", "completion_length", "cut", "learning_rate", "tokens_per_second"},
        "losses": {"policy_loss", "entropy", "old_approx_kl", "approx_kl", "grad_norm", "reference_kl"},
        "lag": {"versions_mean", "versions_max", "tv_backward", "tv_forward", "tv_total", "ess"},
        "filter": {"gate_open", "dropped", "groups_without_variance"},
        "stats": {"actor_wait", "learner_wait", "rollout_time", "update_time", "queue_size"},
    }
    assert {tag for tag in curves if "/" in tag} == {
        f"{group}/{name}" for group in expected for name in expected[group]
    }
    assert all(math.isfinite(value) for tag in curves for value in curves[tag])
    rates = [args.learning_rate * (1 - batch / 5) * min((batch + 1) / 3, 1) for batch in range(5)]
    assert curves["charts/learning_rate"] == pytest.approx(rates)
    assert len(curves["charts/reward"]) == 5 and len(curves["charts/accuracy"]) == 4  # before, after 2, 4 and 5
    assert max(curves["lag/versions_max"]) <= lag or schedule == "async"
    assert curves["charts/reward"] == pytest.approx([batch.rewards.mean().item() for batch in batches])
    lengths = [batch.mask.sum(1).float().mean().item() for batch in batches]
    assert curves["charts/completion_length"] == pytest.approx(lengths)
    stops = torch.tensor(agent.model.generation_config.eos_token_id)
    cut = [~(torch.isin(batch.tokens, stops) & batch.mask).any(1) for batch in batches]
    assert curves["charts/cut"] == pytest.approx([part.float().mean().item() for part in cut])
    same = [(rewards == rewards[:, :1]).all(1).float().mean() for rewards in (b.rewards.view(-1, 4) for b in batches)]
    assert curves["filter/groups_without_variance"] == pytest.approx(torch.stack(same).tolist())
    events = EventAccumulator(str(run))
    events.Reload()
    assert "samples/text_summary" in events.Tags()["tensors"]
    assert f"logs, weights: {run}" in capsys.readouterr().out.splitlines()[-1]
    saved = torch.load(run / "checkpoint.pt", weights_only=True)
    assert saved["global_step"] == sum(batch.mask.sum().item() for batch in batches)
    assert not mp.active_children()


def test_fixed_lag_is_exact_and_reproducible_whatever_happens(warm_model, monkeypatch, capsys):
    """Bit-equal with one actor and with three, of which one is killed, and if the run goes on with two: problems and
    noise follow from the rollout's number alone, and a checkpoint has all that training needs."""
    args = replace(SMALL, model=warm_model, lag=2, rollouts_per_batch=2, prompts_per_rollout=12, kl_coef=0.01)
    args = replace(args, learning_rate=1e-3, warmup_batches=0)
    agent = train(args)
    expected = {name: tensor.clone() for name, tensor in agent.state_dict().items()}
    start = transformers.AutoModelForCausalLM.from_pretrained(warm_model).state_dict()
    assert not torch.equal(start["model.norm.weight"], expected["model.model.norm.weight"])
    curves, run = read_run()
    run.rename("one actor")
    assert curves["lag/versions_mean"] == curves["lag/versions_max"] == [0, 1, 2, 2, 2]
    assert curves["lag/tv_backward"][0] < 1e-4 < curves["lag/tv_backward"][2]

    collect = Actors.collect

    def disturbed_collect(self, batch):
        if batch == 3 and not self.args.resume:
            os.kill(self.processes[0].pid, signal.SIGKILL)
            self.processes[0].join()
        return collect(self, batch)

    monkeypatch.setattr(Actors, "collect", disturbed_collect)
    with pytest.raises(SystemExit, match="actor 0 died with exit code -9"):
        train(replace(args, num_actors=3))
    _, run = read_run()
    assert f"stopped at batch 3; --resume {run} goes on from there" in capsys.readouterr().err
    state = train(replace(args, num_actors=2, resume=str(run))).state_dict()
    assert all(torch.equal(expected[name], state[name]) for name in expected)
    again, _ = read_run()
    for name in ("charts/accuracy", "charts/reward", "lag/tv_total", "losses/policy_loss"):
        assert again[name] == curves[name]


def test_mixture_is_the_same_with_any_number_of_actors(warm_model):
    args = replace(SMALL, model=warm_model, lag_schedule="mixture", lag=2, rollouts_per_batch=2, warmup_batches=0)
    args = replace(args, total_batches=3, eval_interval=3, prompts_per_rollout=3)
    states = [train(replace(args, num_actors=actors)).state_dict() for actors in (1, 3)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_groups_without_variance_give_no_gradient(warm_model, monkeypatch):
    """The learner takes all rewards for 1."""
    monkeypatch.setattr(
        vaco_async_llm, "group_advantages", lambda rewards, size: group_advantages(rewards * 0 + 1, size)
    )
    state = train(replace(SMALL, model=warm_model, total_batches=2)).state_dict()
    start = transformers.AutoModelForCausalLM.from_pretrained(warm_model).state_dict()
    assert all(torch.equal(start[name], state[f"model.{name}"]) for name in start)
    curves, _ = read_run()
    assert curves["filter/groups_without_variance"] == [1, 1]


def test_the_default_model_runs_and_what_it_saves_loads_and_answers(monkeypatch):
    agent = train(replace(SMALL, warm_start_batches=80, total_batches=1, save_model=True))
    curves, run = read_run()
    model = transformers.AutoModelForCausalLM.from_pretrained(run / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "model")
    problems = Problems(SMALL)
    chat = [{"role": "user", "content": problems.test[0]["question"]}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    settings = {"max_new_tokens": SMALL.max_new_tokens, "do_sample": False}
    ids = model.generate(inputs.input_ids, attention_mask=inputs.attention_mask, **settings)[
        0, inputs.input_ids.shape[1] :
    ]
    tokens, _, mask = agent.generate(*agent.encode([problems.test[0]["question"]]), sample=False)
    assert tokenizer.decode(ids, skip_special_tokens=True) == agent.decode(tokens, mask)[0]
    assert os.listdir("runs/warm_starts")
    monkeypatch.syspath_prepend(REPOSITORY / "benchmark")
    evaluate = importlib.import_module("evaluate")
    shares = evaluate.evaluate(evaluate.Args(run))
    assert shares["greedy"] == pytest.approx(curves["charts/accuracy"][-1])
    shutil.rmtree(run / "model")  # without it, the tiny model is made anew
    assert evaluate.evaluate(evaluate.Args(run))["greedy"] == shares["greedy"]


def test_a_run_is_tracked_offline(warm_model, tracked):
    train(replace(SMALL, model=warm_model, total_batches=2, track=True))
    tracked(b"lag/tv_total", b"charts/reward")


def test_a_task_with_few_questions_holds_a_quarter_of_them_out():
    options = {"min_terms": 2, "max_terms": 2}  # of one digit, as by default: there are 200
    problems = Problems(Args(eval_size=1000, task_config=json.dumps(options)))
    held_out = {entry["question"] for entry in problems.test}
    trained_on = {problems.find(number)["question"] for number in range(3000)}
    assert 30 < len(held_out) == len(problems.test) < 70 and len(trained_on | held_out) == 200
    assert not trained_on & held_out
    problems.held_out = lambda question: True
    with pytest.raises(SystemExit, match="--task chain_sum: has so few questions"):
        problems.find(0)


def test_each_problem_is_made_once(monkeypatch):
    """Some of them take long: none for the test beyond the last that is needed, one for each group of a rollout."""
    made = []

    problems, agent = make_agent(SMALL)
    make = type(problems.train).__getitem__

    def counted(self, number):
        made.append(number)
        return make(self, number)

    monkeypatch.setattr(type(problems.train), "__getitem__", counted)
    questions = {entry["question"] for entry in problems.test}
    needed, made[:] = made[:], []
    assert len(questions) == SMALL.eval_size and needed == [*range(len(needed))]
    test = vaco_async_llm.make_problems(SMALL.task, SMALL.task_config, 2**30)
    assert test[needed[-1]]["question"] in questions
    made.clear()
    collected(agent, problems, SMALL)
    assert len(made) == len(set(made)) and set(range(SMALL.prompts_per_rollout)) <= set(made)


def test_training_problems_that_are_too_long_are_passed_over():
    problems, agent = make_agent(SMALL)
    lengths = agent.encode([problems.find(number)["question"] for number in range(6)])[1].sum(1)
    assert lengths.min() < lengths.max()
    agent.args = replace(SMALL, max_prompt_tokens=lengths.max().item() - 1)
    batch = collected(agent, problems, agent.args)
    kept = lengths < lengths.max()
    assert torch.equal(batch.prompt_mask.sum(1)[::4][kept], lengths[kept])
    assert batch.prompt_mask.sum(1).max() < lengths.max()


BAD = [
    ({"task": "chain_some"}, "--task chain_some: cannot make problems"),
    ({"task_config": "{"}, "--task chain_sum: cannot make problems"),
    ({"task_config": '{"terms": 2}'}, "cannot make problems"),
    ({"lag": 4, "lag_schedule": "async"}, "needs --lag-schedule fixed"),
    ({"group_size": 1}, "--group-size 1: must be at least 2"),
    ({"learning_rate": -1.0}, "--learning-rate -1.0: must be at least 0"),
    ({"temperature": 0.0}, "--temperature 0.0: must be at least 0.001"),
    ({"num_minibatches": 100}, "--num-minibatches 100: a batch has not so many completions"),
    ({"resume": "."}, "--resume .: is not the folder of a run"),
    ({"actor_device": "cuda", "cuda": False}, "--actor-device cuda: needs a GPU"),
]


@pytest.mark.parametrize(("flags", "expected"), BAD, ids=lambda part: str(part)[:40])
def test_wrong_flags_are_named(flags, expected):
    with pytest.raises(ValueError, match=re.escape(expected)) as caught:
        replace(SMALL, **flags)
    assert "\n" not in str(caught.value)


def test_a_completion_that_is_cut_before_the_answer_ends_is_named():
    with pytest.raises(SystemExit, match="--max-new-tokens 2: an answer has 4"):
        train(replace(SMALL, max_new_tokens=2))


def test_what_a_model_has_no_room_for_is_one_line():
    with pytest.raises(SystemExit, match="tiny has room for 1024 tokens"):
        make_agent(replace(SMALL, max_prompt_tokens=1020))
