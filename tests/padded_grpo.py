"""GRPO's loss by its definition, on log-probabilities of padded rows."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

KL_COEF = 0.04


def padded_loss(logprobs: Iterable[Tensor], references: Iterable[Tensor], advantages: list[float]) -> Tensor:
    """Return the on-policy loss of GRPO (arXiv 2402.03300) with the k3 penalty.

    It is the mean over completions of the mean over tokens; each completion has log-probabilities
    [T] by the policy and by the reference, and an advantage.
    """
    loss = torch.zeros(())
    for own, ref, advantage in zip(logprobs, references, advantages, strict=True):
        kl = (ref - own).exp() - (ref - own) - 1
        loss = loss + (-advantage * (own - own.detach()).exp() + KL_COEF * kl).mean() / len(advantages)
    return loss
