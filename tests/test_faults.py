"""Nothing is lost: actors that die, signals, checkpoints, and numbers that are not finite."""

import importlib
import math
import multiprocessing as mp
import os
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

import vaco_async_mujoco
from vaco_async_mujoco import Actors, Args, ContinuousEnvs, train

COMMON = {
    "env_id": "InvertedPendulum-v4",
    "total_timesteps": 1500,
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
SCRIPTS = ["vaco_async_mujoco", "vaco_async_atari", "ppo_async_baseline", "impala_baseline"]


def small(name, **flags):
    """Flags for a short run of a script."""
    own = {"env_id": "Breakout-v5", "num_minibatches": 2} if name == "vaco_async_atari" else {}
    return COMMON | own | flags


def saved_in_the_run():
    """The checkpoint of the only run."""
    (path,) = Path("runs").glob("*/checkpoint.pt")
    return torch.load(path, weights_only=True)


def assert_all_end(session, seconds=5):
    deadline = time.monotonic() + seconds
    while processes_of_session(session) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not processes_of_session(session)


class Counting(ContinuousEnvs):
    """Observations say which process made them and at which step: [process, step, ...]."""

    count = 0

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.mark()

    def mark(self):
        self.obs[:, 0] = os.getpid()
        self.obs[:, 1] = self.count

    def step(self, actions):
        result = super().step(actions)
        self.count += 1
        self.mark()
        return result


@pytest.fixture
def rollouts(monkeypatch):
    """The fields of all rollouts that the learner has used, of environments that are `Counting`."""
    used, check_finite = [], vaco_async_mujoco.check_finite

    def recorded_check(place, numbers):
        if "valid" in numbers:
            used.append({name: field.numpy().copy() for name, field in numbers.items()})
        check_finite(place, numbers)

    monkeypatch.setattr(vaco_async_mujoco, "ContinuousEnvs", Counting)
    monkeypatch.setattr(vaco_async_mujoco, "check_finite", recorded_check)
    return used


def test_a_killed_actor_ends_the_run_with_a_checkpoint(monkeypatch, capsys):
    collect = Actors.collect

    def killing_collect(self, batch):
        if batch == 2:
            os.kill(self.processes[0].pid, signal.SIGKILL)
            self.processes[0].join()
        return collect(self, batch)

    monkeypatch.setattr(Actors, "collect", killing_collect)
    with pytest.raises(SystemExit, match=r"^actor 0 died with exit code -9$"):
        train(SMALL)
    assert "--resume runs/" in capsys.readouterr().err
    assert saved_in_the_run()["version"] == 2
    assert not mp.active_children()


class Stuck(ContinuousEnvs):
    """Stays in its 20th step."""

    count = 0

    def step(self, actions):
        self.count += 1
        if self.count == 20:
            threading.Event().wait()
        return super().step(actions)


def test_a_stuck_actor_ends_the_run(monkeypatch):
    monkeypatch.setattr(vaco_async_mujoco, "ContinuousEnvs", Stuck)
    with pytest.raises(SystemExit, match=r"^actor \d was stuck \(--actor-timeout\)$"):
        train(replace(SMALL, actor_timeout=15.0))
    assert not mp.active_children()


class Failing(ContinuousEnvs):
    count = 0

    def step(self, actions):
        self.count += 1
        if self.count == 40:  # in the third rollout
            raise ValueError("the simulator exploded")
        return super().step(actions)


def test_a_run_whose_environment_has_failed_goes_on(monkeypatch):
    monkeypatch.setattr(vaco_async_mujoco, "ContinuousEnvs", Failing)
    with pytest.raises(SystemExit, match=r"actor \d died with exit code 1"):
        train(replace(SMALL, total_timesteps=10**7))
    (run,) = Path("runs").iterdir()
    monkeypatch.setattr(vaco_async_mujoco, "ContinuousEnvs", ContinuousEnvs)
    step = saved_in_the_run()["global_step"]
    train(replace(SMALL, total_timesteps=step + 500, resume=str(run)))


@pytest.mark.parametrize(("schedule", "lag"), [("async", 0), ("mixture", 3)])
def test_every_rollout_is_whole(schedule, lag, rollouts):
    train(replace(SMALL, num_actors=4, lag_schedule=schedule, lag=lag))
    assert len(rollouts) >= 20
    for rollout in rollouts:
        pids, counts = rollout["obs"][..., 0], rollout["obs"][..., 1]  # [T + 1, C]
        assert (pids == pids[0]).all()  # by one process
        assert (np.diff(counts, axis=0) == 1).all()  # every step once, in order


def same(one, other):
    """Whether two checkpoints, or parts of them, are equal bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_checkpoint_has_all_that_training_needs(name, monkeypatch):
    """A run that is stopped after batch 3 and one that goes on have the same state there; with the same data, the
    resumed run makes the same batches after it, bit for bit: targets, policy, optimiser, random numbers, lag."""
    script = importlib.import_module(name)
    saved, data, fields, save, collect, init = {}, {}, {}, torch.save, script.Actors.collect, script.Actors.__init__

    def recorded_init(self, *arguments):
        fields.update(arguments[-1])
        init(self, *arguments)

    def recorded_save(state, path):
        save(state, path)
        saved[recording, state["version"]] = torch.load(path, weights_only=True)

    def recorded_collect(self, batch):
        if recording == "part" and batch == 3:
            self.stop_reasons.append(130)  # as Ctrl-C does
        messages = collect(self, batch)
        slots = [message[0] % self.num_slots for message in messages]
        versions = [message[1] for message in messages]
        if recording == "whole":
            data[batch] = versions, {field: tensor[slots].clone() for field, tensor in fields.items()}
        elif messages:
            assert versions == data[batch][0]  # the lag goes on as it was
            for field, tensor in fields.items():
                tensor[slots] = data[batch][1][field]
        return messages

    monkeypatch.setattr(torch, "save", recorded_save)
    monkeypatch.setattr(script.Actors, "__init__", recorded_init)
    monkeypatch.setattr(script.Actors, "collect", recorded_collect)
    extra = {"objective": "kl"} if name == "ppo_async_baseline" else {}
    args = script.Args(**small(name, total_timesteps=700, checkpoint_interval=1, **extra))
    recording = "whole"
    script.train(args)
    whole = Path("runs").rename("whole")
    recording = "part"
    with pytest.raises(SystemExit) as caught:
        script.train(args)
    assert caught.value.code == 130
    (run,) = Path("runs").iterdir()
    recording = "resumed"
    script.train(replace(args, resume=str(run)))
    shutil.rmtree(whole)
    assert len(data) >= 6
    for version in range(4, len(data) + 1):
        for part in saved["whole", version].keys() - {"args", "last_returns"}:
            assert same(saved["whole", version][part], saved["resumed", version][part]), (version, part)
    assert same(saved["whole", 3]["agent"], saved["part", 3]["agent"])
    assert not same(saved["whole", 3]["agent"], saved["whole", 4]["agent"])
    steps = read_curves(".", field="step")["charts/SPS"]
    assert len(steps) == len(set(steps)) == len(data)  # one folder, one curve


def test_a_run_goes_on_with_other_flags_and_its_complete_one_ends_at_once():
    train(replace(SMALL, total_timesteps=300))
    (run,) = Path("runs").iterdir()
    saved = saved_in_the_run()
    args = replace(SMALL, resume=str(run), total_timesteps=900)
    train(replace(args, num_actors=3, actor_timeout=50.0, actor_nice=1, learning_rate=1e-3))
    later = saved_in_the_run()
    assert later["global_step"] >= 900 and later["version"] > saved["version"]
    assert not same(saved["agent"], later["agent"])
    train(args)
    assert same(later["agent"], saved_in_the_run()["agent"])


def test_a_failed_write_leaves_the_old_checkpoint(monkeypatch):
    """The disk is full in the middle of the third checkpoint."""
    save, before = torch.save, []

    def failing_save(state, path):
        if state["version"] < 3:
            return save(state, path)
        (old,) = Path("runs").glob("*/checkpoint.pt")
        before.append(old.read_bytes())
        Path(path).write_bytes(before[0][: len(before[0]) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", failing_save)
    with pytest.raises(OSError, match="No space left"):
        train(replace(SMALL, checkpoint_interval=1))
    assert next(Path("runs").glob("*/checkpoint.pt")).read_bytes() == before[0]
    assert saved_in_the_run()["version"] == 2
    assert not mp.active_children()


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_outlives_what_its_output_is_piped_to(name):
    """As `| tee log`, which Ctrl-C may end before the run has heard of it."""
    flags = [f"--{flag.replace('_', '-')}={value}" for flag, value in small(name).items()]
    with subprocess.Popen([sys.executable, REPOSITORY / f"{name}.py", *flags], stdout=subprocess.PIPE) as program:
        program.stdout.close()
        program.wait(timeout=120)
    assert saved_in_the_run()["version"] > 1


@pytest.mark.parametrize("pipe", ["reads on", "has ended"])
@pytest.mark.parametrize(
    ("name", "number"),
    [("vaco_async_mujoco", signal.SIGINT)] + [(name, signal.SIGTERM) for name in SCRIPTS],
    ids=lambda part: getattr(part, "name", part),
)
def test_signals_save_and_leave(name, number, pipe):
    flags = [f"--{flag.replace('_', '-')}={value}" for flag, value in small(name, total_timesteps=10**6).items()]
    command = [sys.executable, REPOSITORY / f"{name}.py", *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a background job inherits that it ignores Ctrl-C
    with subprocess.Popen(command, **pipes, preexec_fn=heed) as program:
        while "SPS" not in (line := program.stdout.readline()):
            assert line, program.communicate()[1]
        time.sleep(1)
        begun = time.monotonic()
        if pipe == "has ended":  # as `2>&1 | tee log` does at Ctrl-C
            program.send_signal(signal.SIGSTOP)
            os.killpg(program.pid, number)
            program.stdout.close()
            program.stderr.close()
            program.send_signal(signal.SIGCONT)
            program.wait(timeout=30)
        else:
            os.killpg(program.pid, number)  # a terminal's and a scheduler's signals reach all processes
            _, errors = program.communicate(timeout=30)
            assert "Traceback" not in errors, errors
            step = int(re.search(r"stopped at step (\d+); --resume runs/\S+ goes on from there", errors)[1])
            assert saved_in_the_run()["global_step"] == step
        assert time.monotonic() - begun < 15
    assert program.returncode == 128 + number
    assert_all_end(program.pid)
    step = saved_in_the_run()["global_step"]
    assert step > 0
    assert max(read_curves(".", field="step")["charts/SPS"]) == step  # logs are flushed


def test_an_interrupt_while_actors_start_saves_and_a_second_one_ends_the_run_at_once(monkeypatch):
    issue, collect = Actors.issue, Actors.collect

    def interrupted_issue(self, newest, freed=()):
        if not self.finished:  # in the constructor
            os.kill(os.getpid(), signal.SIGINT)
        issue(self, newest, freed)

    with monkeypatch.context() as patch:
        patch.setattr(Actors, "issue", interrupted_issue)
        with pytest.raises(SystemExit, match="130"):
            train(SMALL)
    assert saved_in_the_run()["version"] == 0

    def twice_interrupted_collect(self, batch):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return collect(self, batch)

    monkeypatch.setattr(Actors, "collect", twice_interrupted_collect)
    with pytest.raises(KeyboardInterrupt):
        train(SMALL)
    assert not mp.active_children()


class Slow(ContinuousEnvs):
    def step(self, actions):
        Path(f"acting{os.getpid()}").touch()
        time.sleep(1)
        return super().step(actions)


def test_actors_leave_with_the_learner_from_the_middle_of_a_rollout():
    code = "import test_faults as t; t.vaco_async_mujoco.ContinuousEnvs = t.Slow; t.train(t.SMALL)"
    command = [sys.executable, "-c", f"if __name__ == '__main__':\n    {code}"]
    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'tests'}"}
    with subprocess.Popen(command, start_new_session=True, env=environment) as program:
        deadline = time.monotonic() + 90
        while len(list(Path().glob("acting*"))) < SMALL.num_actors and time.monotonic() < deadline:
            time.sleep(0.1)
        assert len(processes_of_session(program.pid)) >= 1 + SMALL.num_actors
        program.kill()  # in the midst of 16 slow steps
    assert_all_end(program.pid)


class BadReward(ContinuousEnvs):
    def step(self, actions):
        fields, episodes = super().step(actions)
        bad = np.random.default_rng().random(len(self.valid)) < 0.001
        return fields | {"rewards": np.where(bad, np.nan, fields["rewards"])}, episodes


class BadObs(ContinuousEnvs):
    def step(self, actions):
        result = super().step(actions)
        self.obs[np.random.default_rng().random(self.obs.shape) < 0.0005] = np.inf
        return result


@pytest.mark.parametrize(("envs", "name"), [(BadReward, "rewards"), (BadObs, "obs")])
def test_data_that_is_not_finite_is_named_with_its_actor(envs, name, monkeypatch):
    monkeypatch.setattr(vaco_async_mujoco, "ContinuousEnvs", envs)
    with pytest.raises(SystemExit, match=rf"not finite: .*{name}.* from actor \d, after step \d+"):
        train(replace(SMALL, total_timesteps=10**6, checkpoint_interval=1))
    for path in Path("runs").glob("*/checkpoint.pt"):
        assert all(torch.isfinite(tensor).all() for tensor in torch.load(path)["agent"].values())
    assert not mp.active_children()


@pytest.mark.parametrize("name", SCRIPTS)
def test_results_that_are_not_finite_are_named_and_neither_published_nor_saved(name, monkeypatch):
    script = importlib.import_module(name)
    published, publish, gradient = [], script.PolicyStore.publish, script.gradient

    def recorded_publish(self, agent, version):
        published.append(version)
        publish(self, agent, version)

    def breaking_gradient(*arguments):
        vector, logs = gradient(*arguments)
        norm = math.nan if len(published) == 3 else 1.0  # versions 0, 1 and 2 are out
        return vector * norm, logs | {"losses/grad_norm": logs["losses/grad_norm"] * norm}

    monkeypatch.setattr(script.PolicyStore, "publish", recorded_publish)
    monkeypatch.setattr(script, "gradient", breaking_gradient)
    with pytest.raises(SystemExit, match=r"not finite: .*losses/grad_norm.* in the batch after step \d+"):
        script.train(script.Args(**small(name, checkpoint_interval=1)))
    assert published == [0, 1, 2]
    state = saved_in_the_run()
    assert state["version"] == 2 and all(torch.isfinite(tensor).all() for tensor in state["agent"].values())
    assert not mp.active_children()


def test_the_flags_of_a_run_are_the_defaults_when_it_goes_on():
    small = replace(SMALL, total_timesteps=500, num_envs=3)
    train(small)
    (run,) = Path("runs").iterdir()
    run = run.rename("moved away")
    flags = ["--resume", f"{run}/", "--total-timesteps", "1000", "--lag", "3"]
    program = [sys.executable, REPOSITORY / "vaco_async_mujoco.py", *flags]
    finished = subprocess.run(program, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    saved = torch.load(run / "checkpoint.pt", weights_only=True)
    assert saved["global_step"] >= 1000
    assert saved["args"] == vars(small) | {"total_timesteps": 1000, "lag": 3, "resume": f"{run}/"}
