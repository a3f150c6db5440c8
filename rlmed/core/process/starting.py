"""Report errors on one line while a command loads its libraries, before its own error handling is in place."""

from __future__ import annotations

import os
import sys
import tempfile
from types import TracebackType

from rlmed.core.process.display import TRACE, address_limit, lacks_memory, one_line

MIN_ADDRESSES = 1536 * 2**20
"""Bytes of address space to load torch, numpy and scipy; with 1,000,000 KB OpenBLAS retries its allocation forever."""


def watch_start() -> None:
    """Make `python -m rlmed.X` exit with one line if its libraries cannot be loaded, until `keep_display` takes over.

    Raises:
        MemoryError, OSError: for an environment in which torch and numpy, or their C code, would not load.
    """
    if sys.argv[:1] != ["-m"]:  # its value while Python locates the module
        return
    sys.excepthook = _say
    _check_addresses()
    try:
        os.getcwd()
    except FileNotFoundError:
        raise FileNotFoundError("the current folder has been removed: go to another (cd FOLDER)") from None
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error.strerror}: set TMPDIR to a writable folder") from error


def _check_addresses() -> None:
    """Raise MemoryError if the limit of address space is too low for the libraries to load."""
    limit = address_limit()
    if limit is not None and limit < MIN_ADDRESSES:
        raise MemoryError(
            f"`ulimit -v` allows {limit >> 20} MiB of address space, but the libraries need {MIN_ADDRESSES >> 20} MiB"
        )


def _say(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print a startup error and exit: status 1 for Ctrl-C, 2 for an error that the user can fix."""
    if os.environ.get(TRACE) or not issubclass(kind, (KeyboardInterrupt, ImportError, OSError, MemoryError)):
        sys.__excepthook__(kind, error, trace)
        return
    if issubclass(kind, KeyboardInterrupt):
        said = "interrupted"
    elif issubclass(kind, ImportError) and not lacks_memory(error):
        said = f"error: {one_line(error)}: python -m rlmed.doctor says what is missing"
    else:
        said = f"error: {one_line(error)}"
    if sys.stderr is not None:
        sys.stderr.write(f"{said}\n")
        sys.stderr.flush()
    os._exit(1 if issubclass(kind, KeyboardInterrupt) else 2)
