"""Accuracies, faithfulness and scores by published rules: data of the report's tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from rlmed.core.statistics import mcnemar
from rlmed.evaluation.faithfulness_table import MEANING, SHOWN
from rlmed.evaluation.records import Accuracy
from rlmed.evaluation.results import FileSummary
from rlmed.report.evaluations import Evaluations
from rlmed.report.task_scores import show_scores

_SAME = 0.0005
"""Shares that differ by less look equal in the table."""


def accuracy_table(evaluations: Evaluations) -> dict[str, Any] | None:
    """Return the template's data: a line a file, and below a file with several tasks a line a task.

    None without evaluations.
    """
    if not evaluations.summaries:
        return None
    first, last = evaluations.summaries[0], evaluations.summaries[-1]
    before = {file.name: file for file in first.files} if first is not last else {}
    sft = {file.name: file for file in evaluations.sft.files} if evaluations.sft else {}
    lines: list[dict[str, Any]] = [
        line for file in last.files for line in _lines(file, before.get(file.name), sft.get(file.name), evaluations)
    ]
    files = [line for line in lines if line["task"] is None]
    means = {
        "before": np.mean([line["before"].value for line in files]) if all(line["before"] for line in files) else None,
        "after": last.mean_accuracy,
        "sft": np.mean([line["sft"].accuracy.value for line in files]) if all(line["sft"] for line in files) else None,
    }
    return {
        "steps": [one.step for one in evaluations.ends],
        "before": any(line["before"] for line in lines),
        "before_model": evaluations.comparison["before"]["model"] if evaluations.comparison else None,
        "sft": bool(sft),
        "train_rows": last.train_rows,
        "lines": lines,
        "files": len(files),
        "means": means,
    }


def _lines(
    file: FileSummary, before: FileSummary | None, sft: FileSummary | None, evaluations: Evaluations
) -> Iterator[dict[str, Any]]:
    """Yield the line of a file, then those of its tasks."""
    elsewhere = evaluations.comparison["files"].get(file.name) if evaluations.comparison else None
    yield _line(file, before, sft, _p_value(evaluations, file.name), elsewhere)
    olds, tuned = ({part.name: part for part in one.parts} if one else {} for one in (before, sft))
    # earlier versions compared files alone
    tests = (elsewhere or {}).get("tasks", {})
    for part in file.parts:
        name = part.name
        p_value = _p_value(evaluations, file.name, name)
        yield {
            **_line(part, olds.get(name), tuned.get(name), p_value, tests.get(name)),
            "within": file.name,
            "task": name,
        }


def _line(
    file: FileSummary,
    before: FileSummary | None,
    sft: FileSummary | None,
    p_value: float | None,
    elsewhere: Mapping[str, Any] | None,
) -> dict[str, Any]:
    earlier = before.accuracy if before else None
    if elsewhere is not None:
        earlier, p_value = Accuracy.of(elsewhere["correct_before"], elsewhere["rows"]), elsewhere["p_value"]
    types = () if file.parts else sorted(file.by_question_type.items())
    return {
        "file": file,
        "within": file.name,
        "task": None,
        "before": earlier,
        "before_format": before.format_rate if before else None,
        "change": None if earlier is None else file.accuracy.value - earlier.value,
        "p_value": p_value,
        "sft": sft,
        "question_types": [{"name": name, "correct": correct, "rows": rows} for name, (correct, rows) in types],
    }


def _p_value(evaluations: Evaluations, name: str, task: str | None = None) -> float | None:
    """Return McNemar's p of a file's rows, or of those of a task; None if the rows differ."""
    sides = [
        {
            (row.id, row.question): row.correct
            for row in rows
            if row.file == name and row.control == "none" and task in (None, row.task)
        }
        for rows in (evaluations.first_rows, evaluations.last_rows)
    ]
    if not sides[0] or sides[0].keys() != sides[1].keys():
        return None
    before, after = (np.array([side[key] for key in sides[0]], dtype=bool) for side in sides)
    return mcnemar(before, after).p_value


def scores_by_task(evaluations: Evaluations) -> dict[str, Any] | None:
    """Return what `show_scores` does, of the last evaluation; None without one."""
    if not evaluations.summaries:
        return None
    first, last = evaluations.summaries[0], evaluations.summaries[-1]
    return show_scores(
        None if first is last else first,
        last,
        (evaluations.first_rows, evaluations.last_rows),
        evaluations.comparison,
        evaluations.sft,
    )


def show_faithfulness(evaluations: Evaluations) -> dict[str, Any] | None:
    """Return the template's data, a column a file and task, a line a figure; None without any."""
    columns = evaluations.faithfulness
    if not columns:
        return None
    lines: list[dict[str, Any]] = [
        {"name": label, "meaning": MEANING[name], "figures": [getattr(one, name) for one in columns]}
        for name, label in SHOWN.items()
    ]
    return {"columns": columns, "lines": [line for line in lines if any(line["figures"])]}


def show_rules(evaluations: Evaluations) -> dict[str, Any] | None:
    """Return scores by published rules that differ from ours, and names of those that don't."""
    if not evaluations.rules:
        return None
    apart = [one for one in evaluations.rules if abs(one.value - one.ours) >= _SAME]
    return {"lines": apart, "same": [one for one in evaluations.rules if one not in apart]}
