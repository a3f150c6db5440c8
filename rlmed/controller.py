"""The loop, the same for every deployment: admit prompts, consume groups as they finish, learn, push weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from learner.advantages import RunningSpread, group_advantages
from rlmed.core.config import AlgoConfig
from rlmed.core.protocols import ClusterError, Learner, RolloutPool
from rlmed.core.tracing import Tracer
from rlmed.core.types import RolloutGroup, RolloutRequest, ScoredGroup, TrainGroup


class RequestStream(Protocol):
    """An endless stream of requests."""

    def request(self, index: int) -> RolloutRequest:
        """The request at `index`: the same whenever it is asked for, until its group was learnt from or discarded."""
        ...


@dataclass(slots=True)
class LoopState:
    """Where the loop is between two steps; saved in every checkpoint."""

    step: int = 0
    """Batches learnt from."""
    cursor: int = 0
    """Index of the next request of the stream."""
    pending: list[int] = field(default_factory=list)
    """Indices admitted and not consumed; they are asked for again after a resume."""
    spread: RunningSpread = field(default_factory=RunningSpread)
    """Of rewards, by modality, where `algo.normalize_by` asks for it."""

    @classmethod
    def restore(cls, saved: Mapping[str, Any]) -> LoopState:
        """From what `dataclasses.asdict` made of it and JSON kept."""
        return cls(**{**saved, "spread": RunningSpread(**saved["spread"])})


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one trip around the loop did."""

    step: int
    groups: tuple[TrainGroup, ...]
    """Learnt from."""
    discarded: tuple[ScoredGroup, ...]
    """Without spread of reward, replaced by other groups."""
    metrics: dict[str, float]


def train(
    pool: RolloutPool,
    learner: Learner,
    stream: RequestStream,
    score: Callable[[RolloutGroup], ScoredGroup],
    *,
    algo: AlgoConfig,
    steps: int,
    state: LoopState,
    tracer: Tracer,
    after_step: Callable[[StepResult], None],
) -> None:
    """Run until `state.step` is `steps`; `after_step` records, evaluates and saves."""
    inbox = _Inbox(pool, algo.max_staleness)
    for index in state.pending:
        inbox.submit(stream.request(index), state.step, learner.policy_version)
    while state.step < steps:
        batch: list[ScoredGroup] = []
        discarded: list[ScoredGroup] = []
        with tracer.span("rollout", step=state.step + 1):
            while len(batch) < algo.groups_per_step:
                # as the oldest groups are consumed first, each admitted now is at most `max_staleness` steps from here
                while (
                    len(inbox) + len(batch) < algo.groups_per_step * min(1 + algo.max_staleness, steps - state.step)
                    and len(discarded) <= algo.max_refills * algo.groups_per_step
                ):
                    inbox.submit(stream.request(state.cursor), state.step, learner.policy_version)
                    state.pending.append(state.cursor)
                    state.cursor += 1
                pool.flush()
                if len(inbox) == 0:  # enough has been replaced: learn from what there is
                    break
                group = inbox.collect(state.step)
                state.pending.remove(group.request.index)
                scored = score(group)
                if algo.dynamic_sampling and not teaches(scored, mask_truncated=algo.mask_truncated):
                    discarded.append(scored)
                else:
                    batch.append(scored)
        metrics = _rollout_metrics(batch, discarded, learner.policy_version)
        groups = to_train_groups(batch, algo, state.spread)
        metrics |= {f"spread/{name or 'none'}": state.spread.of(name) for name in state.spread.moments}
        if groups:
            with tracer.span("learn", step=state.step + 1):
                if algo.max_staleness == 0:
                    pool.rest()
                metrics |= learner.step(groups)
            with tracer.span("push_weights", step=state.step + 1):
                learner.push_weights(pool)
        metrics |= pool.metrics()
        state.step += 1
        metrics["policy_version"] = float(learner.policy_version)
        after_step(StepResult(state.step, tuple(groups), tuple(discarded), metrics))


class _Inbox:
    """Groups admitted and not consumed. They come out by the step of their admission, then in order of completion.

    At most `groups_per_step * (1 + max_staleness)` are in here or in the batch, and each step takes `groups_per_step` of the
    oldest, so none waits longer than `max_staleness` steps, however slow it is. (In order of completion alone, a long group
    could be overtaken for ever.)
    """

    def __init__(self, pool: RolloutPool, max_staleness: int) -> None:
        self._pool, self._max_staleness = pool, max_staleness
        self._admitted: dict[int, tuple[int, int]] = {}  # step and policy version at admission, by index
        self._finished: dict[int, RolloutGroup] = {}  # in order of completion

    def __len__(self) -> int:
        return len(self._admitted)

    def submit(self, request: RolloutRequest, step: int, version: int) -> None:
        self._admitted[request.index] = (step, version)
        self._pool.submit(request)

    def collect(self, step: int) -> RolloutGroup:
        """The next group to consume at `step`.

        Raises:
            ClusterError: for a group that is older than it may be: the engine's weights are not those that were pushed.
        """
        oldest = min(admitted for admitted, _ in self._admitted.values())
        while (index := next((i for i in self._finished if self._admitted[i][0] == oldest), None)) is None:
            group = self._pool.collect()
            self._finished[group.request.index] = group
        admitted, version = self._admitted.pop(index)
        group = self._finished.pop(index)
        if step - admitted > self._max_staleness or group.min_version < version:
            raise ClusterError(
                f"group {index} was admitted at step {admitted} under policy version {version}, sampled by version "
                f"{group.min_version} and would be learnt from at step {step}, with algo.max_staleness={self._max_staleness}: "
                "an engine has older weights than were pushed to it"
            )
        return group


def has_spread(scored: ScoredGroup) -> bool:
    """False when all rewards of a group are equal: every advantage would be zero."""
    return float(np.ptp(scored.rewards)) > 1e-6


def teaches(scored: ScoredGroup, *, mask_truncated: bool) -> bool:
    """Whether the policy's gradient can gain from a group: rewards differ, and not all completions are out of the loss."""
    masked = mask_truncated and all(entry.finish_reason == "length" for entry in scored.rollout.completions)
    return has_spread(scored) and not masked


def to_train_groups(batch: Sequence[ScoredGroup], algo: AlgoConfig, spread: RunningSpread) -> list[TrainGroup]:
    """Add the group-relative advantages; where they are normalized by modality, the batch counts in `spread` first."""
    rewards = [torch.from_numpy(scored.rewards) for scored in batch]
    if algo.normalize_by is None:
        advantages = [group_advantages(values, algo.advantage) for values in rewards]
    else:
        names = [scored.rollout.prompt.example.modality for scored in batch]
        # in the order of the requests: in which order they finished must not matter
        for place in sorted(range(len(batch)), key=lambda place: batch[place].rollout.request.index):
            if has_spread(batch[place]):
                spread.add(names[place], rewards[place])
        advantages = [
            group_advantages(values, algo.advantage, spread=spread.of(name))
            for values, name in zip(rewards, names, strict=True)
        ]
    return [TrainGroup(scored, values.numpy()) for scored, values in zip(batch, advantages, strict=True)]


def _rollout_metrics(batch: list[ScoredGroup], discarded: list[ScoredGroup], version: int) -> dict[str, float]:
    """Means over all completions that were sampled for a step, the discarded ones included."""
    groups = batch + discarded
    completions = [completion for group in groups for completion in group.rollout.completions]
    metrics = {"reward/mean": float(np.concatenate([group.rewards for group in groups]).mean())}
    for name in groups[0].reward_parts:
        metrics[f"reward/{name}"] = float(np.concatenate([group.reward_parts[name] for group in groups]).mean())
    lengths = [len(completion.token_ids) for completion in completions]
    return metrics | {
        "completion/length": float(np.mean(lengths)),
        "completion/truncated": float(np.mean([entry.finish_reason == "length" for entry in completions])),
        "completion/tokens": float(sum(lengths)),
        "groups/learnt": float(len(batch)),
        "groups/no_spread": float(np.mean([not has_spread(group) for group in groups])),
        "staleness": float(max((version - group.rollout.min_version for group in batch), default=0)),
    }
