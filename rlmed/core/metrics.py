"""The metrics of a run: what each line of metrics.jsonl holds, and how a value comes from many.

The recorder refuses a name that is missing here, and the documentation prints this table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Reduction = Literal["mean", "max", "sum", "total", "latest"]
"""Over a step and its ranks: mean, max, sum.

total: count since the start of the run. latest: value after the step.
"""


@dataclass(frozen=True, slots=True)
class Metric:
    """Meaning of one metric.

    Example:
        >>> METRICS["kl"].unit
        'nats'
    """

    reduction: Reduction
    unit: str
    """Empty for a ratio or a reward, which have none."""
    meaning: str


METRICS = {
    "policy_version": Metric("latest", "updates", "optimizer steps behind the weights"),
    "reward/mean": Metric(
        "mean", "", "weighted reward, over all completions sampled for the step in groups that lack none"
    ),
    "reward/*": Metric("mean", "", "one part of the reward before weighting, over the same completions"),
    "reward/*_missing": Metric("sum", "completions", "completions without this slow reward (on_failure=missing)"),
    "iou_threshold": Metric("max", "", "overlap from which the step's boxes were paid (reward.iou.kind=threshold)"),
    "reward_std/*": Metric(
        "latest", "", "running standard deviation of rewards within the groups of a modality (algo.normalize_by)"
    ),
    "completion/length": Metric("mean", "tokens", "tokens of a completion"),
    "completion/tokens": Metric("sum", "tokens", "tokens sampled for the step"),
    "completion/truncated": Metric("mean", "share", "completions cut at rollout.max_tokens"),
    "groups/learnt": Metric("sum", "groups", "groups that the learner trained on"),
    "groups/zero_variance": Metric("mean", "share", "groups whose rewards are all equal, among all that were sampled"),
    "staleness": Metric("max", "versions", "policy versions between sampling and training, oldest group of the step"),
    "prompts/set_aside": Metric("latest", "share", "training rows skipped for their pass rate (data.selection)"),
    "prompts/too_easy": Metric("latest", "share", "rows skipped because nearly always answered right"),
    "prompts/too_hard": Metric("latest", "share", "rows skipped because nearly never answered right"),
    "loss": Metric("mean", "", "policy-gradient loss, or -log p per token in supervised fine-tuning"),
    "kl": Metric("mean", "nats", "KL divergence from the frozen reference, per trained token (algo.loss.kl_estimator)"),
    "entropy": Metric("mean", "nats", "entropy of the policy, per trained token"),
    "mismatch_kl": Metric("mean", "nats", "KL divergence between engine and learner, per trained token"),
    "ratio": Metric("mean", "", "importance ratio exp(logprobs - old_logprobs), per trained token"),
    "ratio_max": Metric("max", "", "largest importance ratio"),
    "clip_fraction_low": Metric("mean", "share", "trained tokens clipped from below"),
    "clip_fraction_high": Metric("mean", "share", "trained tokens clipped from above"),
    "clip_fraction_dual": Metric("mean", "share", "trained tokens at the bound of dual clipping (algo.loss.clip=dual)"),
    "grad_norm": Metric("mean", "", "norm of the gradient before clipping"),
    "lr": Metric("latest", "", "learning rate of the step's first update"),
    "skipped_steps": Metric("total", "updates", "updates skipped for a loss or gradient that was not finite"),
    "tokens": Metric("sum", "tokens", "tokens trained on in supervised fine-tuning"),
    "tokens_above_half": Metric(
        "mean", "share", "target tokens with a probability above one half, in supervised fine-tuning"
    ),
    "tokens_per_second": Metric("mean", "tokens/s", "tokens sampled, or trained on in supervised fine-tuning"),
    "seconds/*": Metric("sum", "s", "time of a stage: rollout, learn, push_weights"),
    "seconds/reward": Metric("sum", "s", "of the stage rollout, the time spent on rewards or waiting for them"),
    "seconds/reward_calls": Metric(
        "sum", "s", "time that rewards took since the step before, calls of slow ones at the same time added up"
    ),
    "rollout/workers_ready": Metric("latest", "workers", "rollout workers that can sample"),
    "rollout/idle_share": Metric("mean", "share", "the workers' time without work"),
    "rollout/workers_lost": Metric("total", "workers", "rollout workers replaced"),
    "rollout/groups_sampled_again": Metric("total", "groups", "groups that a lost worker held"),
    "rollout/groups_late": Metric("total", "groups", "late answers of lost workers, dropped"),
    "rollout/push_fetch_s": Metric("max", "s", "time a worker took to fetch the weights"),
    "rollout/push_apply_s": Metric("max", "s", "time a worker took to apply them"),
    "accuracy/*": Metric("mean", "share", "accuracy on a file, at evaluations; in the loggers only"),
}
"""By name; `*` stands for the name of a reward, modality, stage or file."""


def find_metric(name: str) -> Metric:
    """Return the meaning of a metric.

    Raises:
        KeyError: for a name that is not in `METRICS`.

    Example:
        >>> find_metric("seconds/learn").unit
        's'
    """
    family, slash, _ = name.partition("/")
    if family == "reward" and name.endswith("_missing"):
        return METRICS["reward/*_missing"]
    return METRICS[name if name in METRICS or not slash else f"{family}/*"]
