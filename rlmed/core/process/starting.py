"""Start a command before it imports its libraries: settle its process, put errors on one line.

Importing rlmed as a library does none of this. Call `prepare_process` yourself, before torch is
imported, if the installed torchvision does not match torch (`RuntimeError: operator
torchvision::nms does not exist`), or if your process shares its cores with others.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from rlmed.core.process.collection import put_off, resume
from rlmed.core.process.display import TRACE, address_limit, lacks_memory, one_line
from rlmed.core.process.threads import settle_threads, settle_waiting
from rlmed.core.process.torch_extensions import disable_broken_extensions

MIN_ADDRESSES = 1536 * 2**20
"""Address space in bytes to load torch, numpy, scipy; at 1,000,000 KB OpenBLAS retries forever."""
_DOCTOR = ": python -m rlmed.doctor says what is missing"


def prepare_process() -> None:
    """Settle what torch and transformers read on import: OpenMP's waiting, and unfit binaries.

    Every process of ours calls it before it imports them: commands by `start_command`, Ray's
    workers by `prepare_worker` (`rlmed.cluster.ray_session`), tests in conftest.py.
    """
    settle_threads()
    settle_waiting()
    disable_broken_extensions()


def prepare_worker() -> None:
    """Prepare a process that Ray starts; its actor calls `rlmed.core.process.collection.resume`."""
    prepare_process()
    put_off()


def start_command(*, loads: bool = True) -> None:
    """Prepare a command's process; exit with one line if its libraries cannot be loaded.

    This holds until `keep_display` takes over.

    Each command's file calls it first, before its other imports, and only if it is the program that
    runs.

    Args:
        loads: whether these imports load torch; otherwise `loading_libraries` prepares for them.

    Raises:
        MemoryError, OSError: for an environment in which torch and numpy, or their C code, would
            not load.
    """
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
    if loads:
        put_off()  # until `keep_display`
        prepare_process()
    else:
        settle_threads()
        settle_waiting()


@contextmanager
def loading_libraries() -> Iterator[None]:
    """Prepare for the libraries that a command loads later; turn their ImportError into one line.

    Raises:
        ValueError: names the library and the command that says what is missing.
    """
    put_off()
    try:
        prepare_process()
        yield
    except ImportError as error:
        if lacks_memory(error):
            raise
        raise ValueError(f"{one_line(error)}{_DOCTOR}") from error
    finally:
        resume()


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
        said = f"error: {one_line(error)}{_DOCTOR}"
    else:
        said = f"error: {one_line(error)}"
    if sys.stderr is not None:
        sys.stderr.write(f"{said}\n")
        sys.stderr.flush()
    os._exit(1 if issubclass(kind, KeyboardInterrupt) else 2)
