"""The row of a micro-batch worked by hand, and how items are split under a token budget."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.packing import PackItem, TrainSequence, pack, split_by_tokens
from rlmed.core.types import Completion, Example, Prompt

PLAIN = Example("q1", None, "?", ("a", "b"), 0)


def sequence(token_ids, advantage=1.0, *, trained=True, logprob=-0.5):
    token_ids = np.array(token_ids, dtype=np.int64)
    logprobs = np.full(len(token_ids), logprob, dtype=np.float32)
    return TrainSequence(Completion(token_ids, logprobs, "", "stop"), advantage, trained)


def text_prompt(*token_ids):
    return Prompt(PLAIN, "", np.array(token_ids, dtype=np.int64))


def item_of_lengths(prompt_length, lengths):
    return PackItem(text_prompt(*range(prompt_length)), tuple(sequence(range(length)) for length in lengths))


def test_a_text_row_worked_by_hand(tiny_policy):
    items = [
        PackItem(
            text_prompt(101, 102, 103),
            (
                sequence([1, 2, 3], 0.5, logprob=-1.0),
                sequence([4], -0.5, logprob=-2.0),
                sequence([5, 6], 2.0, trained=False),
            ),
        ),
        PackItem(text_prompt(104, 105), (sequence([7, 8], -1.0, logprob=-4.0),)),
    ]
    batch = pack(items, tiny_policy("qwen2"))
    # a completion's last token is a target but is never fed: [4] feeds nothing
    assert batch.token_ids.tolist() == [101, 102, 103, 1, 2, 5, 104, 105, 7]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 2]]
    # each completion's first token is predicted by the last token of its prompt, row 2 or row 7
    assert batch.targets.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert batch.predictors.tolist() == [2, 3, 4, 2, 2, 5, 7, 8]
    assert batch.sequence_ids.tolist() == [0, 0, 0, 1, 2, 2, 3, 3]
    assert batch.advantages.tolist() == [0.5, -0.5, 2.0, -1.0]
    assert batch.loss_mask.tolist() == [True] * 4 + [False] * 2 + [True] * 2
    assert batch.rollout_logprobs.tolist() == [-1.0] * 3 + [-2.0] + [-0.5] * 2 + [-4.0] * 2
    assert batch.image_inputs == {}
    # the layout: two prompts, then the fed parts [1, 2], [5], [7]
    assert batch.layout.prompt_tokens.tolist() == [[0, 1, 2], [6, 7, 0]]
    assert batch.layout.completion_tokens.tolist() == [[3, 4], [5, 0], [8, 0]]
    assert batch.layout.visible_tokens.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 5, 0], [6, 7, 0, 8, 0]]
    assert [item.tokens for item in items] == [6, 3]


def test_mrope_positions_go_on_behind_the_largest_position_of_the_prompt(tiny_policy, make_prompt):
    # 2 text tokens, vision start, 4 x 6 patches = 2 x 3 visual tokens, vision end, 2 text tokens
    prompt = make_prompt("qwen2_vl", 0, length=4, grid=(4, 6))
    assert len(prompt.token_ids) == 12
    plain = text_prompt(20, 21)
    items = [PackItem(prompt, (sequence([1, 2, 3]), sequence([4, 5]))), PackItem(plain, (sequence([6, 7]),))]
    batch = pack(items, tiny_policy("qwen2_vl"))
    # the image starts at 3: temporal 3, height 3..4, width 3..5; text goes on behind the largest, 5
    expected = [
        [0, 1, 2, *[3] * 6, 6, 7, 8, 9, 10, 9, 0, 1, 2],
        [0, 1, 2, 3, 3, 3, 4, 4, 4, 6, 7, 8, 9, 10, 9, 0, 1, 2],
        [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10, 9, 0, 1, 2],
    ]
    assert batch.positions.tolist() == expected
    assert batch.token_ids.tolist() == [*prompt.token_ids, 1, 2, 4, 20, 21, 6]
    np.testing.assert_array_equal(batch.image_inputs["pixel_values"], prompt.image_inputs["pixel_values"])
    assert batch.image_inputs["image_grid_thw"].tolist() == [[1, 4, 6]]


def test_images_stand_in_row_order(tiny_policy, make_prompt):
    prompts = [make_prompt("qwen2_vl", i, length=3, grid=grid) for i, grid in enumerate([(4, 4), None, (2, 6)])]
    batch = pack([PackItem(prompts[i], (sequence([1, 2]),)) for i in (2, 1, 0)], tiny_policy("qwen2_vl"))
    assert batch.image_inputs["image_grid_thw"].tolist() == [[1, 2, 6], [1, 4, 4]]
    pixels = np.concatenate([prompts[i].image_inputs["pixel_values"] for i in (2, 0)])
    np.testing.assert_array_equal(batch.image_inputs["pixel_values"], pixels)


def test_positions_can_come_from_a_memo(tiny_policy):
    asked = []

    def positions(prompt):
        asked.append(prompt)
        return torch.tensor([[5, 9]])

    prompt = text_prompt(20, 21)
    batch = pack([PackItem(prompt, (sequence([1, 2, 3]),))], tiny_policy("qwen2"), positions)
    assert batch.positions.tolist() == [[5, 9, 10, 11]]
    assert asked == [prompt]


def test_an_empty_completion_is_refused(tiny_policy):
    with pytest.raises(ValueError, match=r"completion .*'q1' .*no tokens"):
        pack([PackItem(text_prompt(1, 2), (sequence([1]), sequence([])))], tiny_policy("qwen2"))


def shape(micro_batches):
    """[[(prompt length, completion lengths), ...] of each micro-batch, ...]."""
    return [
        [(len(item.prompt.token_ids), [len(entry.completion.token_ids) for entry in item.sequences]) for item in part]
        for part in micro_batches
    ]


def test_items_fill_micro_batches_in_order():
    # 10 + 4 + 4 = 18 row tokens each: two fit into 40, a third does not
    items = [item_of_lengths(10, [5, 5])] * 5
    assert [len(part) for part in split_by_tokens(items, 40)] == [2, 2, 1]
    assert [len(part) for part in split_by_tokens(items, 36)] == [2, 2, 1]
    assert [len(part) for part in split_by_tokens(items, 35)] == [1] * 5
    assert [len(part) for part in split_by_tokens(items, 1000)] == [5]


def test_a_group_over_the_budget_is_halved_until_it_fits():
    assert shape(split_by_tokens([item_of_lengths(10, [11, 12, 13, 14])], 33)) == [
        [(10, [11, 12])],
        [(10, [13])],
        [(10, [14])],
    ]


def test_a_single_completion_over_the_budget_stands_alone():
    items = [item_of_lengths(2, [2]), item_of_lengths(10, [50]), item_of_lengths(2, [2])]
    assert shape(split_by_tokens(items, 8)) == [[(2, [2])], [(10, [50])], [(2, [2])]]


@given(
    st.lists(
        st.tuples(st.integers(1, 20), st.lists(st.integers(1, 30), min_size=1, max_size=6)), min_size=1, max_size=8
    ),
    st.integers(1, 150),
)
def test_splitting_loses_nothing_keeps_order_and_respects_the_budget(shapes, budget):
    items = [item_of_lengths(*entry) for entry in shapes]
    micro_batches = split_by_tokens(items, budget)
    sequences = [id(entry) for part in micro_batches for item in part for entry in item.sequences]
    assert sequences == [id(entry) for item in items for entry in item.sequences]
    prompts = {id(entry): id(item.prompt) for item in items for entry in item.sequences}
    for part in micro_batches:
        assert part
        for item in part:
            assert all(prompts[id(entry)] == id(item.prompt) for entry in item.sequences)
        if sum(item.tokens for item in part) > budget:
            assert len(part) == len(part[0].sequences) == 1
    # no micro-batch could have taken the first piece of the next one
    for part, following in pairwise(micro_batches):
        assert sum(item.tokens for item in part) + following[0].tokens > budget
