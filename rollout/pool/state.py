"""State of a worker pool: leases, slots and the push in progress."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rlmed.core.protocols import ClusterError
from rlmed.core.types import RolloutRequest
from rlmed.core.weights import EngineHandle, PushReport, WeightUpdate
from rollout.pool.worker import Worker, WorkerStatus

if TYPE_CHECKING:
    from rollout.pool.channel import Channel

LINE_LENGTH = 240
"""Longest cause in a message; Ray explains the death of a process in a thousand characters."""


class RolloutError(ClusterError):
    """Rollouts cannot continue; the message names the worker, the cause and what to do."""


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """Limits of a pool; names in _s are seconds."""

    capacity: int
    """Completions per worker, queued ones included; further requests wait for a free worker."""
    heartbeat_s: float = 2.0
    """Interval between status requests."""
    silence_s: float = 60.0
    """Replace a worker that has not answered for this long."""
    stall_s: float = 600.0
    """Replace a worker that answers and has work but made no step for this long."""
    start_s: float = 600.0
    """Time for a new worker's first answer."""
    push_s: float = 600.0
    """Time for applying new weights."""
    sleeps: bool = False
    """Engines release GPU memory while the learner works."""
    max_failures: int = 3
    """Losses of a worker without a finished group, and re-leases of a request, before the end."""


@dataclass(slots=True)
class Lease:
    """A request held by a worker or waiting for one."""

    number: int
    request: RolloutRequest
    receiver: Channel
    losses: int = 0
    """Workers lost while they held it."""


@dataclass(slots=True, eq=False)
class Slot:
    """Slot for a worker; the worker in it may change."""

    number: int
    worker: Worker
    started: float
    ready: bool = False
    """True once it has answered and has the current weights."""
    answered: float | None = None
    """Time of the last answer; None before the first."""
    status: WorkerStatus | None = None
    progressed: float = 0.0
    """Time at which its progress last changed."""
    asked: bool = False
    """True while a status request is unanswered."""
    collecting: bool = False
    push_started: float | None = None
    """Time at which weights that it has not confirmed were sent."""
    leases: dict[int, Lease] = field(default_factory=dict)
    failures: int = 0
    """Losses in a row without a finished group."""
    idle_since: float | None = None
    """Time since which it is ready and has no lease."""
    idle_s: float = 0.0
    """Seconds of past idle periods."""

    def idle(self, now: float) -> float:
        """Return the idle seconds so far."""
        return self.idle_s + (0.0 if self.idle_since is None else now - self.idle_since)

    def note_idleness(self, now: float) -> None:
        """Start or end an idle period; called after every change of `ready` or `leases`."""
        idle = self.ready and not self.leases
        if idle and self.idle_since is None:
            self.idle_since = now
        elif not idle and self.idle_since is not None:
            self.idle_s += now - self.idle_since
            self.idle_since = None

    @property
    def completions(self) -> int:
        """Number of completions in flight."""
        return sum(lease.request.group_size for lease in self.leases.values())

    @property
    def name(self) -> str:
        """Name for messages, with host and process once known."""
        return f"{self.worker.name} ({self.status.where})" if self.status else self.worker.name

    def handle(self) -> EngineHandle:
        """Return what the learner needs to send weights to the worker's engine."""
        return EngineHandle(self.name, self.worker.address, self.status.devices if self.status else ())


@dataclass(slots=True)
class Push:
    """A push of new weights to all workers."""

    weights: WeightUpdate
    outstanding: set[int] = field(default_factory=set)
    """Numbers of the slots that have not confirmed yet."""
    reports: list[PushReport] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)


def cause_of(error: BaseException) -> str:
    """Return an error's last line (a traceback's message), cut to `LINE_LENGTH` characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    line = lines[-1] if len(lines[-1]) <= LINE_LENGTH else f"{lines[-1][:LINE_LENGTH].rstrip()}…"
    return line if line.startswith(type(error).__name__) else f"{type(error).__name__}: {line}"
