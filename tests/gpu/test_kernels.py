"""Triton kernels against float64: on a CUDA device, or anywhere with TRITON_INTERPRET=1.

`tests/numerics/test_kernels.py` runs this file under Triton's interpreter.
"""

from __future__ import annotations

from tests.gpu.triton_device import DEVICE, INTERPRETED, MARKS

# isort: split

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from rlmed.models.kernels.attention import Parts, attend, merge
from rlmed.models.kernels.layer import add_rms_norm, rope_append, silu_mul
from rlmed.models.kernels.sampling import BLOCK, sample

pytestmark = MARKS
# the interpreter truncates to bfloat16 instead of rounding, and its matrix product reads it as
# integers
DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Largest relative error of rounding to a dtype."""


def draws(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)


@dataclass
class Pages:
    """Random keys and values in pages that lie in no order."""

    keys: Tensor
    values: Tensor
    table: Tensor
    lengths: Tensor

    @classmethod
    def build(cls, lengths: Sequence[int], kv_heads: int, size: int, width: int, dtype: torch.dtype) -> Pages:
        most = max(1, -(-max(lengths) // size)) + 1
        count = len(lengths) * most
        order = torch.randperm(count, generator=torch.Generator().manual_seed(3))
        return cls(
            keys=draws(count, kv_heads, size, width, dtype=dtype, seed=1),
            values=draws(count, kv_heads, size, width, dtype=dtype, seed=2),
            table=order.view(len(lengths), most).to(torch.int32).to(DEVICE),
            lengths=torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
        )

    def of(self, group: int) -> tuple[Tensor, Tensor]:
        """Return the float64 keys and values of a group, each [H_kv, length, D]."""
        pages, length = self.table[group].long(), int(self.lengths[group])
        keys, values = (store[pages].transpose(0, 1).flatten(1, 2)[:, :length] for store in (self.keys, self.values))
        return keys.double(), values.double()


def table_of(rows: Sequence[Sequence[int]]) -> Tensor:
    widest = max(map(len, rows))
    padded = [[*group, *[-1] * (widest - len(group))] for group in rows]
    return torch.tensor(padded, dtype=torch.int32, device=DEVICE)


def attention(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Return the float64 attention [H, D] of one row's query [H, D] over its tokens [H_kv, T,
    D].
    """
    repeats = len(query) // len(keys)
    keys, values = keys.repeat_interleave(repeats, 0), values.repeat_interleave(repeats, 0)
    scores = torch.einsum("hd,htd->ht", query.double(), keys) * scale
    return torch.einsum("ht,htd->hd", scores.softmax(-1), values)


CASES = {
    "ragged": ([70, 3, 129], [[0, 3, 5], [1], [2, 4]], [0, 5, 17, 64, 1, 40]),
    "one_completion": ([33, 64], [[1], [0]], [9, 0]),
    "empty_prompt_slot": ([0, 12], [[], [0, 1]], [3, 4]),
    "free_row": ([20], [[0, 2]], [6, 0, 1]),
    "many_rows": ([40], [list(range(24))], [2] * 24),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "splits"), [((4, 2, 64), 1), ((12, 2, 40), 3), ((3, 3, 16), 2)])
@pytest.mark.parametrize("case", CASES)
def test_decode_attention(case: str, shape: tuple[int, int, int], splits: int, dtype: torch.dtype) -> None:
    prompt_lengths, rows, own_lengths = CASES[case]
    heads, kv_heads, width = shape
    query = draws(len(own_lengths), heads, width, dtype=dtype) * 2
    prompts = Pages.build(prompt_lengths, kv_heads, 16, width, dtype)
    own = Pages.build(own_lengths, kv_heads, 8, width, dtype)
    scale = width**-0.5

    parts = Parts(2 * splits, query)
    parts.outputs.fill_(float("nan"))  # what the memory may hold
    attend(query, prompts.keys, prompts.values, prompts.table, prompts.lengths, table_of(rows), scale, parts, 0, splits)
    alone = table_of([[row] for row in range(len(own_lengths))])
    attend(query, own.keys, own.values, own.table, own.lengths, alone, scale, parts, splits, splits)
    merged = merge(parts, dtype)

    group_of = {row: group for group, members in enumerate(rows) for row in members}
    for row in range(len(own_lengths)):
        keys, values = own.of(row)
        if row in group_of:
            prompt = prompts.of(group_of[row])
            keys, values = torch.cat([prompt[0], keys], 1), torch.cat([prompt[1], values], 1)
        expected = attention(query[row], keys, values, scale) if keys.shape[1] else torch.zeros(heads, width)
        # weights and result are rounded to the dtype; sums and exponentials add a few float32
        # roundings
        bound = 2 * UNIT[dtype] * float(values.abs().max() if values.numel() else 1) + 2e-6
        assert (merged[row].double() - expected.to(DEVICE)).abs().max() <= bound


def test_attention_of_scores_as_large_as_in_real_models() -> None:
    """Scores near -120, as real heads have: with the scores rounded to half precision this is off
    by percents.
    """
    dtype = torch.float16
    query, pages = draws(2, 2, 64, dtype=dtype), Pages.build([90], 1, 16, 64, dtype)
    pages.keys -= 4 * query[0, 0].sign()
    parts = Parts(1, query)
    attend(query, pages.keys, pages.values, pages.table, pages.lengths, table_of([[0, 1]]), 0.5, parts, 0, 1)
    keys, values = pages.of(0)
    expected = torch.stack([attention(row, keys, values, 0.5) for row in query])
    assert float((torch.einsum("d,htd->ht", query[0, 0].double(), keys) * 0.5).min()) < -90
    assert (merge(parts, dtype) - expected).abs().max() <= 2 * UNIT[dtype] * values.abs().max() + 2e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("delta", [True, False])
def test_add_rms_norm(delta: bool, dtype: torch.dtype) -> None:
    residual, weight = draws(5, 100, dtype=dtype) * 30, draws(100, dtype=dtype, seed=2)
    change = draws(5, 100, dtype=dtype, seed=1) if delta else None
    summed = residual + change if change is not None else residual.clone()
    normal = add_rms_norm(residual, change, weight, 1e-6)
    wide = summed.double()
    expected = wide * (wide.square().mean(1, keepdim=True) + 1e-6).rsqrt() * weight.double()
    assert torch.equal(residual, summed)
    assert ((normal - expected).abs() <= 2.5 * UNIT[dtype] * expected.abs() + 1e-6).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_silu_mul(dtype: torch.dtype) -> None:
    gate_up = draws(3, 2 * 1500, dtype=dtype) * 6
    gate, up = gate_up.double().chunk(2, dim=1)
    expected = torch.nn.functional.silu(gate) * up
    assert ((silu_mul(gate_up) - expected).abs() <= 2.5 * UNIT[dtype] * expected.abs() + 1e-6).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [64, 40])
def test_rope_append(width: int, dtype: torch.dtype) -> None:
    heads, kv_heads, lengths = 6, 2, [0, 7, -1, 8]
    packed = draws(4, (heads + 2 * kv_heads) * width, dtype=dtype)  # as one product gives them
    before = packed.clone()
    query, key, value = (
        part.unflatten(1, (-1, width)) for part in packed.split([n * width for n in (heads, kv_heads, kv_heads)], 1)
    )
    angles = draws(4, width // 2, seed=4).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    pages = Pages.build([max(1, length) for length in lengths], kv_heads, 8, width, dtype)
    untouched = [pages.keys.clone(), pages.values.clone()]
    rope_append(
        query,
        key,
        value,
        cos,
        sin,
        pages.keys,
        pages.values,
        pages.table,
        torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
    )

    def rotated(x: Tensor) -> Tensor:
        low, high = x.double().chunk(2, dim=-1)
        return x.double() * cos.double().unsqueeze(1) + torch.cat([-high, low], -1) * sin.double().unsqueeze(1)

    old_query, old_key, old_value = (
        part.unflatten(1, (-1, width)) for part in before.split([n * width for n in (heads, kv_heads, kv_heads)], 1)
    )
    bound = 2 * UNIT[dtype] * float(before.abs().max()) * 2
    assert (query - rotated(old_query)).abs().max() <= bound
    new_key = rotated(old_key)
    for row, length in enumerate(lengths):
        if length < 0:
            continue
        page, slot = int(pages.table[row, length // 8]), length % 8
        assert (pages.keys[page, :, slot] - new_key[row]).abs().max() <= bound
        assert torch.equal(pages.values[page, :, slot], old_value[row])
        untouched[0][page, :, slot] = pages.keys[page, :, slot]
        untouched[1][page, :, slot] = pages.values[page, :, slot]
    assert torch.equal(untouched[0], pages.keys)
    assert torch.equal(untouched[1], pages.values)


@pytest.mark.parametrize("vocabulary", [5, BLOCK, 3 * BLOCK + 77])
def test_sampled_tokens_are_those_of_inversion(vocabulary: int) -> None:
    rows = 64
    logits = draws(rows, vocabulary) * 3
    logits[:, 1] = float("-inf")
    if vocabulary > 2 * BLOCK:
        logits[:, BLOCK : 2 * BLOCK] = float("-inf")  # a whole block is banned
    uniform = torch.rand(rows, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(DEVICE)
    uniform[0], uniform[1] = 0.0, 1 - 2.0**-53
    temperature = torch.full((rows,), 0.7, device=DEVICE)
    greedy = torch.zeros(rows, dtype=torch.bool, device=DEVICE)
    greedy[2] = True
    tokens, logprobs = sample(logits, uniform, temperature, greedy)

    exact = (logits.double() / temperature[:, None].double()).log_softmax(-1)
    ends = exact.exp().cumsum(-1)
    assert tokens[2] == logits[2].argmax()
    for row in range(rows):
        token = int(tokens[row])
        assert exact[row, token] > float("-inf")
        assert abs(logprobs[row] - exact[row, token]) <= 2e-6 * max(1.0, abs(float(exact[row, token])))
        if not greedy[row]:
            # float32 exponentials move the end of a token's interval by up to 1e-6
            start = float(ends[row, token] - exact[row, token].exp())
            assert start - 1e-6 <= float(uniform[row]) <= float(ends[row, token]) + 1e-6


def test_rare_tokens_are_sampled() -> None:
    """A token of probability 1e-9 at the end of a large vocabulary, whose interval float32 sums
    would swallow.
    """
    logits = torch.zeros(2, 8 * BLOCK, device=DEVICE)
    logits[:, -1] = -11.7
    probability = float(logits[0].double().softmax(0)[-1])
    uniform = torch.tensor([1 - probability / 2, 1 - 2 * probability], dtype=torch.float64, device=DEVICE)
    tokens, _ = sample(logits, uniform, torch.ones(2, device=DEVICE), torch.zeros(2, dtype=torch.bool, device=DEVICE))
    assert tokens.tolist() == [8 * BLOCK - 1, 8 * BLOCK - 2]
