"""Read a pickled list of rows without running anything that the file asks for.

A pickle is a program: it may name any function and have it called. Only its instructions that build
lists, dicts, texts and numbers are let through, so nothing is ever imported or called.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Collection
from pathlib import Path
from typing import Any, NoReturn

from rlmed.core.files.near_paths import near_path

MAX_BYTES = 2**28
"""Largest file: PathVQA's have a few MB."""
_STRUCTURE = "PROTO FRAME STOP MARK PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET"
_CONTAINERS = "EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT DICT SETITEM SETITEMS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3"
_TEXTS = "UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 STRING BINSTRING SHORT_BINSTRING"
_NUMBERS = "NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT"
ALLOWED = frozenset(f"{_STRUCTURE} {_CONTAINERS} {_TEXTS} {_NUMBERS}".split())
"""Names of the instructions, as `pickletools` calls them."""
_PUT = ("PUT", "BINPUT", "LONG_BINPUT")


def read_pickled_rows(path: Path) -> list[Any]:
    """Return the elements of a pickled list.

    Raises:
        ValueError: for a file that is missing, too large or damaged, that holds anything but plain
            lists, dicts, texts and numbers, or no list.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"pickle {path} has {path.stat().st_size} bytes, more than {MAX_BYTES}")
        content = path.read_bytes()
    except OSError as error:
        near = near_path(path) or "copy it there"
        raise ValueError(f"pickle {path} cannot be read: {error.strerror}; {near}") from error
    try:
        _check(path, content)
        rows = _Plain(io.BytesIO(content), encoding="utf-8").load()
    except UnsafeError:
        raise
    except Exception as error:  # of damage, both raise nearly anything
        raise ValueError(f"pickle {path} is damaged ({error}): copy it again") from error
    if not isinstance(rows, list):
        raise ValueError(f"pickle {path} holds a {type(rows).__name__}, not a list of questions: give another file")
    if not all(map(_is_flat, rows)):
        # what refers to itself again and again is small in the file and without end as text
        raise ValueError(f"pickle {path} holds questions with lists of lists: give another file")
    return rows


def _is_flat(row: Any) -> bool:
    """Return whether a question has at most lists of texts and numbers in its fields."""
    return not any(_held(inner) for value in _held(row) for inner in _held(value))


def _held(value: Any) -> Collection[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, (list, tuple, set, frozenset)) else ()


class UnsafeError(ValueError):
    """A pickle wants something imported, called or made."""


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> NoReturn:
        raise UnsafeError(f"it names {module}.{name}")


def _check(path: Path, content: bytes) -> None:
    """Check each instruction before any is carried out.

    Raises:
        UnsafeError: for one that is not allowed.
        ValueError: for damage.
    """
    for code, argument, _ in pickletools.genops(content):
        if code.name not in ALLOWED:
            what = f" ({argument})" if isinstance(argument, str) else ""
            raise UnsafeError(
                f"pickle {path} is not loaded: it holds more than lists, dicts, texts and numbers ({code.name}{what}), "
                "and what it asks for would run on this machine. If you trust it, write its rows as CSV or JSON Lines"
            )
        # the unpickler reserves memory up to this number
        if code.name in _PUT and not 0 <= int(str(argument)) <= len(content):
            raise ValueError(f"{code.name} {argument} lies outside of the file")
