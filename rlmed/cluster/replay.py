"""Run half the loop: sample without learning, or learn from recorded rollouts (`conf/debug/`)."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from rlmed.core.protocols import RolloutPool
from rlmed.core.types import FloatArray, IntArray, Prompt, RolloutGroup, RolloutRequest, TrainGroup
from rlmed.core.weights import WeightUpdate
from rlmed.recording.batches import count_groups, list_batches, read_batch


class NoLearner:
    """Learner (`rlmed.core.protocols.Learner`) that never changes the policy."""

    policy_version = 0

    def step(self, groups: Sequence[TrainGroup]) -> dict[str, float]:
        """No-op; return no metrics."""
        return {}

    def logprobs(self, requests: Sequence[tuple[Prompt, Sequence[IntArray]]]) -> list[list[FloatArray]]:
        """Raise ValueError: no learner can score completions."""
        raise ValueError(
            "debug.learn=false leaves no learner to score completions: remove the rewards that need log-probabilities from "
            "reward.weights"
        )

    def push_weights(self, pool: RolloutPool) -> None:
        """No-op: there are no new weights."""

    def save(self, folder: Path) -> Callable[[], None]:
        """No-op: there is nothing to save."""
        return lambda: None

    def load(self, folder: Path) -> None:
        """No-op: there is nothing to load."""


class ReplayPool:
    """`rlmed.core.protocols.RolloutPool` that answers request i with recorded group i, cyclically.

    It ignores the requests' prompts: each group has its own.
    """

    def __init__(self, folder: Path, workers: RolloutPool | None = None) -> None:
        """Replay the batches in `folder`, read on demand.

        Args:
            folder: folder of batches.
            workers: the pool that would sample otherwise; it still receives weights, because it
                evaluates.

        Raises:
            ValueError: if there are no recorded groups.
        """
        self._stored = [(path, i) for path in list_batches(folder) for i in range(count_groups(path))]
        if not self._stored:
            raise ValueError(f"the batches in {folder} contain no groups: none had reward variance")
        self._workers = workers
        self._loaded: tuple[Path, list[TrainGroup]] | None = None
        self._waiting: deque[RolloutRequest] = deque()
        self._version = 0
        self._seen: Callable[[RolloutGroup], None] = lambda group: None

    @property
    def in_flight(self) -> int:
        """Requests submitted and not yet collected."""
        return len(self._waiting)

    def submit(self, request: RolloutRequest) -> None:
        """Queue a request."""
        self._waiting.append(request)

    def flush(self) -> None:
        """No-op: requests never wait."""

    def collect(self) -> RolloutGroup:
        """Return the group of the oldest request, as if sampled from the current weights."""
        if not self._waiting:
            raise RuntimeError("collect() was called with no request in flight")
        index = self._waiting.popleft().index
        group = self._read(*self._stored[index % len(self._stored)])
        completions = (
            dataclasses.replace(entry, min_version=self._version, max_version=self._version)
            for entry in group.completions
        )
        replayed = RolloutGroup(dataclasses.replace(group.request, index=index), tuple(completions))
        self._seen(replayed)
        return replayed

    def on_sampled(self, seen: Callable[[RolloutGroup], None]) -> None:
        """Call `seen` with each group when it is read, in this thread."""
        self._seen = seen

    def sample_ahead(self) -> None:
        """No-op: nothing is sampled."""

    def sleep(self) -> None:
        """Pass on to the evaluating pool."""
        if self._workers is not None:
            self._workers.sleep()

    def update_weights(self, version: int, weights: WeightUpdate | None = None) -> None:
        """Set the version; pass the weights on to the evaluating pool."""
        self._version = version
        if self._workers is not None:
            self._workers.update_weights(version, weights)

    def metrics(self) -> dict[str, float]:
        """Return no metrics."""
        return {}

    def close(self) -> None:
        """Drop pending requests and close the evaluating pool."""
        self._waiting.clear()
        if self._workers is not None:
            self._workers.close()

    def _read(self, path: Path, index: int) -> RolloutGroup:
        if self._loaded is None or self._loaded[0] != path:
            self._loaded = (path, read_batch(path)[0])
        return self._loaded[1][index].rollout
