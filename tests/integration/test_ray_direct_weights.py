"""Native engines in Ray's workers get weights from rank 0 over a process group, and one that dies
costs nothing.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from concurrent.futures import Future

import pytest

pytest.importorskip("ray", reason="needs ray")

import ray
import torch

from learner import weight_push
from learner.weight_push import DirectPush
from rlmed.core.weights import PushReport, StoredWeights, WeightUpdate
from rlmed.models import direct
from rlmed.models.direct import DirectSender
from rlmed.models.policy import load_policy
from rlmed.models.weights import make_buckets
from rollout.native.engine import NativeEngine
from rollout.native.scheduler import EngineLimits
from tests.integration.processes import marked
from tests.integration.test_ray_workers import build_engine, model, pool, ready, request, session  # noqa: F401
from tests.rounding import LOGPROBS, worst_difference

pytestmark = [pytest.mark.ray, pytest.mark.slow]
LIMIT_S = 20.0


def direct_push(policy, version, monkeypatch):
    """Stands in for a learner of one rank: its sender, by gloo, and weights in the store."""
    sender = DirectSender(policy.model.named_parameters(), torch.device("cpu"), "127.0.0.1")

    def call(engine, sent) -> Future[PushReport]:
        return engine.address.update_weights.remote(StoredWeights(version, [ray.put(sent)])).future()

    monkeypatch.setattr(weight_push, "choose_transport", lambda *_: "gloo")
    push = DirectPush(
        "auto",
        "",
        lambda transport, engines: sender.send(transport, engines, call, policy.model.named_parameters(), LIMIT_S),
    )
    stored = StoredWeights(version, [ray.put(bucket) for bucket in make_buckets(policy.model.named_parameters())])
    return WeightUpdate(lambda: stored, push.start)


def noting(push, fetched):
    """The same push, which notes in `fetched` when weights are taken from the store."""

    def stored():
        fetched.append(push)
        return push.stored()

    return dataclasses.replace(push, stored=stored)


def changed(folder, factor):
    policy = load_policy(folder)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(factor)
    policy.end_token_ids = frozenset()
    return policy


def sample(engine_policy, index):
    engine = NativeEngine(engine_policy, lambda ids: "", EngineLimits(max_completions=16))
    engine.submit(request(index, max_tokens=12))
    groups = []
    while engine.busy:
        groups += engine.step()
    return groups[0]


def check_groups(workers, policy, version, indices):
    channel = workers.channel()
    for index in indices:
        channel.submit(request(index, max_tokens=12))
    for group in (channel.collect() for _ in indices):
        assert all(entry.min_version == version for entry in group.completions)
        assert worst_difference([sample(policy, group.request.index)], [group], policy) <= LOGPROBS


def test_weights_reach_all_workers_and_nobody_fetches_them(pool, model, monkeypatch):  # noqa: F811
    ready(pool)
    torch.set_num_threads(1)
    for version, factor in ((7, 1.5), (8, 0.7)):
        policy = changed(model, factor)
        # a worker that joins later, in another test, fetches these weights: they have to be there
        push, fetched = direct_push(policy, version, monkeypatch), []
        assert len(pool.update_weights(noting(push, fetched))) == 2
        check_groups(pool, policy, version, range(4))
        assert not fetched


def test_a_worker_killed_in_a_broadcast_is_named_and_costs_no_sample(pool, session, model, monkeypatch, caplog):  # noqa: F811
    """The other one lives on, and has the new weights as the successor has."""
    ready(pool)
    policy, victim = changed(model, 1.2), marked(session, "ray::RolloutActor")[0]
    broadcast = direct._broadcast

    def kill_first(*arguments):
        # the engines have been called, and wait for the bytes
        time.sleep(1.0)
        os.kill(victim, signal.SIGKILL)
        broadcast(*arguments)

    monkeypatch.setattr(direct, "_broadcast", kill_first)
    lost, channel = pool.metrics()["rollout/workers_lost"], pool.channel()
    for index in range(20, 24):
        channel.submit(request(index, max_tokens=300))
    channel.flush()
    pool.update_weights(direct_push(policy, 9, monkeypatch))
    (message,) = [message for message in caplog.messages if "Sending weights through the object store" in message]
    assert f"process {victim})" in message
    assert "did not reach" in message
    assert "within" not in message, "it was noticed, not waited for until the limit"
    assert sorted(channel.collect().request.index for _ in range(4)) == [20, 21, 22, 23]
    check_groups(pool, policy, 9, range(8, 12))
    assert pool.metrics()["rollout/workers_lost"] == lost + 1


def test_a_frozen_worker_ends_the_push_within_its_limit(pool, session, model, monkeypatch, caplog):  # noqa: F811
    ready(pool)
    monkeypatch.setattr("tests.integration.test_ray_direct_weights.LIMIT_S", 3.0)
    monkeypatch.setattr(pool, "_settings", dataclasses.replace(pool._settings, push_s=12.0))
    policy, victim = changed(model, 0.9), marked(session, "ray::RolloutActor")[0]
    os.kill(victim, signal.SIGSTOP)
    pool.update_weights(direct_push(policy, 10, monkeypatch))
    (message,) = [message for message in caplog.messages if "Sending weights through the object store" in message]
    assert "not done within 3 s" in message
    assert f"process {victim}) did not answer" in message
    check_groups(pool, policy, 10, range(12, 16))
