"""Supervised fine-tuning with the packing, attention and optimizer of the RL learner."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from learner.checkpoint import begin_save, read_optimizer
from learner.distributed import Parallelism, SingleProcess, full_weights
from learner.metrics import LossMetrics, mean_metric, merge_metrics
from learner.optimizer import Optimizer
from learner.packing import PackItem, TrainSequence, pack
from learner.sharing import BatchShare, Split, split_items
from rlmed.core.config.schema import LearnerConfig
from rlmed.core.protocols import RolloutPool
from rlmed.core.types import Completion, IntArray, Prompt
from rlmed.models.adapters import training
from rlmed.models.policy import Policy


def written_item(prompt: Prompt, *completions: IntArray) -> PackItem:
    """Build an item from a prompt and written, not sampled, completions (int64 [T] each)."""
    blanks = [np.zeros(len(token_ids), dtype=np.float32) for token_ids in completions]
    return PackItem(
        prompt,
        tuple(
            TrainSequence(Completion(token_ids, blank, "", "stop"), advantage=1.0)
            for token_ids, blank in zip(completions, blanks, strict=True)
        ),
    )


class SupervisedLearner:
    """Minimizes the mean of -log p over all tokens of written completions.

    Example:
        >>> learner = SupervisedLearner(policy, config.learner, total_steps=75)     # doctest: +SKIP
        >>> learner.step([written_item(prompt, token_ids)])["loss"]                         # doctest: +SKIP
        1.31
    """

    def __init__(
        self, policy: Policy, config: LearnerConfig, *, total_steps: int, parallelism: Parallelism | None = None
    ) -> None:
        """Train `policy` in place, except for the parts in `learner.freeze`.

        `parallelism` as in `learner.learner.PolicyLearner`.
        """
        self.policy, self._config, self._parallelism = policy, config, parallelism or SingleProcess()
        policy.freeze(config.freeze)
        if config.gradient_checkpointing:
            policy.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.split: Split = functools.partial(split_items, token_budget=config.token_budget)
        """Splits a batch into the ranks' shares."""
        self._scorer = self._parallelism.scorer(policy)
        self.optimizer = Optimizer(policy.model.named_parameters(), config, total_steps, self._parallelism)

    @property
    def policy_version(self) -> int:
        """Number of optimizer steps behind the current weights."""
        return self.optimizer.steps_taken

    def step(self, items: Sequence[PackItem]) -> dict[str, float]:
        """Take one optimizer step on a batch in a single process and return its metrics."""
        assert self._parallelism.size == 1, "each of several ranks learns from its share"
        return self.learn(self.split(items, 1)[0])

    def learn(self, share: BatchShare) -> dict[str, float]:
        """Take one optimizer step; see `learner.learner.PolicyLearner.learn`."""
        (mini_batch,) = share
        tokens = sum(mini_batch.trained_tokens)
        total, lr, parts = 0.0, self.optimizer.lr, list[LossMetrics]()
        with training(self.policy, self._config, self.policy_version, self._parallelism.rank):
            for part in mini_batch.micro_batches:
                batch = pack(part, self.policy)
                logprobs, _ = self._scorer.logprobs(batch, 1.0, images=mini_batch.images)
                written = logprobs[batch.loss_mask]  # a rank's filler is not trained on
                loss = -written.sum() / tokens
                loss.backward()
                self.optimizer.accumulate()
                total += float(loss.detach())
                parts.append({"tokens_above_half": mean_metric((written > math.log(0.5)).float())})
        total, merged = self._parallelism.merge(total, merge_metrics(parts))
        norm = self.optimizer.step() if math.isfinite(total) else math.nan
        if not math.isfinite(norm):
            self.optimizer.skip()
        return {
            "loss": total,
            "tokens_above_half": merged["tokens_above_half"].value(),
            "grad_norm": norm,
            "lr": lr,
            "tokens": float(tokens),
            "skipped_steps": float(self.optimizer.skipped_steps),
        }

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
