"""Multiple choice: one of the lettered options is right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlmed.core.parsing import evaluated_letter
from rlmed.core.types import LETTERS, Example
from rlmed.tasks.base import TEMPLATE, ImageSize, Judgement, Task
from rlmed.tasks.metrics.claims import asserts_finding

INSTRUCTION = "provide the correct single-letter choice (A, B, C, D,...)"


class Choice(Task):
    """The task of rows without a `task`; its truth is `Example.options` and `Example.answer`."""

    name = "choice"
    template = TEMPLATE.format(instruction=INSTRUCTION)
    main = "accuracy"
    score_names = ("accuracy",)

    def read(self, answer: Any, options: Sequence[str], size: ImageSize) -> Any:
        """Return None: `rlmed.data.options.choices` reads options and answer."""
        return None

    def write(self, truth: Any) -> str:
        """Raise TypeError: the letter depends on the order of the options."""
        raise TypeError("use right_answer(example)")

    def score(self, answer: str, truth: Any) -> Mapping[str, float] | None:
        """Raise TypeError: the letter depends on the order of the options."""
        raise TypeError("use judge(example, text)")

    def question_text(self, example: Example) -> str:
        """Return the question, then one line per option."""
        return example.question_text

    def judge(self, example: Example, text: str) -> Judgement:
        """Judge the first answer tags that hold one capital letter alone."""
        letter = evaluated_letter(text)
        correct = letter == example.letter
        return Judgement(letter, correct, {"accuracy": float(correct)})

    def asserts(self, answer: str, truth: Any, options: Sequence[str]) -> bool | None:
        """Return whether the option chosen asserts a finding; None if every option does."""
        found = [asserts_finding(option) for option in options]
        return None if all(found) else answer in LETTERS[: len(options)] and found[LETTERS.index(answer)]

    def right_answer(self, example: Example) -> str:
        """Return the right letter."""
        return example.letter
