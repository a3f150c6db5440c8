"""Pages of keys and values, and the engine's layouts against plain attention over each row's own
tokens.
"""

from __future__ import annotations

import pytest
import torch

from rlmed.models.attention import GroupTable, PackedLayout
from rollout.native.kv_pages import DecodeLayout, FixedPart, PagePool, PageView, PrefillLayout, visible, within
from tests.rounding import rounding

LAYERS, KV_HEADS, WIDTH, HEADS = 2, 2, 4, 6
SCALE = 0.37
ROUNDING = rounding(30, 4)
"""Scores of WIDTH products, their exp, and weighted sums over ten tokens at most, of values that
are seldom above 3.
"""


def new_pool(page_tokens, sequences=0, tokens=1):
    pool = PagePool((LAYERS, KV_HEADS, WIDTH), page_tokens=page_tokens, dtype=torch.float32, device=torch.device("cpu"))
    pool.reserve(sequences=sequences, tokens=tokens)
    return pool


def fill(pool):
    for i, tensor in enumerate((*pool.keys, *pool.values)):
        tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape) + 1000.0 * i)


def padded(tables):
    widest = max(map(len, tables))
    return torch.tensor([[*table, *[0] * (widest - len(table))] for table in tables])


def put(pool, layer, pages, key, value):
    """Write a sequence's keys and values, [L, H_kv, D], into its pages, token by token."""
    for place in range(len(key)):
        page, offset = pages[place // pool.page_tokens], place % pool.page_tokens
        pool.keys[layer][page, :, offset], pool.values[layer][page, :, offset] = key[place], value[place]


def got(pool, layer, pages, length):
    """A sequence's keys and values, each [L, H_kv, D]."""
    places = [(pages[place // pool.page_tokens], place % pool.page_tokens) for place in range(length)]
    return [torch.stack([kept[layer][page, :, offset] for page, offset in places]) for kept in (pool.keys, pool.values)]


def test_pages_that_split_a_line_of_transposed_keys_are_refused():
    with pytest.raises(ValueError, match="multiple of 32"):
        PagePool((1, 1, 4), page_tokens=48, dtype=torch.float32, device=torch.device("cpu"), transposed_keys=True)


@pytest.mark.parametrize(("page_tokens", "tokens", "pages"), [(None, 7, 1), (4, 7, 2), (4, 8, 2), (4, 9, 3)])
def test_a_sequence_takes_the_lowest_free_pages_and_gives_them_back(page_tokens, tokens, pages):
    pool = new_pool(page_tokens, 3, tokens)
    first, second = pool.take(tokens), pool.take(tokens)
    assert first + second == list(range(1, 1 + 2 * pages))
    pool.give_back(first)
    assert pool.free_pages == 2 * pages
    assert pool.take(tokens) == first


def test_a_reserve_of_what_is_free_changes_nothing():
    pool = new_pool(4, 3, 8)
    keys = pool.keys[0]
    pool.take(8)
    pool.reserve(sequences=2, tokens=8, most=3)
    assert pool.keys[0] is keys
    pool.reserve(sequences=3, tokens=8)
    assert pool.keys[0] is not keys
    assert pool.free_pages >= 6


@pytest.mark.parametrize("page_tokens", [None, 4])
def test_growth_keeps_what_is_in_pages_and_clears_the_rest(page_tokens):
    pool = new_pool(page_tokens, 2, 5)
    fill(pool)
    before = [tensor.clone() for tensor in (*pool.keys, *pool.values)]
    pool.reserve(sequences=5, tokens=9)
    for old, new in zip(before, (*pool.keys, *pool.values), strict=True):
        pages, _, tokens, _ = old.shape
        assert torch.equal(new[:pages, :, :tokens], old)
        # zeros: a NaN that is masked would still poison a weighted sum
        assert not new[pages:].any()
        assert not new[:, :, tokens:].any()


def test_pages_grow_by_half_so_that_a_trickle_of_requests_seldom_copies():
    pool = new_pool(4, 8, 4)
    sizes = []
    for _ in range(40):
        pool.reserve(sequences=1, tokens=4)
        pool.take(4)
        sizes.append(pool.pages)
    assert len(set(sizes)) <= 6


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
    """Prompts and suffixes of two groups with 2 and 1 completions, as they were given to the pools:
    [layer][group or row].
    """
    generator = torch.Generator().manual_seed(0)
    prompts = [[random_row(generator, length) for length in (3, 5)] for _ in range(LAYERS)]
    suffixes = [[random_row(generator, length) for length in (2, 1, 4)] for _ in range(LAYERS)]
    return prompts, suffixes


@pytest.mark.parametrize("page_tokens", [None, 2])
def test_prefill_attends_causally_and_keeps_keys_and_values_in_its_pages(page_tokens, history):
    prompts, _ = history
    pool = new_pool(page_tokens, 4, 6)
    fill(pool)
    taken = [pool.take(6), pool.take(3), pool.take(5), pool.take(1)]
    layout = PrefillLayout.build([3, 5], taken[1:3], PackedLayout.build([(3, ()), (5, ())]), pool)
    others = [[tensor.clone() for tensor in got(pool, layer, taken[0], 6)] for layer in range(LAYERS)]
    for layer in range(LAYERS):
        query, key, value = (torch.cat([row[i] for row in prompts[layer]]) for i in range(3))
        output = layout.attend(layer, query, key, value, SCALE)
        start = 0
        for pages, (_, own_key, own_value) in zip(taken[1:3], prompts[layer], strict=True):
            length = len(own_key)
            kept = got(pool, layer, pages, length)
            assert torch.equal(kept[0], own_key)
            assert torch.equal(kept[1], own_value)
            for i in range(length):
                expected = plain_attention(query[start + i], own_key[: i + 1], own_value[: i + 1])
                torch.testing.assert_close(output[start + i], expected, atol=ROUNDING, rtol=0)
            start += length
        assert all(map(torch.equal, got(pool, layer, taken[0], 6), others[layer]))


@pytest.mark.parametrize(("page_tokens", "in_order"), [(None, True), (None, False), (2, False)])
@pytest.mark.parametrize("lengths", [(2, 1, 4), (1, 1, 1)], ids=["ragged", "level"])
@pytest.mark.parametrize("group_of_row", [(0, 1, 0), (1, 0, 0), (0, 0, 1), (0, 1)])
@pytest.mark.parametrize("window", [None, 1, 3, 5, 100])
def test_decode_attends_to_the_groups_prompt_and_the_rows_own_suffix(
    history, window, group_of_row, lengths, page_tokens, in_order
):
    # the pages hold other numbers wherever no token stands; (0, 1) is the case of groups of one
    # size in order
    prompts, suffixes = history
    rows = len(group_of_row)
    lengths = lengths[:rows]
    prefix, suffix = new_pool(page_tokens, 3, 6), new_pool(page_tokens, 5, 6)
    fill(prefix)
    fill(suffix)
    pages_of_group, pages_of_row = [prefix.take(6) for _ in range(2)], [suffix.take(6) for _ in range(rows)]
    if not in_order:
        pages_of_group.reverse()
        pages_of_row.reverse()
    completions = suffix.head_rows(padded(pages_of_row))
    counts, width = torch.tensor(lengths) + 1, 6 if page_tokens else max(lengths) + 1
    level = in_order and len(set(lengths)) == 1
    fixed = FixedPart(
        PageView.build(prefix, prefix.head_rows(padded(pages_of_group)), 6 if page_tokens else 5, in_order=in_order),
        visible(torch.tensor([3, 5]), 6 if page_tokens else 5, prefix),
        GroupTable.build(group_of_row, 2),
        completions,
    )
    view = PageView.build(suffix, completions, width, in_order=in_order)
    prompts_of_row = torch.tensor([3, 5])[list(group_of_row)]
    layout = DecodeLayout(
        fixed,
        view,
        lengths[0] if level else suffix.addresses(completions, counts - 1),
        None if level else visible(counts, width, suffix),
        {window: within(window, prompts_of_row, counts, fixed.table, fixed.prefix, view)} if window else {},
    )
    generator = torch.Generator().manual_seed(1)
    for layer in range(LAYERS):
        for pages, (_, key, value) in zip(pages_of_group, prompts[layer], strict=True):
            put(prefix, layer, pages, key, value)
        for pages, length, (_, key, value) in zip(pages_of_row, lengths, suffixes[layer], strict=False):
            put(suffix, layer, pages, key[:length], value[:length])
        query, key, value = random_row(generator, rows)
        output = layout.attend(layer, query, key, value, SCALE, window)
        for row, group in enumerate(group_of_row):
            length = lengths[row]
            own = suffixes[layer][row]
            keys = torch.cat([prompts[layer][group][1], own[1][:length], key[row : row + 1]])
            values = torch.cat([prompts[layer][group][2], own[2][:length], value[row : row + 1]])
            near = slice(-window if window else None, None)
            expected = plain_attention(query[row], keys[near], values[near])
            torch.testing.assert_close(output[row], expected, atol=ROUNDING, rtol=0)
            # the new token is in the pages for the next step
            kept = got(suffix, layer, pages_of_row[row], length + 1)
            assert torch.equal(kept[0][-1], key[row])
            assert torch.equal(kept[1][-1], value[row])
