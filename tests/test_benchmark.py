"""benchmark/: a study from the command line to its tables, and the statistics by hand."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmark"))
import plot

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
    assert {(run["method"], run["lag"], run["seed"]) for run in runs} == {
        (method, lag, seed) for method in ("VACO", "PPO-clip", "untrained") for lag in (0, 4) for seed in (1, 2)
    }
    for run in runs:
        assert run["return"] > 0 and run["episodes"] > 0 and len(run["returns"]) == len(run["grid"]) == 20
        assert run["metrics"]["lag/versions_max"] == 0 if run["lag"] == 0 else run["metrics"]["lag/versions_max"] > 0
        assert run["commit"] and run["torch"] and run["command"][0].endswith(".py")
    assert "| VACO |" in tables.read_text() and "| untrained |" not in tables.read_text()
    for figure in ("return", "curves", "improvement", "profile", "tv"):
        assert tables.with_name(f"mujoco_lag_{figure}.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_study_goes_on_where_it_was_and_names_what_failed():
    study = [*RUN, "--steps", "256", SHORT, "--methods", "VACO", "VACO --num-minibatches 3"]
    first = bash(*study)
    assert first.returncode == 1
    assert "FAILED: vaco_async_mujoco.py --env-id Hopper-v4" in first.stderr + first.stdout
    assert "type --num-minibatches 2" in first.stderr + first.stdout and "1 of 2 runs failed" in first.stderr
    lines = Path("results.jsonl").read_text()
    assert len(lines.splitlines()) == 1 and json.loads(lines)["method"] == "VACO"
    assert bash(*study, "--dry-run").stdout.splitlines() == [
        "vaco_async_mujoco.py --env-id Hopper-v4 --seed 1 --total-timesteps 256 --lag-schedule mixture --lag 0 "
        "--num-actors 1 --num-envs 2 --num-steps 64 --num-minibatches 2 --update-epochs 1 --num-minibatches 3"
    ]
    again = bash(*RUN, "--steps", "256", SHORT, "--methods", "VACO")  # nothing is missing
    assert again.returncode == 0 and Path("results.jsonl").read_text() == lines


def test_methods_keep_their_own_flags_and_take_more():
    listed = bash(*RUN, "--flags=--update-epochs 2", "--methods", "IMPALA", "IMPALA, 1 epoch", "--dry-run").stdout
    assert [re.findall(r"--update-epochs (\d+)", line)[-1] for line in listed.splitlines()] == ["20", "2"]
    unknown = bash(*RUN, "--methods", "PPO", "--dry-run")
    assert unknown.returncode == 1 and "--methods PPO: must begin with one of VACO" in unknown.stderr


@pytest.mark.parametrize("flags", [["--seeds", "0"], ["--seeds"], ["--steps", "many"], ["--sneeds", "3"]])
def test_wrong_options_of_a_study_are_one_line(flags):
    done = bash("bash", str(REPOSITORY / "benchmark" / "mujoco_lag.sh"), *flags)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and flags[0] in done.stderr


def write_runs(returns):
    """A file of results from {(method, env_id, lag): [return per seed]}."""
    lines = []
    for (method, env_id, lag), scores in returns.items():
        for seed, score in enumerate(scores):
            run = {"method": method, "env_id": env_id, "lag": lag, "seed": seed, "return": score, "steps": 100}
            run |= {"grid": [50, 100], "returns": [score, score], "metrics": {"lag/tv_backward": 0.1 * lag}}
            lines.append(json.dumps(run))
    path = Path("synthetic.jsonl")
    path.write_text("\n".join(lines) + "\n")
    return path


def test_scores_are_normalised_by_untrained_and_the_best_mean_without_lag():
    path = write_runs(
        {
            ("untrained", "A", 0): [10.0, 30.0],
            ("VACO", "A", 0): [100.0, 140.0],
            ("SPO", "A", 0): [200.0, 240.0],  # the best: mean 220
            ("VACO", "A", 4): [1000.0, 20.0, 70.0],
        }
    )
    results = plot.Results([path])
    assert (results.zero, results.one) == ({"A": 20.0}, {"A": 220.0})
    np.testing.assert_allclose(results.scores("VACO", 4)[:, 0], [4.9, 0.0, 0.25])
    assert results.methods == ["VACO", "SPO"]


def test_statistics_by_hand():
    path = write_runs(
        {
            ("untrained", "A", 0): [0.0],
            ("untrained", "B", 0): [0.0],
            ("VACO", "A", 0): [1.0, 2.0, 3.0, 100.0],
            ("VACO", "B", 0): [1.0, 2.0, 3.0, 100.0],
            ("SPO", "A", 0): [2.5, 2.5, 2.5, 2.5],
            ("SPO", "B", 0): [0.5, 0.5, 2.5, 0.5, 9.0],
        }
    )
    results = plot.Results([path])
    results.one = {"A": 1.0, "B": 1.0}
    value, low, high = plot.interval(results.scores("VACO", 0), plot.metrics.aggregate_iqm, 200)
    assert value == 2.5 and low < 2.5 < high  # the middle half of 1 1 2 2 3 3 100 100
    args = plot.Args((path,), reps=200)
    # VACO is better in 2 of 4 x 4 pairs per value on A; on B, where SPO's fifth seed is left out: it is not on A
    on_a, on_b = 2 / 4, np.mean([(v > s) for v in (1, 2, 3, 100) for s in (0.5, 0.5, 2.5, 0.5)])
    assert plot.improvements(results, args)[0, "SPO"][0] == pytest.approx((on_a + on_b) / 2)
    assert plot.Results([path]).seed_counts() == "4 seeds"


def test_results_that_cannot_be_compared_are_refused():
    with pytest.raises(SystemExit, match='no run of the method "untrained" on A'):
        plot.Results([write_runs({("VACO", "A", 0): [1.0]})])
    path = write_runs({("VACO", "A", 0): [1.0], ("untrained", "A", 0): [1.0]})
    path.write_text(path.read_text().replace('"steps": 100', '"steps": 200', 1))
    with pytest.raises(SystemExit, match=r"runs of \[100, 200\] steps are no one study"):
        plot.Results([path])
