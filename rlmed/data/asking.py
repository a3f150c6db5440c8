"""Make the example of a question that a person asks, and say its answer in words."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from rlmed.core.parsing import answer_text, evaluated_letter
from rlmed.core.types import LETTERS, Example
from rlmed.data.images import image_size
from rlmed.data.options.choices import plain_options
from rlmed.data.rows import BadRowError
from rlmed.tasks.registry import task_named, task_of

CHOICE = "choice"
_NO_IMAGE = "the task {task} needs an image: {advice}"


def asked_example(
    images: Sequence[Path],
    question: str,
    options: Sequence[str] = (),
    *,
    task: str = CHOICE,
    modality: str = "",
    flag: str = "",
    advice: str = "choose one",
) -> Example:
    """Return the example of a question whose answer nobody knows.

    Args:
        images: files of pictures, in the order in which the model is to see them.
        question: its text.
        options: of multiple choice, 2 to 10; of labels, all possible.
        task: name of its task.
        modality: for models with a prompt for each.
        flag: what errors put before the name of a setting, as "--" on a command line.
        advice: what to do about a missing image.

    Raises:
        ValueError: for an unknown task, options that it does not take, or a missing image.
    """
    fields = _fields(images, options, task, flag, advice)
    first = images[0] if images else None
    return Example("question", first, question, modality=modality, more_images=tuple(images[1:]), **fields)


def check_pictured(example: Example, advice: str = "choose one") -> None:
    """Raise ValueError for an example without the image that its task needs."""
    if not example.images and task_of(example).needs_image:
        raise ValueError(_NO_IMAGE.format(task=example.task, advice=advice))


def check_modality(modality: str, prompts: Collection[str], *, model: str, flag: str = "") -> str:
    """Return a warning about a modality without its own prompt; "" if it has one.

    Args:
        modality: as asked; "" for none.
        prompts: modalities that the model has prompts for.
        model: its name, for messages.
        flag: as in `asked_example`.

    Raises:
        ValueError: if no modality has one.
    """
    given = f"{flag}modality {modality}"
    if not modality or modality in prompts:
        return ""
    if not prompts:
        raise ValueError(f"{given} has no effect: model {model} has one prompt for all modalities; leave it out")
    return f"{given} has no prompt of its own (available: {', '.join(prompts)}); using the general one"


def _fields(images: Sequence[Path], options: Sequence[str], name: str, flag: str, advice: str) -> dict[str, Any]:
    """Return the fields of an example that its task needs."""
    if name == CHOICE:
        return {"options": asked_options(options, flag), "answer": 0}
    task = task_named(name, f"{flag}task")

    try:
        truth = task.read(task.placeholder, options, lambda: _size(images, name, advice))
        return {"task": task.name, "truth": truth}
    except ValueError as error:
        raise ValueError(f"{flag}task {name}: {error}") from error


def _size(images: Sequence[Path], task: str, advice: str = "choose one") -> tuple[int, int]:
    """Return width and height of the first image; raise ValueError without one."""
    if not images:
        raise ValueError(_NO_IMAGE.format(task=task, advice=advice))
    return image_size(images[0])


def asked_options(texts: Sequence[str], flag: str = "") -> tuple[str, ...]:
    """Strip the options' own letters and return them in letter order.

    Raises:
        ValueError: unless there are 2 to 10 options, none blank or repeated.
    """
    try:
        if not all(text.strip() for text in texts):
            raise BadRowError("one is blank")
        return plain_options(texts)
    except BadRowError as error:
        shown = ", ".join(texts)
        parts = shown.split(",") if flag and len(texts) == 1 else []
        meant = (
            f"; separate them by spaces: {flag}options {shlex.join(map(str.strip, parts))}" if len(parts) > 1 else ""
        )
        raise ValueError(
            f"{flag}options needs 2 to {len(LETTERS)} different texts, got {len(texts)}: {shown} ({error}){meant}"
        ) from error


def answer_in_words(example: Example, completion: str) -> str:
    """Return the answer of a completion in words."""
    if not example.is_choice:
        answer = answer_text(completion)
        if answer and not task_of(example).reads(answer, example.truth):
            return f"(unreadable for the task {example.task}: {answer!r})"
        return answer or f"(none; the model wrote: {completion!r})"
    letter = evaluated_letter(completion)
    if letter is None or letter not in LETTERS[: len(example.options)]:
        return f"(no option; the model wrote: {completion!r})"
    return f"{letter}) {example.options[LETTERS.index(letter)]}"


def answer_explained(example: Example, completion: str) -> str:
    """Return what the task says of the answer, such as the units of boxes; mostly ""."""
    answer = answer_text(completion)
    if example.is_choice or not answer or not task_of(example).reads(answer, example.truth):
        return ""
    return task_of(example).explain(answer, example.truth, lambda: _size(example.images, example.task))
