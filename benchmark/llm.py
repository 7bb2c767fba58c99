"""Run vaco_async_llm.py over methods, lags and seeds, one line of JSON per run, then draw a table and a figure.

    python benchmark/llm.py --out results/llm_lag.jsonl --methods "vaco" "grpo" --lags 0 4 16 --seeds 1 2 3

A method is an objective, with more flags if wanted: "vaco --tv-threshold 0.01". Resumable: runs that are recorded in
the file are skipped; those that a file of `--reuse` has are shown from there. All runs of a seed begin with the same
warm-started model, which the first ones make.
"""

import json
import re
import shlex
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import matplotlib
import numpy as np
import tyro
from run import versions
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

matplotlib.use("Agg")
import matplotlib.pyplot as plt

REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass
class Args:
    out: Path  # the file of results; table and figure get its name with .md and .png
    methods: tuple[str, ...] = ("vaco", "grpo")
    lags: tuple[int, ...] = (0, 4, 16)
    seeds: tuple[int, ...] = (1, 2, 3)
    lag_schedule: str = "fixed"
    steps: int = 200  # batches per run
    workers: int = 2  # runs at once; each is busy on one core, or two. Lockstep results do not depend on it
    flags: str = ""  # flags for all runs, as one string after a =: --flags="--eval-size 100"
    reuse: tuple[Path, ...] = ()  # other files of results: a run that one of them has is not repeated
    folder: Path = REPOSITORY  # runs/ is there, with the warm-started models


def command_of(method, lag, seed, args):
    """The command line of one run, a list from the script's name on."""
    parts = ["vaco_async_llm.py", "--seed", str(seed), "--total-batches", str(args.steps)]
    parts += ["--lag-schedule", args.lag_schedule, "--lag", str(lag), *shlex.split(args.flags)]
    return [*parts, "--objective", *shlex.split(method)]


def run(command, folder):
    """Run one command; returns what it has shown. Raises RuntimeError with the end of its output if it fails."""
    line = [sys.executable, str(REPOSITORY / command[0]), *command[1:]]
    result = subprocess.run(line, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError((result.stdout + result.stderr)[-2000:])
    logs = re.findall(r"logs in (runs/\S+)", result.stdout)[-1]
    events = EventAccumulator(str(Path(folder, logs)), size_guidance={"scalars": 0})
    events.Reload()
    curve = [(event.step, round(event.value, 4)) for event in events.Scalars("charts/accuracy")]
    kept = ("lag/", "filter/", "losses/", "charts/reward", "charts/completion_length")
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith(kept)]
    lag = max(event.value for event in events.Scalars("lag/versions_max"))  # which the first batches cannot have
    metrics = {tag: [event.value for event in events.Scalars(tag) if event.step > lag] for tag in tags}
    return {
        "accuracy": curve,
        "metrics": {tag: float(f"{np.mean(values):.5g}") for tag, values in metrics.items()},
        "summary": result.stdout.splitlines()[-1],
        **versions(),
        **{name: version(name) for name in ("transformers", "reasoning-gym")},
    }


def table(records):
    """Markdown: held-out accuracy before and after, per method and lag, over seeds; and by how much the mean of each
    run differs from that of the first method with the same lag and seed."""
    columns = ["method", "lag", "seeds", "before", "after", "change, each seed", "mean of the run"]
    columns += [f"the same, minus {records[0]['method']}", "reward", "TV on arrival", "over budget", "dropped"]
    means = {}
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for method, lag in dict.fromkeys((record["method"], record["lag"]) for record in records):
        group = [record for record in records if (record["method"], record["lag"]) == (method, lag)]
        curves = 100 * np.array([[value for _, value in record["accuracy"]] for record in group])
        metrics = [np.mean([record["metrics"].get(tag, np.nan) for record in group])
                   for tag in ("charts/reward", "lag/tv_backward", "filter/gate_open", "filter/dropped")]  # fmt: skip
        after = f"{curves[:, -1].mean():.1f}" + (f" ± {curves[:, -1].std(ddof=1):.1f}" if len(group) > 2 else "")
        changes = ", ".join(f"{change:+.1f}" for change in curves[:, -1] - curves[:, 0])
        own = dict(zip([record["seed"] for record in group], curves[:, 1:].mean(1), strict=True))
        first = means.setdefault(lag, own)
        ahead = [f"{value - first[seed]:+.1f}" for seed, value in own.items() if first is not own and seed in first]
        # The gate is the filter's; with clipped ratios it only says that the default budget was exceeded
        over = f"{metrics[2]:.0%}" if method.startswith("vaco") and "--no-filter" not in method else ""
        lines.append(
            f"| {method} | {lag} | {len(group)} | {curves[:, 0].mean():.1f} | {after} | {changes} | "
            f"{curves[:, 1:].mean():.1f} | {', '.join(ahead)} | {metrics[0]:.3f} | {metrics[1]:.3f} | {over} | "
            f"{metrics[3]:.0%} |"
        )
    lines += ["", "± is the standard deviation over seeds; columns 4 to 8 are of the held-out accuracy in %."]
    lines[-1] += " Reward (of sampled completions) and what follows are means over the batches that have the whole lag."
    commits = sorted({record["commit"] for record in records})
    lines[-1] += f" Commits: {', '.join(commits)}."
    if len(commits) > 1:  # a command that is recorded is not run again, whatever has changed in the script
        lines[-1] += " **Runs of different code: compare them only if nothing has changed between these commits.**"
    return "\n".join(lines)


def draw(records, path):
    """Accuracy over batches, a panel per lag; thin: one seed, thick: the mean."""
    looks = [("#000000", "-", "o"), ("#D55E00", "--", "s"), ("#0072B2", ":", "^"), ("#009E73", "-.", "D")]
    looks += [("#CC79A7", "-", "v"), ("#E69F00", "--", "P"), ("#56B4E9", ":", "X"), ("#999999", "-.", "*")]
    looks += [("#8B4513", "-", "<"), ("#4B0082", "--", ">")]
    lags, methods = (list(dict.fromkeys(record[key] for record in records)) for key in ("lag", "method"))
    size = (max(6, 4 * len(lags)), 3.6 + 0.2 * len(methods))
    figure, panels = plt.subplots(1, len(lags), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for panel, lag in zip(panels[0], lags, strict=True):
        for (color, line, marker), method in zip(looks * len(methods), methods, strict=False):
            group = [record for record in records if (record["method"], record["lag"]) == (method, lag)]
            for record in group:
                panel.plot(*zip(*record["accuracy"], strict=True), color=color, alpha=0.25, linewidth=1)
            if group:
                steps = [step for step, _ in group[0]["accuracy"]]
                mean = np.mean([[value for _, value in record["accuracy"]] for record in group], axis=0)
                look = {"color": color, "linestyle": line, "marker": marker, "markersize": 4, "linewidth": 2}
                panel.plot(steps, mean, **look, label=f"{method} ({len(group)})")
        panel.set_title(f"lag {lag}")
        panel.set_xlabel("batches")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("held-out accuracy, greedy")
    names = {}  # which are too long to stand at the curves
    for panel in panels[0]:
        names |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    title = "thin: a seed, thick: the mean; in parentheses: seeds"
    figure.legend(
        names.values(), names, loc="outside lower left", fontsize=8, title=title, title_fontsize=8, handlelength=4
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(args):
    lines = [line for path in (*args.reuse, args.out) if path.exists() for line in path.read_text().splitlines()]
    records = {shlex.join(json.loads(line)["command"]): json.loads(line) for line in lines}
    jobs = [(method, lag, seed) for seed in args.seeds for lag in args.lags for method in args.methods]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    failed, lock, progress = [], threading.Lock(), tqdm(total=len(jobs), unit="run")

    def do(job):
        method, lag, seed = job
        command = command_of(method, lag, seed, args)
        name = shlex.join(command)
        try:
            shown = {} if name in records else run(command, args.folder)
        except RuntimeError as error:  # one bad run must not end the study
            progress.write(f"FAILED: {name}\n{error}", file=sys.stderr)
            failed.append(name)
            return
        with lock:
            if shown:
                records[name] = {"method": method, "lag": lag, "seed": seed, "command": command, **shown}
                with open(args.out, "a") as file:
                    file.write(json.dumps(records[name]) + "\n")
            progress.update()

    with ThreadPoolExecutor(args.workers) as pool:
        list(pool.map(do, jobs))
    progress.close()
    names = [shlex.join(command_of(*job, args)) for job in jobs]
    study = {name: records[name] for name in names if name in records}
    if study:
        ordered = sorted(study.values(), key=lambda r: (args.methods.index(r["method"]), r["lag"], r["seed"]))
        args.out.with_suffix(".md").write_text(table(ordered) + "\n")
        draw(ordered, args.out.with_suffix(".png"))
        print(table(ordered))
    if failed:
        raise SystemExit(f"error: {len(failed)} of {len(jobs)} runs failed (see above; the same command repeats them)")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
