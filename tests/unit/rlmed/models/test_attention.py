"""The packed layout against dense attention, mask written token by token; gradients included."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from rlmed.models import attention
from rlmed.models.attention import ATTENTION_NAME, GroupTable, PackedLayout, decode_attention, shared_prefix
from tests.dense_attention import allowed, dense_attention, row_tensors
from tests.rounding import rounding

HEADS, KV_HEADS, WIDTH = SIZES = 4, 2, 3
SCALE = 0.6
ROUNDING = rounding(100, 30, torch.float64)
"""Up to 84 tokens are summed over, with gradients up to 30."""
GROUPS = st.lists(st.tuples(st.integers(1, 5), st.lists(st.integers(1, 4), max_size=4)), min_size=1, max_size=4)


def test_the_mask_of_a_small_row_by_hand():
    # prompt a b, completions c d and e: e sees the prompt and itself, not c and d
    assert allowed([(2, [2, 1])]).int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]


def test_the_mask_of_a_window_and_a_block_by_hand():
    # prompt a B C d, completion e: B and C are an image; nobody sees beyond two tokens behind
    marked = torch.tensor([0, 1, 1, 0, 0], dtype=torch.bool)
    assert allowed([(4, [1])], window=3, both_ways=marked).int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 1, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]


@settings(deadline=None, max_examples=60)
@given(GROUPS, st.none() | st.integers(1, 10), st.none() | st.integers(0, 2**32))
def test_packed_attention_and_its_gradients_are_those_of_dense_attention(groups, window, seed):
    tensors = row_tensors(groups, *SIZES)
    marked = None
    if seed is not None:  # images in prompts; a completion has none
        of_prompt = [part for prompt, lengths in groups for part in ([True] * prompt, [False] * sum(lengths))]
        drawn = torch.rand(len(tensors[0]), generator=torch.Generator().manual_seed(seed)) < 0.6
        marked = torch.tensor([own for part in of_prompt for own in part]) & drawn
    actual = PackedLayout.build(groups, both_ways=marked).attend(0, *tensors, SCALE, window)
    expected = dense_attention(*tensors, allowed(groups, window=window, both_ways=marked), SCALE)
    torch.testing.assert_close(actual, expected, atol=ROUNDING, rtol=0)
    weights = torch.randn(actual.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for one, other in zip(
        torch.autograd.grad((actual * weights).sum(), tensors),
        torch.autograd.grad((expected * weights).sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=ROUNDING, rtol=0)


@given(GROUPS)
def test_every_token_of_the_row_is_in_the_rectangles_once(groups):
    layout = PackedLayout.build(groups)
    flat = torch.cat([layout.prompt_tokens.flatten(), layout.completion_tokens.flatten()])
    n = sum(prompt + sum(completions) for prompt, completions in groups)
    assert flat[layout.gather_back].tolist() == list(range(n))
    assert layout.completion_mask.any(-1).all()


def test_padding_cannot_be_seen():
    # the padded places of the rectangles hold row token 0; what stands there must not matter
    # elsewhere
    groups = [(1, [1]), (4, [3, 1])]
    tensors = row_tensors(groups, *SIZES)
    layout = PackedLayout.build(groups)
    with torch.no_grad():
        before = layout.attend(0, *tensors, SCALE)
        for tensor in tensors:
            tensor[0] += 100
        after = layout.attend(0, *tensors, SCALE)
    assert torch.equal(before[2:], after[2:])
    assert not torch.equal(before[:2], after[:2])


def test_the_function_is_registered_under_its_name_and_says_what_it_needs(tiny_folder):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder("qwen2"), attn_implementation=ATTENTION_NAME)
    with pytest.raises(ValueError, match="without a layout"):
        model(torch.tensor([[1, 2, 3]]))
    layout = PackedLayout.build([(3, ())])
    with pytest.raises(ValueError, match="one packed row"):
        model(torch.tensor([[1, 2, 3], [4, 5, 6]]), layout=layout)
    mask = torch.zeros(1, 1, 3, 3)
    query = torch.zeros(1, HEADS, 3, WIDTH)
    with pytest.raises(ValueError, match="no attention mask"):
        shared_prefix(model, query, query, query, mask, SCALE, layout=layout)


def test_beyond_the_cpu_a_mask_goes_with_a_key_for_every_head(monkeypatch):
    # CUDA has fused kernels for grouped heads and for masks, not for both; meta tensors take its
    # branches without its numbers
    calls = []

    def record(query, key, value, *, attn_mask, enable_gqa, **_):
        calls.append((attn_mask is not None, key.shape[1], value.shape[1], enable_gqa))
        return query

    monkeypatch.setattr(attention, "scaled_dot_product_attention", record)
    groups = [(3, [2, 1]), (2, [])]
    for device in ("meta", "cpu"):
        row = [tensor.to(device) for tensor in row_tensors(groups, *SIZES)]
        PackedLayout.build(groups, device).attend(0, *row, SCALE)
    on_meta, on_cpu = calls[:2], calls[2:]
    assert on_meta == [(False, KV_HEADS, KV_HEADS, True), (True, HEADS, HEADS, False)]
    assert on_cpu == [(False, KV_HEADS, KV_HEADS, True), (True, KV_HEADS, KV_HEADS, True)]


def decode(common_logit, dtype, device="cpu"):
    """Output [R, H, D] of three rows, two groups, scores near `common_logit`; inputs bfloat16."""
    generator = torch.Generator().manual_seed(0)
    shapes = (3, HEADS), (2, KV_HEADS, 40), (2, KV_HEADS, 40), (3, KV_HEADS, 9), (3, KV_HEADS, 9)
    tensors = [torch.randn(*shape, 64, generator=generator) for shape in shapes]
    query, prefix_key, _, suffix_key, _ = tensors
    query[..., 0], prefix_key[..., 0], suffix_key[..., 0] = 8, common_logit, common_logit
    query, *caches = (tensor.to(device, torch.bfloat16).to(dtype) for tensor in tensors)
    mask = torch.where(torch.arange(40) < torch.tensor([[40], [31]]), 0.0, -torch.inf)
    mask = mask.repeat_interleave(KV_HEADS, dim=0).unsqueeze(1).to(device, dtype)
    table = GroupTable.build([0, 1, 1], 2, device)
    return decode_attention(query, *caches[:2], mask, *caches[2:], None, table, 1 / 8)


@pytest.mark.parametrize("common_logit", [0, 20, -120])
def test_decoding_in_bfloat16_does_not_round_the_scores(common_logit):
    # the heads of real models sit near -120
    found, right = (decode(common_logit, dtype).double() for dtype in (torch.bfloat16, torch.float64))
    # weights, the two products and their sum are rounded, each by 0.2 % at most
    assert float((found - right).norm() / right.norm()) < 0.005


def test_decoding_beyond_the_cpu_lets_the_product_write_float32(monkeypatch):
    products = []
    multiply = torch.bmm
    monkeypatch.setattr(
        torch, "bmm", lambda *factors, **options: products.append(options) or multiply(*factors, **options)
    )
    assert decode(0, torch.bfloat16, "meta").dtype == torch.bfloat16
    # scores of prefix and suffix, then their products with values
    assert products == [{"out_dtype": torch.float32}] * 2 + [{}] * 2
