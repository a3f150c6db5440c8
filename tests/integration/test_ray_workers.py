"""Real Ray actors with native engines: killed and frozen workers are replaced and cost no group."""

from __future__ import annotations

import functools
import os
import signal
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("ray", reason="needs ray")

import ray
import torch

from learner.actor import LearnerError, RayLearner
from learner.weight_publisher import publish
from rlmed.core.protocols import ClusterError
from rlmed.core.types import Example, Prompt, RolloutRequest, SamplingParams
from rlmed.launch import Run
from rlmed.models.policy import load_policy
from rlmed.models.tiny import build_tiny_text
from rollout.actor import RayWorker
from rollout.leases import PoolSettings
from rollout.native.engine import NativeEngine
from rollout.native.scheduler import EngineLimits
from rollout.pool import WorkerPool
from tests.integration.processes import marked, new_mark, wait_until

pytestmark = pytest.mark.slow
GROUPS = 12


def build_engine(folder):
    torch.set_num_threads(1)
    policy = load_policy(folder)
    policy.end_token_ids = frozenset()  # completions are as long as they may be, so there is time to kill
    return NativeEngine(policy, lambda ids: "", EngineLimits(max_completions=16))


@pytest.fixture(scope="module")
def session():
    """A Ray of our own in a short-named folder (its sockets have long names); nothing of it is left afterwards."""
    mark = new_mark()
    with tempfile.TemporaryDirectory(prefix="rt-") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv(*next(iter(mark.items())))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            _temp_dir=folder,
            log_to_driver=False,
            object_store_memory=128 * 2**20,
            resources={"scanner": 2},
        )
        yield mark
        ray.shutdown()
        wait_until(lambda: not marked(mark), 30, "Ray's processes end")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    build_tiny_text(folder)
    return folder


@pytest.fixture(scope="module")
def pool(session, model):
    settings = PoolSettings(capacity=16, heartbeat_s=0.5, silence_s=3.0)
    pool = WorkerPool(lambda i: RayWorker(f"worker {i}", functools.partial(build_engine, model)), 2, settings)
    yield pool
    pool.close()


def request(index, max_tokens=300):
    prompt = Prompt(Example(f"q{index}", None, "?", ("a", "b"), 0), "", np.arange(5, 15))
    return RolloutRequest(index, prompt, 4, SamplingParams(seed=index, max_tokens=max_tokens))


def ready(pool):
    wait_until(lambda: pool.metrics()["rollout/workers_ready"] == 2, 120, "both workers are ready")


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_a_lost_worker_costs_no_group(pool, session, signal_number):
    ready(pool)
    before = pool.metrics()
    channel = pool.channel()
    for index in range(GROUPS):
        channel.submit(request(index))
    groups = [channel.collect()]
    victim = marked(session, "ray::RolloutActor")[0]
    os.kill(victim, signal_number)
    groups += [channel.collect() for _ in range(GROUPS - 1)]
    assert sorted(group.request.index for group in groups) == list(range(GROUPS))
    assert channel._groups.empty()
    after = pool.metrics()
    assert after["rollout/workers_lost"] == before["rollout/workers_lost"] + 1
    assert after["rollout/groups_sampled_again"] > before["rollout/groups_sampled_again"]
    # a frozen process does not hear that it shall end, and is ended all the same
    wait_until(lambda: not Path(f"/proc/{victim}").exists(), 30, "the lost process is gone")
    # seeds make a completion what it is, whoever samples it: an undisturbed run gives the same groups
    ready(pool)
    again = pool.channel()
    for index in range(GROUPS):
        again.submit(request(index))
    expected = {group.request.index: group for group in (again.collect() for _ in range(GROUPS))}
    for group in groups:
        ours = [completion.token_ids.tolist() for completion in group.completions]
        assert ours == [completion.token_ids.tolist() for completion in expected[group.request.index].completions]


def test_pushed_weights_reach_all_workers_and_the_successor_of_a_lost_one(pool, session, model):
    ready(pool)
    policy = load_policy(model)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(1.5)
    published = publish(policy.model.named_parameters(), ray.put, bucket_bytes=2**16)
    assert len(published.buckets) > 2
    reports = pool.update_weights(7, published.buckets)
    assert [report.bytes for report in reports] == [published.bytes] * 2
    policy.end_token_ids = frozenset()
    local = NativeEngine(policy, lambda ids: "", EngineLimits(max_completions=16))
    local.finish_update(7)
    local.submit(request(3, max_tokens=12))
    expected = []
    while local.busy:
        expected += local.step()
    channel = pool.channel()
    os.kill(marked(session, "ray::RolloutActor")[0], signal.SIGKILL)
    time.sleep(0.5)
    ready(pool)
    for _ in range(2):  # one for each worker
        channel.submit(request(3, max_tokens=12))
    for group in (channel.collect(), channel.collect()):
        for ours, theirs in zip(group.completions, expected[0].completions, strict=True):
            assert ours.token_ids.tolist() == theirs.token_ids.tolist()
            np.testing.assert_allclose(ours.rollout_logprobs, theirs.rollout_logprobs, atol=1e-5)
            assert (ours.min_version, ours.max_version) == (7, 7)


def test_a_run_that_asks_for_more_than_there_is_says_so(session, make_config, tmp_path):
    config = make_config(
        "cluster=ray", "cluster.rollout_workers=3", "+cluster.worker_resources.scanner=1", "cluster.start_timeout_s=2"
    )
    with pytest.raises(
        ClusterError, match=r"not given 1 learner ranks .* 3 rollout workers .*'scanner': 1.* within 2 s"
    ):
        Run(config, tmp_path / "run")


class Doomed:
    """Stands in for a learner rank that ends in a given way."""

    policy_version = 0

    def __init__(self, ranks, ways):
        self.way = ways[getattr(ranks, "rank", 0)]

    def step(self, groups):
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
        (("fails", "lost"), LearnerError, "learner rank 1 was lost while it should learn.*resume=auto"),
        (("fails", "learns"), LearnerError, "rank 0 could not learn together with the others: .*gloo.*resume=auto"),
        (("refuses",), ValueError, "a batch of nothing"),
    ],
    ids=["lost", "failed", "refused"],
)
def test_what_became_of_the_learner_ranks_is_told(session, ways, error, message):
    def build(report, ranks):
        return Doomed(ranks, ways)

    learner = RayLearner(build, on_bad_step=lambda *_: None, step_s=60, options=[{}] * len(ways))
    try:
        with pytest.raises(error, match=message):
            learner.step([])
    finally:
        learner.close()
