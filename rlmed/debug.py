"""Half a run: sampling without learning, or learning from what an earlier run has sampled (`conf/debug/`)."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlmed.batch_files import count_groups, list_batches, read_batch
from rlmed.core.protocols import RolloutPool
from rlmed.core.types import FloatArray, IntArray, Prompt, RolloutGroup, RolloutRequest, TrainGroup


class NoLearner:
    """See `rlmed.core.protocols.Learner`: the policy stays as it is."""

    policy_version = 0

    def step(self, groups: Sequence[TrainGroup]) -> dict[str, float]:
        """Nothing is learnt."""
        return {}

    def logprobs(self, questions: Sequence[tuple[Prompt, Sequence[IntArray]]]) -> list[list[FloatArray]]:
        """Nobody is here to be asked."""
        raise ValueError(
            "debug.learn=false leaves no learner that could say how likely completions are: give the rewards that ask for it "
            "no place in reward.weights"
        )

    def push_weights(self, pool: RolloutPool) -> None:
        """There are no new weights."""

    def save(self, folder: Path) -> None:
        """There is nothing to save."""

    def load(self, folder: Path) -> None:
        """There is nothing to load."""


class RecordedPool:
    """See `rlmed.core.protocols.RolloutPool`: the request at index i is answered with recorded group i, again from the first
    when they are used up. The prompts of the requests are not looked at: each group brings its own.
    """

    def __init__(self, folder: Path, workers: RolloutPool | None = None) -> None:
        """Use the batches of `folder`, which are read when they are asked for.

        Args:
            folder: of batches.
            workers: the pool that would sample otherwise; it is given new weights, because it evaluates.

        Raises:
            ValueError: when there are none.
        """
        self._places = [(path, i) for path in list_batches(folder) for i in range(count_groups(path))]
        if not self._places:
            raise ValueError(f"the batches in {folder} hold no groups: every one of them was without spread of reward")
        self._workers = workers
        self._loaded: tuple[Path, list[TrainGroup]] | None = None
        self._waiting: deque[RolloutRequest] = deque()
        self._version = 0

    @property
    def in_flight(self) -> int:
        """Requests submitted and not yet collected."""
        return len(self._waiting)

    def submit(self, request: RolloutRequest) -> None:
        """Queue a request."""
        self._waiting.append(request)

    def flush(self) -> None:
        """Nothing is held back."""

    def collect(self) -> RolloutGroup:
        """The group of the oldest request, as if sampled from the current weights."""
        if not self._waiting:
            raise RuntimeError("collect() was called with no request in flight")
        index = self._waiting.popleft().index
        group = self._read(*self._places[index % len(self._places)])
        completions = (
            dataclasses.replace(entry, min_version=self._version, max_version=self._version)
            for entry in group.completions
        )
        return RolloutGroup(dataclasses.replace(group.request, index=index), tuple(completions))

    def rest(self) -> None:
        """For whoever evaluates."""
        if self._workers is not None:
            self._workers.rest()

    def update_weights(self, version: int, weights: Any = None) -> None:
        """The version is noted; the weights are for whoever evaluates."""
        self._version = version
        if self._workers is not None:
            self._workers.update_weights(version, weights)

    def metrics(self) -> dict[str, float]:
        """None."""
        return {}

    def close(self) -> None:
        """Forget what was asked for."""
        self._waiting.clear()
        if self._workers is not None:
            self._workers.close()

    def _read(self, path: Path, place: int) -> RolloutGroup:
        if self._loaded is None or self._loaded[0] != path:
            self._loaded = (path, read_batch(path)[0])
        return self._loaded[1][place].rollout
