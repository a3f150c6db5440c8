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

PartingIds = Callable[[Sequence[str]], tuple[IntArray, list[IntArray]]]
"""Texts as the tokens that all begin with and those that follow, see `rlmed.data.prompts.PromptRenderer.parting_ids`."""
