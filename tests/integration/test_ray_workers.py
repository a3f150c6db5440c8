"""Real Ray actors with native engines: killed and frozen workers are replaced and cost no group."""

from __future__ import annotations

import dataclasses
import functools
import os
import pickle
import signal
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("ray", reason="needs ray")

import ray
import torch

from learner.actor import LearnerError, RayLearner
from learner.sharing import split_items
from learner.supervised import written_item
from rlmed.core.protocols import ClusterError
from rlmed.core.types import Example, Prompt, RolloutRequest, SamplingParams
from rlmed.core.weights import StoredWeights, WeightUpdate
from rlmed.models.direct import DirectWeights
from rlmed.models.policy import load_policy
from rlmed.models.weights import make_buckets
from rlmed.run import Run
from rollout.native.engine import NativeEngine
from rollout.native.scheduler import EngineLimits
from rollout.pool.actor import RayWorker
from rollout.pool.pool import WorkerPool
from rollout.pool.state import PoolSettings
from tests.integration.processes import marked, wait_until
from tests.rounding import LOGPROBS, worst_difference

pytestmark = [pytest.mark.ray, pytest.mark.slow]
GROUPS = 12


def build_engine(folder):
    torch.set_num_threads(1)
    policy = load_policy(folder)
    # completions are as long as they may be, so there is time to kill
    policy.end_token_ids = frozenset()
    return NativeEngine(policy, lambda ids: "", EngineLimits(max_completions=16))


@pytest.fixture
def session(ray_session):
    return ray_session


@pytest.fixture
def model(ray_model):
    return ray_model


@pytest.fixture
def pool(ray_pool):
    return ray_pool


def request(index, max_tokens=300):
    prompt = Prompt(Example(f"q{index}", None, "?", ("a", "b"), 0), "", np.arange(5, 15))
    return RolloutRequest(index, prompt, 4, SamplingParams(seed=index, max_tokens=max_tokens))


def ready(pool):
    wait_until(lambda: pool.metrics()["rollout/workers_ready"] == 2, 240, "both workers are ready")


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_a_lost_worker_costs_no_group(pool, session, model, signal_number, monkeypatch):
    ready(pool)
    before = pool.metrics()
    victim = marked(session, "ray::RolloutActor")[0]
    channel = pool.channel()
    for index in range(GROUPS):
        channel.submit(request(index))
    # before they leave: however fast the machine, it holds groups until it is lost
    os.kill(victim, signal.SIGSTOP)
    channel.flush()
    wait_until(lambda: all(slot.leases for slot in pool._slots), 60, "both workers hold groups")
    groups = [channel.collect()]
    os.kill(victim, signal_number)
    # only now, lest it be lost too early; another may be slow to answer then, and is replaced too
    monkeypatch.setattr(pool, "_settings", dataclasses.replace(pool._settings, silence_s=3.0))
    groups += [channel.collect() for _ in range(GROUPS - 1)]
    assert sorted(group.request.index for group in groups) == list(range(GROUPS))
    assert channel._groups.empty()
    after = pool.metrics()
    assert after["rollout/workers_lost"] >= before["rollout/workers_lost"] + 1
    assert after["rollout/groups_sampled_again"] > before["rollout/groups_sampled_again"]
    # a frozen process does not hear that it shall end, and is ended all the same
    monkeypatch.undo()
    wait_until(lambda: not Path(f"/proc/{victim}").exists(), 120, "the lost process is gone")
    # a completion depends on its seed, not on the worker that samples it: an undisturbed run gives
    # the same groups
    ready(pool)
    again = pool.channel()
    for index in range(GROUPS):
        again.submit(request(index))
    expected = {group.request.index: group for group in (again.collect() for _ in range(GROUPS))}
    policy = load_policy(model)
    policy.end_token_ids = frozenset()
    groups.sort(key=lambda group: group.request.index)
    assert worst_difference([expected[index] for index in range(GROUPS)], groups, policy) <= LOGPROBS


def test_pushed_weights_reach_all_workers_and_the_successor_of_a_lost_one(pool, session, model):
    ready(pool)
    policy = load_policy(model)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(1.5)
    stored = StoredWeights(7, [ray.put(bucket) for bucket in make_buckets(policy.model.named_parameters(), 2**16)])
    assert len(stored.parts) > 2
    assert len(pool.update_weights(WeightUpdate(lambda: stored))) == 2
    policy.end_token_ids = frozenset()
    local = NativeEngine(policy, lambda ids: "", EngineLimits(max_completions=16))
    local.update_weights(7)
    local.submit(request(3, max_tokens=12))
    expected = []
    while local.busy:
        expected += local.step()
    channel = pool.channel()
    lost = pool.metrics()["rollout/workers_lost"]
    os.kill(marked(session, "ray::RolloutActor")[0], signal.SIGKILL)
    wait_until(lambda: pool.metrics()["rollout/workers_lost"] > lost, 120, "its loss is noticed")
    ready(pool)
    for _ in range(2):  # one for each worker
        channel.submit(request(3, max_tokens=12))
    for group in (channel.collect(), channel.collect()):
        assert worst_difference(expected, [group], policy) <= LOGPROBS
        assert {(entry.min_version, entry.max_version) for entry in group.completions} == {(7, 7)}


def test_a_run_that_asks_for_more_than_there_is_says_so(session, make_config, tmp_path):
    config = make_config(
        "cluster=ray", "cluster.rollout_workers=3", "+cluster.worker_resources.scanner=1", "cluster.start_timeout_s=2"
    )
    with pytest.raises(ClusterError, match=r"\b1 learner ranks .*'scanner': 1.*\b3 rollout workers .*\b2 s"):
        Run(config, tmp_path / "run")


class Doomed:
    """Stands in for a learner rank that ends in a given way."""

    policy_version = 0
    split = staticmethod(lambda batch, ranks: [batch] * ranks)

    def __init__(self, parallelism, ways):
        self.way = ways[getattr(parallelism, "rank", 0)]

    def learn(self, share):
        if self.way == "lost":
            time.sleep(1)
            os._exit(1)
        if self.way == "fails":
            raise RuntimeError("gloo: connection closed by peer")
        if self.way == "refuses":
            raise ValueError("a batch of nothing")
        return {}


@pytest.mark.parametrize(
    ("ways", "error", "message"),
    [
        # rank 0 fails at once because its fellow goes; who went is what should be told
        (("fails", "lost"), LearnerError, "lost learner rank 1 .*resume=auto"),
        (("fails", "learns"), LearnerError, "rank 0 could not .*gloo.*resume=auto"),
        (("refuses",), ValueError, "a batch of nothing"),
    ],
    ids=["lost", "failed", "refused"],
)
def test_what_became_of_the_learner_ranks_is_told(session, ways, error, message):
    def build(report, parallelism):
        return Doomed(parallelism, ways)

    learner = RayLearner(build, on_bad_step=lambda *_: None, step_s=60, options=[{}] * len(ways))
    try:
        with pytest.raises(error, match=message):
            learner.step([])
    finally:
        learner.close()


class Weighing:
    """Stands in for a learner rank; its metrics are the bytes of what every rank was sent."""

    policy_version = 0
    split = functools.partial(split_items, token_budget=64)

    def learn(self, share):
        sizes = [None] * 2
        torch.distributed.all_gather_object(sizes, len(pickle.dumps(share)))
        return dict(zip("ab", sizes, strict=True))


def test_a_rank_is_sent_only_what_it_works_on(session):
    """Six images of 1 MB over two ranks; then one, where a rank has nothing to do."""
    items = [
        written_item(
            dataclasses.replace(request(index).prompt, image_inputs={"pixel_values": np.zeros(250_000, np.float32)}),
            np.arange(4),
        )
        for index in range(6)
    ]
    learner = RayLearner(
        lambda report, parallelism: Weighing(), on_bad_step=lambda *_: None, step_s=60, options=[{}] * 2
    )
    try:
        assert list(learner.step(items).values()) == pytest.approx([3e6] * 2, rel=0.01)
        first, idle = sorted(learner.step(items[:1]).values(), reverse=True)
        assert first == pytest.approx(1e6, rel=0.01)
        assert idle < 5_000
    finally:
        learner.close()


class RefusingEngine(NativeEngine):
    """The third one cannot be sent weights."""

    def update_weights(self, version, weights=()):
        if self.devices == ("gpu-3",) and any(isinstance(part, DirectWeights) for part in weights):
            raise RuntimeError("NCCL does not load here")
        super().update_weights(version, weights)


@ray.remote(num_cpus=0)
class Numbers:
    """1, 2, 3 and so on, over all callers."""

    def __init__(self):
        self.last = 0

    def next(self):
        self.last += 1
        return self.last


def build_refusing_engine(folder, numbers):
    engine = RefusingEngine(load_policy(folder), lambda ids: "", EngineLimits(max_completions=16))
    engine.policy.end_token_ids = frozenset()
    engine.devices = (f"gpu-{ray.get(numbers.next.remote())}",)
    return engine


class Drifting:
    """Stands in for a learner's rank: each step makes the weights larger; all gather together."""

    policy_version = 0
    split = staticmethod(lambda batch, ranks: [batch] * ranks)

    def __init__(self, folder, parallelism=None):
        self.policy, self.parallelism = load_policy(folder), parallelism
        self.policy.end_token_ids = frozenset()

    def full_weights(self, *, on_device=False):
        for name, parameter in self.policy.model.named_parameters():
            torch.distributed.barrier()
            if self.parallelism.first:
                yield name, parameter.detach()

    @torch.no_grad()
    def learn(self, share):
        self.policy_version += 1
        for parameter in self.policy.model.parameters():
            parameter.mul_(1.25)
        return {}


def sampled(pool, *versions):
    """Two workers' groups for the same request, oldest weights first, each from one version."""
    channel = pool.channel()
    evaluation = pool.channel()  # a pool ends with its last channel
    for _ in range(2):
        channel.submit(request(3, max_tokens=12))
    groups = [channel.collect(), channel.collect()]
    assert evaluation.in_flight == 0
    found = {(entry.min_version, entry.max_version) for group in groups for entry in group.completions}
    assert found == {(version, version) for version in versions}
    return sorted(groups, key=lambda group: group.min_version)


def test_weights_are_sent_from_actor_to_actor_and_fetched_by_later_workers(session, model, caplog, monkeypatch):
    settings = PoolSettings(capacity=4, heartbeat_s=0.5, silence_s=120.0)
    build = functools.partial(build_refusing_engine, model, Numbers.remote())
    pool = WorkerPool(lambda i: RayWorker(f"worker {i}", build), 2, settings)
    channel = pool.channel()
    learner = RayLearner(
        lambda report, parallelism: Drifting(model, parallelism),
        on_bad_step=lambda *_: None,
        step_s=120,
        options=[{}, {}],
        weight_transfer="nccl",
        push_s=120.0,
    )
    monkeypatch.setattr("learner.weight_push.choose_transport", lambda *_: "gloo")
    local = Drifting(model)
    engine = NativeEngine(local.policy, lambda ids: "", EngineLimits(max_completions=16))

    def expected():
        engine.submit(request(3, max_tokens=12))
        groups = []
        while engine.busy:
            groups += engine.step()
        return groups * 2

    def learn():
        learner.step([])
        local.learn([])

    try:
        ready(pool)
        before = expected()
        learn()
        learner.push_weights(channel)
        assert worst_difference(expected(), sampled(pool, 1), local.policy) <= LOGPROBS
        with pytest.raises(AssertionError):
            worst_difference(expected(), before, local.policy)
        # a successor fetches the learner's weights, which are a step ahead of those the other was
        # sent, and says so
        learn()
        first = pool._slots[0].worker
        first.kill()
        wait_until(lambda: pool._slots[0].worker is not first, 120, "a successor")
        ready(pool)
        assert worst_difference(expected()[1:], sampled(pool, 1, 2)[1:], local.policy) <= LOGPROBS
        # with it no group can be made, so both fetch
        learn()
        learner.push_weights(channel)
        assert "RuntimeError: NCCL does not load here" in caplog.text
        assert "Sending weights through the object store" in caplog.text
        assert worst_difference(expected(), sampled(pool, 3), local.policy) <= LOGPROBS
    finally:
        pool.close()
        learner.close()
