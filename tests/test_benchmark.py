"""benchmark/: a study from the command line to its tables, and the statistics by hand."""

import importlib
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tyro
from conftest import REPOSITORY
from matplotlib.text import Text

sys.path.insert(0, str(REPOSITORY / "benchmark"))
import curves
import documents
import plot
import plot_llm
import run as runner
import throughput

RUN = [sys.executable, str(REPOSITORY / "benchmark" / "run.py"), "--out", "results.jsonl", "--env-ids", "Hopper-v4"]
SHORT = "--flags=--num-actors 1 --num-envs 2 --num-steps 64 --num-minibatches 2 --update-epochs 1"


def bash(*command):
    return subprocess.run(command, capture_output=True, text=True, cwd=Path.cwd())


@pytest.mark.slow
def test_the_lag_study_runs_from_one_command_to_its_figures():
    done = bash("bash", str(REPOSITORY / "benchmark" / "mujoco_lag.sh"), "--smoke")
    assert done.returncode == 0, done.stderr[-2000:]
    tables = Path(re.search(r"wrote (\S+/mujoco_lag\.md)", done.stdout)[1])
    runs = [json.loads(line) for line in tables.with_suffix(".jsonl").read_text().splitlines()]
    assert sorted((run["method"], run["lag"]) for run in runs) == [("VACO", 0), ("VACO", 4), ("untrained", 0)]
    for run in runs:
        assert run["return"] > 0 and run["episodes"] > 0 and len(run["returns"]) == len(run["grid"]) == 20
        assert run["metrics"]["lag/versions_max"] == 0 if run["lag"] == 0 else run["metrics"]["lag/versions_max"] > 0
        assert run["sps"] > 0 and run["global_step"] >= run["steps"]
        assert run["commit"] and run["torch"] and run["script"] == runner.fingerprint(run["command"][0])
    assert "| VACO |" in tables.read_text() and "| untrained |" not in tables.read_text()
    for figure in ("main", "return", "curves", "tv"):
        assert tables.with_name(f"mujoco_lag_{figure}.png").exists()


def calls_of(study, monkeypatch):
    """What the script of a study calls Python with."""
    python = Path("bin", "python")
    python.parent.mkdir()
    log = f"import json, sys; print(json.dumps(sys.argv[1:]), file=open({str(Path.cwd() / 'calls')!r}, 'a'))"
    python.write_text(f"#!{sys.executable}\n{log}\n")
    python.chmod(0o755)
    monkeypatch.setenv("PATH", f"{python.parent.resolve()}:{os.environ['PATH']}")
    assert bash("bash", str(REPOSITORY / "benchmark" / f"{study}.sh")).returncode == 0
    return list(map(json.loads, Path("calls").read_text().splitlines()))


@pytest.mark.slow
@pytest.mark.parametrize("study", ["base", "width", "mujoco_lag", "atari_lag"])
def test_the_runs_of_every_study_are_valid_and_can_be_drawn(study, monkeypatch, capsys):
    """All commands of the study's script, with results made up instead of runs."""
    random = np.random.default_rng(0)
    plots = []
    for program, *flags in calls_of(study, monkeypatch):
        if program.endswith("plot.py"):
            args = tyro.cli(plot.Args, args=flags)
            out = (args.out or args.results[0].with_suffix("")).name
            plots.append(replace(args, results=(Path(args.results[0].name),), out=Path(out), reps=20))
            continue
        args = tyro.cli(runner.Args, args=flags)
        for method, env_id, lag, seed in itertools.product(args.methods, args.env_ids, args.lags, args.seeds):
            script, *command = runner.command_of(method, env_id, seed, lag, args)
            tyro.cli(importlib.import_module(script.removesuffix(".py")).Args, args=command)  # exits if a flag is wrong
            changes = {"steps": args.steps, "lag_schedule": args.lag_schedule, "command": [script, *command]}
            value = 0.0 if method == "untrained" else random.uniform(100, 1000)
            runner.append_record(Path(args.out.name), record(method, env_id, lag, seed, value, **changes))
    assert plots
    for args in plots:
        plot.main(args)
        figures = [f"{args.out}_{figure}.png" for figure in args.figures]
        assert f"wrote {args.out}.md and {', '.join(figures)}" in capsys.readouterr().out
        assert all(Path(figure).exists() for figure in figures)
        assert "nan" not in Path(f"{args.out}.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("study", ["base", "width"])
def test_the_tables_are_those_of_the_recorded_runs(study, monkeypatch):
    calls = [flags for program, *flags in calls_of(study, monkeypatch) if program.endswith("plot.py")]
    assert calls
    for args in (tyro.cli(plot.Args, args=flags) for flags in calls):
        out = args.out or args.results[0].with_suffix("")
        assert plot.tables(plot.Results(args)) == out.with_name(f"{out.name}.md").read_text()


def test_the_runs_of_the_study_of_language_models_are_valid_and_can_be_drawn(monkeypatch, capsys):
    """As above. What is shown of clipped ratios has no share of steps over a budget, which is the filter's."""
    *runs, (program, results) = calls_of("llm_lag", monkeypatch)
    assert Path(program).name == "plot_llm.py"
    path, accuracy = Path(Path(results).name), {"GRPO, filter": 0.6, "GRPO, clipped": 0.6, "GRPO, no filter": 0.5}
    for _, *flags in runs:
        args = tyro.cli(runner.Args, args=flags)
        assert str(args.out) == results
        for method, env_id, lag, seed in itertools.product(args.methods, args.env_ids, args.lags, args.seeds):
            script, *command = runner.command_of(method, env_id, seed, lag, args)
            tyro.cli(importlib.import_module(script.removesuffix(".py")).Args, args=command)
            metrics = {"charts/reward": 0.5, "filter/gate_open": 0.25, "filter/dropped": 0.125}
            made_up = record(method, env_id, lag, seed, None, command=[script, *command], metrics=metrics)
            name, rate = method.split(" --learning-rate ")
            end = accuracy.get(name, 0.59) - 0.01 * (rate != "5e-5") + 0.02 * seed
            runner.append_record(path, made_up | {"accuracy": [(0, 0.5), (25, end)]})
    plot_llm.main(plot_llm.Args(path))
    assert path.with_suffix(".png").exists() and capsys.readouterr().out == path.with_suffix(".md").read_text()
    verdicts, rows = (table.splitlines()[2:] for table in documents.tables_of(path.with_suffix(".md").read_text()))
    error = f"{(4 / 3 + 4 / 3) ** 0.5:.1f}"  # of two means of three seeds that are 2 points apart
    assert f"| GRPO, no filter | 4 | 3 | 5e-5 | 54.0 ± 2.0 | +10.0 ± {error} | ahead |" in verdicts
    assert f"| GRPO, clipped | 0 | 3 | 5e-5 | 64.0 ± 2.0 | +0.0 ± {error} | not ahead |" in verdicts
    assert f"| GRPO, decoupled | 16 | 3 | 5e-5 | 63.0 ± 2.0 | +1.0 ± {error} | open |" in verdicts
    assert "| GRPO, filter | 4 | 3 | 5e-5 | 64.0 ± 2.0 |  |  |" in verdicts and len(verdicts) == 3 * 3 + 2 * 4
    for method, _, seeds, before, *_, over, dropped in (row.strip("| ").split(" | ") for row in rows):
        assert (seeds, before, dropped) == ("3", "50.0", "12%")
        assert over.strip() == ("25%" if method.startswith("GRPO, filter") else "")


def test_learning_rates_compete_over_equal_seeds_and_a_run_that_diverged_has_0(capsys):
    for rate, seed, end in (("1e-4", 1, 0.6), ("1e-4", 2, 0.5), ("5e-5", 1, 0.7), ("5e-5", 2, None), ("5e-5", 3, 0.9)):
        accuracy = [(0, 0.5), (25, 0.7)] + ([(50, end)] if end else [])
        method = f"GRPO, filter --learning-rate {rate}"
        runner.append_record(Path("llm.jsonl"), record(method, "chain_sum", 4, seed, None, accuracy=accuracy))
    plot_llm.main(plot_llm.Args(Path("llm.jsonl")))
    tables = capsys.readouterr().out
    assert "| GRPO, filter | 4 | 2 | 1e-4 | 55.0 |" in tables  # of seeds 1 and 2; 5e-5 has 35.0
    assert "| GRPO, filter --learning-rate 5e-5 | 4 | 3 | 50.0 | 53.3 ± 47.3 |" in tables


LANGUAGE_MODELS = list((REPOSITORY / "benchmark" / "results").rglob("llm_*.jsonl"))


@pytest.mark.parametrize("path", LANGUAGE_MODELS, ids=lambda path: path.stem)
def test_the_tables_of_language_models_are_those_of_the_recorded_runs(path):
    assert plot_llm.page(plot_llm.read(path)) == path.with_suffix(".md").read_text()


@pytest.mark.slow
def test_a_language_model_is_trained_and_recorded_by_the_same_runner():
    flags = "--flags=--warm-start-batches 1 --prompts-per-rollout 8 --eval-size 8 --eval-interval 3"
    study = [*RUN[:4], "--env-ids", "chain_sum", "--lag-schedule", "fixed", "--lags", "2", "--steps", "6"]
    done = bash(*study, flags, "--methods", "GRPO, filter")
    assert done.returncode == 0, done.stderr[-2000:]
    (run,) = runner.read_records(Path("results.jsonl"))
    assert [step for step, _ in run["accuracy"]] == [0, 3, 6] and run["global_step"] > 0
    assert run["metrics"]["lag/versions_mean"] == 2  # of the batches that can have the whole lag
    assert run["transformers"] and run["script"] == runner.fingerprint("vaco_async_llm.py")
    done = bash(sys.executable, str(REPOSITORY / "benchmark" / "plot_llm.py"), "results.jsonl")
    assert done.returncode == 0 and "| GRPO, filter | 2 | 1 |" in Path("results.md").read_text()


@pytest.mark.parametrize("document", documents.DOCUMENTS, ids=lambda path: path.name)
def test_the_tables_of_the_documents_are_those_of_the_results(document):
    text = document.read_text()
    assert documents.updated(text) == text
    assert len(documents.PLACE.findall(text)) == text.count("<!-- table") == text.count("<!-- end of table")


@pytest.mark.slow
def test_a_study_goes_on_where_it_was_and_names_what_failed():
    study = [*RUN, "--steps", "256", SHORT, "--methods", "VACO", "VACO --num-minibatches 33"]
    first = bash(*study)
    assert first.returncode == 1
    assert "FAILED: vaco_async_mujoco.py --env-id Hopper-v4" in first.stderr + first.stdout
    assert "must leave 4 of 128 samples" in first.stderr + first.stdout and "1 of 2 runs failed" in first.stderr
    (log,) = Path("results.jsonl.logs").iterdir()
    assert "must leave 4 of 128 samples" in log.read_text() and str(log) in first.stderr + first.stdout
    lines = Path("results.jsonl").read_text()
    assert len(lines.splitlines()) == 1 and json.loads(lines)["method"] == "VACO"
    assert json.loads(lines)["evaluation"].keys() == {"deterministic", "sampled"}
    assert bash(*study, "--dry-run").stdout.splitlines() == [
        "vaco_async_mujoco.py --env-id Hopper-v4 --seed 1 --total-timesteps 256 --lag-schedule mixture --lag 0 "
        "--num-actors 1 --num-envs 2 --num-steps 64 --num-minibatches 2 --update-epochs 1 --num-minibatches 33"
    ]
    again = bash(*RUN, "--steps", "256", SHORT, "--methods", "VACO")  # nothing is missing
    assert again.returncode == 0 and Path("results.jsonl").read_text() == lines


def test_a_run_of_another_study_is_copied_under_its_name_here():
    flags = ["--steps", "256", SHORT, "--methods", "VACO"]
    (command,) = bash(*RUN, *flags, "--dry-run").stdout.splitlines()
    words = shlex.split(command)
    other = json.dumps(record("an older name", "Hopper-v4", 0, 1, 3.0, command=words, script="abc"))
    Path("other.jsonl").write_text(f"{other}\n")
    reuse = ["--reuse", "other.jsonl", "missing.jsonl"]
    nothing = bash(*RUN, *flags, *reuse, "--dry-run")
    assert nothing.stdout == "" and not Path("results.jsonl").exists()
    note, warning = (
        "1 recorded runs are of another state of vaco_async_mujoco.py",
        "--reuse missing.jsonl: is not there",
    )
    assert note in nothing.stderr and warning in nothing.stderr
    assert bash(*RUN, *flags, *reuse).returncode == 0
    (copied,) = map(json.loads, Path("results.jsonl").read_text().splitlines())
    assert copied["method"] == "VACO" and copied["return"] == 3.0 and copied["command"] == words


def test_methods_keep_their_own_flags_and_take_more():
    listed = bash(*RUN, "--flags=--update-epochs 2", "--methods", "IMPALA", "IMPALA, 1 epoch", "--dry-run").stdout
    assert [re.findall(r"--update-epochs (\d+)", line)[-1] for line in listed.splitlines()] == ["20", "1"]
    unknown = bash(*RUN, "--methods", "PPO", "--dry-run")
    assert (
        unknown.returncode == 2 and '--methods PPO: must begin with one of "VACO", "VACO, no filter"' in unknown.stderr
    )


@pytest.mark.parametrize(
    "program, flags, words",
    [
        ("run.py", [*RUN[2:], "--methods", "VACO", "--workers", "0"], "--workers 0: must be"),
        ("run.py", [*RUN[2:], "--methods", "VACO", "--lag-schedule", "async", "--lags", "4"], "use --lags 0"),
        ("plot.py", ["missing.jsonl"], "missing.jsonl: no such file"),
        (
            "plot.py",
            [str(REPOSITORY / "benchmark/results/old_split/llm_lag.jsonl")],
            "benchmark/plot_llm.py draws them",
        ),
        ("plot.py", [str(REPOSITORY / "benchmark/results/pong_1m.png")], "is no file of results"),
    ],
)
def test_wrong_options_of_a_program_are_one_line(program, flags, words):
    done = bash(sys.executable, str(REPOSITORY / "benchmark" / program), *flags)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and words in done.stderr


def test_help_starts_nothing_and_names_what_can_be_asked_for(monkeypatch):
    monkeypatch.setenv("PEERS", str(Path("peers").resolve()))  # where throughput.sh would install other programs
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    for study, words in (("throughput", "--rounds"), ("mujoco_lag", "the options are --seeds N")):
        done = bash("bash", str(REPOSITORY / "benchmark" / f"{study}.sh"), "--help")
        assert done.returncode == 0 and words in done.stdout
    assert not Path("peers").exists() and not Path("results.jsonl").exists()
    text = " ".join(re.sub("[│╭╮╰╯─]", "", bash(*RUN[:2], "--help").stdout).split())
    assert '"VACO, no filter"' in text and all(f"--{flag}" in text for flag in ("lags", "seeds", "env-ids"))
    assert text.count('"IMPALA, 1 epoch"') == 1  # only at --methods


@pytest.mark.parametrize(
    "flags", [["--seeds", "0"], ["--seeds"], ["--steps", "many"], ["--steps", "9"], ["--out"], ["--sneeds", "3"]]
)
def test_wrong_options_of_a_study_are_one_line(flags):
    done = bash("bash", str(REPOSITORY / "benchmark" / "mujoco_lag.sh"), *flags)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and flags[0] in done.stderr


def test_an_interrupted_study_starts_no_more_runs():
    """Ctrl-C reaches the shell and the runner, which must not seem to have had a failed run."""
    steps = f"--out r.jsonl --env-ids Hopper-v4 --flags='{SHORT.removeprefix('--flags=')}' --methods"
    lines = [
        f"seeds=1 steps=1000000\nsource {REPOSITORY}/benchmark/options.sh",
        f"run {steps} VACO",
        f"run {steps} SPO",
    ]
    Path("study.sh").write_text("\n".join([*lines, "echo went on"]))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with open("out", "w") as out, open("errors", "w") as errors:
        environment = os.environ | {"PATH": path}
        process = subprocess.Popen(
            ["bash", "study.sh"],
            env=environment,
            stdout=out,
            stderr=errors,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job ignores it
        )
    end = time.monotonic() + 60
    while "0/1" not in Path("errors").read_text() and time.monotonic() < end:  # the bar: the first run is on its way
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    try:
        code = process.wait(60)
    finally:
        if process.poll() is None:  # it went on, then leave nothing behind
            os.killpg(process.pid, signal.SIGTERM)
    assert code == 130 and "went on" not in Path("out").read_text()
    errors = Path("errors").read_text()
    assert "interrupted; the same command goes on" in errors and "Traceback" not in errors


def test_a_half_written_record_is_skipped_and_never_added_to(capsys):
    path = Path("results.jsonl")
    path.write_text('{"seed": 1}\n{"seed": 2, "ret')
    runner.append_record(path, {"seed": 3})
    runner.append_record(path, {"seed": 4})
    assert runner.read_records(path) == [{"seed": 1}, {"seed": 3}, {"seed": 4}]
    assert "results.jsonl, line 2: no record" in capsys.readouterr().err
    runner.append_record(Path("new.jsonl"), {"seed": 1})
    assert Path("new.jsonl").read_text() == '{"seed": 1}\n'


def test_a_run_that_ends_without_a_word_is_a_failure():
    with pytest.raises(RuntimeError, match="exit code 137"):
        runner.outcome(137, "", ".", 0, 100)


def record(method, env_id, lag, seed, value, **changes):
    result = {"method": method, "env_id": env_id, "lag": lag, "seed": seed, "return": value, "steps": 100}
    result |= {"command": ["x.py", method, env_id, lag, seed], "lag_schedule": "mixture", "commit": "abc"}
    result |= {"grid": [50, 100], "returns": [value, value], "metrics": {"lag/tv_backward": 0.1 * lag + seed}}
    return result | changes


def results_of(returns, *more, **args):
    """Results of {(method, env_id, lag): [return per seed]}, and of more records."""
    records = [record(*key, seed, value) for key, column in returns.items() for seed, value in enumerate(column)]
    Path("synthetic.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*records, *more]))
    return plot.Results(plot.Args((Path("synthetic.jsonl"),), **{"reps": 50} | args))


def drawn(ax):
    """The line with intervals of each method in a figure: {method: (values, [(low, high), ...])}."""
    lines = {}
    for line in ax.containers:
        segments = line.lines[2][0].get_segments()
        lines[line.get_label()] = line.lines[0].get_ydata(), [tuple(ends[:, 1]) for ends in segments if len(ends)]
    return lines


def rows_of(markdown, heading):
    """The rows of the table under a heading: {first cell: [the others]}."""
    table = markdown.split(heading)[1].split("\n\n")[1].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in table]
    return {name: cells for name, *cells in rows}


def caption_of(figure):
    return figure.get_supxlabel().replace("\n", " ")


def test_scores_are_normalised_by_untrained_and_ppo_without_lag():
    returns = {
        ("untrained", "A", 0): [10.0, 30.0],
        ("VACO", "A", 0): [300.0, 340.0],
        ("PPO-clip", "A", 0): [200.0, 240.0],
        ("VACO", "A", 4): [1000.0, 20.0, 70.0],
    }
    results = results_of(returns)
    assert (results.zero, results.one, results.unit) == ({"A": 20.0}, {"A": 220.0}, "PPO-clip")
    np.testing.assert_allclose(results.scores("VACO", 4)[:, 0], [4.9, 0.0, 0.25])
    assert "0 is 20 (untrained), 1 is 220 (PPO-clip)" in plot.tables(results)
    del returns["PPO-clip", "A", 0]
    assert results_of(returns).unit == "VACO"


def test_evaluations_of_the_last_policies_are_by_the_same_scale():
    runs = [record("VACO", "A", 0, seed, 10.0, evaluation={"sampled": 15.0 + seed}) for seed in (0, 1, 2)]
    results = results_of({("untrained", "A", 0): [0.0]}, *runs)
    assert rows_of(plot.tables(results), "the last policy of each run plays")["VACO"][0].startswith("1.60 [1.5")


def test_the_width_figure_joins_methods_that_differ_in_width():
    runs = []
    for width, tv, value in ((0.2, 0.05, 1.0), (0.6, 0.15, 2.0)):
        method = "PPO-clip" if width == 0.2 else f"PPO-clip --clip-coef {width}"
        metrics = {"lag/tv_total": tv}
        runs += [record(method, "A", 0, seed, value, metrics=metrics) for seed in (0, 1, 2)]
    results = results_of({("untrained", "A", 0): [0.0]}, *runs)
    (ax,) = plot.plot_width(results).axes
    (line,) = ax.lines
    assert line.get_label() == "PPO-clip"
    np.testing.assert_allclose(line.get_xydata(), [[0.05, 1.0], [0.15, 2.0]])


@pytest.mark.parametrize(
    ("tv", "ours", "evaluated", "verdict", "answer"),
    [
        (0.12, 3.0, 3.0, "ahead", "shown"),
        (0.12, 3.0, 1.0, "open", "open"),  # training and the last policy disagree
        (0.12, 1.0, 1.0, "behind", "refuted"),
        (0.12, 2.0, 2.0, "open", "open"),
        (0.30, 1.0, 1.0, "behind", "comparable nowhere, says nothing"),
    ],
)
def test_vaco_is_judged_beside_rivals_of_its_width(tv, ours, evaluated, verdict, answer):
    runs = []
    for method, width, value in (
        ("PPO-clip", 0.05, 1.0),
        ("PPO-clip --clip-coef 0.6", 0.15, 2.0),
        ("stop by TV", 0.15, 2.0),
        ("VACO", tv, ours),
        ("VACO --tv-threshold 0.1", 1.0, 2.0),  # whose width no other has
    ):
        evaluation = {"sampled": evaluated if method == "VACO" else value}
        changes = {"metrics": {"lag/tv_total": width}, "evaluation": evaluation}
        runs += [record(method, "A", 0, seed, value, **changes) for seed in (0, 1, 2)]
    tables = plot.tables(results_of({("untrained", "A", 0): [0.0]}, *runs))
    rows = [line for line in tables.splitlines() if line.startswith("| PPO-clip --clip-coef 0.6 | VACO |")]
    _, _, widths, comparable, judged, lead, _, line = rows[0][2:-2].split(" | ")
    assert (widths, judged) == (f"0.150, {tv:.3f}", verdict)
    assert comparable == ("yes" if tv == 0.12 else "no")
    assert lead.startswith(f"{ours - 2.0:.2f} [")
    assert line.strip() == ("1.70" if tv == 0.12 else "")  # beyond its ends a line says nothing
    gate = "" if verdict == "ahead" else "; the filter is a mere gate"
    assert f"| PPO-clip | {answer} |" in tables and f"| stop by TV | {answer}{gate} |" in tables


def test_small_returns_keep_four_digits_in_tables():
    assert plot.digits(-19.5e-4) == "-0.00195" and plot.digits(12345.6, 0.25) == "12346 ± 0"
    table = plot.tables(results_of({("untrained", "A", 0): [0.0], ("VACO", "A", 0): [3.6e-4]}))
    assert "| VACO | 0.00036 (1) |" in table


def test_scores_of_the_last_tenth_of_the_steps_are_by_the_same_scale():
    """An agent that falls early has its last 100 episodes within few steps, another over a third of the run."""
    runs = [record("VACO", "A", 0, seed, 10.0, grid=list(range(5, 101, 5))) for seed in (0, 1)]
    runs[0]["returns"], runs[1]["returns"] = [0.0] * 18 + [12.0, 14.0], [0.0] * 18 + [None, 20.0]
    results = results_of({}, *runs, record("untrained", "A", 0, 0, 0.0, steps=5))  # which may be shorter
    np.testing.assert_allclose(results.scores("VACO", 0)[:, 0], [1.0, 1.0])
    np.testing.assert_allclose(results.scores("VACO", 0, results.ends)[:, 0], [1.3, 1.5])  # joined: 0, 10, 20
    assert rows_of(plot.tables(results), "last tenth")["VACO"] == ["1.40 (2)"]


def test_statistics_by_hand():
    results = results_of(
        {
            ("untrained", "A", 0): [0.0],
            ("untrained", "B", 0): [0.0],
            ("VACO", "A", 0): [1.0, 2.0, 3.0, 100.0],
            ("VACO", "B", 0): [1.0, 2.0, 3.0, 100.0],
            ("SPO", "A", 0): [2.5, 2.5, 2.5, 2.5],
            ("SPO", "B", 0): [0.5, 0.5, 2.5, 0.5, 9.0],
        },
        reps=200,
    )
    results.one = {"A": 1.0, "B": 1.0}
    value, low, high = results.iqm["VACO", 0]
    assert value == 2.5 and low < 2.5 < high  # the middle half of 1 1 2 2 3 3 100 100
    # VACO is better in 2 of 4 x 4 pairs per value on A; on B, where SPO's fifth seed is left out: it is not on A
    on_a, on_b = 2 / 4, np.mean([(v > s) for v in (1, 2, 3, 100) for s in (0.5, 0.5, 2.5, 0.5)])
    assert results.improvement["SPO", 0][0] == pytest.approx((on_a + on_b) / 2)
    assert results.lead("VACO", "SPO", 0)[0] == 2.5 - results.iqm["SPO", 0][0]
    ours, theirs = np.random.default_rng(0).integers(0, 4, (2, 5, 3)).astype(float)  # with ties
    expected = plot.metrics.probability_of_improvement(ours, theirs)
    assert plot.probability_of_improvement(ours, theirs) == pytest.approx(expected)


def test_intervals_are_of_95_percent_stratified_and_the_same_at_every_call():
    scores = np.array([[0.0], [0.0], [0.0], [0.0], [1.0]])
    # The mean of five draws is binomial: 0.942 of it is at 0.4 or below, 0.993 at 0.6, and a third at 0
    assert plot.interval(scores, np.mean, 2000) == (0.2, 0.0, 0.6)
    scores = np.random.default_rng(0).normal(size=(5, 2))
    assert plot.interval(scores, np.mean, 50) == plot.interval(scores, np.mean, 50)
    assert plot.interval((scores, scores + 0.1), plot.probability_of_improvement, 50) == plot.interval(
        (scores, scores + 0.1), plot.probability_of_improvement, 50
    )
    # Seeds agree, environments differ: drawing environments would give it a width
    assert plot.interval(np.tile([0.0, 100.0], (5, 1)), np.mean, 50) == (50.0, 50.0, 50.0)
    np.testing.assert_equal(plot.interval(scores[:2], np.mean, 50)[1:], (np.nan, np.nan))  # two may agree by chance


TWO_LAGS = {
    ("untrained", "A", 0): [0.0],
    ("untrained", "B", 0): [0.0],
    ("VACO", "A", 0): [1.0, 1.0, 1.0, 1.0],  # worse without lag, better with it
    ("VACO", "B", 0): [100.0, 100.0, 100.0, 100.0],
    ("PPO-clip", "A", 0): [2.0, 2.0, 2.0, 2.0],
    ("PPO-clip", "B", 0): [200.0, 200.0, 200.0, 200.0],
    ("VACO", "A", 4): [1.2, 1.2, 1.2, 100.0],  # an outlier, which the IQM leaves out
    ("VACO", "B", 4): [180.0, 180.0, 180.0, 180.0],
    ("PPO-clip", "A", 4): [0.0, 0.4, 0.8],
    ("PPO-clip", "B", 4): [0.0, 40.0, 80.0],
}


def test_the_main_figure_and_the_tables_show_the_statistics_at_their_lags():
    results = results_of(TWO_LAGS)
    (methods,) = plot.plot_main(results).axes
    # VACO at lag 4: the middle of 0.6 0.6 0.6 0.9 0.9 0.9 0.9 50. Its mean is 7, its median 0.9
    iqm = {"VACO": [0.5, 0.825], "PPO-clip": [1.0, 0.2]}
    assert {line.get_label(): list(line.get_ydata().round(3)) for line in methods.lines} == iqm
    for band, method in zip(methods.collections, iqm, strict=True):
        heights = band.get_paths()[0].vertices[:, 1]
        bounds = [bound for lag in (0, 4) for bound in results.iqm[method, lag][1:]]
        np.testing.assert_allclose([heights.min(), heights.max()], [min(bounds), max(bounds)])
    tables = plot.tables(results)
    assert rows_of(tables, "IQM of normalised")["VACO"][0] == "0.50 [0.50, 0.50] (4)"
    assert rows_of(tables, "IQM of normalised")["VACO"][1].startswith(("0.82 [", "0.83 ["))
    assert rows_of(tables, "**A**") == {
        "VACO": ["1 ± 0 (4)", "25.9 ± 49.4 (4)"],
        "PPO-clip": ["2 ± 0 (4)", "0.4 ± 0.4 (3)"],
    }
    assert rows_of(tables, "Probability that") == {"PPO-clip": ["0.00 [0.00, 0.00] (4, 4)", "1.00 [1.00, 1.00] (4, 3)"]}
    assert rows_of(tables, "lag/tv_backward")["PPO-clip"] == ["1.500", "1.400"]  # of all seeds: 0.1 lag + mean(seed)


def test_returns_and_curves_show_each_environment_and_lag():
    results = results_of(TWO_LAGS)
    on_a, on_b = plot.plot_return(results).axes
    np.testing.assert_allclose(drawn(on_a)["PPO-clip"][0], [2.0, 0.4])
    np.testing.assert_allclose(drawn(on_a)["VACO"][0], [1.0, 25.9])  # the mean
    np.testing.assert_allclose(drawn(on_b)["PPO-clip"][0], [200.0, 40.0])
    points = [line for line in on_b.lines if line.get_marker() == "." and len(line.get_ydata()) == 3]
    np.testing.assert_allclose(points[0].get_ydata(), [0.0, 40.0, 80.0])  # each seed
    axes = plot.plot_curves(results).axes
    assert [ax.get_title(loc="left") for ax in axes] == ["A, lag 0", "A, lag 4", "B, lag 0", "B, lag 4"]
    curves = {line.get_label(): line.get_ydata() for line in axes[3].lines}
    np.testing.assert_allclose(curves["VACO"], [180.0, 180.0])
    tv = plot.plot_tv(results).axes[0]
    np.testing.assert_allclose(drawn(tv)["VACO"][0], [1.5, 1.9])


def test_labels_of_curves_are_at_their_ends():
    """Also where a later panel of the row widens the axis that they share."""
    runs = {("untrained", "A", 0): [0.0], ("VACO", "A", 0): [1.0], ("VACO", "A", 4): [100.0], ("VACO", "A", 8): [50.0]}
    figure = plot.plot_curves(results_of(runs))
    figure.draw_without_rendering()
    for ax in figure.axes:
        (label,) = (text for text in ax.texts if text.get_text() == "VACO")
        end = ax.transData.transform((0, ax.lines[0].get_ydata()[-1]))[1]
        box = label.get_window_extent()
        assert box.y0 <= end <= box.y1


def test_labels_at_the_ends_of_lines_do_not_overlap():
    methods = ["VACO", "PPO-clip", "PPO-KL", "SPO", "decoupled PPO", "IMPALA", "IMPALA, 1 epoch", "VACO, no filter"]
    returns = {(method, "A", lag): [50.0 + i / 9] for i, method in enumerate(methods) for lag in (0, 4)}
    results = results_of({("untrained", "A", 0): [0.0], **returns, ("VACO, no alignment", "A", 4): [0.0]})
    for draw in (plot.plot_main, plot.plot_return, plot.plot_curves):
        figure = draw(results)
        figure.canvas.draw()
        assert figure.axes[0].texts
        for ax in figure.axes:
            boxes = [Text.get_window_extent(text) for text in ax.texts]  # without leaders
            boxes.sort(key=lambda box: box.y0)
            assert len({round(box.x0) for box in boxes}) <= 1
            assert all(below.y1 <= above.y0 for below, above in itertools.pairwise(boxes))
            assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)


def test_a_method_looks_the_same_in_every_figure():
    few, many = plot.style(["SPO", "VACO"]), plot.style(["VACO", "PPO-clip", "VACO --tv-threshold 0.1", "new", "SPO"])
    assert few["SPO"] == many["SPO"] and few["VACO"] == many["VACO"]
    control = [name for name in plot.LOOKS if not name.startswith("GRPO")]  # which have those of control
    looks = [(str(look["color"]), look["marker"], str(look["linestyle"])) for look in plot.style(control).values()]
    assert len(set(looks)) == len(looks) == len({marker for _, marker, _ in looks})


def test_few_seeds_and_missing_cells_are_said():
    results = results_of(
        {
            ("untrained", "A", 0): [0.0],
            ("VACO", "A", 0): [1.0, 2.0],
            ("VACO", "A", 4): [1.0, 2.0, 3.0],
            ("SPO", "A", 4): [1.0],
        }
    )
    tables = plot.tables(results)
    assert "seeds: 1 to 3." in tables
    assert rows_of(tables, "IQM of normalised")["SPO"] == ["", "0.67 (1)"]
    assert rows_of(tables, "lag/tv_backward")["SPO"] == ["", "0.400"]
    assert "SPO" in drawn(plot.plot_tv(results).axes[0])
    figure = plot.plot_main(results)
    figure.draw_without_rendering()
    assert {text.get_text() for text in figure.axes[0].texts} == {"VACO", "SPO"}


def test_a_flag_of_the_methods_can_be_the_x_axis():
    """More and more updates at lag 0; budgets and other parts at lag 8."""
    epochs = {
        (f"{method} --update-epochs {n}", "A", 0): [n * scale] * 3
        for n in (1, 4, 10, 20)
        for method, scale in (("VACO", 1.0), ("PPO-clip", 0.5))
    }
    untrained = {("untrained", "A", 0): [0.0]}
    results = results_of(untrained | epochs, x="update-epochs")
    assert (results.methods, results.xs) == (["VACO", "PPO-clip"], [1, 4, 10, 20])
    (ax,) = plot.plot_main(results).axes
    lines = {line.get_label(): line.get_ydata() for line in ax.lines}
    np.testing.assert_allclose(lines["PPO-clip"], [0.5, 2, 5, 10])
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "4", "10", "20"]
    assert ax.get_xlabel() == "update epochs"
    assert rows_of(plot.tables(results), "Probability that")["PPO-clip"][2] == "1.00 [1.00, 1.00] (3, 3)"

    parts = {(m, "A", 8): [1.0] * 3 for m in ("VACO", "VACO, no filter", "VACO --tv-threshold 0.1", "PPO-clip")}
    lag8 = untrained | {("VACO", "A", 0): [2.0] * 3} | parts
    sweep = results_of(lag8, x="tv-threshold=0.2", lags=(8,), methods=("VACO", "VACO --tv-threshold 0.1"))
    assert (sweep.methods, sweep.xs, sweep.one) == (["VACO"], [0.1, 0.2], {"A": 2.0})
    assert results_of(lag8, x="tv-threshold", lags=(8,)).xs == [0.1]
    results = results_of(lag8, lags=(8,))
    ax, part = plot.plot_main(results).axes  # one place: a row per method
    names = ["VACO", "VACO --tv-threshold 0.1", "PPO-clip", "VACO, no filter"]
    assert [label.get_text() for label in ax.get_yticklabels()] == names
    assert [label.get_text() for label in part.get_yticklabels()] == names[1:]
    for wrong, message in (
        ({"x": "tv-threshold"}, "one lag at a time, use --lags 8"),
        ({"x": "gamma", "lags": (8,)}, "nothing to show"),
        ({"lags": (5,)}, "--lags 5: not in the results, which have 0, 8"),
    ):
        with pytest.raises(SystemExit, match=message):
            results_of(lag8, **wrong)
    with pytest.raises(SystemExit, match="there twice"):
        results_of({**lag8, ("VACO --tv-threshold 0.2", "A", 8): [1.0]}, x="tv-threshold=0.2", lags=(8,))


def test_a_diverged_run_is_recorded_and_counts_as_untrained():
    """In the study it would fail again and again; left out of the statistics it would make its method look better."""
    flags = "--flags=--num-actors 1 --num-envs 2 --num-steps 64 --num-minibatches 2 --max-grad-norm 1e12"
    done = bash(*RUN, "--steps", "256", flags, "--methods", "VACO --learning-rate 1e12")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(Path("results.jsonl").read_text())
    assert found["return"] is None and "not finite" in found["diverged"] and found["commit"]
    assert len(found["returns"]) == len(found["grid"]) == 20
    grid = [25, 50, 75, 100]
    old = record("VACO", "A", 0, 2, None, metrics={})  # as older records have it
    del old["grid"], old["returns"]
    results = results_of(
        {},
        record("VACO", "A", 0, 0, 30.0, grid=grid, returns=[10.0, None, 20.0, 30.0], metrics={"lag/ess": 0.5}),
        record("VACO", "A", 0, 1, None, grid=grid, returns=[12.0, 14.0, None, None], metrics={}),
        old,
        record("untrained", "A", 0, 0, 10.0, grid=grid, returns=[10.0] * 4),
        *(record("PPO-clip", "A", 0, seed, 50.0, grid=grid, returns=[50.0] * 4) for seed in range(3)),
    )
    np.testing.assert_allclose(results.scores("VACO", 0)[:, 0], [0.5, 0.0, 0.0])
    places, curves = results.curves("VACO", "A", 0)
    np.testing.assert_allclose(places, grid)
    np.testing.assert_allclose(curves, [[10, 15, 20, 30], [12, 14, 10, 10], [10, 10, 10, 10]])
    assert results.metric("VACO", 0, "lag/ess") == 0.5
    assert "counted as untrained: VACO, A, 0, 1; VACO, A, 0, 2" in plot.tables(results)
    assert "Runs without a return, counted as untrained: 2." in caption_of(plot.plot_main(results))


def test_runs_of_several_programs_are_named():
    """Records of older runs have a commit only."""
    results = results_of(
        {("untrained", "A", 0): [0.0]},
        *(record("VACO", "A", 0, seed, 1.0, script="aaa", commit=f"c{seed}") for seed in range(3)),
        *(record("SPO", "A", 0, seed, 1.0, script=script) for seed, script in enumerate(("aaa", "bbb"))),
        record("PPO-KL", "A", 0, 0, 1.0, commit="old"),
    )
    text = plot.programs(results)
    assert "commit old (1), x.py aaa (4), x.py bbb (1). Commits: abc, c0, c1, c2, old." in text
    assert "Methods with runs of several programs: SPO." in text


def test_published_returns_stand_beside_runs_of_1m_steps():
    runs = [record("VACO", "Hopper-v4", 0, 0, 2500.0, steps=steps) for steps in (100, 1_000_000)]
    zeros = [record("untrained", "Hopper-v4", 0, 0, 10.0, steps=steps) for steps in (100, 1_000_000)]
    assert "published" not in plot.tables(results_of({}, runs[0], zeros[0]))
    rows = rows_of(plot.tables(results_of({}, runs[1], zeros[1])), "Beside published returns")
    assert rows == {"Hopper-v4": ["2500 (1)", "2383 ± 272", "2609"]}


def test_results_that_cannot_be_compared_are_refused():
    with pytest.raises(SystemExit, match='no run of the method "untrained" on A'):
        results_of({("VACO", "A", 0): [1.0]})
    runs = {("VACO", "A", 0): [2.0], ("untrained", "A", 0): [1.0]}
    for changes in ({"steps": 200}, {"lag_schedule": "fixed"}):
        with pytest.raises(SystemExit, match="runs are no one study, but "):
            results_of(runs, record("VACO", "A", 0, 1, 2.0, **changes))
    with pytest.raises(SystemExit, match="two different runs are VACO, A, 0, 0"):
        results_of(runs, record("VACO", "A", 0, 0, 2.0, command=["x.py", "--lr"]))
    with pytest.raises(SystemExit, match="--methods VACOO: not in the results, which have 'VACO'"):
        results_of(runs, methods=("VACOO",))
    with pytest.raises(SystemExit, match=r"no runs in synthetic\.jsonl"):
        results_of({})


def test_scores_that_cannot_be_normalised_are_marked():
    results = results_of({("untrained", "A", 0): [20.0], ("VACO", "A", 0): [10.0], ("SPO", "A", 0): [0.0]})
    assert results.scores("VACO", 0)[0, 0] > results.scores("SPO", 0)[0, 0]  # not upside down
    assert "NOT NORMALISED" in plot.tables(results)


def test_speed_leaves_out_the_start():
    """Six batches of 100 steps, slow ones at first: what counts is the last 300 steps, in 3 seconds."""
    times = [0.0, 50.0, 90.0, 91.0, 92.0, 93.0]
    clock = [SimpleNamespace(step=100 * (i + 1), wall_time=time) for i, time in enumerate(times)]
    assert throughput.speed(clock) == 100.0


def test_curves_of_runs_are_means_over_stretches_of_steps():
    steps = np.arange(1.0, 101.0)  # two steps per point
    run = {
        "charts/episodic_return": (steps, steps),
        "lag/tv_total": (steps, 0 * steps),
        "filter/dropped": (steps, steps),
    }
    figure = curves.draw({"one": run, "shorter": {"charts/episodic_return": (steps[:10], steps[:10])}})
    returns, lag, _, _ = figure.axes
    one, shorter = returns.lines
    np.testing.assert_allclose(one.get_xydata()[:3], [(2, 1.5), (4, 3.5), (6, 5.5)])
    assert len(one.get_xdata()) == 50 and shorter.get_xydata()[-1].tolist() == [10, 9.5]
    assert not lag.lines


@pytest.mark.slow
def test_throughput_measures_a_program_and_shows_what_failed():
    flags = "--env-id Hopper-v4 --num-actors 1 --num-envs 1 --num-steps 64 --update-epochs 1 --num-minibatches 2"
    works = throughput.Program("a program", f"../vaco_async_mujoco.py {flags}", 640, 31.25)
    throughput.run(works, throughput.Args())
    assert works.speeds[0] > 10 and 0 < works.startups[0] < 300
    assert works.pss[0] > 0.1 and all(0 <= wait <= 1 for wait in works.waits[0])
    name, speed, *_, learner_waits, actors_wait = throughput.table([works]).splitlines()[-1].strip("| ").split(" | ")
    assert (name, speed) == ("a program", f"{works.speeds[0]:.0f}") and learner_waits[-1] == actors_wait[-1] == "%"
    fails = throughput.Program("wrong flag", "../vaco_async_mujoco.py --num-envs 0", 640, 31.25)
    with pytest.raises(RuntimeError, match=r"(?s)wrong flag: exit code 2\n.*--num-envs 0: must"):
        throughput.run(fails, throughput.Args())
    short = throughput.Program("short", f"../vaco_async_mujoco.py {flags}", 64, 31.25)
    with pytest.raises(RuntimeError, match=r"short logged [12] times"):
        throughput.run(short, throughput.Args())


@pytest.mark.slow
@pytest.mark.parametrize("part", ["learner", "actors", "envpool"])
def test_each_side_alone(part):
    flags = ["--seconds", "1", "--env-id", "Hopper-v4", "--num-actors", "2", "--update-epochs", "1"]
    done = bash(sys.executable, str(REPOSITORY / "benchmark" / "alone.py"), part, "vaco_async_mujoco", *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(re.search(rf"{part} alone: (\d+) steps/s", done.stdout)[1]) > 100
