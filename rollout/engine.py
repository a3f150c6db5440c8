"""What every rollout engine is: requests in, finished groups out, weights updated between two steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from torch import Tensor

from rlmed.core.types import RolloutGroup, RolloutRequest


class Engine(Protocol):
    """Samples groups of completions in the calling thread; one contract test suite runs against every engine."""

    policy_version: int
    """Of the weights that the next token is sampled from."""
    generated_tokens: int
    """Completion tokens sampled so far."""
    devices: tuple[str, ...]
    """See `rlmed.core.weights.Recipient.devices`; where there are any, the engine is a `DirectEngine`."""

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

    def sleep(self) -> None:
        """Give back what memory can be given back, until `begin_update`; `step` is not called meanwhile."""
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


class DirectEngine(Engine, Protocol):
    """An engine that weights can be sent to directly: `begin_update`, `receive` as often as needed, `finish_update`."""

    def connect(self, transport: str, info: Mapping[str, Any]) -> None:
        """Meet the learner.

        Args:
            transport: "nccl" or "ipc".
            info: the transport's own, from the learner's side.

        Raises:
            ValueError: when the transport does not know such a connection.
            RuntimeError: when it cannot be made.
        """
        ...

    def receive(self, info: Mapping[str, Any]) -> None:
        """Take some of the new weights, while the learner sends them.

        Args:
            info: the transport's own, with "names" and "shapes".

        Raises:
            WeightError: for an unknown name or another shape; nothing of them was loaded.
        """
        ...
