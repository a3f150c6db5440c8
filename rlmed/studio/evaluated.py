"""Rows of an evaluation, beside those of the run's first one, and filters of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from rlmed.evaluation.records import SHOWN, EvalRow
from rlmed.evaluation.results import ROWS_FILE, read_rows
from rlmed.report.answers import show_question
from rlmed.report.evaluations import Evaluations
from rlmed.report.rollouts import show_answer
from rlmed.studio.pictures import Pictures
from rlmed.studio.runs import EVALUATIONS, Run

PAGE = 20
"""Rows of a page."""
OUTCOMES = {
    "right": "right",
    "wrong": "wrong",
    "gained": "gained: wrong, then right",
    "lost": "lost: right, then wrong",
    "unread": "no answer that can be read",
}
MOST_WORDS = 200
"""Characters of the words looked for."""


@dataclass(frozen=True, slots=True)
class RowFilters:
    """Which rows to show.

    Example:
        >>> RowFilters.read({"file": "ct", "outcome": "lost", "page": "x"}).query()
        'file=ct&outcome=lost'
    """

    file: str = ""
    task: str = ""
    outcome: str = ""
    control: str = "none"
    words: str = ""
    page: int = 1

    @classmethod
    def read(cls, given: Mapping[str, str]) -> RowFilters:
        """Read a query; what cannot be read is left out."""
        page = given.get("page", "")
        outcome, control = given.get("outcome", ""), given.get("control", "none")
        return cls(
            file=given.get("file", "")[:MOST_WORDS],
            task=given.get("task", "")[:MOST_WORDS],
            outcome=outcome if outcome in OUTCOMES else "",
            control=control if control in SHOWN else "none",
            words=given.get("words", "").strip()[:MOST_WORDS],
            page=int(page) if page.isascii() and page.isdigit() and 0 < len(page) < 8 and int(page) else 1,
        )

    @property
    def any(self) -> bool:
        """Whether any row is left out."""
        return bool(self.query())

    def query(self) -> str:
        """Return the filters as a query, without the page."""
        default = RowFilters()
        given = {name: value for name, value in asdict(self).items() if value != getattr(default, name)}
        given.pop("page", None)
        return urlencode(given)

    def fits(self, row: EvalRow, before: EvalRow | None) -> bool:
        """Return whether a row, and the same one of the first evaluation, is to be shown."""
        if row.control != self.control or (self.file and row.file != self.file):
            return False
        if self.task and row.task != self.task:
            return False
        if self.outcome and not _has(self.outcome, row, before):
            return False
        text = "\n".join((row.id, row.question, *row.options, row.answer, row.completion)).casefold()
        return all(word in text for word in self.words.casefold().split())


def _has(outcome: str, row: EvalRow, before: EvalRow | None) -> bool:
    if outcome in ("right", "wrong"):
        return row.correct == (outcome == "right")
    if outcome == "unread":
        return (row.predicted_letter if row.task == "choice" else row.predicted) is None
    return before is not None and before.correct != row.correct and row.correct == (outcome == "gained")


@dataclass(frozen=True)
class EvaluatedRows:
    """The rows of one evaluation of a run."""

    step: int
    first_step: int
    rows: tuple[EvalRow, ...]
    before: Mapping[tuple[str, str, str], EvalRow] = field(repr=False)
    """Rows of the run's first evaluation by file, control and id; empty if this is the first."""

    @classmethod
    def read(cls, run: Run, step: int) -> EvaluatedRows:
        """Read them.

        Raises:
            LookupError: if the run has no such evaluation.
            OSError, ValueError: for a damaged file.
        """
        steps = steps_of(run)
        if step not in steps:
            raise LookupError(f"the run has no evaluation at step {step}")
        first = min(steps)
        earlier = read_rows(steps[first]) if first != step else []
        return cls(step, first, tuple(read_rows(steps[step])), {_key(row): row for row in earlier})

    def old(self, row: EvalRow) -> EvalRow | None:
        """Return the same row of the first evaluation, if there is one before this."""
        return self.before.get(_key(row))

    def find(self, filters: RowFilters) -> list[int]:
        """Return the places of the rows that fit."""
        return [place for place, row in enumerate(self.rows) if filters.fits(row, self.old(row))]

    def key(self, place: int) -> str:
        """Return what tells a row from another one in its place, as 16 hexadecimal digits."""
        row = self.rows[place]
        parts = [*_key(row), row.question, *row.images]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def show(self, place: int, pictures: Pictures) -> dict[str, Any]:
        """Return a row for the template, its answer of the first evaluation before its own."""
        row = self.rows[place]
        sides = [one for one in (self.old(row), row) if one is not None]
        return {
            "row": place,
            "key": self.key(place),
            "file": row.file,
            "id": row.id,
            "question_type": row.question_type,
            "question": row.question,
            "control": row.control,
            **show_question(row.task, row.options, row.answer, row.truth),
            "images": pictures.describe(row.images),
            "answers": [
                {**show_answer(one), "step": step}
                for one, step in zip(sides, (self.first_step, self.step)[-len(sides) :], strict=True)
            ],
        }

    def kinds(self) -> dict[str, Sequence[str]]:
        """Return the files, tasks and controls that occur, in order."""
        return {
            "files": list(dict.fromkeys(row.file for row in self.rows)),
            "tasks": sorted({row.task for row in self.rows}),
            "controls": [name for name in SHOWN if any(row.control == name for row in self.rows)],
        }


def read_evaluations(run: Run) -> Evaluations:
    """Read what the tables show.

    Raises:
        ValueError: for an entry that is no file of the run, such as a pipe or a link to elsewhere.
        OSError, LookupError, TypeError, AttributeError: for a damaged file.
    """
    for entry in run.file(EVALUATIONS).glob("step-*/*"):
        if not run.file(str(entry.relative_to(run.folder))).exists():
            raise ValueError(f"{entry} is no file of the run: remove it")
    return Evaluations.read(run.file(EVALUATIONS), None)


def steps_of(run: Run) -> dict[int, Path]:
    """Return the folders of a run's evaluations by step; none that lies outside of the run."""
    found = {}
    for folder in run.evaluations():
        number = folder.name.removeprefix("step-")
        inside = run.file(f"{EVALUATIONS}/{folder.name}/{ROWS_FILE}").is_file()
        if number.isascii() and number.isdigit() and inside:
            found[int(number)] = folder
    return found


def _key(row: EvalRow) -> tuple[str, str, str]:
    return row.file, row.control, row.id
