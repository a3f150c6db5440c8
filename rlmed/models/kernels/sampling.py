"""Sampling in Triton: two passes over the logits, one of them over a single block of each row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Tokens of the vocabulary per program of the first pass."""


def sample(logits: Tensor, uniform: Tensor, temperature: Tensor, greedy: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inversion.

    The first pass reduces each block of the vocabulary to its maximum and its sum of exponentials;
    the second finds the block by their cumulative sum in float64, then the token in it. In float32
    a cumulative sum over 100,000 tokens would lose the rare ones.

    Args:
        logits: float32 [R, V], contiguous; -inf where a token cannot be sampled.
        uniform: float64 [R] in [0, 1).
        temperature: float32 [R], positive.
        greedy: bool [R]: take the most likely token (the first of them) instead.

    Returns:
        int64 [R] tokens and float32 [R] log-probabilities at the row's temperature.
    """
    rows, vocabulary = logits.shape
    blocks = triton.cdiv(vocabulary, BLOCK)
    largest = logits.new_empty(rows, blocks)
    sums = logits.new_empty(rows, blocks, dtype=torch.float64)
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    logprobs = logits.new_empty(rows)
    _reduce[(rows, blocks)](logits, temperature, largest, sums, vocabulary, blocks, BLOCK=BLOCK)
    _draw[(rows,)](
        logits,
        uniform,
        temperature,
        greedy,
        largest,
        sums,
        tokens,
        logprobs,
        vocabulary,
        blocks,
        BLOCK=BLOCK,
        BLOCKS=triton.next_power_of_2(blocks),
    )
    return tokens, logprobs


@triton.jit
def _reduce(logits, temperature, largest, sums, vocabulary, blocks, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    token = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * vocabulary + token, mask=token < vocabulary, other=float("-inf"))
    x = x / tl.load(temperature + row)
    most = tl.max(x, axis=0)
    # a block of banned tokens only: any finite number instead of -inf keeps NaN out
    weights = tl.exp(x - tl.maximum(most, -1e38))
    tl.store(largest + row * blocks + block, most)
    tl.store(sums + row * blocks + block, tl.sum(weights.to(tl.float64), axis=0))


@triton.jit
def _draw(
    logits,
    uniform,
    temperature,
    greedy,
    largest,
    sums,
    tokens,
    logprobs,
    vocabulary,
    blocks,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCKS)
    most = tl.load(largest + row * blocks + index, mask=index < blocks, other=float("-inf"))
    peak = tl.max(most, axis=0)
    share = tl.load(sums + row * blocks + index, mask=index < blocks, other=0.0)
    share = share * tl.exp((most - peak).to(tl.float64))
    ends = tl.cumsum(share, axis=0)
    mass = tl.sum(share, axis=0)
    threshold = tl.load(uniform + row) * mass
    # the last block that has mass, should rounding put the threshold at or above the end
    last = tl.max(tl.where(share > 0, index, 0), axis=0)
    block = tl.minimum(tl.sum((ends <= threshold).to(tl.int32), axis=0), last)
    before = tl.sum(tl.where(index < block, share, 0.0), axis=0)
    if tl.load(greedy + row) != 0:
        block = tl.min(tl.where(most == peak, index, BLOCKS), axis=0)

    token = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * vocabulary + token, mask=token < vocabulary, other=float("-inf"))
    x = x / tl.load(temperature + row)
    weights = tl.exp((x - peak).to(tl.float64))
    inside = tl.cumsum(weights, axis=0)
    last = tl.max(tl.where(weights > 0, token, 0), axis=0)
    drawn = block * BLOCK + tl.sum((before + inside <= threshold).to(tl.int32), axis=0)
    drawn = tl.minimum(drawn, last)
    if tl.load(greedy + row) != 0:
        drawn = tl.min(tl.where(x == peak, token, vocabulary), axis=0)
    chosen = tl.sum(tl.where(token == drawn, x, 0.0), axis=0)
    tl.store(tokens + row, drawn.to(tl.int64))
    tl.store(logprobs + row, chosen - peak - tl.log(mass).to(tl.float32))
