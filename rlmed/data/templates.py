"""Templates of the user turn: which one an example gets, and the file in which a model has them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from rlmed.core.files.atomic import replace_text
from rlmed.core.prefill import ANSWER, THINK
from rlmed.core.types import BoxFrame, Example
from rlmed.tasks.base import SUFFIX
from rlmed.tasks.choice import INSTRUCTION
from rlmed.tasks.registry import task_of

PROMPT_SUFFIX = SUFFIX.format(instruction=INSTRUCTION)
"""The instruction of MedVLM-R1 (arXiv 2502.19634)."""

QUESTION_SLOT = "{question}"
PAPER_TEMPLATE = f"{QUESTION_SLOT}\n{PROMPT_SUFFIX}"
"""A template is the text of the user turn with one `{question}`, the only placeholder."""
PROMPT_FILE = "rlmed_prompt.json"
"""In a model folder: the prompt settings of its training."""


@dataclass(frozen=True, slots=True)
class Templates:
    """The templates of a run.

    Example:
        >>> templates = Templates("{question} A letter, please.", by_task={"open": "{question} A word, please."})
        >>> templates.of(Example("1", None, "Which organ?", task="open", truth={"answers": ["liver"]}))
        '{question} A word, please.'
    """

    general: str
    """For multiple choice."""
    by_modality: Mapping[str, str] = field(default_factory=dict)
    """For multiple choice about these modalities."""
    by_task: Mapping[str, str] = field(default_factory=dict)
    """For other tasks; those that are not here have their own `template`."""
    box_frame: BoxFrame = "thousandths"
    """Of boxes; templates are given as for thousandths (`rlmed.tasks.base.Task.in_pixels`)."""

    def __post_init__(self) -> None:
        """Raise ValueError for a template without exactly one `{question}`."""
        for text in self.given:
            if text.count(QUESTION_SLOT) != 1:
                raise ValueError(f"template {text!r} must contain {QUESTION_SLOT} exactly once")

    @property
    def given(self) -> tuple[str, ...]:
        """All templates that were given."""
        return (self.general, *self.by_modality.values(), *self.by_task.values())

    def of(self, example: Example) -> str:
        """Return the template of an example."""
        if example.is_choice:
            return self.by_modality.get(example.modality, self.general)
        task = task_of(example)
        template = self.by_task.get(example.task, task.template)
        return task.in_pixels(template) if self.box_frame == "pixels" else template

    def content(self, example: Example) -> str:
        """Return the text of an example's user turn."""
        return self.of(example).replace(QUESTION_SLOT, task_of(example).question_text(example))

    def to_json(self) -> dict[str, Any]:
        """Return what `read_prompt_settings` reads."""
        tasks = {"by_task": dict(self.by_task)} if self.by_task else {}
        # without a mark for thousandths, as in all earlier files
        frame = {"box_frame": self.box_frame} if self.box_frame != "thousandths" else {}
        return {"template": self.general, "by_modality": dict(self.by_modality), **tasks, **frame}


def asks_for_reasoning(template: str) -> bool:
    """Return whether a template asks for reasoning before the answer."""
    return THINK in template or ANSWER not in template


def read_prompt_settings(folder: Path | str) -> dict[str, Any] | None:
    """Read a model's training prompt settings as `PromptRenderer` keywords; None if it has none.

    They are `template`, `by_modality` and, if recorded, `by_task`, `box_frame` (pixels; without it,
    training was in thousandths) and `max_prompt_tokens`, to which large pictures shrink.

    Raises:
        ValueError: if the file is broken.
    """
    path = Path(folder) / PROMPT_FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        template, by_modality = content["template"], dict(content["by_modality"])
        tasks = {"by_task": dict(content["by_task"])} if "by_task" in content else {}
        limit = {key: int(content[key]) for key in ("max_prompt_tokens",) if key in content}
        frame = {"box_frame": content["box_frame"]} if "box_frame" in content else {}
        if not {*frame.values()} <= {*get_args(BoxFrame)}:
            raise ValueError(f"box_frame is {frame['box_frame']!r}")
        for text in (template, *by_modality.values(), *tasks.get("by_task", {}).values()):
            if not isinstance(text, str):
                raise TypeError(f"{text!r} is not a text")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} does not hold a template and by_modality, or a wrong max_prompt_tokens or box_frame ({error}): remove "
            "it to ask as MedVLM-R1 does"
        ) from error
    return {"template": template, "by_modality": by_modality, **tasks, **frame, **limit}


def write_prompt_settings(folder: Path, templates: Templates, max_prompt_tokens: int) -> None:
    """Write a model's training prompt settings."""
    content = {**templates.to_json(), "max_prompt_tokens": max_prompt_tokens}
    replace_text(folder / PROMPT_FILE, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
