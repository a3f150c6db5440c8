"""Judge completions by their task, and show answers beside what is right.

What is shown follows from the form of a task's truth, so a user's task whose truth has the form of
one of ours is shown like it: `boxes` and `frame`, `labels` and `known`, `answers` or `references`.
Run folders come from anywhere: a truth of another form is left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlmed.core.parsing import answer_text, evaluated_letter, reasoning_text
from rlmed.core.process.display import one_line
from rlmed.core.types import LETTERS, Example
from rlmed.report.differences import differences
from rlmed.tasks.metrics.boxes import parse_boxes
from rlmed.tasks.metrics.coco import MOST_BOXES
from rlmed.tasks.registry import LABELS, task_named

CHARACTERS = 3000
"""Longest text of a completion in the report, in characters; the recorded one is not cut."""
CHOICE = "choice"
_LARGEST = 1e9
"""Larger numbers, and those that are not finite, are no coordinates."""

Judge = Callable[[str], "Judged"]


@dataclass(frozen=True, slots=True)
class Judged:
    """How a completion was judged by a task other than multiple choice.

    Example:
        >>> Judged(answer="left lung", correct=False, scores={"exact": 0.0}).doubt
        ''
    """

    answer: str | None
    """None if there is none that can be read."""
    correct: bool | None
    """None if it could not be judged."""
    scores: Mapping[str, float] = field(default_factory=dict)
    doubt: str = ""
    """Why it could not be judged."""


def judge_of(group: Mapping[str, Any]) -> Judge:
    """Return what judges a recorded group's completions; its task is not multiple choice."""

    example = Example(group["example_id"], None, group["question"], task=str(group["task"]), truth=group.get("truth"))

    def judge(text: str) -> Judged:
        try:
            judgement = task_named(example.task).judge(example, text)
        except Exception as error:  # a user's task, unknown here or changed since, or a metric not installed
            return Judged(answer_text(text), None, doubt=one_line(error) or type(error).__name__)
        return Judged(judgement.answer, judgement.correct, judgement.scores)

    return judge


def take_apart(text: str, answer: str) -> dict[str, Any]:
    """Split a completion of multiple choice; compare its letter with the right one.

    Returns:
        What `split` returns, "letter" (or None), "correct", and "judged": None.
    """
    letter = evaluated_letter(text)
    return {"letter": letter, "correct": letter == answer, "judged": None, **split(text)}


def show_judged(text: str, judged: Judged, truth: Any) -> dict[str, Any]:
    """Return a completion of another task as `take_apart` does; "judged" is what to show."""
    answer = judged.answer
    shown: dict[str, Any] = {
        "scores": judged.scores,
        "doubt": judged.doubt,
        "found": None if answer is None else answer[:CHARACTERS],
        "parts": None,
        "labels": None,
        "boxes": None,
    }
    if answer is not None:
        if texts := _texts(truth):
            # another spelling or unit of an accepted answer differs in nothing that counts
            alike = judged.correct and "answers" in truth
            shown["parts"] = None if alike else differences(answer[:CHARACTERS], texts)
        elif labels := _labels(truth):
            shown["labels"] = _compare_labels(answer, {"labels": labels[0], "known": labels[1]})
        elif (frame := _frame(truth)) is not None:
            shown["boxes"] = rectangles(parse_boxes(answer, frame) or ())
    return {"letter": None, "correct": judged.correct, "judged": shown, **split(text)}


def split(text: str) -> dict[str, Any]:
    """Split a well-formatted completion into reasoning and answer; keep any other text whole.

    Returns:
        "reasoning" and "answer" (None if not in the format), "raw" (None if it is), and "cut": the
        number of characters left out.
    """
    reasoning = reasoning_text(text)
    if reasoning is None:
        return {"reasoning": None, "answer": None, "raw": text[:CHARACTERS], "cut": len(text[CHARACTERS:])}
    return {
        "reasoning": reasoning[:CHARACTERS],
        "answer": (answer_text(text) or "")[:CHARACTERS],
        "raw": None,
        "cut": len(reasoning[CHARACTERS:]),
    }


def show_question(task: str, options: Sequence[str], answer: str, truth: Any) -> dict[str, Any]:
    """Return what the template shows of what is right, beside the question.

    Args:
        task: name of the task.
        options: of multiple choice; empty for other tasks.
        answer: the right letter, or the right answer as a completion would have it.
        truth: of other tasks, see `rlmed.core.types.Example.truth`.

    Returns:
        "task"; "options": all options or possible labels, the right ones marked; "right": texts, or
        None where the options say it; "boxes": true boxes as `rectangles`; "marks": what the key
        explains, "boxes", "words" or None.
    """
    if task == CHOICE:
        listed = [
            {"letter": letter, "text": text, "correct": letter == answer}
            for letter, text in zip(LETTERS, options, strict=False)
        ]
        return {"task": task, "options": listed, "right": None, "boxes": (), "marks": None}
    right: dict[str, Any] = {"right": [answer[:CHARACTERS]], "boxes": (), "marks": None}
    listed = []
    if texts := _texts(truth):
        right |= {"right": [text[:CHARACTERS] for text in texts], "marks": "words"}
    elif (labels := _labels(truth)) and labels[1]:
        names = {label.casefold() for label in labels[0]}
        listed = [{"letter": None, "text": label, "correct": label.casefold() in names} for label in labels[1]]
        right["right"] = None if names else right["right"]
    elif _frame(truth) is not None:
        right |= {"boxes": rectangles(truth["boxes"]), "marks": "boxes"}
        right["right"] = right["right"] if truth["boxes"] else ["[], nothing to find"]
    return {"task": task, "options": listed, **right}


def rectangles(boxes: Sequence[Sequence[float]]) -> list[dict[str, str]]:
    """Return up to `MOST_BOXES` boxes, fractions of a picture, as SVG attributes in per cent.

    Example:
        >>> rectangles([(0.1, 0.2, 0.5, 1.0)])
        [{'x': '10.00%', 'y': '20.00%', 'width': '40.00%', 'height': '80.00%'}]
    """
    return [
        {
            name: f"{100 * value:.2f}%"
            for name, value in zip(("x", "y", "width", "height"), (x0, y0, x1 - x0, y1 - y0), strict=True)
        }
        for x0, y0, x1, y1 in boxes[:MOST_BOXES]
    ]


def show_notes(completion: Mapping[str, Any]) -> dict[str, str]:
    """Return what rewards, such as a judge, wrote about a recorded completion, by reward."""
    notes = completion.get("notes")
    if not isinstance(notes, Mapping):
        return {}
    texts = {
        name: note if isinstance(note, str) else json.dumps(note, ensure_ascii=False) for name, note in notes.items()
    }
    return {name: text[:CHARACTERS] for name, text in texts.items() if text.strip()}


def _texts(truth: Any) -> list[str] | None:
    """Return the accepted texts of a truth that has some."""
    if not isinstance(truth, Mapping):
        return None
    for key in ("answers", "references"):
        if _are_texts(truth.get(key)) and truth[key]:
            return list(truth[key])
    return None


def _labels(truth: Any) -> tuple[list[str], list[str]] | None:
    """Return right and possible labels of a truth that has them."""
    if not isinstance(truth, Mapping) or not all(_are_texts(truth.get(key)) for key in ("labels", "known")):
        return None
    return list(truth["labels"]), list(truth["known"])


def _compare_labels(answer: str, right: Mapping[str, Sequence[str]]) -> list[dict[str, str]]:
    """Return labels with what they are by the task: right, missing or superfluous."""
    named, truth = LABELS.sets(answer, right)
    return [
        {"kind": kind, "text": label[:CHARACTERS]}
        for kind, labels in (
            ("right", [label for label in named if label in truth]),
            ("missing", [label for label in truth if label not in named]),
            ("superfluous", [label for label in named if label not in truth]),
        )
        for label in labels
    ]


def _frame(truth: Any) -> Sequence[float] | None:
    """Return the frame of a truth of boxes in which every number is one."""
    if not isinstance(truth, Mapping) or not _are_numbers(truth.get("frame"), 2) or min(truth["frame"]) <= 0:
        return None
    boxes = truth.get("boxes")
    whole = isinstance(boxes, list | tuple) and all(_are_numbers(box, 4) for box in boxes)
    frame: Sequence[float] = truth["frame"]
    return frame if whole else None


def _are_texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(text, str) for text in value)


def _are_numbers(value: Any, count: int) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == count
        and all(type(number) in (int, float) and abs(number) < _LARGEST for number in value)
    )
