"""The training loop of any deployment: wait for a batch of groups, learn from it, push the weights.

| who | waits for | does not wait for |
| --- | --- | --- |
| this loop | the oldest admitted groups, their rewards; the learner; the push | a slow group of a later step, its rewards |
| a rollout worker | requests; a push | other workers; with `max_staleness` above 0, rewards and the learner |
| the learner | its next batch; the other ranks | a particular worker |
| a push | every ready worker | starting workers: they fetch the weights themselves |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from learner.advantages import AdvantageEstimator, has_reward_variance
from rlmed.core.protocols import Learner, RolloutPool
from rlmed.core.tracing import Tracer
from rlmed.core.types import ScoredGroup, TrainGroup
from rollout.buffer import GroupBuffer


@dataclass(frozen=True, slots=True)
class StepResult:
    """Result of one iteration of the loop."""

    step: int
    groups: tuple[TrainGroup, ...]
    """Groups that the learner trained on."""
    discarded: tuple[ScoredGroup, ...]
    """Groups without reward variance, replaced by others."""
    metrics: dict[str, float]


def train(
    pool: RolloutPool,
    learner: Learner,
    buffer: GroupBuffer,
    advantages: AdvantageEstimator,
    *,
    done: int,
    steps: int,
    tracer: Tracer,
    after_step: Callable[[StepResult], None],
) -> None:
    """Run steps `done` + 1 to `steps`; `after_step` records, evaluates and saves."""
    for step in range(done + 1, steps + 1):
        with tracer.span("rollout", step=step):
            # admits prompts, waits for their groups and scores them
            batch, discarded = buffer.next_batch(step, steps=steps, version=learner.policy_version)
        metrics = _rollout_metrics(batch, discarded, learner.policy_version) | buffer.metrics()
        groups = advantages.estimate(batch)
        metrics |= advantages.metrics()
        if groups:
            with tracer.span("learn", step=step):
                if buffer.on_policy:
                    pool.sleep()
                metrics |= learner.step(groups)
            with tracer.span("push_weights", step=step):
                learner.push_weights(pool)
        metrics |= pool.metrics() | {"policy_version": float(learner.policy_version)}
        after_step(StepResult(step, tuple(groups), tuple(discarded), metrics))


def _rollout_metrics(batch: Sequence[ScoredGroup], discarded: Sequence[ScoredGroup], version: int) -> dict[str, float]:
    """Return means over all completions sampled for a step, including discarded ones."""
    groups = [*batch, *discarded]
    completions = [completion for group in groups for completion in group.rollout.completions]
    # a group that lacks a reward has another scale
    complete = [group.rewards for group in groups if not group.missing]
    metrics = {"reward/mean": float(np.concatenate(complete).mean())} if complete else {}
    for name in groups[0].reward_parts:
        values = np.concatenate([group.reward_parts[name] for group in groups])
        present = values[~np.isnan(values)]  # a slow reward may be missing
        if present.size:
            metrics[f"reward/{name}"] = float(present.mean())
    lengths = [len(completion.token_ids) for completion in completions]
    return metrics | {
        "completion/length": float(np.mean(lengths)),
        "completion/truncated": float(np.mean([entry.finish_reason == "length" for entry in completions])),
        "completion/tokens": float(sum(lengths)),
        "groups/learnt": float(len(batch)),
        "groups/zero_variance": float(np.mean([not has_reward_variance(group) for group in groups])),
        "staleness": float(max((version - group.rollout.min_version for group in batch), default=0)),
    }
