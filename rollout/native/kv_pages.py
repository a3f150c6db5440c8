"""Keys and values in pages of a pool, which prompts and completions take and give back.

Tables on the device name the pages of each group and of each row, as in PagedAttention (Kwon et al.
2023, arXiv 2309.06180). A pool with `page_tokens=None` has pages that hold a whole prompt or a
whole completion, so that products read a CPU's cache as it lies.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlmed.models.attention import AttentionLayout, GroupTable, decode_attention
from rlmed.models.decode_kernels import KEY_LINE

SCRATCH = 0
"""Page that belongs to nobody: rows of a step that stand for no completion write to it."""


class PagePool:
    """Pages of all layers, and which of them are free.

    Example:
        >>> pool = PagePool((28, 2, 128), page_tokens=64, dtype=torch.bfloat16, device=torch.device("cpu"))
        >>> pool.reserve(sequences=1, tokens=130)
        >>> pool.take(130), pool.keys[0].shape
        ([1, 2, 3], torch.Size([4, 2, 64, 128]))
    """

    def __init__(
        self,
        kv_shape: tuple[int, int, int],
        *,
        page_tokens: int | None,
        dtype: torch.dtype,
        device: torch.device,
        transposed_keys: bool = False,
    ) -> None:
        """Start without pages, for a model with (layers, key-value heads, head width).

        `transposed_keys`: see `rlmed.models.decode_kernels.DecodeKernels.compiled`.
        """
        self._layers, self.heads, self._head_width = kv_shape
        if transposed_keys and (page_tokens or 0) % KEY_LINE:
            raise ValueError(f"pages of {page_tokens} tokens: compiled decode steps need a multiple of {KEY_LINE}")
        self._whole = page_tokens is None
        self.page_tokens = page_tokens or 0
        """Tokens in a page."""
        self._dtype, self.device, self._transposed_keys = dtype, device, transposed_keys
        self._each_head = torch.arange(self.heads, device=device)
        self._free: list[int] = []
        self.keys, self.values = self._allocate(0)
        """Per layer [pages, H_kv, page_tokens, D]; keys may be transposed, see `KEY_LINE`."""

    @property
    def pages(self) -> int:
        """Number of pages."""
        return len(self.keys[0])

    @property
    def free_pages(self) -> int:
        """Number of pages that can be taken."""
        return len(self._free)

    def pages_for(self, tokens: int) -> int:
        """Return how many pages hold `tokens` tokens."""
        return 1 if self._whole else -(-tokens // self.page_tokens)

    def reserve(self, *, sequences: int, tokens: int, most: int = 0) -> None:
        """Make room for more sequences of `tokens` tokens, and for `most` in all."""
        whole = -(-tokens // KEY_LINE) * KEY_LINE if self._transposed_keys else tokens
        page_tokens = max(self.page_tokens, whole) if self._whole else self.page_tokens
        each, old_pages = self.pages_for(tokens), max(1, self.pages)
        missing = max(sequences * each - self.free_pages, most * each + 1 - old_pages)
        if missing <= 0 and page_tokens == self.page_tokens:
            return
        # grow by at least half, so that requests trickling in don't copy the pages each time
        grown = old_pages if missing <= 0 else old_pages + max(missing, self.pages // 2)
        self.page_tokens = page_tokens
        old_keys, old_values = self.keys, self.values
        self.keys, self.values = self._allocate(grown)
        for fresh, source in zip((*self.keys, *self.values), (*old_keys, *old_values), strict=True):
            fresh[: len(source), :, : source.shape[2]] = source
        for page in range(old_pages, grown):
            heapq.heappush(self._free, page)

    def take(self, tokens: int) -> list[int]:
        """Return the lowest free pages for `tokens` tokens, which `reserve` has provided."""
        return [heapq.heappop(self._free) for _ in range(self.pages_for(tokens))]

    def give_back(self, pages: Sequence[int]) -> None:
        """Free pages."""
        for page in pages:
            heapq.heappush(self._free, page)

    def clear(self) -> None:
        """Write zeros to all pages."""
        for pages in (*self.keys, *self.values):
            pages.zero_()

    def head_rows(self, table: Tensor) -> Tensor:
        """Return int64 [S, H_kv, n]: rows of `keys[layer].flatten(0, 1)`; `table`: int64 [S, n]."""
        return table.unsqueeze(1) * self.heads + self._each_head.unsqueeze(1)

    def addresses(self, head_rows: Tensor, places: Tensor) -> Tensor:
        """Return int64 [N, H_kv], where the keys of N tokens stand in `keys[layer].view(-1, D)`.

        Args:
            head_rows: int64 [N, H_kv, n], of the sequence of each token.
            places: int64 [N], places of the tokens in their sequences.
        """
        if head_rows.shape[2] == 1:
            own = head_rows
        else:
            pages = (places // self.page_tokens).view(-1, 1, 1).expand(-1, self.heads, 1)
            own, places = head_rows.gather(2, pages), places % self.page_tokens
        return own.squeeze(2) * self.page_tokens + places.unsqueeze(1)

    def write(self, layer: int, addresses: Tensor | int, key: Tensor, value: Tensor) -> None:
        """Write key and value [N, H_kv, D] to `addresses` [N, H_kv], or in the pages' order."""
        if isinstance(addresses, int):
            for pages, fresh in ((self.keys[layer], key), (self.values[layer], value)):
                pages.narrow(0, SCRATCH + 1, len(fresh)).select(2, addresses).copy_(fresh)
            return
        self.values[layer].view(-1, self._head_width).index_put_((addresses,), value)
        if self._transposed_keys:
            lines = self.keys[layer].view(-1, self._head_width, KEY_LINE).transpose(1, 2)
            lines.index_put_((addresses // KEY_LINE, addresses % KEY_LINE), key)
        else:
            self.keys[layer].view(-1, self._head_width).index_put_((addresses,), key)

    def _allocate(self, pages: int) -> tuple[list[Tensor], list[Tensor]]:
        shape = (pages, self.heads, self.page_tokens, self._head_width)
        lines = (pages, self.heads, self.page_tokens // KEY_LINE, self._head_width, KEY_LINE)
        # zeros, not empty: a masked NaN from uninitialised memory would still poison a weighted sum
        keys, values = (
            [torch.zeros(one, dtype=self._dtype, device=self.device) for _ in range(self._layers)]
            for one in (lines if self._transposed_keys else shape, shape)
        )
        return keys, values


@dataclass(frozen=True, slots=True)
class PageView:
    """The first `width` tokens of S sequences of a pool."""

    pool: PagePool
    sequences: int
    width: int
    """A multiple of the page's tokens, or at most a page."""
    index: Tensor | None
    """int64 [S * H_kv * pages]: rows of `keys[layer].flatten(0, 1)`; None: pages in order."""

    @classmethod
    def build(cls, pool: PagePool, head_rows: Tensor, width: int, *, in_order: bool) -> PageView:
        """View sequences, int64 [S, H_kv, n] of `PagePool.head_rows`; `in_order`: no index."""
        index = None if in_order else head_rows[:, :, : pool.pages_for(width)].flatten()
        return cls(pool, len(head_rows), width, index)

    def of(self, pages: Tensor) -> Tensor:
        """Return [S, H_kv, width, D] of one layer's keys or values; a view if in order."""
        if self.index is None:
            return pages.narrow(0, SCRATCH + 1, self.sequences).narrow(2, 0, self.width)
        heads, page_tokens, head_width = pages.shape[1:]
        parts = pages.flatten(0, 1).narrow(1, 0, min(self.width, page_tokens)).index_select(0, self.index)
        return parts.view(self.sequences, heads, self.width, head_width)


@dataclass(frozen=True, slots=True)
class PrefillLayout:
    """Prompts packed in one row: attends as `packed` does and keeps keys and values in pages."""

    packed: AttentionLayout
    pool: PagePool
    addresses: Tensor
    """int64 [N, H_kv], see `PagePool.addresses`."""

    @classmethod
    def build(
        cls, lengths: Sequence[int], pages: Sequence[Sequence[int]], packed: AttentionLayout, pool: PagePool
    ) -> PrefillLayout:
        """Lay out prompts of these lengths, which attend as `packed`, each in its own pages."""
        table = pad_sequence([torch.tensor(own) for own in pages], batch_first=True)
        table = table.repeat_interleave(torch.tensor(lengths), dim=0).to(pool.device)
        places = torch.cat([torch.arange(length) for length in lengths]).to(pool.device)
        return cls(packed, pool, pool.addresses(pool.head_rows(table), places))

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None = None
    ) -> Tensor:
        """See `rlmed.models.attention.AttentionLayout.attend`."""
        self.pool.write(layer, self.addresses, key, value)
        return self.packed.attend(layer, query, key, value, scale, window)


@dataclass(frozen=True, slots=True)
class FixedPart:
    """The part of a decode layout that stays until rows come or go."""

    prefix: PageView
    prefix_mask: Tensor
    """[B * H_kv, 1, P]: 0 or -inf."""
    table: GroupTable
    """Rows of each group."""
    completions: Tensor
    """int64 [R, H_kv, n], see `PagePool.head_rows`."""


@dataclass(frozen=True, slots=True)
class DecodeLayout:
    """One new token for each of R rows, members of B groups."""

    fixed: FixedPart
    suffix: PageView
    addresses: Tensor | int
    """int64 [R, H_kv]: where each row's new token goes, see `PagePool.write`."""
    suffix_mask: Tensor | None
    """[R * H_kv, 1, T]: 0 or -inf; None if all of it is 0."""
    windows: Mapping[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Masks [B * H_kv, M, P] on prompts, [R * H_kv, 1, T] on completions, by the widths of windows.

    Those only that hide a token.
    """

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None = None
    ) -> Tensor:
        """See `rlmed.models.attention.AttentionLayout.attend`."""
        prefix_mask, suffix_mask = self.fixed.prefix_mask, self.suffix_mask
        if window is not None and window in self.windows:
            by_member, suffix_mask = self.windows[window]
            prefix_mask = by_member.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        fixed, prefix, suffix = self.fixed, self.fixed.prefix.pool, self.suffix.pool
        suffix.write(layer, self.addresses, key, value)
        return decode_attention(
            query,
            fixed.prefix.of(prefix.keys[layer]),
            fixed.prefix.of(prefix.values[layer]),
            prefix_mask,
            self.suffix.of(suffix.keys[layer]),
            self.suffix.of(suffix.values[layer]),
            suffix_mask,
            fixed.table,
            scale,
        )


def visible(lengths: Tensor, width: int, pool: PagePool) -> Tensor:
    """[N * H_kv, 1, width] score offsets: 0 below each length (int64 [N]), then -inf."""
    hidden = torch.arange(width, device=lengths.device) >= lengths.unsqueeze(1)
    mask = pool.keys[0].new_zeros(len(lengths), width).masked_fill_(hidden, float("-inf"))
    return mask.unsqueeze(1).expand(-1, pool.heads, -1).reshape(-1, 1, width)


def within(
    window: int, prompts: Tensor, counts: Tensor, table: GroupTable, prefix: PageView, suffix: PageView
) -> tuple[Tensor, Tensor]:
    """Return the masks of `DecodeLayout.windows` for one width.

    Args:
        window: the width.
        prompts: int64 [R], tokens of each row's prompt.
        counts: int64 [R], tokens of each row's completion, the new one included.
        table: assignment of rows to groups.
        prefix: keys of the prompts.
        suffix: keys of the completions.
    """
    places, own = (torch.arange(view.width, device=counts.device) for view in (prefix, suffix))
    prompts, counts, like = prompts.unsqueeze(1), counts.unsqueeze(1), prefix.pool.keys[0]
    seen_of_prompt = (places < prompts) & (places > prompts + counts - 1 - window)
    seen_of_own = (own < counts) & (own > counts - 1 - window)
    on_prompt, on_own = (
        like.new_zeros(seen.shape).masked_fill_(~seen, float("-inf")) for seen in (seen_of_prompt, seen_of_own)
    )
    by_head = [
        mask.unsqueeze(1).expand(-1, like.shape[1], -1, -1).flatten(0, 1)
        for mask in (table.to_groups(on_prompt), on_own.unsqueeze(1))
    ]
    return by_head[0], by_head[1]
