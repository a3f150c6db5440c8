"""What a pool knows of a rollout worker: an engine in a process of its own, spoken to through futures.

`rollout.actor` makes Ray actors of it; the tests of the pool use threads and a clock.
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
    """The completions of one request; its prompt does not travel back."""

    index: int
    """`RolloutRequest.index` as the worker was given it."""
    completions: tuple[Completion, ...]
    refused: str | None = None
    """Why the engine will never sample this request; there are no completions then."""


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """How a worker is, as it says itself."""

    progress: int
    """Grows with every step of the engine: a busy worker whose number stands still hangs."""
    busy: bool
    policy_version: int
    generated_tokens: int
    where: str
    """Host and process, for messages."""
    devices: tuple[str, ...] = ()
    """See `rlmed.core.weights.Recipient.devices`."""


class Worker(Protocol):
    """The handle of one worker. No method waits; a future fails with what killed the worker or what it raised."""

    name: str
    """For messages."""
    address: Any
    """See `rlmed.core.weights.Recipient.address`."""

    def submit(self, requests: Sequence[RolloutRequest]) -> Future[None]:
        """Queue requests, all at once, so that what arrives together starts together."""
        ...

    def collect(self) -> Future[list[FinishedGroup]]:
        """The next finished groups, one at least; or none after a while."""
        ...

    def update_weights(self, version: int, weights: Any) -> Future[PushReport]:
        """Fetch these weights and sample from them from now on; see `rlmed.core.weights.WeightOffer.stored`."""
        ...

    def rest(self) -> Future[None]:
        """Let the engine sleep until it is given weights."""
        ...

    def status(self) -> Future[WorkerStatus]:
        """Answered at any time by a worker that lives, also in the middle of a step."""
        ...

    def kill(self) -> None:
        """End the process at once, also one that does not listen any more."""
        ...
