"""Turn any exception of a third-party library on user input into a one-line ValueError."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_SHOWN = 400
"""Most characters of a library's message to pass on; some hold whole configurations."""


@contextmanager
def foreign(what: str, advice: str) -> Iterator[None]:
    """Turn any exception that a library raises in the body into a `ValueError`.

    For one library call on one user file, never around our own code. Templates, quantizers and file
    readers raise all kinds of exceptions, `tokenizers` even a bare `Exception`.

    Args:
        what: what failed on which file, for example "the chat template of model 'x' cannot be
            rendered".
        advice: what to do about it, a sentence without its full stop.

    Raises:
        ValueError: on one line.
    """
    try:
        yield
    except MemoryError:  # says nothing about the file
        raise
    except Exception as error:
        raise ValueError(f"{what}: {brief(error)}. {advice}") from error


def brief(error: BaseException) -> str:
    """Return an error's message on one line, after its type where it alone is unclear."""
    text = " ".join(str(error).split()).rstrip(".")
    if not isinstance(error, (OSError, ValueError)) or not text:
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
