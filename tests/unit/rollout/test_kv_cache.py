"""The dense key-value cache, and the engine's layouts against plain attention over each row's own tokens."""

from __future__ import annotations

import pytest
import torch

from rlmed.models.attention import GroupTable
from rollout.native.kv_cache import DecodeLayout, KVCache, PrefillLayout
from tests.rounding import rounding

LAYERS, KV_HEADS, WIDTH, HEADS = 2, 2, 4, 6
SCALE = 0.37
ROUNDING = rounding(30, 4)
"""Scores of WIDTH products, their exp, and weighted sums over ten tokens at most, of values that are seldom above 3."""


def new_cache(groups=0, prompt_length=0, rows=0, max_tokens=0):
    cache = KVCache((LAYERS, KV_HEADS, WIDTH), dtype=torch.float32, device=torch.device("cpu"))
    cache.reserve(groups=groups, prompt_length=prompt_length, rows=rows, max_tokens=max_tokens)
    return cache


def tensors(cache):
    return [*cache.prefix_keys, *cache.prefix_values, *cache.suffix_keys, *cache.suffix_values]


def shapes(cache):
    found = [tuple(tensor.shape) for tensor in tensors(cache)]
    (prefix,), (suffix,) = set(found[: 2 * LAYERS]), set(found[2 * LAYERS :])
    return prefix, suffix


def fill(cache):
    for i, tensor in enumerate(tensors(cache)):
        tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape) + 1000.0 * i)


def test_reserve_makes_room_and_never_shrinks():
    cache = new_cache(2, 5, 3, 7)
    assert shapes(cache) == ((2, KV_HEADS, 5, WIDTH), (3, KV_HEADS, 7, WIDTH))
    cache.reserve(groups=1, prompt_length=9, rows=2, max_tokens=1)
    assert shapes(cache) == ((2, KV_HEADS, 9, WIDTH), (3, KV_HEADS, 7, WIDTH))


def test_reserve_keeps_what_is_there_and_clears_the_rest():
    cache = new_cache(2, 3, 4, 5)
    fill(cache)
    before = [tensor.clone() for tensor in tensors(cache)]
    cache.reserve(groups=5, prompt_length=6, rows=9, max_tokens=8)
    for old, new in zip(before, tensors(cache), strict=True):
        slots, _, length, _ = old.shape
        assert torch.equal(new[:slots, :, :length], old)
        # zeros: a NaN that is masked would still poison a weighted sum
        assert not new[slots:].any()
        assert not new[:, :, length:].any()


def test_slots_grow_by_half_so_that_a_trickle_of_requests_seldom_copies():
    cache = new_cache(8, 4, 8, 4)
    sizes = []
    for rows in range(9, 40):
        cache.reserve(groups=1, prompt_length=1, rows=rows, max_tokens=4)
        sizes.append(len(cache.suffix_keys[0]))
    assert all(size >= rows for size, rows in zip(sizes, range(9, 40), strict=True))
    assert len(set(sizes)) <= 5


def test_moves_copy_one_slot_of_every_layer():
    cache = new_cache(3, 4, 3, 6)
    fill(cache)
    before = [tensor.clone() for tensor in tensors(cache)]
    cache.move_group(2, 0)
    cache.move_row(1, 2, 4)
    for i, (old, new) in enumerate(zip(before, tensors(cache), strict=True)):
        if i < 2 * LAYERS:
            assert torch.equal(new, old[[2, 1, 2]])
        else:
            assert torch.equal(new[:2], old[:2])
            assert torch.equal(new[2, :, :4], old[1, :, :4])
            assert torch.equal(new[2, :, 4:], old[2, :, 4:])


def plain_attention(query, key, value):
    """One query [H, D] over keys and values [L, H_kv, D], head by head."""
    result = []
    for head in range(HEADS):
        own = head // (HEADS // KV_HEADS)
        weights = (key[:, own] @ query[head] * SCALE).softmax(0)
        result.append(weights @ value[:, own])
    return torch.stack(result)


def random_row(generator, length):
    return (
        torch.randn(length, HEADS, WIDTH, generator=generator),
        torch.randn(length, KV_HEADS, WIDTH, generator=generator),
        torch.randn(length, KV_HEADS, WIDTH, generator=generator),
    )


@pytest.fixture
def history():
    """Prompts and suffixes of two groups with 2 and 1 completions, as they were given to the cache: [layer][group or row]."""
    generator = torch.Generator().manual_seed(0)
    prompts = [[random_row(generator, length) for length in (3, 5)] for _ in range(LAYERS)]
    suffixes = [[random_row(generator, length) for length in (2, 1, 4)] for _ in range(LAYERS)]
    return prompts, suffixes


def test_prefill_attends_causally_and_keeps_keys_and_values_in_its_slots(history, tiny_policy):
    prompts, _ = history
    cache = new_cache(4, 6, 1, 1)
    fill(cache)
    layout = PrefillLayout.build([3, 5], tiny_policy("qwen2"), cache, first_group=1)
    untouched = [tensor.clone() for tensor in cache.prefix_keys]
    for layer in range(LAYERS):
        query, key, value = (torch.cat([row[i] for row in prompts[layer]]) for i in range(3))
        output = layout.attend(layer, query, key, value, SCALE)
        start = 0
        for slot, (_, own_key, own_value) in enumerate(prompts[layer], start=1):
            length = len(own_key)
            assert torch.equal(cache.prefix_keys[layer][slot, :, :length], own_key.transpose(0, 1))
            assert torch.equal(cache.prefix_values[layer][slot, :, :length], own_value.transpose(0, 1))
            for i in range(length):
                expected = plain_attention(query[start + i], own_key[: i + 1], own_value[: i + 1])
                torch.testing.assert_close(output[start + i], expected, atol=ROUNDING, rtol=0)
            start += length
        for slot in (0, 3):
            assert torch.equal(cache.prefix_keys[layer][slot], untouched[layer][slot])


@pytest.mark.parametrize("lengths", [(2, 1, 4), (1, 1, 1)], ids=["ragged", "uniform"])
@pytest.mark.parametrize("group_of_row", [(0, 1, 0), (1, 0, 0), (0, 0, 1), (0, 1)])
def test_decode_attends_to_the_groups_prompt_and_the_rows_own_suffix(history, group_of_row, lengths):
    # the cache holds other numbers wherever no token stands; (0, 1) is the case of groups of one
    # size in order
    prompts, suffixes = history
    cache = new_cache(3, 7, 4, 6)
    fill(cache)
    lengths = lengths[: len(group_of_row)]
    suffixes = [
        [[part[:length] for part in row] for row, length in zip(rows, lengths, strict=False)] for rows in suffixes
    ]
    longest = max(lengths) + 1
    ragged = len(set(lengths)) > 1
    lengths = torch.tensor(lengths)
    prefix_mask = torch.where(torch.arange(5) < torch.tensor([[3], [5]]), 0.0, -torch.inf)
    suffix_mask = torch.where(torch.arange(longest) <= lengths[:, None], 0.0, -torch.inf)
    per_head = lambda mask: mask.repeat_interleave(KV_HEADS, dim=0).unsqueeze(1)  # noqa: E731
    layout = DecodeLayout(
        cache,
        GroupTable.build(group_of_row, 2),
        torch.arange(len(group_of_row)),
        per_head(prefix_mask),
        lengths if ragged else int(lengths[0]),
        longest,
        per_head(suffix_mask) if ragged else None,
    )
    generator = torch.Generator().manual_seed(1)
    for layer in range(LAYERS):
        for slot, (_, key, value) in enumerate(prompts[layer]):
            cache.prefix_keys[layer][slot, :, : len(key)] = key.transpose(0, 1)
            cache.prefix_values[layer][slot, :, : len(key)] = value.transpose(0, 1)
        for row, (_, key, value) in enumerate(suffixes[layer]):
            length = int(lengths[row])
            cache.suffix_keys[layer][row, :, :length] = key[:length].transpose(0, 1)
            cache.suffix_values[layer][row, :, :length] = value[:length].transpose(0, 1)
        query, key, value = random_row(generator, len(group_of_row))
        output = layout.attend(layer, query, key, value, SCALE)
        for row, group in enumerate(group_of_row):
            length = int(lengths[row])
            keys = torch.cat([prompts[layer][group][1], suffixes[layer][row][1][:length], key[row : row + 1]])
            values = torch.cat([prompts[layer][group][2], suffixes[layer][row][2][:length], value[row : row + 1]])
            torch.testing.assert_close(output[row], plain_attention(query[row], keys, values), atol=ROUNDING, rtol=0)
            # the new token is in the cache for the next step
            assert torch.equal(cache.suffix_keys[layer][row, :, length], key[row])
            assert torch.equal(cache.suffix_values[layer][row, :, length], value[row])
