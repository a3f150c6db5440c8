"""Merge low-rank adapters into the weights below them: W + s B A, computed in float32.

A bfloat16 weight has 8 significant bits, so rounding the sum to nearest would drop every change
that is smaller than half of W's last bit: in the first steps of training, nearly all of B A. So it
is rounded stochastically, up or down by distance, and the change is right in the mean over a row's
weights. Chance depends on the weight's name alone: the same adapters always give the same merged
weights, in a rollout, in a checkpoint's evaluation and in a merged export.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight of a policy under the name that it has without adapters, and its adapter, if any."""

    name: str
    value: Tensor
    """[N, K] if it has an adapter, else any shape; of several learner ranks, a shard."""
    factors: tuple[Tensor, Tensor] | None = None
    """B [N, rank] and A [rank, K]."""
    scale: float = 1.0
    """s, on B A."""


@torch.no_grad()
def merge(name: str, weight: Tensor, factors: tuple[Tensor, Tensor], scale: float) -> Tensor:
    """Return W + s B A as a new tensor in W's dtype; see `Weight` for the arguments."""
    b, a = (factor.detach().float() for factor in factors)
    exact = torch.addmm(weight.detach().float(), b, a, alpha=scale)
    if weight.dtype != torch.bfloat16:
        return exact.to(weight.dtype)
    merged = torch.empty_like(weight, requires_grad=False)
    round_stochastically(exact, merged, zlib.crc32(name.encode()))
    return merged


def round_stochastically(values: Tensor, target: Tensor, seed: int) -> None:
    """Write finite float32 `values` into bfloat16 `target`, up or down by chance and distance."""
    generator = torch.Generator(values.device).manual_seed(seed)
    noise = torch.randint(0, 2**16, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    # bfloat16 is the upper half of a float32: noise in the lower half carries over by chance
    bits = values.contiguous().view(torch.int32).add_(noise).bitwise_and_(-(2**16))
    target.copy_(bits.view(torch.float32))
