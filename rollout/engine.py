"""What every rollout engine is: requests in, finished groups out, weights updated between two steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from torch import Tensor

from rlmed.core.types import RolloutGroup, RolloutRequest


class Engine(Protocol):
    """Samples groups of completions in the calling thread; one contract test suite runs against every engine."""

    policy_version: int
    """Of the weights that the next token is sampled from."""
    generated_tokens: int
    """Completion tokens sampled so far."""

    @property
    def busy(self) -> bool:
        """True while requests wait or run."""
        ...

    def submit(self, request: RolloutRequest) -> None:
        """Queue a request.

        Raises:
            ValueError: when it could never run.
        """
        ...

    def step(self) -> list[RolloutGroup]:
        """Sample one token or more for what runs, and return the groups that ended with it."""
        ...

    def abort(self) -> list[RolloutRequest]:
        """Drop all work, waiting or running, and return the requests that have not finished."""
        ...

    def begin_update(self, expected: Mapping[str, tuple[int, ...]] | None = None) -> None:
        """Get ready for new weights; nothing is sampled until `finish_update`.

        Args:
            expected: names and shapes of all that will come, where they are known.

        Raises:
            WeightError: when these are not the engine's; it goes on with its old weights.
        """
        ...

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Take some of the new weights: names as in the learner's `named_parameters()`, CPU tensors not to be kept.

        Raises:
            WeightError: for an unknown name or another shape.
        """
        ...

    def finish_update(self, version: int) -> None:
        """All weights are here: drop what was computed from the old ones; tokens from now on belong to `version`."""
        ...
