"""A look before the first step: with these rewards and this model, can anything be learnt?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rewards.parsing import ANSWER_CLOSING
from rlmed.controller import teaches
from rlmed.core.types import FinishReason, ScoredGroup


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
    went_on: float
    """Completions that had answered, went on, and were cut by the length limit."""
    without_spread: float
    """Groups that teach nothing: all completions have the same reward, or all are kept out of the loss."""
    distinct: float
    """Mean share of distinct texts in a group."""
    longest: int
    """Tokens of the longest completion."""

    def line(self) -> str:
        """The facts in one line."""
        cut = f"{self.truncated:.0%}" + (f" ({self.went_on:.0%} after their answer)" if self.went_on else "")
        form = "" if self.format_rate is None else f"format {self.format_rate:.0%}, "
        return (
            f"preflight: {self.groups} groups, reward {self.reward_mean:.2f}, {form}cut by length {cut}, "
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
        went_on=float(np.mean([went_on(completion.text, completion.finish_reason) for completion in completions])),
        without_spread=float(np.mean([not teaches(group, mask_truncated=mask_truncated) for group in groups])),
        distinct=float(np.mean([len(set(entry)) / len(entry) for entry in texts])),
        longest=max(len(completion.token_ids) for completion in completions),
    )


def went_on(text: str, finish_reason: FinishReason) -> bool:
    """Whether a completion was cut by the length limit after it had answered: it needed an end, and no more room."""
    return finish_reason == "length" and ANSWER_CLOSING in text


def why_cut(truncated: float, went_on: float, limit: str, end_tokens: Sequence[str]) -> str:
    """The usual cause and the cure where many completions are cut by the length limit.

    Args:
        truncated: share of completions that were cut.
        went_on: share that were cut after their answer.
        limit: key and value of the limit, for example "rollout.max_tokens=512".
        end_tokens: that could have ended them.
    """
    key, ends = limit.partition("=")[0], ", ".join(end_tokens) or "an end token"
    if went_on > truncated / 2:
        return (
            f"{went_on:.0%} of the completions had answered and went on until {limit}: the model does not end them with "
            f"{ends}, and a larger {key} would not help. Let it learn that with python -m rlmed.sft, check that "
            "generation_config.json and the chat template name the end token that it was trained with, or end completions at "
            "their answer: "
            "'rollout.stop=[\"</answer>\"]'"
        )
    never = f"; if none ends by itself then either, the model does not write {ends}" if truncated == 1 else ""
    return f"{truncated:.0%} of the completions were cut at {limit} before they answered: raise {key}{never}"


def check(report: PreflightReport, max_tokens: int, end_tokens: Sequence[str] = ()) -> None:
    """Stop when no group teaches anything.

    Args:
        report: the facts.
        max_tokens: where completions are cut.
        end_tokens: what could end them before.

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
        cause = why_cut(report.truncated, report.went_on, f"rollout.max_tokens={max_tokens}", end_tokens)
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
