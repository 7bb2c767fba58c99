"""Figures and markdown tables from the results of benchmark/run.py.

    python benchmark/plot.py benchmark/results/mujoco_lag.jsonl

writes beside the results, with their name: .md with all tables, and figures: _return (return against lag), _curves
(learning curves), _improvement (probability that VACO is better), _profile (performance profiles), _tv (total variation
and dropped share against lag).

Scores are normalised per environment: 0 is the policy before training (the method "untrained"), 1 the best mean over
seeds that any method reached at the smallest lag. A diverged run, which has no return, counts as 0. IQM is the
interquartile mean over all runs of all environments, intervals are 95 % stratified bootstrap intervals: both are
rliable's (arXiv 2108.13264).
"""

import itertools
import json
import warnings
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import tyro

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from rliable import library as rly
    from rliable import metrics
warnings.filterwarnings("ignore", message="random_state is deprecated", category=FutureWarning)  # in rliable's calls

# Okabe and Ito's colours, which colour-blind readers can tell apart; with markers and line styles, for print in grey
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31", "#7F7F7F"]
MARKERS, LINES = "osD^vP*X<>", ["-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (7, 3)), "-"]


@dataclass
class Args:
    results: tyro.conf.Positional[tuple[Path, ...]]  # files of benchmark/run.py; several are put together
    out: Path | None = None  # where to write, with a name to begin with; None: beside the first file, with its name
    methods: tuple[str, ...] = ()  # methods to show, in this order; none: all
    reps: int = 2000  # bootstrap samples


class Results:
    """The runs of some files: by method, environment, lag and seed.

    Raises SystemExit if runs are mixed that are no one study, or if there is no "untrained" to normalise by.
    """

    def __init__(self, paths, shown=()):
        self.runs, lengths, schedules = {}, set(), set()
        for line in itertools.chain(*(path.read_text().splitlines() for path in paths)):
            run = json.loads(line)
            key = run["method"], run["env_id"], run["lag"], run["seed"]
            if key in self.runs and self.runs[key]["command"] != run["command"]:
                raise SystemExit(f"error: two different runs are {', '.join(map(str, key))}: give results of one study")
            self.runs[key] = run
            lengths.add(run["steps"])
            schedules.add(run["lag_schedule"])
        if len(lengths) != 1 or len(schedules) != 1:
            kinds = f"{', '.join(sorted(schedules))}, of {', '.join(map(str, sorted(lengths)))} steps"
            raise SystemExit(f"error: runs are no one study, but {kinds}: give files of one kind")
        (self.steps,) = lengths
        self.env_ids = list(dict.fromkeys(env_id for _, env_id, *_ in self.runs))
        self.lags = sorted({lag for *_, lag, _ in self.runs})
        known = list(dict.fromkeys(method for method, *_ in self.runs if method != "untrained"))
        self.methods = [method for method in shown or known if method in known]
        unknown = [method for method in shown if method not in known]
        if unknown:
            raise SystemExit(f"error: --methods {unknown[0]}: not in the results, which have {', '.join(known)}")
        self.zero, self.one, self.raw = {}, {}, []  # raw: environments whose scores cannot be normalised
        for env_id in self.env_ids:
            untrained = [run["return"] for (m, e, *_), run in self.runs.items() if m == "untrained" and e == env_id]
            if not untrained:
                raise SystemExit(f'error: no run of the method "untrained" on {env_id}: scores cannot be normalised')
            self.zero[env_id] = np.mean(untrained)
        most = max((len(self.seeds(method, min(self.lags))) for method in known), default=0)
        for env_id in self.env_ids:
            columns = [self.returns(method, env_id, min(self.lags)) for method in known]
            self.one[env_id] = max(
                (np.mean(scores) for scores in columns if len(scores) >= max(most, 1)), default=np.nan
            )
            if not self.one[env_id] > self.zero[env_id]:  # very short runs
                self.one[env_id] = self.zero[env_id] + 1
                self.raw.append(env_id)

    def seeds(self, method, lag, env_ids=None):
        """The seeds that a method has at a lag on all environments."""
        sets = [
            {s for m, e, k, s in self.runs if (m, e, k) == (method, env_id, lag)} for env_id in env_ids or self.env_ids
        ]
        return sorted(set.intersection(*sets))

    def returns(self, method, env_id, lag):
        """The returns of the last 100 episodes, one per seed; of the untrained policy where a run diverged."""
        runs = [self.runs[method, env_id, lag, seed] for seed in self.seeds(method, lag, [env_id])]
        return [self.zero[env_id] if run["return"] is None else run["return"] for run in runs]

    def normalise(self, values, env_id):
        return (np.asarray(values, dtype=float) - self.zero[env_id]) / (self.one[env_id] - self.zero[env_id])

    def scores(self, method, lag, env_ids=None):
        """Normalised scores [seeds, environments] of the seeds that are complete."""
        env_ids = env_ids or self.env_ids
        seeds, columns = self.seeds(method, lag, env_ids), []
        for env_id in env_ids:
            column = dict(zip(self.seeds(method, lag, [env_id]), self.returns(method, env_id, lag), strict=True))
            columns.append(self.normalise([column[seed] for seed in seeds], env_id))
        return np.stack(columns, axis=1)

    def metric(self, method, lag, name):
        """The mean of a metric over all runs of a method at a lag; None if it logs no such thing."""
        runs = [run for (m, _, k, _), run in self.runs.items() if (m, k) == (method, lag)]
        values = [run["metrics"][name] for run in runs if name in run["metrics"]]
        return float(np.mean(values)) if values else None

    def seed_counts(self):
        """For captions: how many seeds the methods have, "5 seeds (3: PPO-KL)"."""
        by_count = defaultdict(list)
        for method in self.methods:
            by_count[min(len(self.seeds(method, lag)) for lag in self.lags)].append(method)
        most = max(by_count, key=lambda count: len(by_count[count]))
        others = [f"{count}: {', '.join(names)}" for count, names in sorted(by_count.items()) if count != most]
        return f"{most} {'seed' if most == 1 else 'seeds'}" + (f" ({'; '.join(others)})" if others else "")


def interval(scores, statistic, reps):
    """A statistic of scores [seeds, environments] with its 95 % interval: (value, low, high)."""
    if len(scores) == 0:
        return np.nan, np.nan, np.nan
    if len(scores) == 1:  # nothing to draw from
        return statistic(scores), np.nan, np.nan
    random_state = np.random.RandomState(0)
    values, intervals = rly.get_interval_estimates(
        {"": scores}, lambda x: np.array([statistic(x)]), reps=reps, random_state=random_state
    )
    return values[""][0], *intervals[""][:, 0]


def style(methods):
    return {
        method: {
            "color": COLOURS[i % len(COLOURS)],
            "marker": MARKERS[i % len(MARKERS)],
            "linestyle": LINES[i % len(LINES)],
        }
        for i, method in enumerate(methods)
    }


def label_ends(axes, ends, styles):
    """Names at the right ends of lines {method: (x, y)}, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    gap, floor = 0.052 * (high - low), -np.inf
    for method, (x, y) in sorted(ends.items(), key=lambda end: end[1][1]):
        floor = max(y, floor + gap)
        text = {"xytext": (x + 0.06 * np.ptp(axes.get_xlim()), floor), "va": "center", "fontsize": 7}
        line = {"arrowstyle": "-", "color": styles[method]["color"], "linewidth": 0.5}
        axes.annotate(method, (x, y), color=styles[method]["color"], arrowprops=line, annotation_clip=False, **text)


def panels(number, width=3.4, height=3.2):
    """A row of axes, without frame lines at the top and the right."""
    figure, axes = plt.subplots(1, number, figsize=(width * number, height), layout="constrained", squeeze=False)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes[0]


def plot_return(results, args):
    """Return against lag: all environments together (IQM), and each by itself (mean)."""
    figure, axes = panels(1 + len(results.env_ids), width=3.3)
    styles = style(results.methods)
    places = range(len(results.lags))
    for ax, env_id in zip(axes, [None, *results.env_ids], strict=True):
        ends = {}
        for i, method in enumerate(results.methods):
            shift = 0.03 * (i - (len(results.methods) - 1) / 2)
            if env_id is None:
                scores = [results.scores(method, lag) for lag in results.lags]
                points = np.array([interval(part, metrics.aggregate_iqm, args.reps) for part in scores])
            else:
                columns = [np.array(results.returns(method, env_id, lag))[:, None] for lag in results.lags]
                points = np.array([interval(part, np.mean, args.reps) for part in columns])
            value, low, high = points.T
            errors = np.nan_to_num([value - low, high - value])
            ax.errorbar([p + shift for p in places], value, errors, markersize=4, linewidth=1, **styles[method])
            ends[method] = (len(results.lags) - 1 + shift, value[-1])
        ax.set_xticks(list(places), results.lags)
        ax.set_xlabel("lag (versions)")
        ax.set_title("all: IQM of normalised scores" if env_id is None else env_id, fontsize=9)
        ends = {method: end for method, end in ends.items() if np.isfinite(end[1])}
        label_ends(ax, ends, styles)
    figure.suptitle(
        f"Return of the last 100 episodes after {results.steps:,} steps; {results.seed_counts()}; bars: 95 % intervals",
        fontsize=9,
    )
    return figure


def plot_curves(results, args):
    """Learning curves, mean over seeds, one row per environment and one column per lag."""
    shape = len(results.env_ids), len(results.lags)
    figure, axes = plt.subplots(
        *shape, figsize=(3.4 * shape[1], 2.6 * shape[0]), layout="constrained", squeeze=False, sharex=True, sharey="row"
    )
    styles = style(results.methods)
    for (i, env_id), (j, lag) in itertools.product(enumerate(results.env_ids), enumerate(results.lags)):
        ax, ends = axes[i, j], {}
        ax.spines[["top", "right"]].set_visible(False)
        for method in results.methods:
            runs = [results.runs[method, env_id, lag, seed] for seed in results.seeds(method, lag, [env_id])]
            runs = [run for run in runs if run["return"] is not None]
            curves = np.array([run["returns"] for run in runs], dtype=float)  # [seeds, stretches], NaN: no episode
            kept = np.isfinite(curves).all(axis=0)
            if not runs or not kept.any():
                continue
            grid, mean = np.array(runs[0]["grid"])[kept] / 1e3, curves[:, kept].mean(axis=0)
            looks = {name: value for name, value in styles[method].items() if name != "marker"}
            ax.plot(grid, mean, linewidth=1.2, **looks)
            ends[method] = (grid[-1], mean[-1])
        if j == shape[1] - 1:
            label_ends(ax, ends, styles)
        ax.set_title(f"{env_id}, lag {lag}", fontsize=9)
    for ax in axes[-1]:
        ax.set_xlabel("thousand steps")
    figure.suptitle(f"Episodic return, mean over seeds; {results.seed_counts()}", fontsize=9)
    return figure


def improvements(results, args):
    """{(lag, other method): (probability that VACO's run is better, low, high)}, where both have two seeds or more."""
    found = {}
    for lag, other in itertools.product(results.lags, results.methods):
        ours, theirs = results.scores("VACO", lag), results.scores(other, lag)
        if other != "VACO" and min(len(ours), len(theirs)) >= 2:
            values, intervals = rly.get_interval_estimates(
                {"": (ours, theirs)},
                metrics.probability_of_improvement,
                reps=args.reps,
                random_state=np.random.RandomState(0),
            )
            found[lag, other] = float(values[""]), *map(float, np.ravel(intervals[""]))
    return found


def plot_improvement(results, args):
    """The probability that a run of VACO is better than one of each other method, per lag."""
    found = improvements(results, args)
    others = [method for method in results.methods if method != "VACO"]
    figure, axes = panels(len(results.lags), width=3.2, height=0.6 + 0.32 * max(len(others), 3))
    for ax, lag in zip(axes, results.lags, strict=True):
        for i, other in enumerate(others):
            if (lag, other) in found:
                value, low, high = found[lag, other]
                ax.errorbar(value, i, xerr=[[value - low], [high - value]], color="#0072B2", marker="o", capsize=2)
        ax.axvline(0.5, color="grey", linewidth=0.8, linestyle=":")
        ax.set(xlim=(0, 1), ylim=(len(others) - 0.5, -0.5))
        ax.set_yticks(range(len(others)), others if ax is axes[0] else [""] * len(others), fontsize=8)
        ax.set_title(f"lag {lag}", fontsize=9)
        ax.set_xlabel("P(VACO > method)")
    figure.suptitle(f"Probability of improvement; {results.seed_counts()}; bars: 95 % intervals", fontsize=9)
    return figure


def plot_profile(results, args):
    """Performance profiles: the share of runs above a normalised score, per lag."""
    figure, axes = panels(len(results.lags))
    styles, taus = style(results.methods), np.linspace(-0.1, 1.3, 71)
    for ax, lag in zip(axes, results.lags, strict=True):
        scores = {m: part for m in results.methods if len(part := results.scores(m, lag)) >= 2}
        if not scores:
            continue
        np.random.seed(0)  # rliable draws from the global generator here
        shares, bands = rly.create_performance_profile(scores, taus, reps=min(args.reps, 500))
        for method, share in shares.items():
            looks = {name: value for name, value in styles[method].items() if name != "marker"}
            ax.plot(taus, share, linewidth=1.2, label=method, **looks)
            ax.fill_between(taus, *bands[method], color=styles[method]["color"], alpha=0.08, linewidth=0)
        ax.set_title(f"lag {lag}", fontsize=9)
        ax.set_xlabel("normalised score τ")
    axes[0].set_ylabel("share of runs above τ")
    axes[0].legend(fontsize=6, frameon=False)
    figure.suptitle(f"Performance profiles; {results.seed_counts()}; bands: 95 % intervals", fontsize=9)
    return figure


def plot_tv(results, args):
    """What the lag does to the data, and what the filter does about it: means over runs and environments."""
    names = {
        "lag/tv_backward": "TV on arrival, ½ mean |π_T/β - 1|",
        "lag/tv_total": "TV after the updates, ½ mean |π/β - 1|",
        "lag/ess": "effective sample size on arrival",
        "filter/dropped": "share of samples dropped",
    }
    figure, axes = panels(len(names), width=3.3)
    styles = style(results.methods)
    for ax, (name, title) in zip(axes, names.items(), strict=True):
        ends = {}
        for method in results.methods:
            values = [results.metric(method, lag, name) for lag in results.lags]
            if None not in values:
                ax.plot(range(len(results.lags)), values, markersize=4, linewidth=1, **styles[method])
                ends[method] = (len(results.lags) - 1, values[-1])
        ax.set_xticks(range(len(results.lags)), results.lags)
        ax.set_xlabel("lag (versions)")
        ax.set_title(title, fontsize=9)
        label_ends(ax, ends, styles)
    figure.suptitle(f"Means over the whole runs of all environments; {results.seed_counts()}", fontsize=9)
    return figure


def markdown(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def tables(results, args):
    """All tables, as markdown: IQM, returns per environment, probability of improvement, metrics."""
    commits = ", ".join(sorted({run["commit"] for run in results.runs.values()}))
    parts = [f"Runs of {results.steps:,} steps; {results.seed_counts()}; lag in versions; commits {commits}."]
    if results.raw:
        nothing = f"no method is better than untrained at lag {min(results.lags)}"
        parts.append(f"NOT NORMALISED, only shifted, because {nothing}: {', '.join(results.raw)}.")
    diverged = [f"{', '.join(map(str, key))}" for key, run in results.runs.items() if run["return"] is None]
    if diverged:
        parts.append(f"Diverged, counted as untrained: {'; '.join(diverged)} (method, environment, lag, seed).")

    def cell(values, form="{:.2f}"):
        value, low, high = (form.format(v) for v in values)
        return f"{value} [{low}, {high}]" if "nan" not in (value, low) else value.replace("nan", "")

    def spread(column):
        if len(column) < 2:
            return f"{column[0]:.0f} (1)" if column else ""
        return f"{np.mean(column):.0f} ± {np.std(column, ddof=1):.0f} ({len(column)})"

    header = ["", *(f"lag {lag}" for lag in results.lags)]
    rows = [
        [
            method,
            *(cell(interval(results.scores(method, lag), metrics.aggregate_iqm, args.reps)) for lag in results.lags),
        ]
        for method in results.methods
    ]
    parts.append(f"**IQM of normalised scores**, 95 % stratified bootstrap intervals\n\n{markdown(header, rows)}")
    for env_id in results.env_ids:
        rows = []
        for method in results.methods:
            columns = [results.returns(method, env_id, lag) for lag in results.lags]
            rows.append([method, *map(spread, columns)])
        zero, one = results.zero[env_id], results.one[env_id]
        title = f"**{env_id}**, return of the last 100 episodes: mean ± standard deviation (seeds); normalised score"
        parts.append(f"{title} 0 is {zero:.0f}, 1 is {one:.0f}\n\n{markdown(header, rows)}")
    if "VACO" in results.methods:
        found, nothing = improvements(results, args), (np.nan,) * 3
        rows = [
            [method, *(cell(found.get((lag, method), nothing)) for lag in results.lags)]
            for method in results.methods
            if method != "VACO"
        ]
        parts.append(f"**Probability that a run of VACO is better than one of**\n\n{markdown(header, rows)}")
    for name in ("lag/tv_backward", "lag/tv_forward", "lag/tv_total", "lag/ess", "filter/dropped", "filter/gate_open"):
        rows = [[m, *(results.metric(m, lag, name) for lag in results.lags)] for m in results.methods]
        rows = [[m, *(f"{value:.3f}" for value in row)] for m, *row in rows if None not in row]
        if rows:
            parts.append(f"**{name}**, mean over the runs of all environments\n\n{markdown(header, rows)}")
    return "\n\n".join(parts) + "\n"


def main(args):
    results = Results(args.results, args.methods)
    out = args.out or args.results[0].with_suffix("")
    out.with_name(f"{out.name}.md").write_text(tables(results, args))
    plots = {"return": plot_return, "curves": plot_curves, "profile": plot_profile, "tv": plot_tv}
    if "VACO" in results.methods:
        plots["improvement"] = plot_improvement
    for name, plot in plots.items():
        figure = plot(results, args)
        figure.savefig(out.with_name(f"{out.name}_{name}.png"), dpi=130)
        plt.close(figure)
    print(f"wrote {out}.md and {', '.join(f'{out.name}_{name}.png' for name in plots)}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
