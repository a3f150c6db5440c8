"""Recognize slices of one series by their file names: brain_012.png and brain_013.png."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

REACH = 3
"""Largest difference of neighbours' numbers."""

_LAST_NUMBER = re.compile(r"(.*?)(\d+)(\D*)", re.DOTALL)
_FOLDERS = 4
"""A name in more folders than this, like T2_012.png, identifies no series across folders."""
_LONGEST = 15
"""Most digits of a slice number; more are a hash or a unique identifier."""


def series_of(path: Path) -> tuple[tuple[str, ...], int] | None:
    """Return a file's possible series, and its number there; None if its name has no number.

    The number is the last one in the name. The series is the rest of the name within its folder;
    and, in any parent folder, the rest of folder and name if that has a number too, such as that of
    a patient or a series.

    Example:
        >>> series_of(Path("/data/mri/brain_012.png"))
        (('/data/mri/brain_#',), 12)
        >>> series_of(Path("/data/test/patient7/012.png"))
        (('/data/test/patient7/#', '*/patient7/#'), 12)
    """
    match = _LAST_NUMBER.fullmatch(path.stem)
    if match is None or len(match[2]) > _LONGEST:
        return None
    # ignore the suffix: one series may be exported in two formats
    name = f"{match[1]}#{match[3]}"
    series = [str(path.parent / name)]
    short = f"{path.parent.name}/{name}"
    if any(character.isdigit() for character in match[1] + match[3]):
        series.append(f"*/{name}")
    elif any(character.isdigit() for character in path.parent.name):
        series.append(f"*/{short}")
    return tuple(series), int(match[2])


def neighbours(tests: Sequence[Sequence[Path]], train: Sequence[Sequence[Path]]) -> Iterator[tuple[int, int]]:
    """Return index pairs of pictures whose names are close in one series, each pair once.

    Args:
        tests: paths of each test picture; the same file may lie in several places.
        train: the same for the training pictures.
    """
    numbered: dict[str, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    folders: dict[str, set[Path]] = defaultdict(set)
    for index, paths in enumerate(train):
        for path, series, number in _entries(paths):
            numbered[series][number].add(index)
            folders[series].add(path.parent)
    for index, paths in enumerate(tests):
        near = {
            other
            for _, series, number in _entries(paths)
            if series in numbered and len(folders[series]) <= _FOLDERS
            for step in range(-REACH, REACH + 1)
            for other in numbered[series].get(number + step, ())
            if step
        }
        yield from ((index, other) for other in sorted(near))


def _entries(paths: Sequence[Path]) -> Iterator[tuple[Path, str, int]]:
    for path in paths:
        found = series_of(path)
        if found is not None:
            yield from ((path, series, found[1]) for series in found[0])
