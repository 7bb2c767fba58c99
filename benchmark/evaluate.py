"""Plays whole episodes with the policy of a run, or answers the held-out problems with its language model.

    python benchmark/evaluate.py runs/RUN --episodes 20
    python benchmark/evaluate.py runs/RUN --capture-video    # pip install imageio-ffmpeg; MuJoCo needs libEGL, too

Everything comes from the run's checkpoint.pt: its flags, the weights, and the statistics of observations, which stay
frozen. The policy takes the most likely actions first, then sampled ones, in the same episodes: number i has the seed
`--seed` + i. Returns are not scaled. In Atari games they are the scores of whole games. A language model answers once
with the most likely tokens, once with sampled ones. An environment of your own is imported from the current folder.
Results are printed, and all of them are written to RUN/evaluation.json.
"""

import ctypes
import importlib
import json
import math
import sys
from ctypes.util import find_library
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import tyro

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPTS = ("vaco_async_mujoco", "vaco_async_atari", "ppo_async_baseline", "impala_baseline", "vaco_async_llm")


@dataclass
class Args:
    run: tyro.conf.Positional[Path]  # the folder of a run, with a checkpoint.pt
    episodes: int = 10  # episodes with the most likely actions, and as many with sampled ones
    seed: int = 1  # seed of the first episode and of what is sampled
    capture_video: bool = False  # if toggled, the first episode is filmed, too: RUN/episode.mp4
    script: str = ""  # the script of the run; found by the run's flags, if it is not one of your own

    def __post_init__(self):
        if not Path(self.run, "checkpoint.pt").exists():
            raise ValueError(f"{self.run}: is not the folder of a run, with a checkpoint.pt")
        if self.episodes < 1:
            raise ValueError(f"--episodes {self.episodes}: must be at least 1")


def script_of(args, flags):
    """The module whose run has these flags: --script, or the file that the experiment is named after, or what fits."""
    own = any(Path(folder, f"{flags['exp_name']}.py").exists() for folder in (Path.cwd(), REPOSITORY))
    if args.script or own:
        return importlib.import_module(args.script.removesuffix(".py") or flags["exp_name"])
    for name in SCRIPTS:
        script = importlib.import_module(name)
        if {field.name for field in fields(script.Args)} == set(flags):
            return script
    sys.exit(f"error: {args.run}: no script has the flags of this run, give its script by --script")


def build(script, flags, weights):
    """The agent of a run, and the function that makes its environments, of their number and seed."""
    if "actor_logstd" in weights:
        agent = script.MlpAgent(*script.continuous_sizes(flags.env_id))
        make_envs = partial(script.ContinuousEnvs, flags.env_id)
    else:
        agent = script.CnnAgent(int(script.envpool.make_spec(flags.env_id).action_space.n), flags.bf16)
        names = ("episodic_life", "reward_clip", "repeat_action_probability")
        make_envs = partial(script.AtariEnvs, flags.env_id, **{name: getattr(flags, name) for name in names})
    try:
        agent.load_state_dict(weights)
    except RuntimeError as error:
        print(f"error: the environment has changed since: {str(error).splitlines()[-1].strip()}", file=sys.stderr)
        sys.exit(2)
    return agent, make_envs


def play(agent, envs, greedy, on_frame=None):
    """Play one whole episode in a single environment, with the most likely actions or with sampled ones, and return its
    return. `on_frame` is called with each frame [height, width, 3]."""
    episodes = []
    with torch.inference_mode():
        while not episodes:
            if on_frame:
                on_frame(np.ascontiguousarray(envs.envs.render()[0]))
            actions, _ = agent.act(torch.from_numpy(envs.obs), greedy)
            _, episodes = envs.step(actions.numpy())
    return float(episodes[0][0])


def film(agent, envs, path):
    """Film one episode with the most likely actions, at the speed at which an environment of gymnasium is meant to be
    seen, and Atari games, of which only every fourth frame is there, at 15 frames per second."""
    import imageio_ffmpeg

    height, width, _ = envs.envs.render()[0].shape
    metadata = getattr(envs.envs, "metadata", None) or {}
    fps = metadata.get("render_fps", 15 if envs.obs.dtype == np.uint8 else 30)
    writer = imageio_ffmpeg.write_frames(str(path), (width, height), fps=fps, macro_block_size=2)
    writer.send(None)
    episode_return = play(agent, envs, greedy=True, on_frame=writer.send)
    writer.close()
    print(f"video of an episode with the most likely actions, return {episode_return:.4g}: {path}")


def evaluate_episodes(args, script, flags, weights):
    """Returns {"deterministic": [return of each episode], "sampled": ...}, printed, too."""
    agent, make_envs = build(script, flags, weights)
    torch.manual_seed(args.seed)
    results = {}
    for name, greedy in (("deterministic", True), ("sampled", False)):
        returns = [play(agent, make_envs(1, args.seed + i), greedy) for i in range(args.episodes)]
        each = " ".join(f"{episode_return:.4g}" for episode_return in returns)
        print(f"{name}: return {np.mean(returns):.4g} +- {np.std(returns):.4g} of {len(returns)}: {each}", flush=True)
        results[name] = returns
    if args.capture_video:
        film(agent, make_envs(1, args.seed, render_mode="rgb_array"), args.run / "episode.mp4")
    return results


def evaluate_language_model(args, script, flags, weights):
    """Returns {"greedy": share of held-out problems that is solved, "sampled": ...}, printed, too."""
    if Path(args.run, "model").exists():  # --save-model's: the checkpoint has no architecture and no tokenizer
        flags.model = str(args.run / "model")
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() and flags.cuda else "cpu")
    problems = script.Problems(flags)
    model, tokenizer = script.load_language_model(flags, problems)
    agent = script.Agent(model.config, model.generation_config, tokenizer, flags, device)
    agent.load_state_dict(weights)
    results = {}
    for name, sample in (("greedy", False), ("sampled", True)):
        share = results[name] = script.accuracy(agent, problems, device, sample)
        error = math.sqrt(share * (1 - share) / len(problems.test))  # standard error
        print(f"{name}: accuracy {share:.1%} +- {error:.1%} of {len(problems.test)} held-out problems", flush=True)
    return results


def evaluate(args):
    sys.path[:0] = [str(Path.cwd()), str(REPOSITORY)]
    if args.capture_video and find_library("EGL"):  # before envpool, whose MuJoCo does not find it by itself
        ctypes.CDLL(find_library("EGL"), mode=ctypes.RTLD_GLOBAL)
    saved = torch.load(args.run / "checkpoint.pt", map_location="cpu", weights_only=True)
    script, flags = script_of(args, saved["args"]), SimpleNamespace(**saved["args"])
    print(f"{args.run}, {script.__name__}, after {saved['global_step']} steps", flush=True)
    how = evaluate_language_model if hasattr(script, "load_language_model") else evaluate_episodes
    results = how(args, script, flags, saved["agent"])
    Path(args.run, "evaluation.json").write_text(json.dumps(results))
    return results


if __name__ == "__main__":
    evaluate(tyro.cli(Args, description=__doc__))
