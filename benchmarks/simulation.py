"""A cluster on a simulated clock: real loop, buffer and pool, simulated workers and learner.

A worker samples as an engine does: whole groups start while rows are free, every step gives each
running completion one token, and a step takes `Costs.step_s` and for each row `Costs.row_s`. Nobody
waits in real time: the clock jumps to the next event once the pool has handled the last one. So the
result does not depend on the machine, nor on how many cores it has.
"""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rlmed.core.protocols import RolloutPool
from rlmed.core.types import (
    Completion,
    Example,
    IntArray,
    Prompt,
    RolloutGroup,
    RolloutRequest,
    SamplingParams,
    ScoredGroup,
    TrainGroup,
)
from rlmed.core.weights import PushReport, StoredWeights, WeightUpdate
from rollout.native.scheduler import EngineLimits, Scheduler
from rollout.pool.channel import Channel
from rollout.pool.pool import WorkerPool
from rollout.pool.state import PoolSettings
from rollout.pool.worker import FinishedGroup, WorkerStatus

PATIENCE_S = 600.0
"""Real seconds for what takes no real time."""


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds of everything that takes time."""

    prompt_s: float
    """A prompt, computed before its group's first token."""
    step_s: float
    """A step of an engine, whatever it samples."""
    row_s: float
    """Each completion that a step gives a token."""
    learn_s: float
    """A step of the loop without its rollout: prompts, rewards, learner."""
    push_s: float
    """New weights on their way to the workers, which sample meanwhile."""


@dataclass(frozen=True, slots=True)
class Load:
    """What a run samples."""

    groups: int
    """Groups per step."""
    group_size: int
    max_tokens: int
    shortest: float = 1.0
    """Lengths are uniform from this share of `max_tokens` to all of it."""

    def request(self, index: int) -> RolloutRequest:
        """Return the request at an index."""
        prompt = Prompt(Example(str(index), None, "Which?", ("head", "knee"), 0), "", np.arange(8))
        return RolloutRequest(index, prompt, self.group_size, SamplingParams(max_tokens=self.max_tokens, seed=index))

    def lengths(self, request: RolloutRequest) -> IntArray:
        """Return int64 [G], the lengths of a group's completions."""
        shortest = max(1, round(self.shortest * self.max_tokens))
        return np.random.default_rng(request.sampling.seed).integers(shortest, self.max_tokens + 1, request.group_size)


class Clock:
    """Simulated time; the main thread alone lets it pass."""

    def __init__(self) -> None:
        """Start at 0."""
        self.now = 0.0
        self.settle: Callable[[], None] = lambda: None
        """Called after each event: returns when everybody has reacted to it."""
        self._order = itertools.count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []

    def after(self, seconds: float, event: Callable[[], None]) -> None:
        """Have an event happen."""
        heapq.heappush(self._events, (self.now + seconds, next(self._order), event))

    def next_event(self) -> None:
        """Jump to the next event.

        Raises:
            RuntimeError: if nothing will ever happen.
        """
        if not self._events:
            raise RuntimeError("the loop waits for what no worker will do")
        self.now, _, event = heapq.heappop(self._events)
        event()
        self.settle()

    def wait(self, seconds: float) -> None:
        """Let time pass."""
        end = self.now + seconds
        while self._events and self._events[0][0] <= end:
            self.next_event()
        self.now = end


@dataclass(slots=True, eq=False)
class _Running:
    """A group that an engine samples."""

    request: RolloutRequest
    lengths: IntArray
    version: int
    tokens: int = 0


@dataclass(eq=False)
class SimulatedWorker:
    """A `rollout.pool.worker.Worker` whose engine only takes time."""

    name: str
    clock: Clock
    costs: Costs
    load: Load
    max_completions: int
    address: Any = None
    version: int = 0
    busy_s: float = 0.0
    """Simulated seconds in which it sampled."""
    _running: list[_Running] = field(default_factory=list)
    _finished: list[FinishedGroup] = field(default_factory=list)
    _collecting: Future[list[FinishedGroup]] | None = None
    _stepping: bool = False
    _steps: int = 0

    def __post_init__(self) -> None:
        """Start with an empty queue."""
        self._scheduler = Scheduler(EngineLimits(max_completions=self.max_completions))

    def submit(self, requests: Sequence[RolloutRequest]) -> Future[None]:
        """See `Worker.submit`."""
        for request in requests:
            self._scheduler.submit(request)
        if not self._stepping:
            self._begin_step()
        return _done(None)

    def collect(self) -> Future[list[FinishedGroup]]:
        """See `Worker.collect`."""
        self._collecting = future = Future()
        self._deliver()
        return future

    def update_weights(self, weights: StoredWeights) -> Future[PushReport]:
        """See `Worker.update_weights`."""
        self.version = weights.version
        return _done(PushReport(0.0, 0.0))

    def sleep(self) -> Future[None]:
        """See `Worker.sleep`."""
        return _done(None)

    def status(self) -> Future[WorkerStatus]:
        """See `Worker.status`; every answer is progress: no real time may count against it."""
        self._steps += 1
        return _done(WorkerStatus(self._steps, self._stepping, self.version, 0, "simulated"))

    def kill(self) -> None:
        """See `Worker.kill`."""

    def _rows(self) -> int:
        return sum(int((group.lengths > group.tokens).sum()) for group in self._running)

    def _begin_step(self) -> None:
        started = self._scheduler.admit(self.max_completions - self._rows())
        self._running += [_Running(request, self.load.lengths(request), self.version) for request in started]
        self._stepping = bool(self._running)
        if self._stepping:
            costs = self.costs
            seconds = len(started) * costs.prompt_s + costs.step_s + self._rows() * costs.row_s
            self.busy_s += seconds
            self.clock.after(seconds, self._end_step)

    def _end_step(self) -> None:
        for group in self._running:
            group.tokens += 1
        self._finished += [self._result(group) for group in self._running if group.tokens == group.lengths.max()]
        self._running = [group for group in self._running if group.tokens < group.lengths.max()]
        self._deliver()
        self._begin_step()

    def _result(self, group: _Running) -> FinishedGroup:
        completions = tuple(
            Completion(
                np.zeros(length, np.int64), np.zeros(length, np.float32), "", "stop", group.version, self.version
            )
            for length in group.lengths
        )
        return FinishedGroup(group.request.index, completions)

    def _deliver(self) -> None:
        if self._finished and self._collecting is not None:
            future, self._collecting = self._collecting, None
            groups, self._finished = self._finished, []
            future.set_result(groups)


class SteppedPool(WorkerPool):
    """The pool, and when it has nothing left to do."""

    def __init__(self, start: Callable[[int], Any], workers: int, settings: PoolSettings, clock: Clock) -> None:
        """Start the workers; `clock` waits for this pool from now on."""
        self._settling: list[threading.Event] = []
        self._clock = clock
        super().__init__(start, workers, settings)
        clock.settle = self.settle

    def channel(self) -> Channel:
        """See `WorkerPool.channel`; waiting for a group lets the clock run."""
        channel = ClockedChannel(self, self._clock)
        self._channels.append(channel)
        return channel

    def settle(self) -> None:
        """Return when every event has been handled and every request that fits has been sent."""
        settled = threading.Event()
        self._events.put(lambda: self._settling.append(settled))
        while not settled.wait(timeout=1.0):
            self.raise_error()

    def _execute(self, timeout: float) -> None:
        # comes after requests have been sent, which may have caused new events
        if self._events.empty():
            for settled in self._settling:
                settled.set()
            self._settling.clear()
        super()._execute(timeout)


class ClockedChannel(Channel):
    """A channel whose `collect` lets the clock run until a group is there."""

    def __init__(self, pool: SteppedPool, clock: Clock) -> None:
        """Wait on `clock` instead of in real time."""
        super().__init__(pool)
        self._clock, self._there = clock, 0

    def deliver(self, group: RolloutGroup) -> None:
        """See `Channel.deliver`."""
        self._there += 1
        super().deliver(group)

    def collect(self) -> RolloutGroup:
        """See `Channel.collect`."""
        self.flush()
        self._clock.settle()
        while not self._there:
            self._clock.next_event()
        self._there -= 1
        return super().collect()


class SimulatedLearner:
    """The part of a `rlmed.core.protocols.Learner` that the loop calls; it only takes time."""

    def __init__(self, clock: Clock, costs: Costs) -> None:
        """Start at policy version 0."""
        self.policy_version = 0
        self._clock, self._costs = clock, costs

    def step(self, groups: Sequence[TrainGroup]) -> dict[str, float]:
        """See `Learner.step`."""
        self._clock.wait(self._costs.learn_s)
        self.policy_version += 1
        return {}

    def push_weights(self, pool: RolloutPool) -> None:
        """See `Learner.push_weights`."""
        self._clock.wait(self._costs.push_s)
        version = self.policy_version
        pool.update_weights(version, WeightUpdate(lambda: StoredWeights(version, [])))


def start_pool(clock: Clock, costs: Costs, load: Load, workers: int) -> tuple[SteppedPool, list[SimulatedWorker]]:
    """Start a pool of simulated workers with room for a step's groups, and wait for it."""
    rows = load.groups * load.group_size
    simulated = [SimulatedWorker(f"worker {number}", clock, costs, load, rows) for number in range(workers)]
    limits = dict.fromkeys(("silence_s", "stall_s", "start_s", "push_s"), PATIENCE_S)
    # as much again as an engine samples at a time, as `rlmed.cluster.build` has it
    pool = SteppedPool(simulated.__getitem__, workers, PoolSettings(capacity=2 * rows, **limits), clock)
    pool.wait_until_ready()
    return pool, simulated


def score(group: RolloutGroup) -> ScoredGroup:
    """Reward every other completion."""
    rewards = (np.arange(len(group.completions)) % 2).astype(np.float32)
    return ScoredGroup(group, rewards, {"choice": rewards})


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future
