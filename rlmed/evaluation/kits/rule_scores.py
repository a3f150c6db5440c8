"""Scores of an evaluation by published rules: their record, and their file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rlmed.core.config.building import build_record
from rlmed.core.files.damage import read_json

FOLDER = "predictions"
SCORES_FILE = "scores.json"


@dataclass(frozen=True, slots=True)
class RuleScore:
    """The mean score of some rows of a file by a published rule, and ours; fractions in [0, 1]."""

    file: str
    rule: str
    rows: int
    value: float
    low: float
    high: float
    ours: float
    """Share of right answers by the task, of the same rows."""
    ours_low: float | None = None
    """None, and no task, in files of earlier versions."""
    ours_high: float | None = None
    task: str = ""
    """Of the rows: choice or open."""


def read_scores(step_folder: Path) -> tuple[RuleScore, ...]:
    """Read `predictions/scores.json` from the folder of an evaluation; () without it.

    Raises:
        ValueError: if it is damaged.
    """
    path = step_folder / FOLDER / SCORES_FILE
    if not path.is_file():
        return ()
    return tuple(build_record(RuleScore, one) for one in read_json(path)["scores"])
