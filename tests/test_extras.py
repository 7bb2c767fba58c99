"""What comes with a run: saved models, their evaluation and video, tracking, --help, and environments of one's own."""

import importlib
import inspect
import os
import re
import signal
import subprocess
import sys
import time
from ctypes.util import find_library
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import envpool
import numpy as np
import pytest
import torch
from conftest import REPOSITORY, processes_of_session, read_curves
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import vaco_async_atari
import vaco_async_mujoco
from vaco_async_mujoco import Args, ContinuousEnvs, RunError, UsageError, continuous_sizes, evaluate, load_model, train

SCRIPTS = ["vaco_async_mujoco", "vaco_async_atari", "ppo_async_baseline", "impala_baseline"]
SMALL = {"num_actors": 1, "num_envs": 4, "num_steps": 16, "num_minibatches": 4, "update_epochs": 1}


def saved_model():
    (path,) = Path("runs").glob("*/*.cleanrl_model")
    return str(path)


@pytest.fixture
def own_env(monkeypatch):
    """The environment of benchmark/custom_env.py, by a name that actors can import, too."""
    monkeypatch.syspath_prepend(REPOSITORY / "benchmark")
    return "custom_env:Reach-v0"


def test_evaluation_agrees_with_training_on_an_environment_of_ones_own(own_env):
    """Observations are about 50 +- 10: without its statistics the agent is no better than at the start."""
    args = Args(env_id=own_env, total_timesteps=30_000, num_actors=1, update_epochs=5, lag_schedule="fixed")
    train(replace(args, save_model=True, eval_episodes=50))
    curves = read_curves(".")
    returns, evaluated = curves["charts/episodic_return"], curves["eval/sampled_return"]
    results = evaluate(replace(args, evaluate=saved_model(), eval_episodes=50))
    assert returns[0] < -30 and np.mean(returns[-5:]) > -15
    assert np.mean(results["sampled"]) == pytest.approx(np.mean(returns[-5:]), abs=4)
    assert evaluated == pytest.approx([np.mean(results["sampled"])]) and len(curves["eval/deterministic_return"]) == 1
    assert np.mean(results["deterministic"]) > np.mean(results["sampled"]) - 2
    assert len(results["sampled"]) == len(set(results["sampled"])) == 50  # different episodes


def test_a_saved_model_is_all_that_it_takes_to_act(capsys):
    """Deterministic returns are those of a policy computed by hand, from the file alone."""
    train(Args(env_id="Hopper-v4", total_timesteps=500, save_model=True, eval_episodes=3, **SMALL))
    printed = re.search(r"evaluation, deterministic: .* of 3: (.*)", capsys.readouterr().out).group(1)
    model = torch.load(saved_model(), weights_only=True)
    weights = {name: tensor.double().numpy() for name, tensor in model["agent"].items()}
    assert model["sizes"] == (11, 3) and model["args"]["env_id"] == "Hopper-v4" and weights["obs_var"].max() != 1
    seed = int(np.random.default_rng(model["args"]["seed"]).integers(2**31 - 3))
    returns = []
    for i in range(3):
        env, total, done = envpool.make("Hopper-v4", "gymnasium", num_envs=1, seed=seed + i), 0.0, False
        obs, _ = env.reset()
        while not done:
            hidden = np.clip((obs - weights["obs_mean"]) / np.sqrt(weights["obs_var"] + 1e-8), -10, 10)
            for layer in (0, 2, 4):
                hidden = hidden @ weights[f"actor_mean.{layer}.weight"].T + weights[f"actor_mean.{layer}.bias"]
                hidden = np.tanh(hidden) if layer < 4 else hidden
            obs, (reward,), (terminated,), (truncated,), _ = env.step(np.clip(hidden, -1, 1))
            total, done = total + reward, terminated or truncated
        returns.append(total)
    np.testing.assert_allclose([float(number) for number in printed.split()], returns, atol=0.2)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_evaluates_what_it_saved(script, capsys):
    module = importlib.import_module(script)
    env_id = "Freeway-v5" if script == "vaco_async_atari" else "InvertedPendulum-v4"
    agent = module.train(module.Args(env_id=env_id, total_timesteps=60, exp_name="run", **SMALL))
    module.save_model("model", module.Args(env_id=env_id), agent)
    args, weights = module.load_model("model")
    assert all(torch.equal(weights[name], tensor) for name, tensor in agent.state_dict().items())
    if script == "vaco_async_atari":  # a game of Freeway takes minutes
        return
    results = module.evaluate(replace(args, evaluate="model", eval_episodes=2))
    assert results == module.evaluate(replace(args, evaluate="model", eval_episodes=2))
    assert f"evaluation, sampled: return {np.mean(results['sampled']):.1f} +- " in capsys.readouterr().out


def test_whole_games_are_evaluated_in_raw_score():
    """A game of MsPacman has several lives, and points of 10 and more; the policy is the untrained one."""
    args = vaco_async_atari.Args(env_id="MsPacman-v5", evaluate="model", eval_episodes=2)
    vaco_async_atari.save_model("model", args, vaco_async_atari.build(args)[0]())
    results = vaco_async_atari.evaluate(args)
    assert all(score > 0 and score % 10 == 0 for scores in results.values() for score in scores)


@pytest.mark.parametrize("generator", [None, torch.Generator().manual_seed(1)], ids=["deterministic", "sampled"])
def test_the_first_episode_of_each_environment_counts(generator):
    """Of environments whose episodes have 3, 5 and 2 steps, with a reward of 1 per step in the first, 2 in the next."""

    class Envs:
        def __init__(self):
            self.valid, self.obs, self.t = np.ones(3, dtype=bool), np.zeros((3, 2), dtype=np.float32), 0
            self.lengths = np.zeros(3)

        def step(self, actions):
            self.t += 1
            self.ended = [i for i, length in enumerate((3, 5, 2)) if self.t % length == 0]
            return None, None, None, [((self.t // (3, 5, 2)[i]) * (3, 5, 2)[i], 1) for i in self.ended]

    agent = vaco_async_mujoco.Agent(2, 1)
    assert vaco_async_mujoco.play(agent, Envs(), generator) == [3, 5, 2]


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_a_generator_the_most_likely_action_is_taken(script):
    module, torch_generator = importlib.import_module(script), torch.Generator().manual_seed(0)
    atari = script == "vaco_async_atari"
    agent = module.build(module.Args(env_id="Pong-v5" if atari else "Hopper-v4"))[0]()
    obs = torch.randint(255, (5, 84, 84, 4), dtype=torch.uint8) if atari else torch.randn(5, 11)
    actions, logprobs = agent.act(obs)
    assert torch.equal(actions, agent.act(obs)[0])
    for _ in range(20):
        others, other_logprobs = agent.act(obs, torch_generator)
        assert (logprobs >= other_logprobs).all() and actions.shape == others.shape


def test_an_episode_without_an_end_ends_the_evaluation():
    envs = SimpleNamespace(valid=[True], obs=np.zeros((1, 2), dtype=np.float32), lengths=np.zeros(1), ended=[])

    def step(actions):
        envs.lengths += 1000
        return None, None, None, []

    envs.step = step
    with pytest.raises(RunError, match="does not end within 100000 steps"):
        vaco_async_mujoco.play(vaco_async_mujoco.Agent(2, 1), envs)


def test_a_run_can_be_evaluated_without_a_saved_model_and_after_it_went_on(capsys):
    """The flags of how the run was made, not of what it made, do not come with it."""
    args = Args(env_id="InvertedPendulum-v4", total_timesteps=60, eval_episodes=2, **SMALL)
    train(args)
    (run,) = map(str, Path("runs").iterdir())
    train(replace(args, resume=run, total_timesteps=120, save_model=True))
    results = [evaluate(replace(load_model(path)[0], evaluate=path)) for path in (run, saved_model())]
    assert (
        results[0] == results[1] and f"evaluating {run} on InvertedPendulum-v4, 2 episodes" in capsys.readouterr().out
    )
    elsewhere = {"resume": run, "track": True, "capture_video": True, "compile": True}
    vaco_async_mujoco.save_model("model", Args(seed=3, **elsewhere), vaco_async_mujoco.build(args)[0]())
    assert load_model("model")[0] == Args(seed=3)


def test_gymnasium_resets_on_the_next_step_as_envpool_does(own_env):
    """32 steps of environments whose episodes have 30: marks, returns and lengths, and seeds that are their own."""
    envs = ContinuousEnvs(own_env, 2, seed=7)
    (alone,) = ContinuousEnvs(own_env, 1, seed=8).obs
    np.testing.assert_array_equal(envs.obs[1], alone)
    for t in range(32):
        assert envs.valid.all() == (t != 30)
        rewards, terminated, truncated, episodes = envs.step(np.full((2, 2), 9.0))  # clipped to 1
        assert len(episodes) == 2 * (t == 29) and not terminated.any() and truncated.all() == (t == 29)
        if t == 29:
            assert [length for _, length in episodes] == [30, 30] and list(envs.ended) == [0, 1]
        if t == 30:
            assert not rewards.any() and (envs.obs[:, :2] != 60).all()  # a new start, not the corner reached
    assert continuous_sizes(own_env) == (4, 2) and continuous_sizes("nowhere:Reach-v0") is None


@pytest.mark.parametrize("script", ["ppo_async_baseline", "impala_baseline"])
def test_baselines_play_an_environment_of_ones_own(script, own_env):
    module = importlib.import_module(script)
    module.train(module.Args(env_id=own_env, total_timesteps=200, **SMALL | {"num_steps": 32}))
    assert read_curves(".")["charts/episodic_length"] == [30, 30]


def test_the_readme_knows_the_lengths_of_its_diffs():
    found = re.findall(r"^    diff (\S+) (\S+) .*# about (\d+)", (REPOSITORY / "README.md").read_text(), re.MULTILINE)
    assert len(found) == 3
    for one, other, count in found:
        lines = subprocess.run(["diff", REPOSITORY / one, REPOSITORY / other], capture_output=True, text=True).stdout
        assert abs(len(re.findall("^[<>]", lines, re.MULTILINE)) - int(count)) <= 20, (one, other)


def test_the_algorithm_can_be_copied():
    """`vtrace` and `tv_filter` need torch and nothing else."""
    own = {"torch": torch}
    for function in (vaco_async_mujoco.vtrace, vaco_async_mujoco.tv_filter):
        exec(inspect.getsource(function), own)
    rows = torch.rand(5, 3), torch.rand(5, 3), torch.rand(6, 3), torch.zeros(5, 3), torch.zeros(5, 3)
    expected = vaco_async_mujoco.vtrace(*rows, 0.99, 0.95, 1.0, 1.0)
    for copied, original in zip(own["vtrace"](*rows, 0.99, 0.95, 1.0, 1.0), expected, strict=True):
        assert torch.equal(copied, original)
    keep, _ = own["tv_filter"](torch.tensor([1.5, 1.5]), torch.tensor([1.0, -1.0]), 0.2)
    assert keep.tolist() == [False, True]


@pytest.mark.parametrize("name", ["text", "nowhere", "checkpoint", "sibling", "damaged"])
def test_files_that_are_no_model_are_one_line(name):
    Path("text").write_text("step,return\n1,2\n")
    torch.save({"model": torch.zeros(2)}, "checkpoint")
    torch.save({"script": "vaco_async_atari.py"}, "sibling")
    vaco_async_mujoco.save_model("damaged", Args(), agent := vaco_async_mujoco.build(Args())[0]())
    content = bytearray(Path("damaged").read_bytes())
    content[content.index(agent.critic[0].weight.detach().numpy().tobytes()) + 100] ^= 1  # one bit of one weight
    Path("damaged").write_bytes(content)
    with pytest.raises(UsageError) as caught:
        load_model(name)
    message = str(caught.value)
    assert name != "sibling" or "a file of vaco_async_atari.py, not of vaco_async_mujoco.py" in message
    assert message.startswith(f"--evaluate {name}: ") and "\n" not in message and len(message) < 250


def test_the_command_line_evaluates_with_the_models_flags():
    args = Args(env_id="InvertedPendulum-v4", **SMALL)
    vaco_async_mujoco.save_model("model", args, vaco_async_mujoco.build(args)[0]())
    command = [sys.executable, REPOSITORY / "vaco_async_mujoco.py", "--evaluate", "model", "--eval-episodes", "2"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and len(re.findall(r"^evaluation, .* of 2: ", result.stdout, re.MULTILINE)) == 2
    with pytest.raises(UsageError, match="--env-id Hopper-v4: the model has learnt InvertedPendulum-v4"):
        evaluate(Args(env_id="Hopper-v4", evaluate="model"))
    command[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (
        result.returncode == 0 and len(re.findall(r"^evaluation, ", result.stdout, re.MULTILINE)) == 2
    )  # by one of them


@pytest.mark.slow
def test_the_example_of_the_readme_learns_in_both_loops():
    """The same policy before training gets about -40 (a point that stays where it is, on average)."""
    command = [sys.executable, REPOSITORY / "benchmark" / "custom_env.py"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    (trained,) = re.findall(r" return (-?[\d.]+), mean of", result.stdout)
    first, last = re.findall(r"loop of your own, batch \d+: return (-?[\d.]+)", result.stdout)
    assert float(trained) > -15 and float(last) > float(first) + 10


def test_a_module_that_cannot_be_imported_is_named(monkeypatch):
    monkeypatch.syspath_prepend(".")
    Path("broken.py").write_text("import nothing_of_that_name")
    for env_id, reason in (("nowhere:X-v0", "No module named 'nowhere'"), ("broken:X-v0", "'nothing_of_that_name'")):
        with pytest.raises(UsageError, match=f"^--env-id {env_id}: cannot import .*{reason}.*PYTHONPATH"):
            train(Args(env_id=env_id))


def size_and_frames(path):
    ffmpeg = pytest.importorskip("imageio_ffmpeg")
    frames = ffmpeg.read_frames(path)
    return next(frames)["size"], sum(1 for _ in frames)


@pytest.mark.skipif(not find_library("EGL"), reason="MuJoCo cannot render without EGL")
def test_mujoco_is_filmed_without_a_display(capfd):
    pytest.importorskip("imageio_ffmpeg")
    args = Args(env_id="InvertedPendulum-v4", evaluate="model", eval_episodes=1, capture_video=True)
    vaco_async_mujoco.save_model("model", args, vaco_async_mujoco.build(args)[0]())
    before = os.environ.get("LD_PRELOAD", "")
    (length,) = evaluate(args)["deterministic"]
    assert size_and_frames("model.mp4") == ((480, 480), length)
    assert f"episode, return {length:.1f}: model.mp4" in capfd.readouterr().out and os.environ["LD_PRELOAD"] == before


RENDERED = """
import time
import gymnasium as gym
import numpy as np

class Gray(gym.Env):
    observation_space, action_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Box(-1, 1, (1,))
    metadata, render_mode = {"render_modes": ["rgb_array"]}, "rgb_array"

    def __init__(self, render_mode=None, pause=0):
        self.pause = pause

    def reset(self, *, seed=None, options=None):
        return np.zeros(2, dtype=np.float32), {}

    def step(self, action):
        return np.zeros(2, dtype=np.float32), 1.0, False, False, {}

    def render(self):
        time.sleep(self.pause)
        return np.full((64, 96, 3), 128, dtype=np.uint8)

gym.register("Gray-v0", Gray, max_episode_steps=12)
gym.register("Slow-v0", Gray, max_episode_steps=1000, kwargs={"pause": 0.5})
"""


def rendered_model(env_id, monkeypatch):
    """A model of an environment that renders; returns the flags that film it."""
    pytest.importorskip("imageio_ffmpeg")
    Path("rendered.py").write_text(RENDERED)
    monkeypatch.syspath_prepend(os.getcwd())
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    args = Args(env_id=f"rendered:{env_id}", evaluate="model", eval_episodes=1, capture_video=True)
    vaco_async_mujoco.save_model("model", args, vaco_async_mujoco.build(args)[0]())
    return args


def test_an_environment_of_gymnasium_that_renders_is_filmed(monkeypatch):
    assert evaluate(rendered_model("Gray-v0", monkeypatch))["sampled"] == [12.0]
    assert size_and_frames("model.mp4") == ((96, 64), 12)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_filming_ends_with_the_evaluation(number, monkeypatch):
    rendered_model("Slow-v0", monkeypatch)
    command = [sys.executable, REPOSITORY / "vaco_async_mujoco.py", "--evaluate", "model", "--capture-video"]
    process = subprocess.Popen([*command, "--eval-episodes", "1"], start_new_session=True)
    deadline = time.monotonic() + 120
    while not os.path.exists("model.mp4.part.mp4"):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(number)
    assert process.wait(60) != 0
    while processes_of_session(process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert number == signal.SIGKILL or not list(Path().glob("*.part.mp4"))


def test_an_id_without_its_module_means_the_same_environment(own_env):
    """As a program that registers the environment itself and trains on Reach-v0 has saved it."""
    args = Args(env_id="Reach-v0", **SMALL)
    agent = vaco_async_mujoco.build(replace(args, env_id=own_env))[0]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vaco_async_mujoco, "build", lambda _: (partial(vaco_async_mujoco.Agent, 4, 2), None))
        vaco_async_mujoco.save_model("model", args, agent)
    assert len(evaluate(Args(env_id=own_env, evaluate="model", eval_episodes=1))["sampled"]) == 1
    vaco_async_mujoco.check_resume(replace(args, env_id=own_env), {"args": args, "global_step": 1})
    with pytest.raises(UsageError, match=r"^--env-id other:Reach-v1: the checkpoint's is Reach-v0"):
        vaco_async_mujoco.check_resume(replace(args, env_id="other:Reach-v1"), {"args": args, "global_step": 1})
    assert not vaco_async_mujoco.same_task("other:Reach-v0", own_env)


def test_atari_is_filmed_in_colour_at_full_resolution():
    pytest.importorskip("imageio_ffmpeg")
    args, seen = vaco_async_atari.Args(env_id="Pong-v5"), []

    def short(agent, envs, see):
        for _ in range(9):
            seen.append(envs.envs.render()[0])
            see(np.ascontiguousarray(seen[-1]))
        return [0.0]

    make_agent, make_envs = vaco_async_atari.build(args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vaco_async_atari, "play", short)
        patch.setattr(vaco_async_atari, "leave_with_parent", lambda: None)  # `film` has no process of its own here
        patch.setattr(vaco_async_atari.signal, "signal", lambda *_: None)
        vaco_async_atari.film(make_agent(), partial(make_envs, 1, 1), "run.mp4")
    assert size_and_frames("run.mp4") == ((160, 210), 9)
    assert (seen[0][..., 0] != seen[0][..., 1]).any()


def test_without_a_renderer_there_is_a_line_and_no_video(monkeypatch, capfd, own_env):
    """Reach has none."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: name == "imageio_ffmpeg" or find(name, *rest))
    args = Args(env_id=own_env, evaluate="model", eval_episodes=1, capture_video=True)
    vaco_async_mujoco.save_model("model", args, vaco_async_mujoco.build(args)[0]())
    assert len(evaluate(args)["sampled"]) == 1
    assert f"no video: {own_env} cannot be rendered here" in capfd.readouterr().err and not os.path.exists("model.mp4")


@pytest.mark.parametrize("script", [*SCRIPTS, "vaco_async_llm"])
def test_help_is_at_most_100_columns_with_examples_and_headings(script, monkeypatch, capsys):
    module = importlib.import_module(script)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--help"])
    with pytest.raises(SystemExit) as caught:
        (module.parsed_flags if script == "vaco_async_llm" else module.typed_flags)()
    lines = capsys.readouterr().out.splitlines()
    assert caught.value.code == 0 and max(map(len, lines)) <= 100
    assert lines[0] == module.__doc__.splitlines()[0] and lines[2] == "Examples:"
    assert all(line.startswith(f"    python {script}.py") for line in lines[3 : lines.index("", 3)])
    assert lines.index("", 3) >= 3 + 4
    places = [lines.index(f" {heading}") for heading in module.HEADINGS.values()]
    assert len(places) >= 7 and places == sorted(places)
    for name, place in zip(module.HEADINGS, places, strict=True):
        assert lines[place - 1] == "" and lines[place + 1].split()[0].rstrip(",") == f"--{name.replace('_', '-')}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_tensorboard_shows_curves_side_by_side_that_there_are(script):
    module = importlib.import_module(script)
    env_id = "Freeway-v5" if script == "vaco_async_atari" else "InvertedPendulum-v4"
    module.train(module.Args(env_id=env_id, total_timesteps=60, **SMALL))
    (run,) = Path("runs").iterdir()
    events = EventAccumulator(str(run))
    events.Reload()
    layout = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0].decode("latin1")
    curves = [tag for chart in module.LAYOUT["policy lag"].values() for tag in chart[1]]
    assert {"charts/episodic_return", "lag/versions_mean", "lag/tv_total"} <= set(curves)
    assert all(tag in layout for tag in curves)
    assert set(curves) - {"charts/episodic_return"} <= set(events.Tags()["scalars"])


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_is_tracked_offline(script, tracked, monkeypatch):
    module = importlib.import_module(script)
    monkeypatch.setattr(module, "evaluate", lambda args: {"sampled": [1.0]})  # a game of Freeway takes minutes
    env_id = "Freeway-v5" if script == "vaco_async_atari" else "InvertedPendulum-v4"
    flags = {"env_id": env_id, "total_timesteps": 200, "track": True, "wandb_project_name": "lag", "save_model": True}
    module.train(module.Args(**flags | SMALL))
    (run,) = Path("runs").iterdir()
    tracked(b"lag/tv_total", b"eval/sampled_return", run.name.encode())


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(vaco_async_mujoco.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"^--track: type pip install wandb, or leave"):
        train(Args(track=True))
    with pytest.raises(UsageError, match=r"^--capture-video: type pip install imageio-ffmpeg, or leave"):
        train(Args(capture_video=True))


def test_runs_that_begin_in_the_same_second_have_folders_of_their_own(monkeypatch):
    """As the tasks of an array job, which differ in their lag, do: their curves must not be mixed up."""
    monkeypatch.setattr(time, "time", lambda: 1234.5)
    folders = [vaco_async_mujoco.run_folder(Args(lag=lag), "Hopper-v4")[0] for lag in range(3)]
    assert len({os.path.realpath(folder) for folder in folders}) == len(list(Path("runs").iterdir())) == 3


@pytest.mark.parametrize("script", [*SCRIPTS, "vaco_async_llm"])
def test_what_few_use_is_imported_only_then(script):
    few = ["wandb", "imageio_ffmpeg", "datasets"]
    few += ["torch._dynamo"]  # with it every actor would take another second to start, and 130 MB more
    code = f"import sys, {script}; print([name for name in {few} if name in sys.modules])"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True).stdout == "[]\n"


def test_a_run_that_is_to_be_filmed_saves_evaluates_and_films(monkeypatch):
    seen = []
    monkeypatch.setattr(vaco_async_mujoco, "evaluate", lambda args: seen.append(args) or {"sampled": [1.0, 3.0]})
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: name == "imageio_ffmpeg" or find(name, *rest))
    train(Args(env_id="InvertedPendulum-v4", total_timesteps=60, capture_video=True, **SMALL))
    (args,) = seen
    assert args.capture_video and args.evaluate == saved_model() and not (args.track or args.save_model or args.resume)
    assert read_curves(".")["eval/sampled_return"] == [2.0]


def test_an_evaluation_with_flags_that_it_would_leave_out_is_refused(monkeypatch):
    find, there = importlib.util.find_spec, {"imageio_ffmpeg", "wandb"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: name in there or find(name, *rest))
    for flags in ({"track": True}, {"save_model": True}, {"resume": "runs/1"}):
        with pytest.raises(UsageError, match=r"^--evaluate model: .* leave out --resume, --track and --save-model"):
            vaco_async_mujoco.validate(Args(evaluate="model", **flags))
