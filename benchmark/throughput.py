"""Steps per second of our scripts, side by side with CleanRL, Stable-Baselines3, TorchRL and Sample Factory.

    bash benchmark/throughput.sh                      # installs the peers, then runs all three times in turn
    python benchmark/throughput.py --only mujoco      # our continuous control alone, without peers

Speed is steps over wall time from the end of the first third of a run to its end, by the times at which the program
logged to TensorBoard, and so are the waits, shares of wall time; start-up is the time from the start of the process to
the first logged batch, that batch included. PSS is the largest memory of all processes of the program, shared pages
counted once. grad/1k is gradient steps per 1000 environment steps: programs with another grad/1k do another amount of
work. Environment steps are the agent's: a step of Atari is 4 frames.
"""

import contextlib
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path

import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

HERE = Path(__file__).parent
# Sample Factory's minibatches are whole rollouts: with longer ones than 64 it would train on nothing
PPO_MUJOCO = "--num_epochs=10 --batch_size=64 --num_batches_per_epoch=32 --rollout=64 --recurrence=1 --use_rnn=False"
PPO_ATARI = "--num_epochs=4 --batch_size=256 --num_batches_per_epoch=4 --rollout=128 --recurrence=1 --use_rnn=False"
PPO_ATARI += " --summaries_use_frameskip=False"  # or it would count frames
SAMPLE_FACTORY = "--algo=APPO --device=cpu --with_wandb=False --train_dir={out} --save_every_sec=100000 --experiment=x"
SAMPLE_FACTORY += " --experiment_summaries_interval=2 --train_for_env_steps={steps} --async_rl=True"
SAMPLE_FACTORY += " --max_policy_lag=1000000"  # counted in gradient steps; it would train on nothing older


PEERS = {  # virtual environments, and what is told of them
    "sb3": {"stable_baselines3", "torchrl", "torch", "gymnasium", "mujoco", "ale-py", "envpool", "numpy"},
    "sf": {"sample-factory", "torch", "gymnasium", "mujoco", "ale-py", "numpy"},
}


@dataclass
class Program:
    """One row of the table: `command` is split at blanks, {out} is a folder for logs, {steps} the steps to run."""

    name: str
    command: str
    steps: int
    grad_per_1k: float
    peer: str = ""  # the virtual environment of another project, under --peers
    speeds: list[float] = field(default_factory=list)
    waits: list[tuple[float, float]] = field(default_factory=list)  # shares of time: learner, actors
    startups: list[float] = field(default_factory=list)
    pss: list[float] = field(default_factory=list)  # GB


PROGRAMS = [
    Program("mujoco: vaco_async_mujoco.py", "../vaco_async_mujoco.py", 300_000, 156.25),
    Program("mujoco: the same, --compile", "../vaco_async_mujoco.py --compile", 400_000, 156.25),
    Program("mujoco: the same, --num-actors 16", "../vaco_async_mujoco.py --num-actors 16", 300_000, 156.25),
    Program("mujoco: ppo_async_baseline.py", "../ppo_async_baseline.py", 300_000, 156.25),
    Program("mujoco: Stable-Baselines3 PPO", "peers/sb3.py mujoco {steps} 1 {out}", 120_000, 156.25, "sb3"),
    Program("mujoco: CleanRL PPO, one environment", "peers/cleanrl.py gymnasium {steps} {out}", 80_000, 156.25, "sb3"),
    Program("mujoco: CleanRL PPO, 16 of envpool", "peers/cleanrl.py envpool {steps} {out}", 120_000, 156.25, "sb3"),
    Program("mujoco: TorchRL PPO, one environment", "peers/torchrl_ppo.py {steps} {out}", 40_000, 156.25, "sb3"),
    Program(
        "mujoco: Sample Factory, asynchronous, its own environments",
        f"-m sf_examples.mujoco.train_mujoco --env=mujoco_halfcheetah --num_workers=4 --num_envs_per_worker=4 "
        f"--worker_num_splits=2 {PPO_MUJOCO} {SAMPLE_FACTORY}",
        200_000,
        156.25,
        "sf",
    ),
    Program("atari: vaco_async_atari.py", "../vaco_async_atari.py", 20_000, 15.625),
    Program("atari: the same, --bf16", "../vaco_async_atari.py --bf16", 30_000, 15.625),
    Program(
        "atari: the same, --bf16 --learner-threads 2 --actor-nice 19",
        "../vaco_async_atari.py --bf16 --learner-threads 2 --actor-nice 19",
        40_000,
        15.625,
    ),
    Program("atari: Stable-Baselines3 PPO, 2 threads", "peers/sb3.py atari {steps} 2 {out}", 20_000, 15.625, "sb3"),
    Program(
        "atari: Sample Factory, asynchronous, its own environments",
        f"peers/sf_atari.py --env=atari_pong --num_workers=4 --num_envs_per_worker=2 "
        f"--worker_num_splits=2 {PPO_ATARI} {SAMPLE_FACTORY}",
        20_000,
        15.625,
        "sf",
    ),
]


@dataclass
class Args:
    rounds: int = 3  # how often every program runs; they take turns, and the table shows medians
    only: str = ""  # run the programs whose names contain this
    peers: Path | None = None  # folder of the peers' virtual environments, see throughput.sh; None: without peers
    scale: float = 1.0  # multiplies the steps of every run
    timeout: float = 900.0  # seconds after which a program is ended and counted by what it logged until then
    out: Path = HERE / "results" / "throughput.md"  # where the table is written


def pss(session):
    """Memory in GB of all processes of a session, shared pages divided among those that share them."""
    total = 0
    for entry in filter(str.isdigit, os.listdir("/proc")):
        # A process may end meanwhile
        with contextlib.suppress(OSError, StopIteration):
            if os.getsid(int(entry)) == session:
                rollup = Path(f"/proc/{entry}/smaps_rollup").read_text()
                total += int(next(line for line in rollup.splitlines() if line.startswith("Pss:")).split()[1])
    return total / 2**20


def run(program, args):
    """Run a program once and add what was measured to it. Raises RuntimeError with its output if that is too little."""
    python = args.peers / program.peer / "bin" / "python" if program.peer else sys.executable
    with tempfile.TemporaryDirectory() as out:
        steps = int(program.steps * args.scale)
        command = [part.format(out=out, steps=steps) for part in program.command.split()]
        if command[0] != "-m":
            command[0] = str((HERE / command[0]).resolve())
        if not program.peer:
            command += ["--total-timesteps", str(steps)]
        began, memory, ended = time.time(), 0.0, False
        with open(f"{out}/output", "w") as output:
            streams = {"stdout": output, "stderr": output, "stdin": subprocess.DEVNULL}
            process = subprocess.Popen([python, *command], cwd=out, start_new_session=True, **streams)
            try:
                while not (ended := process.poll() is not None) and time.time() - began < args.timeout:
                    time.sleep(2)
                    memory = max(memory, pss(process.pid))
            finally:  # also at Ctrl-C: what is left would slow down all that is measured later
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        text = Path(out, "output").read_text()
        if ended and process.returncode != 0:
            raise RuntimeError(f"{program.name}: exit code {process.returncode}\n{text[-3000:]}")
        scalars = {}  # tag: events
        for path in Path(out).rglob("events.out.tfevents*"):
            events = EventAccumulator(str(path), size_guidance={"scalars": 0})
            events.Reload()
            scalars |= {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
        clock = max(scalars.values(), key=len, default=[])
        if len(clock) < 6:
            raise RuntimeError(f"{program.name} logged {len(clock)} times:\n{text[-3000:]}")
        program.speeds.append(speed(clock))
        program.startups.append(clock[0].wall_time - began)
        program.pss.append(memory)
        if not program.peer:
            tags, since = ("stats/learner_wait", "stats/actor_wait"), counted(clock)[0].step
            waits = [[event.value for event in scalars[tag] if event.step > since] for tag in tags]
            program.waits.append(tuple(map(statistics.mean, waits)))
        for path in Path(out).rglob("checkpoint_*_*.pth"):  # Sample Factory's: gradient steps, environment steps
            gradient_steps, steps = map(int, path.stem.split("_")[1:3])
            measured = 1000 * gradient_steps / max(steps, 1)
            if abs(measured / program.grad_per_1k - 1) > 0.2:
                raise RuntimeError(f"{program.name} made {measured:.1f} gradient steps per 1000 steps")


def counted(clock):
    """The events of a program's clock that count, from the end of the first third of the run on."""
    return clock[len(clock) // 3 :]


def speed(clock):
    """Steps per second by TensorBoard events with `step` and `wall_time`."""
    first, *_, last = counted(clock)
    return (last.step - first.step) / (last.wall_time - first.wall_time)


def table(programs):
    """The markdown table of the medians."""
    columns = ("program", "steps/s", "all runs", "grad/1k", "start-up", "PSS", "learner waits", "actors wait")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for program in (program for program in programs if program.speeds):
        runs = " ".join(f"{speed:.0f}" for speed in program.speeds)
        waits = [f"{statistics.median(side):.0%}" for side in zip(*program.waits, strict=True)] or ["", ""]
        startup, memory = statistics.median(program.startups), statistics.median(program.pss)
        lines.append(
            f"| {program.name} | {statistics.median(program.speeds):.0f} | {runs} | {program.grad_per_1k:g} "
            f"| {startup:.0f} s | {memory:.2f} GB | {waits[0]} | {waits[1]} |"
        )
    return "\n".join(lines)


def peer_versions(peers, name):
    """What a peer's environment has, by its own pip."""
    command = [peers / name / "bin" / "python", "-m", "pip", "list", "--format=freeze"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return ", ".join(line.replace("==", " ") for line in lines if line.split("==")[0].lower() in PEERS[name])


def processor():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {len(os.sched_getaffinity(0))} cores"


def main(args):
    programs = [program for program in PROGRAMS if args.only in program.name and (args.peers or not program.peer)]
    progress = tqdm(total=args.rounds * len(programs), unit="run")
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "envpool", "numpy"))
    commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=HERE, capture_output=True, text=True).stdout
    head = f"{date.today()}, {processor()}, commit {commit.strip()}, {packages}; medians of {args.rounds} runs in turn"
    head += "".join(f"\n\n{peer}: {peer_versions(args.peers, peer)}" for peer in PEERS if args.peers) + "\n\n"
    if args.only:
        args.out = args.out.with_stem(f"{args.out.stem}_{args.only}")
    failed = {}
    args.out.parent.mkdir(exist_ok=True, parents=True)
    for _ in range(args.rounds):
        for program in programs:
            progress.set_description(program.name)
            try:
                run(program, args)
            except RuntimeError as error:
                failed[program.name] = str(error)
            progress.update()
            args.out.write_text(head + table(programs) + "\n")
    progress.close()
    print(args.out.read_text())
    if failed:
        sys.exit("\n".join(f"failed: {name}\n{error}" for name, error in failed.items()))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: no program is left behind
    main(tyro.cli(Args, description=__doc__))
