"""Log-probabilities of given tokens without a full [tokens, vocabulary] tensor.

Few logits are computed at once. Many are computed in blocks of the vocabulary, with a running
maximum and sum (Milakov and Gimelshein 2018, arXiv 1805.02867), and again in the backward pass.
With blocks of the vocabulary, unlike blocks of rows, each pass reads a weight once, and its
gradient is written once and in its own dtype: no float32 sum [V, d] is needed.

Logits are float32 in every policy: bfloat16's numbers near 120 are 0.5 apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlmed.models.cpu.linear import matmul_transposed, weight_gradient

CPU_BYTES = 64 * 2**20
"""Largest float32 logits computed at once on a CPU; their softmax is kept for backward."""
CPU_BLOCK_BYTES = 8 * 2**20
"""Size of a block on a CPU: it fits the cache, and its memory is reused (glibc: below 32 MiB)."""
CUDA_BYTES = 512 * 2**20
"""Both of them on CUDA: 883 rows of Qwen's vocabulary, or blocks of 16,384 tokens for 8,192 rows.

Kernels on so much take 0.1 ms or longer, many times what their launch takes, and products of more
than some 300 rows and columns are bound by arithmetic, not by memory.
"""


def logits_bytes(device: torch.device) -> tuple[int, int]:
    """Return the most bytes of float32 logits computed at once, and those of a block."""
    return (CPU_BYTES, CPU_BLOCK_BYTES) if device.type == "cpu" else (CUDA_BYTES, CUDA_BYTES)


def _fits(rows: int, weight: Tensor) -> bool:
    """Return whether logits of so many rows are computed at once."""
    return not _widens(weight) and 4 * rows * len(weight) <= logits_bytes(weight.device)[0]


def _widens(weight: Tensor) -> bool:
    """Return whether products need a float32 copy of this weight, which is made block by block."""
    return weight.dtype != torch.float32 and weight.device.type == "cpu"


def _blocks(rows: int, weight: Tensor) -> list[slice]:
    """Divide the vocabulary so that a block's logits and float32 weights keep its size."""
    size = max(1, logits_bytes(weight.device)[1] // (4 * max(rows, weight.shape[1])))
    return [slice(start, min(start + size, len(weight))) for start in range(0, len(weight), size)]


def _product(hidden: Tensor, weight: Tensor) -> Tensor:
    """Return float32 logits [M, N], never rounded, of hidden [M, d] and a part [N, d].

    A CPU's bfloat16 product always rounds, but float32 holds each product of two bfloat16 numbers
    exactly.
    """
    if weight.dtype == torch.float32:
        return matmul_transposed(hidden, weight)
    if weight.device.type == "cpu":
        return matmul_transposed(hidden.float(), weight.float())
    return torch.mm(hidden, weight.T, out_dtype=torch.float32)


class _AtOnce(torch.autograd.Function):
    """Projection, log-softmax, gather; keeps softmax minus one-hot [M, V] for backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, banned: Tensor
    ) -> tuple[Tensor, Tensor]:
        log_softmax = _log_softmax(hidden, weight, temperature, banned)
        logprobs = _picked(log_softmax, targets)
        softmax = log_softmax.exp()
        log_softmax.index_fill_(1, banned, 0.0)  # so that 0 * -inf becomes 0
        entropy = log_softmax.mul_(softmax).sum(dim=1).neg_()
        if any(ctx.needs_input_grad):
            softmax.scatter_add_(1, targets.unsqueeze(1), softmax.new_full((len(targets), 1), -1.0))
            ctx.save_for_backward(hidden, weight, softmax)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, kept = ctx.saved_tensors
        slope, scale = kept.to(weight.dtype), _scale(grad_logprobs, ctx.temperature)
        grad_hidden = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_hidden = (matmul_transposed(slope, weight.T) * scale).to(hidden.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = weight_gradient(slope, (hidden * scale).to(weight.dtype))
        return grad_hidden, grad_weight, None, None, None


class _InBlocks(torch.autograd.Function):
    """The same in blocks of the vocabulary; the backward pass recomputes each block's softmax."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, banned: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.temperature, ctx.banned = temperature, banned.tolist()
        sums = _sum_blocks(hidden, weight, targets, temperature, ctx.banned, entropy=True)
        ctx.save_for_backward(hidden, weight, targets, sums.log_mass)
        ctx.mark_non_differentiable(sums.entropy)
        return sums.logprobs, sums.entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, log_mass = ctx.saved_tensors
        scale = _scale(grad_logprobs, ctx.temperature)
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        scaled = (hidden * scale).to(weight.dtype)
        for block in _blocks(len(hidden), weight):
            slope = _masked_block(hidden, weight, block, ctx.temperature, ctx.banned)
            slope.sub_(log_mass.unsqueeze(1)).exp_()
            column, inside = _columns(targets, block)
            slope = slope.scatter_add_(1, column, -inside.float()).to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden += matmul_transposed(slope, weight[block].T)
            if grad_weight is not None:
                grad_weight[block] = weight_gradient(slope, scaled)
        if grad_hidden is not None:
            grad_hidden = grad_hidden.mul_(scale).to(hidden.dtype)
        return grad_hidden, grad_weight, None, None, None


_Differentiable = Callable[[Tensor, Tensor, Tensor, float, Tensor], tuple[Tensor, Tensor]]
# torch leaves `apply` untyped
_at_once: _Differentiable = _AtOnce.apply
_in_blocks: _Differentiable = _InBlocks.apply


class _Sums(NamedTuple):
    """What a pass over all blocks knows of each row, float32 [M]."""

    logprobs: Tensor
    log_mass: Tensor
    """Log of the sum of exp(logits)."""
    entropy: Tensor
    """Zero if it was not asked for."""


def _sum_blocks(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, banned: Sequence[int], *, entropy: bool
) -> _Sums:
    """Compute log-probabilities and entropies over blocks of the vocabulary.

    With the largest logit m so far, `mass` is the sum of exp(x - m), and `moment` that of exp(x -
    m) (x - m). A larger m' multiplies both by exp(m - m'), after mass (m - m') was added to the
    moment. The entropy is log mass - moment / mass, in which nothing large cancels.
    """
    mass, moment, chosen = torch.zeros(3, len(hidden), dtype=torch.float32, device=hidden.device)
    largest = torch.full_like(mass, torch.finfo(torch.float32).min)  # -inf - -inf would be nan
    for block in _blocks(len(hidden), weight):
        logits = _masked_block(hidden, weight, block, temperature, banned)
        column, inside = _columns(targets, block)
        chosen = torch.where(inside, logits.gather(1, column), chosen.unsqueeze(1)).squeeze(1)
        before, largest = largest, torch.maximum(largest, logits.amax(dim=1))
        logits.sub_(largest.unsqueeze(1))
        shrink = (before - largest).exp()
        if entropy:
            exponentials = logits.exp()
            _fill(logits, block, banned, 0.0)  # so that 0 * -inf becomes 0
            moment = (moment + mass * (before - largest)) * shrink + logits.mul_(exponentials).sum(dim=1)
        else:
            exponentials = logits.exp_()
        mass = mass * shrink + exponentials.sum(dim=1)
    log_mass = mass.log()
    return _Sums(chosen - largest - log_mass, largest + log_mass, log_mass - moment / mass if entropy else moment)


def _masked_block(hidden: Tensor, weight: Tensor, block: slice, temperature: float, banned: Sequence[int]) -> Tensor:
    """Return float32 [M, block] logits over temperature, -inf at banned ids."""
    logits = _product(hidden, weight[block])
    _fill(logits, block, banned, float("-inf"))
    return logits if temperature == 1 else logits.div_(temperature)


def _fill(logits: Tensor, block: slice, banned: Sequence[int], value: float) -> None:
    """Set the columns of banned ids in a block."""
    for token in banned:
        if block.start <= token < block.stop:
            logits[:, token - block.start] = value


def _columns(targets: Tensor, block: slice) -> tuple[Tensor, Tensor]:
    """Return each target's column in a block, int64 [M, 1], and whether it is inside, bool."""
    column = (targets - block.start).unsqueeze(1)
    return column.clamp(0, block.stop - block.start - 1), (column >= 0) & (column < block.stop - block.start)


def _picked(log_softmax: Tensor, targets: Tensor) -> Tensor:
    """Gather [M] entries of [M, V] at int64 targets [M]."""
    return log_softmax.gather(1, targets.unsqueeze(1)).squeeze(1)


def _scale(grad_logprobs: Tensor, temperature: float) -> Tensor:
    """Return [M, 1] the sign and factor of d logprob / d logit, for the narrow side."""
    return (grad_logprobs / -temperature).unsqueeze(1)


def masked_logits(hidden: Tensor, weight: Tensor, banned: Tensor) -> Tensor:
    """Return float32 [M, V] logits of [M, d] by projection [V, d]; -inf at `banned` (int64 [K])."""
    if _widens(weight):
        logits = torch.empty(len(hidden), len(weight))
        for block in _blocks(len(hidden), weight):
            logits[:, block] = _product(hidden, weight[block])
    else:
        logits = _product(hidden, weight)
    return logits.index_fill_(1, banned, float("-inf"))


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
    function = _at_once if _fits(len(hidden), weight) else _in_blocks
    return function(hidden, weight, targets, temperature, banned)


@torch.no_grad()
def logprobs_no_grad(hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float, banned: Tensor) -> Tensor:
    """Return only `chunked_logprobs`' log-probabilities [M], without gradient or entropies."""
    if _fits(len(hidden), weight):
        return _picked(_log_softmax(hidden, weight, temperature, banned), targets)
    return _sum_blocks(hidden, weight, targets, temperature, banned.tolist(), entropy=False).logprobs
