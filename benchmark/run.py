"""Runs the scripts over environments, methods, lags and seeds, side by side, and records every finished run.

    python benchmark/run.py --out results.jsonl --env-ids HalfCheetah-v4 Hopper-v4 --methods VACO PPO-clip \
        "VACO --tv-threshold 0.2" --lags 0 4 16 --seeds 1 2 3 --steps 300000 --workers 2

A run that is in the file `--out` already is skipped, so an interrupted study goes on where it was; one that is in a
file of `--reuse`, under whatever name, is copied from there. Seeds are the outermost loop: the table of results is
complete, with few seeds, long before the study is. One line of JSON per run has the command, the versions of what it
ran on, the return of the last 100 episodes, returns on a grid of 20 stretches of steps, the mean return of 10 episodes
that the last policy plays (evaluate.py; language models have the held-out accuracy instead), and the means of lag and
filter metrics, from the first batch that can have the whole lag on. A run whose
numbers were no longer finite is a result, too: it is recorded as diverged, without a return. A run that fails otherwise
is shown with the end of its output, which is kept in the folder `<out>.logs`, and the exit code is 1 when all others
are done. After Ctrl-C it is 130, and 2 if options cannot work. A change of a script repeats no run: recorded runs of
another state of it are counted at the start.
"""

import contextlib
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

REPOSITORY = Path(__file__).resolve().parent.parent
# {domain} is mujoco or atari; {epochs} makes as many gradient steps per batch as PPO and VACO do, and {rate} is, for
# continuous control, their learning rate: at its own, for one epoch, IMPALA diverged (3 environments, one seed)
METHODS = {
    "VACO": "vaco_async_{domain}.py",
    "VACO, no filter": "vaco_async_{domain}.py --no-filter",
    "VACO, no alignment": "vaco_async_{domain}.py --no-align",
    "PPO-clip": "ppo_async_baseline.py --objective clip",
    "PPO-KL": "ppo_async_baseline.py --objective kl",
    "SPO": "ppo_async_baseline.py --objective spo",
    "decoupled PPO": "ppo_async_baseline.py --objective decoupled",
    "APPO": "ppo_async_baseline.py --objective clip --align",
    "GePPO": "ppo_async_baseline.py --objective geppo --align",
    "stop by TV": "ppo_async_baseline.py --objective stop --align",
    "IMPALA": "impala_baseline.py --update-epochs {epochs} --learning-rate {rate}",
    "IMPALA, 1 epoch": "impala_baseline.py --update-epochs 1",
    # Language models; their environments are tasks, and their steps are batches
    "GRPO, filter": "vaco_async_llm.py --objective vaco",
    "GRPO, filter, four steps": "vaco_async_llm.py --objective vaco --num-minibatches 4",
    "GRPO, no filter": "vaco_async_llm.py --objective vaco --no-filter",
    "GRPO, no filter, one step": "vaco_async_llm.py --objective vaco --no-filter --num-minibatches 1",
    "GRPO, clipped": "vaco_async_llm.py --objective grpo",
    "GRPO, decoupled": "vaco_async_llm.py --objective decoupled",
    # The policy before any training: the zero of normalised scores
    "untrained": "ppo_async_baseline.py --learning-rate 0 --update-epochs 1 --num-minibatches 1",
}
KNOWN = ", ".join(f'"{name}"' for name in METHODS)
STRETCHES = 20  # of equal length, per learning curve
# What the names of recorded metrics begin with
METRICS = ("lag/", "filter/", "losses/entropy", "losses/approx_kl", "stats/gradient_steps", "charts/reward")
METRICS += ("charts/completion_length",)
WARM_STARTS = REPOSITORY / "runs" / "warm_starts"  # of language models: made once per seed, then shared by all runs


@dataclass
class Args:
    out: Path  # the file of results, one line of JSON per run; made if it is not there
    env_ids: tuple[str, ...]  # environments, as --env-id of the scripts takes them; of language models, tasks
    methods: Annotated[
        tuple[str, ...], tyro.conf.arg(help=f'{KNOWN}, each with more flags if wanted: "VACO --no-align"')
    ]
    lags: tuple[int, ...] = (0,)  # policy lags, in versions
    seeds: tuple[int, ...] = (1,)  # seeds of the runs
    lag_schedule: Literal["mixture", "fixed", "async"] = "mixture"  # as in the scripts; async takes lag 0 alone
    steps: int = 300_000  # environment steps per run; of language models, batches
    flags: str = ""  # flags for all runs, as one string after a =: --flags="--num-actors 8 --num-envs 2"
    reuse: tuple[Path, ...] = ()  # other files of results: a run that one of them has is copied, not repeated
    workers: int = 2  # runs at once; each is busy on one to two cores. Lockstep results do not depend on it
    dry_run: bool = False  # only print the commands of the runs that are missing


def command_of(method, env_id, seed, lag, args):
    """The command line of one run, a list from the script's name on. Exits with code 2 if no such method is known."""
    names = [name for name in METHODS if method == name or method.startswith(f"{name} --")]
    if not names:
        print(f"error: --methods {method}: must begin with one of {KNOWN}", file=sys.stderr)
        raise SystemExit(2)
    name = max(names, key=len)
    if "llm" in METHODS[name]:
        task, length, defaults = "--task", "--total-batches", {}
    else:
        task, length = "--env-id", "--total-timesteps"
        sys.path.insert(0, str(REPOSITORY))
        from vaco_async_atari import is_atari

        atari = is_atari(env_id)
        defaults = {"domain": "atari" if atari else "mujoco", "epochs": 16 if atari else 20}
        defaults["rate"] = 6e-4 if atari else 3e-4
    script, *flags = METHODS[name].format(**defaults).split()
    parts = [script, task, env_id, "--seed", str(seed), length, str(args.steps)]
    parts += ["--lag-schedule", args.lag_schedule, "--lag", str(lag), *shlex.split(args.flags)]
    return parts + flags + shlex.split(method.removeprefix(name))  # of a flag given twice, the last counts


def read_records(path):
    """All records of a file of results; lines that a killed runner left half-written are named and skipped. Raises
    SystemExit if it is another kind of file."""
    lines = path.read_text(errors="replace").splitlines()
    records, broken = [], []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            broken.append(number)
    if (lines and not records) or not all(isinstance(record, dict) for record in records):
        raise SystemExit(f"error: {path}: is no file of results")
    for number in broken:
        print(f"warning: {path}, line {number}: no record, maybe half-written; skipped", file=sys.stderr)
    return records


def append_record(path, record):
    """Add a line by one write, because several runners may share the file; never to a half-written one."""
    with open(path, "ab+") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        start = "" if file.read(1) in (b"", b"\n") else "\n"
        file.write(f"{start}{json.dumps(record)}\n".encode())


def fingerprint(script):
    """Git's hash of a script as it is now: commits that leave it as it was do not change the results."""
    command = ["git", "hash-object", str(REPOSITORY / script)]
    return subprocess.run(command, capture_output=True, text=True).stdout[:12]


def versions(script):
    """What results depend on: the commit (`-dirty`: scripts with changes that no commit has), packages, processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    processors = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    git = partial(subprocess.run, cwd=REPOSITORY, capture_output=True, text=True)
    commit = git(["git", "rev-parse", "--short=12", "HEAD"]).stdout.strip()
    if git(["git", "diff", "--quiet", "HEAD", "--", "*.py"]).returncode:
        commit += "-dirty"
    names = ["torch", "transformers", "reasoning-gym"]
    if "llm" not in script:
        names = ["torch", "envpool", "gymnasium", "numpy"]
    known = {"commit": commit, "script": fingerprint(script)} | {name: version(name) for name in names}
    return known | {"cpu": processors[0] if processors else "unknown", "date": str(date.today())}


def measure(run, lag, steps):
    """The learning curve, the mean metrics and the speed of a run, from its TensorBoard files as far as they go."""
    files = EventAccumulator(str(run), size_guidance={"scalars": 0})
    files.Reload()
    scalars = {tag: files.Scalars(tag) for tag in files.Tags()["scalars"]}
    metrics = {tag: scalars[tag][lag:] or scalars[tag] for tag in scalars if tag.startswith(METRICS)}  # one per batch
    means = {tag: np.mean([event.value for event in events]) for tag, events in metrics.items()}
    shown = {"metrics": {tag: float(mean) for tag, mean in means.items()}}
    if "charts/accuracy" in scalars:
        return shown | {"accuracy": [(event.step, event.value) for event in scalars["charts/accuracy"]]}
    stretches = [[] for _ in range(STRETCHES)]
    for event in scalars.get("charts/episodic_return", []):
        stretches[min(math.ceil(event.step / steps * STRETCHES), STRETCHES) - 1].append(event.value)
    shown["grid"] = [steps * (i + 1) // STRETCHES for i in range(STRETCHES)]
    shown["returns"] = [float(np.mean(values)) if values else None for values in stretches]
    shown["sps"] = round(scalars["charts/SPS"][-1].value) if "charts/SPS" in scalars else None
    return shown


def outcome(returncode, output, folder, lag, steps):
    """What a run has shown: it has ended if its exit code is 0, and diverged if it says "not finite". Raises
    RuntimeError, with its output, otherwise."""
    reason = next((line for line in output.splitlines() if line.startswith("not finite")), None)
    if returncode and not reason:
        raise RuntimeError(f"exit code {returncode}\n{output}")
    (run,) = Path(folder, "runs").glob("*__*")
    shown = measure(run, lag, steps)
    if returncode:  # the metrics of a run whose numbers explode say nothing about the lag
        return shown | {"return": None, "episodes": 0, "diverged": reason[:300], "metrics": {}}
    checkpoint = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)
    shown["global_step"] = checkpoint["global_step"]
    if "last_returns" in checkpoint:
        returns = checkpoint["last_returns"]
        shown["return"] = float(np.mean(returns)) if returns else None
        shown["episodes"] = len(returns)
        evaluation = json.loads(Path(run, "evaluation.json").read_text())
        shown["evaluation"] = {how: float(np.mean(returns)) for how, returns in evaluation.items()}
    return shown


class Runner:
    """Runs commands, each in a folder and a process group of its own, until `stop`."""

    def __init__(self):
        self.processes, self.lock, self.stopped = set(), threading.RLock(), False  # the lock: Ctrl-C may come twice

    def call(self, command, folder, output):
        """Run a Python program in a folder, its output into a file; returns the exit code."""
        paths = [str(Path(path).resolve()) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
        with self.lock:
            if self.stopped:
                raise RuntimeError("not started")
            process = subprocess.Popen(
                [sys.executable, *command],
                cwd=folder,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},  # relative ones are not of `folder`
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self.processes.add(process)
        process.wait()
        self.processes.discard(process)
        return process.returncode

    def run(self, job):
        """Run the command of a job, and evaluate its last policy; returns versions and what `outcome` does. Raises
        RuntimeError with its output."""
        script, *flags = job["command"]
        with tempfile.TemporaryDirectory() as folder, open(f"{folder}/output", "w+") as output:
            known = versions(script)
            WARM_STARTS.mkdir(parents=True, exist_ok=True)
            Path(folder, "runs").mkdir()
            Path(folder, "runs", "warm_starts").symlink_to(WARM_STARTS)
            code = self.call([str(REPOSITORY / script), *flags], folder, output)
            if code == 0 and "llm" not in script:
                (run,) = Path(folder, "runs").glob("*__*")
                code = self.call([str(REPOSITORY / "benchmark" / "evaluate.py"), str(run)], folder, output)
            output.seek(0)
            return known | outcome(code, output.read(), folder, job["lag"], job["steps"])

    def stop(self):
        """End all runs at once, with their actors."""
        with self.lock:
            self.stopped = True
        for process in list(self.processes):
            with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
                os.killpg(process.pid, signal.SIGKILL)


def check(args):
    """Exit with code 2 and one line if the options cannot work."""
    if args.workers < 1:
        print(f"error: --workers {args.workers}: must be a number from 1 on", file=sys.stderr)
        raise SystemExit(2)
    if args.lag_schedule == "async" and any(args.lags):
        print("error: --lag-schedule async: has no lag to set, use --lags 0", file=sys.stderr)
        raise SystemExit(2)
    for path in args.reuse:
        if not path.exists():
            print(f"warning: --reuse {path}: is not there, so no run is taken from it", file=sys.stderr)


def main(args):
    check(args)
    done, known = (
        {shlex.join(record["command"]): record for path in paths if path.exists() for record in read_records(path)}
        for paths in ([args.out], args.reuse)
    )
    jobs, changed = {}, Counter()  # jobs: command -> what identifies the run in the results
    hashes = {script: fingerprint(script) for script in {record["command"][0] for record in (done | known).values()}}
    for seed in args.seeds:
        for lag in args.lags:
            for env_id in args.env_ids:
                for method in args.methods:
                    command = command_of(method, env_id, seed, lag, args)
                    recorded = done.get(shlex.join(command)) or known.get(shlex.join(command), {})
                    changed[command[0]] += recorded.get("script", hashes.get(command[0])) != hashes.get(command[0])
                    if shlex.join(command) not in done:
                        job = {"env_id": env_id, "method": method, "lag_schedule": args.lag_schedule, "lag": lag}
                        jobs[shlex.join(command)] = job | {"seed": seed, "steps": args.steps, "command": command}
    for script in +changed:
        print(
            f"note: {changed[script]} recorded runs are of another state of {script}; they are kept. To repeat "
            "them, delete their lines, or use another --out",
            file=sys.stderr,
        )
    if args.dry_run:
        for command in jobs:
            if command not in known:
                print(command)
        return
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for command in [command for command in jobs if command in known]:
        append_record(args.out, known[command] | jobs.pop(command))
    failed, runner = {}, Runner()
    # From here on a signal ends the runs, and nothing else: an exception could be raised in a place that swallows it
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: runner.stop())
    with ThreadPoolExecutor(args.workers) as pool:
        progress = tqdm(total=len(jobs), unit="run", smoothing=0.1, desc=args.out.stem)
        futures = {pool.submit(runner.run, job): job for job in jobs.values()}
        for future in as_completed(futures):
            job = futures[future]
            try:
                record = job | future.result()
            except Exception as error:  # one bad run must not end the study
                if runner.stopped:
                    break
                failed[shlex.join(job["command"])] = error
                name = f"{job['method']} {job['env_id']} lag {job['lag']} seed {job['seed']}.txt"
                log = Path(f"{args.out}.logs", re.sub(r"[^\w.-]+", "_", name))
                log.parent.mkdir(exist_ok=True)
                log.write_text(f"{shlex.join(job['command'])}\n{error}")
                reason, _, output = str(error).partition("\n")
                progress.write(f"FAILED: {shlex.join(job['command'])}\n{reason}, see {log}\n{output[-2000:]}")
            else:
                append_record(args.out, record)
            progress.update()
        pool.shutdown(cancel_futures=True)
    progress.close()
    if runner.stopped:
        raise KeyboardInterrupt
    if failed:
        names = "\n".join(f"  {command}" for command in failed)
        raise SystemExit(
            f"error: {len(failed)} of {len(jobs)} runs failed (see above; the same command repeats them):\n{names}"
        )


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's end is Ctrl-C's: no run is left behind
    try:
        main(tyro.cli(Args, description=__doc__))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on with the runs that are missing", file=sys.stderr)
        sys.exit(130)  # not 1, after which a study goes on with its next runs
