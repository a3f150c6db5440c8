"""Deliver new weights to a pool's workers: sent directly to all ready ones, or fetched by each."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from rlmed.core.weights import NotConnectedError, PushReport, TransferError
from rollout.pool.state import Push, Slot
from rollout.pool.worker import Worker

log = logging.getLogger(__name__)


class Pushes:
    """The newest push of weights; only the pool's thread uses it."""

    def __init__(
        self,
        then: Callable[[Future[Any], Callable[[Future[Any]], None]], None],
        lost_if_failed: Callable[[Slot, Worker, Future[Any]], bool],
    ) -> None:
        """Start without weights.

        Args:
            then: calls a function with a completed future in the pool's thread.
            lost_if_failed: returns True if a future of a slot's worker failed, after replacing the
                worker unless that was done already.
        """
        self._then, self._lost_if_failed = then, lost_if_failed
        self._newest: Push | None = None

    @property
    def any(self) -> bool:
        """True once there are weights to deliver."""
        return self._newest is not None

    def begin(self, push: Push, slots: Sequence[Slot]) -> None:
        """Start a push to ready slots; starting workers get the weights after a first answer."""
        self._newest, push.outstanding = push, {slot.number for slot in slots}
        sending = push.weights.send([slot.handle() for slot in slots]) if slots else None
        if sending is None:
            for slot in slots:
                self.give(slot)
        else:
            members = [(slot, slot.worker) for slot in slots]
            for slot in slots:
                slot.ready, slot.push_started = False, time.monotonic()
            self._then(sending, lambda done: self._sent(members, push, done))
        if not slots:
            push.done.set()

    def give(self, slot: Slot) -> None:
        """Have a slot's worker fetch the newest weights."""
        push, worker = self._newest, slot.worker
        assert push is not None
        slot.ready, slot.push_started = False, time.monotonic()
        fetching = worker.update_weights(push.weights.stored())
        self._then(fetching, lambda done: self._updated(slot, worker, push, done))

    def leave_out(self, slot: Slot) -> None:
        """Stop waiting for a slot: it has the weights, or its worker was lost."""
        if self._newest is not None:
            self._newest.outstanding.discard(slot.number)
            if not self._newest.outstanding:
                self._newest.done.set()

    def abandon(self) -> None:
        """Release the waiting caller after the pool has failed."""
        if self._newest is not None:
            self._newest.done.set()

    def _sent(self, members: Sequence[tuple[Slot, Worker]], push: Push, done: Future[PushReport]) -> None:
        """Handle the end of a direct send, successful or not."""
        error = done.exception()
        if isinstance(error, NotConnectedError):
            log.warning("%s. Sending these weights through the object store", error)
            for slot, worker in members:
                if slot.worker is worker:
                    self.give(slot)
        elif error is None or isinstance(error, TransferError):  # replace workers that may have only part of them
            for slot, worker in members:
                self._updated(slot, worker, push, done)
        else:
            raise error

    def _updated(self, slot: Slot, worker: Worker, push: Push, done: Future[PushReport]) -> None:
        if self._lost_if_failed(slot, worker, done) or slot.worker is not worker:
            return
        if push is not self._newest:  # superseded in the meantime
            self.give(slot)
            return
        slot.ready, slot.push_started = True, None
        if not push.done.is_set():
            push.reports.append(done.result())
        self.leave_out(slot)
