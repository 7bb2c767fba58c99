"""From the environment to the batch: rows that count, shared memory, tickets and seeds."""

import multiprocessing as mp
import threading
from functools import partial
from types import SimpleNamespace
from unittest import mock

import envpool
import numpy as np
import pytest
import torch

from vaco_async_mujoco import (
    LATEST,
    PRELOAD,
    Actors,
    Agent,
    Args,
    ContinuousEnvs,
    PolicyStore,
    RewardScaler,
    Rollouts,
    actor,
    actor_seed,
    continuous_sizes,
    ticket_version,
    update_statistics,
    vtrace,
)

LEARNER = mp.Pipe()  # never ready: the learner lives


def collect(env_id, num_steps, num_envs, num_rollouts=1, seed=3, agent=None):
    """Fill slots with the real actor function, in a thread. Returns (agent, rollouts, what the actor sent)."""
    sizes = continuous_sizes(env_id)
    torch.manual_seed(0)
    agent = agent or Agent(*sizes)
    store = PolicyStore(agent, num_versions=2)
    store.publish(agent, 0)
    obs, actions = torch.zeros(num_steps + 1, num_envs, sizes[0]), torch.zeros(num_steps, num_envs, sizes[1])
    rollouts = Rollouts(num_rollouts, obs=obs, actions=actions)
    ours, theirs = mp.Pipe()
    make_envs = partial(ContinuousEnvs, env_id, num_envs)
    messages, threads_before = [], torch.get_num_threads()
    arguments = (Args(num_envs=num_envs), 0, 0, 0, partial(Agent, *sizes), make_envs, store, rollouts, theirs)
    thread = threading.Thread(target=actor, args=arguments)
    parent = SimpleNamespace(sentinel=LEARNER[0])  # a thread has no parent process
    with (
        mock.patch("vaco_async_mujoco.actor_seed", return_value=seed),  # so that tests can make the same environments
        mock.patch("vaco_async_mujoco.mp.parent_process", return_value=parent),
    ):
        thread.start()
        assert ours.recv() is None
    for slot in range(num_rollouts):
        ours.send((slot, LATEST))
        messages.append(ours.recv())
    ours.close()
    thread.join(30)
    torch.set_num_threads(threads_before)
    assert not thread.is_alive()
    return agent, rollouts, messages


def in_sequence(rollouts, name):
    """A field over all slots as one sequence [slots * T, C]."""
    return getattr(rollouts, name).flatten(0, 1).numpy()


def test_dummy_steps_are_marked_across_rollouts():
    _, rollouts, messages = collect("InvertedPendulum-v4", num_steps=16, num_envs=8, num_rollouts=6)
    valid = in_sequence(rollouts, "valid")
    done = in_sequence(rollouts, "terminated") | in_sequence(rollouts, "truncated")
    assert done.sum() > 20 and done[15::16].any()  # some end with a rollout's last row
    assert valid[0].all()
    np.testing.assert_array_equal(valid[1:], ~done[:-1])
    assert (in_sequence(rollouts, "rewards")[~valid] == 0).all()
    assert (in_sequence(rollouts, "rewards")[valid] == 1).all()  # InvertedPendulum pays 1 per step
    finished = [sorted(length for _, length in message[1]) for message in messages]
    expected, length = [], np.zeros(8)
    for rollout in range(6):
        expected.append([])
        for t in range(16 * rollout, 16 * (rollout + 1)):
            length += valid[t]
            expected[-1] += list(length[done[t]])
            length[done[t]] = 0
        expected[-1].sort()
    assert finished == expected
    assert all(episode_return == length for message in messages for episode_return, length in message[1])


def test_consecutive_rollouts_join():
    """The bootstrap observation of a rollout is the first one of the next."""
    _, rollouts, _ = collect("Hopper-v4", num_steps=8, num_envs=2, num_rollouts=3)
    assert torch.equal(rollouts.obs[:-1, -1], rollouts.obs[1:, 0])


def test_truncation_bootstraps_the_true_last_observation():
    """Pendulum-v1 is cut after 200 steps; a copy that is not cut shows what the last observation has to be."""
    agent, rollouts, _ = collect("Pendulum-v1", num_steps=210, num_envs=3, seed=5)
    assert rollouts.truncated[0, 199].all() and rollouts.truncated.sum() == 3 and not rollouts.terminated.any()
    uncut = envpool.make("Pendulum-v1", "gymnasium", num_envs=3, seed=5, num_threads=1, max_episode_steps=400)
    uncut.reset()
    for t in range(200):
        last_obs = uncut.step(np.clip(rollouts.actions[0, t].numpy(), -2, 2))[0]
    np.testing.assert_allclose(rollouts.obs[0, 200].numpy(), last_obs, atol=1e-6)

    batch = rollouts.batch([0], "cpu")
    with torch.no_grad():
        values = agent.get_value(agent.normalize(batch.obs))
        expected = batch.rewards[199] + 0.9 * agent.get_value(agent.normalize(torch.tensor(last_obs))) - values[199]
    dones = (batch.terminated | batch.truncated).float()
    log_ratios = torch.zeros_like(batch.rewards)
    _, advantages = vtrace(log_ratios, batch.rewards, values, batch.terminated.float(), dones, 0.9, 0.95, 1, 1)
    np.testing.assert_allclose(advantages[199].numpy(), expected.numpy(), rtol=1e-4)


@pytest.mark.parametrize("env_id", ["Humanoid-v4", "HalfCheetah-v5"])
def test_zero_lag_ratio_is_one(env_id):
    """Per sample, with weights and observation statistics as they are after some training."""
    agent = Agent(*continuous_sizes(env_id))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        agent.obs_mean.normal_()
        agent.obs_var.uniform_(0.1, 10)
    _, rollouts, _ = collect(env_id, num_steps=64, num_envs=8, agent=agent)
    batch = rollouts.batch([0], "cpu")
    with torch.no_grad():
        logprobs, _, _ = agent.evaluate(agent.normalize(batch.obs[:-1]), batch.actions)
        ratios = (logprobs - batch.logprobs).exp()[batch.valid]
    assert (ratios - 1).abs().max() < 1e-4
    assert batch.actions.std() > 0.5  # the noise is there


def test_logprobs_and_entropy_are_the_gaussians():
    torch.manual_seed(2)
    agent = Agent(5, 3)
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
    _, rollouts, _ = collect("Hopper-v4", num_steps=32, num_envs=4)
    assert (rollouts.actions.abs() > 1).any()
    envs = envpool.make("Hopper-v4", "gymnasium", num_envs=4, seed=3, num_threads=1)
    envs.reset()
    for t in range(32):
        rewards = envs.step(np.clip(rollouts.actions[0, t].numpy(), -1, 1).astype(np.float64))[1]
        np.testing.assert_allclose(rollouts.rewards[0, t].numpy(), rewards, rtol=1e-6)


def test_observations_are_normalised_with_the_statistics_of_the_version_and_clipped():
    agent = Agent(2, 1)
    agent.obs_mean.copy_(torch.tensor([1.0, -1.0]))
    agent.obs_var.copy_(torch.tensor([4.0, 0.25]))
    torch.testing.assert_close(
        agent.normalize(torch.tensor([[3.0, 0.0], [1e6, -1e6]])), torch.tensor([[1.0, 2], [10, -10]])
    )


def test_returns_leave_the_dummy_step_out_where_it_pays():
    """dm_control pays for the reset state in the dummy step."""
    envs = ContinuousEnvs("CartpoleBalance-v1", num_envs=2, seed=0)
    rng, total, dummy_rewards, episodes = np.random.default_rng(0), np.zeros(2), [], []
    for _ in range(2010):
        valid = envs.valid.copy()
        rewards, terminated, truncated, ended = envs.step(rng.uniform(-1, 1, (2, 1)))
        total += np.where(valid, rewards, 0)
        dummy_rewards += list(rewards[~valid])
        if ended:
            np.testing.assert_allclose([episode_return for episode_return, _ in ended], total, rtol=1e-6)
            assert all(length == 1000 for _, length in ended) and (terminated | truncated).all()
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


def test_reward_scale_is_the_deviation_of_the_discounted_return():
    """Two actors, rollouts that cut episodes anywhere, dummy rows that hold garbage."""
    rng = np.random.default_rng(0)
    scaler, returns = RewardScaler(num_actors=2, num_envs=1, gamma=0.9), []
    for actor_index in (0, 1):
        rows, discounted_return = [], 0.0  # rows: (reward, valid)
        for _ in range(400):
            reward = rng.normal(1 + actor_index, 2)
            discounted_return = 0.9 * discounted_return + reward
            returns.append(discounted_return)
            rows.append((reward, True))
            if rng.random() < 0.05:
                discounted_return = 0.0
                rows.append((123.0, False))
        for start in range(0, len(rows), 50):
            rewards, valid = (np.array(column)[:, None] for column in zip(*rows[start : start + 50], strict=True))
            rollout = SimpleNamespace(rewards=rewards, valid=valid, fresh=np.array(False))
            update_statistics(scaler.statistics, [scaler.discounted(actor_index, rollout)])
    assert scaler.statistics.count == pytest.approx(800, rel=1e-6)
    assert scaler.statistics.var == pytest.approx(np.var(returns), rel=1e-4)
    scaled = scaler.scale(torch.tensor([1.0, -1e9]))
    assert scaled[0] == pytest.approx(1 / np.std(returns), rel=1e-4) and scaled[1] == -10


def test_actor_seeds_are_disjoint():
    blocks = set()
    for seed in (0, 1, 2, 2**15 - 1):
        args = Args(seed=seed, num_actors=256, num_envs=256)
        for index in range(args.num_actors):
            first = actor_seed(args, index)
            block = set(range(first, first + args.num_envs))
            assert first >= 0 and max(block) < 2**31
            assert not blocks & block
            blocks |= block
    args = Args(seed=1, num_actors=3, num_envs=2)
    starts = np.concatenate([ContinuousEnvs("Hopper-v4", 2, actor_seed(args, index)).obs for index in range(3)])
    assert len(np.unique(starts, axis=0)) == 6


def test_store_returns_what_was_published_and_names_what_is_gone():
    torch.manual_seed(0)
    agent, reader = Agent(4, 2), Agent(4, 2)
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
    for version in (0, 1, 5):
        with pytest.raises(LookupError, match=f"version {version} "):
            store.load(reader, version)


class Constant(torch.nn.Module):
    """A policy whose every number is the same, so that a mixture of versions shows."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Parameter(torch.zeros(300_000)), torch.nn.Parameter(torch.zeros(300_000))


def publish_for_ever(store):
    """A writer that does nothing else: the readers' worst case."""
    torch.set_num_threads(1)
    agent = Constant()
    version = store.latest.item()
    while True:
        version += 1
        with torch.no_grad():
            agent.first.fill_(version)
            agent.second.fill_(version)
        store.publish(agent, version)


def test_publication_is_atomic_under_contention():
    agent = Constant()
    store = PolicyStore(agent, num_versions=2)
    store.publish(agent, 0)
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)  # other tests' actors come from the same server
    writer = context.Process(target=publish_for_ever, args=(store,), daemon=True)
    writer.start()
    try:
        while store.latest.item() < 2:
            assert writer.is_alive()
        seen = set()
        for _ in range(1500):
            version = store.load(agent, LATEST)
            seen.add(version)
            assert (agent.first == version).all() and (agent.second == version).all()
        assert len(seen) > 50
    finally:
        writer.kill()
        writer.join()


def test_ticket_versions_are_the_schedules_definition():
    args = Args(rollouts_per_batch=2, lag_schedule="fixed", lag=3)
    assert [ticket_version(args, rollout) for rollout in range(12)] == [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 2, 2]
    assert ticket_version(Args(), 1000) == LATEST
    args = Args(rollouts_per_batch=4, lag_schedule="mixture", lag=7, seed=5)
    lags = [rollout // 4 - ticket_version(args, rollout) for rollout in range(40, 8040)]
    counts = np.bincount(lags)
    assert len(counts) == 8 and (np.abs(counts - 1000) < 150).all()  # 5 standard deviations
    early = [ticket_version(args, rollout) for rollout in range(16)]
    assert all(0 <= version <= rollout // 4 for rollout, version in enumerate(early))
    assert early != [
        ticket_version(Args(rollouts_per_batch=4, lag_schedule="mixture", lag=7, seed=6), r) for r in range(16)
    ]


@pytest.mark.parametrize("schedule", ["async", "fixed", "mixture"])
@pytest.mark.parametrize(("num_actors", "rollouts_per_batch"), [(1, 1), (4, 1), (3, 2), (2, 5), (8, 8)])
def test_tickets_whatever_the_timing(schedule, num_actors, rollouts_per_batch):
    """Actors that finish in a random order: every batch complete, no slot used twice at once, versions as defined."""
    args = Args(
        num_actors=num_actors,
        rollouts_per_batch=rollouts_per_batch,
        lag_schedule=schedule,
        lag=0 if schedule == "async" else 2,
    )
    slots_per_actor = -(-rollouts_per_batch // num_actors)
    rng = np.random.default_rng(num_actors)
    tickets, busy, newest = [[] for _ in range(num_actors)], set(), 0

    def send(index, ticket):
        slot, version = ticket
        assert slot not in busy and slot // slots_per_actor == index
        assert version <= newest and (version == LATEST or version >= newest - args.lag)  # still in the store
        busy.add(slot)
        tickets[index].append(ticket)

    def receive(timeout):
        if (timeout == 0 and rng.random() < 0.5) or not any(tickets):
            assert timeout == 0  # else the learner would wait for ever
            return []
        index = rng.choice([index for index in range(num_actors) if tickets[index]])
        slot, version = tickets[index].pop(0)
        return [(slot, newest if version == LATEST else version, index)]

    actors = Actors(args, slots_per_actor)
    actors.connections = {index: SimpleNamespace(send=partial(send, index)) for index in range(num_actors)}
    actors.receive = receive
    lags = []
    for batch in range(60):
        actors.issue(newest)
        messages = actors.collect(batch)
        assert len(messages) == rollouts_per_batch
        for place, (slot, version, index) in enumerate(messages):
            rollout = batch * rollouts_per_batch + place
            if schedule != "async":
                assert version == ticket_version(args, rollout) and index == rollout % num_actors
            busy.remove(slot)
            lags.append(batch - version)
        actors.issue(newest, freed=[slot for slot, _, _ in messages])
        newest += 1
    if schedule == "fixed":
        assert lags[4 * rollouts_per_batch :] == [2] * (56 * rollouts_per_batch)
    if schedule == "mixture":
        assert set(lags) == {0, 1, 2}
