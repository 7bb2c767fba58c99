"""Stable-Baselines3's PPO at the same gradient steps per sample as ours; it logs its steps for throughput.py."""

import sys

import ale_py
import gymnasium
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_atari_env, make_vec_env
from stable_baselines3.common.vec_env import VecFrameStack

domain, steps, threads, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]

if __name__ == "__main__":
    import torch

    torch.set_num_threads(threads)
    common = {"n_steps": 128, "tensorboard_log": folder, "device": "cpu"}
    if domain == "mujoco":
        model = PPO("MlpPolicy", make_vec_env("HalfCheetah-v4", 16), batch_size=64, n_epochs=10, **common)
    else:
        gymnasium.register_envs(ale_py)
        envs = VecFrameStack(make_atari_env("PongNoFrameskip-v4", 8), 4)
        model = PPO("CnnPolicy", envs, batch_size=256, n_epochs=4, learning_rate=2.5e-4, clip_range=0.1, **common)
    model.learn(steps, log_interval=1)
