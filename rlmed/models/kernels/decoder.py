"""A decode step's forward pass in Triton kernels and matrix products, about 14 per layer."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlmed.models.decode_kernels import StepPages
from rlmed.models.decoder import Decoder
from rlmed.models.kernels.attention import Parts, attend, merge
from rlmed.models.kernels.layer import add_rms_norm, rope_append, silu_mul

PROGRAMS = 256
"""Programs that keep a GPU busy: about two for each of its multiprocessors."""
SPLIT_TOKENS = 128
"""Fewest tokens that are worth a program of their own."""


def splits(programs: int, tokens: int) -> int:
    """Return how many programs share a sequence of at most `tokens`, if there are `programs`.

    A power of two, so that few kernels are compiled.
    """
    wanted = min(PROGRAMS // programs, tokens // SPLIT_TOKENS)
    return 1 << (max(1, wanted).bit_length() - 1)


class KernelDecoder:
    """Computes what an accepted `Decoder` does, for decode steps; reads the same parameters."""

    def __init__(self, own: Decoder) -> None:
        """Share the decoder's parameters."""
        self._own = own

    def lay_out(self, pages: StepPages) -> functools.partial[Tensor]:
        """See `rlmed.models.decode_kernels.StepDecoder`."""
        return functools.partial(self, pages=pages)

    def __call__(self, embeddings: Tensor, positions: Tensor, pages: StepPages) -> Tensor:
        """See `rlmed.models.decode_kernels.Step`; `pages` are the rows'."""
        own, rows = self._own, len(embeddings)
        first = own.layers[0]
        cos, sin = own.angles(embeddings, positions.unsqueeze(1) if len(positions) > 1 else positions)
        step = _Step.build(pages, first.kv_heads, embeddings.new_empty(rows, first.heads, first.head_width))
        residual, delta = embeddings, None
        for layer in own.layers:
            normal = add_rms_norm(residual, delta, layer.input_norm.module.weight, layer.input_norm.epsilon)
            query, key, value = (
                F.linear(normal, linear.weight, linear.bias).view(rows, -1, layer.head_width)
                for linear in layer.projections
            )
            keys, values = (store[layer.index] for store in pages.suffix)
            rope_append(query, key, value, cos, sin, keys, values, pages.suffix_pages, step.cached)
            attended = step.attend(layer.index, query, layer.scale).view(rows, -1)
            delta = F.linear(attended, layer.output.weight, layer.output.bias)
            normal = add_rms_norm(residual, delta, layer.mlp_norm.module.weight, layer.mlp_norm.epsilon)
            gated = silu_mul(_side_by_side(normal, layer.gate, layer.up))
            delta = F.linear(gated, layer.down.weight, layer.down.bias)
        return add_rms_norm(residual, delta, own.norm.module.weight, own.norm.epsilon)


@dataclass(frozen=True, slots=True)
class _Step:
    """What the attentions of all layers of a step share."""

    pages: StepPages
    cached: Tensor
    """int32 [R]."""
    alone: Tensor
    """int32 [R, 1]: each row is a group of its own over its completion."""
    parts: Parts
    """What is empty in one layer is in all, so they need no clearing in between."""
    splits: tuple[int, int]
    """Of prompts and of completions."""

    @classmethod
    def build(cls, pages: StepPages, kv_heads: int, query: Tensor) -> _Step:
        rows, groups = len(query), len(pages.prefix_lengths)
        counts = splits(groups * kv_heads, pages.widths[0]), splits(rows * kv_heads, pages.widths[1])
        alone = torch.arange(rows, dtype=torch.int32, device=query.device).unsqueeze(1)
        return cls(pages, pages.counts - 1, alone, Parts(sum(counts), query), counts)

    def attend(self, layer: int, query: Tensor, scale: float) -> Tensor:
        """Return [R, H, D] for rotated queries."""
        pages, (many, own) = self.pages, self.splits
        keys, values = (store[layer] for store in pages.prefix)
        attend(query, keys, values, pages.prefix_pages, pages.prefix_lengths, pages.members, scale, self.parts, 0, many)
        keys, values = (store[layer] for store in pages.suffix)
        attend(query, keys, values, pages.suffix_pages, pages.counts, self.alone, scale, self.parts, many, own)
        return merge(self.parts, query.dtype)


def _side_by_side(x: Tensor, *linears: nn.Linear) -> Tensor:
    """Return the layers' outputs for x [R, K] side by side, without a copy of any."""
    widths = [linear.out_features for linear in linears]
    together = x.new_empty(len(x), sum(widths))
    for linear, part in zip(linears, together.split(widths, dim=1), strict=True):
        if linear.bias is None:
            torch.mm(x, linear.weight.T, out=part)
        else:
            torch.addmm(linear.bias, x, linear.weight.T, out=part)
    return together
