"""What comes with a run: saved models, their evaluation and video, tracking, and environments of one's own."""

import importlib
import inspect
import re
import subprocess
import sys
from ctypes.util import find_library
from pathlib import Path

import envpool
import numpy as np
import pytest
import torch
from conftest import REPOSITORY, read_curves

import vaco_async_mujoco
from vaco_async_mujoco import Args, ContinuousEnvs, continuous_sizes, train

sys.path.insert(0, str(REPOSITORY / "benchmark"))
import evaluate

SCRIPTS = ["vaco_async_mujoco", "vaco_async_atari", "ppo_async_baseline", "impala_baseline"]
SMALL = {"num_actors": 1, "num_envs": 4, "num_steps": 16, "num_minibatches": 4, "update_epochs": 1}
SHORT = {"env_id": "InvertedPendulum-v4", "total_timesteps": 60} | SMALL


def the_run():
    (run,) = Path("runs").iterdir()
    return run


def short_run(script):
    module = importlib.import_module(script)
    env_id = "Freeway-v5" if script == "vaco_async_atari" else "InvertedPendulum-v4"
    return module.train(module.Args(**SHORT | {"env_id": env_id}))


@pytest.fixture
def own_env(monkeypatch):
    """The environment of benchmark/custom_env.py, by a name that actors can import, too."""
    monkeypatch.syspath_prepend(REPOSITORY / "benchmark")
    return "custom_env:Reach-v0"


def test_evaluation_agrees_with_training_on_an_environment_of_ones_own(own_env):
    """Observations are about 50 +- 10: without its statistics the agent is no better than at the start."""
    train(Args(env_id=own_env, total_timesteps=30_000, num_actors=1, update_epochs=5, lag_schedule="fixed"))
    returns = read_curves(".")["charts/episodic_return"]
    results = evaluate.evaluate(evaluate.Args(the_run(), episodes=50))
    assert returns[0] < -30 and np.mean(returns[-5:]) > -15
    assert np.mean(results["sampled"]) == pytest.approx(np.mean(returns[-5:]), abs=4)
    assert np.mean(results["deterministic"]) > np.mean(results["sampled"]) - 2
    assert len(results["sampled"]) == len(set(results["sampled"])) == 50  # different episodes


def test_a_checkpoint_is_all_that_it_takes_to_act():
    """Deterministic returns are those of a policy computed by hand, from the weights alone."""
    agent = train(Args(**SHORT | {"env_id": "Hopper-v4", "total_timesteps": 500}))
    run = the_run()
    model = torch.load(run / "checkpoint.pt", weights_only=True)["agent"]
    assert all(torch.equal(model[name], tensor) for name, tensor in agent.state_dict().items())
    weights = {name: tensor.double().numpy() for name, tensor in model.items()}
    returns = []
    for seed in (7, 8):
        env = envpool.make("Hopper-v4", "gymnasium", num_envs=1, seed=seed)
        obs, _ = env.reset()
        total, done = 0.0, False
        while not done:
            hidden = np.clip((obs - weights["obs_mean"]) / weights["obs_std"], -10, 10)
            for layer in (0, 2, 4):
                hidden = hidden @ weights[f"actor_mean.{layer}.weight"].T + weights[f"actor_mean.{layer}.bias"]
                hidden = np.tanh(hidden) if layer < 4 else hidden
            obs, (reward,), (terminated,), (truncated,), _ = env.step(np.clip(hidden, -1, 1))
            total += reward
            done = terminated or truncated
        returns.append(total)
    results = evaluate.evaluate(evaluate.Args(run, episodes=2, seed=7))
    np.testing.assert_allclose(results["deterministic"], returns, atol=0.2)


@pytest.mark.parametrize("script", ["ppo_async_baseline", "impala_baseline"])
def test_a_run_of_every_script_is_evaluated_whatever_its_name(script, capsys):
    module = importlib.import_module(script)
    module.train(module.Args(**SHORT, exp_name="some_name"))
    args = evaluate.Args(the_run(), episodes=2)
    results = evaluate.evaluate(args)
    assert results == evaluate.evaluate(args)
    printed = capsys.readouterr().out
    assert f", {script}, after " in printed
    assert f"sampled: return {np.mean(results['sampled']):.4g} +- {np.std(results['sampled']):.4g} of 2: " in printed


@pytest.mark.parametrize("script", ["vaco_async_atari", "ppo_async_baseline"])
def test_whole_games_are_evaluated_in_raw_score(script):
    """A game of MsPacman has several lives, and points of 10 and more; the policy is an untrained one."""
    module = importlib.import_module(script)
    args = module.Args(env_id="MsPacman-v5", exp_name=script)
    agent = module.CnnAgent(9)
    torch.save({"args": vars(args), "agent": agent.state_dict(), "global_step": 0}, "checkpoint.pt")
    results = evaluate.evaluate(evaluate.Args(Path(), episodes=1))
    assert all(score >= 60 and score % 10 == 0 for scores in results.values() for score in scores)


@pytest.mark.parametrize("atari", [False, True])
def test_the_greedy_action_is_the_most_likely_one(atari):
    if atari:
        agent = importlib.import_module("vaco_async_atari").CnnAgent(6)
        obs = torch.randint(255, (5, 84, 84, 4), dtype=torch.uint8)
    else:
        agent = vaco_async_mujoco.MlpAgent(11, 3)
        obs = torch.randn(5, 11)
    actions, logprobs = agent.act(obs, greedy=True)
    assert torch.equal(actions, agent.act(obs, greedy=True)[0])
    for _ in range(20):
        others, other_logprobs = agent.act(obs)
        assert (logprobs >= other_logprobs).all() and actions.shape == others.shape


def test_weights_of_another_size_are_one_error(capsys):
    args = vaco_async_mujoco.Args(env_id="Hopper-v4")
    torch.save(
        {"args": vars(args), "agent": vaco_async_mujoco.MlpAgent(4, 3).state_dict(), "global_step": 0}, "checkpoint.pt"
    )
    with pytest.raises(SystemExit) as caught:
        evaluate.evaluate(evaluate.Args(Path()))
    assert caught.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_what_is_no_run_is_one_error(tmp_path):
    with pytest.raises(ValueError, match="nowhere: is not the folder of a run"):
        evaluate.Args(Path("nowhere"))
    torch.save({"args": {"exp_name": "mine", "a_flag": 1}, "agent": {}, "global_step": 0}, "checkpoint.pt")
    with pytest.raises(SystemExit, match="no script has the flags of this run"):
        evaluate.evaluate(evaluate.Args(tmp_path))


def test_gymnasium_resets_on_the_next_step_as_envpool_does(own_env):
    """32 steps of environments whose episodes have 30: marks, returns and lengths, and seeds that are their own."""
    envs = ContinuousEnvs(own_env, 2, seed=7)
    (alone,) = ContinuousEnvs(own_env, 1, seed=8).obs
    np.testing.assert_array_equal(envs.obs[1], alone)
    for t in range(32):
        assert envs.valid.all() == (t != 30)
        fields, episodes = envs.step(np.full((2, 2), 9.0))  # clipped to 1
        assert len(episodes) == 2 * (t == 29)
        assert not fields["terminated"].any() and fields["truncated"].all() == (t == 29)
        if t == 29:
            assert [length for _, length in episodes] == [30, 30]
        if t == 30:
            assert not fields["rewards"].any() and (envs.obs[:, :2] != 60).all()  # a new start, not the corner reached
    assert continuous_sizes(own_env) == (4, 2)


@pytest.mark.parametrize("script", ["ppo_async_baseline", "impala_baseline"])
def test_baselines_play_an_environment_of_ones_own(script, own_env):
    module = importlib.import_module(script)
    module.train(module.Args(env_id=own_env, total_timesteps=200, **SMALL | {"num_steps": 32}))
    assert read_curves(".")["charts/episodic_length"] == [30, 30]


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


@pytest.mark.slow
def test_the_example_of_the_readme_learns_in_both_loops():
    """The same policy before training gets about -40 (a point that stays where it is, on average)."""
    command = [sys.executable, REPOSITORY / "benchmark" / "custom_env.py"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    (trained,) = re.findall(r"seed 1: return (-?[\d.]+)", result.stdout)
    first, last = re.findall(r"loop of your own, batch \d+: return (-?[\d.]+)", result.stdout)
    assert float(trained) > -15 and float(last) > float(first) + 10


def size_and_frames(path):
    frames = pytest.importorskip("imageio_ffmpeg").read_frames(path)
    return next(frames)["size"], sum(1 for _ in frames)


@pytest.mark.skipif(not find_library("EGL"), reason="MuJoCo cannot render without EGL")
def test_mujoco_is_filmed_without_a_display():
    """From the command line, since envpool must not be there before EGL."""
    pytest.importorskip("imageio_ffmpeg")
    train(Args(**SHORT))
    command = [
        sys.executable,
        REPOSITORY / "benchmark" / "evaluate.py",
        the_run(),
        "--episodes",
        "1",
        "--capture-video",
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    length = float(re.search(r"deterministic: return .* of 1: ([\d.]+)", result.stdout)[1])
    assert size_and_frames(str(the_run() / "episode.mp4")) == ((480, 480), length)


RENDERED = """
import gymnasium as gym
import numpy as np

class Gray(gym.Env):
    observation_space, action_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Box(-1, 1, (1,))
    metadata, render_mode = {"render_modes": ["rgb_array"], "render_fps": 20}, "rgb_array"

    def __init__(self, render_mode=None):
        pass

    def reset(self, *, seed=None, options=None):
        return np.zeros(2, dtype=np.float32), {}

    def step(self, action):
        return np.zeros(2, dtype=np.float32), 1.0, False, False, {}

    def render(self):
        return np.full((64, 96, 3), 128, dtype=np.uint8)

gym.register("Gray-v0", Gray, max_episode_steps=12)
"""


def test_an_environment_of_gymnasium_that_renders_is_filmed(monkeypatch):
    pytest.importorskip("imageio_ffmpeg")
    Path("rendered.py").write_text(RENDERED)
    monkeypatch.syspath_prepend(Path.cwd())
    args = Args(env_id="rendered:Gray-v0")
    agent = vaco_async_mujoco.MlpAgent(2, 1)
    torch.save({"args": vars(args), "agent": agent.state_dict(), "global_step": 0}, "checkpoint.pt")
    assert evaluate.evaluate(evaluate.Args(Path(), episodes=1, capture_video=True))["sampled"] == [12.0]
    assert size_and_frames("episode.mp4") == ((96, 64), 12)


def test_atari_is_filmed_in_colour_at_full_resolution(monkeypatch):
    pytest.importorskip("imageio_ffmpeg")
    module = importlib.import_module("vaco_async_atari")
    seen = []

    def short(agent, envs, greedy, on_frame):
        for _ in range(9):
            seen.append(np.ascontiguousarray(envs.envs.render()[0]))
            on_frame(seen[-1])
        return 0.0

    monkeypatch.setattr(evaluate, "play", short)  # a game takes a minute
    evaluate.film(None, module.AtariEnvs("Pong-v5", 1, 1, render_mode="rgb_array"), "run.mp4")
    assert size_and_frames("run.mp4") == ((160, 210), 9)
    assert (seen[0][..., 0] != seen[0][..., 1]).any()


def test_a_run_is_tracked_offline(tracked):
    train(Args(**SHORT | {"total_timesteps": 200}, track=True))
    tracked(b"lag/tv_total", the_run().name.encode())


def test_a_name_that_the_tracking_service_refuses_is_its_own_reason(monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(Exception, match="cannot contain"):
        train(Args(**SHORT, track=True, exp_name="what#now"))
    assert not Path("runs").exists()


@pytest.mark.parametrize("script", [*SCRIPTS, "vaco_async_llm"])
def test_what_few_use_is_imported_only_then(script):
    few = ["wandb", "imageio_ffmpeg", "datasets"]
    few += ["torch._dynamo"]  # with it every actor would take another second to start, and 130 MB more
    code = f"import sys, {script}; print([name for name in {few} if name in sys.modules])"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True).stdout == "[]\n"
