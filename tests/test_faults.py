"""Nothing is lost: actors that die, signals, checkpoints, broken files and numbers."""

import math
import multiprocessing as mp
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, processes_of_session, read_curves

import impala_baseline
import ppo_async_baseline
import vaco_async_atari
import vaco_async_mujoco
from vaco_async_mujoco import Actors, Args, ContinuousEnvs, RunError, UsageError, load_checkpoint, train

COMMON = {
    "env_id": "InvertedPendulum-v4",
    "total_timesteps": 2500,
    "num_actors": 2,
    "num_envs": 4,
    "num_steps": 16,
    "rollouts_per_batch": 2,
    "num_minibatches": 4,
    "update_epochs": 2,
    "lag_schedule": "mixture",
    "lag": 3,
}
SMALL = Args(**COMMON)
SCRIPTS = [vaco_async_mujoco, vaco_async_atari, ppo_async_baseline, impala_baseline]
SHELL = [f"--{name.replace('_', '-')}={value}" for name, value in COMMON.items() if name != "total_timesteps"]


def small(script, **flags):
    """Flags for a short run of a script."""
    if script is vaco_async_atari:
        flags = {"env_id": "Breakout-v5", "num_minibatches": 2, "total_timesteps": 1000} | flags
    return script.Args(**COMMON | flags)


def actors_alive():
    return [process.pid for process in mp.active_children() if process.name.startswith("actor")]


class InBackground(threading.Thread):
    """Does `deed` to one of the actors, `victims()`, again and again until told that it is over."""

    def __init__(self, deed, pause=0.5, once=False, victims=actors_alive):
        super().__init__(daemon=True)  # a failed test must not wait for it
        self.deed, self.pause, self.once, self.over, self.deeds = deed, pause, once, threading.Event(), 0
        self.victims = victims
        self.start()

    def run(self):
        while not self.over.wait(self.pause):
            try:
                self.deed(random.choice(self.victims()))
                self.deeds += 1
            except (ProcessLookupError, IndexError):  # there is none, or it has just ended
                continue
            if self.once:
                return

    def stop(self):
        self.over.set()
        self.join()
        return self.deeds


def assert_all_end(session, seconds=5):
    deadline = time.monotonic() + seconds
    while processes_of_session(session) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not processes_of_session(session)


def kill(pid):
    os.kill(pid, signal.SIGKILL)


@pytest.mark.timeout(100)
def test_a_killed_actor_is_reported_and_replaced(monkeypatch, capsys):
    """It is killed when it has just got a ticket: no batch is complete before its successor has done that one."""
    issue, killed = Actors.issue, []

    def issue_and_kill(self, newest, freed=()):
        issue(self, newest, freed)
        if newest >= 2 and self.owed[0] and not killed:
            killed.append(self.processes[0].pid)
            kill(killed[0])

    monkeypatch.setattr(Actors, "issue", issue_and_kill)
    train(replace(SMALL, lag=0, actor_timeout=1000.0))
    assert re.search(r"actor 0 has died: SIGKILL\nrestart 1, in 0 s\n", capsys.readouterr().err)
    assert max(read_curves(".")["stats/actor_restarts"]) == 1
    assert not mp.active_children()


def test_a_stuck_actor_is_replaced(capsys):
    stopper = InBackground(lambda pid: os.kill(pid, signal.SIGSTOP), once=True)
    train(replace(SMALL, total_timesteps=60_000, actor_timeout=8.0))
    assert stopper.stop() == 1
    assert "has sent nothing for 8 s (--actor-timeout)" in capsys.readouterr().err
    assert not mp.active_children()


class Failing(ContinuousEnvs):
    def step(self, actions):
        if np.random.default_rng().random() < 0.02:
            raise ValueError("the simulator exploded")
        return super().step(actions)


def test_actors_that_fail_again_and_again_end_the_run_with_a_checkpoint(monkeypatch, capsys):
    monkeypatch.setattr(vaco_async_mujoco, "ContinuousEnvs", Failing)
    with pytest.raises(RunError) as caught:
        train(replace(SMALL, total_timesteps=10**7, max_actor_restarts=3))
    assert re.search(r"(?s)actor \d has failed:.*Traceback.*the simulator exploded", str(caught.value))
    assert "more than --max-actor-restarts allows" in str(caught.value)
    errors = capsys.readouterr().err
    assert len(re.findall(r"restart \d, in \d+ s", errors)) == 3 and "--resume runs/" in errors
    assert not mp.active_children()
    (run,) = Path("runs").iterdir()
    monkeypatch.setattr(vaco_async_mujoco, "ContinuousEnvs", ContinuousEnvs)
    step = torch.load(run / "checkpoint.pt", weights_only=True)["global_step"]
    train(replace(SMALL, total_timesteps=step + 1000, max_actor_restarts=0, resume=str(run)))


class Counting(ContinuousEnvs):
    """Observations say which process made them and at which step: [process, step, ...]."""

    count = 0

    def mark(self):
        self.obs[:, 0], self.obs[:, 1] = os.getpid(), self.count

    def write_obs(self, out, t):
        self.mark()
        super().write_obs(out, t)

    def step(self, actions):
        result = super().step(actions)
        self.count += 1
        self.mark()
        return result


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["async", "mixture"])
def test_every_batch_is_whole_while_actors_are_killed_all_the_time(schedule, monkeypatch):
    """For half a minute per schedule, an actor is killed every second or two."""
    batches, batch_of = [], vaco_async_mujoco.Rollouts.batch

    def recorded_batch(self, slots, device):
        batch = batch_of(self, slots, device)
        batches.append((self.obs[slots].clone(), self.version[slots].clone(), int(batch.valid.sum())))
        return batch

    monkeypatch.setattr(vaco_async_mujoco, "ContinuousEnvs", Counting)
    monkeypatch.setattr(vaco_async_mujoco.Rollouts, "batch", recorded_batch)
    ready = []  # actors that are ready: killed before, they would never come to it
    killer = InBackground(kill, pause=1.5, victims=lambda: ready)
    lag = 3 if schedule == "mixture" else 0
    args = replace(SMALL, num_actors=4, lag_schedule=schedule, lag=lag, max_actor_restarts=10_000)
    monkeypatch.setattr(Actors, "receive", stopping_after(30, Actors.receive, ready))
    with pytest.raises(KeyboardInterrupt):
        train(replace(args, total_timesteps=10**9, num_envs=16, num_steps=64, num_minibatches=8))
    kills = killer.stop()
    assert kills >= 5 and len(batches) >= 2
    for obs, _, _ in batches:  # [R, T + 1, C, D]
        pids, counts = obs[..., 0].flatten(1), obs[..., 1, None].squeeze(-1)
        assert (pids == pids[:, :1]).all()  # each slot by one process
        assert (counts.diff(dim=1) == 1).all()  # every step once, in order
    curves, steps = read_curves("."), read_curves(".", field="step")
    assert max(curves["stats/actor_restarts"]) >= kills - 3
    assert steps["charts/SPS"] == list(np.cumsum([valid for *_, valid in batches]))
    for v, (_, versions, _) in enumerate(batches):
        assert (versions <= v).all() and (schedule == "async" or (versions >= v - lag).all())


def stopping_after(seconds, receive, ready):
    """`Actors.receive` that ends the run as Ctrl-C does, and says which actors are ready."""
    begun = []

    def wrapped(self, *args, **kwargs):
        begun.append(time.monotonic())
        if time.monotonic() - begun[0] > seconds:
            self.end = KeyboardInterrupt()
        messages = receive(self, *args, **kwargs)
        ready[:] = [self.processes[index].pid for index, owed in enumerate(self.owed) if not owed or owed[0]]
        return messages

    return wrapped


def same(one, other):
    """Whether two checkpoints, or parts of them, are equal bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_a_checkpoint_has_all_that_training_needs(script, monkeypatch):
    """A run that is stopped after batch 3 and one that goes on have the same state there; with the same data, the
    resumed run makes the same batch 4 of it, bit for bit: targets, policy, optimiser, random numbers, lag."""
    saved, data, save_checkpoint, collect = {}, {}, script.save_checkpoint, script.Actors.collect

    def recorded_save(folder, *trained, version, **counters):
        save_checkpoint(folder, *trained, version=version, **counters)
        saved[recording, version] = torch.load(f"{folder}/checkpoint.pt", weights_only=True)

    def recorded_collect(self, batch):
        if recording == "part" and batch == 3:
            self.end = KeyboardInterrupt()  # as Ctrl-C sets it
        messages, rollouts = collect(self, batch), self.arguments[3]
        slots = [message[0] for message in messages]
        versions = rollouts.version[slots].clone()
        if recording == "whole":
            data[batch] = {name: tensor[slots].clone() for name, tensor in vars(rollouts).items()}
        elif messages and batch in data:
            assert torch.equal(versions, data[batch]["version"])  # the lag goes on as it was
            for name, tensor in vars(rollouts).items():
                tensor[slots] = data[batch][name]
        return messages

    monkeypatch.setattr(script, "save_checkpoint", recorded_save)
    monkeypatch.setattr(script.Actors, "collect", recorded_collect)
    if script is not vaco_async_atari:  # what running returns are left of cut episodes is lost, on purpose

        def without_carrying(self, actor, rollout):
            return rollout.rewards[rollout.valid]

        monkeypatch.setattr(script.RewardScaler, "discounted", without_carrying)
    extra = {"objective": "kl"} if script is ppo_async_baseline else {}
    args = small(script, total_timesteps=700, checkpoint_interval=1, **extra)
    recording = "whole"
    script.train(args)
    whole = Path("runs").rename("whole")
    recording = "part"
    with pytest.raises(KeyboardInterrupt):
        script.train(args)
    (run,) = Path("runs").iterdir()
    recording = "resumed"
    script.train(replace(args, resume=str(run)))
    shutil.rmtree(whole)
    ignored = {"seconds", "args", "last_returns"}
    assert len(data) > 4
    for version in range(4, 6):
        assert ("resumed", version) in saved, saved.keys()
        for part in saved["whole", version].keys() - ignored:
            assert same(saved["whole", version][part], saved["resumed", version][part]), (version, part)
    assert same(saved["whole", 3]["agent"], saved["part", 3]["agent"])
    steps = read_curves(".", field="step")["charts/SPS"]
    assert len(steps) == len(set(steps)) == len(data)  # one folder, one curve


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The run folder of a short run with its checkpoint."""
    folder, before = tmp_path_factory.mktemp("run"), os.getcwd()
    os.chdir(folder)
    train(replace(SMALL, total_timesteps=300))
    os.chdir(before)
    (run,) = (folder / "runs").iterdir()
    return run


def test_what_may_change_and_what_may_not_when_a_run_goes_on(checkpoint):
    run = Path(shutil.copytree(checkpoint, "copy"))
    args = replace(SMALL, resume=str(run), total_timesteps=900)
    agent = train(replace(args, num_actors=3, max_actor_restarts=1, actor_timeout=50.0, actor_nice=1))
    assert all(torch.isfinite(tensor).all() for tensor in agent.state_dict().values())
    assert load_checkpoint(str(run))[1]["global_step"] >= 900
    wrong = {"env_id": "Hopper-v4", "lag": 4, "num_envs": 8, "gamma": 0.9, "seed": 2, "total_timesteps": 200}
    for name, value in wrong.items():
        with pytest.raises(UsageError, match=f"--{name.replace('_', '-')} {value}: the checkpoint"):
            train(replace(args, **{"total_timesteps": 5000} | {name: value}))


def broken_files(checkpoint):
    whole = (checkpoint / "checkpoint.pt").read_bytes()
    Path("empty").write_bytes(b"")
    Path("cut").write_bytes(whole[: len(whole) // 2])
    Path("text").write_text("step,return\n1,2\n")
    torch.save({"model": torch.zeros(2)}, "foreign")
    torch.save({"script": "vaco_async_atari.py"}, "sibling")
    torch.save(Args(), "code")  # would run code if it were loaded
    Path("folder").mkdir()
    return ["empty", "cut", "text", "foreign", "code", "folder", "nowhere", "sibling"]


def test_files_that_are_no_checkpoint_are_one_line(checkpoint):
    for name in broken_files(checkpoint):
        with pytest.raises(UsageError) as caught:
            train(replace(SMALL, resume=name))
        message = str(caught.value)
        assert message.startswith(f"--resume {name}: ") and "\n" not in message and len(message) < 250, message
    assert "a file of vaco_async_atari.py, not of vaco_async_mujoco.py" in message
    assert not mp.active_children()


def test_a_full_disk_leaves_the_old_checkpoint(checkpoint):
    """A limit on the size of files acts as a disk that is full in the middle of the write."""
    run = Path(shutil.copytree(checkpoint, "copy"))
    before = (run / "checkpoint.pt").read_bytes()
    limit = "import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)); sys.argv = sys.argv[1:]; "
    limit += "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", limit, str(REPOSITORY / "vaco_async_mujoco.py"), "--resume", str(run)]
    done = subprocess.run([*command, "--total-timesteps", "900"], capture_output=True, text=True)
    assert done.returncode == 1
    expected = "error: cannot write copy/checkpoint.pt (File too large); what was there before is as it was\n"
    assert done.stderr == expected
    assert (run / "checkpoint.pt").read_bytes() == before and not (run / "checkpoint.pt.tmp").exists()


@pytest.mark.parametrize(
    ("script", "number"),
    [(vaco_async_mujoco, signal.SIGINT)] + [(script, signal.SIGTERM) for script in SCRIPTS],
    ids=lambda part: getattr(part, "__name__", str(part)),
)
def test_signals_save_and_leave(script, number):
    flags = [flag for flag in SHELL if script is not vaco_async_atari or "env-id" not in flag]
    command = [sys.executable, REPOSITORY / f"{script.__name__}.py", *flags, "--total-timesteps", "1000000"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a background job inherits that it ignores Ctrl-C
    with subprocess.Popen(command, **pipes, preexec_fn=heed) as program:
        assert program.stdout.readline().startswith("step ")
        time.sleep(1)
        begun = time.monotonic()
        os.killpg(program.pid, number)  # a terminal's and a scheduler's signals reach all processes
        _, errors = program.communicate(timeout=30)
        assert time.monotonic() - begun < 10
        assert program.returncode == 128 + number and "Traceback" not in errors, errors
    assert_all_end(program.pid)
    (run,) = Path("runs").iterdir()
    step = int(re.search(r"stopped at step (\d+); --resume runs/\S+ goes on from there", errors)[1])
    assert torch.load(run / "checkpoint.pt", weights_only=True)["global_step"] == step > 0
    assert max(read_curves(".", field="step")["charts/SPS"]) == step  # logs are flushed


def test_a_second_ctrl_c_ends_a_batch_that_takes_minutes(monkeypatch):
    """The learner sends both signals to itself, from a thread, while the first batch trains."""
    begun = []

    def interrupt():
        for _ in range(2):
            time.sleep(3)  # within a second of the handling of the first, the second counts as the same one
            os.kill(os.getpid(), signal.SIGINT)

    def forever(*args):
        if not begun:
            begun.append(threading.Thread(target=interrupt))
            begun[0].start()
        return minibatch(*args)

    minibatch = vaco_async_mujoco.vaco_minibatch
    monkeypatch.setattr(vaco_async_mujoco, "vaco_minibatch", forever)
    with pytest.raises(KeyboardInterrupt):
        train(replace(SMALL, update_epochs=10**6))
    begun[0].join()
    (run,) = Path("runs").iterdir()
    assert not (run / "checkpoint.pt").exists() and not mp.active_children()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_wrong_files_and_flags_of_resume_are_one_line(script, checkpoint, monkeypatch):
    wrong = [["--resume", name] for name in broken_files(checkpoint)]
    own = ["--resume", str(checkpoint)]
    more = ["--total-timesteps", "5000", *own]
    wrong += [["--lag", "5", *more], ["--seed", "2", *more]] if script is vaco_async_mujoco else [own]
    wrong += [["--actor-timeout", "0"], ["--max-actor-restarts", "-1"], ["--checkpoint-interval", "-1"]]
    wrong += [["--resume"], ["--checkpoint-interval", "often"], ["--num-actors", "1", "--rollouts-per-batch", "1000"]]
    monkeypatch.setattr(script.Actors, "start", None)  # nothing starts
    for flags in wrong:
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *flags])
        with pytest.raises(script.UsageError) as caught:
            script.train(script.typed_flags())
        assert "\n" not in str(caught.value) and flags[0] in str(caught.value), (flags, caught.value)
    assert not Path("runs").exists()


def test_an_actor_that_cannot_be_started_again_ends_the_run_with_a_checkpoint(monkeypatch):
    launch = Actors.launch

    def failing_launch(self, index, pause=0):
        if self.restarts:
            raise OSError(24, "Too many open files")
        launch(self, index, pause)

    monkeypatch.setattr(Actors, "launch", failing_launch)
    killer = InBackground(kill, once=True)
    with pytest.raises(RunError, match=r"(?s)has died: SIGKILL.*cannot be started.*Too many open files"):
        train(replace(SMALL, total_timesteps=10**7))
    killer.stop()
    assert list(Path("runs").glob("*/checkpoint.pt"))


class Slow(ContinuousEnvs):
    def step(self, actions):
        time.sleep(1)
        return super().step(actions)


def test_actors_leave_with_the_learner_from_the_middle_of_a_rollout():
    code = "import test_faults as t; t.vaco_async_mujoco.ContinuousEnvs = t.Slow; "
    code += "print('go', flush=True); t.train(t.SMALL)"
    command = [sys.executable, "-c", f"if __name__ == '__main__':\n    {code}"]
    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'tests'}"}
    pipes = {"stdout": subprocess.PIPE, "text": True, "start_new_session": True, "env": environment}
    with subprocess.Popen(command, **pipes) as program:
        assert program.stdout.readline() == "go\n"
        deadline = time.monotonic() + 60
        while len(processes_of_session(program.pid)) < 5 and time.monotonic() < deadline:  # with tracker and server
            time.sleep(0.1)
        time.sleep(5)  # in the midst of 16 slow steps
        program.kill()
    assert_all_end(program.pid)


class BadReward(ContinuousEnvs):
    value = np.nan

    def step(self, actions):
        rewards, *others = super().step(actions)
        bad = np.random.default_rng().random(rewards.shape) < 0.001
        return np.where(bad, self.value, rewards), *others


class BadObs(ContinuousEnvs):
    def step(self, actions):
        result = super().step(actions)
        self.obs[np.random.default_rng().random(self.obs.shape) < 0.0005] = np.inf
        return result


@pytest.mark.parametrize(("envs", "name"), [(BadReward, "rewards"), (BadObs, "obs")])
def test_data_that_is_not_finite_is_named_with_its_actor(envs, name, monkeypatch):
    monkeypatch.setattr(vaco_async_mujoco, "ContinuousEnvs", envs)
    with pytest.raises(RunError, match=rf"not finite from actor \d, after step \d+: {name}"):
        train(replace(SMALL, total_timesteps=10**6, checkpoint_interval=1))
    for state in [torch.load(path, weights_only=True) for path in Path("runs").glob("*/checkpoint.pt")]:
        assert all(torch.isfinite(tensor).all() for tensor in state["agent"].values())
    assert not mp.active_children()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_results_that_are_not_finite_are_named_and_neither_published_nor_saved(script, monkeypatch):
    published, publish = [], script.PolicyStore.publish
    monkeypatch.setattr(
        script.PolicyStore, "publish", lambda self, agent, v: published.append(v) or publish(self, agent, v)
    )
    saved, norm, steps = [], torch.nn.utils.clip_grad_norm_, []

    def breaking_norm(parameters, limit):
        parameters = list(parameters)
        steps.append(len(published))
        if len(published) == 3:  # versions 0, 1 and 2 are out
            parameters[0].grad.fill_(math.nan)
        return norm(parameters, limit)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", breaking_norm)
    save_checkpoint = script.save_checkpoint

    def recorded_save(*trained, version, **counters):
        saved.append(version)
        save_checkpoint(*trained, version=version, **counters)

    monkeypatch.setattr(script, "save_checkpoint", recorded_save)
    with pytest.raises(script.RunError, match=r"not finite in the batch after step \d+: .*losses/grad_norm, "):
        script.train(small(script, checkpoint_interval=1))
    assert published == [0, 1, 2] and saved == [1, 2]
    (run,) = Path("runs").iterdir()
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    assert state["version"] == 2 and all(torch.isfinite(tensor).all() for tensor in state["agent"].values())
