"""The display never fails a command: what stdout cannot show or take is shown otherwise or lost, and the work goes on."""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

if sys.platform != "win32":
    import resource

ERRORS = "backslashreplace"
"""How characters are shown that the encoding of stdout lacks: `é` becomes `\\xe9`."""
NO_MEMORY = ("t allocate memory", "out of memory", "failed to map segment", "can't start new thread")
"""What torch, the loader of shared libraries and Python's threads say when they were refused memory."""
PRIMITIVE = "could not create a primitive"
"""What oneDNN says then, and where it lacks a product."""
TRACE = "RLMED_TRACE"
"""Environment variable that shows where an error came from."""


@contextmanager
def ending_errors(*kinds: type[Exception], interrupted: str = "interrupted") -> Iterator[None]:
    """End the program with one line on stderr and exit status 2 for an error that its user can mend.

    Args:
        kinds: such errors besides ValueError, OSError and a lack of memory.
        interrupted: what is said after Ctrl-C, which ends it with status 1.
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
    """Whether Python, numpy or torch was refused memory."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError | ImportError)
        and (any(words in said for words in NO_MEMORY) or (PRIMITIVE in said and address_limit() is not None))
    )


def address_limit() -> int | None:
    """Bytes of address space that the process may have (`ulimit -v`); None without a limit."""
    if sys.platform == "win32":
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if limit == resource.RLIM_INFINITY else limit


def one_line(error: BaseException) -> str:
    """What an error says, without line ends."""
    said = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    if lacks_memory(error):
        return f"out of memory ({said or 'Python was given none'}): close other programs, allow more, or ask for less"
    return said or type(error).__name__


class _Descriptor(io.FileIO):
    """A standard stream's file that takes everything, also when its reader has gone or its disk is full."""

    def __init__(self, descriptor: int, on_refusal: Callable[[OSError], None]) -> None:
        super().__init__(descriptor, "wb", closefd=False)
        self._on_refusal = on_refusal

    def write(self, data: Any, /) -> int:
        try:
            written = super().write(data)
        except OSError as error:
            self._on_refusal(error)
            written = len(memoryview(data).cast("B"))
        if written is None:  # another program made this terminal or pipe non-blocking, and it is full
            select.select([], [self], [])
            return self.write(data)
        return written


def keep_display() -> None:
    """Make `sys.stdout` and `sys.stderr` streams that never raise; to be called first by each command.

    Streams that somebody has put in their place, such as a test's, stay as they are.
    """
    sys.excepthook = sys.__excepthook__  # the command has begun (rlmed.core.starting)
    if os.environ.get("COLUMNS") == "0":  # of a terminal that is none; tables as narrow as that would be empty
        del os.environ["COLUMNS"]
    sys.stderr = _kept("stderr", sys.stderr, 2, lambda error: None)
    sys.stdout = _kept("stdout", sys.stdout, 1, _Notice())


class _Notice:
    """Says on stderr, once, that stdout does not take what is written."""

    def __init__(self) -> None:
        self._said = False

    def __call__(self, error: OSError) -> None:
        # who reads no further, as `head` does, knows it
        if not self._said and error.errno != errno.EPIPE:
            self._said = True
            sys.stderr.write(f"stdout cannot be written ({error.strerror}): the command goes on without\n")


def _kept(name: str, stream: TextIO | None, descriptor: int, on_refusal: Callable[[OSError], None]) -> TextIO:
    if stream is None:  # closed by whoever started this process
        new = _Descriptor(_nowhere(descriptor), on_refusal)
        wrapper = io.TextIOWrapper(io.BufferedWriter(new), encoding="utf-8", errors=ERRORS)
    elif stream is not vars(sys)[f"__{name}__"] or not isinstance(stream, io.TextIOWrapper):
        return stream
    else:
        old = stream.buffer.raw if isinstance(stream.buffer, io.BufferedWriter) else stream.buffer
        if type(old) is not io.FileIO:  # it was made ours before, or is a console of Windows
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
    """A descriptor that takes everything; the standard one, if that is free, which no file of the run shall get."""
    empty = os.open(os.devnull, os.O_WRONLY)
    try:
        os.fstat(descriptor)
    except OSError:
        os.dup2(empty, descriptor)
        os.close(empty)
        return descriptor
    return empty
