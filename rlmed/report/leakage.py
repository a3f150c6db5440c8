"""Leakage section of the report: counts, accuracy without leaking rows, pairs of pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from rlmed.data.leakage.findings import WORDS, FileLeakage, Leak, LeakageReport
from rlmed.evaluation.records import Accuracy, EvalRow
from rlmed.report.rollouts import Pictures

PAIRS = 24
"""Most pairs of pictures to show, alternating between files; all are in data.json."""
IDS = 4
"""Most row ids to show on each side of a pair."""


def show_leakage(
    content: Mapping[str, Any] | None, rows: Sequence[EvalRow], pictures: Pictures
) -> dict[str, Any] | None:
    """Return the template's data; None if nothing was compared.

    Args:
        content: leakage entry of data.json.
        rows: rows of the last evaluation.
        pictures: collects the pictures.
    """
    if content is None:
        return None
    report = LeakageReport.from_json(content)
    chosen = _choose(report)
    return {
        "train_rows": report.train_rows,
        "train_images": report.train_images,
        "leaking_rows": sum(file.leaking_rows for file in report.files),
        "doubtful": sum(file.doubtful for file in report.files),
        "files": [_file(file, report, rows) for file in report.files if file.leaking_rows],
        "pairs": [_pair(leak, pictures) for leak in chosen],
        "hidden": len(report.leaks) - len(chosen),
    }


def _file(file: FileLeakage, report: LeakageReport, rows: Sequence[EvalRow]) -> dict[str, Any]:
    return {
        "file": file,
        "kinds": ", ".join(f"{count} {WORDS[kind]}" for kind, count in file.images_by_kind.items()),
        "accuracy": accuracy(rows, file.name),
        "without": accuracy(rows, file.name, report.leaking_ids(file.name)),
    }


def accuracy(rows: Sequence[EvalRow], file: str, left_out: frozenset[str] = frozenset()) -> Accuracy | None:
    """Return the accuracy on a file's unchanged rows, except some ids; None if no row is left."""
    correct = [row.correct for row in rows if row.file == file and row.control == "none" and row.id not in left_out]
    return Accuracy.of(sum(correct), len(correct)) if correct else None


def _choose(report: LeakageReport) -> list[Leak]:
    """Choose the surest pairs of pictures, each test picture once, alternating between files."""
    by_file: dict[str, dict[str, Leak]] = {}
    for leak in report.leaks:
        if leak.test_image is not None:
            by_file.setdefault(leak.file, {}).setdefault(leak.test_image, leak)
    turns = zip_longest(*(leaks.values() for leaks in by_file.values()))
    return [leak for turn in turns for leak in turn if leak is not None][:PAIRS]


def _pair(leak: Leak, pictures: Pictures) -> dict[str, Any]:
    return {
        "file": leak.file,
        "kind": WORDS[leak.kind],
        "likeness": leak.likeness,
        "repeated": len(leak.repeated_ids),
        "sides": [
            {
                "name": f"image {place} of {name}" if place else name,
                "picture": pictures.add(image),
                "ids": _shortened(ids),
            }
            for name, image, ids, place in (
                ("test", leak.test_image, leak.test_ids, leak.test_place),
                ("training", leak.train_image, leak.train_ids, leak.train_place),
            )
        ],
    }


def _shortened(ids: Sequence[str]) -> str:
    more = f" and {len(ids) - IDS} more" if len(ids) > IDS else ""
    return ", ".join(ids[:IDS]) + more
