"""Keep a logger's errors and waiting away from the run: it works in a thread behind a queue."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from rlmed.recording.loggers.base import Beginning, Logger, ShownRollout

log = logging.getLogger(__name__)

WAITS_S = (1.0, 5.0, 20.0, 60.0)
"""Pauses before a failed call is tried again; after the last the logger is left out."""
MOST_WAITING = 1000
"""Calls that wait for a logger that hangs; the oldest make room for new ones."""
FINISH_S = 30.0
"""How long the end of a run waits for a logger."""


class GuardedLogger:
    """Call a logger from its own thread, in order, so that it can neither end nor slow a run.

    A call that raises gives one warning and is tried again after each of `WAITS_S`; then the logger
    is left out for the rest of the run. Rollouts are tried once, and dropped: curves matter more.
    One that never returns leaves the others waiting, at most `MOST_WAITING`; what is dropped is
    said once. `finish` waits `FINISH_S`.
    """

    def __init__(
        self,
        logger: Logger,
        *,
        waits_s: Sequence[float] = WAITS_S,
        most_waiting: int = MOST_WAITING,
        finish_s: float = FINISH_S,
    ) -> None:
        """Wrap `logger`; nothing is called before `start`."""
        self._logger, self._waits_s, self._finish_s = logger, waits_s, finish_s
        self._most_waiting = most_waiting
        self._calls: deque[tuple[Callable[[], None], bool]] = deque()
        """With whether the call is tried again, and the logger left out if it goes on failing."""
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._beginning: Beginning | None = None
        self._started = self._ended = self._warned = self._dropped = self._unseen = False
        self._stopping = threading.Event()
        self._deadline = 0.0

    @property
    def name(self) -> str:
        """The logger's name."""
        return self._logger.name

    def start(self, beginning: Beginning) -> None:
        """Open a run, or continue one."""
        self._beginning = beginning
        self._thread = threading.Thread(target=self._work, name=f"logger-{self.name}", daemon=True)
        self._thread.start()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log values; returns at once."""
        self._put(lambda: self._logger.scalars(step, values))

    def rollouts(self, step: int, shown: Sequence[ShownRollout]) -> None:
        """Log rollouts; returns at once."""
        self._put(lambda: self._logger.rollouts(step, shown), needed=False)

    def finish(self, *, failed: bool) -> None:
        """Have the logger write what is left; waits `finish_s` seconds at most."""
        self.begin_finish(failed=failed)
        self.wait()

    def begin_finish(self, *, failed: bool) -> None:
        """Have the logger write what is left; returns at once."""
        if self._thread is not None:
            self._put(lambda: self._end(failed=failed))
            self._stopping.set()
            self._deadline = time.monotonic() + self._finish_s

    def wait(self) -> None:
        """Wait until it is written, at most `finish_s` seconds after `begin_finish`."""
        if self._thread is None:
            return
        self._thread.join(max(0.0, self._deadline - time.monotonic()))
        if self._thread.is_alive():
            log.warning(
                "the logger %s has not finished after %g s: its last values may be missing there; metrics.jsonl has all",
                self.name,
                self._finish_s,
            )
        self._thread = None

    def _put(self, call: Callable[[], None], *, needed: bool = True) -> None:
        with self._changed:
            if self._ended:
                return
            if len(self._calls) >= self._most_waiting:
                self._calls.popleft()
                if not self._dropped:
                    self._dropped = True
                    log.warning("the logger %s is too slow or hangs: its oldest values are dropped", self.name)
            self._calls.append((call, needed))
            self._changed.notify()

    def _end(self, *, failed: bool) -> None:
        self._logger.finish(failed=failed)
        self._ended = True

    def _work(self) -> None:
        while not self._ended:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._calls))
                call, needed = self._calls.popleft()
            if not needed:
                self._try_once(call)
            elif not self._tried(call):
                with self._changed:
                    self._ended = True
                    self._calls.clear()
                log.warning(
                    "the logger %s is left out for the rest of the run; metrics.jsonl has all values", self.name
                )

    def _try_once(self, call: Callable[[], None]) -> None:
        try:
            if self._started:  # by the values of this step
                call()
        except (Exception, SystemExit) as error:
            if not self._unseen:
                self._unseen = True
                log.warning(
                    "the logger %s does not take rollouts (%s): rollouts.jsonl has them; its values go on",
                    self.name,
                    _first_line(error),
                )

    def _tried(self, call: Callable[[], None]) -> bool:
        """Make a call, again after each pause; return False if it failed every time."""
        for wait in (*self._waits_s, None):
            try:
                if not self._started:
                    assert self._beginning is not None
                    self._logger.start(self._beginning)
                    self._started = True
                call()
            except (Exception, SystemExit) as error:  # a logger may raise anything
                if not self._warned:
                    self._warned = True
                    log.warning("the logger %s failed and is tried again: %s", self.name, _first_line(error))
                if wait is None:
                    return False
                # at the run's end nobody waits for long pauses
                self._stopping.wait(wait)
            else:
                return True
        return False


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
