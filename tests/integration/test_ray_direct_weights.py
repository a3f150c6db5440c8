"""Native engines in Ray's workers get weights from rank 0 over a process group, and one that dies
costs nothing.
"""

from __future__ import annotations

import functools
import os
import signal
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

pytest.importorskip("ray", reason="needs ray")

import ray
import torch

from rlmed.core.weights import PushReport, StoredWeights, TransferError, WeightUpdate
from rlmed.models import direct
from rlmed.models.direct import GLOO, DirectSender
from rlmed.models.policy import load_policy
from rlmed.models.weights import make_buckets
from rollout.native.engine import NativeEngine
from rollout.native.scheduler import EngineLimits
from tests.integration.processes import marked
from tests.integration.test_ray_workers import build_engine, model, pool, ready, request, session  # noqa: F401
from tests.rounding import LOGPROBS, worst_difference

pytestmark = [pytest.mark.ray, pytest.mark.slow]
LIMIT_S = 20.0


def call(engine, stage, *arguments) -> Future[None]:
    return engine.address.call_stage.remote(stage, *arguments).future()


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


def test_weights_reach_all_workers_and_a_worker_that_dies_meanwhile_costs_no_sample(pool, session, model):  # noqa: F811
    ready(pool)
    first, second = changed(model, 1.5), changed(model, 0.7)
    sender = DirectSender(lambda: iter(first.model.named_parameters()), torch.device("cpu"), LIMIT_S)
    thread = ThreadPoolExecutor(1)
    torch.set_num_threads(1)

    def push(engines):
        sender.connect(GLOO, engines, call, "127.0.0.1")
        sender.send(7)
        return PushReport(0.0, 0.0)

    def never():
        raise AssertionError("no worker may fetch")

    reports = pool.update_weights(WeightUpdate(never, functools.partial(thread.submit, push)))
    assert len(reports) == 2
    channel = pool.channel()
    for index in range(4):
        channel.submit(request(index, max_tokens=12))
    for group in (channel.collect() for _ in range(4)):
        expected = sample(first, group.request.index)
        assert worst_difference([expected], [group], first) <= LOGPROBS
        assert all(entry.min_version == 7 for entry in group.completions)

    # rank 0 still gathers when a worker dies; the others' connections break with it
    def dying():
        for number, entry in enumerate(second.model.named_parameters()):
            if number == 3:
                os.kill(marked(session, "ray::RolloutActor")[0], signal.SIGKILL)
            yield entry

    stored = StoredWeights(8, [ray.put(bucket) for bucket in make_buckets(second.model.named_parameters())])
    sender._weights, lost = dying, pool.metrics()["rollout/workers_lost"]
    failed: list[BaseException] = []

    def push_again(engines):
        try:
            sender.send(8)
        except TransferError as error:
            failed.append(error)
            raise
        return PushReport(0.0, 0.0)

    for index in range(4, 8):
        channel.submit(request(index, max_tokens=12))
    pool.update_weights(WeightUpdate(lambda: stored, functools.partial(thread.submit, push_again)))
    groups = [channel.collect() for _ in range(4)]
    assert failed
    assert pool.metrics()["rollout/workers_lost"] > lost
    assert sorted(group.request.index for group in groups) == [4, 5, 6, 7]


def test_a_worker_killed_in_a_broadcast_is_named_and_its_successor_has_the_weights(pool, session, model, monkeypatch):  # noqa: F811
    ready(pool)
    policy = changed(model, 1.2)
    sender = DirectSender(lambda: iter(policy.model.named_parameters()), torch.device("cpu"), LIMIT_S)
    thread, victim, failed = ThreadPoolExecutor(1), marked(session, "ray::RolloutActor")[0], []
    broadcast = direct._Group.broadcast

    def kill_first(group, values):
        # the engines have been called, and wait for the bytes
        time.sleep(1.0)
        os.kill(victim, signal.SIGKILL)
        broadcast(group, values)

    monkeypatch.setattr(direct._Group, "broadcast", kill_first)

    def push(engines):
        sender.connect(GLOO, engines, call, "127.0.0.1")
        try:
            sender.send(9)
        except TransferError as error:
            failed.append(str(error))
            raise
        return PushReport(0.0, 0.0)

    stored = StoredWeights(9, [ray.put(bucket) for bucket in make_buckets(policy.model.named_parameters())])
    lost = pool.metrics()["rollout/workers_lost"]
    pool.update_weights(WeightUpdate(lambda: stored, functools.partial(thread.submit, push)))
    (message,) = failed
    assert f"process {victim})" in message
    assert "version 9 did not reach" in message
    assert "within" not in message, "it was noticed, not waited for until the limit"
    channel = pool.channel()
    for index in range(8, 12):
        channel.submit(request(index, max_tokens=12))
    for group in (channel.collect() for _ in range(4)):
        assert all(entry.min_version == 9 for entry in group.completions)
        assert worst_difference([sample(policy, group.request.index)], [group], policy) <= LOGPROBS
    assert pool.metrics()["rollout/workers_lost"] > lost
