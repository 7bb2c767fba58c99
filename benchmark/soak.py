"""Whether a long run leaks: memory, open descriptors and processes, while an actor is killed every minute.

    python benchmark/soak.py vaco_async_mujoco --minutes 20 [any flag of the script]

Prints a table of the means over the first, middle and last tenth of the time (the first begins after the tenth in which
the program starts), then ends the run by SIGTERM and says what is left of it.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from throughput import pss
from tqdm import tqdm

HERE = Path(__file__).parent
COLUMNS = ("learner, PSS", "all processes, PSS", "learner's descriptors", "processes", "files in /dev/shm")


def parent(pid):
    """The parent of a process; None if it has ended."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def family(learner):
    """The processes of a run, and those of them that are actors: the children of its forkserver."""
    session = []
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        with contextlib.suppress(OSError):  # it has just ended
            if os.getsid(pid) == learner and parent(pid) is not None:
                session.append(pid)
    return session, [pid for pid in session if pid != learner and parent(pid) != learner]


def sample(learner):
    """One value per column: GB, GB, numbers. /dev/shm is the machine's, with what other programs have there."""
    session, _ = family(learner)
    rollup = Path(f"/proc/{learner}/smaps_rollup").read_text()
    own = next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")) / 2**20
    return own, pss(learner), len(os.listdir(f"/proc/{learner}/fd")), len(session), len(os.listdir("/dev/shm"))


def main():
    script, flags = sys.argv[1], sys.argv[2:]
    minutes = float(flags.pop(flags.index("--minutes") + 1)) if "--minutes" in flags else 20
    flags = [flag for flag in flags if flag != "--minutes"]
    endless = ["--total-timesteps", str(10**11), "--max-actor-restarts", str(10**6), "--checkpoint-interval", "100"]
    command = [sys.executable, str((HERE / f"../{script}.py").resolve()), *flags, *endless]
    samples, kills, begun, shared = [], 0, time.monotonic(), set(os.listdir("/dev/shm"))
    with tempfile.TemporaryDirectory() as folder, open(f"{folder}/output", "w") as output:
        learner = subprocess.Popen(command, cwd=folder, stdout=output, stderr=output, start_new_session=True)
        progress = tqdm(total=round(minutes * 60), unit="s")
        try:
            while (passed := time.monotonic() - begun) < minutes * 60 and learner.poll() is None:
                time.sleep(2)
                progress.update(round(passed) - progress.n)
                with contextlib.suppress(OSError, StopIteration):  # the learner has ended: its exit code tells
                    samples.append(sample(learner.pid))
                actors = family(learner.pid)[1]
                if passed > 60 * (kills + 1) and actors:
                    os.kill(random.choice(actors), signal.SIGKILL)
                    kills += 1
            learner.send_signal(signal.SIGTERM)
            code = learner.wait(30)
            deadline = time.monotonic() + 5
            while (left := len(family(learner.pid)[0])) and time.monotonic() < deadline:
                time.sleep(0.1)
        finally:
            progress.close()
            for pid in family(learner.pid)[0]:
                os.kill(pid, signal.SIGKILL)
        lines = Path(folder, "output").read_text().splitlines()
        steps = [line for line in lines if line.startswith("step ")]
    if code != 128 + signal.SIGTERM:
        sys.exit("\n".join([*lines[-30:], f"error: exit code {code}"]))
    tenth, new_files = len(samples) // 10, len(set(os.listdir("/dev/shm")) - shared)
    print(f"{script}, {minutes:g} minutes, {kills} actors killed, {len(samples)} samples; at the end: {steps[-1]}\n")
    print("\n".join([f"| | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]))
    for name, first in (("first", tenth), ("middle", len(samples) // 2), ("last", len(samples) - tenth)):
        means = [sum(column) / tenth for column in zip(*samples[first : first + tenth], strict=True)]
        print(f"| {name} | {means[0]:.3f} GB | {means[1]:.3f} GB | {means[2]:.1f} | {means[3]:.1f} | {means[4]:.1f} |")
    print(f"\nSIGTERM: exit code {code}; left over: {left} processes, {new_files} files in /dev/shm")


if __name__ == "__main__":
    main()
