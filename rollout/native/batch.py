"""Tensors of the live completions: rebuilt when rows change, otherwise advanced by one token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlmed.models.attention import GroupTable
from rlmed.models.policy import Policy
from rollout.native.kv_cache import DecodeLayout, KVCache
from rollout.native.sampler import BatchSampling
from rollout.native.sequence import Sequence, SequenceGroup


@dataclass(slots=True)
class DecodeBatch:
    """R live completions of B live groups.

    A row's newest token is not cached yet: it is the next step's input.
    """

    tokens: Tensor
    """int64 [R], newest token of each row."""
    positions: Tensor
    """int64 [position rows, R], rotary position of that token."""
    lengths: Tensor
    """int64 [R], suffix tokens in the cache."""
    longest: int
    """Maximum of `lengths`."""
    uniform: bool
    """True if all `lengths` are equal; they stay equal, since every row advances at every step."""
    table: GroupTable
    rows: Tensor
    """int64 [R]: 0 .. R-1."""
    prefix_mask: Tensor
    """[B * H_kv, 1, P], see `DecodeLayout`."""
    kv_heads: int
    sampling: BatchSampling

    @classmethod
    def build(cls, rows: list[Sequence], groups: list[SequenceGroup], policy: Policy) -> DecodeBatch:
        """Build the tables for rows and groups in cache order."""
        device = policy.device
        slot_of_group = {id(group): slot for slot, group in enumerate(groups)}
        lengths = [len(sequence.token_ids) - 1 for sequence in rows]
        next_positions = [sequence.group.next_position + length for sequence, length in zip(rows, lengths, strict=True)]
        prompt_lengths = torch.tensor([group.positions.shape[1] for group in groups], device=device)
        position_rows = groups[0].positions.shape[0]
        kv_heads = policy.kv_shape[1]
        return cls(
            tokens=torch.tensor([sequence.token_ids[-1] for sequence in rows], device=device),
            positions=torch.tensor(next_positions, device=device).expand(position_rows, -1).clone(),
            lengths=torch.tensor(lengths, device=device),
            longest=max(lengths),
            uniform=min(lengths) == max(lengths),
            table=GroupTable.build([slot_of_group[id(row.group)] for row in rows], len(groups), device),
            rows=torch.arange(len(rows), device=device),
            prefix_mask=_visible(prompt_lengths, int(prompt_lengths.max()), kv_heads, policy.dtype),
            kv_heads=kv_heads,
            sampling=BatchSampling.build(
                [sequence.group.request.sampling for sequence in rows],
                [sequence.seed for sequence in rows],
                policy.projection.out_features,
                device,
            ),
        )

    def layout(self, cache: KVCache) -> DecodeLayout:
        """Return the attention layout of the next forward pass."""
        width = self.longest + 1
        return DecodeLayout(
            cache=cache,
            table=self.table,
            rows=self.rows,
            prefix_mask=self.prefix_mask,
            lengths=self.longest if self.uniform else self.lengths,
            suffix_length=width,
            suffix_mask=None
            if self.uniform
            else _visible(self.lengths + 1, width, self.kv_heads, self.prefix_mask.dtype),
        )

    def advance(self, tokens: Tensor) -> None:
        """Advance by one token: the forward pass cached the old tokens and sampled `tokens`, int64 [R]."""
        self.tokens = tokens
        self.positions = self.positions + 1
        self.lengths = self.lengths + 1
        self.longest += 1


def _visible(lengths: Tensor, width: int, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """[R * kv_heads, 1, width] score offsets: 0 below each length, -inf from there on."""
    mask = torch.zeros(len(lengths), width, dtype=dtype, device=lengths.device)
    mask.masked_fill_(torch.arange(width, device=lengths.device) >= lengths.unsqueeze(1), float("-inf"))
    return mask.repeat_interleave(kv_heads, dim=0).unsqueeze(1)
