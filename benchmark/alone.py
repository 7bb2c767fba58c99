"""The speed limits of a script: its learner without actors, its actors without a learner, its environments alone.

    python benchmark/alone.py learner vaco_async_mujoco --seconds 30 [any flag of the script]
    python benchmark/alone.py actors vaco_async_atari --seconds 30 --bf16
    python benchmark/alone.py envpool vaco_async_atari --seconds 30

`learner` trains over and over on the rollouts of the first batch, which are there at once; `actors` collects batches
with the first policy and throws them away; `envpool` steps the same environments with random actions, one process per
core. Prints steps per second, without start-up and the first 3 batches.
"""

import importlib
import multiprocessing as mp
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import envpool
import numpy as np
import tyro

WARM_UP = 3  # batches that do not count


class Done(Exception):
    """Time is up; the message is the result."""


def alone(script, part, seconds):
    """`script.Actors` with the other side taken away, which raises Done after some seconds."""

    class Alone(script.Actors):
        batches, begun, messages = 0, None, None

        def count(self):
            self.batches += 1
            if self.batches == WARM_UP:
                self.begun = time.perf_counter()
            elif self.begun and time.perf_counter() - self.begun > seconds:
                args, batches = self.args, self.batches - WARM_UP
                samples = args.rollouts_per_batch * args.num_steps * args.num_envs
                raise Done(f"{part} alone: {batches * samples / (time.perf_counter() - self.begun):.0f} steps/s")

        def collect(self, batch):
            if part == "actors":
                while messages := super().collect(self.batches):  # none: a signal ends the run
                    self.issue(newest=0, freed=[message[0] for message in messages])
                    self.count()
                return []
            if self.messages is None:
                self.messages = super().collect(batch)
                self.stop()
            self.count()
            return self.messages

        def issue(self, newest, freed=()):
            if part == "actors" or self.messages is None:  # the learner's first batch
                super().issue(newest, freed)

    return Alone


def bare(env_id, num_envs, seed, seconds):
    """Steps per second of one process that steps environments with random actions."""
    envs = envpool.make(env_id, "gymnasium", num_envs=num_envs, num_threads=1, seed=seed)
    envs.reset()
    space, rng, steps, begun = envs.action_space, np.random.default_rng(seed), 0, time.perf_counter()
    while time.perf_counter() - begun < seconds:
        discrete = hasattr(space, "n")
        shape = num_envs if discrete else (num_envs, *space.shape)
        envs.step((rng.integers(0, space.n, shape) if discrete else rng.uniform(-1, 1, shape)).astype(space.dtype))
        steps += num_envs
    return steps / (time.perf_counter() - begun)


def main():
    part, name = sys.argv[1:3]
    sys.path.insert(0, str(Path(__file__).parent.parent))
    script = importlib.import_module(name)
    flags = sys.argv[3:]
    seconds = float(flags.pop(flags.index("--seconds") + 1)) if "--seconds" in flags else 30
    args = tyro.cli(script.Args, args=[flag for flag in flags if flag != "--seconds"])
    if part == "envpool":
        cores = len(os.sched_getaffinity(0))
        with mp.get_context("spawn").Pool(cores) as pool:
            speeds = pool.starmap(bare, [(args.env_id, args.num_envs, seed, seconds) for seed in range(cores)])
        print(f"envpool alone: {sum(speeds):.0f} steps/s")
        return
    if part not in ("learner", "actors"):
        sys.exit(f"error: {part}: use learner, actors or envpool")
    script.Actors = alone(script, part, seconds)
    try:
        script.train(replace(args, exp_name=f"{part}_alone", total_timesteps=10**9))
    except Done as done:
        print(done)


if __name__ == "__main__":
    main()
