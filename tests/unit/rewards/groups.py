"""Groups of completions by their texts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlmed.core.types import Completion, Example, Prompt, RolloutGroup, RolloutRequest, SamplingParams

EXAMPLE = Example(id="mri-7", image=None, question="Which?", options=("head", "chest"), answer=1)


def group_of(texts: Sequence[str], index: int = 0, example: Example = EXAMPLE) -> RolloutGroup:
    """`group_of(["a", "b"])`: a group of two completions, of one token each."""
    prompt = Prompt(example, "text", np.zeros(3, dtype=np.int64))
    completions = tuple(Completion(np.zeros(1, np.int64), np.zeros(1, np.float32), text, "stop") for text in texts)
    return RolloutGroup(RolloutRequest(index, prompt, len(texts), SamplingParams()), completions)
