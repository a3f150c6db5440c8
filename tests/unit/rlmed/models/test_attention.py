"""The packed layout against dense attention under a mask that is written token by token, gradients included."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from rlmed.models.attention import ATTENTION_NAME, PackedLayout, shared_prefix
from tests.rounding import rounding

HEADS, KV_HEADS, WIDTH = 4, 2, 3
SCALE = 0.6
ROUNDING = rounding(100, 30, torch.float64)
"""Up to 84 tokens are summed over, with gradients up to 30."""
GROUPS = st.lists(st.tuples(st.integers(1, 5), st.lists(st.integers(1, 4), max_size=4)), min_size=1, max_size=4)


def allowed(groups):
    """bool [N, N]: may row token i attend to row token j."""
    owners = []  # (group, completion or -1) of each token
    for group, (prompt, completions) in enumerate(groups):
        owners += [(group, -1)] * prompt
        for number, length in enumerate(completions):
            owners += [(group, number)] * length
    n = len(owners)
    mask = torch.zeros(n, n, dtype=torch.bool)
    for i in range(n):
        for j in range(i + 1):
            mask[i, j] = owners[j] in (owners[i], (owners[i][0], -1))
    return mask


def dense_attention(query, key, value, mask):
    """[N, H, D] by the definition."""
    key, value = (tensor.repeat_interleave(HEADS // KV_HEADS, dim=1) for tensor in (key, value))
    scores = torch.einsum("ihd,jhd->hij", query, key) * SCALE
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(~mask, -math.inf).softmax(-1), value)


def row_tensors(groups):
    n = sum(prompt + sum(completions) for prompt, completions in groups)
    generator = torch.Generator().manual_seed(n)
    return [
        torch.randn(n, heads, WIDTH, generator=generator, dtype=torch.float64, requires_grad=True)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]


def test_the_mask_of_a_small_row_by_hand():
    # prompt a b, completions c d and e: e sees the prompt and itself, not c and d
    assert allowed([(2, [2, 1])]).int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]


@settings(deadline=None, max_examples=60)
@given(GROUPS)
def test_packed_attention_and_its_gradients_are_those_of_dense_attention(groups):
    tensors = row_tensors(groups)
    actual = PackedLayout.build(groups).attend(0, *tensors, SCALE)
    expected = dense_attention(*tensors, allowed(groups))
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
    # the padded places of the rectangles hold row token 0; what stands there must not matter elsewhere
    groups = [(1, [1]), (4, [3, 1])]
    tensors = row_tensors(groups)
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
