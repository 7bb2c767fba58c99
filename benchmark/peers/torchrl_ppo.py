"""TorchRL's PPO from its own parts, as in its examples, at the same gradient steps per sample; for its speed alone."""

import sys

import torch
import torch.nn as nn
from tensordict.nn import AddStateIndependentNormalScale, TensorDictModule
from torch.utils.tensorboard import SummaryWriter
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.data.replay_buffers.samplers import SamplerWithoutReplacement
from torchrl.envs import ClipTransform, DoubleToFloat, RewardSum, StepCounter, TransformedEnv, VecNorm
from torchrl.envs.libs.gym import GymEnv
from torchrl.modules import IndependentNormal, ProbabilisticActor, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value.advantages import GAE

total_steps, folder = int(sys.argv[1]), sys.argv[2]


def mlp(size):
    return nn.Sequential(nn.Linear(17, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, size))


def main():
    torch.set_num_threads(1)
    env = TransformedEnv(GymEnv("HalfCheetah-v4"))
    env.append_transform(DoubleToFloat())
    env.append_transform(VecNorm(in_keys=["observation"]))
    env.append_transform(ClipTransform(in_keys=["observation"], low=-10, high=10))
    env.append_transform(RewardSum())
    env.append_transform(StepCounter())
    network = nn.Sequential(mlp(6), AddStateIndependentNormalScale(6))
    actor = ProbabilisticActor(
        TensorDictModule(network, in_keys=["observation"], out_keys=["loc", "scale"]),
        in_keys=["loc", "scale"],
        spec=env.action_spec,
        distribution_class=IndependentNormal,
        return_log_prob=True,
    )
    critic = ValueOperator(mlp(1), in_keys=["observation"])
    collector = Collector(env, actor, frames_per_batch=2048, total_frames=total_steps)
    advantages = GAE(gamma=0.99, lmbda=0.95, value_network=critic, average_gae=False)
    loss_module = ClipPPOLoss(
        actor, critic, clip_epsilon=0.2, entropy_coeff=0.0, critic_coeff=0.5, normalize_advantage=True
    )
    optimizer = torch.optim.Adam(loss_module.parameters(), lr=3e-4, eps=1e-5)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(2048), sampler=SamplerWithoutReplacement(), batch_size=64)
    writer = SummaryWriter(folder)
    steps = 0
    for data in collector:
        steps += data.numel()
        for _ in range(10):
            with torch.no_grad():
                advantages(data)
            buffer.extend(data.reshape(-1))
            for batch in buffer:
                losses = loss_module(batch)
                optimizer.zero_grad()
                (losses["loss_objective"] + losses["loss_critic"]).backward()
                nn.utils.clip_grad_norm_(loss_module.parameters(), 0.5)
                optimizer.step()
        writer.add_scalar("losses/policy_loss", losses["loss_objective"].item(), steps)
    collector.shutdown()


if __name__ == "__main__":
    main()
