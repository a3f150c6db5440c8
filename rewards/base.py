"""What a reward is."""

from __future__ import annotations

from collections.abc import Callable

from rlmed.core.types import Completion, Example

Reward = Callable[[Example, Completion], float]
"""Rewards one completion of one example; must be finite. It sees text, tokens and finish reason, never the model."""
