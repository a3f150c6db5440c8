"""Order examples and options by pure functions of a seed: a run resumes from one number."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools

import numpy as np

from rlmed.core.types import Example, IntArray
from rlmed.data.options.order import keeps_order


class PromptOrder:
    """A fresh permutation of the examples in each epoch.

    Example:
        >>> order = PromptOrder(seed=0, examples=3)
        >>> sorted(order.example_at(cursor)[1] for cursor in range(3))
        [0, 1, 2]
    """

    def __init__(self, seed: int, examples: int) -> None:
        """Shuffle `examples` (at least 1) rows by `seed` (not negative)."""
        if examples < 1:
            raise ValueError("no examples to draw from: give a data file with at least one usable row")
        self._seed, self._examples = seed, examples
        self._epoch, self._permutation = 0, self._draw(0)  # of the latest epoch asked for

    def example_at(self, cursor: int) -> tuple[int, int]:
        """Return (epoch, example index) at position `cursor` (from 0) of the endless stream."""
        if cursor < 0:
            raise ValueError(f"cursor={cursor} must not be negative: the stream starts at 0")
        epoch, position = divmod(cursor, self._examples)
        if epoch != self._epoch:
            self._epoch, self._permutation = epoch, self._draw(epoch)
        return epoch, int(self._permutation[position])

    def _draw(self, epoch: int) -> IntArray:
        """Return a permutation, int64 [examples]."""
        return np.random.default_rng([self._seed, epoch]).permutation(self._examples).astype(np.int64)


def shuffle_options(example: Example, seed: int) -> Example:
    """Return the example, options in an order drawn from (seed, id); the answer index follows.

    Drops a written completion, whose letters would now be wrong. Returns the example unchanged if
    it has none, or an option refers to others, as `all of the above` does.
    """
    if not example.is_choice or keeps_order(example.options):
        return example
    # a digest, since Python's own string hash differs between processes
    digest = hashlib.sha256(example.id.encode()).digest()
    order = np.random.default_rng([seed, int.from_bytes(digest[:8], "little")]).permutation(len(example.options))
    return dataclasses.replace(
        example,
        options=tuple(example.options[index] for index in order),
        answer=int(np.flatnonzero(order == example.answer)[0]),
        completion=None,
    )


def reorder_options(example: Example, seed: int) -> Example | None:
    """Return `shuffle_options` with an order other than the example's own.

    Return None if it has no options, or one refers to others.
    """
    if not example.is_choice or keeps_order(example.options):
        return None
    orders = (shuffle_options(example, seed + attempt) for attempt in itertools.count())
    # option texts are distinct
    return next(order for order in orders if order.options != example.options)
