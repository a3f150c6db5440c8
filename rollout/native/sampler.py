"""Sample the next token: temperature, top-k, top-p, independent random stream per completion."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rlmed.core.types import SamplingParams

BLOCK = 128
"""Tokens per vocabulary block, see `_draw`."""
_GOLDEN = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
_MIX_2 = -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift int64 values right, as if unsigned."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix64(x: Tensor) -> Tensor:
    """Apply splitmix64's finalizer (Steele, Lea, Flood, OOPSLA 2014) to int64, wrapping."""
    x = x + _GOLDEN
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def completion_seeds(seed: int, group_size: int) -> Tensor:
    """Return the random stream of each completion of a group, int64 [group_size]."""
    return mix64(mix64(torch.tensor(seed, dtype=torch.int64)) + torch.arange(group_size))


def uniforms(seeds: Tensor, steps: Tensor) -> Tensor:
    """Return one float64 in [0, 1) per (stream, token index), both int64 [R]."""
    return _shift_right(mix64(seeds ^ mix64(steps)), 11).to(torch.float64) * 2.0**-53


def _draw(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inversion: first its block, then the token in it.

    This takes a cumulative sum over the blocks and one over a single block, but none over all
    tokens. Both are float64: float32 would lose rare tokens.

    Args:
        weights: float32 [R, V], proportional to the probabilities.
        uniform: float64 [R, 1] in [0, 1).

    Returns:
        int64 [R, 1] tokens, and float64 [R, 1] sums of the weights, which are NaN in a row of them.
    """
    count = weights.shape[1]
    if short := count % BLOCK:
        weights = F.pad(weights, (0, BLOCK - short))
    blocks = weights.unflatten(1, (-1, BLOCK))
    sums = blocks.sum(dim=2, dtype=torch.float64).cumsum(dim=1)
    mass = sums[:, -1:]
    # the largest number below 1, times the mass, may round to the mass, beyond every token
    threshold = torch.minimum(uniform * mass, torch.nextafter(mass, torch.zeros_like(mass)))
    # NaN lies beyond every number
    block = torch.searchsorted(sums, threshold, right=True).clamp_(max=blocks.shape[1] - 1)
    before = sums.gather(1, (block - 1).clamp_(min=0)).masked_fill_(block == 0, 0.0)
    inside = blocks[torch.arange(len(blocks), device=block.device), block.squeeze(1)].double().cumsum(dim=1)
    # a block's sum may round above the end of its cumulative sum, where there is no token
    rest = torch.minimum(threshold - before, torch.nextafter(inside[:, -1:], torch.zeros_like(mass)))
    return (block * BLOCK + torch.searchsorted(inside, rest, right=True)).clamp_(max=count - 1), mass


class Uses(NamedTuple):
    """Which settings any row of a batch uses; what none uses is not computed."""

    temperature: bool
    greedy: bool
    top_k: bool
    top_p: bool

    @classmethod
    def of(cls, params: Collection[SamplingParams]) -> Uses:
        """Collect what the rows use."""
        return cls(
            temperature=any(not entry.greedy and entry.temperature != 1.0 for entry in params),
            greedy=any(entry.greedy for entry in params),
            top_k=any(entry.top_k for entry in params),
            top_p=any(entry.top_p < 1 for entry in params),
        )


def row_settings(params: SamplingParams, vocabulary: int) -> tuple[float, float, int]:
    """Return a row's temperature (1 if greedy), top-p (infinite if off), top-k (all if off)."""
    # a float32 cumulative sum can pass 1 before its end, which must not cut the tail of a row with
    # top-p off
    top_p = params.top_p if params.top_p < 1 else math.inf
    return 1.0 if params.greedy else params.temperature, top_p, params.top_k or vocabulary


@dataclass(frozen=True, slots=True)
class BatchSampling:
    """Sampling settings of a batch's rows as tensors."""

    temperature: Tensor | None
    """float32 [R, 1]; 1 where greedy; None if 1 in every row."""
    greedy: Tensor | None
    """bool [R]; None if no row is greedy."""
    top_k: Tensor | None
    """int64 [R, 1]; None if off in every row."""
    top_p: Tensor | None
    """float32 [R, 1], infinite where off; None if off in every row."""

    @classmethod
    def build(cls, params: Sequence[SamplingParams], vocabulary: int, device: torch.device) -> BatchSampling:
        """Collect the settings of each row."""
        uses = Uses.of(params)
        temperatures, top_p, top_k = zip(*(row_settings(entry, vocabulary) for entry in params), strict=True)
        greedy = [entry.greedy for entry in params]
        return cls(
            temperature=torch.tensor(temperatures, device=device).unsqueeze(1) if uses.temperature else None,
            greedy=torch.tensor(greedy, device=device) if uses.greedy else None,
            top_k=torch.tensor(top_k, device=device).unsqueeze(1) if uses.top_k else None,
            top_p=torch.tensor(top_p, device=device).unsqueeze(1) if uses.top_p else None,
        )

    def sample(self, logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Draw one token per row.

        Args:
            logits: float32 [R, V]; -inf where a token cannot be sampled.
            uniform: float64 [R] in [0, 1), the number that decides each row's draw.

        Returns:
            int64 [R] tokens and float32 [R] log-probabilities under the distribution they were
            drawn from (for a greedy row: at temperature 1).
        """
        logits = self._filter(logits if self.temperature is None else logits / self.temperature)
        # softmax's exponential takes half the time of exp's; the float64 sum makes up for its own
        weights = logits.softmax(dim=1)
        tokens, mass = _draw(weights, uniform.unsqueeze(1))
        if self.greedy is not None:
            tokens = torch.where(self.greedy.unsqueeze(1), logits.argmax(dim=1, keepdim=True), tokens)
        return tokens.squeeze(1), (weights.gather(1, tokens) / mass).log().float().squeeze(1)

    def _filter(self, logits: Tensor) -> Tensor:
        """Apply top-k, then top-p to the rest, as transformers and vLLM do."""
        if self.top_k is None and self.top_p is None:
            return logits
        values, order = logits.sort(dim=1, descending=True)
        dropped = torch.zeros_like(values, dtype=torch.bool)
        if self.top_k is not None:
            dropped |= torch.arange(values.shape[1], device=values.device) >= self.top_k
        if self.top_p is not None:
            probs = values.masked_fill(dropped, float("-inf")).softmax(dim=1)
            # the token that crosses the mass stays
            dropped |= probs.cumsum(dim=1) - probs >= self.top_p
        return torch.empty_like(logits).scatter_(1, order, values.masked_fill(dropped, float("-inf")))
