"""One attention function for every decoder: the prompt is computed once per group.

transformers hands each decoder layer's queries, keys and values, rotary embedding applied, to a registered attention
function. Ours, `shared_prefix`, passes them on to the *layout* of the running forward pass, which knows which tokens are
prompts and which are completions of which prompt. Three layouts exist: `PackedLayout` here (learning, and prompts alone),
and the engine's prefill and decode layouts in `rollout/native/kv_cache.py`. No model is re-implemented anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

ATTENTION_NAME = "shared_prefix"


class AttentionLayout(Protocol):
    """Who may attend to whom in one forward pass over a row of N tokens."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention of one layer.

        Args:
            layer: index of the decoder layer.
            query: [N, H, D] rotary embedding applied.
            key: [N, H_kv, D]; H is a multiple of H_kv.
            value: [N, H_kv, D].
            scale: factor on the scores, usually D**-0.5.

        Returns:
            [N, H, D].
        """
        ...


def shared_prefix(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    layout: AttentionLayout | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The function registered with transformers; the row is [1, heads, N, D] here and [1, N, heads, D] in the result."""
    if layout is None:
        raise ValueError(
            "shared_prefix attention was called without a layout: run the model through rlmed.models.policy.Policy, "
            "or load it with another attn_implementation, for example 'sdpa'"
        )
    if query.shape[0] != 1 or attention_mask is not None:
        raise ValueError("shared_prefix attention takes one packed row and no attention mask")
    output = layout.attend(
        module.layer_idx, query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1), scaling
    )
    return output.unsqueeze(0), None


AttentionInterface.register(ATTENTION_NAME, shared_prefix)


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """A row of groups, each `[prompt | completion 1 | ... | completion G]`, for learning.

    Each completion attends to its prompt and, causally, to itself; a prompt attends causally to itself. Gradients flow.
    Tokens are gathered into right-padded rectangles for the dense kernels and scattered back, so padding costs attention
    only, never a matrix product of the model.

    Example:
        `PackedLayout.build([(49, (12, 30)), (51, ())])` lays out a group with two completions and a prompt alone: N = 142.
    """

    prompt_tokens: Tensor
    """int64 [B, P_max]: row index of each prompt token, 0 where padded."""
    completion_tokens: Tensor
    """int64 [S, T_max]: row index of each completion token, 0 where padded."""
    group_of_completion: Tensor
    """int64 [S]: which prompt a completion continues."""
    completion_mask: Tensor
    """bool [S, 1, T_max, P_max + T_max]: True where a completion token may attend; never all False in a row."""
    gather_back: Tensor
    """int64 [N]: index of each row token in the concatenation of the flattened rectangles."""

    @classmethod
    def build(cls, groups: Sequence[tuple[int, Sequence[int]]], device: torch.device | str = "cpu") -> PackedLayout:
        """Lay out groups given as (prompt length >= 1, completion lengths >= 1) in row order."""
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
        tensors = (prompt_tokens, completion_tokens, group_of_completion, mask, gather_back)
        return cls(*(tensor.to(device) for tensor in tensors))

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See `AttentionLayout.attend`."""
        heads, width = query.shape[1:]
        repeats = heads // key.shape[1]
        prompt_query, prompt_key, prompt_value = (
            tensor[self.prompt_tokens].transpose(1, 2) for tensor in (query, key, value)
        )
        prompt_output = _sdpa(prompt_query, prompt_key, prompt_value, scale, repeats, causal=True)
        flat = prompt_output.transpose(1, 2).reshape(-1, heads, width)
        if self.completion_tokens.numel():
            own_query, own_key, own_value = (
                tensor[self.completion_tokens].transpose(1, 2) for tensor in (query, key, value)
            )
            keys = torch.cat([prompt_key[self.group_of_completion], own_key], dim=2)
            values = torch.cat([prompt_value[self.group_of_completion], own_value], dim=2)
            completion_output = _sdpa(own_query, keys, values, scale, repeats, mask=self.completion_mask)
            flat = torch.cat([flat, completion_output.transpose(1, 2).reshape(-1, heads, width)])
        return flat[self.gather_back]


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    repeats: int,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """torch's fused attention on [B, heads, L, D] with grouped keys and values."""
    if repeats > 1:
        key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, scale=scale)


def decode_attention(
    query: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    prefix_mask: Tensor,
    suffix_key: Tensor,
    suffix_value: Tensor,
    suffix_mask: Tensor,
    rows_of_group: Tensor,
    position_of_row: Tensor,
    scale: float,
) -> Tensor:
    """One new token per live completion: its group's prefix, read once for all of them, and its own suffix.

    Both score blocks share one softmax, which is the same as merging two attentions by their log-sum-exp.

    Args:
        query: [R, H, D], one row per live completion.
        prefix_key: [B, H_kv, P, D] of the B live groups.
        prefix_value: [B, H_kv, P, D].
        prefix_mask: float [B, 1, 1, P]; 0 where a prompt token stands, -inf where padded.
        suffix_key: [R, H_kv, T, D], the new token's key included.
        suffix_value: [R, H_kv, T, D].
        suffix_mask: float [R, 1, 1, T].
        rows_of_group: int64 [B, M]: rows of each group, padded with any row.
        position_of_row: int64 [R]: index of each row in the flattened [B, M].
        scale: factor on the scores.

    Returns:
        [R, H, D].
    """
    rows, heads, width = query.shape
    kv_heads, prefix_length = prefix_key.shape[1], prefix_key.shape[2]
    groups, members = rows_of_group.shape
    repeats = heads // kv_heads
    query = (query * scale).view(rows, kv_heads, repeats, width)
    # [B, H_kv, M * repeats, D] against [B, H_kv, P, D]: the M rows of a group share one matrix product
    grouped = query[rows_of_group].transpose(1, 2).reshape(groups, kv_heads, members * repeats, width)
    prefix_scores = grouped @ prefix_key.transpose(2, 3) + prefix_mask
    prefix_scores = prefix_scores.view(groups, kv_heads, members, repeats, prefix_length).transpose(1, 2)
    prefix_scores = prefix_scores.reshape(groups * members, kv_heads, repeats, prefix_length)[position_of_row]
    suffix_scores = query @ suffix_key.transpose(2, 3) + suffix_mask
    weights = torch.cat([prefix_scores, suffix_scores], dim=-1).float().softmax(dim=-1).to(query.dtype)
    prefix_weights, suffix_weights = weights.split([prefix_length, suffix_key.shape[2]], dim=-1)
    grouped_weights = prefix_weights[rows_of_group].transpose(1, 2).reshape(groups, kv_heads, -1, prefix_length)
    prefix_output = (grouped_weights @ prefix_value).view(groups, kv_heads, members, repeats, width).transpose(1, 2)
    prefix_output = prefix_output.reshape(groups * members, kv_heads, repeats, width)[position_of_row]
    return (prefix_output + suffix_weights @ suffix_value).view(rows, heads, width)
