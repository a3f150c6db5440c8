"""The packed layout against dense attention under a mask that is written token by token, gradients included."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from rlmed.models.attention import ATTENTION_NAME, PackedLayout, shared_prefix
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


@settings(deadline=None, max_examples=60)
@given(GROUPS)
def test_packed_attention_and_its_gradients_are_those_of_dense_attention(groups):
    tensors = row_tensors(groups, *SIZES)
    actual = PackedLayout.build(groups).attend(0, *tensors, SCALE)
    expected = dense_attention(*tensors, allowed(groups), SCALE)
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
