"""Worker protocol: an engine in its own process, called through futures.

`rollout.pool.actor` implements it with Ray actors, the pool's tests with threads and a clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from rlmed.core.types import Completion, RolloutRequest
from rlmed.core.weights import PushReport


@dataclass(frozen=True, slots=True)
class FinishedGroup:
    """Completions of one request; its prompt is not sent back."""

    index: int
    """`RolloutRequest.index` as the worker received it."""
    completions: tuple[Completion, ...]
    refused: str | None = None
    """Why the engine can never run this request; `completions` is empty then."""


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """A worker's own report."""

    progress: int
    """Grows with every engine step: a busy worker whose number stands still hangs."""
    busy: bool
    policy_version: int
    generated_tokens: int
    where: str
    """Host and process, for messages."""
    devices: tuple[str, ...] = ()
    """See `rlmed.core.weights.EngineHandle.devices`."""


class Worker(Protocol):
    """Handle of one worker.

    No method blocks; a future fails with the worker's error or cause of death.
    """

    name: str
    """For messages."""
    address: Any
    """See `rlmed.core.weights.EngineHandle.address`."""

    def submit(self, requests: Sequence[RolloutRequest]) -> Future[None]:
        """Queue requests all at once, so that those that arrive together start together."""
        ...

    def collect(self) -> Future[list[FinishedGroup]]:
        """Return the next finished groups, at least one, or none after a timeout."""
        ...

    def update_weights(self, weights: Any) -> Future[PushReport]:
        """Fetch what `rlmed.core.weights.WeightUpdate.stored` returned and sample from it now."""
        ...

    def sleep(self) -> Future[None]:
        """Put the engine to sleep until the next weights arrive."""
        ...

    def status(self) -> Future[WorkerStatus]:
        """Return the status; a live worker answers even in the middle of a step."""
        ...

    def kill(self) -> None:
        """Kill the process at once, even if it no longer responds."""
        ...
