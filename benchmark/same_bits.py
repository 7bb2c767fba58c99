"""Whether two states of the scripts compute the same numbers, to the last bit.

    git worktree add ../before COMMIT
    python benchmark/same_bits.py --repository ../before --out before.json
    python benchmark/same_bits.py --out after.json --compare before.json

Every run is a lockstep one, so nothing in it depends on the machine's load. Its numbers are all scalars of TensorBoard
but those that measure time, and a checksum of the trained weights. A difference is printed with its tag and its first
step, and the exit code is 1.
"""

import hashlib
import json
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SMALL = "--num-actors 4 --num-envs 4 --num-steps 128 --rollouts-per-batch 4 --total-timesteps 20000"
ATARI = "--num-actors 2 --num-envs 4 --num-steps 64 --rollouts-per-batch 4 --total-timesteps 20000"
TINY = "--total-batches 12 --warm-start-batches 150 --eval-interval 6 --eval-size 64 --learning-rate 3e-4"
LAGGED = "--lag-schedule mixture --lag 4"
LOCKSTEP = (LAGGED, "--lag-schedule fixed --lag 0")
OBJECTIVES = ("clip", "kl", "spo", "decoupled", "stop", "clip --align", "geppo --align")
RUNS = [
    *(f"vaco_async_mujoco.py {SMALL} {lag}" for lag in LOCKSTEP),
    f"vaco_async_mujoco.py {SMALL} {LAGGED} --env-id Hopper-v4 --tv-anchor learner --tv-threshold 0.05",
    f"vaco_async_mujoco.py {SMALL} {LAGGED} --env-id Hopper-v4 --no-filter --no-align --ent-coef 0.01",
    f"vaco_async_mujoco.py {SMALL} {LAGGED} --env-id Pendulum-v1 --no-norm-adv --no-anneal-lr",
    *(f"ppo_async_baseline.py {SMALL} {lag} --objective {name}" for lag in LOCKSTEP for name in OBJECTIVES),
    *(f"impala_baseline.py {SMALL} {lag} --num-minibatches 4" for lag in LOCKSTEP),
    f"impala_baseline.py {SMALL} {LAGGED} --num-minibatches 4 --env-id Hopper-v4 --sum-loss True",
    *(f"vaco_async_llm.py {TINY} {lag}" for lag in LOCKSTEP),
    f"vaco_async_llm.py {TINY} {LAGGED} --objective grpo --kl-coef 0.05 --num-actors 2",
    f"vaco_async_llm.py {TINY} {LAGGED} --tv-anchor behavior --rollouts-per-batch 2 --prompts-per-rollout 32",
    *(f"vaco_async_atari.py {ATARI} {lag}" for lag in LOCKSTEP),
    f"vaco_async_atari.py {ATARI} {LAGGED} --env-id Breakout-v5 --bf16 --total-timesteps 4000",
    f"ppo_async_baseline.py {ATARI} {LAGGED} --env-id Pong-v5",
    f"ppo_async_baseline.py {ATARI} {LAGGED} --env-id Breakout-v5 --bf16 --total-timesteps 4000",
    f"impala_baseline.py {ATARI} {LAGGED} --env-id Pong-v5 --num-minibatches 4",
]
TIMES = ("stats/", "charts/SPS", "charts/tokens_per_second")


@dataclass
class Args:
    out: Path  # the numbers of all runs, as JSON
    repository: Path = Path(__file__).resolve().parent.parent  # whose scripts run
    compare: Path | None = None  # numbers of another state
    only: str = ""  # only the runs whose command has this text
    workers: int = 2  # runs at once


def numbers_of(repository, command):
    """{tag: [values in order]} of one run, and the checksum of its weights under "weights"."""
    script, *flags = shlex.split(command)
    with tempfile.TemporaryDirectory() as folder:
        process = [sys.executable, str(repository.resolve() / script), *flags]
        run = subprocess.run(process, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if run.returncode:
            raise RuntimeError(f"{command}\n{run.stdout}")
        (logs,) = [path for path in Path(folder, "runs").iterdir() if path.name != "warm_starts"]
        events = EventAccumulator(str(logs), size_guidance={"scalars": 0})
        events.Reload()
        tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith(TIMES)]
        numbers = {tag: [event.value for event in events.Scalars(tag)] for tag in tags}
        weights = torch.load(logs / "checkpoint.pt", weights_only=True)["agent"]
    checksum = hashlib.sha256()
    for tensor in weights.values():
        checksum.update(tensor.contiguous().numpy().tobytes())
    return numbers | {"weights": [checksum.hexdigest()]}


def main(args):
    commands = [command for command in RUNS if args.only in command]
    before = json.loads(args.compare.read_text()) if args.compare else {}
    results = {}
    differences = 0
    with ThreadPoolExecutor(args.workers) as pool:
        runs = pool.map(partial(numbers_of, args.repository), commands)
        for command, after in zip(commands, runs, strict=True):
            results[command] = after
            args.out.write_text(json.dumps(results))
            if not args.compare:
                continue
            lines = []
            for tag in sorted(before[command].keys() | after.keys()):
                old, new = before[command].get(tag, []), after.get(tag, [])
                if repr(old) != repr(new):  # by their text, since NaN is not equal to itself
                    pairs = enumerate(zip(old, new, strict=False))
                    at = next((i for i, pair in pairs if repr(pair[0]) != repr(pair[1])), "length")
                    lines.append(f"    {tag}, batch {at}")
            print("\n".join([f"{'differs' if lines else 'equal'}: {command}", *lines]), flush=True)
            differences += bool(lines)
    if not args.compare:
        return
    print(f"{len(results) - differences} of {len(results)} runs are equal to the last bit")
    sys.exit(bool(differences))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
