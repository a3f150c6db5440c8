"""Records of the reliability of a model, and their two files in the folder of an evaluation.

Shares and probabilities are fractions in [0, 1]. `Accuracy` carries a Wilson interval, `Estimate` a
bootstrap one.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rlmed.core.calibration import Estimate, ReliabilityBin
from rlmed.core.config.building import build_record
from rlmed.core.files.atomic import replace_text
from rlmed.core.files.damage import read_json
from rlmed.evaluation.old_names import current_names
from rlmed.evaluation.records import Accuracy

RELIABILITY_FILE = "reliability.json"
RELIABILITY_ROWS_FILE = "reliability_rows.jsonl"
OLD_FILE = "trust.json"
"""`RELIABILITY_FILE` of rlmed 0.1."""


@dataclass(frozen=True, slots=True)
class OrderAnswer:
    """The greedy answer to a question with its options in one order.

    Example:
        OrderAnswer(options=("knee", "head"), answer="A", predicted_letter="B")
    """

    options: tuple[str, ...]
    answer: str
    """The right letter in this order."""
    predicted_letter: str | None
    """The letter found in the completion."""

    @property
    def correct(self) -> bool:
        """Whether the right option was chosen."""
        return self.predicted_letter == self.answer


@dataclass(frozen=True, slots=True)
class QuestionAnswers:
    """All answers to one question: a line of `reliability_rows.jsonl`.

    Example:
        QuestionAnswers(file="ct", id="ct-7", modality="CT", answer="B", reasoned=(0.2, 0.8),
                    direct=(0.4, 0.6), samples=("B", "A", None, "B"), orders=(OrderAnswer(("liver",
                    "lung"), "B", "B"), …))
    """

    file: str
    id: str
    modality: str
    answer: str
    """The right letter."""
    reasoned: tuple[float, ...] | None
    """Each option's probability after the greedy reasoning; None if that opens no answer tag."""
    direct: tuple[float, ...]
    """Probability of each option without reasoning."""
    samples: tuple[str | None, ...]
    """Letters of the sampled completions."""
    orders: tuple[OrderAnswer, ...]
    """Greedy answers, the file's order first; the only one if an option refers to others."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """Calibration of the most likely option.

    Example:
        An overconfident model, right in 70 of 100: accuracy.value 0.7, confidence.value 0.93,
            error.value 0.23.
    """

    accuracy: Accuracy
    """Accuracy of the most likely option."""
    confidence: Estimate
    """Mean probability of the most likely option."""
    error: Estimate
    """Expected calibration error over `core.calibration.BINS` bins."""
    error_bound: float
    """Error that a calibrated model of these confidences exceeds in 1 of 20 such data sets."""
    brier: Estimate
    bins: tuple[ReliabilityBin, ...]


@dataclass(frozen=True, slots=True)
class PassAtK:
    """Expected share of questions that one of k samples answers right.

    Example:
        PassAtK(k=4, share=Estimate(value=0.81, low=0.77, high=0.85, rows=300))
    """

    k: int
    share: Estimate


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampled completions at temperature 1."""

    samples: int
    """Samples per question."""
    passes: tuple[PassAtK, ...]
    vote: Accuracy
    """Accuracy of the majority letter; ties go to the earliest."""


@dataclass(frozen=True, slots=True)
class LetterBias:
    """One letter over all orders of the options.

    Example:
        LetterBias(letter="A", chosen=Estimate(0.41, …), correct=0.25, accuracy=Estimate(0.83, …))
        prefers A.
    """

    letter: str
    chosen: Estimate
    """Share of answers with this letter, among questions that offer it."""
    correct: float
    """Share of questions whose answer is this letter; equals `chosen` without bias and error."""
    accuracy: Estimate | None
    """Accuracy if the right option has this letter; None if it never does."""


@dataclass(frozen=True, slots=True)
class OrderSensitivity:
    """How answers depend on the order of the options."""

    stays: Accuracy
    """Share of questions with the same option text chosen in every order."""
    orders: tuple[Accuracy, ...]
    """Accuracy in each order, the file's first."""
    letters: tuple[LetterBias, ...]


@dataclass(frozen=True, slots=True)
class Gap:
    """Accuracy on the real picture minus that on a control, over questions asked both ways.

    Example:
        Gap(control=Accuracy.of(27, 100), difference=Estimate(0.43, 0.33, 0.52, 100), p_value=1e-9)
    """

    control: Accuracy
    difference: Estimate
    p_value: float
    """Exact McNemar test."""


@dataclass(frozen=True, slots=True)
class Reliance:
    """How much accuracy on a type of question drops without the picture."""

    question_type: str
    """Empty for all questions of the file."""
    real: Accuracy
    blank: Gap | None
    """None without controls."""
    shuffled: Gap | None


@dataclass(frozen=True, slots=True)
class Agreement:
    """Whether the answer is the option that the reasoning argues for."""

    argued: Accuracy
    """Share of completions whose reasoning argues for one option."""
    agrees: Accuracy | None
    """Share of these that answer it; None if no reasoning argues for an option."""
    correct_if_agreeing: Accuracy | None
    correct_if_differing: Accuracy | None


@dataclass(frozen=True, slots=True)
class Domain:
    """Questions of trained, or of other, modalities."""

    trained: bool
    modalities: tuple[str, ...]
    real: Accuracy
    blank: Accuracy | None
    shuffled: Accuracy | None


@dataclass(frozen=True, slots=True)
class FileReliability:
    """The figures of one file."""

    name: str
    rows: int
    reasoned: Calibration | None
    """After the greedy reasoning, for completions that open an answer tag; None if none does."""
    direct: Calibration
    """Answered without reasoning."""
    sampling: Sampling
    order: OrderSensitivity | None
    """For questions that can be reordered; None if none can."""
    reliance: tuple[Reliance, ...]
    """For all questions, then by type."""
    agreement: Agreement
    kept_order: int = 0
    """Questions that cannot be reordered, since an option refers to others."""


@dataclass(frozen=True, slots=True)
class ReliabilitySummary:
    """The reliability of one model: the content of `reliability.json`."""

    model: str
    seconds: float
    files: tuple[FileReliability, ...]
    domains: tuple[Domain, ...]
    """Trained modalities, then others; empty without training rows that have a modality."""

    @classmethod
    def read(cls, step_folder: Path) -> ReliabilitySummary | None:
        """Load `reliability.json` from the folder of an evaluation; None without it."""
        files = [path for name in (RELIABILITY_FILE, OLD_FILE) if (path := step_folder / name).is_file()]
        return build_record(cls, current_names(read_json(files[0]))) if files else None


def write_reliability(step_folder: Path, summary: ReliabilitySummary, answers: Iterable[QuestionAnswers]) -> None:
    """Write `reliability.json` and `reliability_rows.jsonl` into the folder of an evaluation.

    Raises:
        OSError: if the write fails.
    """
    lines = [json.dumps(dataclasses.asdict(answer), ensure_ascii=False) + "\n" for answer in answers]
    replace_text(step_folder / RELIABILITY_ROWS_FILE, "".join(lines))
    text = json.dumps(dataclasses.asdict(summary), indent=1, ensure_ascii=False, allow_nan=False)
    replace_text(step_folder / RELIABILITY_FILE, text + "\n")
