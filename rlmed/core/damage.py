"""Files that cannot be read, and why: the usual cause is named with its cure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

POINTER = b"version https://git-lfs"
"""The beginning of what Git leaves in the place of a large file."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: naming the file when it is damaged or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {cause(path, str(error))}") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} is damaged: it holds a {type(content).__name__} where a JSON object belongs; copy it again"
        )
    return content


def is_pointer(path: Path) -> bool:
    """Whether a file is only Git's pointer to it."""
    with path.open("rb") as file:
        return file.read(len(POINTER)) == POINTER


def cause(path: Path, reason: str) -> str:
    """What is wrong with a file that cannot be read, and the cure; `reason` is what the reader said."""
    if is_pointer(path):
        return "it is only Git's pointer to the file: run `git lfs pull` where the model was cloned"
    if path.stat().st_size == 0:
        return "it is empty; copy or download it again"
    return f"{reason}; copy or download it again"
