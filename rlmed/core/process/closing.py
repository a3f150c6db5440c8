"""Close the parts of a run, whatever has failed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rlmed.core.process.display import one_line

log = logging.getLogger(__name__)


@contextmanager
def closing(*closes: Callable[[], object], failed: Callable[[], object]) -> Iterator[None]:
    """Call `closes` in order after the body, each even if the body or another of them raises.

    What the body raised is raised again, else the first error of `closes`; later errors are logged.

    Args:
        closes: functions that release something.
        failed: called last, if anything was raised.
    """
    error: BaseException | None = None
    try:
        yield
    except BaseException as raised:
        error = raised
    for close in closes:
        error = _first(error, close)
    if error is not None:
        _first(error, failed)
        raise error


def _first(error: BaseException | None, close: Callable[[], object]) -> BaseException | None:
    """Call `close`; return `error`, or what was raised if there is none yet."""
    try:
        close()
    except Exception as raised:  # the next one shall be closed, too
        if error is None:
            return raised
        log.warning("while the run was closed: %s", one_line(raised))
    return error
