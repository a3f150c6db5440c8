"""Format reward of MedVLM-R1 (arXiv 2502.19634)."""

from __future__ import annotations

from rlmed.core.parsing import has_format
from rlmed.core.types import Completion, Example


def format_reward(example: Example, completion: Completion) -> float:
    """Return 1 if the whole completion is `<think>…</think><answer>…</answer>`, else 0."""
    return float(has_format(completion.text))
