"""Files that operating systems, editors and tools leave beside data: no scan of a folder or an archive takes them for data."""

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
    ".",  # ._x and .DS_Store of macOS, .~lock.x# of LibreOffice, .x.swp of vim, .ipynb_checkpoints, .git, .cache
    "~$",  # Microsoft Office, while a file is open
)
_ENDS = ("~", ".swp", ".swo", ".crdownload", ".part", ".partial")


def is_litter(path: PurePath | str) -> bool:
    """Whether a path, from the folder or archive on that is searched, is such a file or lies in such a folder.

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
    """The paths below `root` that may be data, and those that are litter, each in order."""
    kept: list[Path] = []
    left: list[Path] = []
    for path in sorted(paths):
        (left if is_litter(path.relative_to(root)) else kept).append(path)
    return kept, left


def litter_clause(left: Sequence[Path]) -> str:
    """What a message that no data was found says about litter that looked like it; "" without any."""
    if not left:
        return ""
    more = f" and {len(left) - 1} more" if len(left) > 1 else ""
    return f"; {left[0].name!r}{more} only looks like one: operating systems, editors and tools leave such files beside data"


def walk_data(root: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """`os.walk` without litter; names in order. Links to folders are not followed."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not is_litter(name))
        yield folder, folders, sorted(name for name in names if not is_litter(name))
