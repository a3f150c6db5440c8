"""The interface of a reward."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rlmed.core.types import Completion, Example, FloatArray, IntArray, Prompt, RolloutGroup

Reward = Callable[[Example, Completion], float]
"""Scores one completion of one example, finitely.

It sees text, tokens and finish reason, never the model.
"""

GroupReward = Callable[[RolloutGroup], FloatArray]
"""Scores the completions of a group together: finite float32 [G], in their order."""

Likelihood = Callable[[Sequence[tuple[Prompt, Sequence[IntArray]]]], list[list[FloatArray]]]
"""Returns the policy's log-probabilities of given completions.

See `rlmed.core.protocols.Learner.logprobs`.
"""

SplitCommonPrefix = Callable[[Sequence[str]], tuple[IntArray, list[IntArray]]]
"""Splits texts into their shared prefix tokens and the rest of each.

See `PromptRenderer.split_common_prefix`.
"""
