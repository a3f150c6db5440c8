"""The two parts that the loop drives. It knows nothing else of them, and they know nothing of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from rlmed.core.types import RolloutGroup, RolloutRequest, TrainGroup


class RolloutPool(Protocol):
    """Samples groups of completions somewhere."""

    @property
    def in_flight(self) -> int:
        """Requests submitted and not yet collected."""
        ...

    def submit(self, request: RolloutRequest) -> None:
        """Queue a request.

        Raises:
            ValueError: when it could never be sampled.
        """
        ...

    def collect(self) -> RolloutGroup:
        """Wait for the next finished group, in order of completion; each request is answered exactly once.

        Raises:
            RuntimeError: when nothing is in flight.
        """
        ...

    def update_weights(self, version: int) -> None:
        """Sample from policy version `version` from now on."""
        ...

    def close(self) -> None:
        """Release what the pool holds; requests in flight are dropped."""
        ...


class Learner(Protocol):
    """Improves the policy."""

    @property
    def policy_version(self) -> int:
        """Optimizer steps behind the current weights."""
        ...

    def step(self, groups: Sequence[TrainGroup]) -> dict[str, float]:
        """Learn from one batch of groups and return the step's metrics by name."""
        ...

    def push_weights(self, pool: RolloutPool) -> None:
        """Give the current weights and their version to the pool."""
        ...

    def save(self, folder: Path) -> None:
        """Write the model as a Hugging Face folder, and the optimizer's state beside it, into an existing folder."""
        ...

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote."""
        ...
