"""The endless stream of training requests: a pure function of seed and index, so that a run resumes from a number."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from rlmed.core.types import Example, RolloutRequest, SamplingParams
from rlmed.data.prompts import PromptRenderer
from rlmed.data.sampler import PromptOrder, shuffle_options

SEED_STRIDE = 1_000_003
"""Keeps the random streams of runs with neighbouring seeds apart."""


class PromptStream:
    """Examples in a fresh order each epoch, rendered when they are asked for.

    Example:
        >>> stream = PromptStream(examples, renderer, SamplingParams(), group_size=8, seed=0)   # doctest: +SKIP
        >>> stream.request(12).prompt.example.id                                               # doctest: +SKIP
        'train_mri-412'
    """

    def __init__(
        self,
        examples: Sequence[Example],
        renderer: PromptRenderer,
        sampling: SamplingParams,
        *,
        group_size: int,
        seed: int,
        shuffle: bool = False,
    ) -> None:
        """Stream `examples`; with `shuffle`, their options change places anew in each epoch."""
        self._examples, self._renderer, self._sampling = examples, renderer, sampling
        self._order = PromptOrder(seed, len(examples))
        self._group_size, self._seed, self._shuffle = group_size, seed, shuffle

    def request(self, index: int) -> RolloutRequest:
        """The request at `index`."""
        epoch, position = self._order.example_at(index)
        example = self._examples[position]
        if self._shuffle:
            example = shuffle_options(example, self._seed * SEED_STRIDE + epoch)
        sampling = dataclasses.replace(self._sampling, seed=self._seed * SEED_STRIDE + index)
        return RolloutRequest(index, self._renderer.render(example), self._group_size, sampling)
