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
from learner import AsByLearners

import impala_baseline

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
LEARNER = str(REPOSITORY / "tests" / "learner.py")
SMALL = {
    "env_id": "Pendulum-v1",  # not chaotic: rounding stays small
    "num_actors": 2,
    "num_envs": 2,
    "num_steps": 16,
    "rollouts_per_batch": 2,
    "num_minibatches": 4,
    "update_epochs": 2,
    "lag_schedule": "mixture",
    "lag": 2,
    "learner_timeout": 60,
    "actor_timeout": 50,  # an actor that is replaced on a busy machine plays other episodes
    "total_timesteps": 600,
}


def torchrun(script, options=(), flags=(), **changes):
    """Start two learners of tests/learner.py in this folder; returns the process of torchrun."""
    return start([*TORCHRUN, "--standalone", "--nproc-per-node=2", *flags], script, options, **changes)


def start(command, script, options, **changes):
    flags = changes if script == "vaco_async_llm" else SMALL | changes
    options = json.dumps({"flags": flags} | dict(options))
    return subprocess.Popen(
        [*command, LEARNER, script, options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


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


def learners_alive():
    """Process ids of whatever was started in this test's folder, but for the forkserver of the tests' own process."""
    alive = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            parent = int(Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1])
            if os.readlink(f"/proc/{entry}/cwd") == os.getcwd() and os.getpid() not in (int(entry), parent):
                alive.append(int(entry))
        except OSError:  # it has ended, or is a zombie
            continue
    return alive


def assert_all_gone():
    deadline = time.monotonic() + 20
    while learners_alive() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not learners_alive()


def wait_for(condition, process):
    deadline = time.monotonic() + 120
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(process.communicate()[0])
        time.sleep(0.1)


UNEVEN = {"env_id": "InvertedPendulum-v4", "update_epochs": 3}  # episodes end: dummy rows
# Without a C++ compiler this is one case less of compiling, and of nothing else
COMPILED = {"compile": bool(shutil.which(os.environ.get("CXX", "g++"))), "learner_timeout": 200}
# Few steps: one action that rounding makes another changes all that follows
ATARI = {
    "env_id": "Pong-v5",
    "num_minibatches": 2,
    "num_steps": 8,
    "total_timesteps": 250,
}
CASES = {
    "vaco_async_mujoco": [UNEVEN | COMPILED | {"tv_threshold": 0.01}],
    "vaco_async_atari": [ATARI | {"tv_threshold": 0.002}],
    "ppo_async_baseline": [
        UNEVEN | {"objective": "kl", "kl_target": 1e-3},
        UNEVEN | {"target_kl": 2e-4, "update_epochs": 20},
    ],
    "impala_baseline": [UNEVEN, {"sum_loss": True, "learning_rate": 1e-4}],
}


@pytest.mark.parametrize(
    ("script", "changes"), [(script, case) for script, cases in CASES.items() for case in cases], ids=str
)
def test_two_learners_are_one_with_the_data_of_both(script, changes, monkeypatch):
    """Gate, normalised advantages, statistics, coefficients, early stop, clipping: the policies of several batches,
    and all that is logged, are those of one process with the actors of both."""
    finished(torchrun(script, {"in_order": True}, **changes))
    both, logged = assert_equal_learners(), read_curves(".")
    Path("runs").rename("runs of two")
    script, alone, batches = importlib.import_module(script), [], []

    def recorded_publish(self, agent, version, publish=script.PolicyStore.publish):
        alone.append({name: tensor.clone() for name, tensor in agent.state_dict().items()})
        publish(self, agent, version)

    def recorded_batch(self, slots, device, batch=script.Rollouts.batch):
        batches.append(batch(self, slots, device))
        return batches[-1]

    monkeypatch.setattr(script.PolicyStore, "publish", recorded_publish)
    monkeypatch.setattr(script.Rollouts, "batch", recorded_batch)
    in_order = AsByLearners(lambda: batches[-1])
    monkeypatch.setattr(torch, "randperm", in_order)
    script.train(script.Args(**SMALL | changes | {"num_actors": 4, "rollouts_per_batch": 4}))
    curves = read_curves(".")
    assert len(alone) == len(both) >= 4
    assert any(not torch.equal(one, other) for one, other in zip(alone[0].values(), alone[-1].values(), strict=True))
    for version, (one, other) in enumerate(zip(alone, both, strict=True)):
        for name in one:
            assert torch.allclose(one[name], other[name], rtol=1e-3, atol=1e-4), f"{name} of version {version}"
    if "tv_threshold" in changes:  # the gate is neither always open nor always closed
        assert 0 < sum(curves["filter/gate_open"]) < len(curves["filter/gate_open"])
    if "target_kl" in changes:  # some passes were left out, and some batches had more than one
        assert len(batches) < in_order.passes < changes["update_epochs"] * len(batches)
    if "objective" in changes:
        assert len(set(curves["losses/kl_coef"])) > 1
    if changes.items() >= UNEVEN.items():
        valid = [batch.valid.unflatten(1, (2, -1)).sum((0, 2)) for batch in batches]
        assert any(first != second for first, second in valid)
    own = ("stats/", "charts/SPS", "losses/explained_variance", "lag/ess")  # the last two: means over learners
    for tag in curves:
        if not tag.startswith(own):
            assert logged[tag] == pytest.approx(curves[tag], rel=0.02, abs=2e-4), tag


def test_the_same_learners_compute_the_same_again():
    runs = []
    for _ in range(2):
        finished(torchrun("vaco_async_mujoco", **UNEVEN))
        runs.append(assert_equal_learners())
    for one, other in zip(*runs, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_beside_other_learners_actors_start_without_what_only_learners_need():
    """torch._dynamo, which a learner keeps out of its all-reduce, takes a second and 130 MB."""
    Path("program.py").write_text(
        "import multiprocessing as mp, sys\n"
        "import vaco_async_mujoco\n"
        "def tell():\n"
        "    print('torch._dynamo' in sys.modules, flush=True)\n"
        "if __name__ == '__main__':\n"
        "    actor = mp.get_context('forkserver').Process(target=tell, name='actor 0')\n"
        "    actor.start(), actor.join(), tell()\n"
    )
    environment = os.environ | {"WORLD_SIZE": "2", "PYTHONPATH": str(REPOSITORY)}
    output = subprocess.run([sys.executable, "program.py"], env=environment, capture_output=True, text=True)
    assert output.stdout == "False\nTrue\n", output.stderr


def test_learners_with_different_flags_are_refused():
    process = torchrun("vaco_async_mujoco", {"flags of 1": {"update_epochs": 3}})
    assert "--update-epochs 2: another learner has 3" in finished(process, code=1)


def test_an_actor_killed_beside_one_learner_is_replaced():
    output = finished(torchrun("vaco_async_mujoco", {"deed": "kill an actor"}, total_timesteps=2000))
    assert "learner 1: actor 0 has died: SIGKILL" in output
    assert len(assert_equal_learners()) > 8
    assert_all_gone()


def test_a_killed_learner_comes_back_from_the_last_checkpoint():
    flags = ["--max-restarts=1"]
    changes = {"checkpoint_interval": 2, "total_timesteps": 2000}
    output = finished(torchrun("ppo_async_baseline", {"deed": "kill"}, flags=flags, **changes))
    assert "going on from runs/" in output and "steps in" in output
    steps = read_curves(".", "step")["losses/policy_loss"]  # of the only run
    assert len(steps) == 16 and steps == sorted(set(steps))
    assert len(assert_equal_learners()) == 1 + 14  # at the start, then versions 3 to 16
    assert_all_gone()


def test_a_learner_that_died_before_it_joined_comes_back():
    output = finished(torchrun("vaco_async_mujoco", {"deed": "kill at first"}, flags=["--max-restarts=1"]))
    assert "steps in" in output
    assert len(assert_equal_learners()) == 1 + 5
    assert_all_gone()


@pytest.mark.parametrize("resumed", [False, True])
def test_a_complete_run_that_torchrun_starts_again_ends_at_once(resumed):
    changes = {}
    if resumed:
        impala_baseline.train(impala_baseline.Args(**SMALL | {"total_timesteps": 100}))
        changes = {"resume": str(next(Path("runs").iterdir()))}
    output = finished(torchrun("impala_baseline", {"deed": "kill at last"}, flags=["--max-restarts=1"], **changes))
    assert "going on from runs/" in output and output.count("steps in") == 2
    steps = read_curves(".", "step")["losses/policy_loss"]  # of the only run
    assert steps == sorted(set(steps))
    assert len(published(0)) == 1  # nothing was trained again, so the random numbers are where the checkpoint had them
    (run,) = Path("runs").iterdir()
    saved = torch.load(run / "checkpoint.pt", weights_only=True)["rng"]
    assert len(saved) == 2 and not torch.equal(*saved)
    assert all(torch.equal(torch.load(f"rng{rank}.pt", weights_only=True), saved[rank]) for rank in range(2))
    assert_all_gone()


def test_each_learner_of_a_host_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(impala_baseline, "RANK", 5)
    monkeypatch.setattr(impala_baseline, "LOCAL_RANK", 1)
    assert impala_baseline.device_of("cuda") == torch.device("cuda:1")
    assert impala_baseline.device_of("cpu") == torch.device("cpu")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_to_torchrun_save_and_end_all_learners(number):
    flags = ["--max-restarts=1"]  # which a signal to torchrun does not use up
    process = torchrun("impala_baseline", flags=flags, checkpoint_interval=1, total_timesteps=10**6)
    wait_for(lambda: list(Path().glob("runs/*/checkpoint.pt")), process)
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode != 0 and "--resume runs/" in output and "started again" not in output
    assert_all_gone()
    assert_equal_learners()
    (run,) = Path("runs").iterdir()
    step = torch.load(run / "checkpoint.pt", weights_only=True)["global_step"]
    assert f"stopped at step {step};" in output
    # One learner goes on alone
    args = impala_baseline.Args(**SMALL | {"resume": str(run), "total_timesteps": step + 500, "checkpoint_interval": 1})
    impala_baseline.train(args)
    assert read_curves(".", "step")["losses/policy_loss"][-1] >= step + 500


def test_one_interrupted_learner_ends_all_with_a_checkpoint():
    output = finished(torchrun("vaco_async_mujoco", {"deed": "interrupt"}, total_timesteps=10**6), code=1)
    (run,) = Path("runs").iterdir()
    assert "learner 0: error: another learner has ended the run" in output
    assert torch.load(run / "checkpoint.pt", weights_only=True)["version"] == len(assert_equal_learners()) - 1
    assert_all_gone()


def test_a_learner_that_does_not_answer_ends_the_run():
    options = {"total_timesteps": 10**6, "learner_timeout": 10, "actor_timeout": 8}
    output = finished(torchrun("vaco_async_mujoco", {"deed": "stop"}, **options), code=1)
    assert "learner 0: error: another learner has ended, or has not answered in --learner-timeout" in output
    assert len(published(0)) == 5  # it was not the start that took too long
    assert_all_gone()


def test_no_learner_outlives_torchrun():
    process = torchrun("vaco_async_mujoco", checkpoint_interval=1, total_timesteps=10**6)
    wait_for(lambda: list(Path().glob("runs/*/checkpoint.pt")), process)
    process.kill()
    assert_all_gone()


def test_the_script_itself_runs_and_resumes_under_torchrun():
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items() if name != "total_timesteps"]
    command = [*TORCHRUN, "--standalone", "--nproc-per-node=2", str(REPOSITORY / "vaco_async_mujoco.py")]
    for more in ([*flags, "--total-timesteps=300"], ["--total-timesteps=600", "--resume"]):
        if more[-1] == "--resume":
            more.append(str(next(Path("runs").iterdir())))
        process = subprocess.Popen([*command, *more], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert finished(process).count("steps in") == 1
    steps = read_curves(".", "step")["losses/policy_loss"]
    assert steps == sorted(set(steps)) and steps[-1] >= 600


def test_wrong_flags_are_one_line_for_all_learners():
    command = [*TORCHRUN, "--standalone", "--nproc-per-node=2", str(REPOSITORY / "vaco_async_mujoco.py")]
    process = subprocess.Popen(
        [*command, "--resume", "nowhere"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    output = finished(process, code=1)  # torchrun's own
    assert output.count("error: --resume nowhere: cannot be read; type a run's folder") == 1


def ip(*arguments):
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts():
    """Two network namespaces, with a link between: {name: address}."""
    hosts = {f"vaco{os.getpid()}a": "10.77.31.1", f"vaco{os.getpid()}b": "10.77.31.2"}
    one, other = hosts
    if not shutil.which("ip"):
        pytest.skip("network namespaces need iproute2's `ip`")
    try:
        try:
            ip("netns", "add", one)
            ip("netns", "add", other)
            ip("-netns", one, "link", "add", "link0", "type", "veth", "peer", "name", "link0", "netns", other)
        except subprocess.CalledProcessError as error:
            if not any(word in error.stderr for word in ("not permitted", "denied", "not supported")):
                raise
            pytest.skip(f"network namespaces need rights, and a kernel that has them: {error.stderr.strip()}")
        for name, address in hosts.items():
            ip("-netns", name, "address", "add", f"{address}/24", "dev", "link0")
            for device in ("lo", "link0"):
                ip("-netns", name, "link", "set", device, "up")
        yield hosts
    finally:
        for name in hosts:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def on_both(hosts, options=(), restarts=0, **changes):
    """Start torchrun on each of two hosts, with one learner there: their processes, the one with rank 0 first."""
    meet = ["--nnodes=2", "--nproc-per-node=1", f"--max-restarts={restarts}", "--rdzv-backend=c10d"]
    meet.append(f"--rdzv-endpoint={next(iter(hosts.values()))}:29555")
    commands = [["ip", "netns", "exec", n, *TORCHRUN, *meet, f"--local-addr={a}"] for n, a in hosts.items()]
    commands[0].append("--rdzv-conf=is_host=1")
    return [start(command, "vaco_async_mujoco", options, **changes) for command in commands]


def test_a_learner_killed_on_another_host_comes_back(hosts, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "link0")
    processes = on_both(hosts, {"deed": "kill"}, restarts=1, checkpoint_interval=2, total_timesteps=1500)
    try:
        first, _ = [finished(process) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert "learner 0: started again, going on from runs/" in first and "steps in" in first
    assert len(assert_equal_learners()) > 8
    assert_all_gone()


def test_two_hosts_survive_a_short_cut_of_the_link_and_end_at_a_long_one(hosts, monkeypatch):
    """One learner per network namespace. Seconds without a link are waited for; when the link stays away, both learners
    end with an error, after --learner-timeout, and the run can be resumed."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "link0")

    def step():
        files = list(Path().glob("runs/*/checkpoint.pt"))
        return torch.load(files[0], weights_only=True)["global_step"] if files else 0

    def link(state):
        ip("-netns", next(iter(hosts)), "link", "set", "link0", state)

    processes = on_both(hosts, checkpoint_interval=1, total_timesteps=10**6, learner_timeout=15, actor_timeout=8)
    try:
        wait_for(step, processes[0])
        link("down")
        time.sleep(3)
        before = step()
        link("up")
        wait_for(lambda: step() > before + 1000, processes[0])
        link("down")
        cut = time.monotonic()
        wait_for(lambda: len(list(Path().glob("learner?.pt"))) == 2, processes[0])
        assert time.monotonic() - cut < 15 + 30  # --learner-timeout, and what a busy machine may take to end a batch
        link("up")  # torchrun itself would wait on for the other host
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, output in enumerate(outputs):
        assert f"learner {rank}: error: another learner has ended, or has not answered" in "".join(outputs), output
    assert_all_gone()
    (run,) = Path("runs").iterdir()
    for process in on_both(hosts, resume=str(run), total_timesteps=step() + 500):
        finished(process)
