"""Threads that score what was asked for first, and end with the process."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable
from typing import Any


class Workers:
    """A few threads that run jobs by priority.

    They start with the first jobs and are daemons: a call that never returns holds up no exit, as
    one in `concurrent.futures` would.

    Example:
        >>> workers, done = Workers(2, "example"), threading.Event()
        >>> workers.add(0, done.set)
        >>> done.wait()
        True
        >>> workers.close()
    """

    def __init__(self, count: int, name: str) -> None:
        """Run at most `count` jobs at a time, in threads of this name."""
        self._count, self._name = count, name
        self._jobs: queue.PriorityQueue[tuple[int, int, Callable[[], Any]]] = queue.PriorityQueue()
        self._numbers = itertools.count()
        self._threads: list[threading.Thread] = []
        self.closing = threading.Event()

    def add(self, priority: int, job: Callable[[], object]) -> None:
        """Queue a job that raises nothing; those of a lower number run first, then older ones."""
        self._jobs.put((priority, next(self._numbers), job))
        if len(self._threads) < self._count:
            thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def close(self) -> None:
        """Drop the jobs that wait; each thread ends after its job."""
        self.closing.set()
        for _ in self._threads:
            self._jobs.put((-1, next(self._numbers), lambda: None))

    def _run(self) -> None:
        while not self.closing.is_set():
            self._jobs.get()[2]()
