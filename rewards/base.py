"""What a reward is."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rlmed.core.types import Completion, Example, FloatArray, IntArray, Prompt, RolloutGroup

Reward = Callable[[Example, Completion], float]
"""Rewards one completion of one example; must be finite. It sees text, tokens and finish reason, never the model."""

GroupReward = Callable[[RolloutGroup], FloatArray]
"""Rewards the completions of a group together: finite float32 [G], in their order."""

Likelihood = Callable[[Sequence[tuple[Prompt, Sequence[IntArray]]]], list[list[FloatArray]]]
"""How likely the policy finds written completions, see `rlmed.core.protocols.Learner.logprobs`."""

Tokenize = Callable[[str], IntArray]
"""int64 [T] of a text that the policy could have written, without an end token; no text becomes a control token."""
