"""Whole runs: lag as ordered, bit-equal repetition, masks, learning, and an end without leftovers."""

import math
import multiprocessing as mp
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, needs_compiler, processes_of_session, read_curves

import vaco_async_mujoco
from vaco_async_mujoco import Actors, Args, MlpAgent, PolicyStore, continuous_sizes, train

SMALL = Args(
    env_id="InvertedPendulum-v4",
    total_timesteps=2500,
    num_actors=2,
    num_envs=4,
    num_steps=16,
    rollouts_per_batch=2,
    num_minibatches=4,
    update_epochs=2,
)
TAGS = {
    "charts": {"episodic_return", "episodic_length", "learning_rate", "SPS"},
    "losses": {"policy_loss", "value_loss", "entropy", "old_approx_kl", "approx_kl", "explained_variance", "grad_norm"},
    "lag": {"versions_mean", "versions_max", "tv_backward", "tv_forward", "tv_total", "ess"},
    "filter": {"gate_open", "dropped"},
    "stats": {"actor_wait", "learner_wait", "rollout_time", "update_time", "queue_size"},
}


@pytest.fixture
def on_rollout(monkeypatch):
    """Let a function see, and change, every rollout {field: [T (obs: T + 1), C, ...]} before the learner uses it."""
    check_finite = vaco_async_mujoco.check_finite

    def register(function):
        def check(place, numbers):
            if "valid" in numbers:
                function(numbers)
            check_finite(place, numbers)

        monkeypatch.setattr(vaco_async_mujoco, "check_finite", check)

    return register


def state_of(agent):
    return {name: tensor.clone() for name, tensor in agent.state_dict().items()}


def assert_bit_equal(first, second):
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize(("schedule", "lag"), [("async", 0), ("fixed", 0), ("fixed", 2), ("mixture", 3)])
def test_every_schedule_trains_to_the_end(schedule, lag, capsys):
    agent = train(replace(SMALL, lag_schedule=schedule, lag=lag))
    assert all(torch.isfinite(tensor).all() for tensor in agent.state_dict().values())
    curves = read_curves(".")
    assert {tag for tag in curves if "/" in tag} == {f"{group}/{name}" for group in TAGS for name in TAGS[group]}
    assert all(math.isfinite(value) for tag in curves for value in curves[tag])
    assert curves["charts/learning_rate"][0] == pytest.approx(3e-4)
    assert np.all(np.diff(curves["charts/learning_rate"]) < 0)
    shares = ("filter/gate_open", "filter/dropped", "lag/ess", "stats/actor_wait", "stats/learner_wait", "lag/tv_total")
    assert all(0 <= value <= 1 + 1e-6 for tag in shares for value in curves[tag])
    assert max(curves["lag/versions_max"]) <= {"async": 2, "fixed": lag, "mixture": lag}[schedule]
    summary = capsys.readouterr().out.splitlines()[-1]
    assert "InvertedPendulum-v4" in summary and os.listdir("runs")[0] in summary
    assert not mp.active_children()


def test_zero_lag_is_on_policy():
    train(replace(SMALL, lag_schedule="fixed", lag=0))
    curves = read_curves(".")
    assert set(curves["lag/versions_max"]) == {0.0}
    assert max(curves["lag/tv_backward"]) < 1e-4 and min(curves["lag/ess"]) > 1 - 1e-6
    np.testing.assert_allclose(curves["lag/tv_forward"], curves["lag/tv_total"], atol=1e-4)
    assert np.mean(curves["lag/tv_total"]) > 1e-3


def test_fixed_lag_uses_exactly_those_versions():
    train(replace(SMALL, lag_schedule="fixed", lag=3))
    curves = read_curves(".")
    expected = [min(batch, 3) for batch in range(len(curves["lag/versions_max"]))]
    assert len(expected) > 15
    assert curves["lag/versions_mean"] == expected and curves["lag/versions_max"] == expected
    assert min(curves["lag/tv_backward"][1:]) > 1e-3


class Disturber(threading.Thread):
    """Stops one actor process after the other for a moment, with SIGSTOP, while training goes on."""

    def __init__(self):
        super().__init__(daemon=True)
        self.over, self.stops = threading.Event(), 0

    def run(self):
        rng = np.random.default_rng(0)
        while not self.over.is_set():
            actors = [process for process in mp.active_children() if process.name.startswith("actor")]
            if actors:
                pid = rng.choice(actors).pid
                try:
                    os.kill(pid, signal.SIGSTOP)
                    time.sleep(rng.uniform(0.01, 0.1))
                    os.kill(pid, signal.SIGCONT)
                    self.stops += 1
                except ProcessLookupError:  # training has just ended
                    pass
            time.sleep(0.01)


@pytest.mark.parametrize(("schedule", "lag"), [("fixed", 0), ("fixed", 2), ("mixture", 3)])
def test_lockstep_runs_are_bit_equal_whatever_the_actors_timing(schedule, lag):
    args = replace(SMALL, lag_schedule=schedule, lag=lag, num_actors=3)
    undisturbed = state_of(train(args))
    disturber = Disturber()
    disturber.start()
    disturbed = state_of(train(args))
    disturber.over.set()
    disturber.join()
    assert disturber.stops >= 3
    assert_bit_equal(undisturbed, disturbed)
    other_seed = state_of(train(replace(args, seed=2)))
    assert not torch.equal(undisturbed["actor_mean.0.weight"], other_seed["actor_mean.0.weight"])


def test_actors_draw_their_own_noise(on_rollout):
    """At version 0 the means are almost 0, so equal noise would make equal actions."""
    actions = []
    on_rollout(lambda rollout: actions.append(rollout["actions"].flatten().tolist()))
    for seed in (1, 2):
        train(replace(SMALL, lag_schedule="fixed", lag=0, num_steps=64, total_timesteps=1, seed=seed))
    correlations = np.corrcoef(actions) - np.eye(4)
    assert np.abs(correlations).max() < 0.3


def test_dummy_steps_reach_nothing(on_rollout):
    """Garbage in every dummy row that the learner sees changes no bit of weights or statistics. (Their observations may
    be garbage only because no episode is truncated here: a truncated one is bootstrapped from the dummy row's.)"""
    args = replace(SMALL, lag_schedule="mixture", lag=2)
    clean, poisoned = state_of(train(args)), []

    garbage_of = {"obs": 7.0, "actions": 3.0, "logprobs": -20.0, "rewards": 1e6, "discounted": 1e6}

    def poison(rollout):
        dummy = ~rollout["valid"]
        for name, garbage in garbage_of.items():
            rollout[name][: args.num_steps][dummy] = garbage
        poisoned.append(dummy.sum())

    on_rollout(poison)
    assert_bit_equal(clean, state_of(train(args)))
    assert sum(poisoned) > 50


def test_every_vaco_flag_changes_the_result():
    args = replace(SMALL, total_timesteps=1000, lag_schedule="fixed", lag=2, tv_threshold=0.01)
    variants = {
        "base": {},
        "no align": {"align": False},
        "no filter": {"filter": False},
        "anchor": {"tv_anchor": "learner"},
        "threshold": {"tv_threshold": 0.02},
        "rho bar": {"rho_bar": 0.9},
        "c bar": {"c_bar": 0.9},
        "discount": {"gamma": 0.9},
        "lambda": {"gae_lambda": 0.9},
        "normalisation": {"norm_adv": False},
        "entropy": {"ent_coef": 0.01},
        "value": {"vf_coef": 0.1},
        "gradient norm": {"max_grad_norm": 0.1},
        "learning rate": {"learning_rate": 1e-3},
        "annealing": {"anneal_lr": False},
    }
    weights = [state_of(train(replace(args, **flags)))["actor_mean.0.weight"] for flags in variants.values()]
    for i, name in enumerate(variants):
        for j in range(i):
            assert not torch.equal(weights[i], weights[j]), f"{name} does what {list(variants)[j]} does"


@pytest.mark.parametrize("env_id", ["InvertedPendulum-v4", "Pendulum-v1"])  # ends by termination, by truncation
def test_train_computes_what_it_logs_from_the_right_rows(env_id, monkeypatch, on_rollout):
    """Every input of the algorithm and every logged number, recomputed from the recorded batches and versions."""
    rollouts, versions, aligned, filtered = [], {}, [], []
    on_rollout(lambda rollout: rollouts.append({name: field.clone() for name, field in rollout.items()}))
    record = {
        (PolicyStore, "publish"): lambda _, self, agent, version: versions.update({version: state_of(agent)}),
        (vaco_async_mujoco, "vtrace"): lambda result, *inputs: aligned.append((inputs, result)),
        (vaco_async_mujoco, "tv_filter"): lambda result, *inputs: filtered.append((inputs, result)),
    }

    def recorded(function, note):
        def wrapper(*inputs):
            result = function(*inputs)
            note(result, *inputs)
            return result

        return wrapper

    for (owner, name), note in record.items():
        monkeypatch.setattr(owner, name, recorded(getattr(owner, name), note))
    args = replace(SMALL, env_id=env_id, lag_schedule="fixed", lag=1, num_steps=205, num_minibatches=5)
    train(replace(args, total_timesteps=4500, tv_threshold=0.02))
    curves, steps = read_curves("."), read_curves(".", field="step")
    batches = [
        SimpleNamespace(**{name: torch.cat([first[name], second[name]], dim=1) for name in first})
        for first, second in zip(rollouts[::2], rollouts[1::2], strict=True)
    ]
    assert len(batches) >= 3 and (env_id != "Pendulum-v1" or sum(batch.truncated.sum() for batch in batches) > 0)

    now, past = (MlpAgent(*continuous_sizes(env_id)) for _ in range(2))
    seen_obs, seen_steps = [], 0
    returns, running = [], torch.zeros(2 * args.num_envs, dtype=torch.float64)
    per_batch = args.update_epochs * args.num_minibatches
    for v, batch in enumerate(batches):
        past.load_state_dict(versions[v])
        now.load_state_dict(versions[v + 1])
        now.set_statistics(
            versions[v]["obs_mean"], versions[v]["obs_std"], first=v == 0
        )  # as they were during the updates
        with torch.no_grad():
            obs = past.normalize(batch.obs)
            learner = past.evaluate(obs[:-1], batch.actions)[0] - batch.logprobs
            final = ((now.evaluate(obs[:-1], batch.actions)[0] - batch.logprobs).exp())[batch.valid]
            values = past.get_value(obs)
        (log_ratios, rewards, given_values, terminated, dones, *settings), (targets, _) = aligned[v]
        torch.testing.assert_close(log_ratios, learner, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(given_values, values, atol=1e-4, rtol=1e-4)
        assert torch.equal(terminated, batch.terminated.float())
        assert torch.equal(dones, (batch.terminated | batch.truncated).float())
        for t in range(args.num_steps):
            running = torch.where(batch.valid[t], 0.99 * running + batch.rewards[t], 0)
            returns += running[batch.valid[t]].tolist()
        expected = (batch.rewards / np.std(returns)).clamp(-10, 10)
        torch.testing.assert_close(rewards[batch.valid], expected[batch.valid], atol=1e-4, rtol=1e-3)
        assert settings == [0.99, 0.95, 1.0, 1.0]

        calls = filtered[v * per_batch : (v + 1) * per_batch]
        sizes = [len(ratios) for (ratios, *_), _ in calls]
        assert sum(sizes) == args.update_epochs * batch.valid.sum() and max(sizes) - min(sizes) <= 1
        for (_, mb_advantages, threshold, anchors), _ in calls:
            assert abs(mb_advantages.mean()) < 1e-5 and abs(mb_advantages.std(correction=0) - 1) < 1e-3
            assert threshold == 0.02 and anchors == 1.0

        valid, rho = batch.valid, learner[batch.valid].exp()
        seen_obs.append(batch.obs[:-1][valid].double())
        seen_steps += int(valid.sum())
        all_obs = torch.cat(seen_obs)
        torch.testing.assert_close(versions[v + 1]["obs_mean"], all_obs.mean(0).float(), atol=1e-4, rtol=1e-3)
        obs_std = all_obs.std(0, correction=0).float()
        torch.testing.assert_close(versions[v + 1]["obs_std"], obs_std, atol=1e-4, rtol=1e-3)
        mean = torch.stack
        expected = {
            "lag/tv_backward": 0.5 * (rho - 1).abs().mean(),
            "lag/tv_forward": 0.5 * (final - rho).abs().mean(),
            "lag/tv_total": 0.5 * (final - 1).abs().mean(),
            "lag/ess": rho.sum() ** 2 / (len(rho) * (rho**2).sum()),
            "losses/explained_variance": 1 - (targets - given_values[:-1])[valid].var() / targets[valid].var(),
            "losses/old_approx_kl": mean([-ratios.log().mean() for (ratios, *_), _ in calls]).mean(),
            "losses/approx_kl": mean([(ratios - 1 - ratios.log()).mean() for (ratios, *_), _ in calls]).mean(),
            "losses/policy_loss": mean([-(keep * r * a).mean() for (r, a, *_), (keep, _) in calls]).mean(),
            "filter/gate_open": mean([(tv > 0.02).float() for _, (_, tv) in calls]).mean(),
            "filter/dropped": mean([1 - keep.float().mean() for _, (keep, _) in calls]).mean(),
            "charts/learning_rate": 3e-4 * (1 - (steps["charts/SPS"][v - 1] if v else 0) / 4500),
        }
        for tag, value in expected.items():
            assert curves[tag][v] == pytest.approx(float(value), rel=2e-3, abs=2e-5), (tag, v)
        assert steps["charts/SPS"][v] == seen_steps


def test_waiting_is_the_time_in_collect(monkeypatch):
    """By a clock that stands still but for 3 s in `collect` and 1 s in `publish`: 3/4 of the time is waiting."""
    clock = SimpleNamespace(now=0.0)

    def taking(seconds, function):
        def wrapper(*inputs, **named):
            result = function(*inputs, **named)
            clock.now += seconds
            return result

        return wrapper

    fake_time = SimpleNamespace(perf_counter=lambda: clock.now, time=time.time)
    monkeypatch.setattr(vaco_async_mujoco, "time", fake_time)
    monkeypatch.setattr(vaco_async_mujoco.Actors, "collect", taking(3.0, vaco_async_mujoco.Actors.collect))
    monkeypatch.setattr(PolicyStore, "publish", taking(1.0, PolicyStore.publish))
    train(replace(SMALL, lag_schedule="fixed"))
    curves, steps = read_curves("."), read_curves(".", field="step")
    assert set(curves["stats/learner_wait"]) == {0.75} and set(curves["stats/update_time"]) == {1.0}
    expected = [step / (4.0 * (batch + 1)) for batch, step in enumerate(steps["charts/SPS"])]
    np.testing.assert_allclose(curves["charts/SPS"], expected, rtol=1e-6)


def test_no_filter_drops_nothing_and_a_budget_of_zero_drops_much():
    train(replace(SMALL, filter=False, tv_threshold=0.0))
    curves = read_curves(".")
    assert set(curves["filter/dropped"]) == {0.0}
    os.rename("runs", "other")
    train(replace(SMALL, tv_threshold=0.0))
    assert 0.1 < np.mean(read_curves(".")["filter/dropped"]) < 0.9


def test_actors_are_as_nice_as_asked_with_all_their_threads(monkeypatch):
    collect, seen = Actors.collect, []

    def recorded_collect(self, batch):
        messages = collect(self, batch)
        for process in self.processes:
            threads = [int(thread) for thread in os.listdir(f"/proc/{process.pid}/task")]
            seen.append(sorted(os.getpriority(os.PRIO_PROCESS, thread) for thread in threads))
        return messages

    monkeypatch.setattr(Actors, "collect", recorded_collect)
    train(replace(SMALL, actor_nice=3))
    for nices in seen:
        assert len(nices) > 2  # envpool's threads, too
        # but for the thread that does nothing but wait for the end of the learner
        assert set(nices[1:]) == {os.getpriority(os.PRIO_PROCESS, 0) + 3}


@pytest.mark.parametrize("env_id", ["Swimmer-v4", "Ant-v5", "FishSwim-v1", "ManipulatorBringBall-v1", "Pendulum-v1"])
def test_any_continuous_task_runs(env_id):
    agent = train(replace(SMALL, env_id=env_id, total_timesteps=500))
    assert all(torch.isfinite(tensor).all() for tensor in agent.state_dict().values())


def heeds(pid, signum):
    """Whether a process neither blocks nor ignores a signal (proc(5): masks in hexadecimal, bit n - 1 is signal n)."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return not (int(status["SigBlk"], 16) | int(status["SigIgn"], 16)) >> (signum - 1) & 1


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_the_program(end):
    """Ctrl-C reaches all processes of a terminal; kill -9 only the learner."""
    command = [sys.executable, REPOSITORY / "vaco_async_mujoco.py", "--env-id", "Hopper-v4"]
    command += ["--rollouts-per-batch", "4"]  # the first batch has something of every actor
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    # Under nohup or as a background job a program inherits that it ignores Ctrl-C
    heed_ctrl_c = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, **pipes, preexec_fn=heed_ctrl_c) as program:
        assert " SPS" in program.stdout.readline()
        processes = processes_of_session(program.pid)
        assert len(processes) >= 5
        # Only the learner heeds Ctrl-C: else it depends on who is faster whether actors print tracebacks
        assert not [pid for pid in processes if pid != program.pid and heeds(pid, signal.SIGINT)]
        (os.killpg if end == signal.SIGINT else os.kill)(program.pid, end)
        _, errors = program.communicate(timeout=30)
    if end == signal.SIGINT:
        assert program.returncode == 130
        assert errors.splitlines()[-1].startswith("stopped at step ") and "Traceback" not in errors
    deadline = time.monotonic() + 10
    while processes_of_session(program.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not processes_of_session(program.pid)


@pytest.mark.slow
@needs_compiler
def test_a_compiled_run_is_the_eager_one_up_to_rounding():
    args = replace(SMALL, lag_schedule="mixture", lag=2, tv_threshold=0.02, total_timesteps=400)
    eager, compiled = state_of(train(args)), state_of(train(replace(args, compile=True)))
    for name in eager:
        torch.testing.assert_close(eager[name], compiled[name], atol=1e-3, rtol=1e-3, msg=name)
    assert not torch.equal(eager["actor_mean.0.weight"], compiled["actor_mean.0.weight"])  # it did compile


@pytest.mark.slow
def test_it_learns_to_balance_the_pendulum():
    """With the sign of the loss broken, or no learning at all, returns stay under 10; a perfect one is 1000."""
    args = replace(SMALL, total_timesteps=60_000, num_envs=8, num_steps=128, num_minibatches=32, update_epochs=10)
    train(replace(args, lag_schedule="mixture", lag=2))
    returns = read_curves(".")["charts/episodic_return"]
    assert returns[0] < 30
    assert np.mean(returns[-5:]) > 300
