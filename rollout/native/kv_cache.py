"""Key-value cache: one prefix per group, one suffix per completion, both dense so that no step copies them.

Live groups fill the first slots and live completions the first rows; the last one moves into a freed slot or row. A
decode step therefore works on plain views `cache[:live, :, :longest]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlmed.models.attention import AttentionLayout, GroupTable, decode_attention
from rlmed.models.policy import Policy


class KVCache:
    """Keys and values of all layers; grows on demand.

    Memory is layers * 2 * kv_heads * head_width * (groups * prompt_length + rows * max_tokens)
    elements.
    """

    def __init__(self, kv_shape: tuple[int, int, int], *, dtype: torch.dtype, device: torch.device) -> None:
        """Start empty, for a model with (layers, key-value heads, head width)."""
        self._layers, self._heads, self._width = kv_shape
        self._dtype, self._device = dtype, device
        self.prefix_keys, self.prefix_values = self._allocate(0, 0), self._allocate(0, 0)
        self.suffix_keys, self.suffix_values = self._allocate(0, 0), self._allocate(0, 0)

    def reserve(self, *, groups: int, prompt_length: int, rows: int, max_tokens: int) -> None:
        """Make room for `groups` prompts of `prompt_length` tokens and `rows` completions of `max_tokens`."""
        self.prefix_keys = self._enlarged(self.prefix_keys, groups, prompt_length)
        self.prefix_values = self._enlarged(self.prefix_values, groups, prompt_length)
        self.suffix_keys = self._enlarged(self.suffix_keys, rows, max_tokens)
        self.suffix_values = self._enlarged(self.suffix_values, rows, max_tokens)

    def _allocate(self, slots: int, length: int) -> list[Tensor]:
        shape = (slots, self._heads, length, self._width)
        # zeros, not empty: a masked NaN from uninitialised memory would still poison a weighted sum
        return [torch.zeros(shape, dtype=self._dtype, device=self._device) for _ in range(self._layers)]

    def _enlarged(self, old: list[Tensor], slots: int, length: int) -> list[Tensor]:
        old_slots, _, old_length, _ = old[0].shape
        if slots <= old_slots and length <= old_length:
            return old
        # grow by at least half, so that requests trickling in don't copy the cache each time
        slots = max(slots, old_slots + old_slots // 2) if slots > old_slots else old_slots
        fresh = self._allocate(slots, max(length, old_length))
        for target, source in zip(fresh, old, strict=True):
            target[:old_slots, :, :old_length] = source
        return fresh

    def move_group(self, source: int, target: int) -> None:
        """Copy the prefix of slot `source` to slot `target`."""
        for cache in (*self.prefix_keys, *self.prefix_values):
            cache[target] = cache[source]

    def move_row(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` suffix tokens of row `source` to row `target`."""
        for cache in (*self.suffix_keys, *self.suffix_values):
            cache[target, :, :length] = cache[source, :, :length]


@dataclass(frozen=True, slots=True)
class PrefillLayout:
    """Prompts packed in one row: attends as `packed` does and caches keys and values."""

    packed: AttentionLayout
    prompt_tokens: Tensor
    """int64 [B, P_max]: row index of each prompt token; any where padded."""
    cache: KVCache
    first_group: int
    """Slot of the first prompt of the row; the others follow."""

    @classmethod
    def build(cls, lengths: Sequence[int], policy: Policy, cache: KVCache, first_group: int) -> PrefillLayout:
        """Lay out prompts of these lengths for the policy."""
        rows = torch.arange(sum(lengths)).split(list(lengths))
        prompt_tokens = pad_sequence(list(rows), batch_first=True).to(policy.device)
        return cls(policy.packed_layout([(length, ()) for length in lengths]), prompt_tokens, cache, first_group)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See `rlmed.models.attention.AttentionLayout.attend`."""
        groups, length = self.prompt_tokens.shape
        slots = slice(self.first_group, self.first_group + groups)
        for cache, fresh in ((self.cache.prefix_keys, key), (self.cache.prefix_values, value)):
            cache[layer][slots, :, :length] = fresh[self.prompt_tokens].transpose(1, 2)
        return self.packed.attend(layer, query, key, value, scale)


@dataclass(frozen=True, slots=True)
class DecodeLayout:
    """One new token for each of R live completions of B live groups."""

    cache: KVCache
    table: GroupTable
    rows: Tensor
    """int64 [R]: 0 .. R-1."""
    prefix_mask: Tensor
    """[B * H_kv, 1, P]: 0 or -inf."""
    lengths: Tensor | int
    """int64 [R]: tokens of each row already in the cache, or one number if equal in all rows; the new token goes after
    them."""
    suffix_length: int
    """T: the largest of `lengths`, plus the new token."""
    suffix_mask: Tensor | None
    """[R * H_kv, 1, T]: 0 or -inf; None where all rows are T long."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See `rlmed.models.attention.AttentionLayout.attend`."""
        groups, prefix_length = self.table.groups, self.prefix_mask.shape[-1]
        rows, suffix_length = len(self.rows), self.suffix_length
        suffix_keys, suffix_values = self.cache.suffix_keys[layer], self.cache.suffix_values[layer]
        # a slice if possible: indexing costs several times as much
        which = slice(rows) if isinstance(self.lengths, int) else self.rows
        suffix_keys[which, :, self.lengths] = key
        suffix_values[which, :, self.lengths] = value
        return decode_attention(
            query,
            self.cache.prefix_keys[layer][:groups, :, :prefix_length],
            self.cache.prefix_values[layer][:groups, :, :prefix_length],
            self.prefix_mask,
            suffix_keys[:rows, :, :suffix_length],
            suffix_values[:rows, :, :suffix_length],
            self.suffix_mask,
            self.table,
            scale,
        )
