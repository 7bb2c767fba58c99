"""Learning curves of runs, as a figure and as a markdown table of means over equal stretches of steps.

    python benchmark/curves.py runs/Pong-v5__* --figure pong.png --stretch 100000

A value is the mean of what was logged in the stretch of steps that ends there. A line carries the name of its run,
`--exp-name`; runs of one name (seeds) are drawn in one colour, each by itself.
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

# Okabe and Ito's colours, which colour-blind readers can tell apart; with line styles, for print in grey
STYLES = [("#0072B2", "-"), ("#D55E00", "--"), ("#009E73", "-."), ("#CC79A7", ":"), ("#E69F00", "-"), ("#56B4E9", "--")]


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]  # folders of runs, as under runs/
    figure: Path | None = None  # where to draw to (.png, .pdf, .svg); None: the table alone
    tag: str = "charts/episodic_return"  # what to show, a name as in TensorBoard
    stretch: int = 100_000  # steps per value


def read(run, tag, stretch):
    """{end of a stretch in steps: mean of what was logged in it} of a run. Raises SystemExit if the tag is missing."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    if tag not in events.Tags()["scalars"]:
        raise SystemExit(f"error: {run} has no {tag}; it has {', '.join(events.Tags()['scalars']) or 'no scalars'}")
    values, scalars = defaultdict(list), events.Scalars(tag)
    stretches = max(round(scalars[-1].step / stretch), 1)  # the steps that a last batch is over count with the last one
    for event in scalars:
        values[min(math.ceil(event.step / stretch), stretches) * stretch].append(event.value)
    return {end: float(np.mean(part)) for end, part in sorted(values.items())}


def main(args):
    # runs/{env_id}__{exp_name}__{seed}__{time}
    curves = [
        (run.name.split("__")[1], run.name.split("__")[2], read(run, args.tag, args.stretch)) for run in args.runs
    ]
    ends = sorted({end for *_, curve in curves for end in curve})
    print("| steps |" + "".join(f" {name}, seed {seed} |" for name, seed, _ in curves))
    print("|---|" + "---|" * len(curves))
    for end in ends:
        print(f"| {end} |" + "".join(f" {curve[end]:.4g} |" if end in curve else " |" for *_, curve in curves))
    if args.figure is None:
        return
    names = list(dict.fromkeys(name for name, *_ in curves))
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, _, curve in curves:
        color, style = STYLES[names.index(name) % len(STYLES)]
        axes.plot(curve.keys(), curve.values(), style, color=color)
    axes.margins(x=0)
    floor, gap = -math.inf, 0.04 * (axes.get_ylim()[1] - axes.get_ylim()[0])
    for name, _, curve in sorted(curves, key=lambda curve: curve[2][max(curve[2])]):
        last = max(curve)
        floor = max(curve[last], floor + gap)  # names that would overlap move up
        color = STYLES[names.index(name) % len(STYLES)][0]
        axes.annotate(f" {name}", (last, floor), color=color, va="center", fontsize=8, annotation_clip=False)
    axes.set(xlabel="environment steps", ylabel=args.tag)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(args.figure, dpi=150)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
