"""The baselines' losses by hand, with their gradients; what they have in common with VACO; both domains end to end."""

import multiprocessing as mp
import os
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import needs_compiler, read_curves
from test_algorithm import gae_by_episode, make_columns, vtrace_by_definition

import impala_baseline
import ppo_async_baseline as ppo
import vaco_async_mujoco

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
LEARNER_RATIOS = [0.5, 1.0, 1.0, 1.0, 1.0, 2.0, 20.0, 0.5, 1.0, 1.0]
ADVANTAGES = [2.0, 1.0, 1.0, 1.0, 3.0, -2.0, -1.0, -1.0, -1.0, -3.0]
OBJECTIVES = ["clip", "geppo", "decoupled", "kl", "spo", "stop"]
both_scripts = pytest.mark.parametrize("script", [ppo, impala_baseline], ids=lambda script: script.__name__)


def state_of(agent):
    return {name: tensor.clone() for name, tensor in agent.state_dict().items()}


def ppo_loss(objective, log_ratios, learner_log_ratios, advantages):
    """The policy loss of a minibatch, of an agent whose values are right."""
    zeros = torch.zeros(len(advantages), dtype=torch.float64)
    agent = SimpleNamespace(evaluate=lambda obs, actions: (log_ratios, zeros, zeros))
    args = ppo.Args(objective=objective, norm_adv=False)
    loss, logs = ppo.ppo_minibatch(agent, args, 0.7, advantages, None, None, zeros, learner_log_ratios, zeros)
    return loss, logs


def clipped(r, a, center=1.0):
    """PPO's surrogate at a clip range of 0.2, and its derivative by the ratio."""
    binds = (a > 0 and r > center + 0.2) or (a < 0 and r < center - 0.2)
    return min(r * a, float(np.clip(r, center - 0.2, center + 0.2)) * a), 0.0 if binds else a


def objective_by_hand(objective, r, rho, a):
    """What a sample (r = pi/beta, rho = pi_T/beta, a its advantage) adds to the objective; its derivative by r."""
    if objective == "clip":
        return clipped(r, a)
    if objective == "geppo":
        return clipped(r, a, center=rho)
    if objective == "stop":
        return r * a, a
    if objective == "kl":
        return r * a - 0.7 * (r - 1 - np.log(r)), a - 0.7 * (1 - 1 / r)
    if objective == "spo":
        return r * a - abs(a) * (r - 1) ** 2 / 0.4, a - abs(a) * (r - 1) / 0.2
    surrogate, derivative = clipped(r / rho, a)
    return min(rho, 10.0) * surrogate, min(rho, 10.0) * derivative / rho


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_objectives_by_hand_with_their_gradients(objective):
    ratios = torch.tensor(RATIOS, dtype=torch.float64, requires_grad=True)
    learner_log_ratios = torch.tensor(LEARNER_RATIOS, dtype=torch.float64).log()
    advantages = torch.tensor(ADVANTAGES, dtype=torch.float64)
    loss, _ = ppo_loss(objective, ratios.log(), learner_log_ratios, advantages)
    loss.backward()
    samples = [objective_by_hand(objective, *sample) for sample in zip(RATIOS, LEARNER_RATIOS, ADVANTAGES, strict=True)]
    values, derivatives = np.array(samples).T
    assert loss.item() == pytest.approx(-values.mean())
    np.testing.assert_allclose(ratios.grad.numpy(), -derivatives / len(RATIOS), atol=1e-12)


@pytest.mark.parametrize(("objective", "share"), [("clip", 0.4), ("geppo", 0.5), ("decoupled", 0.5)])
def test_clipfrac_counts_from_where_the_objective_clips(objective, share):
    logs = [torch.tensor(ratios, dtype=torch.float64).log() for ratios in (RATIOS, LEARNER_RATIOS)]
    assert ppo_loss(objective, *logs, torch.ones(10))[1]["losses/clipfrac"].item() == pytest.approx(share)


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


@pytest.mark.parametrize("objective", [*OBJECTIVES, "impala"])
def test_a_run_of_one_update_at_zero_lag_is_advantage_actor_critic(objective, monkeypatch):
    """The weights after one gradient step on one batch are A2C's, written here by hand with Adam's first step: at a
    ratio of 1 nothing clips or penalises."""
    script = impala_baseline if objective == "impala" else ppo
    flags = {"gae_lambda": 0.95, "learning_rate": 3e-4}
    if script is ppo:
        flags |= {"objective": objective, "norm_adv": False}
    evaluate, estimate = script.MlpAgent.evaluate, script.vtrace
    evaluated, estimated = [], []

    def recorded_evaluate(agent, obs, actions):
        evaluated.append((obs, actions))
        return evaluate(agent, obs, actions)

    def recorded_estimate(log_rhos, *inputs):
        estimated.append((*evaluated[-1], *inputs[:4]))
        return estimate(log_rhos, *inputs)

    monkeypatch.setattr(script.MlpAgent, "evaluate", recorded_evaluate)
    monkeypatch.setattr(script, "vtrace", recorded_estimate)
    one = SMALL | {"total_timesteps": 1, "update_epochs": 1, "num_minibatches": 1}
    trained = script.train(script.Args(**one, lag_schedule="fixed", anneal_lr=False, **flags))

    ((obs, actions, rewards, old_values, terminated, dones),) = estimated
    torch.manual_seed(1)
    agent = script.MlpAgent(4, 1)
    logprobs, _, values = evaluate(agent, obs, actions)
    rows = torch.cat([torch.ones_like(dones[:1]), 1 - dones[:-1]]).bool()  # the step after an end is a dummy
    columns = {
        "rewards": rewards.numpy(),
        "values": torch.cat([values, old_values[-1:]]).detach().numpy(),
        "terminated": terminated.bool().numpy(),
        "dones": dones.bool().numpy(),
        "valid": rows.numpy(),
    }
    targets, advantages = (torch.tensor(result) for result in gae_by_episode(columns, 0.99, 0.95))
    policy_loss = -(advantages[rows] * logprobs[rows]).mean()
    value_loss = 0.5 * (values[rows] - targets[rows]).square().mean()
    (policy_loss + 0.5 * value_loss).backward()
    torch.nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
    for (name, parameter), (_, result) in zip(agent.named_parameters(), trained.named_parameters(), strict=True):
        step = 3e-4 * parameter.grad / (parameter.grad.abs() + 1e-5)
        torch.testing.assert_close(result.detach(), parameter.detach() - step, atol=2e-5, rtol=0, msg=name)


SCHEDULES = [("async", 0), ("fixed", 0), ("mixture", 2)]
PROGRAMS = [
    *((ppo, {"objective": "clip"}, *schedule) for schedule in SCHEDULES),
    *((ppo, {"objective": objective, "align": True}, "mixture", 2) for objective in OBJECTIVES[1:]),
    *((impala_baseline, {}, *schedule) for schedule in SCHEDULES),
]


@pytest.mark.parametrize(("script", "flags", "schedule", "lag"), PROGRAMS, ids=str)
def test_runs_on_continuous_control(script, flags, schedule, lag, capsys):
    agent = script.train(script.Args(**SMALL, **flags, lag_schedule=schedule, lag=lag))
    assert all(torch.isfinite(tensor).all() for tensor in agent.state_dict().values())
    curves = read_curves(".")
    assert {"losses/approx_kl", "losses/explained_variance", "lag/tv_total", "charts/SPS"} <= curves.keys()
    assert "InvertedPendulum-v4" in capsys.readouterr().out.splitlines()[-1]
    assert not mp.active_children()


@pytest.mark.parametrize(("schedule", "lag"), SCHEDULES)
@both_scripts
def test_runs_on_atari(script, schedule, lag):
    agent = script.train(script.Args(**SMALL_ATARI, lag_schedule=schedule, lag=lag))
    assert all(torch.isfinite(tensor).all() for tensor in agent.state_dict().values())
    curves = read_curves(".")
    if schedule == "fixed":  # on policy
        assert max(curves["lag/tv_backward"]) < 1e-4 and set(curves["lag/versions_max"]) == {0.0}
    assert np.mean(curves["lag/tv_total"]) > 1e-6
    assert not mp.active_children()


@pytest.mark.parametrize("flags", [SMALL, SMALL_ATARI], ids=["continuous", "atari"])
@both_scripts
def test_lockstep_runs_are_bit_equal(script, flags):
    args = script.Args(**flags, lag_schedule="mixture", lag=2)
    first, second = (state_of(script.train(args)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@both_scripts
def test_dummy_steps_reach_nothing(script, monkeypatch):
    args = script.Args(**SMALL, lag_schedule="fixed", lag=1)
    clean, check_finite, poisoned = state_of(script.train(args)), script.check_finite, []

    def poison(place, numbers):
        """Called with each slot before it is copied."""
        if "valid" in numbers:
            dummy = ~numbers["valid"]
            numbers["obs"][:-1][dummy] = 7.0
            numbers["actions"][dummy] = 3.0
            numbers["logprobs"][dummy] = -20.0
            numbers["rewards"][dummy] = 1e6
            poisoned.append(dummy.sum())
        check_finite(place, numbers)

    monkeypatch.setattr(script, "check_finite", poison)
    second = state_of(script.train(args))
    assert all(torch.allclose(clean[name], second[name], atol=1e-6) for name in clean)
    assert sum(poisoned) > 20


@pytest.mark.parametrize("align", [True, False])
def test_align_takes_the_advantages_of_the_learners_policy(align, monkeypatch):
    log_rhos = []
    vtrace = ppo.vtrace
    monkeypatch.setattr(ppo, "vtrace", lambda first, *inputs: log_rhos.append(first) or vtrace(first, *inputs))
    ppo.train(ppo.Args(**SMALL, align=align, lag_schedule="fixed", lag=1))
    moved = [float(part.abs().max()) for part in log_rhos]
    assert moved[0] < 1e-4 and (moved[-1] > 1e-3) == align  # on policy at first, then a version behind


def test_stop_skips_the_rest_of_a_batch_once_total_variation_is_over_budget(monkeypatch):
    """Every step but a batch's last one was taken within the budget, and what is over it was not taken."""
    batches = []
    publish = ppo.PolicyStore.publish
    minibatch = ppo.ppo_minibatch

    def recorded_minibatch(agent, *inputs):
        loss, logs = minibatch(agent, *inputs)
        batches[-1].append((float(logs["losses/tv"]), state_of(agent)["critic.2.weight"]))
        return loss, logs

    def recorded_publish(self, agent, version):
        if batches:
            _, last_seen = batches[-1][-1]
            over = batches[-1][-1][0] > 0.01
            assert torch.equal(last_seen, agent.critic[2].weight) == over
        batches.append([])
        publish(self, agent, version)

    monkeypatch.setattr(ppo, "ppo_minibatch", recorded_minibatch)
    monkeypatch.setattr(ppo.PolicyStore, "publish", recorded_publish)
    flags = {"objective": "stop", "tv_threshold": 0.01, "update_epochs": 8, "learning_rate": 1e-3}
    ppo.train(ppo.Args(**SMALL | flags, lag_schedule="fixed"))
    steps = [sum(tv <= 0.01 for tv, _ in batch) for batch in batches[:-1]]
    assert read_curves(".")["stats/gradient_steps"] == steps and 1 < min(steps) < 32
    for batch in batches[:-1]:
        assert all(tv <= 0.01 for tv, _ in batch[:-1])


def test_without_filter_vaco_is_stop_that_never_stops():
    """So what differs between a baseline and VACO is the objective alone."""
    flags = SMALL | {"lag_schedule": "mixture", "lag": 2}
    one = state_of(vaco_async_mujoco.train(vaco_async_mujoco.Args(**flags, filter=False)))
    other = state_of(ppo.train(ppo.Args(**flags, objective="stop", align=True, tv_threshold=1e9)))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "own"),
    [
        ("clip", {"clip_coef": 0.02}),
        ("geppo", {"clip_coef": 0.02}),
        ("stop", {"tv_threshold": 0.02}),
        ("kl", {"kl_target": 1.0}),
        ("spo", {"spo_eps": 0.02}),
        ("decoupled", {"clip_coef": 0.02}),
    ],
)
def test_every_flag_of_an_objective_changes_its_result_and_no_other(objective, own):
    """Under lag, so that pi_T/beta is not 1; clip_coef and the like small enough to bind."""
    small = SMALL | {
        "total_timesteps": 400,
        "learning_rate": 3e-3,
        "clip_coef": 0.01,
        "spo_eps": 0.01,
        "tv_threshold": 0.01,
    }
    args = ppo.Args(**small, objective=objective, lag_schedule="fixed", lag=2)
    reference = state_of(ppo.train(args))["actor_mean.0.weight"]
    for name, value in own.items():
        changed = state_of(ppo.train(replace(args, **{name: value})))["actor_mean.0.weight"]
        assert not torch.equal(reference, changed), name
    every = {"clip_coef": 0.02, "kl_target": 1.0, "spo_eps": 0.02, "tv_threshold": 0.02}
    others = {name: value for name, value in every.items() if name not in own}
    assert torch.equal(reference, state_of(ppo.train(replace(args, **others)))["actor_mean.0.weight"])


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


def test_sum_loss_multiplies_the_gradient_by_the_samples():
    one = SMALL | {"total_timesteps": 1, "num_minibatches": 1, "update_epochs": 1}
    norms = []
    for sums in (False, True):
        impala_baseline.train(impala_baseline.Args(**one, lag_schedule="fixed", sum_loss=sums))
        norms += read_curves(".")["losses/grad_norm"]
        shutil.rmtree("runs")
    rows = norms[1] / norms[0]
    assert rows == pytest.approx(round(rows), rel=1e-3) and 80 < rows <= 128


@pytest.mark.parametrize(
    ("kl_target", "expected"),
    [(1e-9, [min(2.0**i, 1e4) for i in range(16)]), (100.0, [max(0.5**i, 1e-4) for i in range(16)])],
    ids=["grows", "shrinks"],
)
def test_kl_coefficient_doubles_or_halves_within_its_bounds(kl_target, expected):
    flags = SMALL | {"total_timesteps": 128 * 15 - 60, "learning_rate": 3e-3}
    ppo.train(ppo.Args(**flags, objective="kl", lag_schedule="fixed", kl_target=kl_target))
    coefficients = read_curves(".")["losses/kl_coef"]
    assert len(coefficients) >= 15 and coefficients == pytest.approx(expected[: len(coefficients)])


def test_a_resumed_run_goes_on_with_its_kl_coefficient():
    args = ppo.Args(**SMALL | {"total_timesteps": 200}, objective="kl", lag_schedule="fixed", kl_target=1e-6)
    ppo.train(args)
    (run,) = os.listdir("runs")
    ppo.train(replace(args, total_timesteps=400, resume=f"runs/{run}"))
    assert read_curves(".")["losses/kl_coef"] == [1.0, 2.0, 4.0, 8.0]


@both_scripts
def test_the_domain_decides_the_defaults(script):
    continuous, atari = vars(script.Args()), vars(script.Args(env_id="Pong-v5", learning_rate=1e-5))
    assert continuous.items() >= script.CONTINUOUS.items()
    assert atari.items() >= (script.ATARI | {"learning_rate": 1e-5}).items()


BAD = [
    (ppo, {"clip_coef": -0.1}, "--clip-coef -0.1"),
    (ppo, {"env_id": "Pung-v5"}, "--env-id Pung-v5"),
    (ppo, {"env_id": "CartPole-v1"}, "--env-id CartPole-v1"),
    (ppo, {"env_id": "Pong-v5", "num_minibatches": 700}, "--num-minibatches 700"),
    (impala_baseline, {"num_minibatches": 17}, "--num-minibatches 17"),
    (impala_baseline, {"lag": 3}, "--lag-schedule fixed"),
]


@pytest.mark.parametrize(("script", "flags", "expected"), BAD, ids=lambda part: str(part)[:40])
def test_wrong_flags_are_named(script, flags, expected):
    with pytest.raises(ValueError, match=expected.replace(".", r"\.")):
        script.Args(**flags)


@pytest.mark.slow
@needs_compiler
def test_a_compiled_run_is_the_eager_one_up_to_rounding():
    """PPO-KL, whose coefficient changes from batch to batch: compiled in as a constant it would stay what it was."""
    args = ppo.Args(**SMALL, objective="kl", lag_schedule="fixed", lag=1, kl_target=1e-6)
    args = replace(args, total_timesteps=400)
    eager, compiled = state_of(ppo.train(args)), state_of(ppo.train(replace(args, compile=True)))
    for name in eager:
        torch.testing.assert_close(eager[name], compiled[name], atol=1e-3, rtol=1e-3, msg=name)
    assert not torch.equal(eager["actor_mean.0.weight"], compiled["actor_mean.0.weight"])  # it did compile


@pytest.mark.slow
@needs_compiler
def test_compiled_code_is_not_reused_with_another_clip_range(monkeypatch, tmp_path):
    """torch keeps compiled code on disk, for later runs. The range that comes first is the wider one."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    args = ppo.Args(**SMALL, lag_schedule="fixed", lag=1, learning_rate=1e-2)
    weights = []
    for clip_coef in (0.4, 0.01):
        torch._dynamo.reset()  # which leaves the cache on disk
        args = replace(args, total_timesteps=400, clip_coef=clip_coef)
        eager, compiled = state_of(ppo.train(args)), state_of(ppo.train(replace(args, compile=True)))
        for name in eager:
            torch.testing.assert_close(eager[name], compiled[name], atol=1e-3, rtol=1e-3, msg=name)
        weights.append(eager["actor_mean.0.weight"])
    assert not torch.allclose(*weights, atol=1e-2) and any((tmp_path / "cache").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["clip", "decoupled"])
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
