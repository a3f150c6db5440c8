"""Log-probabilities of given tokens without a full [tokens, vocabulary] tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlmed.models.cpu.linear import matmul_transposed, weight_gradient

CHUNK_BYTES = 64 * 2**20
"""Size of one chunk of fp32 logits."""


def chunk_rows(vocabulary: int) -> int:
    """Return the number of rows of fp32 logits that fit in `CHUNK_BYTES`."""
    return max(1, CHUNK_BYTES // (4 * vocabulary))


class _ChunkedLogprobs(torch.autograd.Function):
    """Projection, log-softmax and gather by chunks; the backward pass recomputes each chunk's softmax.

    If everything fits in one chunk, its softmax is kept instead, which still bounds memory.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, banned: Tensor
    ) -> tuple[Tensor, Tensor]:
        logprobs = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        entropy = torch.empty_like(logprobs)
        chunks = _chunks(len(targets), len(weight))
        for rows in chunks:
            log_softmax = _log_softmax(hidden[rows], weight, temperature, banned)
            logprobs[rows] = _picked(log_softmax, targets[rows])
            softmax = log_softmax.exp()
            log_softmax.index_fill_(1, banned, 0.0)  # so that 0 * -inf becomes 0
            entropy[rows] = log_softmax.mul_(softmax).sum(dim=1).neg_()
        keep = len(chunks) == 1 and any(ctx.needs_input_grad)
        kept = _minus_one_hot(softmax, targets) if keep else hidden.new_empty(0)
        ctx.save_for_backward(hidden, weight, targets, banned, kept)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, banned, kept = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        # d logprob / d logit = (one-hot - softmax) / temperature; apply sign and scale on the
        # narrow side
        scale = (grad_logprobs / -ctx.temperature).unsqueeze(1)
        for rows in _chunks(len(targets), len(weight)):
            if kept.numel():
                slope = kept
            else:
                softmax = _log_softmax(hidden[rows], weight, ctx.temperature, banned).exp_()
                slope = _minus_one_hot(softmax, targets[rows])
            slope = slope.to(weight.dtype)
            grad_hidden[rows] = matmul_transposed(slope, weight.T) * scale[rows]
            grad_weight += weight_gradient(slope, (hidden[rows] * scale[rows]).to(weight.dtype))
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None


# torch leaves `apply` untyped
_differentiable: Callable[[Tensor, Tensor, Tensor, float, Tensor], tuple[Tensor, Tensor]] = _ChunkedLogprobs.apply


def _picked(log_softmax: Tensor, targets: Tensor) -> Tensor:
    """Gather [M] entries of [M, V] at int64 targets [M]."""
    return log_softmax.gather(1, targets.unsqueeze(1)).squeeze(1)


def _minus_one_hot(softmax: Tensor, targets: Tensor) -> Tensor:
    """Subtract the one-hot rows of int64 [M] from softmax [M, V], in place."""
    return softmax.scatter_add_(1, targets.unsqueeze(1), softmax.new_full((len(targets), 1), -1.0))


def _chunks(rows: int, vocabulary: int) -> list[slice]:
    size = chunk_rows(vocabulary)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def masked_logits(hidden: Tensor, weight: Tensor, banned: Tensor) -> Tensor:
    """Return float32 [M, V] logits of hidden states [M, d] under projection [V, d]; -inf at `banned` ids (int64 [K])."""
    return matmul_transposed(hidden, weight).float().index_fill_(1, banned, float("-inf"))


def _log_softmax(hidden: Tensor, weight: Tensor, temperature: float, banned: Tensor) -> Tensor:
    logits = masked_logits(hidden, weight, banned)
    return (logits if temperature == 1 else logits.div_(temperature)).log_softmax(dim=1)


def chunked_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float, banned: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the log-probability of each target token and the entropy of each distribution.

    The distribution is softmax(hidden @ weight.T / temperature) without the banned tokens, as for
    sampling.

    Args:
        hidden: [M, d] hidden states that predict the targets.
        weight: [V, d] vocabulary projection.
        targets: int64 [M].
        temperature: positive; of the sampling distribution.
        banned: int64 [K] ids that cannot be sampled.

    Returns:
        float32 [M] log-probabilities (differentiable) and float32 [M] entropies in nats (not
        differentiable).
    """
    return _differentiable(hidden, weight, targets, temperature, banned)


@torch.no_grad()
def logprobs_no_grad(hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float, banned: Tensor) -> Tensor:
    """Return only the log-probabilities of `chunked_logprobs` [M], without gradient or the cost of entropies."""
    chunks = _chunks(len(targets), len(weight))
    parts = [_picked(_log_softmax(hidden[rows], weight, temperature, banned), targets[rows]) for rows in chunks]
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)
