"""Packed-row attention by definition: a mask written token by token, one softmax over the row."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Groups = Sequence[tuple[int, Sequence[int]]]
"""(prompt length, completion lengths) of each group, in row order."""


def allowed(groups: Groups, *, window: int | None = None, both_ways: Tensor | None = None) -> Tensor:
    """bool [N, N]: may row token i attend to row token j.

    With a window: to the last `window` tokens of its sequence, prompt and completion, itself
    included. Tokens of a prompt that `both_ways` [N] marks also attend to later ones of their run.
    """
    owners: list[tuple[int, int]] = []  # (group, completion or -1) of each token
    for group, (prompt, completions) in enumerate(groups):
        owners += [(group, -1)] * prompt
        for number, length in enumerate(completions):
            owners += [(group, number)] * length
    n = len(owners)
    mask = torch.zeros(n, n, dtype=torch.bool)
    for i in range(n):
        sequence = [j for j in range(n) if owners[j] in (owners[i], (owners[i][0], -1))]
        place = {j: number for number, j in enumerate(sequence)}
        for j in sequence:
            run = both_ways is not None and owners[i] == owners[j] and bool(both_ways[min(i, j) : max(i, j) + 1].all())
            near = window is None or place[i] - place[j] < window
            mask[i, j] = near and (j <= i or run)
    return mask


def dense_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """[N, H, D] for query [N, H, D], key and value [N, H_kv, D]."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
    scores = torch.einsum("ihd,jhd->hij", query, key) * scale
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(~mask, -math.inf).softmax(-1), value)


def row_tensors(
    groups: Groups, heads: int, kv_heads: int, width: int, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Random query, key and value of a row, to be differentiated."""
    n = sum(prompt + sum(completions) for prompt, completions in groups)
    generator = torch.Generator().manual_seed(n)
    return [
        torch.randn(n, count, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for count in (heads, kv_heads, kv_heads)
    ]
