"""Workers that are threads and obey a test: they finish groups, die, fall silent or stand still."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from rlmed.core.types import Completion, RolloutRequest
from rlmed.core.weights import EngineHandle, PushReport, StoredWeights, WeightUpdate
from rollout.pool.worker import FinishedGroup, WorkerStatus


class Update:
    """Makes a `rlmed.core.weights.WeightUpdate`: fetched, or sent if the test gave a future."""

    def __init__(self, version: int = 1, sending: Future[PushReport | None] | None = None) -> None:
        self.sending = sending
        self.engines: list[EngineHandle] = []
        self.weights = WeightUpdate(lambda: StoredWeights(version, []), self._send)

    def _send(self, engines: Sequence[EngineHandle]) -> Future[PushReport | None] | None:
        self.engines = list(engines)
        return self.sending


class FakeWorker:
    """A `rollout.pool.worker.Worker`: its groups finish on `finish`, or by themselves if `auto`."""

    def __init__(self, name: str, *, auto: bool = True, answers: bool = True) -> None:
        self.name, self.auto, self.answers = name, auto, answers
        self.address = self
        self.lock = threading.RLock()
        self.held: dict[int, RolloutRequest] = {}
        self.batches: list[list[int]] = []
        self.version = 0
        self.fetched: list[int] = []
        self.killed = False
        self.rests = 0
        self.error: BaseException | None = None
        self.moves = True
        self.progress = 0
        self.collects: list[Future[list[FinishedGroup]]] = []
        self.ready: list[FinishedGroup] = []

    def submit(self, requests: Sequence[RolloutRequest]) -> Future[None]:
        with self.lock:
            self.held |= {request.index: request for request in requests}
            self.batches.append([request.index for request in requests])
            if self.auto:
                for index in list(self.held):
                    self.finish(index)
            return self._answer(None)

    def collect(self) -> Future[list[FinishedGroup]]:
        future: Future[list[FinishedGroup]] = Future()
        with self.lock:
            if self.error:
                future.set_exception(self.error)
            else:
                self.collects.append(future)
                self._deliver()
        return future

    def update_weights(self, weights: StoredWeights) -> Future[PushReport]:
        with self.lock:
            if not self.error:
                self.version = weights.version
                self.fetched.append(weights.version)
            return self._answer(PushReport(0.0, 0.0))

    def sleep(self) -> Future[None]:
        with self.lock:
            self.rests += 1
            return self._answer(None)

    def status(self) -> Future[WorkerStatus]:
        with self.lock:
            self.progress += self.moves
            return self._answer(
                WorkerStatus(self.progress, bool(self.held), self.version, 0, "here", ("gpu of " + self.name,))
            )

    def kill(self) -> None:
        with self.lock:
            self.killed = True
            self.die(RuntimeError("killed"))

    # what the test does

    def finish(self, index: int) -> None:
        """The group of a held request is done."""
        with self.lock:
            request = self.held.pop(index)
            completion = Completion(
                np.array([index]), np.zeros(1, np.float32), self.name, "stop", self.version, self.version
            )
            self.ready.append(FinishedGroup(index, (completion,) * request.group_size))
            self._deliver()

    def die(self, error: BaseException) -> None:
        """Every call fails from now on, those under way too."""
        with self.lock:
            self.error = self.error or error
            waiting, self.collects = self.collects, []
        for future in waiting:
            future.set_exception(self.error)

    def _answer(self, value: Any) -> Future[Any]:
        future: Future[Any] = Future()
        if self.error:
            future.set_exception(self.error)
        elif self.answers:
            future.set_result(value)
        return future

    def _deliver(self) -> None:
        if self.ready and self.collects:
            groups, self.ready = self.ready, []
            self.collects.pop(0).set_result(groups)
