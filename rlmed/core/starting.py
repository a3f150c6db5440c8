"""The start of a command: while its libraries are loaded nobody catches errors yet, so what they raise is said from here."""

from __future__ import annotations

import os
import sys
import tempfile
from types import TracebackType

from rlmed.core.display import TRACE, address_limit, lacks_memory, one_line

MIN_ADDRESSES = 1536 * 2**20
"""Bytes of address space with which torch, numpy and scipy load; with 1,000,000 KB OpenBLAS asks for memory for ever."""


def watch_start() -> None:
    """Let `python -m rlmed.X` end with one line when its libraries cannot be loaded; `keep_display` is the end of that.

    Raises:
        MemoryError, OSError: for surroundings in which torch and numpy, or the C code in them, would not load.
    """
    if sys.argv[:1] != ["-m"]:  # as it is while Python looks for the module
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
        raise FileNotFoundError(f"{error.strerror}: name one that can be written by TMPDIR=FOLDER") from error


def _check_addresses() -> None:
    """Raises MemoryError for a limit on the process's addresses under which its libraries do not load."""
    limit = address_limit()
    if limit is not None and limit < MIN_ADDRESSES:
        raise MemoryError(
            f"`ulimit -v` allows {limit >> 20} MiB of addresses, and the libraries need {MIN_ADDRESSES >> 20} to be loaded"
        )


def _say(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an error of the start and end the process: status 1 for Ctrl-C, 2 for what a user can mend."""
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
