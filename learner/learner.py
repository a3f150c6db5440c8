"""One optimizer step on groups: pack, reference, old log-probabilities, loss by micro-batches, clip, AdamW."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from learner.losses import LossDenominators, PolicyLossConfig, count_denominators, policy_loss
from learner.metrics import LossMetrics, mean_metric, merge_metrics
from learner.optimizer import Optimizer
from learner.packing import (
    PackedBatch,
    PackItem,
    TrainSequence,
    frozen_logprobs,
    pack,
    packed_logprobs,
    split_by_tokens,
)
from rlmed.core.config import AlgoConfig, LearnerConfig
from rlmed.core.protocols import RolloutPool
from rlmed.core.types import TrainGroup
from rlmed.models.policy import Policy

OPTIMIZER_FILE = "optimizer.pt"
SKIPPED = "skipped_steps"


def loss_config(algo: AlgoConfig) -> PolicyLossConfig:
    """The keys of `algo` that belong to the loss.

    Raises:
        ValueError: for an impossible value, naming the key.
    """
    try:
        return PolicyLossConfig(
            **{entry.name: getattr(algo, entry.name) for entry in dataclasses.fields(PolicyLossConfig)}
        )
    except ValueError as error:
        raise ValueError(f"algo.{error}") from error


@dataclass(slots=True)
class _MicroBatch:
    """A packed micro-batch with what is fixed over the updates of a step."""

    batch: PackedBatch
    ref_logprobs: Tensor | None = None
    old_logprobs: Tensor | None = None
    """None: the first update's own log-probabilities, which are the same numbers without another forward pass."""


class PolicyLearner:
    """Improves a policy from groups of completions; see `rlmed.core.protocols.Learner`.

    Example:
        >>> learner = PolicyLearner(policy, reference, AlgoConfig(), LearnerConfig(), total_steps=300,
        ...                         max_tokens=512, temperature=1.0)                        # doctest: +SKIP
        >>> learner.step(groups)["grad_norm"]                                               # doctest: +SKIP
        0.84
    """

    def __init__(
        self,
        policy: Policy,
        reference: Policy | None,
        algo: AlgoConfig,
        config: LearnerConfig,
        *,
        total_steps: int,
        max_tokens: int,
        temperature: float,
        on_bad_step: Callable[[Sequence[TrainGroup], str], None] | None = None,
    ) -> None:
        """Prepare training.

        Args:
            policy: trained in place.
            reference: the frozen policy of the KL term; None where `kl_coef` is 0.
            algo: advantage and loss settings.
            config: optimizer and memory settings.
            total_steps: batches until the learning-rate schedule ends.
            max_tokens: limit on a completion's tokens, the constant of Dr. GRPO's aggregation.
            temperature: of the sampling distribution, whose log-probabilities are learnt from.
            on_bad_step: told of each batch that was skipped because loss or gradient was not finite.
        """
        if (reference is None) != (algo.kl_coef == 0):
            raise ValueError(f"kl_coef={algo.kl_coef} and {'no' if reference is None else 'a'} reference policy")
        self.policy, self.reference = policy, reference
        self._algo, self._loss, self._config = algo, loss_config(algo), config
        self._max_tokens, self._temperature = max_tokens, temperature
        self._on_bad_step = on_bad_step
        policy.freeze(config.freeze)
        if config.gradient_checkpointing:
            policy.model.gradient_checkpointing_enable({"use_reentrant": False})
        updates = total_steps * config.epochs * config.mini_batches
        self.optimizer = Optimizer(policy.model.named_parameters(), config, updates)
        self.skipped_steps = 0

    @property
    def policy_version(self) -> int:
        """Optimizer steps behind the current weights."""
        return self.optimizer.steps_taken

    def step(self, groups: Sequence[TrainGroup]) -> dict[str, float]:
        """Learn from one batch; see `rlmed.core.protocols.Learner.step`."""
        items = [self._item(group) for group in groups]
        plans = [self._plan(part) for part in _split_evenly(items, self._config.mini_batches)]
        parts: list[LossMetrics] = []
        losses, norms, lr = [], [], self.optimizer.lr
        # checkpointing is active in training mode only; no supported model has dropout
        self.policy.model.train(self._config.gradient_checkpointing)
        for _ in range(self._config.epochs):
            for micro_batches, denominators in plans:
                if denominators.tokens == 0:  # momentum alone would move the weights
                    continue
                loss, metrics = self._update(micro_batches, denominators)
                norm = self._apply(loss, groups)
                parts.append(metrics)
                losses.append(loss)
                norms.append(norm)
        self.policy.model.eval()
        if not losses:
            return {"lr": lr, "skipped_steps": float(self.skipped_steps)}
        merged = {name: metric.value() for name, metric in merge_metrics(parts).items()}
        return merged | {
            "loss": sum(losses) / len(losses),
            "grad_norm": sum(norms) / len(norms),
            "lr": lr,
            "skipped_steps": float(self.skipped_steps),
        }

    def push_weights(self, pool: RolloutPool) -> None:
        """The pool's engine shares the parameters, so only the version is news."""
        pool.update_weights(self.policy_version)

    def save(self, folder: Path) -> None:
        """See `rlmed.core.protocols.Learner.save`."""
        self.policy.model.save_pretrained(folder)
        torch.save(self.optimizer.state_dict() | {SKIPPED: self.skipped_steps}, folder / OPTIMIZER_FILE)

    def load(self, folder: Path) -> None:
        """See `rlmed.core.protocols.Learner.load`; the policy must have been loaded from the same folder."""
        state = torch.load(folder / OPTIMIZER_FILE, weights_only=True)
        self.skipped_steps = state.pop(SKIPPED, 0)
        self.optimizer.load_state_dict(state)

    def _item(self, group: TrainGroup) -> PackItem:
        sequences = tuple(
            TrainSequence(
                completion, float(advantage), not (self._algo.mask_truncated and completion.finish_reason == "length")
            )
            for completion, advantage in zip(group.rollout.completions, group.advantages, strict=True)
        )
        return PackItem(group.rollout.prompt, sequences)

    def _plan(self, items: Sequence[PackItem]) -> tuple[list[_MicroBatch], LossDenominators]:
        """The micro-batches of one mini-batch, with the log-probabilities that do not change during the step."""
        trained = [len(entry.completion.token_ids) * entry.loss_mask for item in items for entry in item.sequences]
        micro_batches = [
            _MicroBatch(pack(part, self.policy)) for part in split_by_tokens(items, self._config.token_budget)
        ]
        repeated = self._config.epochs * self._config.mini_batches > 1
        for micro in micro_batches:
            if self.reference is not None:
                micro.ref_logprobs = frozen_logprobs(self.reference, micro.batch, self._temperature)
            if self._algo.old_logprobs == "rollout":
                micro.old_logprobs = micro.batch.rollout_logprobs
            elif repeated:
                micro.old_logprobs = frozen_logprobs(self.policy, micro.batch, self._temperature)
        return micro_batches, count_denominators(trained, self._max_tokens)

    def _update(self, micro_batches: list[_MicroBatch], denominators: LossDenominators) -> tuple[float, LossMetrics]:
        """Loss and accumulated gradient of one mini-batch."""
        total, parts = 0.0, []
        for micro in micro_batches:
            batch = micro.batch
            logprobs, entropy = packed_logprobs(self.policy, batch, self._temperature)
            loss, metrics = policy_loss(
                logprobs,
                logprobs.detach() if micro.old_logprobs is None else micro.old_logprobs,
                batch.rollout_logprobs,
                micro.ref_logprobs,
                batch.advantages,
                batch.sequence_ids,
                batch.loss_mask,
                denominators,
                self._loss,
            )
            loss.backward()
            self.optimizer.accumulate()
            total += float(loss.detach())
            parts.append(metrics | {"entropy": mean_metric(entropy[batch.loss_mask])})
        return total, merge_metrics(parts)

    def _apply(self, loss: float, groups: Sequence[TrainGroup]) -> float:
        """Update the weights, or skip the mini-batch when a number is broken. Returns the gradient's norm."""
        norm = math.nan
        if math.isfinite(loss):
            norm = self.optimizer.step()
        if not math.isfinite(norm):
            self.optimizer.drop_gradients()
            self.skipped_steps += 1
            if self._on_bad_step:
                self._on_bad_step(groups, f"loss {loss}, gradient norm {norm}")
        return norm


def _split_evenly(items: Sequence[PackItem], parts: int) -> list[Sequence[PackItem]]:
    """Consecutive parts whose sizes differ by at most one; fewer parts when there are fewer items."""
    parts = min(parts, len(items))
    bounds = [len(items) * i // parts for i in range(parts + 1)]
    return [items[start:stop] for start, stop in pairwise(bounds)]
