"""Figures and markdown tables from the results of benchmark/run.py.

    python benchmark/plot.py benchmark/results/mujoco_lag.jsonl

writes beside the results, with their name: .md with all tables, and figures: _main (return of all environments against
lag), _return (each environment by itself), _curves (learning curves), _tv (total variation and dropped share). With
`--figures width`: _width (return against total variation, a line for each kind of trust region, over its widths).

Scores are normalised per environment. 0 is the policy before training (the method "untrained"). 1 is the mean of
PPO-clip at the smallest lag; where that is missing, of the first method that is there on all environments. A run
without a return, because it diverged or no episode ended, counts as 0. IQM is the interquartile mean over all runs of
all environments, from the seeds that a method has on all of them. Intervals are 95 % stratified bootstrap intervals of
rliable (arXiv 2108.13264), from three seeds on.
"""

import itertools
import math
import re
import sys
import textwrap
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.colors import to_rgb
from run import read_records
from scipy.optimize import isotonic_regression

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from rliable import library as rly
    from rliable import metrics

# A method looks the same in all figures. Colours are Okabe and Ito's, which colour-blind readers can tell apart, and
# markers help in grey. Parts of a method share its colour and differ by line. This is the order of methods, too
LOOKS = {
    "VACO": ("#000000", "o", "-"),
    "PPO-clip": ("#D55E00", "s", "-"),
    "PPO-KL": ("#CC79A7", "D", "-"),
    "SPO": ("#009E73", "P", "-"),
    "decoupled PPO": ("#00508F", "X", "-"),
    "APPO": ("#D55E00", "d", "--"),
    "GePPO": ("#56B4E9", ">", "-"),
    "stop by TV": ("#7F7F7F", "8", "-"),
    "IMPALA": ("#E69F00", "h", "-"),
    "IMPALA, 1 epoch": ("#E69F00", "<", "--"),
    "VACO, no filter": ("#000000", "^", "--"),
    "VACO, no alignment": ("#000000", "v", ":"),
}
LOOKS |= {
    "GRPO, filter": LOOKS["VACO"],
    "GRPO, filter, four steps": ("#000000", "*", "-."),
    "GRPO, no filter": LOOKS["VACO, no filter"],
    "GRPO, no filter, one step": LOOKS["VACO, no alignment"],
    "GRPO, clipped": LOOKS["PPO-clip"],
    "GRPO, decoupled": LOOKS["decoupled PPO"],
}
COLORS = list(dict.fromkeys(color for color, *_ in LOOKS.values()))
OTHERS = [("#8C6D31", "p", "-"), ("#B8860B", "H", "-"), ("#556B2F", "*", "-")]  # for methods that are added
HEADLINE = ("VACO", "PPO-clip", "PPO-KL", "decoupled PPO")
RIVALS = ("PPO-clip", "APPO", "GePPO", "decoupled PPO", "PPO-KL", "SPO", "stop by TV")  # of PROTOCOL.md
PARTS = ("VACO", "VACO, no filter", "VACO, no alignment")
INK, SIZE = "#222222", 8  # of text
FEWEST = 3  # seeds for an interval: two that happen to be alike give one of no width
WIDTH = re.compile(r" --(tv-threshold|clip-coef|kl-target|spo-eps) \S+")  # of a trust region
SCHEDULES = {
    "mixture": "mixture of lag k: each rollout by one of the last k + 1 versions, k / 2 old on average",
    "fixed": "fixed lag k: every batch by the version of k batches ago",
    "async": "free-running",
}
# Returns after 1M steps of the v4 (CleanRL, 3 seeds) and the v3 environments (tianshou, 10 seeds)
PUBLISHED = {
    "HalfCheetah-v4": ("1443 ± 46", "5784"),
    "Hopper-v4": ("2383 ± 272", "2609"),
    "Walker2d-v4": ("2288 ± 572", "3589"),
    "Ant-v4": ("", "3258"),
    "Humanoid-v4": ("716 ± 49", "787"),
}


Figure = Literal["main", "return", "curves", "tv", "width"]


@dataclass
class Args:
    results: tyro.conf.Positional[tuple[Path, ...]]  # files of benchmark/run.py; several are put together
    out: Path | None = None  # where to write, with a name to begin with; None: beside the first file, with its name
    methods: tuple[str, ...] = ()  # methods to show, in this order; none: all
    lags: tuple[int, ...] = ()  # lags to show; none: all
    # A flag in the names of methods to draw against, instead of the lag: "update-epochs". Methods without it are left
    # out, unless its default is given: "tv-threshold=0.1"
    x: str | None = None
    reps: int = 2000  # bootstrap samples
    figures: tuple[Figure, ...] = ("main", "return", "curves", "tv")  # figures to draw


class Results:
    """The runs of some files as `cells`: {(method, environment, x): {seed: run}}; x is the lag, or the value of a flag.

    Raises SystemExit if runs are mixed that are no one study, or if there is no "untrained" to normalise by.
    """

    def __init__(self, args):
        self.reps, runs = args.reps, {}
        for path in args.results:
            if not path.is_file():
                raise SystemExit(f"error: {path}: no such file")
        for run in (run for path in args.results for run in read_records(path)):
            if "accuracy" in run or "env_id" not in run:
                raise SystemExit("error: these are no returns; of language models, benchmark/plot_llm.py draws them")
            key = run["method"], run["env_id"], run["lag"], run["seed"]
            if key in runs and runs[key]["command"] != run["command"]:
                raise SystemExit(f"error: two different runs are {', '.join(map(str, key))}: give results of one study")
            runs[key] = run
        if not runs:
            raise SystemExit(f"error: no runs in {', '.join(map(str, args.results)) or 'no files: name some'}")
        trained = [run for (method, *_), run in runs.items() if method != "untrained"]  # which may be shorter
        lengths, schedules = ({run[name] for run in trained or runs.values()} for name in ("steps", "lag_schedule"))
        if len(lengths) != 1 or len(schedules) != 1:
            kinds = f"{', '.join(sorted(schedules))}, of {', '.join(map(str, sorted(lengths)))} steps"
            raise SystemExit(f"error: runs are no one study, but {kinds}: give files of one kind")
        (self.steps,), (self.schedule,) = lengths, schedules
        self.grid = np.array(next((run["grid"] for run in trained if "grid" in run), []))
        self.env_ids = list(dict.fromkeys(env_id for _, env_id, *_ in runs))
        known = list(dict.fromkeys(method for method, *_ in runs if method != "untrained"))
        known.sort(key=lambda method: ([*LOOKS, ""].index(base_of(method)), method not in LOOKS))  # stable
        lags = sorted({lag for method, _, lag, _ in runs if method != "untrained"})
        for name, asked, there in (("methods", args.methods, known), ("lags", args.lags, lags)):
            if unknown := [value for value in asked if value not in there]:
                raise SystemExit(f"error: --{name} {unknown[0]}: not in the results, which have {str(there)[1:-1]}")
        self.set_scale(runs, known, min(lags, default=0))
        lags = sorted(args.lags or lags)
        self.lag = lags[0] if len(lags) == 1 else None
        if args.x and len(lags) > 1:
            raise SystemExit(f"error: --x {args.x}: takes one lag at a time, use --lags {lags[-1]}")
        self.x_name, _, default = (args.x or "lag").partition("=")
        self.cells = defaultdict(dict)
        for method, env_id, lag, seed in sorted(runs, key=lambda key: known.index(key[0]) if key[0] in known else -1):
            flag = re.search(rf" --{self.x_name}[ =](\S+)", method) if args.x else None
            value = flag[1] if flag else default if args.x else lag
            if method in (args.methods or known) and lag in lags and value != "":
                cell = self.cells[method.replace(flag[0], "") if flag else method, env_id, float(value)]
                if seed in cell:
                    raise SystemExit(f"error: --x {args.x}: {method} is there twice, choose by --methods")
                cell[seed] = runs[method, env_id, lag, seed]
        if not self.cells:
            raise SystemExit(f"error: nothing to show: the results have only the methods {str(known)[1:-1]}")
        self.methods = list(dict.fromkeys(method for method, *_ in self.cells))
        if args.methods and not args.x:
            self.methods = list(args.methods)
        self.xs = sorted({x for *_, x in self.cells})

    def set_scale(self, runs, known, first):
        """What the scores 0 and 1 are; `first`: the smallest lag."""
        self.first, self.zero, self.one, self.raw = first, {}, {}, []  # raw: what cannot be normalised
        groups = defaultdict(list)
        for (method, env_id, lag, _), run in runs.items():
            if lag == first or method == "untrained":
                groups[method, env_id].append(run["return"])
        everywhere = [method for method in known if all(groups[method, env_id] for env_id in self.env_ids)]
        self.unit = "PPO-clip" if "PPO-clip" in everywhere else next(iter(everywhere), None)
        for env_id in self.env_ids:
            if not any(value is not None for value in groups["untrained", env_id]):
                raise SystemExit(f'error: no run of the method "untrained" on {env_id}: scores cannot be normalised')
            zero = self.zero[env_id] = float(np.mean([v for v in groups["untrained", env_id] if v is not None]))
            returns = [zero if value is None else value for value in groups[self.unit, env_id]]
            self.one[env_id] = float(np.mean(returns or [zero]))
            if self.one[env_id] <= zero:  # very short runs
                self.one[env_id] = zero + 1
                self.raw.append(env_id)

    def seeds(self, method, x):
        """The seeds that a method has on all environments."""
        return sorted(set.intersection(*(set(self.cells.get((method, e, x), {})) for e in self.env_ids)))

    def returns(self, method, env_id, x):
        """The returns of the last 100 episodes, {seed: return}; of the untrained policy where a run has none."""
        cell = self.cells.get((method, env_id, x), {})
        return {s: self.zero[env_id] if cell[s]["return"] is None else cell[s]["return"] for s in sorted(cell)}

    def evaluations(self, method, env_id, x):
        """The mean returns of episodes that the last policy of a run plays, with sampled actions, {seed: return}."""
        cell = self.cells.get((method, env_id, x), {})
        means = {s: cell[s]["evaluation"]["sampled"] for s in sorted(cell) if "evaluation" in cell[s]}
        return {s: self.zero[env_id] for s in cell if cell[s]["return"] is None} | means

    def ends(self, method, env_id, x):
        """The returns of the last tenth of the steps, {seed: return}; equally long for those that fall early."""
        last = max(len(self.grid) // 10, 1)
        curves = self.curves(method, env_id, x)[1][:, -last:]
        return dict(zip(self.cells.get((method, env_id, x), {}), curves.mean(axis=1), strict=True))

    def scores(self, method, x, returns_of=None):
        """Normalised scores [seeds, environments] of the seeds that are complete; by default of `returns`."""
        columns = []
        for env_id in self.env_ids:
            returns, zero = (returns_of or self.returns)(method, env_id, x), self.zero[env_id]
            column = np.array([returns.get(seed, np.nan) for seed in self.seeds(method, x)], dtype=float)
            columns.append((column - zero) / (self.one[env_id] - zero))
        scores = np.stack(columns, axis=1)
        return scores[np.isfinite(scores).all(axis=1)]  # older records have no evaluation

    def curves(self, method, env_id, x):
        """The grid of steps and the curves of all seeds [seeds, stretches], from where all have begun.

        Where no episode ended, a curve joins its neighbours; after divergence it is at the untrained policy's return.
        """
        cell, places = self.cells.get((method, env_id, x), {}), np.arange(len(self.grid))
        curves = np.full((len(cell), len(places)), self.zero[env_id])
        for row, run in zip(curves, cell.values(), strict=True):
            values = np.array(run.get("returns", []), dtype=float)  # records of diverged runs may have none
            if (there := np.isfinite(values)).any():
                end = self.zero[env_id] if run["return"] is None else None
                row[:] = np.interp(places, places[there], values[there], left=np.nan, right=end)
        kept = np.isfinite(curves).all(axis=0)
        return self.grid[kept], curves[:, kept]

    def metric(self, method, x, name):
        """The mean of a metric over all runs of a method that have not diverged; NaN if it logs no such thing."""
        runs = [run for (m, _, k), cell in self.cells.items() if (m, k) == (method, x) for run in cell.values()]
        values = [run["metrics"][name] for run in runs if name in run["metrics"]]
        return float(np.mean(values)) if values else np.nan

    @cached_property
    def iqm(self):
        """{(method, x): (IQM of normalised scores, low, high)}."""
        places = [(method, x) for method in self.methods for x in self.xs]
        return {place: interval(self.scores(*place), metrics.aggregate_iqm, self.reps) for place in places}

    @cached_property
    def ours(self):
        """VACO, or the first of its variants that is there, with which others are compared; "" if there is none."""
        return next((method for method in self.methods if base_of(method) == "VACO"), "")

    @cached_property
    def improvement(self):
        """{(method, x): (probability that a run of VACO is better than one of the method, low, high)}."""
        others = [method for method in self.methods if method != self.ours] if self.ours else []
        pairs = {(method, x): (self.scores(self.ours, x), self.scores(method, x)) for method in others for x in self.xs}
        return {place: interval(pair, probability_of_improvement, self.reps) for place, pair in pairs.items()}

    def lead(self, ours, theirs, x, returns_of=None):
        """How far the IQM of one method's scores is above another's: (difference, low, high)."""
        pair = self.scores(ours, x, returns_of), self.scores(theirs, x, returns_of)
        return interval(pair, difference_of_iqm, self.reps)

    def widths(self, x):
        """Of methods that differ in the width of their trust region only: {family: [(total variation, IQM, its bounds,
        method), ...]}, from narrow to wide."""
        families = defaultdict(list)
        for method in self.methods:
            point = (self.metric(method, x, "lag/tv_total"), *self.iqm[method, x], method)
            if np.isfinite(point[:2]).all():
                families[WIDTH.sub("", method)].append(point)
        return {family: sorted(points) for family, points in families.items()}

    def at(self, x):
        return f"{self.x_name.replace('-', ' ')} {x:g}"

    def about(self, complete=False):
        """For captions: what was run, with how many seeds; `complete`: those that are there on all environments."""
        whole = [len(self.seeds(method, x)) for method in self.methods for x in self.xs]
        counts = [count for count in (whole if complete else map(len, self.cells.values())) if count] or [0]
        seeds = f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else f"{max(counts)}"
        lost = sum(run["return"] is None for cell in self.cells.values() for run in cell.values())
        lost = f" Runs without a return, counted as untrained: {lost}." if lost else ""
        lag = SCHEDULES[self.schedule] + (f"; k = {self.lag}" if self.lag is not None else "")
        lag = "lag 0: every batch by the newest policy" if self.lag == 0 and self.schedule != "async" else lag
        return f"{', '.join(self.env_ids)}; {self.steps:,} steps; {lag}; seeds: {seeds}.{lost}"


def probability_of_improvement(ours, theirs):
    """Of pairs of runs, the share in which ours is better, ties one half; mean over environments.

    rliable's metric of this name, without its test of significance, which takes minutes to bootstrap.
    """
    return np.mean((ours[:, None] > theirs) + 0.5 * (ours[:, None] == theirs))


def difference_of_iqm(ours, theirs):
    return metrics.aggregate_iqm(ours) - metrics.aggregate_iqm(theirs)


def interval(scores, statistic, reps):
    """A statistic of scores [seeds, environments], or of two such arrays, and its 95 % interval: (value, low, high)."""
    scores = scores if isinstance(scores, tuple) else (scores,)
    fewest = min(map(len, scores))
    value = statistic(*scores) if fewest else np.nan
    if fewest < FEWEST:
        return value, value * np.nan, value * np.nan
    np.random.seed(0)  # rliable draws from the global generator, and ignores its random_state
    data = {"": scores if len(scores) > 1 else scores[0]}
    _, bounds = rly.get_interval_estimates(data, lambda *drawn: np.atleast_1d(statistic(*drawn)), reps=reps)
    low, high = bounds[""]
    return (value, low, high) if np.ndim(value) else (float(value), float(low[0]), float(high[0]))


def base_of(method):
    """The name in LOOKS that a method begins with, before its flags; "" if there is none."""
    return next((name for name in LOOKS if method == name or method.startswith(f"{name} --")), "")


def style(methods):
    """{method: arguments of matplotlib's lines}; with flags after a name, ever paler tints of its colour."""
    styles, others, variants = {}, iter(OTHERS * len(methods)), Counter()
    for method in methods:
        base = base_of(method)
        color, marker, line = LOOKS[base] if base else next(others)
        if base and base != method:
            variants[base] += 1
            pale, marker = min(0.2 + 0.1 * variants[base], 0.7), "^vD<>ps8h"[variants[base] % 9]
            color, line = tuple(pale + (1 - pale) * np.array(to_rgb(color))), (0, (2 + variants[base], 1.5))
        styles[method] = {"color": color, "marker": marker, "linestyle": line, "zorder": 3 + (method == "VACO")}
        styles[method] |= (
            {"linewidth": 2.4, "markersize": 6} if method == "VACO" else {"linewidth": 1.3, "markersize": 5}
        )
    return styles


def clean(ax, title="", size=SIZE, **labels):
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#999999")
    ax.tick_params(labelsize=size, color="#999999", labelcolor=INK)
    ax.grid(axis="y", color="#E6E6E6", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.set_title(title, fontsize=size + 1, color=INK, loc="left")
    ax.set(**labels)
    for label in (ax.xaxis.label, ax.yaxis.label):
        label.set(fontsize=size, color=INK)


def panels(rows, columns, width, height, **options):
    return plt.subplots(rows, columns, figsize=(width, height), layout="constrained", squeeze=False, **options)


def caption(figure, text):
    lines = textwrap.fill(text, int(figure.get_figwidth() * 17))
    figure.supxlabel(lines, x=0.01, ha="left", fontsize=7.5, color="#555555", linespacing=1.4)


def label_ends(ax, ends, styles, size=SIZE):
    """Names at one x beyond the right ends of lines {method: (x, y)}, moved apart as little as possible."""
    ends = sorted(ends.items(), key=lambda item: item[1][1])
    low, high = ax.get_ylim()
    gap = 1.35 * size / 72 / (ax.figure.get_figheight() * ax.get_position().height)
    steps, heights = gap * np.arange(len(ends)), np.array([(y - low) / (high - low) for _, (_, y) in ends])
    places = isotonic_regression(heights - steps).x.clip(0, max(1 - gap * (len(ends) - 1), 0)) + steps if ends else []
    for (method, end), place in zip(ends, places, strict=True):
        text = {"fontsize": size, "color": INK, "fontweight": "bold" if method == "VACO" else "normal", "va": "center"}
        text["arrowprops"] = {"arrowstyle": "-", "color": styles[method]["color"], "lw": 0.9, "relpos": (0, 0.5)}
        ax.annotate(method, end, (1.07, place), textcoords="axes fraction", annotation_clip=False, **text)


def draw_dots(ax, points, styles, named=True, seeds=None):
    """One method a row: points {method: (value, low, high)}, hollow without interval; seeds {method: [value, ...]}."""
    for row, (method, (value, low, high)) in enumerate(points.items()):
        color, marker = styles[method]["color"], styles[method]["marker"]
        ax.plot([low, high], [row, row], color=color, linewidth=1.6)
        face = color if np.isfinite(low) else "white"
        ax.plot(value, row, marker, color=color, markerfacecolor=face, label=method, clip_on=False)
        if seeds:
            ax.plot(seeds[method], [row + 0.2] * len(seeds[method]), ".", markersize=3, color=color, alpha=0.6)
    ax.set_ylim(max(len(points), 1) - 0.5, -0.5)
    ax.set_yticks(range(len(points)), points if named else [""] * len(points))
    ax.tick_params(axis="y", length=0)


def draw_lines(ax, results, points, seeds=None):
    """One method a line over x: points {method: [(value, low, high), ...]}; seeds {method: [[value, ...], ...]}."""
    styles, ends = style(results.methods), {}
    if len(results.xs) == 1:
        seeds = {method: columns[0] for method, columns in (seeds or {}).items()}
        return draw_dots(ax, {method: line[0] for method, line in points.items()}, styles, seeds=seeds)
    for i, (method, line) in enumerate(points.items()):
        places = np.arange(len(results.xs)) + min(0.035, 0.3 / len(points)) * (i - (len(points) - 1) / 2)
        value, low, high = np.array(line, dtype=float).T
        look = {name: styles[method][name] for name in ("color", "linestyle", "linewidth", "zorder")}
        errors = np.maximum([value - low, high - value], 0)  # a percentile interval may leave out its own point
        ax.errorbar(places, value, errors, elinewidth=1, label=method, **look)
        for kept, face in ((np.isfinite(low), look["color"]), (np.isnan(low), "white")):
            ax.plot(places[kept], value[kept], **styles[method] | {"linestyle": "", "markerfacecolor": face})
        for place, column in zip(places, (seeds or {}).get(method, []), strict=False):
            ax.plot([place] * len(column), column, ".", markersize=2.5, color=look["color"], alpha=0.6, zorder=2)
        if (there := np.isfinite(value)).any():
            ends[method] = places[there][-1], value[there][-1]
    ax.set_xticks(range(len(results.xs)), [f"{x:g}" for x in results.xs])
    ax.set_xlabel("lag (versions)" if results.x_name == "lag" else results.x_name.replace("-", " "))
    ax.set_xlim(-0.35, len(results.xs) - 0.65)
    label_ends(ax, ends, styles)


def plot_main(results):
    """The first figure: return over all environments against lag, a few methods on the left, parts of VACO on the
    right. Of one lag only, a row per method, and the probability that VACO is better."""
    if len(results.xs) == 1:
        return plot_rows(results)
    styles = style(results.methods)
    methods = [method for method in results.methods if method not in PARTS or method == "VACO"]
    if len(methods) > 7:
        methods = [method for method in methods if method in HEADLINE]
    panels = {"methods": methods, "parts of VACO": [method for method in results.methods if method in PARTS]}
    if len(panels["parts of VACO"]) < 2:
        del panels["parts of VACO"]
    figure, axes = plt.subplots(1, len(panels), figsize=(9, 3.4), sharey=True, squeeze=False, layout="constrained")
    axes = axes[0]
    for ax, (title, names) in zip(axes, panels.items(), strict=True):
        ends = {}
        for method in names:
            value, low, high = np.array([results.iqm[method, x] for x in results.xs]).T
            ax.plot(value, label=method, clip_on=False, **styles[method])
            ax.fill_between(range(len(value)), low, high, color=styles[method]["color"], alpha=0.15, linewidth=0)
            there = np.flatnonzero(np.isfinite(value))
            if len(there):
                ends[method] = there[-1], value[there[-1]]
        ax.set_xticks(range(len(results.xs)), [f"{x:g}" for x in results.xs])
        ax.set_xlim(0, len(results.xs) - 1)
        labels = {"ylabel": "normalised return" * (ax is axes[0]), "xlabel": results.x_name.replace("-", " ")}
        clean(ax, title, size=11, **labels)
        label_ends(ax, ends, styles, size=11)
    return figure


def plot_rows(results):
    """Return over all environments at one lag, a row per method, and the probability that VACO is better."""
    figure, (ax, part) = plt.subplots(1, 2, figsize=(9, 1.5 + 0.3 * len(results.methods)), layout="constrained")
    (x,) = results.xs
    styles = style(results.methods)
    draw_dots(ax, {method: results.iqm[method, x] for method in results.methods}, styles)
    clean(ax, f"IQM of normalised return, {results.at(x)}")
    draw_dots(part, {method: results.improvement[method, x] for method, _ in results.improvement}, styles)
    part.axvline(0.5, color="#888888", linewidth=1, linestyle="--", zorder=1)
    clean(part, "probability that VACO is better", xlim=(-0.06, 1.06))
    text = f"Last 100 episodes; {results.about(complete=True)} Bars: 95 % intervals, from 3 seeds on (hollow: fewer)"
    caption(figure, f"{text}; from few seeds they are too narrow.")
    return figure


def plot_return(results):
    """Return against lag, each environment by itself: mean over seeds, and every seed."""
    figure, axes = panels(1, len(results.env_ids), 4.2 * len(results.env_ids), max(3.8, 1 + 0.3 * len(results.methods)))
    for ax, env_id in zip(axes[0], results.env_ids, strict=True):
        seeds = {m: [list(results.returns(m, env_id, x).values()) for x in results.xs] for m in results.methods}
        columns = {method: [np.reshape(part, (-1, 1)) for part in parts] for method, parts in seeds.items()}
        points = {m: [interval(part, np.mean, results.reps) for part in parts] for m, parts in columns.items()}
        draw_lines(ax, results, points, seeds)
        clean(ax, f"{env_id}: return")
    text = "Mean return of the last 100 episodes over seeds; small dots: each seed."
    caption(figure, f"{text} {results.about()} Bars: 95 % intervals; from few seeds they are too narrow.")
    return figure


def plot_curves(results):
    """Learning curves, mean over seeds, a row per environment and a column per lag; of one lag three panels a row."""
    shown, styles = list(itertools.product(results.env_ids, results.xs)), style(results.methods)
    columns = len(results.xs) if len(results.xs) > 1 else min(len(results.env_ids), 3)
    rows = math.ceil(len(shown) / columns)
    height = max(2.9, 0.6 + 0.19 * len(results.methods))
    figure, axes = panels(rows, columns, 4.2 * columns, height * rows, sharey="row" if len(results.xs) > 1 else False)
    ends = defaultdict(dict)
    for number, (ax, (env_id, x)) in enumerate(zip(axes.flat, shown, strict=False)):
        for k, method in enumerate(results.methods):
            grid, curves = results.curves(method, env_id, x)
            if curves.size:
                mean, low, high = interval(curves, lambda part: part.mean(axis=0), results.reps)
                look = styles[method] | {"markersize": 3.5, "linewidth": 0.7 * styles[method]["linewidth"]}
                ax.plot(grid / 1e3, mean, label=method, markevery=(k % 5, 5), **look)
                ax.fill_between(grid / 1e3, low, high, color=look["color"], alpha=0.1, linewidth=0)
                ends[ax][method] = grid[-1] / 1e3, mean[-1]
        lowest = number + columns >= len(shown)
        labels = {"ylabel": "return" * (number % columns == 0), "xlabel": "thousand steps" * lowest}
        clean(ax, f"{env_id}, {results.at(x)}", xlim=(0, results.steps / 1e3), **labels)
    for ax in axes.flat[len(shown) :]:
        ax.remove()
    for ax in axes.flat[: len(shown)]:  # when the last panel of a row has widened the axis that they share
        label_ends(ax, ends[ax], styles)
    text = "Return of the episodes that ended, mean over seeds; lines join where none did."
    caption(figure, f"{text} {results.about()} Shaded: 95 % intervals, from 3 seeds on; from few they are too narrow.")
    return figure


def plot_tv(results):
    """What the lag does to the data, and what the filter does about it: means over runs and environments."""
    names = {
        "lag/tv_backward": "TV on arrival, ½ mean |π_T/β - 1|",
        "lag/tv_total": "TV after the updates, ½ mean |π/β - 1|",
        "lag/ess": "effective sample size on arrival",
        "filter/dropped": "share of samples dropped",
    }
    figure, axes = panels(2, 2, 11, max(7, 0.6 * len(results.methods)))
    for ax, (name, title) in zip(axes.flat, names.items(), strict=True):
        values = {method: [results.metric(method, x, name) for x in results.xs] for method in results.methods}
        shown = {method: [(v, v, v) for v in line] for method, line in values.items() if np.isfinite(line).any()}
        ax.set_ylim(0, 1.05 * max((v for line in values.values() for v in line if v > 0), default=1))
        draw_lines(ax, results, shown)
        clean(ax, title)
    caption(figure, f"Means over runs and environments, without intervals. {results.about()}")
    return figure


def plot_width(results):
    """Return against how far the policy is from the data after a batch's updates: a line joins methods that differ in
    width only."""
    figure, axes = plt.subplots(1, len(results.xs), figsize=(9, 4.2), sharey=True, squeeze=False, layout="constrained")
    styles = style(list(dict.fromkeys(WIDTH.sub("", method) for method in results.methods)))
    for ax, x in zip(axes[0], results.xs, strict=True):
        ends = {}
        for family, points in results.widths(x).items():
            tv, value, low, high = np.array([point[:4] for point in points]).T
            ax.plot(tv, value, label=family, **styles[family])
            ax.vlines(tv, low, high, color=styles[family]["color"], linewidth=1)
            ends[family] = tv[-1], value[-1]
        ax.set_xscale("log")  # some are ten times as wide as others
        ax.set_xticks([0.03, 0.1, 0.3, 1], ["0.03", "0.1", "0.3", "1"])
        ax.minorticks_off()
        clean(ax, results.at(x), size=9, ylabel="normalised return" * (ax is axes[0, 0]))
        ax.set_xlabel("total variation after the updates", fontsize=9)
        label_ends(ax, ends, styles)
    text = "IQM of normalised return, 95 % intervals, against the total variation between a batch's data and the policy"
    caption(figure, f"{text} after its updates (means over all runs). {results.about(complete=True)}")
    return figure


def markdown(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def cell(value, low, high, count):
    """ "0.51 [0.42, 0.63] (5)": a number with its interval, if there is one, and how many seeds it is from."""
    bounds = f" [{low:.2f}, {high:.2f}]" if np.isfinite(low) else ""
    return f"{value:.2f}{bounds} ({count})" if np.isfinite(value) else ""


def digits(value, *more):
    """Returns for people, joined by ±: whole numbers if the first one has three digits, else with more places."""
    places = ".0f" if abs(value) >= 100 else ".4g"
    return " ± ".join(f"{number:{places}}" for number in (value, *more))


def spread(values):
    """ "1050 ± 120 (5)": mean, standard deviation, and how many seeds they are from."""
    deviation = [np.std(values, ddof=1)] if len(values) > 1 else []
    return f"{digits(np.mean(values), *deviation)} ({len(values)})" if values else ""


def programs(results):
    """Which programs the runs are of: where a script has changed, its runs may differ by rounding."""
    runs = [(method, run) for (method, *_), part in results.cells.items() for run in part.values()]
    kinds = [(m, f"{r['command'][0]} {r['script']}" if "script" in r else f"commit {r['commit']}") for m, r in runs]
    counts = ", ".join(f"{program} ({count})" for program, count in sorted(Counter(p for _, p in kinds).items()))
    mixed = [method for method in results.methods if len({program for m, program in kinds if m == method}) > 1]
    text = f"Programs, and how many runs: {counts}. Commits: {', '.join(sorted({run['commit'] for _, run in runs}))}."
    warning = f" Methods with runs of several programs: {', '.join(mixed)}." if mixed else ""
    return f"{text}{warning} A run is reproduced exactly by its own commit."


def verdict(leads):
    """Whether VACO is ahead of another method: by training and by the last policy, else it is open (PROTOCOL.md)."""
    if all(low > 0 for _, low, _ in leads):
        return "ahead"
    if all(high < 0 for *_, high in leads):
        return "behind"
    return "open"


def equal_widths(results, x):
    """Part A of PROTOCOL.md, a list of Markdown tables: each rival, at the width nearest to VACO's, beside VACO at each
    of its budgets, and what follows for the claim. Empty unless VACO has several budgets."""
    families = results.widths(x)
    budgets = families.get("VACO", [])
    if len(budgets) < 2:
        return []
    rows, answers = [], []
    for family in [family for family in RIVALS if family in families]:
        points, found = families[family], []
        for tv, *_, ours in budgets:
            width, *_, theirs = min(points, key=lambda point, tv=tv: abs(point[0] - tv))
            leads = [results.lead(ours, theirs, x, returns_of) for returns_of in (results.returns, results.evaluations)]
            comparable = abs(width - tv) <= tv / 4
            line = np.interp(tv, *np.array([point[:2] for point in points]).T, left=np.nan, right=np.nan)
            count = f"{len(results.seeds(ours, x))}, {len(results.seeds(theirs, x))}"
            rows.append([theirs, ours, f"{width:.3f}, {tv:.3f}", "yes" if comparable else "no", verdict(leads)])
            rows[-1] += [cell(*lead, count) for lead in leads] + [f"{line:.2f}" if np.isfinite(line) else ""]
            found.append((verdict(leads), comparable))
        judged = {word for word, comparable in found if comparable}
        answer = "open"
        if not judged:
            answer = "comparable nowhere, says nothing"
        elif "behind" in judged:
            answer = "refuted"
        elif judged == {"ahead"}:
            answer = "shown"
        if family == "stop by TV" and not any(word == "ahead" for word, _ in found):
            answer += "; the filter is a mere gate"
        answers.append([family, answer])
    header = ["the other", "VACO", "their widths", "comparable", "VACO is", "VACO's lead", "by the last policy"]
    text = f"{results.at(x).capitalize()}, each rival at the width nearest to VACO's**: how far VACO's IQM is above the"
    text += " other's, by training, and by episodes of the last policy (seeds). The other's line is its IQM at VACO's"
    text += " width, read off the line through its widths"
    lines = markdown([*header, "the other's line"], rows)
    claim = markdown(["the other", "the claim is"], answers)
    return [f"**{text}\n\n{lines}", f"**What follows for the claim at {results.at(x)}**\n\n{claim}"]


def tables(results):
    """All tables, as markdown: IQM, returns per environment, probability of improvement, metrics."""
    methods, xs = results.methods, results.xs
    header, parts = ["", *map(results.at, xs)], [f"{results.about()} In parentheses: seeds."]
    if results.raw:
        parts.append(f"NOT NORMALISED, only shifted, as no method is better than untrained: {', '.join(results.raw)}.")
    lost = [
        [m, e, f"{x:g}", s]
        for (m, e, x), part in results.cells.items()
        for s, run in part.items()
        if run["return"] is None
    ]
    if lost:
        names = "; ".join(", ".join(map(str, key)) for key in lost)
        keys = f"(method, environment, {results.x_name}, seed)"
        parts.append(f"Without a return (diverged, or no episode ended), counted as untrained: {names} {keys}.")

    def add(heading, row, shown=methods):
        rows = [[method, *(row(method, x) for x in xs)] for method in shown]
        if rows := [row for row in rows if any(row[1:])]:
            parts.append(f"**{heading}\n\n{markdown(header, rows)}")

    text = "IQM of normalised scores** of the last 100 episodes, 95 % stratified bootstrap intervals"
    add(f"{text}; from few seeds they are too narrow", lambda m, x: cell(*results.iqm[m, x], len(results.seeds(m, x))))
    places = {place: results.scores(*place, results.ends) for place in results.iqm}
    tail = {place: interval(scores, metrics.aggregate_iqm, results.reps) for place, scores in places.items()}
    text = "The same, of the episodes in the last tenth of the steps**: as many steps of those that fall early"
    add(text, lambda m, x: cell(*tail[m, x], len(results.seeds(m, x))))
    if any("evaluation" in run for part in results.cells.values() for run in part.values()):
        places = {place: results.scores(*place, results.evaluations) for place in results.iqm}
        last = {place: interval(scores, metrics.aggregate_iqm, results.reps) for place, scores in places.items()}
        text = "The same, of 10 episodes that the last policy of each run plays** with sampled actions"
        add(text, lambda m, x: cell(*last[m, x], len(results.seeds(m, x))))
    for env_id in results.env_ids:
        text = f"{env_id}**, return of the last 100 episodes: mean ± standard deviation (seeds); normalised score 0 is"
        text += f" {digits(results.zero[env_id])} (untrained), 1 is {digits(results.one[env_id])} ({results.unit})"
        add(text, lambda m, x, env_id=env_id: spread(list(results.returns(m, env_id, x).values())))
    if any(xs):
        parts.append("Returns are those of the policies that acted, which are older than the newest by up to the lag.")
    flags = {m: " ".join(map(str, r["command"])) for (m, *_), part in results.cells.items() for r in part.values()}
    for method in (method for method in methods if method.startswith("IMPALA")):
        own = re.sub(r"\S+\.py |--(env-id|seed|total-timesteps|lag-schedule|lag) \S+ ", "", flags[method])
        parts.append(f"{method}: minibatches of whole sequences, advantages not normalised, flags `{own}`.")
    if results.steps == 1_000_000 and results.lag == 0:
        rows = []
        for env_id in [env_id for env_id in PUBLISHED if env_id in results.env_ids]:
            ours = [spread(list(results.returns(method, env_id, xs[0]).values())) for method in methods]
            rows.append([env_id, *ours, *PUBLISHED[env_id]])
        table = markdown(["", *methods, "CleanRL's PPO, v4", "tianshou's PPO, v3"], rows)
        text = "**Beside published returns of PPO**: mean ± standard deviation (seeds)"
        parts += [f"{text}\n\n{table}"] if rows else []
    if results.improvement:
        count = {(m, x): len(results.seeds(m, x)) for m in methods for x in xs}
        ours = results.ours
        text = f"Probability that a run of {ours} is better than one of** (seeds of VACO, of the other)"
        others = [method for method in methods if method != ours]
        add(text, lambda m, x: cell(*results.improvement[m, x], f"{count[ours, x]}, {count[m, x]}"), others)
        text = f"IQM of {ours}'s normalised scores less that of** (seeds of VACO, of the other)"
        lead = partial(results.lead, ours)
        add(text, lambda m, x: cell(*lead(m, x), f"{count[ours, x]}, {count[m, x]}"), others)
        last_lead = partial(results.lead, ours, returns_of=results.evaluations)
        text = "The same, of 10 episodes that the last policy of each run plays** with sampled actions"
        add(text, lambda m, x: cell(*last_lead(m, x), f"{count[ours, x]}, {count[m, x]}"), others)
    for x in xs:
        parts += equal_widths(results, x)
    for name in ("lag/tv_backward", "lag/tv_forward", "lag/tv_total", "lag/ess", "filter/dropped", "filter/gate_open"):
        row = {(m, x): results.metric(m, x, name) for m in methods for x in xs}
        text = f"{name}**, mean over the runs of all environments"
        add(text, lambda m, x, row=row: f"{row[m, x]:.3f}" if np.isfinite(row[m, x]) else "")
    return "\n\n".join([*parts, programs(results)]) + "\n"


def main(args):
    results = Results(args)
    out = args.out or args.results[0].with_suffix("")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_name(f"{out.name}.md").write_text(tables(results))
    plots = {"main": plot_main, "return": plot_return, "curves": plot_curves, "tv": plot_tv, "width": plot_width}
    for name in args.figures:
        figure = plots[name](results)
        figure.savefig(out.with_name(f"{out.name}_{name}.png"), dpi=150)
        plt.close(figure)
    print(f"wrote {out}.md and {', '.join(f'{out.name}_{name}.png' for name in args.figures)}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error, file=sys.stderr)
            error.code = 2
        raise
