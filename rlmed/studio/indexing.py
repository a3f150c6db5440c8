"""Indexes of runs, kept up to date by a thread each, so that no page waits for one."""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from pathlib import Path

from rlmed.studio.index import Index

log = logging.getLogger(__name__)

PATIENCE_S = 0.3
"""How long a page waits for what is new since it was last looked at."""
KEPT_DAYS = 30
"""Indexes that nobody opened for so long are removed."""


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


def _fill(index: Index) -> None:
    try:
        with index.open() as connection:
            while index.update(connection):
                pass
    except (OSError, sqlite3.Error) as error:
        log.warning("the index of %s stopped: %s", index.rollouts, error)


def remove_old(cache: Path) -> None:
    """Remove indexes that were not opened for `KEPT_DAYS`."""
    for path in cache.glob("*.sqlite3"):
        try:
            if time.time() - path.stat().st_mtime > KEPT_DAYS * 86400:
                path.unlink()
        except OSError as error:
            log.warning("%s cannot be removed: %s", path, error)
