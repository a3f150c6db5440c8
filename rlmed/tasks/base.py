"""The interface of a task: what is asked, how an answer is read and judged.

A task is one file. It needs a `name`, a prompt `template`, how a data file's `answer` is read
(`read`), how it would be written by a model (`write`) and how an answer is scored (`score`).
Rewards, evaluation with its controls and baselines, and the report need nothing more.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from rlmed.core.parsing import answer_text
from rlmed.core.spelling import shorten
from rlmed.core.types import Example, IntArray
from rlmed.tasks.metrics.claims import asserts_finding
from rlmed.tasks.metrics.sets import NO_SYNONYMS
from rlmed.tasks.metrics.text import normalise

ImageSize = Callable[[], tuple[int, int]]
"""Returns width and height of a row's first image in pixels; raises ValueError without one."""

SUFFIX = (
    "Your task: 1. Think through the question step by step, enclose your reasoning process in <think>...</think> tags. "
    "2. Then {instruction} inside <answer>...</answer> tags. "
    "3. No extra information or text outside of these tags."
)
TEMPLATE = f"{{{{question}}}}\n\n{SUFFIX}"
"""MedVLM-R1's prompt (arXiv 2502.19634) with another `{instruction}` for the answer."""

SLOW_RESAMPLES, SLOW_ROWS = 200, 20_000
"""Most resamples, and most rows in all of them (but at least 50), of a task that takes each
resample for a file of its own.
"""


@dataclass(frozen=True, slots=True)
class Judgement:
    """A judged completion.

    Example:
        >>> Judgement(answer="left lung", correct=False, scores={"exact": 0.0, "f1": 0.67}).scores["f1"]
        0.67
    """

    answer: str | None
    """The answer that was found, as text; None if there is none that can be read."""
    correct: bool
    scores: Mapping[str, float]
    """Each in [0, 1], 1 for the right answer; always the same names for a task."""


class Task(ABC):
    """A kind of question; see the module.

    Truth is made of JSON's types alone, since it travels between processes.
    """

    name: ClassVar[str]
    """In the `task` of a row."""
    template: ClassVar[str]
    """Text of the user turn with one `{question}`; `prompt.by_task` replaces it."""
    main: ClassVar[str]
    """Name of the score that the reward `task` pays and tables show."""
    threshold: ClassVar[float] = 1.0
    """An answer counts as right from this main score on."""
    score_names: ClassVar[tuple[str, ...]]
    """All names that `score` returns, in the order of tables."""
    needs_image: ClassVar[bool] = False
    """True if a row without an image has to say so, by `"image": null`: it is a slip otherwise."""
    placeholder: ClassVar[Any] = "?"
    """An `answer` that `read` accepts, for a question whose answer nobody knows (`rlmed.ask`)."""

    synonyms: Mapping[str, str] = NO_SYNONYMS
    """Canonical text by spelling, from the file `data.synonyms`."""

    @abstractmethod
    def read(self, answer: Any, options: Sequence[str], size: ImageSize) -> Any:
        """Return the truth of a row.

        Args:
            answer: the row's `answer`, of JSON's types.
            options: the row's `options`; empty without any.
            size: of the row's first image.

        Raises:
            ValueError: with what is wrong with the row, as the end of a sentence about it.
        """

    @abstractmethod
    def write(self, truth: Any) -> str:
        """Return the right answer as a completion has it between the answer tags."""

    @abstractmethod
    def score(self, answer: str, truth: Any) -> Mapping[str, float] | None:
        """Return the scores of an answer by name, each in [0, 1]; None if it cannot be read.

        Takes linear time and never raises, whatever a model writes.
        """

    def reads(self, answer: str, truth: Any) -> bool:
        """Return whether an answer can be read, whatever is right; by default whether it scores."""
        return self.score(answer, truth) is not None

    def explain(self, answer: str, truth: Any, size: ImageSize) -> str:
        """Return what to say of a readable answer, such as its units; by default ""."""
        return ""

    def question_text(self, example: Example) -> str:
        """Return what stands in the place of `{question}`."""
        return example.question

    def in_pixels(self, template: str) -> str:
        """Return a template that asks for places in pixels; by default unchanged."""
        return template

    def framed(self, truth: Any, size: tuple[int, int]) -> Any:
        """Return the truth of an answer in pixels of a picture of this size; by default unchanged.

        Args:
            truth: as `read` returned it.
            size: width and height of the row's first picture as the model is given it.
        """
        return truth

    def over_file(self, answers: Sequence[tuple[str | None, Any]]) -> Mapping[str, float]:
        """Return figures that are no mean over rows, such as a mean average precision.

        Args:
            answers: each row's answer (None if there is none) and truth.
        """
        return {}

    def over_resamples(
        self, answers: Sequence[tuple[str | None, Any]], draws: IntArray
    ) -> Mapping[str, Sequence[float]]:
        """Return `over_file` of resampled rows, by name, for an interval.

        By default each draw is taken for a file of its own, which is slow, so that only the first
        `SLOW_RESAMPLES` are. A task whose rows need to be read but once does better.

        Args:
            answers: as for `over_file`.
            draws: int64 [resamples, rows], indices of answers, in the order of the file.
        """
        most = max(50, min(SLOW_RESAMPLES, SLOW_ROWS // len(answers)))
        return columns(self.over_file([answers[i] for i in rows]) for rows in draws[:most])

    def same(self, first: str, second: str, truth: Any, second_truth: Any = None) -> bool:
        """Return whether two answers to one question say the same, by default when normalised.

        Args:
            first: an answer.
            second: another.
            truth: of the first.
            second_truth: of the second, if it is another (`framed`, of a picture of another size).
        """
        return (normalise(first) or first) == (normalise(second) or second)

    def asserts(self, answer: str, truth: Any, options: Sequence[str]) -> bool | None:
        """Return whether an answer asserts a finding, which nobody can over a grey picture.

        None if the question leaves no way not to. By default `asserts_finding` of the answer.
        """
        return asserts_finding(answer)

    def judge(self, example: Example, text: str) -> Judgement:
        """Judge a completion by the answer in its first pair of answer tags.

        Raises:
            ValueError: if `score` raises, or returns other than finite numbers in [0, 1] by the
                names in `score_names`; it names task, example and answer.
        """
        answer = answer_text(text)
        if answer is None:
            return self._unread()
        try:
            scores = self.score(answer, example.truth)
        except Exception as error:  # a user's task may raise anything
            raise ValueError(f"{self._place(example, answer)} raised {type(error).__name__}: {error}") from error
        if scores is None:
            return self._unread()
        if not isinstance(scores, Mapping) or scores.keys() != {*self.score_names}:
            raise ValueError(
                f"{self._place(example, answer)} returned {shorten(scores)}: return a number for each of "
                f"{', '.join(self.score_names)}"
            )
        found = {name: _share(scores[name]) for name in self.score_names}
        for name, value in found.items():
            if math.isnan(value):
                raise ValueError(
                    f"{self._place(example, answer)} returned {name}={shorten(scores[name])}: return a number in [0, 1]"
                )
        return Judgement(answer, self.passes(found[self.main]), found)

    def _unread(self) -> Judgement:
        return Judgement(None, False, dict.fromkeys(self.score_names, 0.0))

    def _place(self, example: Example, answer: str) -> str:
        return f"task {self.name}, example {example.id}: the score of answer {shorten(answer)}"

    def passes(self, score: float) -> bool:
        """Return whether a main score counts as right, rounding aside."""
        return score >= self.threshold - 1e-6

    def right_answer(self, example: Example) -> str:
        """Return what a completion has between its answer tags if it is right."""
        return self.write(example.truth)


def _share(value: Any) -> float:
    """Return a number in [0, 1], rounding aside, as a float; NaN for anything else."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return math.nan
    # text is no number, though `float` reads it
    good = -1e-6 <= number <= 1 + 1e-6 and not isinstance(value, str)
    return min(max(number, 0.0), 1.0) if good else math.nan


def columns(rows: Iterable[Mapping[str, float]]) -> dict[str, list[float]]:
    """Return the values of each name, which a row may lack.

    Example:
        >>> columns([{"mAP": 0.5}, {}, {"mAP": 0.25}])
        {'mAP': [0.5, 0.25]}
    """
    found: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        for name, value in row.items():
            found[name].append(value)
    return dict(found)


def texts_of(answer: Any) -> list[str]:
    """Return a row's `answer`, a text or a list of texts, as a list of stripped texts.

    Raises:
        ValueError: for anything else, an empty list, or a blank text.
    """
    texts = [answer] if isinstance(answer, str) else answer
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"its answer is {shorten(answer)}: write a text, or a list of accepted texts")
    return [text.strip() for text in texts]
