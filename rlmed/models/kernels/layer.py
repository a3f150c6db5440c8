"""Triton kernels of a decoder layer beside its matrix products: norm, rotary embedding, gate."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def add_rms_norm(residual: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float) -> Tensor:
    """Add `delta` to `residual` in place and return its root-mean-square norm.

    As transformers does, the sum is rounded to its dtype, normalised in float32, rounded again, and
    multiplied by the weight (Zhang and Sennrich 2019).

    Args:
        residual: [R, K], contiguous; changed in place.
        delta: [R, K], contiguous, or None to add nothing.
        weight: [K].
        epsilon: added to the mean square.

    Returns:
        [R, K] in the dtype of `residual`.
    """
    normal = torch.empty_like(residual)
    width = residual.shape[1]
    _add_rms_norm[(len(residual),)](
        residual,
        residual if delta is None else delta,
        weight,
        normal,
        epsilon,
        WIDTH=width,
        BLOCK=triton.next_power_of_2(width),
        ADD=delta is not None,
    )
    return normal


@triton.jit
def _add_rms_norm(
    residual, delta, weight, normal, epsilon, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr
):
    channel = tl.arange(0, BLOCK)
    inside = channel < WIDTH
    at = tl.program_id(0).to(tl.int64) * WIDTH + channel
    dtype = residual.dtype.element_ty
    x = tl.load(residual + at, mask=inside, other=0.0)
    if ADD:
        x = (x.to(tl.float32) + tl.load(delta + at, mask=inside, other=0.0).to(tl.float32)).to(dtype)
        tl.store(residual + at, x, mask=inside)
    wide = x.to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=0) / WIDTH + epsilon)
    scaled = (wide * inverse).to(dtype).to(tl.float32)
    factor = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(normal + at, (scaled * factor).to(dtype), mask=inside)


def silu_mul(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up (Shazeer 2020) for gate and up side by side in [R, 2 I]: [R, I]."""
    rows, double = gate_up.shape
    product = gate_up.new_empty(rows, double // 2)
    block = 1024
    _silu_mul[(rows, triton.cdiv(double // 2, block))](gate_up, product, gate_up.stride(0), double // 2, BLOCK=block)
    return product


@triton.jit
def _silu_mul(gate_up, product, gate_up_row, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < width
    dtype = product.dtype.element_ty
    gate = tl.load(gate_up + row * gate_up_row + channel, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * gate_up_row + width + channel, mask=inside, other=0.0).to(tl.float32)
    # rounded between the two operations, as in transformers' modules
    activated = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(product + row * width + channel, (activated * up).to(dtype), mask=inside)


def rope_append(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    pages: Tensor,
    lengths: Tensor,
) -> None:
    """Rotate queries and keys (Su et al. 2021) and append keys and values to their rows' pages.

    Args:
        query: [R, H, D], rotated in place; any strides, but 1 in D.
        key: [R, H_kv, D]; any strides, but 1 in D.
        value: the same.
        cos: [R, D], both halves equal; contiguous.
        sin: the same.
        keys: [pages, H_kv, page size, D], contiguous in D; written at each row's next slot.
        values: the same.
        pages: int32 [R, most pages]: the pages of each row, in order.
        lengths: int32 [R]: tokens of each row so far; negative for a free row, which appends
            nothing.
    """
    rows, heads, width = query.shape
    kv_heads, page_size = keys.shape[1:3]
    _rope_append[(rows, heads + kv_heads)](
        query,
        key,
        value,
        cos,
        sin,
        keys,
        values,
        pages,
        lengths,
        page_size,
        *query.stride()[:2],
        *key.stride()[:2],
        *value.stride()[:2],
        *keys.stride()[:3],
        *values.stride()[:3],
        pages.stride(0),
        HEADS=heads,
        WIDTH=width,
        BLOCK=triton.next_power_of_2(width // 2),
    )


# fmt: off
@triton.jit
def _rope_append(
    query, key, value, cos, sin, keys, values, pages, lengths, page_size,
    query_row, query_head, key_row, key_head, value_row, value_head,
    keys_page, keys_head, keys_token, values_page, values_head, values_token, pages_row,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):
    # fmt: on
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    half: tl.constexpr = WIDTH // 2
    low = tl.arange(0, BLOCK)
    inside = low < half
    high = low + half
    c_low = tl.load(cos + row * WIDTH + low, mask=inside, other=0.0).to(tl.float32)
    s_low = tl.load(sin + row * WIDTH + low, mask=inside, other=0.0).to(tl.float32)
    c_high = tl.load(cos + row * WIDTH + high, mask=inside, other=0.0).to(tl.float32)
    s_high = tl.load(sin + row * WIDTH + high, mask=inside, other=0.0).to(tl.float32)
    if head < HEADS:
        at = query + row * query_row + head * query_head
        x = tl.load(at + low, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(at + high, mask=inside, other=0.0).to(tl.float32)
        tl.store(at + low, (x * c_low - y * s_low).to(query.dtype.element_ty), mask=inside)
        tl.store(at + high, (y * c_high + x * s_high).to(query.dtype.element_ty), mask=inside)
        return
    length = tl.load(lengths + row)
    if length < 0:
        return
    kv_head = head - HEADS
    page = tl.load(pages + row * pages_row + length // page_size).to(tl.int64)
    slot = length % page_size
    at = key + row * key_row + kv_head * key_head
    x = tl.load(at + low, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(at + high, mask=inside, other=0.0).to(tl.float32)
    to = keys + page * keys_page + kv_head * keys_head + slot * keys_token
    tl.store(to + low, (x * c_low - y * s_low).to(keys.dtype.element_ty), mask=inside)
    tl.store(to + high, (y * c_high + x * s_high).to(keys.dtype.element_ty), mask=inside)
    source = value + row * value_row + kv_head * value_head
    to = values + page * values_page + kv_head * values_head + slot * values_token
    tl.store(to + low, tl.load(source + low, mask=inside, other=0.0), mask=inside)
    tl.store(to + high, tl.load(source + high, mask=inside, other=0.0), mask=inside)
