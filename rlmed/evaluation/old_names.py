"""Field names of rlmed 0.1 in the files of evaluations, translated once, when they are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RENAMED = {
    "kind": "question_type",
    "by_kind": "by_question_type",
    "parsed": "predicted_letter",
    "right": "correct",
    "right_before": "correct_before",
    "right_after": "correct_after",
    "right_if_agreeing": "correct_if_agreeing",
    "right_if_differing": "correct_if_differing",
}
NAMED_BY_DATA = ("by_question_type", "files")
"""Fields that hold a mapping by question type or file: its keys are the data's own, whatever."""


def current_names(content: Any, *, ours: bool = True) -> Any:
    """Return JSON content with present field names; `ours=False` keeps the outermost mapping keys.

    Example:
        >>> current_names({"id": "ct-7", "parsed": "B", "right": True})
        {'id': 'ct-7', 'predicted_letter': 'B', 'correct': True}
    """
    if isinstance(content, list):
        return [current_names(entry) for entry in content]
    if not isinstance(content, Mapping):
        return content
    renamed = {RENAMED.get(key, key) if ours else key: value for key, value in content.items()}
    return {key: current_names(value, ours=not ours or key not in NAMED_BY_DATA) for key, value in renamed.items()}
