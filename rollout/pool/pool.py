"""Worker pool: serves the least busy worker, returns finished groups, replaces dead, silent ones.

Each request is *leased* to one worker. If the worker dies, its leases go to others, and anything it
still sends is dropped. So every request is answered exactly once, whatever happens to the
processes.

One thread owns all state and runs events; callers and futures only add events, so nothing else
needs a lock.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import partial
from typing import Any

from rlmed.core.config.checks import ConfigError
from rlmed.core.protocols import ClusterError
from rlmed.core.types import RolloutGroup, RolloutRequest
from rlmed.core.weights import PushReport, WeightUpdate
from rollout.pool.channel import Channel
from rollout.pool.metrics import PoolMetrics
from rollout.pool.state import Lease, PoolSettings, Push, RolloutError, Slot, cause_of
from rollout.pool.worker import FinishedGroup, Worker, WorkerStatus

log = logging.getLogger(__name__)

READY_S = 0.05
"""Polling interval while workers start, in seconds."""


class WorkerPool:
    """Owns the workers and distributes the requests of its channels.

    Example:
        >>> pool = WorkerPool(start_worker, workers=2, settings=PoolSettings(capacity=64))   # doctest: +SKIP
        >>> channel = pool.channel()                                                         # doctest: +SKIP
        >>> channel.submit(request); group = channel.collect()                               # doctest: +SKIP
    """

    def __init__(self, start: Callable[[int], Worker], workers: int, settings: PoolSettings) -> None:
        """Start the workers without waiting for them.

        Args:
            start: creates the worker of a slot (0 .. workers - 1) without waiting for it.
            workers: number of slots.
            settings: limits.
        """
        self._start, self._settings = start, settings
        self._events: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._numbers = itertools.count()
        self._waiting: deque[Lease] = deque()
        self._leases: dict[int, Lease] = {}
        self._push: Push | None = None  # the newest
        self._error: Exception | None = None
        self._channels: list[Channel] = []
        self._closed = self._ever_answered = False
        now = time.monotonic()
        self._metrics = PoolMetrics(now)
        self._slots = [Slot(number, start(number), now, progressed=now) for number in range(workers)]
        self._thread = threading.Thread(target=self._run, name="rollout pool", daemon=True)
        self._thread.start()

    def channel(self) -> Channel:
        """Return a new `RolloutPool` on these workers, with its own requests and groups."""
        channel = Channel(self)
        self._channels.append(channel)
        return channel

    def metrics(self) -> dict[str, float]:
        """See `rollout.pool.metrics.PoolMetrics`."""
        return self._metrics.read(self._slots, time.monotonic())

    def wait_until_ready(self) -> None:
        """Wait until every worker has started, at most `PoolSettings.start_s`.

        Raises:
            RolloutError: if rollouts cannot continue.
        """
        end = time.monotonic() + self._settings.start_s
        while not all(slot.ready for slot in self._slots) and time.monotonic() < end:
            self.raise_error()
            time.sleep(READY_S)

    def sleep(self) -> None:
        """Put the engines to sleep until the next push, wait; no-op without `PoolSettings.sleeps`.

        Requests submitted before the push wait for it.

        Raises:
            RolloutError: if rollouts cannot continue.
        """
        if not self._settings.sleeps:
            return
        sleeping: Future[list[Future[None]]] = Future()
        self._events.put(lambda: sleeping.set_result([self._sleep(slot) for slot in self._slots if slot.ready]))
        while not wait([sleeping], timeout=1.0).done:
            self.raise_error()
        wait(sleeping.result(), timeout=self._settings.push_s)  # one that fails is replaced

    def update_weights(self, weights: WeightUpdate) -> list[PushReport]:
        """Push new weights to all workers and wait; a failed one is replaced by one that has them.

        The learner sends them directly to the ready workers if it can; workers that start later
        fetch them.

        Requests submitted afterwards are sampled with these weights or newer ones.

        Raises:
            RolloutError: if rollouts cannot continue.
        """
        push = Push(weights)
        self._events.put(lambda: self._begin(push, [slot for slot in self._slots if slot.ready]))
        while not push.done.wait(timeout=1.0):
            self.raise_error()
        self.raise_error()
        self._metrics.pushed(push.reports)
        return push.reports

    def add(self, channel: Channel, requests: list[RolloutRequest]) -> None:
        """Queue a channel's requests, all at once."""
        self._events.put(lambda: self._admit(channel, requests))

    def drop(self, channel: Channel) -> None:
        """Remove a channel and the requests it waits for."""
        if channel in self._channels:
            self._channels.remove(channel)
        self._events.put(lambda: self._forget(channel))
        if not self._channels:
            self.close()

    def raise_error(self) -> None:
        """Raise the pool's error, if it has failed."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Stop all workers."""
        if self._closed:
            return
        self._closed = True
        self._events.put(lambda: None)
        self._thread.join(timeout=30)
        for slot in self._slots:
            slot.worker.kill()

    # Everything below runs in the pool's own thread.

    def _run(self) -> None:
        beat = 0.0
        try:
            while not self._closed:
                if time.monotonic() >= beat:
                    self._check_workers()
                    beat = time.monotonic() + self._settings.heartbeat_s
                self._dispatch()
                now = time.monotonic()
                for slot in self._slots:
                    slot.note_idleness(now)
                self._execute(timeout=max(0.0, beat - time.monotonic()))
        except (ClusterError, ConfigError) as error:
            self._fail(error)
        except Exception as error:
            log.exception("the rollout pool failed")
            self._fail(RolloutError(f"the rollout pool failed: {error!r}"))

    def _execute(self, timeout: float) -> None:
        """Run the next event, if one comes within `timeout`, and all others queued by then."""
        try:
            self._events.get(timeout=timeout)()
            while True:
                self._events.get_nowait()()
        except queue.Empty:
            return

    def _fail(self, error: Exception) -> None:
        self._error = error
        for channel in self._channels:
            channel.wake()

    def _then(self, future: Future[Any], event: Callable[[Future[Any]], object]) -> None:
        """Queue an event when a future completes."""
        future.add_done_callback(lambda done: self._events.put(lambda: event(done)))

    def _admit(self, channel: Channel, requests: list[RolloutRequest]) -> None:
        for request in requests:
            lease = Lease(next(self._numbers), request, channel)
            self._leases[lease.number] = lease
            self._waiting.append(lease)

    def _forget(self, channel: Channel) -> None:
        self._leases = {number: lease for number, lease in self._leases.items() if lease.receiver is not channel}
        self._waiting = deque(lease for lease in self._waiting if lease.receiver is not channel)

    def _dispatch(self) -> None:
        """Lease waiting requests, oldest first, to the worker with room and fewest completions."""
        batches: dict[Slot, list[Lease]] = {}
        while self._waiting:
            slot = min((slot for slot in self._slots if slot.ready), key=lambda slot: slot.completions, default=None)
            size = self._waiting[0].request.group_size
            if slot is None or (slot.leases and slot.completions + size > self._settings.capacity):
                break
            lease = self._waiting.popleft()
            slot.leases[lease.number] = lease
            batches.setdefault(slot, []).append(lease)
        for slot, leases in batches.items():
            worker = slot.worker
            requests = [dataclasses.replace(lease.request, index=lease.number) for lease in leases]
            self._then(worker.submit(requests), partial(self._lost_if_failed, slot, worker))
            self._collect(slot)

    def _collect(self, slot: Slot) -> None:
        if slot.leases and not slot.collecting:
            slot.collecting = True
            worker = slot.worker
            self._then(worker.collect(), partial(self._collected, slot, worker))

    def _collected(self, slot: Slot, worker: Worker, done: Future[list[FinishedGroup]]) -> None:
        if self._lost_if_failed(slot, worker, done):
            return
        for group in done.result():
            lease = slot.leases.pop(group.index, None) if slot.worker is worker else None
            if lease is None or self._leases.pop(group.index, None) is None:
                # released to another worker, or its channel was closed
                self._metrics.groups_late += 1
                continue
            slot.failures = 0
            if group.refused:
                lease.receiver.refuse(f"prompt {lease.request.prompt.example.id!r}: {group.refused}")
            else:
                lease.receiver.deliver(RolloutGroup(lease.request, group.completions))
        if slot.worker is worker:
            slot.collecting = False
            self._collect(slot)

    def _sleep(self, slot: Slot) -> Future[None]:
        worker = slot.worker
        future = worker.sleep()
        self._then(future, partial(self._lost_if_failed, slot, worker))
        return future

    def _begin(self, push: Push, slots: list[Slot]) -> None:
        """Start a push to ready slots; starting workers get the weights after a first answer."""
        self._push, push.outstanding = push, {slot.number for slot in slots}
        sending = push.weights.send([slot.handle() for slot in slots]) if slots else None
        for slot in slots:
            self._welcome(slot, sending)
        if not slots:
            push.done.set()

    def _welcome(self, slot: Slot, sending: Future[Any] | None = None) -> None:
        """Make a slot ready once its worker has the newest weights; it fetches them if not sent."""
        push, worker = self._push, slot.worker
        if push is None:
            slot.ready = True
            return
        slot.ready, slot.push_started = False, time.monotonic()

        def updated(done: Future[Any]) -> None:
            if sending is not None:
                done.result()  # raises the learner's error, or the user's
            if self._lost_if_failed(slot, worker, done) or slot.worker is not worker:
                return
            if push is not self._push or done.result() is None:  # superseded, or could not be sent
                self._welcome(slot)
                return
            slot.ready, slot.push_started = True, None
            if not push.done.is_set():
                push.reports.append(done.result())
            self._leave_out(slot)

        self._then(sending or worker.update_weights(push.weights.stored()), updated)

    def _leave_out(self, slot: Slot) -> None:
        """Stop waiting for a slot: it has the weights, or its worker was lost."""
        if self._push is not None:
            self._push.outstanding.discard(slot.number)
            if not self._push.outstanding:
                self._push.done.set()

    def _check_workers(self) -> None:
        """Ask every worker for its status and replace those that are silent or stalled."""
        now, settings = time.monotonic(), self._settings
        for slot in self._slots:
            if slot.answered is None:
                limit, since = settings.start_s, slot.started
            else:
                limit, since = settings.silence_s, slot.answered
            if slot.asked and now - since > limit:
                self._lose(slot, TimeoutError(f"no answer for {now - since:.0f} s"))
            elif slot.push_started is not None and now - slot.push_started > settings.push_s:
                self._lose(slot, TimeoutError(f"new weights not applied for {now - slot.push_started:.0f} s"))
            elif slot.status and slot.status.busy and now - slot.progressed > settings.stall_s:
                self._lose(slot, TimeoutError(f"has work but made no step for {now - slot.progressed:.0f} s"))
            elif not slot.asked:
                slot.asked = True
                worker = slot.worker
                self._then(worker.status(), partial(self._answered, slot, worker))

    def _answered(self, slot: Slot, worker: Worker, done: Future[WorkerStatus]) -> None:
        if self._lost_if_failed(slot, worker, done) or slot.worker is not worker:
            return
        status, now = done.result(), time.monotonic()
        if slot.status is None or status.progress != slot.status.progress or not status.busy:
            slot.progressed = now
        first = slot.answered is None
        self._ever_answered = True
        slot.asked, slot.status, slot.answered = False, status, now
        if first:
            self._welcome(slot)

    def _lost_if_failed(self, slot: Slot, worker: Worker, done: Future[Any]) -> bool:
        """Return True if a future failed, after replacing its worker unless already done."""
        error = done.exception()
        if error is not None and slot.worker is worker and not self._closed:
            self._lose(slot, error)
        return error is not None

    def _lose(self, slot: Slot, error: BaseException) -> None:
        """Replace a slot's worker and lease its requests to others."""
        leases, name, ever_ready = list(slot.leases.values()), slot.name, slot.answered is not None
        slot.failures += 1
        self._metrics.lose(slot, time.monotonic())
        slot.worker.kill()
        if not self._ever_answered and not isinstance(error, TimeoutError):
            raise RolloutError(f"{name} could not be started: {cause_of(error)}") from error
        # a slot that waits for resources is no reason to stop while others work
        hopeless = slot.failures > self._settings.max_failures
        others_work = any(other.answered is not None for other in self._slots if other is not slot)
        if hopeless and (ever_ready or not others_work):
            raise RolloutError(
                f"lost {name} {slot.failures} times in a row without a finished group; last cause: {cause_of(error)}"
            ) from error
        log.warning("Lost %s: %s. Replacing it and sampling %d groups again", name, cause_of(error), len(leases))
        for lease in reversed(leases):
            lease.losses += 1
            if lease.losses > self._settings.max_failures:
                raise RolloutError(
                    f"lost {lease.losses} workers while they sampled prompt {lease.request.prompt.example.id!r}; "
                    f"last cause: {cause_of(error)}"
                ) from error
            if lease.number in self._leases:
                self._waiting.appendleft(lease)
        now = time.monotonic()
        self._slots[slot.number] = fresh = Slot(
            slot.number, self._start(slot.number), now, progressed=now, failures=slot.failures
        )
        slot.worker = fresh.worker  # anything the lost one still sends counts as late
        self._leave_out(slot)
