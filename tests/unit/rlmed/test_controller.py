"""The loop: admission, consumption, refills, staleness, resumption.

Pool and learner are scripted.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.advantages import AdvantageEstimator, has_learning_signal
from rlmed.controller import StepResult, train
from rlmed.core.config.schema import AlgoConfig
from rlmed.core.tracing import Tracer
from rlmed.core.types import (
    Completion,
    RolloutGroup,
    RolloutRequest,
    ScoredGroup,
    TrainGroup,
)
from rlmed.data.curriculum import Curriculum
from rollout.buffer import GroupBuffer
from tests.configs import algo_config, selection_config
from tests.unit.rlmed.plain_stream import PlainStream


class Pool:
    """Finishes requests in random order, under the version at which they were submitted."""

    def __init__(self, seed: int = 0) -> None:
        self.requests: list[tuple[RolloutRequest, int]] = []
        self.version = 0
        self.random = random.Random(seed)
        self.submitted: list[int] = []
        self.rested: list[int] = []

    @property
    def in_flight(self) -> int:
        return len(self.requests)

    def submit(self, request: RolloutRequest) -> None:
        self.requests.append((request, self.version))
        self.submitted.append(request.index)

    def flush(self) -> None: ...

    def sleep(self) -> None:
        self.rested.append(self.in_flight)

    def collect(self) -> RolloutGroup:
        request, version = self.requests.pop(self.random.randrange(len(self.requests)))
        ids, logprobs = np.array([2]), np.zeros(1, np.float32)
        completion = Completion(ids, logprobs, "", "stop", min_version=version, max_version=self.version)
        return RolloutGroup(request, (completion, completion))

    def update_weights(self, version: int, weights: object = None) -> None:
        self.version = version

    def metrics(self) -> dict[str, float]:
        return {}

    def close(self) -> None: ...


class Learner:
    def __init__(self) -> None:
        self.policy_version = 0
        self.batches: list[list[int]] = []

    def step(self, groups: Sequence[TrainGroup]) -> dict[str, float]:
        self.batches.append([group.rollout.request.index for group in groups])
        self.policy_version += 1
        return {"loss": 0.0}

    def push_weights(self, pool: Pool) -> None:
        pool.update_weights(self.policy_version)

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


def score(differ: Callable[[int], bool]) -> Callable[[RolloutGroup], ScoredGroup]:
    def scored(group: RolloutGroup) -> ScoredGroup:
        rewards = np.array([0.0, float(differ(group.request.index))], dtype=np.float32)
        return ScoredGroup(group, rewards, {"choice": rewards})

    return scored


@dataclasses.dataclass
class State:
    """What a checkpoint keeps of the loop."""

    step: int = 0
    cursor: int = 0
    pending: list[int] = dataclasses.field(default_factory=list)
    reward_std: dict[str, list[float]] = dataclasses.field(default_factory=dict)


def run(
    algo: AlgoConfig,
    steps: int,
    *,
    differ: Callable[[int], bool] = lambda _: True,
    state: State | None = None,
    seed: int = 0,
    stream: PlainStream | None = None,
) -> tuple[Pool, Learner, list[StepResult], State]:
    pool, learner, results, state = Pool(seed), Learner(), [], state or State()
    advantages = AdvantageEstimator(algo.advantage, algo.normalize_by)
    advantages.restore(state.reward_std)
    buffer = GroupBuffer(
        pool,
        (stream or PlainStream()).request,
        score(differ),
        groups_per_step=algo.groups_per_step,
        max_staleness=algo.max_staleness,
        max_discarded=algo.max_refills * algo.groups_per_step,
        is_kept=lambda scored: not algo.dynamic_sampling or has_learning_signal(scored, mask_truncated=False),
    )
    buffer.restore(state.cursor, state.pending)

    def after_step(result: StepResult) -> None:
        results.append(result)
        if isinstance(stream, SelectingStream):
            stream.observe(result)

    train(pool, learner, buffer, advantages, done=state.step, steps=steps, tracer=Tracer(), after_step=after_step)
    return pool, learner, results, State(steps, **json.loads(json.dumps(buffer.state())), reward_std=advantages.state())


@pytest.mark.parametrize(("max_staleness", "rested"), [(0, [0, 0, 0]), (1, [])])
def test_workers_rest_before_learning_where_nothing_is_under_way(max_staleness: int, rested: list[int]) -> None:
    algo = algo_config(groups_per_step=4, group_size=2, max_staleness=max_staleness)
    pool, _, _, _ = run(algo, 3, differ=lambda index: index % 3 > 0)
    assert pool.rested == rested  # and for each rest the number of requests in flight


class SelectingStream(PlainStream):
    """Draws from seven rows, two always wrong, by pass rate; notes which row each request got."""

    def __init__(self, state: dict[str, Any] | None = None) -> None:
        self.curriculum = Curriculum(["CT"] * 7, 0, selection=selection_config("pass_rate", cooldown_epochs=1))
        if state:
            self.curriculum.restore(state)
        self.rows: dict[int, int] = {}

    def request(self, index: int) -> RolloutRequest:
        self.rows[index] = self.curriculum.visit(index).example
        return super().request(index)

    def observe(self, result: StepResult) -> None:
        groups = [*(group.rollout for group in result.groups), *(scored.rollout for scored in result.discarded)]
        for index in sorted(group.request.index for group in groups):
            self.curriculum.observe(index, 0 if self.rows[index] < 2 else 1, 2)


def test_on_policy_each_step_consumes_what_was_sampled_for_it() -> None:
    pool, learner, results, state = run(algo_config(groups_per_step=3), 4)
    assert [sorted(batch) for batch in learner.batches] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert pool.in_flight == 0
    assert (state.step, state.cursor, state.pending) == (4, 12, [])
    assert [result.metrics["staleness"] for result in results] == [0.0] * 4
    assert [result.metrics["policy_version"] for result in results] == [1.0, 2.0, 3.0, 4.0]


def test_groups_without_signal_are_replaced_and_reported() -> None:
    algo = algo_config(groups_per_step=3, dynamic_sampling=True)
    _, learner, results, state = run(algo, 2, differ=lambda index: index % 2 == 1)
    assert [sorted(batch) for batch in learner.batches] == [[1, 3, 5], [7, 9, 11]]
    assert sorted(group.rollout.request.index for group in results[0].discarded) == [0, 2, 4]
    assert results[0].metrics["groups/zero_variance"] == pytest.approx(0.5)
    assert state.pending == []


def test_groups_without_signal_are_kept_without_dynamic_sampling() -> None:
    _, learner, results, _ = run(algo_config(groups_per_step=3), 1, differ=lambda _: False)
    assert len(learner.batches[0]) == 3
    assert all((group.advantages == 0).all() for group in results[0].groups)


def test_refills_end_and_the_step_takes_what_there_is() -> None:
    algo = algo_config(groups_per_step=2, dynamic_sampling=True, max_refills=3)
    pool, learner, results, state = run(algo, 2, differ=lambda index: index == 4)
    # nothing to learn from in the second step, and the run still ends
    assert learner.batches == [[4]]
    assert pool.in_flight == 0
    assert state.step == 2
    assert len(results[0].discarded) == 7
    assert results[1].metrics["groups/learnt"] == 0
    assert "loss" not in results[1].metrics


def test_advantages_are_normalized_by_modality_and_the_standard_deviation_is_reported() -> None:
    algo = algo_config(groups_per_step=2, advantage="dr_grpo", normalize_by="modality")
    *_, results, state = run(algo, 3)
    for result in results:
        assert result.metrics["reward_std/none"] == pytest.approx(
            0.5**0.5
        )  # of rewards 0 and 1, which no modality is named for
        for group in result.groups:
            np.testing.assert_allclose(group.advantages, [-(0.5**0.5), 0.5**0.5], rtol=2e-4)
    assert state.reward_std.keys() == {""}
    assert "reward_std/none" not in run(algo_config(groups_per_step=2), 1)[2][0].metrics


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 3), st.integers(1, 4), st.integers(0, 5), st.integers(0, 10_000))
def test_admission_rule(max_staleness: int, groups_per_step: int, stop: int, seed: int) -> None:
    """Admitted groups never exceed what the next 1 + max_staleness steps consume.

    Nothing is lost or repeated, also when the run stops after some step and goes on from its state.
    """
    algo = algo_config(groups_per_step=groups_per_step, max_staleness=max_staleness)
    _, first, _, state = run(algo, stop, seed=seed)
    assert len(state.pending) <= groups_per_step * max_staleness
    pool, second, results, state = run(algo, stop + 4, state=state, seed=seed + 1)
    consumed = [index for batch in first.batches + second.batches for index in batch]
    assert len(set(consumed)) == len(consumed) == groups_per_step * (stop + 4)
    assert sorted(consumed + state.pending) == list(range(state.cursor))
    assert pool.in_flight <= len(state.pending) <= groups_per_step * max_staleness
    assert all(result.metrics["staleness"] <= max_staleness for result in results)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2), st.integers(1, 8), st.booleans(), st.integers(0, 10_000))
def test_prompts_under_way_are_asked_again_after_a_resume(
    max_staleness: int, stop: int, dynamic_sampling: bool, seed: int
) -> None:
    """On-policy, the prompts are those of a run that goes on, in whatever order groups finish.

    With groups under way at the stop, each of these asks for the row that it asked for before.
    """
    algo = algo_config(groups_per_step=3, max_staleness=max_staleness, dynamic_sampling=dynamic_sampling)
    differ = lambda index: index % 4 != 0  # noqa: E731
    whole, first = SelectingStream(), SelectingStream()
    run(algo, 12, differ=differ, stream=whole, seed=seed)
    *_, state = run(algo, stop, differ=differ, stream=first, seed=seed + 1)
    second = SelectingStream(first.curriculum.state())
    run(algo, 12, differ=differ, stream=second, state=state, seed=seed + 2)
    assert all(second.rows[index] == first.rows[index] for index in state.pending)
    if max_staleness == 0:
        assert first.rows | second.rows == whole.rows
        asked = Counter(whole.rows.values())
        # the former are always wrong
        assert max(asked[0], asked[1]) < min(asked[row] for row in range(2, 7))
