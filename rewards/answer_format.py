"""Format reward for prompts that ask for no reasoning (Med-R1, arXiv 2503.13939)."""

from __future__ import annotations

from rlmed.core.parsing import has_answer_format
from rlmed.core.types import Completion, Example


def answer_format_reward(example: Example, completion: Completion) -> float:
    """Return 1 if the whole completion is `<answer>…</answer>`, else 0."""
    return float(has_answer_format(completion.text))
