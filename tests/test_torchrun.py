"""Several learners, started by torchrun: they are one, to rounding, and end together."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, read_curves
from learner import AsByLearners, actor_of_two_learners

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
SMALL = {
    "env_id": "Pendulum-v1",  # not chaotic: rounding stays small; no episode ends: learners have equally many rows
    "num_actors": 2,
    "num_envs": 2,
    "num_steps": 16,
    "rollouts_per_batch": 2,
    "num_minibatches": 4,
    "update_epochs": 2,
    "lag_schedule": "mixture",
    "lag": 2,
    "actor_timeout": 50,  # an actor that is replaced on a busy machine plays other episodes
    "total_timesteps": 600,
}


def torchrun(script, options=(), flags=(), **changes):
    """Start two learners of tests/learner.py in this folder; returns the process of torchrun."""
    options = json.dumps({"flags": SMALL | changes} | dict(options))
    command = [*TORCHRUN, *flags, str(REPOSITORY / "tests" / "learner.py"), script, options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(process, code=0):
    try:
        output = process.communicate(timeout=240)[0]
    finally:
        process.kill()  # nothing, if it has ended; the learners leave with it
    assert process.returncode == code, output
    return output


def published(rank):
    return torch.load(f"learner{rank}.pt", weights_only=True)


def assert_equal_learners():
    """All learners published the same, to the last bit, in all versions; returns it."""
    first, second = published(0), published(1)
    assert len(first) == len(second) > 1
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    return first


def assert_all_gone():
    """Nothing that was started in this test's folder is alive, but for what the tests' own process has started."""
    deadline = time.monotonic() + 20
    alive = [0]
    while alive and time.monotonic() < deadline:
        time.sleep(0.2)
        alive = []
        for entry in filter(str.isdigit, os.listdir("/proc")):
            try:
                parent = int(Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1])
                if os.readlink(f"/proc/{entry}/cwd") == os.getcwd() and os.getpid() not in (int(entry), parent):
                    alive.append(int(entry))
            except OSError:  # it has ended, or is a zombie
                continue
    assert not alive


UNEVEN = {"env_id": "InvertedPendulum-v4", "update_epochs": 3}  # episodes end: dummy rows
# Without a C++ compiler this is one case less of compiling, and of nothing else
COMPILED = {"compile": bool(shutil.which(os.environ.get("CXX", "g++")))}
# Few steps: one action that rounding makes another changes all that follows
ATARI = {"env_id": "Pong-v5", "num_minibatches": 2, "num_steps": 8, "total_timesteps": 190}
CASES = [
    ("vaco_async_mujoco", {"tv_threshold": 0.003}),
    ("vaco_async_mujoco", UNEVEN | COMPILED | {"tv_threshold": 0.01}),
    ("vaco_async_atari", ATARI | {"tv_threshold": 0.002}),
    ("ppo_async_baseline", UNEVEN | {"objective": "kl", "kl_target": 1e-3}),
    ("ppo_async_baseline", {"target_kl": 2e-4, "update_epochs": 20}),
    ("impala_baseline", {}),
]


@pytest.mark.parametrize(("name", "changes"), CASES, ids=str)
def test_two_learners_are_one_with_the_data_of_both(name, changes, monkeypatch):
    """Gate, normalised advantages, statistics, coefficients, early stop, clipping: the policies of several batches, and
    what is logged, are those of one process with the actors of both, which uses as many rows of each."""
    finished(torchrun(name, {"in_order": True}, **changes))
    both, logged = assert_equal_learners(), read_curves(".")
    Path("runs").rename("runs of two")
    script, alone, valid = importlib.import_module(name), [], []

    def recorded_publish(self, agent, version, publish=script.PolicyStore.publish):
        alone.append({name: tensor.clone() for name, tensor in agent.state_dict().items()})
        publish(self, agent, version)

    def recorded_check(place, numbers, check_finite=script.check_finite):
        if "valid" in numbers:
            valid.append(numbers["valid"].clone())  # [T, C] of each rollout
        check_finite(place, numbers)

    monkeypatch.setattr(script.PolicyStore, "publish", recorded_publish)
    monkeypatch.setattr(script, "check_finite", recorded_check)
    monkeypatch.setattr(script, "actor", actor_of_two_learners)
    in_order = AsByLearners(lambda: torch.cat(valid[-4:], dim=1))
    monkeypatch.setattr(torch, "randperm", in_order)
    script.train(script.Args(**SMALL | changes | {"num_actors": 4, "rollouts_per_batch": 4}))
    curves = read_curves(".")
    batches = len(valid) // 4
    assert len(alone) == len(both) == batches + 1 >= 4
    assert any(not torch.equal(one, other) for one, other in zip(alone[0].values(), alone[-1].values(), strict=True))
    for version, (one, other) in enumerate(zip(alone, both, strict=True)):
        for name in one:
            assert torch.allclose(one[name], other[name], rtol=1e-3, atol=1e-4), f"{name} of version {version}"
    if "tv_threshold" in changes:  # the gate is neither always open nor always closed
        assert 0 < sum(curves["filter/gate_open"]) < len(curves["filter/gate_open"])
    if "target_kl" in changes:  # some passes were left out, and some batches had more than one
        assert batches < in_order.passes < changes["update_epochs"] * batches
    if "objective" in changes:
        assert len(set(curves["losses/kl_coef"])) > 1
    uneven = changes.items() >= UNEVEN.items()
    counts = [sum(int(part.sum()) for part in valid[i : i + 2]) for i in range(0, len(valid), 2)]  # of each learner
    assert uneven == any(first != second for first, second in zip(counts[::2], counts[1::2], strict=True))
    own = ("stats/", "charts/SPS", "losses/explained_variance", "lag/ess")  # the last two: means over learners
    for tag in curves:
        if not uneven and not tag.startswith(own):
            assert logged[tag] == pytest.approx(curves[tag], rel=0.02, abs=2e-4), tag


def test_an_actor_killed_beside_one_learner_is_replaced():
    output = finished(torchrun("vaco_async_mujoco", {"deed": "kill an actor"}, total_timesteps=2000))
    assert "actor 0 died with exit code -9; restart 1" in output
    assert max(read_curves(".")["stats/actor_restarts"]) == 1
    assert len(assert_equal_learners()) > 8
    assert_all_gone()


def test_a_killed_learner_comes_back_from_the_last_checkpoint():
    more = {"checkpoint_interval": 2, "total_timesteps": 2000}
    finished(torchrun("vaco_async_mujoco", {"deed": "kill"}, flags=["--max-restarts=1"], **more))
    steps = read_curves(".", "step")["losses/policy_loss"]  # of the only run
    assert len(steps) == 16 and steps == sorted(set(steps))
    assert len(assert_equal_learners()) < 16  # it has not begun anew
    assert_all_gone()


def test_a_learner_that_died_before_it_joined_comes_back():
    finished(torchrun("vaco_async_mujoco", {"deed": "kill at first"}, flags=["--max-restarts=1"]))
    assert len(assert_equal_learners()) == 1 + 5
    assert_all_gone()


def test_one_interrupted_learner_ends_all_with_a_checkpoint():
    output = finished(torchrun("vaco_async_mujoco", {"deed": "interrupt"}, total_timesteps=10**6), code=1)
    assert "--resume runs/" in output
    (path,) = Path("runs").glob("*/checkpoint.pt")
    assert torch.load(path)["version"] == len(assert_equal_learners()) - 1
    assert_all_gone()


def test_a_signal_to_torchrun_saves_and_ends_all_learners():
    process = torchrun("vaco_async_mujoco", checkpoint_interval=1, total_timesteps=10**6)
    deadline = time.monotonic() + 120
    while not list(Path().glob("runs/*/checkpoint.pt")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode != 0
    assert_all_gone()
    (path,) = Path("runs").glob("*/checkpoint.pt")
    saved = torch.load(path)
    assert saved["version"] == len(assert_equal_learners()) - 1
    assert f"stopped at step {saved['global_step']};" in output


def test_the_script_itself_runs_and_resumes_under_torchrun():
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items() if name != "total_timesteps"]
    command = [*TORCHRUN, str(REPOSITORY / "vaco_async_mujoco.py")]
    for more in ([*flags, "--total-timesteps=300"], ["--total-timesteps=600", "--resume"]):
        if more[-1] == "--resume":
            more.append(str(next(Path("runs").iterdir())))
        process = subprocess.Popen([*command, *more], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert finished(process).count("logs in runs/") == 1
    steps = read_curves(".", "step")["losses/policy_loss"]
    assert steps == sorted(set(steps)) and steps[-1] >= 600
