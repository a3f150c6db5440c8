"""What test files share with the training rows: the record, its JSON, and its wording."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

LeakKind = Literal["file", "pixels", "near", "slice", "text"]
"""The same file; the same pixels; an altered copy, or hard to tell from one.

Or a neighbour in its series; the same question without an image.
"""
KINDS: tuple[LeakKind, ...] = ("file", "pixels", "near", "slice", "text")

WORDS: Mapping[str, str] = {
    "file": "same file",
    "pixels": "same pixels",
    "near": "near duplicate",
    "slice": "neighbouring slice",
    "text": "same question without an image",
}


@dataclass(frozen=True, slots=True)
class Leak:
    """A test picture and a training picture that show (nearly) the same.

    Example:
        Leak(file="ct", kind="near", test_image="/data/t/7.png", train_image="/data/9.jpg",
             likeness=0.93, test_ids=("ct-7",), train_ids=("train-9", "train-10"), repeated_ids=())
    """

    file: str
    """Name of the test file."""
    kind: LeakKind
    test_image: str | None
    """None for matching rows without an image."""
    train_image: str | None
    likeness: float
    """1 for the same file, pixels or text; else a score.

    For slices it is the correlation of thumbnails, else the `near_duplicates` score.
    """
    test_ids: tuple[str, ...]
    """Rows of the test file about this picture; without one, those that ask the same."""
    train_ids: tuple[str, ...]
    repeated_ids: tuple[str, ...]
    """Of these, test rows that share question, options and answer with the other's training row."""
    test_place: str = ""
    """Which image of the first test row it is, as "2 of 3"; "" if the row has one."""
    train_place: str = ""


@dataclass(frozen=True, slots=True)
class FileLeakage:
    """The findings for one test file.

    Example:
        FileLeakage(name="ct", rows=300, images=159, leaking_rows=4, repeated_rows=1,
        images_by_kind={"near": 2}, doubtful=0)
    """

    name: str
    rows: int
    images: int
    """Distinct image files."""
    leaking_rows: int
    repeated_rows: int
    """Of these, rows that the training data holds with question, options and answer."""
    images_by_kind: dict[str, int]
    """Leaking pictures (for "text", rows), each under the first of `KINDS` that applies."""
    doubtful: int
    """Pictures like a training picture, in a set where different ones are so too; not counted."""


@dataclass(frozen=True, slots=True)
class LeakageReport:
    """What test files share with the training rows.

    Example:
        LeakageReport(train_rows=600, train_images=219, files=(mri, ct), leaks=(leak,))
    """

    train_rows: int
    train_images: int
    files: tuple[FileLeakage, ...]
    leaks: tuple[Leak, ...]
    """Sorted by file, then from the surest kind to the least sure."""

    def leaking_ids(self, file: str) -> frozenset[str]:
        """Return the ids of a test file's leaking rows."""
        return frozenset(name for leak in self.leaks if leak.file == file for name in leak.test_ids)

    def relative_to(self, folder: Path) -> LeakageReport:
        """Return the report with image paths relative to a folder that holds them all."""
        here = Path(os.path.realpath(folder))

        def inside(image: str | None) -> str | None:
            return None if image is None else Path(image).relative_to(here).as_posix()

        leaks = (
            dataclasses.replace(leak, test_image=inside(leak.test_image), train_image=inside(leak.train_image))
            for leak in self.leaks
        )
        return dataclasses.replace(self, leaks=tuple(leaks))

    def to_json(self) -> dict[str, Any]:
        """Return the JSON for `data.json` and `manifest.json`; a place only where there is one."""
        content = dataclasses.asdict(self)
        places = ("test_place", "train_place")
        content["leaks"] = [
            {name: value for name, value in leak.items() if value or name not in places} for leak in content["leaks"]
        ]
        return content

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> LeakageReport:
        """Read back the result of `to_json`."""
        rows = ("test_ids", "train_ids", "repeated_ids")
        leaks = (Leak(**{**leak, **{name: tuple(leak[name]) for name in rows}}) for leak in content["leaks"])
        files = tuple(FileLeakage(**file) for file in content["files"])
        return cls(content["train_rows"], content["train_images"], files, tuple(leaks))


def leakage_lines(report: LeakageReport) -> list[str]:
    """Return a line for each test file that shares anything with training rows: its surest pair."""
    lines = []
    for file in report.files:
        if not file.leaking_rows:
            continue
        kinds = ", ".join(f"{count} {WORDS[kind]}" for kind, count in file.images_by_kind.items())
        repeated = f", {file.repeated_rows} of them with question and answer" if file.repeated_rows else ""
        first = next(leak for leak in report.leaks if leak.file == file.name)
        lines.append(
            f"{file.leaking_rows} of {file.rows} rows of {file.name} are in the training data too{repeated} ({kinds}); for "
            f"example {describe(first)}"
        )
    return lines


def doubt_lines(report: LeakageReport) -> list[str]:
    """Return a line per test file with doubtful pictures: they count neither as leaks nor clean."""
    return [
        f"{file.doubtful} of {file.images} pictures of {file.name} look much like a training picture, but different pictures "
        "of these data do so too: they do not count as leaks (docs/data.md)"
        for file in report.files
        if file.doubtful
    ]


def describe(leak: Leak) -> str:
    """Describe a pair in words."""
    row, other = leak.test_ids[0], leak.train_ids[0]
    if leak.test_image is None or leak.train_image is None:
        return f"row {row} asks what training row {other} asks"
    test, train = (
        f"image {place}, {Path(image).name}" if place else Path(image).name
        for image, place in ((leak.test_image, leak.test_place), (leak.train_image, leak.train_place))
    )
    return f"row {row} ({test}) and training row {other} ({train}): {WORDS[leak.kind]}, likeness {leak.likeness:.2f}"


def check_no_leakage(report: LeakageReport) -> None:
    """Enforce `data.leakage=strict`.

    Raises:
        ValueError: if a test row is in the training data too; names files and rows and says what to
            do.
    """
    lines = leakage_lines(report)
    if lines:
        raise ValueError(
            f"data.leakage=strict: {'; '.join(lines)}. Take these rows out of the training file or out of the test file "
            "(python -m rlmed.leakage --json lists them all), or continue with data.leakage=report"
        )
