"""A table and a figure from the results that benchmark/run.py has of language models.

    python benchmark/plot_llm.py benchmark/results/llm_lag.jsonl

writes beside the results, with their name, .md with the table and .png with held-out accuracy over batches.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from plot import clean, plt, style
from run import read_records


@dataclass
class Args:
    results: tyro.conf.Positional[Path]  # a file of benchmark/run.py


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
        over = f"{metrics[2]:.0%}" if method.startswith("GRPO, filter") else ""
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
    lags, methods = (list(dict.fromkeys(record[key] for record in records)) for key in ("lag", "method"))
    styles = style(methods)
    size = (max(6, 4 * len(lags)), 3.6 + 0.2 * len(methods))
    figure, panels = plt.subplots(1, len(lags), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for panel, lag in zip(panels[0], lags, strict=True):
        for method in methods:
            group = [record for record in records if (record["method"], record["lag"]) == (method, lag)]
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
    """The finished runs of a file: method by method, in the order of the study; the first is what others are compared
    with."""
    records = [record for record in read_records(path) if "accuracy" in record]
    methods = list(dict.fromkeys(record["method"] for record in records))
    return sorted(records, key=lambda record: (methods.index(record["method"]), record["lag"], record["seed"]))


def main(args):
    records = read(args.results)
    if not records:
        print(f"error: {args.results}: has no finished runs of language models", file=sys.stderr)
        sys.exit(2)
    args.results.with_suffix(".md").write_text(f"{table(records)}\n")
    draw(records, args.results.with_suffix(".png"))
    print(table(records))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
