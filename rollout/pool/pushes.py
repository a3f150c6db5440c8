"""Deliver new weights to a pool's workers: sent directly to all ready ones, or fetched by each."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from rlmed.core.weights import NotConnectedError, PushReport, TransferError, WeightUpdate
from rollout.pool.state import Push, Slot
from rollout.pool.worker import Worker

log = logging.getLogger(__name__)


class LostIfFailed(Protocol):
    """Return True if a future of a slot's worker failed, after replacing the worker unless that was done already."""

    def __call__(self, slot: Slot, worker: Worker, done: Future[Any]) -> bool:
        """See above."""
        ...


class Pushes:
    """The newest weights and the push in progress; only the pool's thread uses it."""

    def __init__(
        self, then: Callable[[Future[Any], Callable[[Future[Any]], None]], None], lost_if_failed: LostIfFailed
    ) -> None:
        """Start without weights.

        Args:
            then: calls a function with a completed future in the pool's thread.
            lost_if_failed: see `LostIfFailed`.
        """
        self._then, self._lost_if_failed = then, lost_if_failed
        self._weights: tuple[int, WeightUpdate] | None = None
        self._push: Push | None = None

    @property
    def any(self) -> bool:
        """True once there are weights to deliver."""
        return self._weights is not None

    def begin(self, push: Push, slots: Sequence[Slot]) -> None:
        """Start a push to the ready slots; a starting worker gets the weights after its first answer."""
        self._weights, self._push = (push.version, push.weights), push
        push.outstanding = {slot.number for slot in slots}
        sending = push.weights.send([slot.recipient() for slot in slots]) if slots else None
        if sending is None:
            for slot in slots:
                self.give(slot)
        else:
            sent, members = self._weights, [(slot, slot.worker) for slot in slots]
            for slot in slots:
                slot.ready, slot.push_started = False, time.monotonic()
            self._then(sending, lambda done: self._sent(members, sent, done))
        self._end_if_complete()

    def give(self, slot: Slot) -> None:
        """Have a slot's worker fetch the weights."""
        assert self._weights is not None
        slot.ready, slot.push_started = False, time.monotonic()
        worker, sent = slot.worker, self._weights
        fetching = worker.update_weights(sent[0], sent[1].stored())
        self._then(fetching, lambda done: self._updated(slot, worker, sent, done))

    def leave_out(self, slot: Slot) -> None:
        """Stop waiting for a slot: it has the weights, or its worker was lost."""
        if self._push is not None:
            self._push.outstanding.discard(slot.number)
            self._end_if_complete()

    def abandon(self) -> None:
        """Release the waiting caller after the pool has failed."""
        if self._push is not None:
            self._push.done.set()

    def _sent(
        self, members: Sequence[tuple[Slot, Worker]], sent: tuple[int, WeightUpdate], done: Future[PushReport]
    ) -> None:
        """Handle the end of a direct send, successful or not."""
        error = done.exception()
        if isinstance(error, NotConnectedError):
            log.warning("%s. Sending these weights through the object store", error)
            for slot, worker in members:
                if slot.worker is worker:
                    self.give(slot)
        elif error is None or isinstance(error, TransferError):  # replace workers that may have only part of them
            for slot, worker in members:
                self._updated(slot, worker, sent, done)
        else:
            raise error

    def _updated(self, slot: Slot, worker: Worker, sent: tuple[int, WeightUpdate], done: Future[PushReport]) -> None:
        if self._lost_if_failed(slot, worker, done) or slot.worker is not worker:
            return
        if sent is not self._weights:  # superseded in the meantime
            self.give(slot)
            return
        slot.ready, slot.push_started = True, None
        if self._push is not None:
            self._push.reports.append(done.result())
        self.leave_out(slot)

    def _end_if_complete(self) -> None:
        if self._push is not None and not self._push.outstanding:
            self._push.done.set()
            self._push = None
