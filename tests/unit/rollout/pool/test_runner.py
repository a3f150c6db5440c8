"""An engine in a thread: requests, finished groups, weights between steps, errors."""

from __future__ import annotations

import copy
import threading
import time

import pytest
import torch

from rlmed.core.weights import WeightError
from rlmed.models.weights import make_buckets
from rollout.native.engine import NativeEngine
from rollout.native.scheduler import EngineLimits
from rollout.pool.runner import EngineRunner


class SlowChain:
    """Lets the test say when the engine may take its next step."""

    def __init__(self, policy):
        self.policy, self.steps = policy, threading.Semaphore(0)

    def __getattr__(self, name):
        return getattr(self.policy, name)

    def hidden(self, *args):
        self.steps.acquire()
        return self.policy.hidden(*args)


@pytest.fixture
def make_runner(chain):
    runners = []

    def make(on_push="continue", slow=False):
        policy = chain()
        policy.model = torch.nn.Linear(2, 3)
        policy = SlowChain(policy) if slow else policy
        engine = NativeEngine(policy, lambda ids: "text", EngineLimits(max_completions=4))
        runner = EngineRunner(engine, on_push=on_push, where="here, process 7")
        runners.append((runner, policy if slow else None))
        return runner, policy

    yield make
    for runner, slow in runners:
        if slow:
            slow.steps.release(1000)
        runner.close()


def buckets(policy, value):
    model = copy.deepcopy(policy.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return [copy.deepcopy(bucket) for bucket in make_buckets(model.named_parameters())]


def collect(runner, count):
    groups = []
    end = time.monotonic() + 60
    while len(groups) < count:
        assert time.monotonic() < end
        groups += runner.collect(0.2)
    return groups


def test_groups_come_back_by_the_index_of_their_request(make_runner, make_request):
    runner, _ = make_runner()
    runner.submit([make_request(3, max_tokens=4), make_request(9, max_tokens=2)])
    assert sorted(group.index for group in collect(runner, 2)) == [3, 9]
    assert runner.collect(0.01) == []
    status = runner.status()
    assert (status.busy, status.generated_tokens, status.where) == (False, 6, "here, process 7")
    assert status.progress > 0


def test_a_request_that_can_never_run_is_refused_and_the_others_go_on(make_runner, make_request):
    runner, _ = make_runner()
    runner.submit([make_request(0, group_size=5), make_request(1, max_tokens=2)])
    refused, finished = sorted(collect(runner, 2), key=lambda group: group.index)
    assert "exceeds rollout.max_completions" in refused.refused
    assert refused.completions == ()
    assert finished.refused is None
    assert len(finished.completions) == 1


@pytest.mark.parametrize(("on_push", "versions"), [("continue", (0, 1)), ("finish", (0, 0))])
def test_running_completions_go_on_under_new_weights_or_are_finished_first(
    make_runner, make_request, on_push, versions
):
    runner, policy = make_runner(on_push, slow=True)
    runner.submit([make_request(0, max_tokens=6)])
    policy.steps.release(2)
    pushed = threading.Thread(target=runner.update_weights, args=(1, buckets(policy, 2.0)))
    while runner.status().generated_tokens < 2:
        time.sleep(0.001)
    pushed.start()
    while not runner._jobs and pushed.is_alive():
        time.sleep(0.001)
    runner.submit([make_request(1, max_tokens=2)])
    policy.steps.release(100)
    first, second = sorted(collect(runner, 2), key=lambda group: group.index)
    pushed.join()
    assert (first.completions[0].min_version, first.completions[0].max_version) == versions
    # what arrives during a push is sampled from the new weights alone
    assert second.completions[0].min_version == 1
    assert policy.model.weight.unique().tolist() == [2.0]


def test_weights_that_do_not_fit_change_nothing_and_no_step_is_made_before_others(make_runner, make_request):
    runner, policy = make_runner()
    before = policy.model.weight.clone()
    damaged = buckets(policy, 2.0)
    damaged[0].data[0] ^= 1
    with pytest.raises(WeightError, match="damaged"):
        runner.update_weights(1, damaged)
    incomplete = [copy.deepcopy(b) for b in make_buckets([("weight", torch.ones(3, 2))])]
    with pytest.raises(WeightError, match=r"did not arrive.*bias"):
        runner.update_weights(1, incomplete)
    torch.testing.assert_close(policy.model.weight, before, rtol=0, atol=0)
    assert runner.status().policy_version == 0
    runner.submit([make_request(0, max_tokens=2)])
    assert runner.collect(0.05) == []
    runner.update_weights(1, buckets(policy, 2.0))
    assert [entry.min_version for entry in collect(runner, 1)[0].completions] == [1]


def test_between_held_jobs_the_engine_makes_no_step(make_runner, make_request):
    runner, _ = make_runner()
    runner.submit([make_request(0, max_tokens=40)])
    runner.between_steps(lambda: None, hold=True)
    sampled = runner.status().generated_tokens
    runner.submit([make_request(1, max_tokens=2)])
    with pytest.raises(ZeroDivisionError):
        runner.between_steps(lambda: 1 / 0, hold=True)
    time.sleep(0.05)
    status = runner.status()
    # nor is it taken for one that stands still
    assert (status.generated_tokens, status.busy) == (sampled, False)
    runner.between_steps(lambda: None)
    assert sorted(group.index for group in collect(runner, 2)) == [0, 1]


def test_a_held_engine_does_not_wait_for_completions_to_finish_first(make_runner, make_request):
    runner, policy = make_runner("finish", slow=True)
    runner.submit([make_request(0, max_tokens=4)])
    policy.steps.release(2)
    while runner.status().generated_tokens < 1:
        time.sleep(0.001)
    held = threading.Thread(target=runner.between_steps, args=(lambda: None,), kwargs={"hold": True})
    held.start()
    policy.steps.release(1000)
    assert [group.index for group in collect(runner, 1)] == [0]
    held.join()
    runner.submit([make_request(1, max_tokens=4)])
    runner.between_steps(lambda: None, hold=True)
    assert runner.collect(0.05) == []
    runner.between_steps(lambda: None)
    assert [group.index for group in collect(runner, 1)] == [1]


def test_an_error_of_the_engine_reaches_every_later_call(make_runner, make_request, monkeypatch):
    runner, policy = make_runner()
    monkeypatch.setattr(policy, "logits", lambda hidden: 1 / 0)
    runner.submit([make_request(0)])
    with pytest.raises(ZeroDivisionError):
        collect(runner, 1)
    for call in (
        lambda: runner.submit([make_request(1)]),
        runner.status,
        lambda: runner.update_weights(1, []),
    ):
        with pytest.raises(ZeroDivisionError):
            call()
