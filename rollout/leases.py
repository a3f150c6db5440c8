"""The records of a worker pool: who holds which request, how each worker is, what is being pushed."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Protocol

from rlmed.core.protocols import ClusterError
from rlmed.core.types import RolloutGroup, RolloutRequest
from rlmed.core.weights import PushReport, Recipient, WeightOffer
from rollout.worker import Worker, WorkerStatus

LINE_LENGTH = 240
"""Of a cause in a message; Ray explains the death of a process in a thousand characters."""


class RolloutError(ClusterError):
    """Rollouts cannot go on; the message names the worker, the cause and the cure."""


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """Limits of a pool; seconds where a name ends in _s."""

    capacity: int
    """Completions that a worker holds at a time, waiting ones included; the others wait here for whoever is free first."""
    heartbeat_s: float = 2.0
    """Between two questions of how a worker is."""
    silence_s: float = 60.0
    """A worker that has not answered for so long is replaced."""
    stall_s: float = 600.0
    """A worker that answers, has work and made no step for so long is replaced."""
    start_s: float = 600.0
    """A new worker may take so long until its first answer."""
    push_s: float = 600.0
    """Applying new weights may take so long."""
    sleeps: bool = False
    """Engines give their GPU's memory back while the learner learns."""
    max_failures: int = 3
    """A worker may be lost so often without having finished a group in between, and a request be leased so often again."""


class Receiver(Protocol):
    """Where a finished group goes."""

    def deliver(self, group: RolloutGroup) -> None:
        """Take a group."""
        ...

    def refuse(self, reason: str) -> None:
        """A request can never be sampled."""
        ...


@dataclass(slots=True)
class Lease:
    """A request on its way."""

    number: int
    request: RolloutRequest
    receiver: Receiver
    losses: int = 0
    """Workers that were lost while they held it."""


@dataclass(slots=True, eq=False)
class Slot:
    """A place for a worker; the worker in it may change."""

    number: int
    worker: Worker
    started: float
    ready: bool = False
    """It has answered and has the current weights."""
    answered: float | None = None
    """When it last answered; None before the first time."""
    status: WorkerStatus | None = None
    progressed: float = 0.0
    """When its progress last changed."""
    asked: bool = False
    """A question of how it is has not been answered yet."""
    collecting: bool = False
    push_started: float | None = None
    """When the weights were sent that it has not confirmed yet."""
    leases: dict[int, Lease] = field(default_factory=dict)
    failures: int = 0
    """In a row, without a finished group."""
    idle_since: float | None = None
    """Since when it is ready and has no lease."""
    idle_s: float = 0.0
    """Seconds of idleness that are over."""

    def idle(self, now: float) -> float:
        """Seconds of idleness so far."""
        return self.idle_s + (0.0 if self.idle_since is None else now - self.idle_since)

    def note_idleness(self, now: float) -> None:
        """Start or end a time of idleness; called after every change of `ready` or `leases`."""
        idle = self.ready and not self.leases
        if idle and self.idle_since is None:
            self.idle_since = now
        elif not idle and self.idle_since is not None:
            self.idle_s += now - self.idle_since
            self.idle_since = None

    @property
    def completions(self) -> int:
        """Completions under way."""
        return sum(lease.request.group_size for lease in self.leases.values())

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.worker.name} ({self.status.where})" if self.status else self.worker.name

    def recipient(self) -> Recipient:
        """The worker as weights are sent to it."""
        return Recipient(self.name, self.worker.address, self.status.devices if self.status else ())


@dataclass(slots=True)
class Push:
    """New weights on their way to all workers."""

    version: int
    weights: WeightOffer
    outstanding: set[int] = field(default_factory=set)
    """Numbers of the slots that have not confirmed."""
    reports: list[PushReport] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)


def cause_of(error: BaseException) -> str:
    """The error in one line of bounded length: the last one, where a traceback has its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    line = lines[-1] if len(lines[-1]) <= LINE_LENGTH else f"{lines[-1][:LINE_LENGTH].rstrip()}…"
    return line if line.startswith(type(error).__name__) else f"{type(error).__name__}: {line}"
