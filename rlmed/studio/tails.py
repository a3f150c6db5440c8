"""The last lines of a file that grows, without reading the whole of it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PIECE = 1 << 16
MOST = 1 << 20
"""Bytes at the end of a file in which lines are looked for."""


def last_line(path: Path) -> dict[str, Any] | None:
    """Return the last whole line of a file of JSON objects; None without one."""
    return next(lines_backwards(path), None)


def lines_backwards(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the whole lines of a file of JSON objects, the last first, within `MOST` bytes.

    What follows the last newline is being written, and is left out, as is a line that is damaged.
    """
    for line in _pieces(path):
        try:
            content = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(content, dict):
            yield content


def _pieces(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            at = end = file.seek(0, os.SEEK_END)
            rest: bytes | None = None
            while at > max(0, end - MOST):
                size = min(PIECE, at)
                at -= size
                file.seek(at)
                block = file.read(size)
                lines = (block if rest is None else block + rest).split(b"\n")
                yield from reversed(lines[1:-1] if rest is None else lines[1:])
                # without a newline so far, all of it follows the last one
                rest = lines[0] if rest is not None or len(lines) > 1 else None
            if at == 0 and rest is not None:
                yield rest
    except OSError:
        return
