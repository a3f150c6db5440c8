"""A graded format reward, for models that do not know the format yet."""

from __future__ import annotations

from rlmed.core.parsing import format_parts
from rlmed.core.types import Completion, Example


def format_parts_reward(example: Example, completion: Completion) -> float:
    """Return the share, in fifths, of the format that a completion has.

    A fifth for each of the four tags, as far as they come in order, each once; the last fifth if
    the completion has the whole format. A base model that writes `<answer>B</answer>` now and then,
    but never all four tags, gets a signal where `format` is 0 for every completion.

    Example:
        >>> import numpy as np
        >>> example = Example("ct-7", None, "Which organ?", ("liver", "spleen"), answer=1)
        >>> texts = ("<think>dark</think><answer>B</answer>", "<answer>B</answer>", "B")
        >>> completions = [Completion(np.arange(2), np.zeros(2, np.float32), text, "stop") for text in texts]
        >>> [format_parts_reward(example, completion) for completion in completions]
        [1.0, 0.4, 0.0]
    """
    return format_parts(completion.text) / 5
