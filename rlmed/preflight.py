"""A look before the first step: with these rewards and this model, can anything be learnt?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlmed.controller import teaches
from rlmed.core.types import ScoredGroup


class PreflightError(ValueError):
    """Learning is impossible as configured; the message says why and what to change."""


@dataclass(frozen=True, slots=True)
class PreflightReport:
    """Facts about a few sampled groups; shares are between 0 and 1."""

    groups: int
    completions: int
    reward_mean: float
    format_rate: float | None
    """None when no reward named "format" is in use."""
    truncated: float
    """Completions cut by the length limit."""
    without_spread: float
    """Groups that teach nothing: all completions have the same reward, or all are kept out of the loss."""
    distinct: float
    """Mean share of distinct texts in a group."""
    longest: int
    """Tokens of the longest completion."""

    def line(self) -> str:
        """The facts in one line."""
        form = "" if self.format_rate is None else f"format {self.format_rate:.0%}, "
        return (
            f"preflight: {self.groups} groups, reward {self.reward_mean:.2f}, {form}cut by length {self.truncated:.0%}, "
            f"groups without spread {self.without_spread:.0%}, distinct completions {self.distinct:.0%}"
        )


def inspect(groups: Sequence[ScoredGroup], *, mask_truncated: bool = False) -> PreflightReport:
    """Collect the facts; `mask_truncated` as in `algo.mask_truncated`."""
    completions = [completion for group in groups for completion in group.rollout.completions]
    formats = [group.reward_parts["format"] for group in groups if "format" in group.reward_parts]
    texts = [[completion.text for completion in group.rollout.completions] for group in groups]
    return PreflightReport(
        groups=len(groups),
        completions=len(completions),
        reward_mean=float(np.concatenate([group.rewards for group in groups]).mean()),
        format_rate=float(np.concatenate(formats).mean()) if formats else None,
        truncated=float(np.mean([completion.finish_reason == "length" for completion in completions])),
        without_spread=float(np.mean([not teaches(group, mask_truncated=mask_truncated) for group in groups])),
        distinct=float(np.mean([len(set(entry)) / len(entry) for entry in texts])),
        longest=max(len(completion.token_ids) for completion in completions),
    )


def check(report: PreflightReport, max_tokens: int) -> None:
    """Stop when no group teaches anything.

    Raises:
        PreflightError: with the most likely cause and its cure.
    """
    if report.without_spread < 1:
        return
    if report.distinct <= 1 / max(2, report.completions // report.groups):
        cause = (
            "all completions of a group are the same: raise rollout.temperature, or check that top_k and top_p are off"
        )
    elif report.truncated > 0.5:
        cause = (
            f"{report.truncated:.0%} of the completions were cut at rollout.max_tokens={max_tokens} before they answered: "
            "raise rollout.max_tokens"
        )
    elif report.reward_mean <= 0:
        cause = (
            "no completion earned any reward: the model does not know the format or the task yet, so align it first "
            "with python -m rlmed.sft, or give a reward for partial success (reward.extra)"
        )
    else:
        cause = (
            f"every completion earns the same ({report.reward_mean:.2f}): the questions are too easy or the reward does "
            "not tell good from bad"
        )
    raise PreflightError(
        f"{report.line()}. Nothing can be learnt from groups without spread: {cause}. preflight.enabled=false runs anyway"
    )
