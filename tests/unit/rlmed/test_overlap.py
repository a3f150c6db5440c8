"""What `algo.max_staleness` buys, on a simulated clock: rollouts go on while the learner learns."""

from __future__ import annotations

import dataclasses
import heapq
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.advantages import AdvantageEstimator
from rlmed.controller import StepResult, train
from rlmed.core.protocols import ClusterError
from rlmed.core.tracing import Tracer
from rlmed.core.types import (
    Completion,
    RolloutGroup,
    RolloutRequest,
    ScoredGroup,
    TrainGroup,
)
from rollout.buffer import GroupBuffer
from tests.unit.rlmed.plain_stream import PlainStream


@dataclasses.dataclass
class Clock:
    now: float = 0.0


class Workers:
    """A pool of `workers`, one group each at a time, first come first served, simulated seconds."""

    def __init__(self, clock: Clock, workers: int, seconds: Sequence[float], stale: bool = False) -> None:
        self.clock, self.seconds, self.stale = clock, seconds, stale
        self.free = [0.0] * workers
        self.running: list[tuple[float, int, float, RolloutRequest]] = []
        self.submitted: list[RolloutRequest] = []
        self.pushes: list[tuple[float, int]] = [(0.0, 0)]

    @property
    def in_flight(self) -> int:
        return len(self.running) + len(self.submitted)

    def submit(self, request: RolloutRequest) -> None:
        self.submitted.append(request)

    def flush(self) -> None:
        """As a worker pool's channel does, requests are held back until then."""
        for request in self.submitted:
            start = max(self.clock.now, heapq.heappop(self.free))
            end = start + self.seconds[request.index % len(self.seconds)]
            heapq.heappush(self.free, end)
            heapq.heappush(self.running, (end, request.index, start, request))
        self.submitted = []

    def collect(self) -> RolloutGroup:
        self.flush()
        end, _, start, request = heapq.heappop(self.running)
        self.clock.now = max(self.clock.now, end)
        oldest = 0 if self.stale else max(version for when, version in self.pushes if when <= start)
        newest = max(version for when, version in self.pushes if when <= end)
        ids, logprobs = np.array([2]), np.zeros(1, np.float32)
        return RolloutGroup(request, (Completion(ids, logprobs, "", "stop", oldest, newest),) * 2)

    def sleep(self) -> None: ...

    def update_weights(self, version: int, weights: object = None) -> None:
        self.pushes.append((self.clock.now, version))

    def metrics(self) -> dict[str, float]:
        return {}

    def close(self) -> None: ...


class Learner:
    def __init__(self, clock: Clock, seconds: float) -> None:
        self.clock, self.seconds, self.policy_version = clock, seconds, 0

    def step(self, groups: Sequence[TrainGroup]) -> dict[str, float]:
        self.clock.now += self.seconds
        self.policy_version += 1
        return {}

    def push_weights(self, pool: Workers) -> None:
        pool.update_weights(self.policy_version)

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


def run(
    max_staleness: int,
    *,
    learn_s: float,
    seconds: Sequence[float],
    workers: int = 2,
    steps: int = 40,
    stale: bool = False,
) -> tuple[float, list[StepResult]]:
    """Simulated seconds of a run of steps of 4 groups, and what each step did."""
    clock = Clock()
    results: list[StepResult] = []
    pool = Workers(clock, workers, seconds, stale)
    buffer = GroupBuffer(
        pool,
        PlainStream().request,
        lambda group: ScoredGroup(group, np.array([0.0, 1.0], np.float32), {}),
        groups_per_step=4,
        max_staleness=max_staleness,
    )
    train(
        pool,
        Learner(clock, learn_s),
        buffer,
        AdvantageEstimator("grpo"),
        done=0,
        steps=steps,
        tracer=Tracer(),
        after_step=results.append,
    )
    return clock.now, results


def test_one_step_of_staleness_hides_rollouts_that_take_as_long_as_learning() -> None:
    on_policy, _ = run(0, learn_s=10, seconds=[5.0])  # 4 groups by 2 workers: 10 s
    overlapped, _ = run(1, learn_s=10, seconds=[5.0])
    assert on_policy == pytest.approx(40 * 20)
    # the first rollouts have nothing to hide behind
    assert overlapped == pytest.approx(40 * 10 + 10)
    assert on_policy / overlapped > 1.9


def test_groups_of_very_different_length_are_hidden_too() -> None:
    rng = random.Random(0)
    seconds = [rng.choice([1.0, 2.0, 5.0, 12.0]) for _ in range(200)]
    learn_s = sum(seconds) / len(seconds) * 4 / 2
    on_policy, _ = run(0, learn_s=learn_s, seconds=seconds)
    overlapped, _ = run(1, learn_s=learn_s, seconds=seconds)
    assert on_policy / overlapped > 1.5


def test_a_straggler_does_not_hold_back_the_next_requests() -> None:
    """After it, finished groups wait; what is admitted must start at once, not after the step."""
    seconds = [1.0] * 7 + [15.0]
    on_policy, _ = run(0, learn_s=10, seconds=seconds, workers=4)
    overlapped, _ = run(1, learn_s=10, seconds=seconds, workers=4)
    assert on_policy / overlapped > 1.3


@settings(deadline=None)
@given(
    st.integers(0, 3),
    st.integers(1, 5),
    st.floats(0.1, 30),
    st.lists(st.floats(0.1, 30), min_size=1, max_size=30),
)
def test_no_group_is_older_than_allowed(max_staleness: int, workers: int, learn_s: float, seconds: list[float]) -> None:
    _, results = run(max_staleness, learn_s=learn_s, seconds=seconds, workers=workers, steps=12)
    assert len(results) == 12
    for result in results:
        behind = result.step - 1  # the policy version that the step started from
        assert all(behind - group.rollout.min_version <= max_staleness for group in result.groups)


def test_an_engine_that_missed_a_push_stops_the_run() -> None:
    with pytest.raises(ClusterError, match=r"version 0 .*older"):
        run(0, learn_s=1, seconds=[1.0], stale=True)
