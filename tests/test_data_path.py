"""From the environment to the batch: rows that count, shared memory, tickets and seeds."""

import multiprocessing as mp
from functools import partial
from types import SimpleNamespace
from unittest import mock

import envpool
import gymnasium as gym
import numpy as np
import pytest
import torch

import vaco_async_mujoco
from vaco_async_mujoco import (
    LATEST,
    Actors,
    Args,
    ContinuousEnvs,
    MlpAgent,
    PolicyStore,
    actor,
    continuous_sizes,
    ticket,
    vtrace,
)


def run_actor(args, index, first_version, tickets, *arguments):
    """The function of an actor process, called here; it ends with the tickets. Returns what it has sent."""
    learner = mock.Mock()
    learner.recv.side_effect = [*tickets, EOFError]
    threads = torch.get_num_threads()
    # Without handlers, timers, and the thread that waits for the end of the learner
    with mock.patch.multiple(vaco_async_mujoco, signal=mock.Mock(), threading=mock.Mock()), pytest.raises(EOFError):
        actor(args, index, first_version, *arguments, learner)
    torch.set_num_threads(threads)
    return [call.args[0] for call in learner.send.call_args_list]


def collect(env_id, num_steps, num_envs, num_rollouts=1, seed=3, agent=None, index=0, first_version=0):
    """Slots filled by an actor, {field: [slots, T (obs: T + 1), C, ...]}, with the agent and what the actor sent."""
    obs_size, action_size = continuous_sizes(env_id)
    torch.manual_seed(0)
    agent = agent or MlpAgent(obs_size, action_size)
    store = PolicyStore(agent, num_versions=2)
    store.publish(agent, 0)
    shape = (num_rollouts, num_steps, num_envs)
    rollouts = {name: torch.zeros(shape) for name in ("logprobs", "rewards", "discounted")}
    rollouts |= {name: torch.zeros(shape, dtype=torch.bool) for name in ("terminated", "truncated", "valid")}
    rollouts["obs"] = torch.zeros(num_rollouts, num_steps + 1, num_envs, obs_size)
    rollouts["actions"] = torch.zeros(*shape, action_size)
    args = Args(num_envs=num_envs, num_steps=num_steps, num_minibatches=1)
    tickets = [(rollout, LATEST) for rollout in range(num_rollouts)]
    given_seed = seed  # so that tests can make the same environments

    def make_envs(seed):
        return ContinuousEnvs(env_id, num_envs, given_seed)

    make_agent = partial(MlpAgent, obs_size, action_size)
    messages = run_actor(args, index, first_version, tickets, make_agent, make_envs, store, rollouts)
    assert [message[:2] for message in messages] == [(rollout, 0) for rollout in range(num_rollouts)]
    return SimpleNamespace(**rollouts), agent, messages


def test_dummy_steps_are_marked_across_rollouts():
    rollouts, _, messages = collect("InvertedPendulum-v4", num_steps=16, num_envs=8, num_rollouts=6)
    names = ("valid", "terminated", "truncated", "rewards")
    valid, terminated, truncated, rewards = (vars(rollouts)[name].flatten(0, 1).numpy() for name in names)  # [6 T, C]
    done = terminated | truncated
    assert done.sum() > 20 and done[15::16].any()  # some end with a rollout's last row
    assert valid[0].all()
    np.testing.assert_array_equal(valid[1:], ~done[:-1])
    assert (rewards[~valid] == 0).all()
    assert (rewards[valid] == 1).all()  # InvertedPendulum pays 1 per step
    finished = [sorted(length for _, length in message[2]) for message in messages]
    expected, length = [], np.zeros(8)
    for rollout in range(6):
        expected.append([])
        for t in range(16 * rollout, 16 * (rollout + 1)):
            length += valid[t]
            expected[-1] += list(length[done[t]])
            length[done[t]] = 0
        expected[-1].sort()
    assert finished == expected
    assert all(episode_return == length for message in messages for episode_return, length in message[2])


def test_consecutive_rollouts_join():
    """The bootstrap observation of a rollout is the first one of the next."""
    rollouts, _, _ = collect("Hopper-v4", num_steps=8, num_envs=2, num_rollouts=3)
    assert torch.equal(rollouts.obs[:-1, -1], rollouts.obs[1:, 0])


def test_truncation_bootstraps_the_true_last_observation():
    """Pendulum-v1 is cut after 200 steps; a copy that is not cut shows what the last observation has to be."""
    rollouts, agent, _ = collect("Pendulum-v1", num_steps=210, num_envs=3, seed=5)
    assert rollouts.truncated[0, 199].all() and rollouts.truncated.sum() == 3 and not rollouts.terminated.any()
    uncut = envpool.make("Pendulum-v1", "gymnasium", num_envs=3, seed=5, num_threads=1, max_episode_steps=400)
    uncut.reset()
    for t in range(200):
        last_obs = uncut.step(np.clip(2 * rollouts.actions[0, t].numpy(), -2, 2))[0]
    np.testing.assert_allclose(rollouts.obs[0, 200].numpy(), last_obs, atol=1e-6)

    rewards, truncated = rollouts.rewards[0], rollouts.truncated[0].float()
    with torch.no_grad():
        values = agent.get_value(agent.normalize(rollouts.obs[0]))
        expected = rewards[199] + 0.9 * agent.get_value(agent.normalize(torch.tensor(last_obs))) - values[199]
    zeros = torch.zeros_like(rewards)
    _, advantages = vtrace(zeros, rewards, values, zeros, truncated, 0.9, 0.95, 1, 1)
    np.testing.assert_allclose(advantages[199].numpy(), expected.numpy(), rtol=1e-4)


@pytest.mark.parametrize("env_id", ["Humanoid-v4", "HalfCheetah-v5"])
def test_zero_lag_ratio_is_one(env_id):
    """Per sample, with weights and observation statistics as they are after some training."""
    agent = MlpAgent(*continuous_sizes(env_id))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        agent.obs_mean.normal_()
        agent.obs_std.uniform_(0.3, 3)
    rollouts, _, _ = collect(env_id, num_steps=64, num_envs=8, agent=agent)
    with torch.no_grad():
        logprobs, _, _ = agent.evaluate(agent.normalize(rollouts.obs[:, :-1]), rollouts.actions)
        ratios = (logprobs - rollouts.logprobs).exp()[rollouts.valid]
    assert (ratios - 1).abs().max() < 1e-4
    assert rollouts.actions.std() > 0.5  # the noise is there


def test_logprobs_and_entropy_are_the_gaussians():
    torch.manual_seed(2)
    agent = MlpAgent(5, 3)
    with torch.no_grad():
        agent.actor_logstd.normal_()
    obs, actions = torch.randn(7, 5), torch.randn(7, 3)
    logprobs, entropy, values = agent.evaluate(obs, actions)
    reference = torch.distributions.Normal(agent.actor_mean(obs), agent.actor_logstd.exp())
    torch.testing.assert_close(logprobs, reference.log_prob(actions).sum(-1))
    torch.testing.assert_close(entropy, reference.entropy().sum(-1).mean())
    assert values.shape == (7,)


def test_actions_are_stored_unclipped_and_clipped_for_the_environment():
    """Hopper's control cost is 1e-3 |a|^2: with the raw action the reward would be lower."""
    rollouts, _, _ = collect("Hopper-v4", num_steps=32, num_envs=4)
    assert (rollouts.actions.abs() > 1).any()
    envs = envpool.make("Hopper-v4", "gymnasium", num_envs=4, seed=3, num_threads=1)
    envs.reset()
    for t in range(32):
        rewards = envs.step(np.clip(rollouts.actions[0, t].numpy(), -1, 1).astype(np.float64))[1]
        np.testing.assert_allclose(rollouts.rewards[0, t].numpy(), rewards, rtol=1e-6)


def test_observations_are_normalised_with_the_statistics_of_the_version_and_clipped():
    agent = MlpAgent(2, 1)
    agent.obs_mean.copy_(torch.tensor([1.0, -1.0]))
    agent.obs_std.copy_(torch.tensor([2.0, 0.5]))
    torch.testing.assert_close(
        agent.normalize(torch.tensor([[3.0, 0.0], [1e6, -1e6]])), torch.tensor([[1.0, 2], [10, -10]])
    )


def test_new_observation_statistics_leave_the_policy_as_it_was():
    agent = MlpAgent(3, 2)
    weight = agent.actor_mean[0].weight.clone()
    agent.set_statistics(np.array([0.5, -1.0, 0.0]), np.array([0.4, 3.0, 1e-4]), first=True)
    assert torch.equal(agent.actor_mean[0].weight, weight)
    obs = torch.randn(50, 3) * torch.tensor([0.4, 3.0, 0]) + torch.tensor([0.5, -1.0, 0])
    actions = torch.randn(50, 2)
    before = agent.evaluate(agent.normalize(obs), actions)
    agent.set_statistics(
        np.array([0.3, 1.0, 2.0]), np.array([0.7, 2.0, 5.0]), first=False
    )  # the last was constant until now
    torch.testing.assert_close(agent.obs_mean, torch.tensor([0.3, 1.0, 2.0]))
    torch.testing.assert_close(agent.obs_std, torch.tensor([0.7, 2.0, 5.0]))
    normalized = agent.normalize(obs)
    normalized[:, 2] = 0  # as before: its weights stayed
    after = agent.evaluate(normalized, actions)
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other)


def test_returns_leave_the_dummy_step_out_where_it_pays():
    """dm_control pays for the reset state in the dummy step."""
    envs = ContinuousEnvs("CartpoleBalance-v1", num_envs=2, seed=0, gamma=0.9)
    rng, total, discounted, dummy_rewards, episodes = np.random.default_rng(0), np.zeros(2), np.zeros(2), [], []
    for _ in range(2010):
        valid = envs.valid.copy()
        fields, ended = envs.step(rng.uniform(-1, 1, (2, 1)))
        rewards = fields["rewards"]
        total += np.where(valid, rewards, 0)
        discounted = np.where(valid, 0.9 * discounted + rewards, 0)
        np.testing.assert_allclose(fields["discounted"], discounted)
        dummy_rewards += list(rewards[~valid])
        if ended:
            np.testing.assert_allclose([episode_return for episode_return, _ in ended], total, rtol=1e-6)
            assert all(length == 1000 for _, length in ended) and (fields["terminated"] | fields["truncated"]).all()
            episodes, total = episodes + ended, np.zeros(2)
    assert len(episodes) == 4 and max(dummy_rewards) > 0


def test_dict_observations_are_flattened():
    env_id = "HumanoidRun-v1"
    obs_size, action_size = continuous_sizes(env_id)
    envs = ContinuousEnvs(env_id, num_envs=3, seed=0)
    obs = envs.obs
    assert obs.shape == (3, obs_size) == (3, 95) and obs.dtype == np.float32
    raw = envpool.make(env_id, "gymnasium", num_envs=3, seed=0, num_threads=1).reset()[0]
    np.testing.assert_array_equal(obs[:, :21], raw["joint_angles"].astype(np.float32))
    np.testing.assert_array_equal(obs[:, 21], raw["head_height"].astype(np.float32))
    envs.step(np.zeros((3, action_size)))
    assert envs.obs.shape == (3, obs_size) and not np.array_equal(envs.obs, obs)


class Echo(gym.Env):
    """Starts where NumPy's global generator says, whatever its seed; the next observation is what it gets as action."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (4,))
    action_space = gym.spaces.Box(*np.float32([[100, -0.4, 0, -np.inf], [200, 0.4, np.inf, np.inf]]))

    def reset(self, *, seed=None, options=None):
        return np.random.normal(size=4).astype(np.float32), {}

    def step(self, action):
        return action.astype(np.float32), 0.0, False, False, {}


gym.register("Echo-v0", Echo)


def test_actions_between_finite_bounds_are_scaled_and_all_are_clipped():
    envs = ContinuousEnvs("Echo-v0", 1, seed=0)
    for actions, expected in (
        ([0.0, 1.0, 5.0, -9.0], [150, 0.4, 5, -9]),
        ([-1.0, 0.5, -5.0, 9.0], [100, 0.2, 0, 9]),
        ([3.0, -3.0, 0.5, 0.5], [200, -0.4, 0.5, 0.5]),
    ):
        envs.step(np.array([actions], dtype=np.float32))
        np.testing.assert_allclose(envs.obs, [expected], rtol=1e-6)


def test_every_actor_draws_from_generators_of_its_own():
    """Other ones where a run goes on, and the same in another run; environments, too."""
    runs = []
    for _ in range(2):
        starts, actions = [], []
        for index, first_version in ((0, 0), (1, 0), (2, 0), (3, 0), (0, 1)):
            rollouts, *_ = collect("Echo-v0", num_steps=2, num_envs=2, index=index, first_version=first_version)
            starts += rollouts.obs[0, 0].tolist()
            actions += rollouts.actions[0, 0].tolist()
        runs.append((starts, actions))
    assert runs[0] == runs[1]
    for drawn in runs[0]:
        assert len(np.unique(drawn, axis=0)) == 5 * 2


def test_store_returns_what_was_published():
    torch.manual_seed(0)
    agent, reader = MlpAgent(4, 2), MlpAgent(4, 2)
    store, published = PolicyStore(agent, num_versions=3), {}
    for version in range(5):
        with torch.no_grad():
            for tensor in agent.state_dict().values():
                tensor.normal_()
        published[version] = {name: tensor.clone() for name, tensor in agent.state_dict().items()}
        store.publish(agent, version)
    for version, wanted in ((2, 2), (3, 3), (4, 4), (LATEST, 4)):
        assert store.load(reader, version) == wanted
        for name, tensor in reader.state_dict().items():
            assert torch.equal(tensor, published[wanted][name]), name


class Constant(torch.nn.Module):
    """A policy whose every number is the same, so that a mixture of versions shows."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Parameter(torch.zeros(100_000)), torch.nn.Parameter(torch.zeros(100_000))


def publish_for_ever(store):
    """A writer that does nothing else: the readers' worst case."""
    torch.set_num_threads(1)
    agent = Constant()
    version = store.versions.max().item()
    while True:
        version += 1
        with torch.no_grad():
            agent.first.fill_(version)
            agent.second.fill_(version)
        store.publish(agent, version)


def test_publication_is_atomic_under_contention():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several would wait for each other, on cores that the writer has
    agent = Constant()
    store = PolicyStore(agent, num_versions=2)
    store.publish(agent, 0)
    writer = mp.get_context("fork").Process(target=publish_for_ever, args=(store,), daemon=True)
    writer.start()
    try:
        while store.versions.max().item() < 2:
            assert writer.is_alive()
        seen = set()
        while len(seen) < 100:
            version = store.load(agent, LATEST)
            seen.add(version)
            assert (agent.first == version).all() and (agent.second == version).all()
    finally:
        writer.kill()
        writer.join()
        torch.set_num_threads(threads)


def test_tickets_are_the_schedules_definition():
    def versions(args, rollouts):
        return [ticket(args, rollout)[1] for rollout in rollouts]

    args = Args(rollouts_per_batch=2, lag_schedule="fixed", lag=3)
    assert versions(args, range(12)) == [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 2, 2]
    assert ticket(Args(), 1000) == (1000, LATEST)
    args = Args(rollouts_per_batch=4, lag_schedule="mixture", lag=7, seed=5)
    lags = np.arange(40, 8040) // 4 - versions(args, range(40, 8040))
    counts = np.bincount(lags)
    assert len(counts) == 8 and (np.abs(counts - 1000) < 150).all()  # 5 standard deviations
    early = versions(args, range(16))
    assert all(0 <= version <= rollout // 4 for rollout, version in enumerate(early))
    assert early != versions(Args(rollouts_per_batch=4, lag_schedule="mixture", lag=7, seed=6), range(16))


class FakeActor:
    """The learner's end of a pipe to an actor, which answers a ticket whenever `recv` is called."""

    def __init__(self, index, args, num_slots, newest):
        self.index = index
        self.args = args
        self.num_slots = num_slots
        self.newest = newest
        self.tickets = []
        self.busy = set()

    def send(self, sent):
        rollout, version = sent
        assert rollout % self.args.num_actors == self.index and rollout % self.num_slots not in self.busy
        oldest = self.newest - self.args.lag
        assert version <= self.newest and (version == LATEST or version >= oldest)  # is in the store
        self.busy.add(rollout % self.num_slots)
        self.tickets.append(sent)

    def recv(self):
        rollout, version = self.tickets.pop(0)
        return rollout, self.newest if version == LATEST else version, self


@pytest.mark.parametrize("schedule", ["async", "fixed", "mixture"])
@pytest.mark.parametrize(("num_actors", "rollouts_per_batch"), [(1, 1), (4, 1), (3, 2), (2, 5), (8, 8)])
def test_tickets_whatever_the_timing(schedule, num_actors, rollouts_per_batch, monkeypatch):
    """Actors that finish in a random order, in a run that goes on: every batch complete, no slot used twice at once,
    no rollout twice, versions as defined."""
    lag = 0 if schedule == "async" else 2
    flags = {"num_actors": num_actors, "rollouts_per_batch": rollouts_per_batch, "lag_schedule": schedule, "lag": lag}
    args = Args(**flags, num_minibatches=1)
    num_slots = num_actors * -(-rollouts_per_batch // num_actors)
    rng, first = np.random.default_rng(num_actors), 7

    fakes = (FakeActor(index, args, num_slots, newest=first) for index in range(num_actors))
    context = mock.Mock(Pipe=lambda: (next(fakes), mock.Mock()))

    def wait(connections, timeout):
        ready = [connection for connection in connections if connection.tickets]
        assert ready or timeout == 0  # else the learner would wait for ever
        if not ready:
            return []
        return rng.choice(ready, size=rng.integers(1, len(ready) + 1), replace=False)

    monkeypatch.setattr(vaco_async_mujoco.mp, "get_context", lambda method: context)
    monkeypatch.setattr(vaco_async_mujoco, "wait", wait)
    actors = Actors(args, num_slots, first, None)
    lags, seen = [], []
    try:
        for batch in range(first, first + 60):
            messages = actors.collect(batch)
            assert len(messages) == rollouts_per_batch
            for place, (rollout, version, connection) in enumerate(messages):
                if schedule != "async":
                    assert rollout == batch * rollouts_per_batch + place
                    assert (rollout, version) == ticket(args, rollout)
                connection.busy.remove(rollout % num_slots)
                lags.append(batch - version)
                seen.append(rollout)
            actors.issue(newest=batch, freed=[rollout for rollout, *_ in messages])
            for connection in actors.connections:
                connection.newest = batch + 1
            actors.issue(newest=batch + 1)
    finally:
        actors.stop()
    assert len(seen) == len(set(seen)) and min(seen) == first * rollouts_per_batch
    assert set(lags) == {2} if schedule == "fixed" else schedule == "async" or set(lags) == {0, 1, 2}
