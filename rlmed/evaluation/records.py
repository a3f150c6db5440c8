"""Records of an evaluation: a judged answer, and a share of right ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rlmed.core.statistics import wilson_interval
from rlmed.core.types import LETTERS, FinishReason

Control = Literal["none", "blank", "shuffled", "blank_one", "image_order", "reordered"]
"""Shown: the unchanged row, grey pictures, another row's pictures, one of several pictures grey,
several pictures in another order, or options in another order.
"""
SHOWN: Mapping[Control, str] = {
    "none": "on the unchanged rows",
    "blank": "on a grey picture",
    "shuffled": "on another row's picture",
    "blank_one": "with one of several pictures grey",
    "image_order": "with several pictures in another order",
    "reordered": "with the options in another order",
}
"""What each control shows."""


@dataclass(frozen=True, slots=True)
class EvalRow:
    """One answered question: a line of `rows.jsonl`.

    Example:
        EvalRow(file="ct", id="ct-7", control="none", image="/data/images/7.png",
                question_type="anatomy", question="Which organ?", options=("liver", "lung"),
                answer="B", completion="<think>…</think><answer>B</answer>", predicted_letter="B",
                correct=True, format=True, tokens=31, finish_reason="stop")
    """

    file: str
    id: str
    control: Control
    image: str | None
    """The picture shown; for "blank", the one whose size the grey picture has."""
    question_type: str
    question: str
    options: tuple[str, ...]
    answer: str
    """The right letter; of other tasks, the right answer as a completion would have it."""
    completion: str
    """Including the chat template's prefill."""
    predicted_letter: str | None
    """The letter found in the completion; None for other tasks than multiple choice."""
    correct: bool
    format: bool
    """Whether it has the prompt's format: reasoning and answer in their tags, or answer alone."""
    tokens: int
    """Length of the completion."""
    finish_reason: FinishReason
    more_images: tuple[str, ...] = ()
    """The pictures shown after `image`, in order; written for a question about several only."""
    task: str = "choice"
    """Written, like the next three, for other tasks only."""
    truth: Any = None
    """What is right, see `rlmed.core.types.Example.truth`."""
    predicted: str | None = None
    """The answer found in the completion; None if there is none that can be read."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Each in [0, 1], by name."""

    @property
    def images(self) -> tuple[str, ...]:
        """All pictures in order: none, one or several."""
        return () if self.image is None else (self.image, *self.more_images)

    def to_json(self) -> dict[str, Any]:
        """Return the content of its line."""
        content = dataclasses.asdict(self)
        absent = {"more_images"} if not self.more_images else set()
        if self.task == "choice":
            absent |= {"task", "truth", "predicted", "scores"}
        return {key: value for key, value in content.items() if key not in absent}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> EvalRow:
        """Read back the result of `to_json`; earlier versions knew one picture a question."""
        texts = {name: tuple(content[name]) for name in ("options", "more_images") if name in content}
        return cls(**{**content, **texts})

    @property
    def not_offered(self) -> bool:
        """Whether the letter found belongs to none of the options."""
        return self.predicted_letter is not None and self.predicted_letter not in LETTERS[: len(self.options)]


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Share of right answers with its Wilson 95 % interval.

    Example:
        >>> accuracy = Accuracy.of(6, 8)
        >>> accuracy.value, round(accuracy.low, 3), round(accuracy.high, 3)
        (0.75, 0.409, 0.929)
    """

    correct: int
    rows: int
    value: float
    low: float
    high: float

    @classmethod
    def of(cls, correct: int, rows: int) -> Accuracy:
        """Compute share and interval; raise ValueError without rows."""
        low, high = wilson_interval(correct, rows)
        return cls(correct, rows, correct / rows, low, high)


def p_value_text(p_value: float) -> str:
    """Format a p-value to three digits."""
    return "<0.001" if p_value < 0.001 else f"{p_value:.3f}"
