"""What a model card says of the model's tasks: what is asked, and the scores besides accuracy."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from rlmed.core.config.rewarding import RADEVAL_METRICS
from rlmed.core.types import Example
from rlmed.data.prompts import PromptRenderer
from rlmed.evaluation.records import p_value_text
from rlmed.evaluation.results import EvalSummary
from rlmed.evaluation.scores import Estimate, TaskSummary
from rlmed.export.template import CHOICE
from rlmed.tasks.grounding import Grounding
from rlmed.tasks.registry import task_named, task_of

SHOWN = Example("shown", None, "Which body part is shown?", ("head", "chest", "abdomen", "knee"), answer=0)
"""The question of the examples, of multiple choice."""
LABELS = ("effusion", "fracture", "nodule")
QUESTIONS = {
    "grounding": "Where is the nodule?",
    "labels": "Which findings are shown?",
    "report": "What does the image show?",
}
OTHER_QUESTION = "What is shown?"
"""The question of the examples, of any other task."""
GIVE = {
    CHOICE: "Give the question, then one line for each option with its letter.",
    "labels": "Give the question, then the possible labels in one line, with commas between them.",
}
SIZE = (1000, 1000)
"""Pixels of the image that an example asks about."""
MEANINGS = {
    ("open", "exact"): "equal to an accepted answer after normalisation, or the same quantity within 5 %",
    ("open", "f1"): "F1 of the answer's words and those of the accepted answer most like it",
    ("open", "recall"): "share of that accepted answer's words",
    (
        "grounding",
        "iou",
    ): "overlap with the right boxes, intersection over union, in the best matching, where missing and "
    "superfluous ones count 0",
    ("grounding", "mAP"): "COCO's mean average precision over the file",
    ("grounding", "AP50"): "the same at an overlap of 0.5",
    ("grounding", "recall50"): "share of right boxes found at an overlap of 0.5",
    ("labels", "f1"): "F1 of the set of labels",
    ("labels", "exact"): "all right labels and no other",
    ("labels", "micro_f1"): "F1 over all labels of the file",
    ("labels", "macro_f1"): "mean of the F1 of each label",
    ("report", "rouge_l"): "F1 of the longest sequence of words shared with the best reference",
    ("report", "bleu"): "BLEU with the best reference",
    ("report", "f1"): "F1 of its words and those of the best reference",
    ("report", "corpus_bleu"): "BLEU over the file",
    **{(task, "embedding"): "cosine with the nearest reference by a text encoder" for task in ("open", "report")},
    **{("report", name): "score of the package radeval, best reference" for name in RADEVAL_METRICS},
}
"""What a score of a task is; a score that is not here has its name alone."""
CAVEATS = {"report": "Overlap of words says how alike two reports sound, not whether their findings agree."}
NONE = "–"


def shown_example(name: str) -> Example:
    """Return the card's question of a task.

    Raises:
        ValueError: for a task that does not read its own placeholder.
    """
    if name == CHOICE:
        return SHOWN
    task, options = task_named(name), LABELS if name == "labels" else ()
    try:
        truth = task.read(task.placeholder, options, lambda: SIZE)
    except ValueError as error:
        raise ValueError(
            f"the task {name} does not read its placeholder {task.placeholder!r} ({error}): set its `placeholder` to an "
            "answer that it reads, which rlmed.ask needs, too"
        ) from error
    return Example("shown", None, QUESTIONS.get(name, OTHER_QUESTION), task=name, truth=truth)


def described(tasks: Sequence[str]) -> str:
    """Return what a model is for."""
    if tasks == (CHOICE,):
        return "answers multiple-choice questions"
    names = [f"`{name}`" if name != CHOICE else "`choice` (multiple choice)" for name in tasks]
    listed = " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
    return f"answers questions of the task{'s' if len(names) > 1 else ''} {listed}"


def asked(renderer: PromptRenderer, tasks: Sequence[str]) -> list[dict[str, str]]:
    """Return each task's example: the user's turn, and the arguments of `rlmed.ask`."""
    found = []
    for name in tasks:
        example = shown_example(name)
        options = SHOWN.options if name == CHOICE else LABELS if name == "labels" else ()
        flags = [*(() if name == CHOICE else ("--task", name)), *(("--options", *options) if options else ())]
        found.append(
            {
                "name": name,
                "turn": renderer.templates.content(example),
                "bare": task_of(example).question_text(example),
                "question": shlex.quote(example.question),
                "flags": shlex.join(flags),
            }
        )
    return found


def box_units(renderer: PromptRenderer, tasks: Sequence[str]) -> str:
    """Return a sentence on boxes in pixels, which are not those of the image file; else ""."""
    if renderer.templates.box_frame != "pixels" or Grounding.name not in tasks:
        return ""
    return " Boxes in answers are in pixels of the image as the image processor resizes it, not of the file."


def prior_meaning(tasks: Sequence[str]) -> str:
    """Return what the prior in the table of accuracy is."""
    options, constant = "what the option texts alone give away", "what the best constant answer gets right"
    if tasks == (CHOICE,):
        return options
    return f"{options} (of other tasks, {constant})" if CHOICE in tasks else constant


def chance_meaning(tasks: Sequence[str]) -> str:
    """Return what chance in the table of accuracy is; "" for multiple choice, where it is known."""
    if tasks == (CHOICE,):
        return ""
    others = "another row's right answer"
    return f"one of the options at random (of other tasks, {others})" if CHOICE in tasks else others


def right_from(tasks: Sequence[str]) -> str:
    """Return from which main score on, in per cent, an answer counts as right."""
    others = [task_named(name) for name in tasks if name != CHOICE]
    return "; ".join(f"{task.name} {task.main} {100 * task.threshold:g}" for task in others)


def score_meanings(lines: Sequence[Mapping[str, str]]) -> list[tuple[str, str]]:
    """Return what the scores of a table are, by task in its order."""
    named = dict.fromkeys((line["task"], line["score"]) for line in lines)
    tasks = dict.fromkeys(task for task, _ in named)
    meanings = {
        task: "; ".join(
            f"{score}: {MEANINGS[of, score]}" for of, score in named if of == task and (of, score) in MEANINGS
        )
        for task in tasks
    }
    return [(task, f"{text}. {CAVEATS.get(task, '')}".rstrip()) for task, text in meanings.items() if text]


def score_lines(
    summaries: Sequence[EvalSummary], after: EvalSummary, comparison: Mapping[str, Any] | None
) -> list[dict[str, str]]:
    """Return the table of scores, a line for each; controls and baselines are those of `after`."""
    first = summaries[0].files if len(summaries) > 1 else ()
    earlier = {(file.name, task.name): task for file in first for task in file.tasks}
    tests = comparison["files"] if comparison is not None else {}
    lines = []
    for file in after.files:
        for task in file.tasks:
            test = tests.get(file.name, {}).get("scores", {}).get(task.name)
            before = _figures(earlier.get((file.name, task.name)))
            prior = (task.own_prior if task.prior is None else task.prior) or {}
            for name, value in _figures(task).items():
                lines.append(
                    {
                        "file": file.name,
                        "task": task.name,
                        "rows": str(task.rows),
                        "score": name,
                        "before": _measured(before.get(name)),
                        "value": f"**{_measured(value)}**" if name == task.main else _measured(value),
                        "p": p_value_text(test["p_value"]) if test and name == task.main else NONE,
                        **{
                            control: _measured(task.controls.get(control, {}).get(name))
                            for control in ("blank", "shuffled", "blank_one", "image_order")
                        },
                        "chance": _percent((task.chance or {}).get(name)),
                        "prior": _percent(prior.get(name)) + (" own" if task.prior is None and name in prior else ""),
                    }
                )
    return lines


def _figures(task: TaskSummary | None) -> Mapping[str, Estimate]:
    return {} if task is None else {**task.scores, **task.over_file}


def _measured(estimate: Estimate | None) -> str:
    if estimate is None:
        return NONE
    return f"{_percent(estimate.value)} ({100 * estimate.low:.0f}–{100 * estimate.high:.0f})"


def _percent(share: float | None) -> str:
    return NONE if share is None else f"{100 * share:.1f}"
