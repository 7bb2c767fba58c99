"""The baselines' losses by hand, with their gradients; what they have in common with VACO; both domains end to end."""

import multiprocessing as mp
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, read_curves
from test_algorithm import gae_by_episode, make_columns, vtrace_by_definition

import impala_baseline
import ppo_async_baseline as ppo
from ppo_async_baseline import gae

SMALL = {
    "env_id": "InvertedPendulum-v4",
    "total_timesteps": 1500,
    "num_actors": 2,
    "num_envs": 4,
    "num_steps": 16,
    "rollouts_per_batch": 2,
    "num_minibatches": 4,
    "update_epochs": 2,
}
SMALL_ATARI = {
    "env_id": "Breakout-v5",
    "total_timesteps": 200,
    "num_actors": 2,
    "num_envs": 2,
    "num_steps": 16,
    "rollouts_per_batch": 2,
    "num_minibatches": 2,
    "update_epochs": 1,
}
RATIOS = [0.5, 0.85, 1.0, 1.15, 1.5, 0.5, 0.85, 1.0, 1.15, 1.5]
ADVANTAGES = [2.0, 1.0, 1.0, 1.0, 3.0, -2.0, -1.0, -1.0, -1.0, -3.0]


def ratios_and_advantages():
    return torch.tensor(RATIOS, dtype=torch.float64, requires_grad=True), torch.tensor(ADVANTAGES, dtype=torch.float64)


def state_of(agent):
    return {name: tensor.clone() for name, tensor in agent.state_dict().items()}


def test_clip_loss_by_hand_and_its_gradient_is_zero_exactly_where_clipping_binds():
    ratios, advantages = ratios_and_advantages()
    loss = ppo.clip_loss(ratios, advantages, 0.2)
    per_sample = [min(r * a, float(np.clip(r, 0.8, 1.2)) * a) for r, a in zip(RATIOS, ADVANTAGES, strict=True)]
    assert loss.item() == pytest.approx(-np.mean(per_sample))
    loss.backward()
    binds = [(a > 0 and r > 1.2) or (a < 0 and r < 0.8) for r, a in zip(RATIOS, ADVANTAGES, strict=True)]
    expected = [0.0 if b else -a / 10 for b, a in zip(binds, ADVANTAGES, strict=True)]
    np.testing.assert_allclose(ratios.grad.numpy(), expected)
    assert sum(binds) == 2


def test_kl_loss_by_hand_and_its_gradient():
    ratios, advantages = ratios_and_advantages()
    loss = ppo.kl_loss(ratios, ratios.log(), advantages, 0.7)
    expected = np.mean([-r * a + 0.7 * (r - 1 - np.log(r)) for r, a in zip(RATIOS, ADVANTAGES, strict=True)])
    assert loss.item() == pytest.approx(expected)
    loss.backward()
    gradient = [(-a + 0.7 * (1 - 1 / r)) / 10 for r, a in zip(RATIOS, ADVANTAGES, strict=True)]
    np.testing.assert_allclose(ratios.grad.numpy(), gradient)


def test_kl_coefficient_follows_its_target():
    assert ppo.adapted_kl_coef(1.0, 0.046, 0.03) == 2.0
    assert ppo.adapted_kl_coef(1.0, 0.019, 0.03) == 0.5
    for inside in (0.021, 0.03, 0.044):
        assert ppo.adapted_kl_coef(1.0, inside, 0.03) == 1.0
    assert ppo.adapted_kl_coef(1e4, 1.0, 0.03) == 1e4 and ppo.adapted_kl_coef(1e-4, 0.0, 0.03) == 1e-4


def test_spo_loss_by_hand_its_gradient_and_its_optimum():
    ratios, advantages = ratios_and_advantages()
    loss = ppo.spo_loss(ratios, advantages, 0.2)
    pairs = list(zip(RATIOS, ADVANTAGES, strict=True))
    assert loss.item() == pytest.approx(-np.mean([r * a - abs(a) * (r - 1) ** 2 / 0.4 for r, a in pairs]))
    loss.backward()
    np.testing.assert_allclose(ratios.grad.numpy(), [-(a - abs(a) * (r - 1) / 0.2) / 10 for r, a in pairs], atol=1e-12)
    for sign in (1.0, -1.0):
        best = torch.tensor([1 + sign * 0.2], dtype=torch.float64, requires_grad=True)
        ppo.spo_loss(best, torch.tensor([3.0 * sign], dtype=torch.float64), 0.2).backward()
        assert best.grad.item() == pytest.approx(0, abs=1e-12)


def test_decoupled_loss_by_hand_and_its_gradient():
    ratios, advantages = ratios_and_advantages()
    learner = torch.tensor([0.5, 1.0, 1.0, 1.0, 1.0, 2.0, 20.0, 0.5, 1.0, 1.0], dtype=torch.float64)
    loss = ppo.decoupled_loss(ratios.log(), learner.log(), advantages, 0.2, 10.0)
    values, gradient = [], []
    for r, rho, a in zip(RATIOS, learner.tolist(), ADVANTAGES, strict=True):
        p, weight = r / rho, min(rho, 10.0)
        values.append(-weight * min(p * a, float(np.clip(p, 0.8, 1.2)) * a))
        binds = (a > 0 and p > 1.2) or (a < 0 and p < 0.8)
        gradient.append(0.0 if binds else -weight * a / rho / 10)
    assert loss.item() == pytest.approx(np.mean(values))
    loss.backward()
    np.testing.assert_allclose(ratios.grad.numpy(), gradient)


def test_decoupled_is_clip_at_zero_lag():
    ratios, advantages = ratios_and_advantages()
    clip = ppo.clip_loss(ratios, advantages, 0.2)
    decoupled = ppo.decoupled_loss(ratios.log(), torch.zeros(10, dtype=torch.float64), advantages, 0.2, 10.0)
    assert clip.item() == pytest.approx(decoupled.item())
    for one, other in zip(*(torch.autograd.grad(loss, ratios) for loss in (clip, decoupled)), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("seed", range(5))
def test_gae_is_vtrace_by_definition_on_policy(seed):
    columns = make_columns(seed)
    columns["log_ratios"][:] = 0
    expected = vtrace_by_definition(columns, 0.97, 0.9, 1.0, 1.0)
    inputs = [torch.tensor(columns[name]).double() for name in ("rewards", "values", "terminated", "dones")]
    for result, reference in zip(gae(*inputs, 0.97, 0.9), expected, strict=True):
        np.testing.assert_allclose(result[columns["valid"]], reference[columns["valid"]], atol=1e-10)


def test_impalas_gradient_is_that_of_a_brute_force_vtrace():
    """d/dtheta of -1/M sum min(rho_bar, rho) (r + gamma v_{t+1} - V_t) log pi, on a softmax policy, by hand."""
    columns = make_columns(3, done_rate=0.15)
    valid = columns["valid"]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(*valid.shape, 3, generator=generator, dtype=torch.float64).requires_grad_()
    actions = torch.randint(3, valid.shape, generator=generator)
    logprobs = logits.log_softmax(-1).gather(-1, actions.unsqueeze(-1)).squeeze(-1)
    behavior = logprobs.detach() - torch.tensor(columns["log_ratios"])  # so that log pi/beta is log_ratios
    log_ratios = logprobs - behavior
    names = ("rewards", "values", "terminated", "dones")
    inputs = [torch.tensor(columns[name]).double() for name in names]
    _, advantages = impala_baseline.vtrace(log_ratios, *inputs, 0.9, 1.0, 1.0, 1.0)
    rows = torch.tensor(valid)
    ratios = log_ratios[rows].detach().exp()
    impala_baseline.impala_loss(logprobs[rows], ratios, advantages[rows], 1.0).backward()

    targets, _ = vtrace_by_definition(columns, 0.9, 1.0, 1.0, 1.0)
    expected = np.zeros(logits.shape)
    probabilities = logits.detach().softmax(-1).numpy()
    steps, num_envs = valid.shape
    for t in range(steps):
        for n in range(num_envs):
            if not valid[t, n]:
                continue
            last = columns["dones"][t, n] or t == steps - 1
            next_target = columns["values"][t + 1, n] if last else targets[t + 1, n]
            next_target *= not columns["terminated"][t, n]
            advantage = columns["rewards"][t, n] + 0.9 * next_target - columns["values"][t, n]
            score = -probabilities[t, n]
            score[actions[t, n]] += 1
            expected[t, n] = -min(1.0, np.exp(columns["log_ratios"][t, n])) * advantage * score / valid.sum()
    np.testing.assert_allclose(logits.grad.numpy(), expected, atol=1e-12)


def test_one_update_at_zero_lag_is_advantage_actor_critic():
    """Every objective's first gradient is A2C's, mean of -A grad log pi: at a ratio of 1 nothing clips or penalises."""
    logprobs = torch.randn(50, dtype=torch.float64, requires_grad=True)
    advantages = torch.randn(50, dtype=torch.float64)
    log_ratios = logprobs - logprobs.detach()
    ratios, zeros = log_ratios.exp(), torch.zeros(50, dtype=torch.float64)
    losses = {
        "a2c": -(advantages * logprobs).mean(),
        "clip": ppo.clip_loss(ratios, advantages, 0.2),
        "kl": ppo.kl_loss(ratios, log_ratios, advantages, 1.0),
        "spo": ppo.spo_loss(ratios, advantages, 0.2),
        "decoupled": ppo.decoupled_loss(log_ratios, zeros, advantages, 0.2, 10.0),
        "impala": impala_baseline.impala_loss(logprobs, ratios.detach(), advantages, 1.0),
    }
    gradients = {name: torch.autograd.grad(loss, logprobs, retain_graph=True)[0] for name, loss in losses.items()}
    for gradient in gradients.values():
        torch.testing.assert_close(gradient, gradients["a2c"])


@pytest.mark.parametrize("objective", ["clip", "kl", "spo", "decoupled", "impala"])
def test_a_run_of_one_update_at_zero_lag_is_advantage_actor_critic(objective, monkeypatch):
    """The weights after one gradient step on one batch are A2C's, written here by hand with Adam's first step."""
    script = impala_baseline if objective == "impala" else ppo
    flags = (
        {"norm_adv": False, "objective": objective} if script is ppo else {"gae_lambda": 0.95, "learning_rate": 3e-4}
    )
    batches, rewards, start = [], [], []
    batch_of, publish, estimator = (
        script.Rollouts.batch,
        script.PolicyStore.publish,
        "gae" if script is ppo else "vtrace",
    )
    estimate, which = getattr(script, estimator), 0 if script is ppo else 1
    monkeypatch.setattr(script.Rollouts, "batch", lambda *inputs: batches.append(batch_of(*inputs)) or batches[-1])
    monkeypatch.setattr(script, estimator, lambda *inputs: rewards.append(inputs[which]) or estimate(*inputs))
    monkeypatch.setattr(
        script.PolicyStore,
        "publish",
        lambda self, agent, version: start.append(state_of(agent)) or publish(self, agent, version),
    )
    one = SMALL | {"total_timesteps": 1, "update_epochs": 1, "num_minibatches": 1}
    trained = script.train(script.Args(**one, lag_schedule="fixed", anneal_lr=False, **flags))

    batch, agent = batches[0], script.Agent(4, 1, False)
    agent.load_state_dict(start[0])
    if script is impala_baseline:  # it shuffles sequences: find each one's scaled rewards again
        scale = (batch.rewards.sum() / rewards[0].sum()).item()
        scaled = batch.rewards / scale
    else:
        scaled = rewards[0]
    obs = agent.normalize(batch.obs)
    values, logprobs = agent.get_value(obs), agent.evaluate(obs[:-1], batch.actions)[0]
    columns = {
        "rewards": scaled.numpy(),
        "values": values.detach().numpy(),
        "terminated": batch.terminated.numpy(),
        "dones": (batch.terminated | batch.truncated).numpy(),
        "valid": batch.valid.numpy(),
    }
    targets, advantages = (torch.tensor(result) for result in gae_by_episode(columns, 0.99, 0.95))
    rows = batch.valid
    policy_loss = -(advantages[rows] * logprobs[rows]).mean()
    value_loss = 0.5 * (values[:-1][rows] - targets[rows]).square().mean()
    (policy_loss + 0.5 * value_loss).backward()
    torch.nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
    for (name, parameter), (_, result) in zip(agent.named_parameters(), trained.named_parameters(), strict=True):
        step = 3e-4 * parameter.grad / (parameter.grad.abs() + 1e-5)
        torch.testing.assert_close(result.detach(), parameter.detach() - step, atol=2e-5, rtol=0, msg=name)


def test_objectives_agree_in_the_first_update_of_a_zero_lag_run():
    """One epoch, one minibatch, one batch: clip, kl, spo and decoupled take the same step, up to rounding."""
    args = replace(ppo.Args(**SMALL), total_timesteps=1, update_epochs=1, num_minibatches=1, lag_schedule="fixed")
    weights = [
        state_of(ppo.train(replace(args, objective=name)))["actor.0.weight"]
        for name in ("clip", "kl", "spo", "decoupled")
    ]
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("objective", ["clip", "kl", "spo", "decoupled"])
@pytest.mark.parametrize("schedule", ["async", "mixture"])
def test_ppo_runs_on_continuous_control(objective, schedule, capsys):
    args = ppo.Args(**SMALL, objective=objective, lag_schedule=schedule, lag=2 * (schedule == "mixture"))
    agent = ppo.train(args)
    assert all(torch.isfinite(tensor).all() for tensor in agent.state_dict().values())
    curves = read_curves(".")
    assert {"losses/clipfrac", "losses/kl_coef", "losses/approx_kl", "lag/tv_total", "charts/SPS"} <= curves.keys()
    assert "InvertedPendulum-v4" in capsys.readouterr().out.splitlines()[-1]
    assert not mp.active_children()


@pytest.mark.parametrize("schedule", ["async", "mixture"])
def test_impala_runs_on_continuous_control(schedule):
    agent = impala_baseline.train(impala_baseline.Args(**SMALL, lag_schedule=schedule, lag=2 * (schedule == "mixture")))
    assert all(torch.isfinite(tensor).all() for tensor in agent.state_dict().values())
    assert {"losses/explained_variance", "lag/tv_total", "charts/SPS"} <= read_curves(".").keys()
    assert not mp.active_children()


@pytest.mark.parametrize("schedule", ["async", "fixed", "mixture"])
def test_atari_runs_in_every_schedule(schedule):
    agent = ppo.train(ppo.Args(**SMALL_ATARI, lag_schedule=schedule, lag=2 * (schedule != "async")))
    assert all(torch.isfinite(tensor).all() for tensor in agent.state_dict().values())
    lags = read_curves(".")["lag/versions_max"]
    assert schedule != "fixed" or lags == [min(batch, 2) for batch in range(len(lags))]
    assert not mp.active_children()


@pytest.mark.parametrize("script", [ppo, impala_baseline], ids=lambda script: script.__name__)
def test_atari_runs_at_zero_lag_on_policy(script):
    script.train(script.Args(**SMALL_ATARI, lag_schedule="fixed", lag=0))
    curves = read_curves(".")
    assert max(curves["lag/tv_backward"]) < 1e-4 and set(curves["lag/versions_max"]) == {0.0}
    assert np.mean(curves["lag/tv_total"]) > 1e-6


@pytest.mark.parametrize("flags", [SMALL, SMALL_ATARI], ids=["continuous", "atari"])
@pytest.mark.parametrize("script", [ppo, impala_baseline], ids=lambda script: script.__name__)
def test_lockstep_runs_are_bit_equal(script, flags):
    args = script.Args(**flags, lag_schedule="mixture", lag=2)
    first, second = (state_of(script.train(args)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("script", [ppo, impala_baseline], ids=lambda script: script.__name__)
def test_dummy_steps_reach_nothing(script, monkeypatch):
    args = script.Args(**SMALL, lag_schedule="fixed", lag=1)
    clean, batch_of, poisoned = state_of(script.train(args)), script.Rollouts.batch, []

    def poisoned_batch(self, slots, device):
        batch = batch_of(self, slots, device)
        dummy = ~batch.valid
        batch.obs[:-1][dummy], batch.actions[dummy] = 7.0, 3.0
        batch.logprobs[dummy], batch.rewards[dummy] = -20.0, 1e6
        poisoned.append(int(dummy.sum()))
        return batch

    monkeypatch.setattr(script.Rollouts, "batch", poisoned_batch)
    second = state_of(script.train(args))
    assert all(torch.allclose(clean[name], second[name], atol=1e-6) for name in clean)
    assert sum(poisoned) > 20


def test_target_kl_leaves_out_passes():
    args = ppo.Args(**SMALL, lag_schedule="fixed")
    full, once = (state_of(ppo.train(replace(args, update_epochs=epochs))) for epochs in (2, 1))
    stopped, unstopped = (state_of(ppo.train(replace(args, target_kl=kl))) for kl in (0.0, 1e6))
    assert all(torch.equal(stopped[name], once[name]) for name in once)
    assert all(torch.equal(unstopped[name], full[name]) for name in full)
    assert not torch.equal(full["actor.0.weight"], once["actor.0.weight"])


def test_every_flag_of_an_objective_changes_its_result_and_no_other():
    """Under lag, so that pi_T/beta is not 1; clip_coef and the like small enough to bind."""
    base = ppo.Args(**SMALL, lag_schedule="fixed", lag=2, clip_coef=0.01, learning_rate=3e-3, spo_eps=0.01)
    effects = {
        "clip": {"clip_coef": 0.02},
        "kl": {"kl_coef": 3.0, "kl_target": 1.0, "adapt_kl": False},
        "spo": {"spo_eps": 0.02},
        "decoupled": {"clip_coef": 0.02, "max_importance": 0.5},
    }
    settings = {name: value for flags in effects.values() for name, value in flags.items()}
    for objective, flags in effects.items():
        args = replace(base, objective=objective)
        reference = state_of(ppo.train(args))["actor.0.weight"]
        for name, value in settings.items():
            other = state_of(ppo.train(replace(args, **{name: value})))["actor.0.weight"]
            assert torch.equal(reference, other) == (name not in flags), (objective, name)


def test_the_caller_keeps_its_flags():
    args = ppo.Args(**SMALL)
    ppo.train(args)
    assert args.learning_rate is None and args.clip_coef is None


def test_impala_recomputes_vtrace_at_every_gradient_step(monkeypatch):
    """The second pass over the same batch sees the values and log ratios of the policy after the first update."""
    args = impala_baseline.Args(**SMALL | {"num_minibatches": 1, "update_epochs": 2}, lag_schedule="fixed", lag=1)
    calls, vtrace, versions = [], impala_baseline.vtrace, []
    publish = impala_baseline.PolicyStore.publish
    monkeypatch.setattr(impala_baseline, "vtrace", lambda *inputs: calls.append(inputs) or vtrace(*inputs))
    monkeypatch.setattr(
        impala_baseline.PolicyStore,
        "publish",
        lambda self, agent, version: versions.append(state_of(agent)) or publish(self, agent, version),
    )
    impala_baseline.train(replace(args, learning_rate=3e-3))
    (first_ratios, rewards, first_values, *_), (second_ratios, again, second_values, *_) = calls[2:4]
    assert rewards.sort().values.equal(again.sort().values)  # the same batch, its columns in another order
    for before, after in ((first_ratios, second_ratios), (first_values, second_values)):
        assert (before.sum() - after.sum()).abs() > 1e-3
    # At version 0 and lag 0 the first pass is on policy, the second is not
    assert calls[0][0].abs().max() < 1e-4 < calls[1][0].abs().max()


def test_sum_loss_multiplies_the_gradient_by_the_samples(monkeypatch):
    norms, clip = {}, torch.nn.utils.clip_grad_norm_
    for sums in (False, True):
        seen = norms.setdefault(sums, [])
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *a, seen=seen: seen.append(clip(*a)) or seen[-1])
        impala_baseline.train(
            impala_baseline.Args(**SMALL | {"num_minibatches": 1}, lag_schedule="fixed", sum_loss=sums)
        )
    rows = norms[True][0] / norms[False][0]
    assert rows == pytest.approx(round(rows.item()), rel=1e-3) and 80 < rows <= 128


@pytest.mark.parametrize(("adapt", "target", "moves"), [(True, 1e-6, 2.0), (True, 100.0, 0.5), (False, 1e-6, 1.0)])
def test_kl_coefficient_of_a_run(adapt, target, moves):
    ppo.train(ppo.Args(**SMALL, objective="kl", lag_schedule="fixed", adapt_kl=adapt, kl_target=target, kl_coef=1.0))
    coefficients = read_curves(".")["losses/kl_coef"]
    assert coefficients[:4] == [moves**batch for batch in range(4)]


def test_domain_decides_the_defaults_and_the_hyperparameter_table_shows_them():
    for script in (ppo, impala_baseline):
        continuous, atari = script.Args(), script.Args(env_id="Pong-v5", learning_rate=1e-5)
        script.validate(continuous)
        script.validate(atari)
        for name, values in script.DEFAULTS.items():
            assert getattr(continuous, name) == values[0]
            assert getattr(atari, name) == (1e-5 if name == "learning_rate" else values[1])
        help_text = subprocess.run(
            [sys.executable, REPOSITORY / f"{script.__name__}.py", "--help"], capture_output=True, text=True, timeout=60
        ).stdout
        flat = " ".join(help_text.replace("│", " ").split())
        for name, (for_continuous, for_atari) in script.DEFAULTS.items():
            own, _, _ = flat.partition(f" --{name.replace('_', '-')} ")[2].partition("(default:")
            for value in (for_continuous, for_atari):
                spellings = {
                    f"{value:g}",
                    f"{value:.0e}".replace("e-0", "e-"),
                    f"{value // 10**6}M",
                    f"{value:.1e}".replace("e-0", "e-"),
                }
                if isinstance(value, bool):
                    spellings = {"on" if value else "off"}
                assert any(spelling in own for spelling in spellings), (name, value, own)


BAD = [
    (ppo, {"objective": "clip", "clip_coef": -0.1}, "--clip-coef -0.1"),
    (ppo, {"kl_target": 0.0}, "--kl-target 0.0"),
    (ppo, {"spo_eps": 0.0}, "--spo-eps 0.0"),
    (ppo, {"max_importance": -1.0}, "--max-importance -1.0"),
    (ppo, {"target_kl": -1.0}, "--target-kl -1.0"),
    (ppo, {"repeat_action_probability": 0.25}, "--repeat-action-probability 0.25: is for Atari"),
    (ppo, {"kl_coef": 0.0}, "--kl-coef 0.0"),
    (ppo, {"env_id": "Pong-v5", "lag": 10_000, "lag_schedule": "fixed"}, "--lag 10000: must be a number from 0 to 500"),
    (ppo, {"env_id": "Pong-v5", "num_steps": 100_000}, "makes batches of"),
    (ppo, {"env_id": "Pong-v5", "compile": True}, "gains nothing with the CNN of Atari; type --no-compile"),
    (ppo, {"learner_threads": 0}, "--learner-threads 0: must be a number from 1 to 256"),
    (impala_baseline, {"learner_threads": 0}, "--learner-threads 0: must be a number from 1 to 256"),
    (impala_baseline, {"actor_nice": 20}, "--actor-nice 20: must be a number from 0 to 19"),
    (ppo, {"env_id": "Pung-v5"}, "Pong-v5"),
    (ppo, {"env_id": "CartPole-v1"}, "no Atari game, nor"),
    (ppo, {"env_id": "Pong-v5", "num_minibatches": 7}, "type --num-minibatches 8"),
    (ppo, {"env_id": "Pong-v5", "repeat_action_probability": 1.5}, "--repeat-action-probability 1.5"),
    (impala_baseline, {"num_minibatches": 3}, "type --num-minibatches 2"),
    (impala_baseline, {"lag": 3}, "type --lag-schedule fixed"),
    (impala_baseline, {"rho_bar": float("nan")}, "--rho-bar nan"),
]


@pytest.mark.parametrize(("script", "flags", "expected"), BAD, ids=lambda part: str(part)[:40])
def test_wrong_flags_are_named_with_what_to_type(script, flags, expected):
    with pytest.raises(script.UsageError, match=expected.replace(".", r"\.")):
        script.validate(script.Args(**flags))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="--compile refuses without g++ or CXX")
def test_a_compiled_run_is_the_eager_one_up_to_rounding():
    """PPO-KL, whose coefficient changes from batch to batch: compiled in as a constant it would stay what it was."""
    args = ppo.Args(**SMALL, objective="kl", lag_schedule="fixed", lag=1, kl_target=1e-6)
    args = replace(args, total_timesteps=400)
    eager, compiled = state_of(ppo.train(args)), state_of(ppo.train(replace(args, compile=True)))
    for name in eager:
        torch.testing.assert_close(eager[name], compiled[name], atol=1e-3, rtol=1e-3, msg=name)
    assert not torch.equal(eager["actor.0.weight"], compiled["actor.0.weight"])  # it did compile


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["clip", "kl", "spo", "decoupled"])
def test_ppo_learns_to_balance_the_pendulum(objective):
    args = ppo.Args(**SMALL | {"num_envs": 8, "num_steps": 128, "num_minibatches": 32, "update_epochs": 10})
    ppo.train(replace(args, total_timesteps=70_000, objective=objective, lag_schedule="fixed", lag=1))
    returns = read_curves(".")["charts/episodic_return"]
    assert returns[0] < 30 and np.mean(returns[-5:]) > 60  # with the sign of the loss broken they stay under 10


@pytest.mark.slow
def test_impala_learns_to_balance_the_pendulum():
    flags = SMALL | {"num_envs": 8, "num_steps": 32, "num_minibatches": 4, "update_epochs": 1}
    args = replace(
        impala_baseline.Args(**flags), total_timesteps=100_000, lag_schedule="fixed", lag=1, learning_rate=2e-3
    )
    impala_baseline.train(args)
    returns = read_curves(".")["charts/episodic_return"]
    assert returns[0] < 30 and np.mean(returns[-5:]) > 100
