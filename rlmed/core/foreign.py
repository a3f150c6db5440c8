"""Other people's code on what a user gave: whatever it raises becomes one line with place and cure."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_SHOWN = 400
"""Characters of a foreign message that are passed on; some of them hold whole configurations."""


@contextmanager
def foreign(what: str, cure: str) -> Iterator[None]:
    """Turn what a library raises inside into a `ValueError`.

    For one call on one file of the user's, never around code of ours. Templates, quantizers and readers of files raise whatever
    they like, `tokenizers` even a bare `Exception`.

    Args:
        what: what cannot be done with which file, for example "the chat template of model 'x' cannot be rendered".
        cure: what to do about it, a sentence without its full stop.

    Raises:
        ValueError: on one line.
    """
    try:
        yield
    except MemoryError:  # says nothing about the file
        raise
    except Exception as error:
        raise ValueError(f"{what}: {one_line(error)}. {cure}") from error


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks; its type first where the message alone would be a riddle."""
    text = " ".join(str(error).split()).rstrip(".")
    if not isinstance(error, (OSError, ValueError)) or not text:
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
