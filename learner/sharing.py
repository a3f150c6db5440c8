"""Split a batch over ranks, so that each holds only the pixels and tokens that it works on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from learner.packing import PackItem, TrainSequence, halves, split_by_tokens
from rlmed.core.types import Completion, Prompt, TrainGroup


@dataclass(frozen=True, slots=True)
class MiniBatchShare:
    """One rank's share of a mini-batch, and the numbers that all ranks must know of the whole.

    Example:
        Of 3 completions with 5, 9 and 2 tokens, the second truncated and so untrained, rank 0 of 2
        may get the first and third: `micro_batches` holds these, and `trained_tokens` is [5, 0, 2]
        on both ranks.
    """

    micro_batches: list[list[PackItem]]
    """As many as on every other rank."""
    trained_tokens: list[int]
    """Of each completion of the mini-batch, on all ranks; the loss is divided by their count."""
    images: bool
    """True if any prompt, on any rank, has an image."""


BatchShare = list[MiniBatchShare]
"""One rank's share of a batch, by mini-batch: the input of one step."""
Split = Callable[[Sequence[Any], int], list[BatchShare]]
"""Splits a batch over a number of ranks; one share per rank."""


def split_groups(
    groups: Sequence[TrainGroup], ranks: int, *, token_budget: int, mini_batches: int, mask_truncated: bool
) -> list[BatchShare]:
    """Split groups over ranks; see `split_items`. `mask_truncated` as in the loss settings."""
    items = [_item(group, mask_truncated) for group in groups]
    return split_items(items, ranks, token_budget=token_budget, mini_batches=mini_batches)


def split_items(items: Sequence[PackItem], ranks: int, *, token_budget: int, mini_batches: int = 1) -> list[BatchShare]:
    """Split items into consecutive mini-batches, and each of these over ranks by tokens.

    Nothing is copied. A prompt is in more than one share only if its completions are.
    """
    parts = [_share_mini_batch(part, ranks, token_budget) for part in _split_evenly(items, mini_batches)]
    return [list(share) for share in zip(*parts, strict=True)]


def _item(group: TrainGroup, mask_truncated: bool) -> PackItem:
    sequences = tuple(
        TrainSequence(completion, float(advantage), not (mask_truncated and completion.finish_reason == "length"))
        for completion, advantage in zip(group.rollout.completions, group.advantages, strict=True)
    )
    return PackItem(group.rollout.prompt, sequences)


def _share_mini_batch(items: Sequence[PackItem], ranks: int, token_budget: int) -> list[MiniBatchShare]:
    """Return each rank's share; ranks with fewer micro-batches add untrained fillers."""
    shares = [split_by_tokens(part, token_budget) for part in share_by_tokens(items, ranks)]
    count = max(map(len, shares))
    trained = [len(entry.completion.token_ids) * entry.trained for item in items for entry in item.sequences]
    images = any(item.prompt.image_inputs for item in items)
    filler = _filler(items[0])
    return [MiniBatchShare(own + [[filler]] * (count - len(own)), trained, images) for own in shares]


def _filler(item: PackItem) -> PackItem:
    """Return the smallest row: a prompt of one token without image, and an untrained token."""
    completion = item.sequences[0].completion
    token = completion.token_ids[:1]
    blank = Completion(token, completion.rollout_logprobs[:1], "", "stop")
    example = replace(item.prompt.example, image=None, more_images=())
    return PackItem(Prompt(example, "", token), (TrainSequence(blank, 0.0, False),))


def _split_evenly(items: Sequence[PackItem], parts: int) -> list[Sequence[PackItem]]:
    """Split into consecutive parts whose sizes differ by at most one; at most one part per item."""
    parts = min(parts, len(items))
    bounds = [len(items) * i // parts for i in range(parts + 1)]
    return [items[start:stop] for start, stop in pairwise(bounds)]


def share_by_tokens(items: Sequence[PackItem], ranks: int) -> list[list[PackItem]]:
    """Balance items over ranks, in order, to keep the largest share small.

    Assigns the longest items first, each to the rank with the fewest tokens; then halves the
    largest item of the fullest rank, at the price of a second prompt, as long as that helps. With
    fewer completions than ranks, some shares are empty.
    """
    pieces = list(items)
    shares = _assign(pieces, ranks)
    while True:
        largest = max(max(shares, key=_tokens), key=lambda item: item.tokens)
        if len(largest.sequences) == 1:
            return shares
        index = next(i for i, piece in enumerate(pieces) if piece is largest)
        halved = [*pieces[:index], *halves(largest), *pieces[index + 1 :]]
        candidate = _assign(halved, ranks)
        if max(map(_tokens, candidate)) >= max(map(_tokens, shares)):
            return shares
        pieces, shares = halved, candidate


def _assign(pieces: Sequence[PackItem], ranks: int) -> list[list[PackItem]]:
    loads, indices = [0] * ranks, [list[int]() for _ in range(ranks)]
    for index in sorted(range(len(pieces)), key=lambda i: -pieces[i].tokens):
        rank = loads.index(min(loads))
        loads[rank] += pieces[index].tokens
        indices[rank].append(index)
    return [[pieces[index] for index in sorted(entry)] for entry in indices]


def _tokens(items: Iterable[PackItem]) -> int:
    return sum(item.tokens for item in items)
