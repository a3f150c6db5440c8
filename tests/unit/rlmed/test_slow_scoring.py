"""The loop with rewards that take time: what goes on beside what, and numbers stay the same."""

from __future__ import annotations

import dataclasses
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from learner.advantages import AdvantageEstimator, has_learning_signal
from rewards.base import GroupReward
from rewards.cache import RewardCache
from rewards.extra import RewardError
from rewards.rubric import Rubric, WeightedReward, per_completion
from rewards.slow import Limits, in_thread
from rewards.slow_reward import SlowReward
from rlmed.controller import StepResult, train
from rlmed.core.tracing import Tracer
from rlmed.core.types import Completion, RolloutGroup, RolloutRequest, ScoredGroup, TrainGroup
from rollout.buffer import GroupBuffer
from rollout.local import LocalPool
from rollout.pool.pool import WorkerPool
from rollout.pool.state import PoolSettings
from tests.unit.rlmed.plain_stream import EXAMPLE, PlainStream
from tests.unit.rollout.fake_workers import FakeWorker, Update

PATIENCE = 20.0
"""Seconds after which a test that waits for a thread has failed."""


class Engine:
    """Groups take from 1 to 5 steps by their index, all at once; texts are those of the index."""

    devices = ()
    generated_tokens = 0

    def __init__(self) -> None:
        self.policy_version = 0
        self.running: deque[list[Any]] = deque()

    @property
    def busy(self) -> bool:
        return bool(self.running)

    def submit(self, request: RolloutRequest) -> None:
        self.running.append([1 + request.index * 7 % 5, request, self.policy_version])

    def step(self) -> list[RolloutGroup]:
        for entry in self.running:
            entry[0] -= 1
        done = [entry for entry in self.running if entry[0] == 0]
        self.running = deque(entry for entry in self.running if entry[0] > 0)
        return [
            RolloutGroup(
                request,
                tuple(
                    Completion(
                        np.array([2]),
                        np.zeros(1, np.float32),
                        f"{request.index}{n}",
                        "stop",
                        version,
                        self.policy_version,
                    )
                    for n in "ab"
                ),
            )
            for _, request, version in done
        ]

    def abort(self) -> list[RolloutRequest]:
        self.running.clear()
        return []

    def sleep(self) -> None: ...

    def update_weights(self, version: int, weights: object = ()) -> None:
        self.policy_version = version


class Learner:
    def __init__(self, pool: Any, during_step: Callable[[int], None] = lambda version: None) -> None:
        self.pool, self.during_step, self.policy_version = pool, during_step, 0
        self.batches: list[list[tuple[int, list[float], list[float], int]]] = []

    def step(self, groups: Sequence[TrainGroup]) -> dict[str, float]:
        self.during_step(self.policy_version)
        self.batches.append(
            [
                (
                    group.rollout.request.index,
                    group.scored.rewards.tolist(),
                    group.advantages.tolist(),
                    group.rollout.min_version,
                )
                for group in groups
            ]
        )
        self.policy_version += 1
        return {}

    def push_weights(self, pool: Any) -> None:
        if isinstance(pool, LocalPool):
            pool.update_weights(self.policy_version)
        else:
            pool.update_weights(self.policy_version, Update(self.policy_version).weights)

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


def request(index: int) -> RolloutRequest:
    """Of an example of its own at each index."""
    plain = PlainStream().request(index)
    prompt = dataclasses.replace(plain.prompt, example=dataclasses.replace(EXAMPLE, id=str(index)))
    return dataclasses.replace(plain, prompt=prompt)


def value(example: Any, completion: Completion) -> float:
    """By the text: of some groups, both completions have the same."""
    index = int(completion.text[:-1])
    return float(completion.text.endswith("a") and index % 3 > 0)


def slow_reward(function: Callable[[Any, Completion], float], concurrency: int = 8, **limits: Any) -> SlowReward:
    given = {"batch_size": None, "timeout_s": PATIENCE, "retries": 0, "wait_s": 0.001, "max_calls": None}
    given |= {"max_seconds": None, "on_failure": "stop", **limits}
    return SlowReward(
        "slow",
        in_thread(lambda examples, completions: [function(examples[0], completions[0])]),
        Limits(concurrency=concurrency, **given),
        RewardCache(None),
        settings={},
        keys={"on_failure": "reward.slow.on_failure", "timeout_s": "reward.timeout_s"},
    )


def run(
    pool: Any,
    rubric: Rubric,
    *,
    max_staleness: int = 0,
    dynamic: bool = False,
    steps: int = 6,
    during_step: Callable[[int], None] = lambda version: None,
) -> tuple[Learner, list[StepResult], GroupBuffer]:
    buffer = GroupBuffer(
        pool,
        request,
        rubric.score,
        groups_per_step=3,
        max_staleness=max_staleness,
        max_discarded=9,
        is_kept=lambda scored: not dynamic or has_learning_signal(scored, mask_truncated=False),
        begin=rubric.begin if rubric.is_slow else None,
    )
    learner, results = Learner(pool, during_step), []
    try:
        train(
            pool,
            learner,
            buffer,
            AdvantageEstimator("grpo"),
            done=0,
            steps=steps,
            tracer=Tracer(),
            after_step=results.append,
        )
    finally:
        rubric.close()
    return learner, results, buffer


def rubric_of(*rewards: GroupReward) -> Rubric:
    return Rubric([WeightedReward(f"part{n}" if n else "slow", reward, 1.0) for n, reward in enumerate(rewards)])


def dawdling(seed: int) -> SlowReward:
    """Takes up to 4 ms a call, each run others."""
    rng = random.Random(seed)

    def reward(example: Any, completion: Completion) -> float:
        time.sleep(rng.random() * 0.004)
        return value(example, completion)

    return slow_reward(reward)


@pytest.mark.parametrize("max_staleness", [0, 1, 2])
def test_what_is_learnt_is_what_fast_rewards_give(max_staleness: int) -> None:
    fast, _, _ = run(LocalPool(Engine()), rubric_of(per_completion(value)), max_staleness=max_staleness)
    slow, results, _ = run(LocalPool(Engine()), rubric_of(dawdling(0)), max_staleness=max_staleness)
    assert [[entry[:3] for entry in batch] for batch in slow.batches] == [
        [entry[:3] for entry in batch] for batch in fast.batches
    ]
    assert len(fast.batches) == 6
    assert all(result.metrics["staleness"] <= max_staleness for result in results)
    if max_staleness == 0:
        assert slow.batches == fast.batches


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_how_long_rewards_take_changes_nothing(max_staleness: int) -> None:
    """Neither which groups are discarded and replaced, nor by which weights anything is sampled."""
    runs = [
        run(LocalPool(Engine()), rubric_of(dawdling(seed)), max_staleness=max_staleness, dynamic=True)
        for seed in range(3)
    ]
    assert runs[0][0].batches == runs[1][0].batches == runs[2][0].batches
    assert sum(len(result.discarded) for result in runs[0][1]) > 0
    assert all(len(batch) == 3 for batch in runs[0][0].batches)


def test_groups_of_a_batch_are_scored_side_by_side() -> None:
    together = threading.Barrier(6)  # three groups of two

    def reward(example: Any, completion: Completion) -> float:
        together.wait(timeout=PATIENCE)
        return value(example, completion)

    learner, results, _ = run(LocalPool(Engine()), rubric_of(slow_reward(reward)), steps=2)
    assert len(learner.batches) == 2
    assert all(result.metrics["seconds/reward"] > 0 for result in results)


def test_in_one_process_the_next_step_s_rewards_come_while_the_learner_works() -> None:
    called: set[int] = set()
    changed = threading.Condition()

    def reward(example: Any, completion: Completion) -> float:
        index = int(completion.text[:-1])
        with changed:
            called.add(index)
            changed.notify_all()
            # 0, 3 and 5 are the first to finish; those of later steps wait until the learner works
            if index not in (0, 3, 5):
                assert changed.wait_for(lambda: len(learning) > 0, PATIENCE)
        return value(example, completion)

    learning: list[int] = []

    def during_step(version: int) -> None:
        with changed:
            learning.append(version)
            changed.notify_all()
            wanted = 3 * min(version + 2, 4)
            assert changed.wait_for(lambda: len(called) >= wanted, PATIENCE), (version, called)

    learner, _, _ = run(
        LocalPool(Engine()), rubric_of(slow_reward(reward, 64)), max_staleness=1, steps=4, during_step=during_step
    )
    assert len(learner.batches) == 4


def test_a_group_that_arrives_while_the_learner_works_is_scored_then() -> None:
    """Its worker finishes it during the step, and the step lasts until its reward is asked for."""
    worker = FakeWorker("worker", auto=False)
    pool = WorkerPool(lambda slot: worker, 1, PoolSettings(capacity=100))
    channel = pool.channel()
    called: list[str] = []
    changed = threading.Condition()

    def reward(example: Any, completion: Completion) -> float:
        with changed:
            called.append(threading.current_thread().name)
            changed.notify_all()
        return float(len(called))

    def finish(count: int) -> None:
        end = time.monotonic() + PATIENCE
        while count and time.monotonic() < end:
            with worker.lock:
                held = sorted(worker.held)[:count]
                for index in held:
                    worker.finish(index)
            count -= len(held)
            time.sleep(0.001)

    def during_step(version: int) -> None:
        before = len(called)
        finish(3 if version < 2 else 0)
        with changed:
            assert changed.wait_for(lambda: version == 2 or len(called) >= before + 3, PATIENCE), version

    feeder = threading.Thread(target=finish, args=(3,))
    feeder.start()
    try:
        learner, _, _ = run(channel, rubric_of(slow_reward(reward)), max_staleness=1, steps=3, during_step=during_step)
    finally:
        feeder.join()
        pool.close()
    assert [len(batch) for batch in learner.batches] == [3, 3, 3]
    # the two completions of a group have one text
    assert len(called) == 9
    assert threading.current_thread().name not in called


def test_rewards_that_ask_the_learner_are_computed_in_the_loop_and_never_while_it_trains() -> None:
    threads, training = set(), []

    def asks(group: RolloutGroup) -> Any:
        threads.add(threading.current_thread())
        assert not training
        return np.zeros(2, np.float32)

    def during_step(version: int) -> None:
        training.append(version)
        time.sleep(0.002)
        training.clear()

    run(LocalPool(Engine()), rubric_of(dawdling(1), asks), max_staleness=1, during_step=during_step)
    assert threads == {threading.current_thread()}


def test_a_failure_of_a_later_step_s_reward_stops_the_run_before_that_step() -> None:
    def reward(example: Any, completion: Completion) -> float:
        if int(completion.text[:-1]) == 4:
            raise RuntimeError("no route")
        return value(example, completion)

    learnt: list[int] = []
    with pytest.raises(RewardError, match="no route"):
        run(
            LocalPool(Engine()), rubric_of(slow_reward(reward)), max_staleness=1, during_step=lambda v: learnt.append(v)
        )
    assert learnt in ([], [0])


def test_what_others_sample_in_the_same_pool_is_not_scored() -> None:
    """On-policy, evaluations share the pool, and a judge costs money."""
    seen: list[str] = []
    rubric = rubric_of(slow_reward(lambda example, completion: seen.append(completion.text) or 0.0))
    pool = LocalPool(Engine())
    _, _, buffer = run(pool, rubric, steps=1)
    seen.clear()
    pool.submit(request(99))
    pool.collect()
    assert buffer.pending == []
    assert seen == []


def test_a_missing_reward_is_no_part_of_the_mean() -> None:
    def reward(example: Any, completion: Completion) -> float:
        if completion.text == "0a":
            raise RuntimeError
        return 1.0

    _, results, _ = run(LocalPool(Engine()), rubric_of(slow_reward(reward, on_failure="missing")), steps=2)
    assert results[0].metrics["reward/slow"] == 1.0
    assert results[0].metrics["reward/mean"] == 1.0
    (group,) = (group for group in results[0].groups if group.rollout.request.index == 0)
    assert group.scored.rewards.tolist() == [0.0, 0.0]

    def never(example: Any, completion: Completion) -> float:
        raise RuntimeError

    _, results, _ = run(LocalPool(Engine()), rubric_of(slow_reward(never, on_failure="missing")), steps=1)
    assert not {"reward/slow", "reward/mean"} & results[0].metrics.keys()


def test_fast_rewards_ask_nothing_new_of_a_pool() -> None:
    """A scorer that is only a function, as of fast rewards, needs nothing of this."""
    groups: list[ScoredGroup] = []

    def score(group: RolloutGroup) -> ScoredGroup:
        groups.append(ScoredGroup(group, np.array([0.0, 1.0], np.float32), {}))
        return groups[-1]

    class OldPool(LocalPool):
        on_sampled = sample_ahead = None  # type: ignore[assignment]

    buffer = GroupBuffer(OldPool(Engine()), PlainStream().request, score, groups_per_step=2, max_staleness=1)
    batch, _ = buffer.next_batch(1, steps=3, version=0)
    assert batch == groups
