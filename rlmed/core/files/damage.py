"""Explain why a file cannot be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

POINTER = b"version https://git-lfs"
"""First bytes of a Git LFS pointer, which stands in for a large file."""


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: if the file is damaged or not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {cause(path, str(error))}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: expected a JSON object, found a {type(content).__name__}; copy it again")
    return content


def is_pointer(path: Path) -> bool:
    """Return True if a file is a Git LFS pointer."""
    with path.open("rb") as file:
        return file.read(len(POINTER)) == POINTER


def cause(path: Path, reason: str) -> str:
    """Explain why a file cannot be read and what to do; `reason` is the reader's own message."""
    if is_pointer(path):
        return "it is a Git LFS pointer, not the file: run `git lfs pull` where the model was cloned"
    if path.stat().st_size == 0:
        return "it is empty; copy or download it again"
    return f"{reason}; copy or download it again"
