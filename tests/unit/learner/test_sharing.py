"""How a batch is split over ranks: who holds what, and what all know."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from learner.packing import PackItem, TrainSequence, split_by_tokens
from learner.sharing import share_by_tokens, split_groups, split_items
from learner.supervised import written_item
from rlmed.core.types import Example, Prompt, ScoredGroup, TrainGroup

SETTINGS = {"token_budget": 90, "mini_batches": 2, "mask_truncated": True}


def held(share):
    """The items of a rank's share."""
    return [item for part in share for micro_batch in part.micro_batches for item in micro_batch]


def pictured(count, completions=1):
    """Items with 100 KB of pixels each."""
    return [
        written_item(
            Prompt(
                Example(str(index), Path("1.png"), "?", ("a", "b"), 0, more_images=(Path("2.png"),)),
                "",
                np.arange(30),
                {"pixel_values": np.zeros(25_000, np.float32)},
            ),
            *[np.arange(5)] * completions,
        )
        for index in range(count)
    ]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_a_rank_gets_its_part_of_the_bytes(ranks):
    items = pictured(12, completions=4)
    whole = len(pickle.dumps(items))
    sizes = [len(pickle.dumps(share)) for share in split_items(items, ranks, token_budget=100, mini_batches=1)]
    assert sizes == pytest.approx([whole / ranks] * ranks, rel=0.02)


def test_completions_that_share_a_prompt_stay_together():
    items = pictured(12, completions=4)
    for ranks in (1, 2, 3, 4):
        shares = split_items(items, ranks, token_budget=100, mini_batches=2)
        found = [(item.prompt.example.id, len(item.sequences)) for share in shares for item in held(share)]
        assert sorted(found) == sorted((item.prompt.example.id, 4) for item in items)


def test_one_rank_gets_all_micro_batches_in_order():
    items = pictured(5, completions=3)
    (share,) = split_items(items, 1, token_budget=100, mini_batches=2)
    assert [part.micro_batches for part in share] == [split_by_tokens(items[:2], 100), split_by_tokens(items[2:], 100)]


def test_all_ranks_know_the_numbers_of_the_whole(make_train_groups):
    """Trained tokens of every completion, whether there are images, how many micro-batches."""
    groups = make_train_groups("qwen2_vl", 4)
    shares = split_groups(groups, 3, **SETTINGS)
    for number, part in enumerate((groups[:2], groups[2:])):
        own = [share[number] for share in shares]
        lengths = [len(entry.token_ids) for group in part for entry in group.rollout.completions]
        assert [mini_batch.trained_tokens for mini_batch in own] == [lengths] * 3
        assert [mini_batch.images for mini_batch in own] == [True] * 3
        assert len({len(mini_batch.micro_batches) for mini_batch in own}) == 1
    (text,) = {part.images for share in split_groups(groups[1:2], 3, **SETTINGS) for part in share}
    assert not text


def test_truncated_completions_are_not_trained_on_any_rank(make_prompt, make_group):
    rollout = make_group(make_prompt("qwen2", 0, length=5), [3, 4], finish_reason="length")
    group = TrainGroup(ScoredGroup(rollout, np.zeros(2), {}), np.zeros(2))
    for mask, trained in ((True, [0, 0]), (False, [3, 4])):
        shares = split_groups([group], 2, token_budget=90, mini_batches=1, mask_truncated=mask)
        assert [share[0].trained_tokens for share in shares] == [trained] * 2


@pytest.mark.parametrize("ranks", [2, 5])
def test_ranks_without_work_go_through_as_many_rows_without_pixels(ranks):
    shares = split_items(pictured(1), ranks, token_budget=100)
    busy, *idle = sorted(shares, key=lambda share: -len(pickle.dumps(share)))
    (item,) = held(busy)
    assert item.prompt.image_inputs
    for share in idle:
        (filler,) = held(share)
        assert not filler.prompt.image_inputs
        assert not filler.prompt.example.images
        assert filler.tokens == 1
        assert [entry.trained for entry in filler.sequences] == [False]
        assert share[0].images


def test_shares_lose_nothing_and_are_balanced(make_train_groups):
    items = [
        PackItem(group.rollout.prompt, tuple(TrainSequence(entry, 1.0) for entry in group.rollout.completions))
        for group in make_train_groups("qwen2_vl", 8)
    ]
    wanted = sorted(id(entry) for item in items for entry in item.sequences)
    for count in (1, 2, 3, 8, 100):
        shares = share_by_tokens(items, count)
        assert len(shares) == count
        assert sorted(id(entry) for share in shares for item in share for entry in item.sequences) == wanted
        loads = [sum(item.tokens for item in share) for share in shares]
        if count == 1:
            assert shares == [items]
        if count in (2, 3):
            assert max(loads) < 1.25 * sum(loads) / count


def test_visual_tokens_count_in_the_balance(make_prompt):
    """40 of them and 14 others against 60 tokens of text on the other rank."""
    items = [written_item(make_prompt("qwen2_vl", 0, length=12, grid=(10, 16)), np.arange(1, 2))]
    items += [written_item(make_prompt("qwen2_vl", index, length=12), np.arange(1, 2)) for index in range(1, 6)]
    assert [item.tokens for item in items] == [54, 12, 12, 12, 12, 12]
    assert [len(share) for share in share_by_tokens(items, 2)] == [1, 5]
