"""Recognize files that operating systems, editors and tools leave beside data, to skip in scans."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePath, PurePosixPath

_NAMES = frozenset(
    (
        "__macosx",  # macOS, in zip archives
        "thumbs.db",  # Windows
        "ehthumbs.db",
        "desktop.ini",
        "$recycle.bin",
        "system volume information",
        "@eadir",  # Synology
        "#recycle",
        "#snapshot",
        "lost+found",
        "__pycache__",
    )
)
_STARTS = (
    # ._x and .DS_Store of macOS, .~lock.x# of LibreOffice, .x.swp of vim, .ipynb_checkpoints, .git,
    # .cache
    ".",
    "~$",  # Microsoft Office, while a file is open
)
_ENDS = ("~", ".swp", ".swo", ".crdownload", ".part", ".partial")


def is_litter(path: PurePath | str) -> bool:
    """Return whether a path, relative to the searched folder or archive, is or lies in litter.

    Example:
        >>> [is_litter(name) for name in ("a/._1.png", "__MACOSX/1.png", "~$q.csv", "a/1.png", "../1.png")]
        [True, True, True, False, False]
    """
    return any(_is_litter_name(part.lower()) for part in PurePosixPath(path).parts)


def _is_litter_name(name: str) -> bool:
    if name in (".", "..", "/"):
        return False
    between_hashes = len(name) > 2 and name[0] == name[-1] == "#"  # Emacs
    return name in _NAMES or name.startswith(_STARTS) or name.endswith(_ENDS) or between_hashes


def sift(paths: Iterable[Path], root: Path) -> tuple[list[Path], list[Path]]:
    """Split the paths below `root` into possible data and litter, each sorted."""
    kept: list[Path] = []
    left: list[Path] = []
    for path in sorted(paths):
        (left if is_litter(path.relative_to(root)) else kept).append(path)
    return kept, left


def litter_clause(left: Sequence[Path]) -> str:
    """Return the clause of a "no data found" message that mentions litter; "" without any."""
    if not left:
        return ""
    which = f"{left[0].name!r} and {len(left) - 1} more were" if len(left) > 1 else f"{left[0].name!r} was"
    return f"; {which} skipped: operating systems, editors and tools leave such files beside data"


def walk_data(root: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Walk like `os.walk`, without litter and with names sorted.

    Links to folders are not followed.
    """
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not is_litter(name))
        yield folder, folders, sorted(name for name in names if not is_litter(name))
