"""Supervised fine-tuning with the packing, attention and optimizer of the RL learner."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from learner.optimizer import Optimizer
from learner.packing import PackItem, TrainSequence, pack, packed_logprobs, split_by_tokens
from rlmed.core.config.schema import LearnerConfig
from rlmed.core.types import Completion, IntArray, Prompt
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

    def __init__(self, policy: Policy, config: LearnerConfig, *, total_steps: int) -> None:
        """Train `policy` in place, except for the parts in `learner.freeze`."""
        self.policy, self._config = policy, config
        policy.freeze(config.freeze)
        if config.gradient_checkpointing:
            policy.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.optimizer = Optimizer(policy.model.named_parameters(), config, total_steps)

    def step(self, items: Sequence[PackItem]) -> dict[str, float]:
        """Take one optimizer step on a batch and return its metrics."""
        tokens = sum(len(entry.completion.token_ids) for item in items for entry in item.sequences)
        total, above_half, lr = 0.0, 0.0, self.optimizer.lr
        self.policy.model.train(self._config.gradient_checkpointing)
        for part in split_by_tokens(items, self._config.token_budget):
            logprobs, _ = packed_logprobs(self.policy, pack(part, self.policy), temperature=1.0)
            loss = -logprobs.sum() / tokens
            loss.backward()
            self.optimizer.accumulate()
            total += float(loss.detach())
            above_half += float((logprobs.detach() > math.log(0.5)).sum())
        self.policy.model.eval()
        norm = self.optimizer.step() if math.isfinite(total) else math.nan
        if not math.isfinite(norm):
            self.optimizer.skip()
        return {
            "loss": total,
            "tokens_above_half": above_half / tokens,
            "grad_norm": norm,
            "lr": lr,
            "tokens": float(tokens),
            "skipped_steps": float(self.optimizer.skipped_steps),
        }

    def save(self, folder: Path) -> None:
        """Save the model as a Hugging Face folder with the optimizer's state in it."""
        self.policy.model.save_pretrained(folder)
        self.optimizer.save(folder)

    def load(self, folder: Path) -> None:
        """Resume from what `save` wrote; load the policy from the same folder first."""
        self.optimizer.load(folder)
