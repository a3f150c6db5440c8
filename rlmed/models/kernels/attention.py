"""Attention of decode steps in Triton: pages of keys and values, each read once for all its rows.

A step's attention is a merge of two: that of all rows of a group over the group's prompt, whose
keys and values are read once (as in Hydragen, arXiv 2402.05099), and that of each row over its own
completion. Both are `attend`, with as many groups as prompts and with one group per row. Keys and
values lie in pages that a table names (arXiv 2309.06180). Long sequences are split among programs;
`merge` weighs the parts by their log-sum-exp. Softmax and sums are float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634
MIN_DOT = 16
"""Smallest extent of a matrix product on tensor cores."""


class Parts:
    """Outputs of several attentions of the same R x H queries, and their log-sum-exps.

    Example:
        >>> parts = Parts(2, torch.zeros(8, 4, 64))
        >>> parts.outputs.shape, parts.lse.shape
        (torch.Size([2, 8, 4, 64]), torch.Size([2, 8, 4]))
    """

    def __init__(self, count: int, query: Tensor) -> None:
        """Make room for `count` parts of query [R, H, D]; all of them are empty."""
        self.outputs = query.new_empty(count, *query.shape, dtype=torch.float32)
        """float32 [count, R, H, D]; undefined where `lse` is -inf."""
        self.lse = query.new_full((count, *query.shape[:2]), float("-inf"), dtype=torch.float32)
        """float32 [count, R, H], natural logarithm; -inf where a row attends to nothing."""


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    pages: Tensor,
    lengths: Tensor,
    rows: Tensor,
    scale: float,
    parts: Parts,
    first: int,
    splits: int,
) -> None:
    """Write the attention of each group's rows over the group's tokens into `parts`.

    Args:
        query: [R, H, D].
        keys: [pages, H_kv, page size, D]; H is a multiple of H_kv. Any strides, but 1 in D.
        values: the same shape.
        pages: int32 [B, most pages]: the pages of each group, in order.
        lengths: int32 [B]: tokens of each group; 0 for a free slot.
        rows: int32 [B, M]: the rows of each group; -1 where there are fewer.
        scale: factor on the scores.
        parts: receives `splits` parts from index `first` on.
        first: index of the first part.
        splits: programs that share a group's tokens.
    """
    heads, width = query.shape[1:]
    kv_heads, page_size = keys.shape[1:3]
    repeats = heads // kv_heads
    queries = rows.shape[1] * repeats
    block_m = min(64, max(MIN_DOT, triton.next_power_of_2(queries)))
    grid = (len(lengths) * kv_heads, triton.cdiv(queries, block_m), splits)
    tensors = (query, keys, values, pages, lengths, rows, parts.outputs[first], parts.lse[first])
    strides = (*query.stride()[:2], *keys.stride()[:3], *values.stride()[:3], pages.stride(0), rows.stride(0))
    _attend[grid](
        *tensors,
        scale * LOG2_E,
        rows.shape[1],
        page_size,
        *strides,
        parts.outputs.stride(0),
        parts.lse.stride(0),
        HEADS=heads,
        KV_HEADS=kv_heads,
        WIDTH=width,
        BLOCK_M=block_m,
        BLOCK_N=64 if width <= 128 else 32,
        BLOCK_D=max(MIN_DOT, triton.next_power_of_2(width)),
    )


# fmt: off
@triton.jit
def _attend(
    query, keys, values, pages, lengths, rows, outputs, lse, scale, members, page_size,
    query_row, query_head, key_page, key_head, key_token, value_page, value_head, value_token,
    pages_group, rows_group, outputs_part, lse_part,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    repeats: tl.constexpr = HEADS // KV_HEADS
    group = tl.program_id(0) // KV_HEADS
    kv_head = tl.program_id(0) % KV_HEADS
    part = tl.program_id(2)
    length = tl.load(lengths + group)
    share = tl.cdiv(tl.cdiv(length, tl.num_programs(2)), BLOCK_N) * BLOCK_N
    start = part * share
    end = tl.minimum(start + share, length)
    if start >= end:
        return

    lane = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    member = lane // repeats
    row = tl.load(rows + group * rows_group + member, mask=member < members, other=-1).to(tl.int64)
    live = row >= 0
    head = kv_head * repeats + lane % repeats
    channel = tl.arange(0, BLOCK_D)
    inside = channel < WIDTH
    q = tl.load(
        query + row[:, None] * query_row + head[:, None] * query_head + channel[None, :],
        mask=live[:, None] & inside[None, :],
        other=0.0,
    )
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    output = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(start, end, BLOCK_N):
        token = first + tl.arange(0, BLOCK_N)
        present = token < end
        page = tl.load(pages + group * pages_group + token // page_size, mask=present, other=0).to(tl.int64)
        slot = token % page_size
        key_tokens = keys + kv_head * key_head + page * key_page + slot * key_token
        value_tokens = values + kv_head * value_head + page * value_page + slot * value_token
        seen = present[:, None] & inside[None, :]
        k = tl.load(key_tokens[:, None] + channel[None, :], mask=seen, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(present[None, :], scores, float("-inf"))
        new = tl.maximum(largest, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new[:, None])
        shrink = tl.exp2(largest - new)
        v = tl.load(value_tokens[:, None] + channel[None, :], mask=seen, other=0.0)
        output = output * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        total = total * shrink + tl.sum(weights, axis=1)
        largest = new
    tl.store(
        outputs + part * outputs_part + (row[:, None] * HEADS + head[:, None]) * WIDTH + channel[None, :],
        output / total[:, None],
        mask=live[:, None] & inside[None, :],
    )
    ln_2: tl.constexpr = 0.6931471805599453
    tl.store(lse + part * lse_part + row * HEADS + head, (largest + tl.log2(total)) * ln_2, mask=live)


def merge(parts: Parts, dtype: torch.dtype) -> Tensor:
    """Return the attention over all parts' tokens, [R, H, D] in `dtype`; 0 where all are empty."""
    count, rows, heads, width = parts.outputs.shape
    merged = parts.outputs.new_empty(rows, heads, width, dtype=dtype)
    _merge[(rows * heads,)](
        parts.outputs,
        parts.lse,
        merged,
        rows * heads,
        WIDTH=width,
        PARTS=count,
        BLOCK_P=triton.next_power_of_2(count),
        BLOCK_D=triton.next_power_of_2(width),
    )
    return merged


@triton.jit
def _merge(
    outputs,
    lse,
    merged,
    queries,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK_P)
    channel = tl.arange(0, BLOCK_D)
    each = tl.load(lse + part * queries + index, mask=part < PARTS, other=float("-inf"))
    filled = each > float("-inf")
    # all parts empty: any finite number instead of -inf keeps NaN out
    largest = tl.maximum(tl.max(each, axis=0), -1e38)
    weights = tl.where(filled, tl.exp(each - largest), 0.0)
    values = tl.load(
        outputs + (part[:, None] * queries + index) * WIDTH + channel[None, :],
        mask=filled[:, None] & (channel < WIDTH)[None, :],
        other=0.0,
    )
    total = tl.maximum(tl.sum(weights, axis=0), 1e-38)
    result = tl.sum(weights[:, None] * values, axis=0) / total
    tl.store(merged + index * WIDTH + channel, result.to(merged.dtype.element_ty), mask=channel < WIDTH)
