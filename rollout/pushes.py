"""How new weights reach the workers of a pool: sent to all that are ready at once, or fetched by each."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from rlmed.core.weights import NotConnectedError, PushReport, TransferError, WeightOffer
from rollout.leases import Push, Slot
from rollout.worker import Worker

log = logging.getLogger(__name__)


class LostIfFailed(Protocol):
    """True when a future of a slot's worker has failed; the worker is replaced then, unless it has been already."""

    def __call__(self, slot: Slot, worker: Worker, done: Future[Any]) -> bool:
        """See above."""
        ...


class Pushes:
    """The newest weights, and the push that is under way; used by the pool's thread alone."""

    def __init__(
        self, then: Callable[[Future[Any], Callable[[Future[Any]], None]], None], lost_if_failed: LostIfFailed
    ) -> None:
        """Report to a pool.

        Args:
            then: calls a function with a future in the pool's thread when the future has ended.
            lost_if_failed: see there.
        """
        self._then, self._lost_if_failed = then, lost_if_failed
        self._weights: tuple[int, WeightOffer] | None = None
        self._push: Push | None = None

    @property
    def any(self) -> bool:
        """True once there are weights to give."""
        return self._weights is not None

    def begin(self, push: Push, slots: Sequence[Slot]) -> None:
        """Start a push to the slots that are ready; one that is being started is given the weights when it answers."""
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
        """Let a slot's worker fetch the weights."""
        assert self._weights is not None
        slot.ready, slot.push_started = False, time.monotonic()
        worker, sent = slot.worker, self._weights
        fetching = worker.update_weights(sent[0], sent[1].stored())
        self._then(fetching, lambda done: self._updated(slot, worker, sent, done))

    def leave_out(self, slot: Slot) -> None:
        """Nobody waits for a slot any more: it has the weights, or its worker was lost."""
        if self._push is not None:
            self._push.outstanding.discard(slot.number)
            self._end_if_complete()

    def abandon(self) -> None:
        """The pool has failed: let whoever waits see it."""
        if self._push is not None:
            self._push.done.set()

    def _sent(
        self, members: Sequence[tuple[Slot, Worker]], sent: tuple[int, WeightOffer], done: Future[PushReport]
    ) -> None:
        """The learner has sent weights directly, or failed to."""
        error = done.exception()
        if isinstance(error, NotConnectedError):
            log.warning("%s. These weights go through the object store", error)
            for slot, worker in members:
                if slot.worker is worker:
                    self.give(slot)
        elif error is None or isinstance(error, TransferError):  # whoever may have a part of them only is replaced
            for slot, worker in members:
                self._updated(slot, worker, sent, done)
        else:
            raise error

    def _updated(self, slot: Slot, worker: Worker, sent: tuple[int, WeightOffer], done: Future[PushReport]) -> None:
        if self._lost_if_failed(slot, worker, done) or slot.worker is not worker:
            return
        if sent is not self._weights:  # newer ones have come meanwhile
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
