"""Make options for questions published with only an answer.

Yes and no become the two options. Any other answer gets distractors: answers to other questions of
its kind, drawn in proportion to how often they are correct there. So frequency does not give the
answer away, as it would with distractors that are never correct. Answers that contain each other
(`left lung`, `lung`) are never distractors of one another. A drawn text may still be true of the
picture: such questions are harder to judge than those with human-written options.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Hashable

import numpy as np

from rlmed.core.types import LETTERS
from rlmed.data.examples import BadRowError, shorten
from rlmed.data.options.order import refers_to_others
from rlmed.data.readers.base import Option

YES_NO = ("yes", "no")
DISTRACTORS = 3

WITHOUT_OPTIONS = "skip|keep|all"
"""Values of --open that make no options."""

OPEN = Option(
    "--open",
    {
        "choices": ("distractors", "keep", "all", "skip"),
        "help": "questions whose answer is not yes or no get other answers of their kind as options (default), are kept as "
        "open questions, or are left out; all keeps those of yes and no as open questions, too",
    },
)
SEED = Option(
    "--seed",
    {"type": int, "help": "of the distractors and the order of options (default: 0)"},
    beside=f"--open {WITHOUT_OPTIONS}",
)
DISTRACTOR_COUNT = Option(
    "--distractors",
    {"type": int, "metavar": "N", "help": f"wrong options of such a question (default: {DISTRACTORS})"},
    beside=f"--open {WITHOUT_OPTIONS}",
)
LEFT_OUT = "its answer is not yes or no, and --open skip was given"


class AnswerPool:
    """Pools the answers of all questions by kind, and draws options from them.

    Example:
        >>> pool = AnswerPool(seed=0, distractors=1)
        >>> for answer in ("CT", "MRI", "CT"):
        ...     pool.add("modality", answer)
        >>> sorted(pool.options("q1", "modality", "MRI"))
        ['CT', 'MRI']
    """

    def __init__(self, seed: int, distractors: int) -> None:
        """Create an empty pool.

        Raises:
            ValueError: for a number of distractors that makes too few or too many options, or a
                negative seed.
        """
        if not 1 <= distractors < len(LETTERS):
            raise ValueError(f"--distractors {distractors} must be 1 to {len(LETTERS) - 1}")
        if seed < 0:
            raise ValueError(f"--seed {seed} must not be negative")
        self._seed, self._distractors = seed, distractors
        self._counts: dict[Hashable, Counter[str]] = defaultdict(Counter)
        self._texts: dict[str, str] = {}
        """First spelling of each answer, by its lower-case text."""

    def add(self, kind: Hashable, answer: str) -> None:
        """Count an answer; yes and no are never distractors."""
        key = answer.casefold()
        if key and key not in YES_NO and not _needs_options(answer):
            self._counts[kind][key] += 1
            self._texts.setdefault(key, answer)

    def options(self, row_id: str, kind: Hashable, answer: str) -> tuple[str, ...]:
        """Return the options of a question, `answer` included, in an order drawn from (seed, id).

        Raises:
            BadRowError: if its kind has no other answer, or the answer refers to options.
        """
        _check_answer(answer)
        if answer.casefold() in YES_NO:
            return YES_NO
        key = answer.casefold()
        others = {
            other: count for other, count in sorted(self._counts[kind].items()) if other not in key and key not in other
        }
        if not others:
            raise BadRowError(
                f"no other question of its kind ({kind}) has another answer, so there is nothing to choose"
            )
        digest = hashlib.sha256(row_id.encode("utf-8", "replace")).digest()
        rng = np.random.default_rng([self._seed, int.from_bytes(digest[:8], "little")])
        shares = np.array(list(others.values()), dtype=np.float64)
        drawn = rng.choice(
            list(others), size=min(self._distractors, len(others)), replace=False, p=shares / shares.sum()
        )
        texts = [answer, *(self._texts[str(other)] for other in drawn)]
        return tuple(texts[index] for index in rng.permutation(len(texts)))


def open_answer(answer: str, open: str) -> bool:
    """Return whether the question of an answer stays an open one, as --open says.

    Raises:
        BadRowError: if it should, but there is no answer, or the answer refers to options.
    """
    if open == "all" or (open == "keep" and answer.casefold() not in YES_NO):
        _check_answer(answer)
        return True
    return False


def _check_answer(answer: str) -> None:
    if not answer:
        raise BadRowError("it has no answer")
    if _needs_options(answer):
        raise BadRowError(f"its answer {shorten(answer)} refers to options, and it has none")


def _needs_options(answer: str) -> bool:
    """Return whether an answer refers to options, as `all of the above` does.

    But `both` or `none` may describe the picture.
    """
    return refers_to_others(answer) and len(answer.split()) > 1


def plain_answer(text: str) -> str:
    """Normalize an answer to single blanks; yes and no to lower case without a full stop."""
    word = text.strip(" .\t\r\n").lower()
    return word if word in YES_NO else " ".join(text.split())
