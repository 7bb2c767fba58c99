"""benchmark/: a study from the command line to its tables, and the statistics by hand."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmark"))
import plot
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
    assert {(run["method"], run["lag"], run["seed"]) for run in runs} == {
        *((method, lag, seed) for method in ("VACO", "PPO-clip") for lag in (0, 4) for seed in (1, 2)),
        ("untrained", 0, 1),
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
    assert [re.findall(r"--update-epochs (\d+)", line)[-1] for line in listed.splitlines()] == ["20", "1"]
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
            run |= {"command": [method, env_id, lag, seed], "lag_schedule": "mixture", "commit": "abc"}
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


def test_a_diverged_run_is_recorded_and_counts_as_untrained():
    """In the study it would fail again and again; left out of the statistics it would make its method look better."""
    flags = "--flags=--num-actors 1 --num-envs 2 --num-steps 64 --num-minibatches 2 --max-grad-norm 1e12"
    done = bash(*RUN, "--steps", "256", flags, "--methods", "VACO --learning-rate 1e12")
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads(Path("results.jsonl").read_text())
    assert record["return"] is None and "not finite" in record["diverged"] and record["commit"]
    path = write_runs({("untrained", "A", 0): [10.0], ("VACO", "A", 0): [30.0, None], ("SPO", "A", 0): [50.0, 50.0]})
    results = plot.Results([path])
    np.testing.assert_allclose(results.scores("VACO", 0)[:, 0], [0.5, 0.0])
    assert "Diverged, counted as untrained: VACO, A, 0, 1" in plot.tables(results, plot.Args((path,), reps=50))


def test_results_that_cannot_be_compared_are_refused():
    with pytest.raises(SystemExit, match='no run of the method "untrained" on A'):
        plot.Results([write_runs({("VACO", "A", 0): [1.0]})])
    path = write_runs({("VACO", "A", 0): [2.0], ("untrained", "A", 0): [1.0]})
    lines = path.read_text()
    for change in (('"steps": 100', '"steps": 200'), ('"mixture"', '"fixed"')):
        path.write_text(lines.replace(*change, 1))
        with pytest.raises(SystemExit, match="runs are no one study, but "):
            plot.Results([path])
    path.write_text(lines + lines.splitlines()[0].replace('"command": ["VACO"', '"command": ["VACO --lr"') + "\n")
    with pytest.raises(SystemExit, match="two different runs are VACO, A, 0, 0"):
        plot.Results([path])
    path.write_text(lines)
    with pytest.raises(SystemExit, match="--methods VACOO: not in the results, which have VACO"):
        plot.Results([path], ("VACOO",))


def test_scores_that_cannot_be_normalised_are_marked():
    path = write_runs({("untrained", "A", 0): [20.0], ("VACO", "A", 0): [10.0], ("SPO", "A", 0): [0.0]})
    results = plot.Results([path])
    assert results.scores("VACO", 0)[0, 0] > results.scores("SPO", 0)[0, 0]  # not upside down
    assert "NOT NORMALISED" in plot.tables(results, plot.Args((path,), reps=50))


def test_speed_leaves_out_the_start():
    """Six batches of 100 steps, slow ones at first: what counts is the last 300 steps, in 3 seconds."""
    times = [0.0, 50.0, 90.0, 91.0, 92.0, 93.0]
    clock = [SimpleNamespace(step=100 * (i + 1), wall_time=time) for i, time in enumerate(times)]
    assert throughput.speed(clock) == 100.0


@pytest.mark.slow
def test_throughput_measures_a_program_and_shows_what_failed():
    flags = "--env-id Hopper-v4 --num-actors 1 --num-envs 1 --num-steps 64 --update-epochs 1 --num-minibatches 2"
    works = throughput.Program("a program", f"../vaco_async_mujoco.py {flags}", 640, 31.25)
    throughput.run(works, throughput.Args())
    assert works.speeds[0] > 10 and 0 < works.startups[0] < 300
    assert works.pss[0] > 0.1 and all(0 <= wait <= 1 for wait in works.waits[0])
    name, speed, *_, learner_waits, actors_wait = throughput.table([works]).splitlines()[-1].strip("| ").split(" | ")
    assert (name, speed) == ("a program", f"{works.speeds[0]:.0f}") and learner_waits[-1] == actors_wait[-1] == "%"
    fails = throughput.Program("wrong flag", "../vaco_async_mujoco.py --gamma 2", 640, 31.25)
    with pytest.raises(RuntimeError, match=r"wrong flag: exit code 2\n.*--gamma 2"):
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
