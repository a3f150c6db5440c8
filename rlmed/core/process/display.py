"""Keep a command running if stdout or stderr cannot be written; end user errors with one line."""

from __future__ import annotations

import errno
import io
import logging
import os
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from rlmed.core.process.collection import resume

if TYPE_CHECKING:
    from rich.console import Console

if sys.platform != "win32":
    import resource

ERRORS = "backslashreplace"
"""Error handler for characters that the encoding of stdout lacks: `é` becomes `\\xe9`."""
NO_MEMORY = ("t allocate memory", "out of memory", "failed to map segment", "can't start new thread")
"""What torch, the dynamic loader and Python's threads say when an allocation fails."""
PRIMITIVE = "could not create a primitive"
"""What oneDNN says then, and also for an unsupported product."""
HTTP_CLIENTS = ("httpx", "httpx2", "openai")
"""Loggers of packages that have a line at INFO for each request."""
TRACE = "RLMED_TRACE"
"""Environment variable that turns tracebacks on."""


def quiet_http_clients() -> None:
    """Let packages that ask servers log warnings alone, unless their loggers have been set."""
    for name in HTTP_CLIENTS:
        if (logger := logging.getLogger(name)).level == logging.NOTSET:
            logger.setLevel(logging.WARNING)


@contextmanager
def ending_errors(*kinds: type[Exception], interrupted: str = "interrupted") -> Iterator[None]:
    """Exit with status 2 and one line on stderr for an error that the user can fix.

    Args:
        kinds: such errors besides ValueError, OSError and out of memory.
        interrupted: message after Ctrl-C, which exits with status 1.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(interrupted) from None
    except Exception as error:
        if os.environ.get(TRACE) or not (isinstance(error, (ValueError, OSError, *kinds)) or lacks_memory(error)):
            raise
        sys.stderr.write(f"error: {one_line(error)}\n")
        raise SystemExit(2) from error


def lacks_memory(error: BaseException) -> bool:
    """Return True if Python, numpy or torch ran out of memory."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError | ImportError)
        and (any(words in said for words in NO_MEMORY) or (PRIMITIVE in said and address_limit() is not None))
    )


def address_limit() -> int | None:
    """Return the process's limit of address space in bytes (`ulimit -v`); None without a limit."""
    if sys.platform == "win32":
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if limit == resource.RLIM_INFINITY else limit


KERNEL = "JPY_PARENT_PID"
"""Environment variable of Jupyter's kernels, and of commands that they start."""


def one_line(error: BaseException) -> str:
    """Return an error's message on one line."""
    said = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    if lacks_memory(error):
        return f"out of memory ({said or 'in Python'}): close other programs, raise the limit, or reduce memory use"
    return said or type(error).__name__


def output() -> Console:
    """Return stdout as a console for tables and progress.

    In a notebook it is plain text: one output that grows, without escape codes, and not a block of
    HTML a line. So it is in a command that a cell starts with `!`: it has a terminal, but of what
    moves the cursor, Jupyter shows only the letters.
    """
    from rich.console import Console

    console = Console(highlight=False)
    if console.is_jupyter or KERNEL in os.environ:
        return Console(highlight=False, force_jupyter=False, force_terminal=False, color_system=None)
    return console


class _Descriptor(io.FileIO):
    """Raw file of a standard stream; never raises, even with its reader gone or its disk full."""

    def __init__(self, descriptor: int, on_refusal: Callable[[OSError], None]) -> None:
        super().__init__(descriptor, "wb", closefd=False)
        self._on_refusal = on_refusal

    def write(self, data: Any, /) -> int:
        try:
            written = super().write(data)
        except OSError as error:
            self._on_refusal(error)
            written = len(memoryview(data).cast("B"))
        if written is None:  # a full terminal or pipe that another program made non-blocking
            select.select([], [self], [])
            return self.write(data)
        return written


def keep_display() -> None:
    """Make `sys.stdout` and `sys.stderr` streams that never raise; every command calls this first.

    Replaced streams, such as a test's, are left alone.
    """
    # the command has begun (rlmed.core.process.starting)
    sys.excepthook = sys.__excepthook__
    resume()
    if os.environ.get("COLUMNS") == "0":  # set by a fake terminal; tables of width 0 would be empty
        del os.environ["COLUMNS"]
    sys.stderr = _kept("stderr", sys.stderr, 2, lambda error: None)
    sys.stdout = _kept("stdout", sys.stdout, 1, _Notice())


class _Notice:
    """Say once on stderr that stdout cannot be written."""

    def __init__(self) -> None:
        self._said = False

    def __call__(self, error: OSError) -> None:
        # a reader that stops early, as `head` does, expects it
        if not self._said and error.errno != errno.EPIPE:
            self._said = True
            sys.stderr.write(f"stdout cannot be written ({error.strerror}): continuing without it\n")


def _kept(name: str, stream: TextIO | None, descriptor: int, on_refusal: Callable[[OSError], None]) -> TextIO:
    if stream is None:  # closed by the parent process
        new = _Descriptor(_nowhere(descriptor), on_refusal)
        wrapper = io.TextIOWrapper(io.BufferedWriter(new), encoding="utf-8", errors=ERRORS)
    elif stream is not vars(sys)[f"__{name}__"] or not isinstance(stream, io.TextIOWrapper):
        return stream
    else:
        old = stream.buffer.raw if isinstance(stream.buffer, io.BufferedWriter) else stream.buffer
        if type(old) is not io.FileIO:  # already replaced, or a Windows console
            return stream
        try:
            stream.flush()
        except OSError as error:
            on_refusal(error)
        new, unbuffered = _Descriptor(old.fileno(), on_refusal), stream.write_through
        wrapper = io.TextIOWrapper(
            new if unbuffered else io.BufferedWriter(new),  # type: ignore[arg-type]  # as Python itself has it
            encoding=stream.encoding,
            errors=ERRORS,
            line_buffering=stream.line_buffering,
            write_through=unbuffered,
        )
    vars(sys)[f"__{name}__"] = wrapper  # by which log handlers are found
    return wrapper


def _nowhere(descriptor: int) -> int:
    """Open the null device, on the standard descriptor if free: no file of the run may get it."""
    empty = os.open(os.devnull, os.O_WRONLY)
    try:
        os.fstat(descriptor)
    except OSError:
        os.dup2(empty, descriptor)
        os.close(empty)
        return descriptor
    return empty
