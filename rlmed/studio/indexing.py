"""Indexes of runs, kept up to date by a thread each, so that no page waits for one."""

from __future__ import annotations

import logging
import re
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from rlmed.studio.index import Index, is_damage, remove_database

T = TypeVar("T")
log = logging.getLogger(__name__)

PATIENCE_S = 0.3
"""How long a page waits for what is new since it was last looked at."""
KEPT_DAYS = 30
"""Indexes that nobody opened for so long are removed."""
_NAME = re.compile(r"[0-9a-f]{32}-\d+\.sqlite3")
"""What indexes are called: the cache folder may hold other databases, too."""


class Indexing:
    """The indexes of a studio.

    Args:
        cache: folder of the indexes.
    """

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._lock = threading.Lock()
        self._indexes: dict[Path, Index] = {}
        self._threads: dict[Path, threading.Thread] = {}

    def index(self, rollouts: Path) -> Index:
        """Return the index of a rollouts.jsonl, and have a thread bring it up to date.

        It returns when that is done, at the latest after `PATIENCE_S`.

        Raises:
            OSError: if the cache folder cannot be written.
        """
        with self._lock:
            if not self._indexes:
                remove_old(self._cache)
            if rollouts not in self._indexes:
                self._indexes[rollouts] = Index(rollouts, self._cache)
            index = self._indexes[rollouts]
            thread = self._threads.get(rollouts)
            if thread is None or not thread.is_alive():
                thread = threading.Thread(target=_fill, args=(index,), name="index", daemon=True)
                self._threads[rollouts] = thread
                thread.start()
        thread.join(PATIENCE_S)
        return index

    def use(self, rollouts: Path, ask: Callable[[Index, sqlite3.Connection], T]) -> T:
        """Return what `ask` returns for the index of a rollouts.jsonl, once it is up to date.

        If the index proves damaged, a new one is asked, as far as it is filled after `PATIENCE_S`.

        Raises:
            OSError, sqlite3.Error: if it cannot be used.
        """
        index = self.index(rollouts)
        try:
            with index.open() as connection:
                return ask(index, connection)
        except sqlite3.DatabaseError as error:
            if not is_damage(error):
                raise
        index = self.index(rollouts)
        with index.open() as connection:
            return ask(index, connection)


def _fill(index: Index) -> None:
    for again in (True, False):
        try:
            with index.open() as connection:
                while index.update(connection):
                    pass
            index.problem = ""
            return
        except (OSError, sqlite3.Error) as error:
            anew = again and isinstance(error, sqlite3.Error) and is_damage(error)
            log.warning("the index of %s %s: %s", index.rollouts, "starts anew" if anew else "stopped", error)
            if not anew:
                index.problem = str(error) or type(error).__name__
                return


def remove_old(cache: Path) -> None:
    """Remove indexes that were not opened for `KEPT_DAYS`."""
    for path in cache.glob("*.sqlite3"):
        if not _NAME.fullmatch(path.name):
            continue
        try:
            if time.time() - path.stat().st_mtime > KEPT_DAYS * 86400:
                remove_database(path)
        except OSError as error:
            log.warning("%s cannot be removed: %s", path, error)
