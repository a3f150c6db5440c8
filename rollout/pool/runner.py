"""Run an engine in its thread: submit and collect anytime, update weights between steps."""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from rlmed.core.types import RolloutGroup, RolloutRequest
from rlmed.models.weights import Weights
from rollout.engine import Engine
from rollout.pool.worker import FinishedGroup, WorkerStatus

ON_PUSH = ("continue", "finish")
"""Running completions when new weights arrive: continue under the new weights, or finish first."""


@dataclass(frozen=True, slots=True)
class _Job:
    """A job to run between two steps."""

    run: Callable[[], None]
    done: Future[None]
    hold: bool
    """Make no step before the next job."""


class EngineRunner:
    """Steps an engine while it has work; every method may be called from any thread.

    An engine error ends the thread, and every later call raises it.
    """

    def __init__(self, engine: Engine, *, on_push: str = "continue", where: str = "") -> None:
        """Start the thread.

        Args:
            engine: only that thread uses it from now on.
            on_push: one of `ON_PUSH`.
            where: host and process, for `status`.
        """
        self._engine, self._on_push, self._where = engine, on_push, where
        self._changed = threading.Condition()
        self._requests: list[RolloutRequest] = []
        self._jobs: deque[_Job] = deque()
        self._finished: deque[FinishedGroup] = deque()
        self._error: BaseException | None = None
        self._closed = False
        self._progress = 0
        self._working = self._held = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[RolloutRequest]) -> None:
        """Queue requests, which reach the engine together."""
        with self._changed:
            self._raise_error()
            self._requests += requests
            self._changed.notify_all()

    def collect(self, timeout: float) -> list[FinishedGroup]:
        """Wait for finished groups, return them; an empty list after `timeout` seconds of none."""
        with self._changed:
            self._changed.wait_for(lambda: self._finished or self._error or self._closed, timeout)
            groups = list(self._finished)
            self._finished.clear()
            if not groups:
                self._raise_error()
            return groups

    def update_weights(self, version: int, weights: Weights) -> None:
        """Load new weights into the engine and wait until it has them.

        Raises:
            RuntimeError: as in `rollout.engine.Engine.update_weights`.
        """
        self.between_steps(functools.partial(self._engine.update_weights, version, weights))

    def between_steps(self, job: Callable[[], None], *, hold: bool = False) -> None:
        """Run a job in the engine's thread between two steps and wait for it.

        Args:
            job: its error is raised here, and no step made before the next job.
            hold: make none in any case; requests wait.
        """
        done: Future[None] = Future()
        with self._changed:
            self._raise_error()
            self._jobs.append(_Job(job, done, hold))
            self._changed.notify_all()
        done.result()

    def status(self) -> WorkerStatus:
        """Return the engine's status, even in the middle of a step."""
        with self._changed:
            self._raise_error()
            engine = self._engine
            return WorkerStatus(
                self._progress,
                self._working,
                engine.policy_version,
                engine.generated_tokens,
                self._where,
                engine.devices,
            )

    def close(self) -> None:
        """Stop the thread after its current step."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            while self._take_turn():
                pass
        except BaseException as error:  # the thread's only exit: the next call raises it
            with self._changed:
                self._error = error
                for job in self._jobs:
                    job.done.set_exception(error)
                self._jobs.clear()
                self._changed.notify_all()

    def _take_turn(self) -> bool:
        """Wait for work and do it; return False once the runner is closed."""
        with self._changed:
            self._working = False
            self._changed.wait_for(
                lambda: self._closed or self._jobs or (not self._held and (self._requests or self._engine.busy))
            )
            if self._closed:
                return False
            self._working = True
            finish_first = bool(self._jobs) and self._on_push == "finish" and self._engine.busy and not self._held
            job = None if finish_first or not self._jobs else self._jobs.popleft()
            self._held = job.hold if job else self._held
            # requests that arrive while running completions are finished wait for the new weights
            wait = finish_first or self._held
            requests, self._requests = ([], self._requests) if wait else (self._requests, [])
        if job is not None:
            self._apply(job)
        finished = [refused for request in requests if (refused := self._start(request))]
        finished += [
            _finished(group) for group in (self._engine.step() if self._engine.busy and not self._held else [])
        ]
        with self._changed:
            self._progress += 1
            if finished:
                self._finished += finished
                self._changed.notify_all()
        return True

    def _start(self, request: RolloutRequest) -> FinishedGroup | None:
        """Submit a request to the engine; return a refused group if it can never run."""
        try:
            self._engine.submit(request)
        except ValueError as error:  # the request's fault, so the engine continues
            return FinishedGroup(request.index, (), str(error))
        return None

    def _apply(self, job: _Job) -> None:
        try:
            job.run()
        except Exception as error:
            self._held = True
            job.done.set_exception(error)
        else:
            job.done.set_result(None)


def _finished(group: RolloutGroup) -> FinishedGroup:
    return FinishedGroup(group.request.index, group.completions)
