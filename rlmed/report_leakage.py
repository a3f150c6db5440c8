"""What the report shows of pictures and rows that are in test and training data: counts, accuracy without them, pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from rlmed.data.leakage_report import WORDS, FileLeakage, Leak, LeakageReport
from rlmed.evaluation_results import Accuracy, EvalRow
from rlmed.report_rollouts import Pictures

PAIRS = 24
"""Pairs of pictures shown, the files in turn; all are in data.json."""
IDS = 4
"""Rows named of each side of a pair."""


def show_leakage(
    content: Mapping[str, Any] | None, rows: Sequence[EvalRow], pictures: Pictures
) -> dict[str, Any] | None:
    """What the template needs; None where nothing was compared.

    Args:
        content: of data.json.
        rows: of the last evaluation.
        pictures: receives the pictures.
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
    """Of the rows of a file as they are, but for some ids; None when no row is left."""
    right = [row.right for row in rows if row.file == file and row.control == "none" and row.id not in left_out]
    return Accuracy.of(sum(right), len(right)) if right else None


def _choose(report: LeakageReport) -> list[Leak]:
    """The surest pairs over pictures, each test picture once, the files in turn."""
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
            {"name": name, "picture": pictures.add(image), "ids": _shortened(ids)}
            for name, image, ids in (
                ("test", leak.test_image, leak.test_ids),
                ("training", leak.train_image, leak.train_ids),
            )
        ],
    }


def _shortened(ids: Sequence[str]) -> str:
    more = f" and {len(ids) - IDS} more" if len(ids) > IDS else ""
    return ", ".join(ids[:IDS]) + more
