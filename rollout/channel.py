"""One user's side of a worker pool."""

from __future__ import annotations

import queue
from typing import Any, Protocol

from rlmed.core.types import RolloutGroup, RolloutRequest
from rollout.leases import RolloutError


class SharedWorkers(Protocol):
    """What a channel needs of its pool, `rollout.pool.WorkerPool`."""

    def add(self, channel: Channel, requests: list[RolloutRequest]) -> None:
        """Queue requests."""
        ...

    def drop(self, channel: Channel) -> None:
        """Forget the channel."""
        ...

    def raise_error(self) -> None:
        """Raise what ended the pool."""
        ...

    def rest(self) -> None:
        """Let the workers sleep."""
        ...

    def update_weights(self, version: int, weights: Any) -> Any:
        """Give the workers new weights."""
        ...

    def metrics(self) -> dict[str, float]:
        """Counts."""
        ...


class Channel:
    """See `rlmed.core.protocols.RolloutPool`: training and evaluation each have one on the same workers."""

    def __init__(self, pool: SharedWorkers) -> None:
        """Made by `WorkerPool.channel`."""
        self._pool = pool
        self._submitted: list[RolloutRequest] = []
        self._groups: queue.SimpleQueue[RolloutGroup | str | None] = queue.SimpleQueue()
        self._in_flight = 0

    @property
    def in_flight(self) -> int:
        """Requests submitted and not yet collected."""
        return self._in_flight

    def submit(self, request: RolloutRequest) -> None:
        """Queue a request; what is submitted up to the next `collect` leaves together."""
        self._submitted.append(request)
        self._in_flight += 1

    def flush(self) -> None:
        """Send what was submitted, in one message."""
        if self._submitted:
            self._pool.add(self, self._submitted)
            self._submitted = []

    def collect(self) -> RolloutGroup:
        """Wait for a group.

        Raises:
            RuntimeError: when nothing is in flight.
            ValueError: when an engine says that a request can never be sampled.
            RolloutError: when rollouts cannot go on.
        """
        if self._in_flight == 0:
            raise RuntimeError("collect() was called with no request in flight")
        self.flush()
        self._pool.raise_error()
        group = self._groups.get()
        if group is None:
            self._pool.raise_error()
            raise RolloutError("the pool was closed while a group was waited for")
        self._in_flight -= 1
        if isinstance(group, str):
            raise ValueError(group)
        return group

    def rest(self) -> None:
        """See `WorkerPool.rest`."""
        self._pool.rest()

    def update_weights(self, version: int, weights: Any = None) -> None:
        """See `WorkerPool.update_weights`."""
        self._pool.update_weights(version, weights)

    def metrics(self) -> dict[str, float]:
        """See `WorkerPool.metrics`."""
        return self._pool.metrics()

    def close(self) -> None:
        """Drop what is in flight; the last channel ends the workers."""
        self._in_flight = 0
        self._pool.drop(self)

    def deliver(self, group: RolloutGroup) -> None:
        """A group has finished; called by the pool."""
        self._groups.put(group)

    def refuse(self, reason: str) -> None:
        """A request can never be sampled; called by the pool."""
        self._groups.put(reason)

    def wake(self) -> None:
        """Let a waiting `collect` see that the pool has failed; called by the pool."""
        self._groups.put(None)
