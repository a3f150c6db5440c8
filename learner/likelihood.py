"""Score completions under a policy, whether it sampled them or not; for rewards and calibration."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from learner.packing import PackedBatch, PackItem, logprobs_no_grad, pack, split_by_tokens
from learner.supervised import written_item
from rlmed.core.types import FloatArray, IntArray, Prompt
from rlmed.models.policy import Policy

ScoringRequest = tuple[Prompt, Sequence[IntArray]]
"""A prompt and the completions to score: int64 [T] each, T at least 1."""


def completion_logprobs(
    policy: Policy,
    requests: Sequence[ScoringRequest],
    *,
    token_budget: int,
    frozen: Callable[[PackedBatch], torch.Tensor] | None = None,
) -> list[list[FloatArray]]:
    """Compute each completion token's log-probability, at temperature 1 and without gradient.

    The completions of a prompt share its computation, as in learning; put a long prefix that many
    completions share into the prompt's `token_ids`.

    Args:
        policy: supplies positions, device and, unless `frozen` is given, the weights.
        requests: what to score.
        token_budget: most tokens per row, as `learner.token_budget`.
        frozen: computes the log-probabilities of a packed row; None runs `policy`.

    Returns:
        float32 [T] for each completion of each question.

    Raises:
        ValueError: for a completion without tokens.
    """
    frozen = frozen or (lambda batch: logprobs_no_grad(policy, batch, 1.0))
    items = [written_item(prompt, *completions) for prompt, completions in requests if completions]
    flat: list[FloatArray] = []
    for part in split_by_tokens(items, token_budget):
        flat += _by_completion(frozen(pack(part, policy)), part)
    rest = iter(flat)
    return [[next(rest) for _ in completions] for _, completions in requests]


def _by_completion(logprobs: torch.Tensor, items: Sequence[PackItem]) -> list[FloatArray]:
    lengths = [len(entry.completion.token_ids) for item in items for entry in item.sequences]
    return np.split(logprobs.float().cpu().numpy(), np.cumsum(lengths)[:-1])
