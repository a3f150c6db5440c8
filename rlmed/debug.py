"""Half a run: sampling without learning, or learning from what an earlier run has sampled (`conf/debug/`)."""

from __future__ import annotations

import dataclasses
import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rlmed.batch_files import list_batches, read_batch
from rlmed.core.protocols import RolloutPool
from rlmed.core.types import RolloutGroup, RolloutRequest, TrainGroup


class NoLearner:
    """See `rlmed.core.protocols.Learner`: the policy stays as it is."""

    policy_version = 0

    def step(self, groups: Sequence[TrainGroup]) -> dict[str, float]:
        """Nothing is learnt."""
        return {}

    def push_weights(self, pool: RolloutPool) -> None:
        """There are no new weights."""

    def save(self, folder: Path) -> None:
        """There is nothing to save."""

    def load(self, folder: Path) -> None:
        """There is nothing to load."""


class RecordedPool:
    """See `rlmed.core.protocols.RolloutPool`: answers requests with recorded groups, in their order, again and again.

    The prompts of the requests are not looked at: each group brings its own.
    """

    def __init__(self, folder: Path) -> None:
        """Read the batches of `folder` one after the other, as they are asked for.

        Raises:
            ValueError: when there are none.
        """
        self._groups = self._read(list_batches(folder))
        self._waiting: deque[RolloutRequest] = deque()
        self._version = 0

    @property
    def in_flight(self) -> int:
        """Requests submitted and not yet collected."""
        return len(self._waiting)

    def submit(self, request: RolloutRequest) -> None:
        """Queue a request."""
        self._waiting.append(request)

    def collect(self) -> RolloutGroup:
        """The next recorded group, under the index of the oldest request and as if sampled from the current weights."""
        if not self._waiting:
            raise RuntimeError("collect() was called with no request in flight")
        index, group = self._waiting.popleft().index, next(self._groups)
        completions = (
            dataclasses.replace(entry, min_version=self._version, max_version=self._version)
            for entry in group.completions
        )
        return RolloutGroup(dataclasses.replace(group.request, index=index), tuple(completions))

    def update_weights(self, version: int, weights: Any = None) -> None:
        """Only the version is news."""
        self._version = version

    def metrics(self) -> dict[str, float]:
        """None."""
        return {}

    def close(self) -> None:
        """Forget what was asked for."""
        self._waiting.clear()

    @staticmethod
    def _read(paths: Sequence[Path]) -> Iterator[RolloutGroup]:
        for path in itertools.cycle(paths):
            groups, _ = read_batch(path)
            yield from (group.rollout for group in groups)
