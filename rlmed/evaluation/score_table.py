"""The scores of tasks other than multiple choice as a terminal table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

from rlmed.evaluation.narrow import FigureTable
from rlmed.evaluation.records import p_value_text
from rlmed.evaluation.results import EvalSummary
from rlmed.evaluation.scores import Estimate, TaskSummary


def score_table(before: EvalSummary | None, after: EvalSummary, comparison: Mapping[str, Any] | None) -> Table | None:
    """Build the table, two lines per score: value, controls, baselines; None without such tasks.

    All in per cent. Controls and baselines are those of `after`. The prior is fitted on training
    rows, or else on the other half of the file, marked "own".
    """
    if not any(file.tasks for file in after.files):
        return None
    table = FigureTable("Scores by task in %", [*_legend(after, tested=comparison is not None)])
    rows = []
    earlier = {(file.name, task.name): task for file in before.files for task in file.tasks} if before else {}
    tests = comparison["files"] if comparison is not None else {}
    for file in after.files:
        for task in file.tasks:
            test = tests.get(file.name, {}).get("scores", {}).get(task.name)
            label = f"{file.name}, {task.name}\n{task.rows} rows"
            for score, cells in _lines(earlier.get((file.name, task.name)), task):
                p_value = p_value_text(test["p_value"]) if test and score == task.main else "–"
                marked = f"{score}*" if score == task.main else score
                rows.append((label, [marked, cells[0], p_value, *cells[1:]]))
                label = ""
    table.add_rows("file, task", ("score", "value", "p", "blank", "shuffled", "chance\nprior"), rows)
    return table


def _legend(summary: EvalSummary, *, tested: bool) -> Iterator[str]:
    """Yield explanations of the columns."""
    tasks = [task for file in summary.files for task in file.tasks]
    yield "small figures: 95 % intervals, Wilson or bootstrap over rows; *: the reward `task`"
    if tested:
        yield "p: sign flips, paired"
    if any(rows != task.rows for task in tasks for rows in task.control_rows.values()):
        yield "n: rows that a control was asked on, where not on all"
    if any({*task.controls} & {"blank", "shuffled"} for task in tasks):
        yield "blank, shuffled: on a grey picture, on another row's"
    yield "chance: another row's right answer; prior: the one best answer to a question without its image"


def _lines(before: TaskSummary | None, task: TaskSummary) -> Iterator[tuple[str, list[str]]]:
    """Yield each score's name and its cells: value, blank, shuffled, chance and prior."""
    for name, now in {**task.scores, **task.over_file}.items():
        then = None if before is None else {**before.scores, **before.over_file}.get(name)
        controls = [_control(task, control, name) for control in ("blank", "shuffled")]
        yield name, [_change(then, now), *controls, _baselines(task, name)]


def _control(task: TaskSummary, control: str, name: str) -> str:
    cell, rows = _cell(task.controls.get(control, {}).get(name)), task.control_rows.get(control, task.rows)
    return cell if cell == "–" or rows == task.rows else f"{cell}\nn={rows}"


def _baselines(task: TaskSummary, name: str) -> str:
    own = task.prior is None
    prior = task.own_prior if own else task.prior
    shown = [_percent(scores[name]) if scores and name in scores else "–" for scores in (task.chance, prior)]
    return f"{shown[0]}\n{shown[1]}{' own' if own and shown[1] != '–' else ''}"


def _change(before: Estimate | None, now: Estimate) -> str:
    value, interval = _cell(now).split("\n")
    if before is None:
        return f"{value}\n{interval}"
    old, old_interval = _cell(before).split("\n")
    return f"{old} → {value}\n{old_interval} → {interval}"


def _cell(estimate: Estimate | None) -> str:
    if estimate is None:
        return "–"
    return f"{_percent(estimate.value)}\n{100 * estimate.low:.0f}–{100 * estimate.high:.0f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
