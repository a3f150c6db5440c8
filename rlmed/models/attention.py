"""One attention function for every decoder: computes the prompt once per group.

transformers passes each decoder layer's queries, keys and values, rotary embedding applied, to a
registered attention function. Ours, `shared_prefix`, passes them on to the *layout* of the forward
pass, which knows which tokens are prompts and which are completions of which prompt. Learning and
prompts alone take `PackedLayout` here or, without padding, `rlmed.models.varlen.VarlenLayout`; the
engine's own layouts, prefill and decode, are in `rollout/native/kv_pages.py`. No model is
re-implemented anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

ATTENTION_NAME = "shared_prefix"
HALF = (torch.bfloat16, torch.float16)


class AttentionLayout(Protocol):
    """Who may attend to whom in one forward pass over a row of N tokens."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None = None
    ) -> Tensor:
        """Compute the attention of one layer.

        Args:
            layer: index of the decoder layer.
            query: [N, H, D] rotary embedding applied.
            key: [N, H_kv, D]; H is a multiple of H_kv.
            value: [N, H_kv, D].
            scale: factor on the scores, usually D**-0.5.
            window: a token attends to so many of its sequence (prompt and completion), itself
                included; None: to all.

        Returns:
            [N, H, D].
        """
        ...


class DecoderAttention(Protocol):
    """An attention module of transformers: what is read of it."""

    layer_idx: int


def shared_prefix(
    module: DecoderAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    layout: AttentionLayout | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend as the layout says; registered with transformers.

    Input rows are [1, heads, N, D], the result [1, N, heads, D].
    """
    if layout is None:
        raise ValueError(
            "shared_prefix attention called without a layout: run the model through rlmed.models.policy.Policy, or load it "
            "with another attn_implementation, for example 'sdpa'"
        )
    if query.shape[0] != 1 or attention_mask is not None:
        raise ValueError("shared_prefix attention takes one packed row and no attention mask")
    output = layout.attend(
        module.layer_idx,
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        scaling,
        sliding_window,
    )
    return output.unsqueeze(0), None


AttentionInterface.register(ATTENTION_NAME, shared_prefix)


def sliding_windows(model: nn.Module) -> tuple[int, ...]:
    """Return the widths of sliding windows in a model's attention, each once, in order."""
    found = {vars(module).get("sliding_window") for module in model.modules() if hasattr(module, "q_proj")}
    return tuple(sorted(int(width) for width in found if width))


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """A row of groups, each `[prompt | completion 1 | ... | completion G]`, for learning.

    Each completion attends to its prompt and, causally, to itself; a prompt attends causally to
    itself, but in both directions within a block. Gradients flow. Tokens are gathered into
    right-padded rectangles for the dense kernels and scattered back, so padding costs only
    attention, never one of the model's matrix products.

    Example:
        >>> layout = PackedLayout.build([(49, (12, 30)), (51, ())])  # a group of two completions, then a prompt alone
        >>> layout.gather_back.shape, layout.visible_tokens.shape
        (torch.Size([142]), torch.Size([2, 81]))
    """

    longest: int
    """Tokens of the longest sequence: a prompt with a completion."""
    blocks: Tensor | None
    """int64 [B, P_max]: number of the block of each prompt token, -1 outside; None: no blocks."""
    prompt_tokens: Tensor
    """int64 [B, P_max]: row index of each prompt token, 0 where padded."""
    completion_tokens: Tensor
    """int64 [S, T_max]: row index of each completion token, 0 where padded."""
    visible_tokens: Tensor
    """int64 [S, P_max + T_max]: rows of completions' prompt and own tokens, 0 where padded."""
    completion_mask: Tensor
    """bool [S, 1, T_max, P_max + T_max]: where completion tokens attend; no row is all False."""
    gather_back: Tensor
    """int64 [N]: index of each row token in the concatenation of the flattened rectangles."""
    prompt_length_of: Tensor
    """int64 [S]: tokens of each completion's prompt."""
    made: dict[int | None, tuple[Tensor | None, Tensor]] = field(default_factory=dict, init=False)
    """Masks of prompts (None: causal) and completions by window, which layers share."""

    @classmethod
    def build(
        cls,
        groups: Sequence[tuple[int, Sequence[int]]],
        device: torch.device | str = "cpu",
        both_ways: Tensor | None = None,
    ) -> PackedLayout:
        """Lay out groups given as (prompt length >= 1, completion lengths >= 1) in row order.

        `both_ways`, bool [N], marks tokens that also attend to later ones of their uninterrupted
        run.
        """
        prompt_lengths = [prompt for prompt, _ in groups]
        completion_lengths = [length for _, lengths in groups for length in lengths]
        p_max, t_max = max(prompt_lengths), max(completion_lengths, default=0)
        n_groups, n_completions = len(groups), len(completion_lengths)
        prompt_tokens = torch.zeros(n_groups, p_max, dtype=torch.int64)
        completion_tokens = torch.zeros(n_completions, t_max, dtype=torch.int64)
        group_of_completion = torch.zeros(n_completions, dtype=torch.int64)
        gather_back = torch.empty(sum(prompt_lengths) + sum(completion_lengths), dtype=torch.int64)
        token, completion = 0, 0
        for group, (prompt_length, lengths) in enumerate(groups):
            span = torch.arange(token, token + prompt_length)
            prompt_tokens[group, :prompt_length] = span
            gather_back[span] = group * p_max + torch.arange(prompt_length)
            token += prompt_length
            for length in lengths:
                span = torch.arange(token, token + length)
                completion_tokens[completion, :length] = span
                gather_back[span] = n_groups * p_max + completion * t_max + torch.arange(length)
                group_of_completion[completion] = group
                token, completion = token + length, completion + 1
        prompt_length_of = torch.tensor(prompt_lengths)[group_of_completion]
        on_prompt = torch.arange(p_max) < prompt_length_of[:, None]
        causal = torch.ones(t_max, t_max, dtype=torch.bool).tril()
        mask = torch.cat(
            [on_prompt[:, None, :].expand(-1, t_max, -1), causal.expand(n_completions, -1, -1)], dim=-1
        ).unsqueeze(1)
        visible_tokens = torch.cat([prompt_tokens[group_of_completion], completion_tokens], dim=1)
        tensors = (prompt_tokens, completion_tokens, visible_tokens, mask, gather_back, prompt_length_of)
        longest = max(prompt + max(lengths, default=0) for prompt, lengths in groups)
        blocks = None
        if both_ways is not None:
            inside = torch.arange(p_max) < torch.tensor(prompt_lengths).unsqueeze(1)
            blocks = _numbered(both_ways.cpu()[prompt_tokens] & inside).to(device)
        return cls(longest, blocks, *(tensor.to(device) for tensor in tensors))

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None = None
    ) -> Tensor:
        """See `AttentionLayout.attend`."""
        if window is not None and window >= self.longest:
            window = None
        if window not in self.made:
            near = self.completion_mask if window is None else self.completion_mask & self._near(window)
            self.made[window] = (self._prompt_mask(window), near)
        prompt_mask, completion_mask = self.made[window]
        flat = _sdpa(
            _rectangle(query, self.prompt_tokens),
            _rectangle(key, self.prompt_tokens),
            _rectangle(value, self.prompt_tokens),
            scale,
            causal=prompt_mask is None,
            mask=prompt_mask,
        )
        if self.completion_tokens.numel():
            completions = _sdpa(
                _rectangle(query, self.completion_tokens),
                _rectangle(key, self.visible_tokens),
                _rectangle(value, self.visible_tokens),
                scale,
                mask=completion_mask,
            )
            flat = torch.cat([flat, completions])
        return flat.index_select(0, self.gather_back)

    def _prompt_mask(self, window: int | None) -> Tensor | None:
        """Return bool [B or 1, 1, P_max, P_max], where prompt tokens attend; None: causal."""
        if window is None and self.blocks is None:
            return None
        places = torch.arange(self.prompt_tokens.shape[1], device=self.prompt_tokens.device)
        behind = places.unsqueeze(1) - places
        mask = (behind >= 0).unsqueeze(0)
        if self.blocks is not None:
            mask = mask | ((self.blocks.unsqueeze(2) == self.blocks.unsqueeze(1)) & (self.blocks >= 0).unsqueeze(2))
        if window is not None:
            mask = mask & (behind < window)
        return mask.unsqueeze(1)

    def _near(self, window: int) -> Tensor:
        """Return bool [S, 1, T_max, P_max + T_max]: keys within the window of completion tokens."""
        p_max, t_max = self.prompt_tokens.shape[1], self.completion_tokens.shape[1]
        device = self.prompt_tokens.device
        places, own = torch.arange(p_max, device=device), torch.arange(t_max, device=device)
        query = self.prompt_length_of.unsqueeze(1) + own
        behind = torch.cat([query.unsqueeze(2) - places, (own.unsqueeze(1) - own).expand(len(query), -1, -1)], dim=-1)
        return (behind < window).unsqueeze(1)


def _numbered(marked: Tensor) -> Tensor:
    """Number the uninterrupted runs of marked tokens, bool [B, P]; -1 elsewhere."""
    begins = marked.clone()
    begins[:, 1:] &= ~marked[:, :-1]
    return torch.where(marked, begins.cumsum(1), -1)


def _rectangle(row: Tensor, indices: Tensor) -> Tensor:
    """Gather the row's [N, heads, D] at indices [B, L] into [B, heads, L, D]."""
    # index_select, not row[indices]: its gradient is an order of magnitude faster on CPUs
    return row.index_select(0, indices.flatten()).view(*indices.shape, *row.shape[1:]).transpose(1, 2)


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, scale: float, *, causal: bool = False, mask: Tensor | None = None
) -> Tensor:
    """Apply fused attention to [B, H, L, D], keys/values [B, H_kv, L', D]; return [B * L, H, D]."""
    dtype = query.dtype
    if dtype == torch.bfloat16 and query.device.type == "cpu":
        # on CPUs the bfloat16 gradient takes five times as long as the float32 one
        query, key, value = query.float(), key.float(), value.float()
    if mask is not None and query.device.type != "cpu":
        # a mask and grouped heads together have no fused kernel on CUDA, and the other way stores
        # all scores in float32
        key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (key, value))
    output = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=key.shape[1] < query.shape[1]
    )
    return output.transpose(1, 2).flatten(0, 1).to(dtype)


@dataclass(frozen=True, slots=True)
class GroupTable:
    """Assignment of R live completions to B live groups."""

    rows_of_group: Tensor | None
    """int64 [B, M]: each group's rows, padded with any; None if row b * M + m is member m of b."""
    position_of_row: Tensor
    """int64 [R]: index of each row in the flattened [B, M]."""
    groups: int
    """B."""

    @classmethod
    def build(cls, group_of_row: Sequence[int], groups: int, device: torch.device | str = "cpu") -> GroupTable:
        """Build the table from each row's group, in row order; every group has at least one row."""
        members: list[list[int]] = [[] for _ in range(groups)]
        indices = []
        for row, group in enumerate(group_of_row):
            indices.append((group, len(members[group])))
            members[group].append(row)
        widest = max(map(len, members))
        positions = [group * widest + index for group, index in indices]
        in_order = positions == list(range(groups * widest))
        padded = None if in_order else torch.tensor([rows + [0] * (widest - len(rows)) for rows in members])
        return cls(None if padded is None else padded.to(device), torch.tensor(positions, device=device), groups)

    def to_groups(self, rows: Tensor) -> Tensor:
        """Rearrange [R, ...] to [B, M, ...]."""
        if self.rows_of_group is None:
            return torch.unflatten(rows, 0, (self.groups, -1))
        return rows[self.rows_of_group]

    def to_rows(self, grouped: Tensor) -> Tensor:
        """Rearrange [B, M, ...] to [R, ...]."""
        rows = grouped.flatten(0, 1)
        return rows if self.rows_of_group is None else rows[self.position_of_row]


def decode_attention(
    query: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    prefix_mask: Tensor,
    suffix_key: Tensor,
    suffix_value: Tensor,
    suffix_mask: Tensor | None,
    table: GroupTable,
    scale: float,
) -> Tensor:
    """Attend from each live completion's new token to its group's prefix, read once, and suffix.

    Both score blocks share one softmax, which equals merging two attentions by their log-sum-exp.

    Args:
        query: [R, H, D], one row per live completion.
        prefix_key: [B, H_kv, P, D] of the B live groups.
        prefix_value: [B, H_kv, P, D].
        prefix_mask: [B * H_kv, 1, P]; 0 at prompt tokens, -inf at padding.
        suffix_key: [R, H_kv, T, D], the new token's key included.
        suffix_value: [R, H_kv, T, D].
        suffix_mask: [R * H_kv, 1, T]; None without padding.
        table: assignment of rows to groups.
        scale: factor on the scores.

    Returns:
        [R, H, D].
    """
    rows, heads, width = query.shape
    groups, kv_heads, prefix_length = prefix_key.shape[:3]
    split = (kv_heads, heads // kv_heads)
    query = query.reshape(rows, *split, width)
    # [B * H_kv, M * repeats, D] against [B * H_kv, D, P]: the M rows of a group share one matrix
    # product, and scores stay in this order, since there are more of the prefix than of the suffix
    grouped = _by_head(table.to_groups(query))
    prefix_scores = _scores(grouped, prefix_key.flatten(0, 1), scale, prefix_mask)
    suffix_scores = _scores(query.flatten(0, 1), suffix_key.flatten(0, 1), scale, suffix_mask)
    suffix_scores = _by_head(table.to_groups(suffix_scores.view(rows, *split, -1)))
    weights = torch.cat([prefix_scores, suffix_scores], dim=-1).softmax(dim=-1).to(query.dtype)
    prefix_weights, suffix_weights = weights.split([prefix_length, suffix_key.shape[2]], dim=-1)
    prefix_output = torch.bmm(prefix_weights, prefix_value.flatten(0, 1))
    suffix_weights = table.to_rows(_by_member(suffix_weights, groups, split))
    suffix_output = torch.bmm(suffix_weights.reshape(rows * kv_heads, split[1], -1), suffix_value.flatten(0, 1))
    output = suffix_output.view(rows, *split, width) + table.to_rows(_by_member(prefix_output, groups, split))
    return output.view(rows, heads, width)


def _by_head(grouped: Tensor) -> Tensor:
    """Rearrange [B, M, H_kv, repeats, W] to [B * H_kv, M * repeats, W]."""
    groups, _, kv_heads, _, width = grouped.shape
    return grouped.transpose(1, 2).reshape(groups * kv_heads, -1, width)


def _by_member(by_head: Tensor, groups: int, split: tuple[int, int]) -> Tensor:
    """Rearrange [B * H_kv, M * repeats, W] to [B, M, H_kv, repeats, W]; split = (H_kv, repeats)."""
    return by_head.view(groups, split[0], -1, split[1], by_head.shape[-1]).transpose(1, 2)


def _scores(query: Tensor, key: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """Return scale * query @ key.T + mask, never in half precision.

    The shapes are query [B, L, D], key [B, L', D] and mask [B, 1, L'].

    Rounded to bfloat16, the scores of 120 that heads of real models have would be off by up to
    0.25, their weights by 28 %.
    """
    if query.dtype not in HALF:
        if mask is None:
            scores = torch.bmm(query, key.transpose(1, 2))
            return scores if scale == 1 else scores.mul_(scale)
        return torch.baddbmm(mask, query, key.transpose(1, 2), alpha=scale)
    if query.device.type == "cpu":
        scores = torch.bmm(query.float(), key.transpose(1, 2).float())
    else:
        scores = torch.bmm(query, key.transpose(1, 2), out_dtype=torch.float32)
    scores.mul_(scale)
    return scores if mask is None else scores.add_(mask)
