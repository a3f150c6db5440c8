"""Deliver new weights to a pool's workers: sent directly to all ready ones, or fetched by each."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from rlmed.core.weights import TransferError
from rollout.pool.state import Push, Slot
from rollout.pool.worker import Worker


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

    def begin(self, push: Push, slots: Sequence[Slot]) -> None:
        """Start a push to ready slots; starting workers get the weights after a first answer."""
        self._newest, push.outstanding = push, {slot.number for slot in slots}
        sending = push.weights.send([slot.handle() for slot in slots]) if slots else None
        for slot in slots:
            self.welcome(slot, sending)
        if not slots:
            push.done.set()

    def welcome(self, slot: Slot, sending: Future[Any] | None = None) -> None:
        """Make a slot ready once its worker has the newest weights; it fetches them if not sent."""
        push, worker = self._newest, slot.worker
        if push is None:
            slot.ready = True
            return
        slot.ready, slot.push_started = False, time.monotonic()

        def updated(done: Future[Any]) -> None:
            error = done.exception()
            if sending is not None and error is not None and not isinstance(error, TransferError):
                raise error  # the learner's or the user's
            # one that may have only part of the weights is replaced, too
            if self._lost_if_failed(slot, worker, done) or slot.worker is not worker:
                return
            if push is not self._newest or done.result() is None:  # superseded, or could not be sent
                self.welcome(slot)
                return
            slot.ready, slot.push_started = True, None
            if not push.done.is_set():
                push.reports.append(done.result())
            self.leave_out(slot)

        self._then(sending or worker.update_weights(push.weights.stored()), updated)

    def leave_out(self, slot: Slot) -> None:
        """Stop waiting for a slot: it has the weights, or its worker was lost."""
        if self._newest is not None:
            self._newest.outstanding.discard(slot.number)
            if not self._newest.outstanding:
                self._newest.done.set()
