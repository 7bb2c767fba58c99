"""A table and a figure from the results that benchmark/run.py has of language models.

    python benchmark/plot_llm.py benchmark/results/llm_lag.jsonl

writes beside the results, with their name, .md with tables and .png with held-out accuracy over batches.
"""

import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from plot import clean, markdown, plt, style
from run import read_records

RATE = re.compile(r" --learning-rate (\S+)")


@dataclass
class Args:
    results: tyro.conf.Positional[Path]  # a file of benchmark/run.py


def last(group):
    """The held-out accuracy at the end of each run, in %."""
    return 100 * np.array([record["accuracy"][-1][1] for record in group])


def groups_of(records):
    """{(method, lag): its runs}."""
    groups = defaultdict(list)
    for record in records:
        groups[record["method"], record["lag"]].append(record)
    return groups


def at_best_rates(records):
    """{(method without its learning rate, lag): its runs at the rate with the highest accuracy at the end}. They are of
    the seeds that all its rates have."""
    rates = defaultdict(list)
    for (method, lag), group in groups_of(records).items():
        rates[RATE.sub("", method), lag].append(group)
    best = {}
    for place, groups in rates.items():
        seeds = set.intersection(*({record["seed"] for record in group} for group in groups))
        equal = [[record for record in group if record["seed"] in seeds] for group in groups]
        if seeds:
            best[place] = max(equal, key=lambda group: last(group).mean())
    return best


def table(records):
    """Markdown: held-out accuracy before and after, per method and lag, over seeds."""
    columns = ["method", "lag", "seeds", "before", "after", "mean of the run", "reward", "TV on arrival", "TV added"]
    rows = []
    for (method, lag), group in groups_of(records).items():
        curves = 100 * np.array([[value for _, value in record["accuracy"]] for record in group])
        tags = ("charts/reward", "lag/tv_backward", "lag/tv_forward", "filter/gate_open", "filter/dropped")
        means = {tag: np.mean([record["metrics"].get(tag, np.nan) for record in group]) for tag in tags}
        reward, arrival, added, over, dropped = means.values()
        # The gate is the filter's; with clipped ratios it only says that the default budget was exceeded
        over = f"{over:.0%}" if method.startswith("GRPO, filter") else ""
        before, mean = (f"{part.mean():.1f}" for part in (curves[:, 0], curves[:, 1:]))
        row = [method, lag, len(group), before, spread(curves[:, -1]), mean]
        rows.append([*row, f"{reward:.3f}", f"{arrival:.3f}", f"{added:.3f}", over, f"{dropped:.0%}"])
    return markdown([*columns, "over budget", "dropped"], rows)


def verdicts(records):
    """Markdown: each method at its best learning rate, and how far the filter is ahead of it, by llm_lag.sh's rule."""
    best = at_best_rates(records)
    rows = []
    for (method, lag), group in best.items():
        rate = RATE.search(group[0]["method"])
        row = [method, lag, len(group), rate[1] if rate else "", spread(last(group)), "", ""]
        filtered = best.get(("GRPO, filter", lag), [])
        if filtered is not group and min(len(filtered), len(group)) > 1:
            lead = last(filtered).mean() - last(group).mean()
            error = sum(last(part).var(ddof=1) / len(part) for part in (filtered, group)) ** 0.5
            row[5] = f"{lead:+.1f} ± {error:.1f}"
            row[6] = "open"
            if lead > 2 * error:
                row[6] = "ahead"
            if lead <= 0:
                row[6] = "not ahead"
        rows.append(row)
    header = ["method", "lag", "seeds", "its best rate", "after", "the filter's lead ± standard error", "the filter is"]
    return markdown(header, sorted(rows, key=lambda row: row[1]))


def spread(values):
    """ "61.3 ± 4.2": mean, and standard deviation from three values on."""
    deviation = f" ± {values.std(ddof=1):.1f}" if len(values) > 2 else ""
    return f"{values.mean():.1f}{deviation}"


def page(records):
    """All tables, with what they show."""
    text = "Accuracy is of held-out problems, greedy, in %; ± of accuracies is the standard deviation over seeds."
    text += (
        " Reward, of sampled completions, and what follows are means over the batches that have the whole lag. Commits:"
    )
    text += f" {', '.join(sorted({record['commit'] for record in records}))}."
    parts = [table(records), text]
    if any(record["method"].startswith("GRPO, filter --learning-rate") for record in records):
        parts.insert(0, verdicts(records))
    return "\n\n".join(parts) + "\n"


def draw(records, path):
    """Accuracy over batches, a panel per lag, each method at its best learning rate; thin: a seed, thick: the mean."""
    best = at_best_rates(records)
    methods = list(dict.fromkeys(method for method, _ in best))
    lags = list(dict.fromkeys(lag for _, lag in best))
    styles = style(methods)
    size = (max(6, 4 * len(lags)), 3.6 + 0.2 * len(methods))
    figure, panels = plt.subplots(1, len(lags), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for panel, lag in zip(panels[0], lags, strict=True):
        for method in methods:
            group = best.get((method, lag), [])
            for record in group:
                panel.plot(
                    *zip(*record["accuracy"], strict=True), color=styles[method]["color"], alpha=0.25, linewidth=1
                )
            if group:
                steps = [step for step, _ in group[0]["accuracy"]]
                mean = np.mean([[value for _, value in record["accuracy"]] for record in group], axis=0)
                panel.plot(steps, mean, **styles[method], label=f"{method} ({len(group)})")
        clean(panel, f"lag {lag}", xlabel="batches", ylabel="held-out accuracy, greedy" * (panel is panels[0][0]))
    names = {}  # which are too long to stand at the curves
    for panel in panels[0]:
        names |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    title = "thin: a seed, thick: the mean; in parentheses: seeds"
    figure.legend(
        names.values(), names, loc="outside lower left", fontsize=8, title=title, title_fontsize=8, handlelength=4
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def read(path):
    """The runs of a file, method by method, in the order of the study. After divergence a run's accuracy is 0."""
    records = [record for record in read_records(path) if "accuracy" in record]
    steps = max(([step for step, _ in record["accuracy"]] for record in records), key=len, default=[])
    for record in records:
        record["accuracy"] += [(step, 0.0) for step in steps[len(record["accuracy"]) :]]
    methods = list(dict.fromkeys(record["method"] for record in records))
    return sorted(records, key=lambda record: (methods.index(record["method"]), record["lag"], record["seed"]))


def main(args):
    records = read(args.results)
    if not records:
        print(f"error: {args.results}: has no finished runs of language models", file=sys.stderr)
        sys.exit(2)
    args.results.with_suffix(".md").write_text(page(records))
    draw(records, args.results.with_suffix(".png"))
    print(page(records), end="")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
