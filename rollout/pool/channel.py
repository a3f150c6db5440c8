"""Client side of a worker pool."""

from __future__ import annotations

import queue
from collections.abc import Callable
from typing import TYPE_CHECKING

from rlmed.core.types import RolloutGroup, RolloutRequest
from rlmed.core.weights import WeightUpdate
from rollout.pool.state import RolloutError

if TYPE_CHECKING:
    from rollout.pool.pool import WorkerPool


class Channel:
    """`rlmed.core.protocols.RolloutPool` on shared workers; training, evaluation have one each."""

    def __init__(self, pool: WorkerPool) -> None:
        """Use `WorkerPool.channel` to create one."""
        self._pool = pool
        self._submitted: list[RolloutRequest] = []
        self._groups: queue.SimpleQueue[RolloutGroup | str | None] = queue.SimpleQueue()
        self._in_flight = 0
        self._seen: Callable[[RolloutGroup], None] = lambda group: None

    @property
    def in_flight(self) -> int:
        """Number of requests submitted and not yet collected."""
        return self._in_flight

    def submit(self, request: RolloutRequest) -> None:
        """Queue a request; the next `flush` or `collect` sends all queued ones together."""
        self._submitted.append(request)
        self._in_flight += 1

    def flush(self) -> None:
        """Send the queued requests in one message."""
        if self._submitted:
            self._pool.add(self, self._submitted)
            self._submitted = []

    def collect(self) -> RolloutGroup:
        """Wait for a group and return it.

        Raises:
            RuntimeError: if nothing is in flight.
            ValueError: if an engine refuses a request.
            RolloutError: if rollouts cannot continue.
        """
        if self._in_flight == 0:
            raise RuntimeError("collect() was called with no request in flight")
        self.flush()
        self._pool.raise_error()
        group = self._groups.get()
        if group is None:
            self._pool.raise_error()
            raise RolloutError("the pool was closed while collect() waited for a group")
        self._in_flight -= 1
        if isinstance(group, str):
            raise ValueError(group)
        return group

    def on_sampled(self, seen: Callable[[RolloutGroup], None]) -> None:
        """Call `seen` with each group when it arrives, in the pool's thread."""
        self._seen = seen

    def sample_ahead(self) -> None:
        """No-op: workers sample while the learner works."""

    def sleep(self) -> None:
        """See `WorkerPool.sleep`."""
        self._pool.sleep()

    def update_weights(self, version: int, weights: WeightUpdate | None = None) -> None:
        """See `WorkerPool.update_weights`."""
        assert weights is not None, "the workers do not share the learner's parameters"
        self._pool.update_weights(weights)

    def metrics(self) -> dict[str, float]:
        """See `WorkerPool.metrics`."""
        return self._pool.metrics()

    def close(self) -> None:
        """Drop everything in flight; closing the last channel stops the workers."""
        self._in_flight = 0
        self._pool.drop(self)

    def deliver(self, group: RolloutGroup) -> None:
        """Hand over a finished group; called by the pool."""
        self._seen(group)
        self._groups.put(group)

    def refuse(self, reason: str) -> None:
        """Report a request that can never run; called by the pool."""
        self._groups.put(reason)

    def wake(self) -> None:
        """Wake a waiting `collect` so that it sees the pool's error; called by the pool."""
        self._groups.put(None)
