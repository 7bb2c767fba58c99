"""The mathematics: V-trace, the filter, the loss and the step, against computations written independently."""

from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from vaco_async_mujoco import Args, MlpAgent, gradient, tv_filter, vaco_minibatch, vtrace


def make_columns(seed, steps=12, num_envs=4, done_rate=0.25):
    """A random batch with envpool's pattern of rows: after every done row comes a dummy row that is not done."""
    rng = np.random.default_rng(seed)
    terminated, truncated, valid = (np.zeros((steps, num_envs), dtype=bool) for _ in range(3))
    previous_done = rng.random(num_envs) < 0.3  # an episode may have ended with the rollout before
    for t in range(steps):
        valid[t] = ~previous_done
        done = (rng.random(num_envs) < done_rate) & valid[t]
        terminated[t] = done & (rng.random(num_envs) < 0.5)
        truncated[t] = done & ~terminated[t]
        previous_done = done
    return {
        "log_ratios": rng.normal(0, 0.7, (steps, num_envs)),
        "rewards": rng.normal(0, 1, (steps, num_envs)) * valid,
        "values": rng.normal(0, 1, (steps + 1, num_envs)),
        "terminated": terminated,
        "dones": terminated | truncated,
        "valid": valid,
    }


def call_vtrace(columns, gamma=0.97, lam=0.9, rho_bar=1.0, c_bar=1.0, dtype=torch.float64):
    names = ("log_ratios", "rewards", "values", "terminated", "dones")
    tensors = [torch.tensor(columns[name]).to(dtype) for name in names]
    return [result.numpy() for result in vtrace(*tensors, gamma, lam, rho_bar, c_bar)]


def episodes_of(columns):
    """(column, first row, row after the last) of every stretch of valid rows, cut after done rows."""
    steps, num_envs = columns["rewards"].shape
    for n in range(num_envs):
        first = None
        for t in range(steps):
            if not columns["valid"][t, n]:
                continue
            first = t if first is None else first
            if columns["dones"][t, n] or t == steps - 1:
                yield n, first, t + 1
                first = None


def vtrace_by_definition(columns, gamma, lam, rho_bar, c_bar):
    """V-trace with lambda, as explicit double sums over each episode; NaN in dummy rows."""
    targets, advantages = (np.full(columns["rewards"].shape, np.nan) for _ in range(2))
    for n, first, end in episodes_of(columns):
        rho = np.exp(columns["log_ratios"][first:end, n])
        rewards, values = columns["rewards"][first:end, n], columns["values"][first : end + 1, n].copy()
        if columns["terminated"][end - 1, n]:
            values[-1] = 0
        deltas = rewards + gamma * values[1:] - values[:-1]
        for s in range(end - first):
            correction = sum(
                (gamma * lam) ** (t - s)
                * np.prod(np.minimum(c_bar, rho[s:t]))
                * np.minimum(rho_bar, rho[t])
                * deltas[t]
                for t in range(s, end - first)
            )
            targets[first + s, n] = values[s] + correction
        for s in range(end - first):
            later = targets[first + s + 1, n] - values[s + 1] if s + 1 < end - first else 0.0
            advantages[first + s, n] = deltas[s] + gamma * lam * later
    return targets, advantages


def gae_by_episode(columns, gamma, lam):
    """GAE(lambda) of each episode on its own; NaN in dummy rows. Returns targets and advantages."""
    targets, advantages = (np.full(columns["rewards"].shape, np.nan) for _ in range(2))
    for n, first, end in episodes_of(columns):
        running = 0.0
        for t in reversed(range(first, end)):
            next_value = 0.0 if columns["terminated"][t, n] else columns["values"][t + 1, n]
            running = columns["rewards"][t, n] + gamma * next_value - columns["values"][t, n] + gamma * lam * running
            advantages[t, n], targets[t, n] = running, running + columns["values"][t, n]
    return targets, advantages


def assert_equal_on_valid_rows(results, expected, valid, tolerance=1e-10):
    for result, reference in zip(results, expected, strict=True):
        assert not np.isnan(reference[valid]).any()
        np.testing.assert_allclose(result[valid], reference[valid], rtol=tolerance, atol=tolerance)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    gamma=st.floats(0, 1),
    lam=st.floats(0, 1),
    rho_bar=st.floats(0.3, 3),
    c_bar=st.floats(0.3, 3),
)
def test_vtrace_is_the_double_sum(seed, gamma, lam, rho_bar, c_bar):
    columns = make_columns(seed)
    results = call_vtrace(columns, gamma, lam, rho_bar, c_bar)
    assert_equal_on_valid_rows(results, vtrace_by_definition(columns, gamma, lam, rho_bar, c_bar), columns["valid"])


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), gamma=st.floats(0, 1), lam=st.floats(0, 1))
def test_vtrace_on_policy_is_gae(seed, gamma, lam):
    columns = make_columns(seed)
    columns["log_ratios"][:] = 0
    results = call_vtrace(columns, gamma, lam)
    assert_equal_on_valid_rows(results, gae_by_episode(columns, gamma, lam), columns["valid"])


def test_vtrace_in_float32_agrees_with_float64():
    columns = make_columns(3, steps=128, num_envs=16, done_rate=0.05)
    expected = vtrace_by_definition(columns, 0.97, 0.9, 1.0, 1.0)
    results = call_vtrace(columns, dtype=torch.float32)
    assert_equal_on_valid_rows(results, expected, columns["valid"], tolerance=2e-4)


def test_vtrace_with_lambda_one_is_impalas():
    """arXiv 1802.01561, section 4.1: v_s = V_s + sum_t gamma^(t-s) (prod_i c_i) rho_t (r_t + gamma V_t+1 - V_t)."""
    columns = make_columns(7, done_rate=0.0)
    columns["valid"][:] = True
    targets, _ = call_vtrace(columns, gamma=0.9, lam=1.0)
    rho, values, rewards = np.exp(columns["log_ratios"]), columns["values"], columns["rewards"]
    for s in range(len(rewards)):
        expected = values[s].copy()
        for t in range(s, len(rewards)):
            product = np.ones(rewards.shape[1])
            for i in range(s, t):
                product *= np.minimum(1.0, rho[i])
            expected += (
                0.9 ** (t - s) * product * np.minimum(1.0, rho[t]) * (rewards[t] + 0.9 * values[t + 1] - values[t])
            )
        np.testing.assert_allclose(targets[s], expected, rtol=1e-12, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), row=st.integers(0, 11))
def test_nothing_crosses_a_done_row(seed, row):
    """Whatever changes after a done row, other than the value of its true last observation, changes nothing before."""
    columns = make_columns(seed, done_rate=0.0)
    columns["terminated"][row], columns["dones"][row] = seed % 2 == 0, True
    before = call_vtrace(columns)
    rng = np.random.default_rng(seed)
    for name in ("log_ratios", "rewards"):
        columns[name][row + 1 :] = rng.normal(size=columns[name][row + 1 :].shape)
    columns["values"][row + 2 :] = rng.normal(size=columns["values"][row + 2 :].shape)
    for result, reference in zip(call_vtrace(columns), before, strict=True):
        assert np.array_equal(result[: row + 1], reference[: row + 1])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_dummy_rows_reach_no_other_row(seed):
    columns = make_columns(seed)
    before, dummy = call_vtrace(columns), ~columns["valid"]
    columns["rewards"][dummy], columns["log_ratios"][dummy] = 1e6, 50.0
    for result, reference in zip(call_vtrace(columns), before, strict=True):
        assert np.array_equal(result[~dummy], reference[~dummy])


def test_vtrace_without_any_importance_weight_keeps_the_values():
    columns = make_columns(5)
    columns["log_ratios"][:] = -np.inf
    targets, _ = call_vtrace(columns)
    assert np.array_equal(targets, columns["values"][:-1])


def test_filter_keeps_all_within_the_budget():
    ratios, advantages = torch.tensor([1.3, 0.7, 1.1, 0.9]), torch.tensor([1.0, -1.0, 1.0, -1.0])
    keep, tv = tv_filter(ratios, advantages, 0.11)
    assert keep.dtype == torch.bool and keep.all()
    assert tv.item() == pytest.approx(0.5 * (0.3 + 0.3 + 0.1 + 0.1) / 4)


def test_filter_drops_what_raises_the_total_variation_over_budget():
    ratios = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.0, 1.5])
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, 0.0])
    keep, tv = tv_filter(ratios, advantages, 0.2)
    assert tv.item() == pytest.approx(0.5 * 2.5 / 6)
    assert keep.tolist() == [False, True, True, False, True, True]


def test_filter_budget_includes_the_half_and_its_edge():
    """E|r - 1| = 0.5 is a total variation of 0.25: kept at a threshold of 0.25, filtered at the next smaller float."""
    ratios, advantages = torch.tensor([1.5, 0.5]), torch.tensor([1.0, -1.0])
    assert tv_filter(ratios, advantages, 0.25)[0].all()
    assert not tv_filter(ratios, advantages, 0.2499999)[0].any()


def test_filter_measures_from_the_anchor():
    ratios, anchors = torch.tensor([2.0, 2.0, 2.0]), torch.tensor([1.0, 3.0, 2.0])
    keep, tv = tv_filter(ratios, torch.tensor([1.0, 1.0, 1.0]), 0.0, anchors)
    assert tv.item() == pytest.approx(0.5 * 2 / 3)
    assert keep.tolist() == [False, True, True]


@pytest.mark.parametrize("with_anchor", [False, True])
def test_filter_sign_rule_by_finite_differences(with_anchor):
    """A small step along the gradient of a sample's r A moves its 1/2 |r - anchor| up exactly where it is dropped."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 5, generator=generator, dtype=torch.float64)  # a softmax policy per sample
    behavior = torch.randn(200, 5, generator=generator, dtype=torch.float64).log_softmax(-1)
    actions = torch.randint(5, (200, 1), generator=generator)
    advantages = torch.randn(200, generator=generator, dtype=torch.float64)
    anchors = torch.rand(200, generator=generator, dtype=torch.float64) * 2 if with_anchor else 1.0

    def ratio(parameters):
        return (parameters.log_softmax(-1) - behavior).gather(1, actions).squeeze(1).exp()

    def divergence(parameters):
        return 0.5 * (ratio(parameters) - anchors).abs()

    logits.requires_grad_()
    gradient = torch.autograd.grad((ratio(logits) * advantages).sum(), logits)[0]
    logits = logits.detach()
    rises = divergence(logits + 1e-6 * gradient) > divergence(logits)
    keep, _ = tv_filter(ratio(logits), advantages, 0.0, anchors)
    assert torch.equal(keep, ~rises)
    assert 20 < keep.sum() < 180


@pytest.mark.parametrize("filtering", [True, False])
def test_loss_divides_by_all_samples_and_gives_dropped_ones_no_gradient(filtering):
    ratios, advantages = torch.tensor([1.2, 0.8, 1.5, 0.9]), torch.tensor([-1.0, 2.0, 3.0, 0.5])
    keep = torch.tensor([1.0, 1.0, 0.0 if filtering else 1.0, 1.0])
    behavior_logprobs, values = torch.full((4,), -2.0), torch.tensor([0.0, 1.0, 2.0, 3.0], requires_grad=True)
    logprobs = (behavior_logprobs + ratios.log()).requires_grad_()
    agent = SimpleNamespace(evaluate=lambda obs, actions: (logprobs, torch.tensor(1.5), values))
    args = Args(filter=filtering, tv_threshold=0.0, norm_adv=False, ent_coef=0.1, vf_coef=0.3)
    loss, logs = vaco_minibatch(agent, args, advantages, None, None, behavior_logprobs, torch.ones(4), torch.ones(4))
    policy_loss = -(keep * ratios * advantages).sum() / 4
    assert logs["losses/policy_loss"] == pytest.approx(policy_loss.item())
    assert logs["filter/dropped"] == 1 - keep.mean() and logs["filter/gate_open"] == 1
    assert loss.item() == pytest.approx(policy_loss.item() - 0.1 * 1.5 + 0.3 * 0.5 * (1 + 0 + 1 + 4) / 4)
    loss.backward()
    torch.testing.assert_close(logprobs.grad, -keep * ratios * advantages / 4)
    torch.testing.assert_close(values.grad, 0.3 * (values.detach() - 1) / 4)


def test_advantages_are_normalised_before_they_are_filtered():
    """All are positive; two are below the mean, so that it is their ratios below 1 that raise the total variation."""
    advantages, ratios = torch.tensor([1.0, 2.0, 4.0, 5.0]), torch.tensor([1.1, 0.9, 1.2, 0.8])
    agent = SimpleNamespace(evaluate=lambda obs, actions: (ratios.log(), torch.tensor(0.0), torch.zeros(4)))
    args = Args(tv_threshold=0.0)
    _, logs = vaco_minibatch(agent, args, advantages, None, None, torch.zeros(4), torch.ones(4), torch.zeros(4))
    normalised = torch.tensor([-2.0, -1.0, 1.0, 2.0]) / 2.5**0.5
    keep = torch.tensor([True, False, False, True])
    assert logs["losses/policy_loss"] == pytest.approx(-(keep * ratios * normalised).mean().item())


def test_the_filter_measures_from_the_policy_that_is_asked_for():
    """The policy is that which acted, and far from the learner's."""
    agent = SimpleNamespace(evaluate=lambda obs, actions: (torch.zeros(2), torch.tensor(0.0), torch.zeros(2)))
    for anchor, expected in (("behavior", 0), ("learner", 1)):
        args = Args(tv_anchor=anchor, tv_threshold=0.1)
        ratios = torch.tensor([3.0, 3.0])  # of the learner's policy
        _, logs = vaco_minibatch(agent, args, torch.ones(2), None, None, torch.zeros(2), ratios, torch.zeros(2))
        assert logs["filter/gate_open"] == expected


@pytest.mark.parametrize("largest", [0.01, 100.0])  # clipped, and not
def test_one_vector_of_parameters_is_as_good_as_many(largest):
    """Values, gradients, clipping and a step of Adam are those of a copy whose parameters are apart."""
    torch.manual_seed(0)
    agent, obs, actions = MlpAgent(7, 2), torch.randn(5, 7), torch.randn(5, 2)
    apart = deepcopy(agent)
    vector = nn.Parameter(torch.cat([parameter.detach().flatten() for parameter in agent.parameters()]))
    nn.utils.vector_to_parameters(vector.data, agent.parameters())
    pairs = list(zip(agent.parameters(), apart.parameters(), strict=True))
    assert all(torch.equal(one, other) for one, other in pairs)

    def loss_of(model, _, obs, actions):
        logprobs, _, values = model.evaluate(obs, actions)
        return (logprobs + values.square()).mean(), {}

    vector.grad, logs = gradient(loss_of, agent, Args(max_grad_norm=largest), obs, actions)
    loss_of(apart, None, obs, actions)[0].backward()
    torch.testing.assert_close(logs["losses/grad_norm"], nn.utils.clip_grad_norm_(apart.parameters(), largest))
    gradients = [other.grad.flatten() for _, other in pairs]
    assert all(part.any() for part in gradients)
    torch.testing.assert_close(vector.grad, torch.cat(gradients), atol=1e-6, rtol=1e-5)
    for part, (_, other) in zip(vector.grad.split([len(part) for part in gradients]), pairs, strict=True):
        other.grad.copy_(part.view_as(other))  # but for rounding they are equal
    for parameters in ([vector], list(apart.parameters())):
        torch.optim.Adam(parameters, lr=1e-3, eps=1e-5, fused=True).step()
    for one, other in pairs:
        torch.testing.assert_close(one, other)
