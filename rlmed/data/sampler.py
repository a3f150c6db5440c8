"""The order of examples and options as pure functions of a seed: a run resumes from a number alone."""

from __future__ import annotations

import dataclasses
import functools
import hashlib

import numpy as np

from rlmed.core.types import Example, IntArray


class PromptOrder:
    """A fresh permutation of the examples in each epoch.

    Example:
        >>> order = PromptOrder(seed=0, examples=3)
        >>> sorted(order.example_at(cursor)[1] for cursor in range(3))
        [0, 1, 2]
    """

    def __init__(self, seed: int, examples: int) -> None:
        """Order `examples` (at least 1) rows by `seed`."""
        if examples < 1:
            raise ValueError("there are no examples to draw from")
        self._examples = examples
        self._permutation = functools.lru_cache(maxsize=2)(
            lambda epoch: np.random.default_rng([seed, epoch]).permutation(examples).astype(np.int64)
        )

    def example_at(self, cursor: int) -> tuple[int, int]:
        """(epoch, index of the example) at position `cursor` of the endless stream."""
        epoch, position = divmod(cursor, self._examples)
        permutation: IntArray = self._permutation(epoch)
        return epoch, int(permutation[position])


def shuffle_options(example: Example, seed: int) -> Example:
    """The example with its options in an order drawn from (seed, id); the answer follows.

    Raises:
        ValueError: for an example with a written completion, which names letters.
    """
    if example.completion is not None:
        raise ValueError(f"example {example.id}: its options cannot be shuffled, since its completion names letters")
    # a digest, since Python's own hash of a text differs from process to process
    digest = hashlib.sha256(example.id.encode()).digest()
    order = np.random.default_rng([seed, int.from_bytes(digest[:8], "little")]).permutation(len(example.options))
    return dataclasses.replace(
        example,
        options=tuple(example.options[index] for index in order),
        answer=int(np.flatnonzero(order == example.answer)[0]),
    )
