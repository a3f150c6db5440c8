"""What a prepared data set says of its files: rows, images, image-free accuracies, answers."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from rlmed.core.statistics import chance, leave_one_out_prior, majority_letter
from rlmed.core.types import Example
from rlmed.data.readers.base import Answer
from rlmed.tasks.metrics.text import normalise
from rlmed.tasks.registry import task_of


@dataclass(frozen=True, slots=True)
class Priors:
    """Accuracies on a split without looking at images, in [0, 1]; see `rlmed.core.statistics`.

    Example:
        Priors(chance=0.25, majority_letter=0.29, leave_one_out=0.965, leave_one_out_by_rate=0.974)
    """

    chance: float
    majority_letter: float
    leave_one_out: float
    """Accuracy of picking the option text most often correct in the split's other rows."""
    leave_one_out_by_rate: float

    @classmethod
    def of(cls, examples: list[Example]) -> Priors:
        """Compute the priors; raises ValueError without rows."""
        return cls(
            chance(examples),
            majority_letter(examples),
            leave_one_out_prior(examples),
            leave_one_out_prior(examples, by_rate=True),
        )


@dataclass(frozen=True, slots=True)
class TaskRows:
    """The rows of one task other than multiple choice in a split.

    Example:
        TaskRows(rows=120, images=60, answers=310, nothing=20, commonest=20)
    """

    rows: int
    images: int
    """Distinct images of its rows."""
    answers: int
    """All boxes, labels, reports or accepted texts."""
    nothing: int
    """Rows to which nothing is the right answer: no box, no label."""
    commonest: int
    """Rows with the answer that is most often right."""


@dataclass(frozen=True, slots=True)
class SplitSummary:
    """One JSON Lines file.

    Example:
        SplitSummary(file="test_ct.jsonl", rows=300, images=300, by_modality={"CT": 300},
                     by_kind={"anatomy": 120}, sha256="9f2c…", priors=Priors(0.30, 0.35, 0.97,
                     0.97))
    """

    file: str
    rows: int
    images: int
    """Distinct images of its rows."""
    by_modality: dict[str, int]
    by_kind: dict[str, int]
    sha256: str
    priors: Priors | None
    """Of its multiple-choice rows; None without any."""
    kept_order: int = 0
    """Rows whose options have a fixed order, since one refers to others: `all of the above`."""
    kept_order_by: str = ""
    """The first of these options; "" for none."""
    by_task: dict[str, int] = field(default_factory=dict)
    """Rows by task."""
    choice_images: int = 0
    """Distinct images of its multiple-choice rows."""
    tasks: dict[str, TaskRows] = field(default_factory=dict)
    """More on those of each task other than multiple choice."""


class TaskCounter:
    """The rows of a task in a split being written."""

    def __init__(self) -> None:
        """Start without rows."""
        self._images: set[str] = set()
        self._answers = self._nothing = 0
        self._same: Counter[bytes] = Counter()

    def append(self, example: Example, answer: Answer, images: Sequence[str]) -> None:
        """Count a row; `answer` and `images` are as in its line."""
        self._images.update(images)
        self._answers += len(answer) if isinstance(answer, list) else 1
        self._nothing += answer == []
        text = task_of(example).right_answer(example)
        # a digest, since reports are long
        self._same[hashlib.sha256((normalise(text) or text).encode()).digest()] += 1

    def finish(self) -> TaskRows:
        """Return the counts, of at least one row."""
        commonest = max(self._same.values())
        return TaskRows(self._same.total(), len(self._images), self._answers, self._nothing, commonest)
