"""What several learners gain: measured for two on this machine, computed for more.

    python benchmark/scaling.py [script, vaco_async_mujoco if none is given] [any flag of it]

Runs one learner without actors (alone.py), two that know nothing of each other, and two of torchrun, and measures two
all-reduces between two processes on this machine: of one number and of all gradients.

The table for more learners, one per host, is an estimate, not measured. A gradient step has an all-reduce of all
gradients, one of a number for VACO's gate, and two of a number for normalised advantages. A ring of n passes 2 (n - 1)
messages on; each takes as long as one of one number here between two processes, plus the time of its bytes at 10 or 100
Gbit/s. The efficiency is the time of a gradient step over that with its messages: nothing overlaps, and nobody waits
for the slowest, which makes it too high, as the row for 2 shows beside what was measured; messages between hosts may be
quicker than here, which would make it too low.
"""

import importlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

HERE = Path(__file__).resolve().parent
SECONDS = 20


def learner_speeds(commands):
    """Run learners side by side: their steps per second, how many parameters they have, and the bytes that one of
    several sent per gradient step."""
    with tempfile.TemporaryDirectory() as folder:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes = [subprocess.Popen(command, cwd=folder, **pipes) for command in commands]
        outputs = [process.communicate()[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        if process.returncode:
            sys.exit(f"{output}\nerror: exit code {process.returncode} of {process.args}")
    size = int(re.search(r"(\d+) parameters", outputs[0])[1])
    sent = re.search(r"(\d+) bytes sent", outputs[0])
    return [float(re.search(r"learner alone: (\d+)", output)[1]) for output in outputs], size, sent and int(sent[1])


def time_messages(sizes, repeats=500):
    """What torchrun starts this file for: print the time of an all-reduce of so many float32, median and mean."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    for size in sizes:
        numbers, times = torch.zeros(size), []
        for _ in range(repeats):
            dist.barrier()
            begun = time.perf_counter()
            dist.all_reduce(numbers)
            times.append(time.perf_counter() - begun)
        if dist.get_rank() == 0:
            print(f"all-reduce {size} {statistics.median(times)} {statistics.mean(times)}", flush=True)
    dist.destroy_process_group()


def main():
    flags = sys.argv[1:] or ["vaco_async_mujoco"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    learner = [str(HERE / "alone.py"), "learner", *flags, "--seconds", str(SECONDS)]
    (one,), size, _ = learner_speeds([[sys.executable, *learner]])
    apart = sum(learner_speeds([[sys.executable, *learner]] * 2)[0])
    (together,), _, measured = learner_speeds([[*torchrun, *learner]])

    sys.path.insert(0, str(HERE.parent))
    script = importlib.import_module(flags[0])
    args = script.tyro.cli(script.Args, args=flags[1:])
    messages = [*torchrun, __file__, "messages", str(size)]
    output = subprocess.run(messages, stdout=subprocess.PIPE, text=True, check=True).stdout
    found = re.findall(r"all-reduce \d+ (\S+) (\S+)", output)
    small, large = ([float(seconds) for seconds in times] for times in found)
    small_messages = int(flags[0].startswith("vaco")) + 2 * getattr(args, "norm_adv", False)  # per gradient step

    steps = args.update_epochs * args.num_minibatches
    samples = args.rollouts_per_batch * args.num_steps * args.num_envs
    step = samples / one / steps  # seconds per gradient step, with its part of what is done once per batch
    beside, joined = 2 * samples / apart / steps, 2 * samples / together / steps
    print(f"\n{flags[0]}, {size} parameters, {args.num_minibatches} minibatches of {samples // args.num_minibatches}\n")
    print("| learners | steps/s | of twice one | ms per gradient step |\n|---|---|---|---|")
    print(f"| 1 | {one:.0f} | | {step * 1e3:.2f} |")
    print(f"| 2 that know nothing of each other | {apart:.0f} | {apart / one / 2:.0%} | {beside * 1e3:.2f} |")
    print(f"| 2 by torchrun | {together:.0f} | {together / one / 2:.0%} | {joined * 1e3:.2f} |")
    print("\n| all-reduce between two processes | per step | median ms | mean ms |\n|---|---|---|---|")
    print(f"| one number | {small_messages} | {small[0] * 1e3:.2f} | {small[1] * 1e3:.2f} |")
    print(f"| gradients, {4 * size / 1e3:.0f} kB | 1 | {large[0] * 1e3:.2f} | {large[1] * 1e3:.2f} |")
    print(f"\nMeasured between two processes: {measured / 1e3:.1f} kB sent per learner and step.")
    print("An estimate, not measured:\n")
    print("| learners | kB sent per learner and step | 10 Gbit/s | 100 Gbit/s |\n|---|---|---|---|")
    for n in (2, 8, 64, 512):
        sent, row = 2 * (n - 1) / n * 4 * size, []
        for rate in (10e9 / 8, 100e9 / 8):
            messages = (small_messages + 1) * 2 * (n - 1) * small[0] / 2
            row.append(f"{step / (step + messages + sent / rate):.0%}")
        print(f"| {n} | {sent / 1e3:.0f} | {' | '.join(row)} |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["messages"]:
        time_messages([1, int(sys.argv[2])])
    else:
        main()
