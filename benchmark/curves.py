"""What to look at after a first run: return, lag, total variation and the share of samples dropped, as one picture.

    python benchmark/curves.py runs/HalfCheetah-v4__* --figure curves.png

Each run is a line, with the name of its folder in the legend. A point is a mean over a fiftieth of the longest run.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.ticker import EngFormatter
from plot import COLORS, clean
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

PANELS = {
    "return": ("charts/episodic_return", "charts/accuracy"),  # of language models: held-out accuracy
    "lag in versions": ("lag/versions_mean",),
    "total variation after the updates": ("lag/tv_total",),
    "share of samples dropped": ("filter/dropped",),
}
POINTS = 50


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]  # folders of runs, as under runs/
    figure: Path = Path("curves.png")  # where to draw to (.png, .pdf, .svg)


def read(run):
    """All scalars of a run: {tag: (steps, values)}."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    scalars = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    return {tag: np.array([(event.step, event.value) for event in part]).T for tag, part in scalars.items()}


def stretches(steps, values, last):
    """The means of values over equal stretches of steps up to `last`: where each ends, and its mean."""
    ends = np.ceil(steps / last * POINTS) * last / POINTS
    places = np.unique(ends)
    return places, np.array([values[ends == place].mean() for place in places])


def draw(runs):
    """A figure of four panels, of {name: what `read` returns}."""
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), layout="constrained")
    for ax, (title, tags) in zip(axes.flat, PANELS.items(), strict=True):
        shown = {name: scalars[tag] for name, scalars in runs.items() for tag in tags if tag in scalars}
        last = max((steps[-1] for steps, _ in shown.values()), default=1)
        for i, name in enumerate(runs):
            if name in shown:
                ax.plot(*stretches(*shown[name], last), color=COLORS[i % len(COLORS)], label=name)
        clean(ax, title, size=9, xlim=(0, None), xlabel="steps" * (ax in axes[1]))
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", fontsize=8)
    return figure


def main(args):
    runs = {run.name: read(run) for run in args.runs}
    empty = [name for name, scalars in runs.items() if not scalars]
    if empty or not runs:
        print(f"error: {', '.join(empty) or 'no folder of a run'}: nothing is logged there", file=sys.stderr)
        sys.exit(2)
    draw(runs).savefig(args.figure, dpi=150)
    print(f"wrote {args.figure}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
