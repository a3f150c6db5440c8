"""Train on groups: pack, reference and old log-probabilities, loss by micro-batch, clip, AdamW."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from learner.checkpoint import begin_save, read_optimizer
from learner.distributed import Parallelism, RowScorer, SingleProcess, WithoutAdapters, full_weights
from learner.likelihood import ScoringRequest, completion_logprobs
from learner.losses import LossDenominators, count_denominators, policy_loss
from learner.metrics import LossMetrics, mean_metric, merge_metrics
from learner.optimizer import Optimizer
from learner.packing import PackedBatch, pack
from learner.sharing import BatchShare, MiniBatchShare, Split, split_groups
from rlmed.core.config.schema import LearnerConfig, LossConfig
from rlmed.core.protocols import RolloutPool
from rlmed.core.types import FloatArray, TrainGroup
from rlmed.models.adapters import training
from rlmed.models.policy import Policy

OnSkippedUpdate = Callable[[Sequence[TrainGroup], str], None]
"""Callback for a skipped update: the groups and the reason."""


@dataclass(slots=True)
class _MicroBatch:
    """A packed micro-batch with the log-probabilities that stay fixed during a step."""

    batch: PackedBatch
    ref_logprobs: Tensor | None = None
    old_logprobs: Tensor | None = None
    """None: use the first update's log-probabilities, the same without another forward pass."""


@dataclass(frozen=True, slots=True)
class _MiniBatch:
    """Input of one optimizer step."""

    micro_batches: list[_MicroBatch]
    """This rank's."""
    denominators: LossDenominators
    """Over all ranks."""
    images: bool
    """True if any prompt, on any rank, has an image."""


class PolicyLearner:
    """Trains a policy on groups of completions; see `rlmed.core.protocols.Learner`.

    Example:
        >>> learner = PolicyLearner(policy, reference, config.algo.loss, config.learner, total_steps=300,
        ...                         max_tokens=512, temperature=1.0)                        # doctest: +SKIP
        >>> learner.step(groups)["grad_norm"]                                               # doctest: +SKIP
        0.84
    """

    def __init__(
        self,
        policy: Policy,
        reference: Policy | None,
        loss: LossConfig,
        config: LearnerConfig,
        *,
        total_steps: int,
        max_tokens: int,
        temperature: float,
        on_bad_step: OnSkippedUpdate | None = None,
        parallelism: Parallelism | None = None,
    ) -> None:
        """Prepare training.

        Args:
            policy: trained in place.
            reference: frozen policy of the KL term; None if `kl_coef` is 0, or if the policy has
                adapters, without which it is its own reference.
            loss: loss settings.
            config: optimizer and memory settings.
            total_steps: batches until the learning-rate schedule ends.
            max_tokens: limit on a completion's tokens, the constant of Dr. GRPO's aggregation.
            temperature: of the sampling distribution, under which log-probabilities are computed.
            on_bad_step: called for each batch skipped because loss or gradient was not finite.
            parallelism: of the ranks this learner belongs to
                (`learner.distributed.init_distributed`), which shard policy and reference in place,
                and call `learn`. None: a single process.
        """
        if (reference is None) != (loss.kl_coef == 0 or policy.adapters is not None):
            raise ValueError(f"kl_coef={loss.kl_coef} and {'no' if reference is None else 'a'} reference policy")
        self.policy, self.reference = policy, reference
        self._loss, self._config = loss, config
        self._max_tokens, self._temperature = max_tokens, temperature
        self._on_bad_step, self._parallelism = on_bad_step, parallelism or SingleProcess()
        policy.freeze(config.freeze)
        if config.gradient_checkpointing:
            policy.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.split: Split = functools.partial(
            split_groups,
            token_budget=config.token_budget,
            mini_batches=config.mini_batches,
            mask_truncated=loss.mask_truncated,
        )
        """Splits a batch into the ranks' shares."""
        self._scorer = self._parallelism.scorer(policy)
        self._reference_scorer: RowScorer | WithoutAdapters | None = None
        if reference is not None:
            self._reference_scorer = self._parallelism.scorer(reference)
        elif loss.kl_coef > 0 and policy.adapters is not None:
            self._reference_scorer = WithoutAdapters(self._scorer, policy.adapters)
        updates = total_steps * config.epochs * config.mini_batches
        self.optimizer = Optimizer(policy.model.named_parameters(), config, updates, self._parallelism)

    @property
    def policy_version(self) -> int:
        """Number of optimizer steps behind the current weights."""
        return self.optimizer.steps_taken

    @property
    def skipped_steps(self) -> int:
        """Number of updates skipped because loss or gradient was not finite."""
        return self.optimizer.skipped_steps

    def step(self, groups: Sequence[TrainGroup]) -> dict[str, float]:
        """Train on one batch in a single process; see `rlmed.core.protocols.Learner.step`."""
        assert self._parallelism.size == 1, "each of several ranks learns from its share"
        return self.learn(self.split(groups, 1)[0], groups)

    def learn(self, share: BatchShare, groups: Sequence[TrainGroup] = ()) -> dict[str, float]:
        """Train on this rank's share of a batch and return the metrics of the whole; collective.

        `groups` are those that `on_bad_step` gets.
        """
        mini_batches = [self._prepare_mini_batch(part) for part in share]
        parts: list[LossMetrics] = []
        losses, norms, lr = [], [], self.optimizer.lr
        for _ in range(self._config.epochs):
            for mini_batch in mini_batches:
                if mini_batch.denominators.tokens == 0:  # momentum alone would move the weights
                    continue
                with training(self.policy, self._config, self.policy_version, self._parallelism.rank):
                    update = self._update(mini_batch)
                loss, metrics = self._parallelism.merge(*update)
                norm = self._apply(loss, groups)
                parts.append(metrics)
                losses.append(loss)
                norms.append(norm)
        if not losses:
            return {"lr": lr, "skipped_steps": float(self.skipped_steps)}
        merged = {name: metric.value() for name, metric in merge_metrics(parts).items()}
        return merged | {
            "loss": sum(losses) / len(losses),
            "grad_norm": sum(norms) / len(norms),
            "lr": lr,
            "skipped_steps": float(self.skipped_steps),
        }

    def logprobs(self, requests: Sequence[ScoringRequest]) -> list[list[FloatArray]]:
        """See `rlmed.core.protocols.Learner.logprobs`; collective, every rank computes all."""
        return completion_logprobs(
            self.policy,
            requests,
            token_budget=self._config.token_budget,
            frozen=lambda batch: self._scorer.logprobs_no_grad(batch, 1.0),
        )

    def push_weights(self, pool: RolloutPool) -> None:
        """Push the new version; the pool's engine shares the parameters or has merged copies."""
        self.policy.publish()
        pool.update_weights(self.policy_version)

    def full_weights(self, *, on_device: bool = False) -> Iterator[tuple[str, Tensor]]:
        """See `learner.distributed.full_weights`."""
        return full_weights(self.policy, self._parallelism, on_device=on_device)

    def save(self, folder: Path) -> Callable[[], None]:
        """See `rlmed.core.protocols.Learner.save`; collective."""
        return begin_save(self.policy, self.optimizer, self._parallelism, folder)

    def load(self, folder: Path) -> None:
        """See `rlmed.core.protocols.Learner.load`; load the policy from the same folder first."""
        read_optimizer(self.optimizer, self._parallelism, folder)

    def _prepare_mini_batch(self, share: MiniBatchShare) -> _MiniBatch:
        """Pack this rank's share of a mini-batch; add log-probabilities fixed during the step."""
        micro_batches = [_MicroBatch(pack(part, self.policy)) for part in share.micro_batches]
        repeated = self._config.epochs * self._config.mini_batches > 1
        for micro in micro_batches:
            if self._reference_scorer is not None:
                micro.ref_logprobs = self._reference_scorer.logprobs_no_grad(micro.batch, self._temperature)
            if self._loss.old_logprobs == "rollout":
                micro.old_logprobs = micro.batch.rollout_logprobs
            elif repeated:
                micro.old_logprobs = self._scorer.logprobs_no_grad(micro.batch, self._temperature)
        return _MiniBatch(micro_batches, count_denominators(share.trained_tokens, self._max_tokens), share.images)

    def _update(self, plan: _MiniBatch) -> tuple[float, LossMetrics]:
        """Compute the loss and accumulate the gradient of this rank's share of a mini-batch."""
        total, parts = 0.0, []
        for micro in plan.micro_batches:
            batch = micro.batch
            logprobs, entropy = self._scorer.logprobs(batch, self._temperature, images=plan.images)
            loss, metrics = policy_loss(
                logprobs,
                logprobs.detach() if micro.old_logprobs is None else micro.old_logprobs,
                batch.rollout_logprobs,
                micro.ref_logprobs,
                batch.advantages,
                batch.sequence_ids,
                batch.loss_mask,
                plan.denominators,
                self._loss,
            )
            # False if only the vision tower is trained and there is no image
            if loss.requires_grad:
                loss.backward()
            self.optimizer.accumulate()
            total += float(loss.detach())
            parts.append(metrics | {"entropy": mean_metric(entropy[batch.loss_mask])})
        return total, merge_metrics(parts)

    def _apply(self, loss: float, groups: Sequence[TrainGroup]) -> float:
        """Update the weights unless loss or gradient is not finite; return the gradient norm."""
        norm = math.nan
        if math.isfinite(loss):
            norm = self.optimizer.step()
        if not math.isfinite(norm):
            self.optimizer.skip()
            if self._on_bad_step:
                self._on_bad_step(groups, f"loss {loss}, gradient norm {norm}")
        return norm
