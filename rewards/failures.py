"""Say once that a slow reward fails often, instead of at each failure."""

from __future__ import annotations

import logging
import threading
from collections import deque

log = logging.getLogger(__name__)

WINDOW = 100
"""Latest attempts of which the share of failures is taken."""
FEWEST = 20
"""Attempts before which a share says little."""
OFTEN = 0.25
"""Share of failures from which to warn; below half of it, the next rise is a new one."""


class FailureShare:
    """Counts the latest attempts of a reward; from any thread.

    Example:
        >>> share = FailureShare("judge")
        >>> for number in range(40):
        ...     share.note("status 503" if number % 2 else None)  # warns at the 20th, once
    """

    def __init__(self, name: str) -> None:
        """Count for the reward of this name."""
        self._name = name
        self._lock = threading.Lock()
        self._latest: deque[bool] = deque(maxlen=WINDOW)
        self._often = False

    def note(self, why: str | None) -> None:
        """Count an attempt: None if it succeeded, else why it failed."""
        with self._lock:
            self._latest.append(why is not None)
            failed, count = sum(self._latest), len(self._latest)
            rises = not self._often and why is not None and count >= FEWEST and failed >= OFTEN * count
            self._often = rises or (self._often and failed >= OFTEN / 2 * count)
        if rises:
            log.warning(
                "reward %s: %.0f%% of its latest %d calls failed, the last with: %s (said again only if it gets better and "
                "then worse)",
                self._name,
                100 * failed / count,
                count,
                why,
            )
