"""Scores of tasks other than multiple choice: the report's table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlmed.core.statistics import sign_flip_test
from rlmed.evaluation.records import EvalRow
from rlmed.evaluation.results import EvalSummary
from rlmed.evaluation.scores import Estimate, TaskSummary

CONTROLS = {"blank": "blank", "shuffled": "shuffled", "blank_one": "one\nblank", "image_order": "image\norder"}
"""Heading of each control, in the order of columns; the last two are left out without such rows."""


def show_scores(
    before: EvalSummary | None,
    after: EvalSummary,
    rows: tuple[Sequence[EvalRow], Sequence[EvalRow]],
    comparison: Mapping[str, Any] | None,
    sft: EvalSummary | None,
) -> dict[str, Any] | None:
    """Return the template's data, a line a score; None without such tasks.

    Args:
        before: the first evaluation, if there are two.
        after: the last one, whose controls and baselines are shown.
        rows: answers of both.
        comparison: of the only evaluation with one of another run.
        sft: the supervised baseline.
    """
    if not any(file.tasks for file in after.files):
        return None
    earlier, baseline = _by_name(before), _by_name(sft)
    tests = comparison["files"] if comparison is not None else {}
    lines = []
    for file in after.files:
        for task in file.tasks:
            test = tests.get(file.name, {}).get("scores", {}).get(task.name)
            if test is None:
                test = {"p_value": _p_value(file.name, task, *rows)}
            old, tuned = (found.get((file.name, task.name)) for found in (earlier, baseline))
            figures = [_line(task, name, old, tuned, test) for name in (*task.scores, *task.over_file)]
            lines += [{"file": file.name, "task": task, "first": not at, **line} for at, line in enumerate(figures)]
    found = {control for file in after.files for task in file.tasks for control in task.controls}
    return {
        "lines": lines,
        "before": any(line["before"] is not None for line in lines),
        "sft": bool(baseline),
        "controls": {
            control: heading.split("\n")
            for control, heading in CONTROLS.items()
            if control in found or control in ("blank", "shuffled")
        },
        "own": any(task.prior is None for file in after.files for task in file.tasks),
    }


def _by_name(summary: EvalSummary | None) -> Mapping[tuple[str, str], TaskSummary]:
    files = summary.files if summary is not None else ()
    return {(file.name, task.name): task for file in files for task in file.tasks}


def _line(
    task: TaskSummary, name: str, before: TaskSummary | None, sft: TaskSummary | None, test: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a score's line; a comparison knows main scores only, and no intervals."""
    is_main = name == task.main
    now, old = _figures(task)[name], None if before is None else _figures(before).get(name)
    earlier = old.value if old is not None else test.get("before") if is_main else None
    return {
        "name": name,
        "is_main": is_main,
        "now": now,
        "before": earlier,
        "before_interval": old,
        "change": None if earlier is None else now.value - earlier,
        "p_value": test["p_value"] if is_main else None,
        "sft": None if sft is None else _figures(sft).get(name),
        "controls": {control: task.controls.get(control, {}).get(name) for control in CONTROLS},
        "chance": (task.chance or {}).get(name),
        "prior": ((task.own_prior if task.prior is None else task.prior) or {}).get(name),
        "own": task.prior is None,
    }


def _figures(task: TaskSummary) -> Mapping[str, Estimate]:
    return {**task.scores, **task.over_file}


def _p_value(file: str, task: TaskSummary, before: Sequence[EvalRow], after: Sequence[EvalRow]) -> float | None:
    """Return the paired test of the main scores; None if the evaluations have other rows."""
    sides = [
        {
            (row.id, row.question): row.scores.get(task.main)
            for row in rows
            if row.file == file and row.task == task.name and row.control == "none"
        }
        for rows in (before, after)
    ]
    if not sides[0] or sides[0].keys() != sides[1].keys() or None in (*sides[0].values(), *sides[1].values()):
        return None
    first, second = (np.array([side[key] for key in sides[0]]) for side in sides)
    return sign_flip_test(first, second)
