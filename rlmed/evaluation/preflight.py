"""Check before the first step that the model can learn from these rewards."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from learner.advantages import has_learning_signal
from rewards.rubric import KNOWN
from rlmed.core.prefill import ANSWER_END
from rlmed.core.types import FinishReason, ScoredGroup

log = logging.getLogger(__name__)

OF_FORMAT = ("format", "answer_format", "format_parts")
"""Rewards for tags alone."""
MOST_NAMED = 3
"""Most tasks that a warning names."""
TASK = "task"
"""The reward for a right answer of any task."""
FEWEST = 8
"""Fewest completions of a task of which a warning speaks alone: of these, some should earn it."""


class PreflightError(ValueError):
    """The model cannot learn as configured; the message says why and what to change."""

    def __init__(self, statistics: str, cause: str) -> None:
        """Compose the message.

        Args:
            statistics: of the sampled groups, on one line.
            cause: the most likely one, and what to do.
        """
        super().__init__(f"{statistics}. The run would learn nothing: {cause}. preflight.enabled=false runs anyway")
        self.cause = cause


@dataclass(frozen=True, slots=True)
class PreflightReport:
    """Statistics of a few sampled groups; shares are in [0, 1]."""

    groups: int
    completions: int
    reward_mean: float
    """Over groups that lack no reward; NaN without any."""
    format_rate: float | None
    """None without a reward named "format"."""
    truncated: float
    """Share of completions cut by the length limit."""
    went_on: float
    """Share of completions that continued after their answer until the length limit."""
    without_signal: float
    """Share of groups without learning signal: all rewards equal, or all completions masked."""
    distinct: float
    """Mean share of distinct texts in a group."""
    longest: int
    """Tokens of the longest completion."""
    missing: dict[str, int]
    """Groups that lack a reward which could not be had, by reward."""
    incomplete: float
    """Share of groups that lack any."""
    zero: Mapping[str, int] = field(default_factory=dict)
    """Rewards of positive weight that are 0 for every completion that has them: how many have."""
    tasks: tuple[str, ...] = ()
    """Tasks of the groups, the most frequent first."""
    unearned: Mapping[str, int] = field(default_factory=dict)
    """Tasks whose completions all lack the reward "task", where others have it: how many."""

    def line(self) -> str:
        """Return the statistics on one line."""
        cut = f"{self.truncated:.0%}" + (f" ({self.went_on:.0%} after their answer)" if self.went_on else "")
        form = "" if self.format_rate is None else f"format {self.format_rate:.0%}, "
        return (
            f"preflight: {self.groups} groups, {self._reward()}, {form}cut by length {cut}, "
            f"groups without learning signal {self.without_signal:.0%}, distinct completions {self.distinct:.0%}"
        )

    def zeros(self) -> str:
        """Return which rewards of rlmed are 0 everywhere, and what to do; "" if none is."""
        names = [name for name in self.zero if name in KNOWN]
        if names:
            more = [f"and {len(self.tasks) - MOST_NAMED} more"] * (len(self.tasks) > MOST_NAMED)
            named = f" (tasks {', '.join([*self.tasks[:MOST_NAMED], *more])})" if len(self.tasks) > 1 else ""
            what = f"reward {names[0]} is" if len(names) == 1 else f"rewards {', '.join(names)} are"
            what += f" 0 for all {max(self.zero[name] for name in names)} completions{named}"
        elif self.unearned:
            counts = " and ".join(f"all {count} completions of {task}" for task, count in self.unearned.items())
            what = f"reward {TASK} is 0 for {counts}"
        else:
            return ""
        never = "never writes its tags" if {*names} & {*OF_FORMAT} else "never gives an answer that earns it"
        return (
            f"{what}: the model {never}. Imitate answers first with python -m rlmed.sft, or check the format that prompt and "
            "task ask for"
        )

    def own_zeros(self) -> str:
        """Return which of the user's rewards are 0 everywhere; "" if none is."""
        names = [name for name in self.zero if name not in KNOWN]
        if not names:
            return ""
        what = f"your reward {names[0]} is" if len(names) == 1 else f"your rewards {', '.join(names)} are"
        count = max(self.zero[name] for name in names)
        return f"{what} 0 for all {count} completions: nothing earns it yet, unless it only punishes"

    def _reward(self) -> str:
        lacking = [f"reward {name} missing in {count} of them" for name, count in self.missing.items()]
        return ", ".join([f"reward {self.reward_mean:.2f}"] * (self.incomplete < 1) + lacking)


def inspect(
    groups: Sequence[ScoredGroup], *, mask_truncated: bool = False, weights: Mapping[str, float] | None = None
) -> PreflightReport:
    """Compute the statistics.

    Args:
        groups: sampled and scored.
        mask_truncated: as in `algo.loss.mask_truncated`.
        weights: of the rewards, by name; None counts all as positive.
    """
    completions = [completion for group in groups for completion in group.rollout.completions]
    formats = [group.reward_parts["format"] for group in groups if "format" in group.reward_parts]
    texts = [[completion.text for completion in group.rollout.completions] for group in groups]
    complete = [group.rewards for group in groups if not group.missing]
    positive = [name for name in groups[0].reward_parts if weights is None or weights[name] > 0]
    zero = {name: count for name in positive if (count := _all_zero(name, groups))}
    tasks = Counter(group.rollout.prompt.example.task for group in groups)
    by_task = {task: [group for group in groups if group.rollout.prompt.example.task == task] for task in tasks}
    return PreflightReport(
        groups=len(groups),
        completions=len(completions),
        reward_mean=float(np.concatenate(complete).mean()) if complete else math.nan,
        format_rate=float(np.concatenate(formats).mean()) if formats else None,
        truncated=float(np.mean([completion.finish_reason == "length" for completion in completions])),
        went_on=float(np.mean([went_on(completion.text, completion.finish_reason) for completion in completions])),
        without_signal=float(
            np.mean([not has_learning_signal(group, mask_truncated=mask_truncated) for group in groups])
        ),
        distinct=float(np.mean([len(set(entry)) / len(entry) for entry in texts])),
        longest=max(len(completion.token_ids) for completion in completions),
        missing=dict(Counter(name for group in groups for name in group.missing)),
        incomplete=float(np.mean([bool(group.missing) for group in groups])),
        zero=zero,
        tasks=tuple(name for name, _ in tasks.most_common()),
        unearned={
            task: count
            for task, of_task in by_task.items()
            if TASK in positive and TASK not in zero and (count := _all_zero(TASK, of_task)) >= FEWEST
        },
    )


def _all_zero(name: str, groups: Sequence[ScoredGroup]) -> int:
    """Return how many completions have this reward if it is 0 for all of them; else 0."""
    values = np.concatenate([group.reward_parts[name] for group in groups])
    there = values[~np.isnan(values)]
    return 0 if there.any() else len(there)


def went_on(text: str, finish_reason: FinishReason) -> bool:
    """Return whether length cut a completion after its answer: it lacked an end token, not room."""
    return finish_reason == "length" and ANSWER_END in text


def why_cut(truncated: float, went_on: float, limit: str, end_tokens: Sequence[str]) -> str:
    """Explain why many completions are cut by the length limit, and what to do.

    Args:
        truncated: share of completions cut.
        went_on: share of completions cut after their answer.
        limit: key and value of the limit, for example "rollout.max_tokens=512".
        end_tokens: tokens that could have ended them.
    """
    key, ends = limit.partition("=")[0], ", ".join(end_tokens) or "an end token"
    if went_on > truncated / 2:
        return (
            f"{went_on:.0%} of the completions continued after their answer until {limit}: the model does not end them with "
            f"{ends}, so a larger {key} would not help. Teach it with python -m rlmed.sft, check that "
            "generation_config.json and the chat template name the end token that it was trained with, or stop completions "
            "at their answer: "
            "'rollout.stop=[\"</answer>\"]'"
        )
    never = f"; if that does not help, the model never writes {ends}" if truncated == 1 else ""
    return f"{truncated:.0%} of the completions were cut at {limit} before their answer: raise {key}{never}"


def check(report: PreflightReport, max_tokens: int, end_tokens: Sequence[str] = ()) -> None:
    """Raise PreflightError if no group has a learning signal; warn of rewards that nothing earns.

    Args:
        report: the statistics.
        max_tokens: length limit of completions.
        end_tokens: tokens that could end them earlier.

    Raises:
        PreflightError: with the most likely cause and what to do.
    """
    limit = f"rollout.max_tokens={max_tokens}"
    if report.without_signal < 1:
        cut = report.truncated > 0.5 and report.zeros()
        known = why_cut(report.truncated, report.went_on, limit, end_tokens) if cut else report.zeros()
        for line in filter(None, (known, report.own_zeros())):
            log.warning("preflight: %s", line)
        return
    if report.incomplete >= 0.5:
        names = ", ".join(report.missing)
        cause = (
            f"{names} could not be had in {report.incomplete:.0%} of the groups: see the warnings above, and mend this"
        )
    elif report.distinct <= 1 / max(2, report.completions // report.groups):
        cause = (
            "all completions of a group are identical: raise rollout.temperature, or check that top_k and top_p are off"
        )
    elif report.truncated > 0.5:
        cause = why_cut(report.truncated, report.went_on, limit, end_tokens)
    elif report.reward_mean <= 0:
        cause = (
            "no completion earned any reward: the model does not know the format or the task yet, so first align it "
            "with python -m rlmed.sft, or reward parts of the format (reward=format_parts)"
        )
    else:
        why = report.zeros() or "the questions are too easy, or the reward does not discriminate"
        cause = f"every completion earns the same reward ({report.reward_mean:.2f}): {why}"
    raise PreflightError(report.line(), cause)
