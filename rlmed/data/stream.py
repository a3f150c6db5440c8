"""Endless training requests, by seed and observations only: a resumed run asks the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from rlmed.core.config.schema import DataConfig
from rlmed.core.types import Example, RolloutRequest, SamplingParams, ScoredGroup
from rlmed.data.curriculum import Curriculum
from rlmed.data.prompts import PromptRenderer
from rlmed.data.sampler import shuffle_options
from rlmed.tasks.registry import task_of

SEED_STRIDE = 1_000_003
"""Keeps the random streams of runs with neighbouring seeds apart."""


class PromptStream:
    """Examples in the order of a curriculum, rendered on demand.

    Example:
        >>> stream = PromptStream(examples, renderer, SamplingParams(), config.data, group_size=8, seed=0)  # doctest: +SKIP
        >>> stream.request(12).prompt.example.id                                                           # doctest: +SKIP
        'train_mri-412'
    """

    def __init__(
        self,
        examples: Sequence[Example],
        renderer: PromptRenderer,
        sampling: SamplingParams,
        data: DataConfig,
        *,
        group_size: int,
        seed: int,
    ) -> None:
        """Stream `examples`, mixed, selected and with options shuffled as `data` says.

        Raises:
            ValueError: without examples, or for a mix of modalities that they don't have.
        """
        self._examples, self._renderer, self._sampling = examples, renderer, sampling
        self._group_size, self._seed, self._shuffle = group_size, seed, data.shuffle_options
        modalities = [example.modality for example in examples]
        self._curriculum = Curriculum(modalities, seed, mix=data.mix, selection=data.selection)

    def request(self, index: int) -> RolloutRequest:
        """Return the request at `index`: the same each time, until its group is observed."""
        visit = self._curriculum.visit(index)
        example = self._examples[visit.example]
        if self._shuffle:
            example = shuffle_options(example, self._seed * SEED_STRIDE + visit.epoch)
        sampling = dataclasses.replace(self._sampling, seed=self._seed * SEED_STRIDE + index)
        return RolloutRequest(index, self._renderer.render(example), self._group_size, sampling)

    def observe(self, groups: Iterable[ScoredGroup]) -> dict[str, float]:
        """Record all groups of a step, and return the selection's metrics.

        Records them in the order of their requests: the order in which they finished must not
        matter.
        """
        for group in sorted(groups, key=lambda group: group.rollout.request.index):
            example = group.rollout.prompt.example
            scores = group.reward_parts.get("choice", group.reward_parts.get("task"))
            passes = task_of(example).passes
            correct = 0 if scores is None else sum(map(passes, scores.tolist()))
            self._curriculum.observe(group.rollout.request.index, correct, len(group.rewards))
        return self._curriculum.metrics()

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint, as JSON."""
        return self._curriculum.state()

    def restore(self, state: dict[str, Any]) -> None:
        """Resume from what `state` returned."""
        self._curriculum.restore(state)
