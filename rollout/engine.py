"""Engine protocol: requests in, finished groups out, weight updates between two steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from torch import Tensor

from rlmed.core.types import RolloutGroup, RolloutRequest


class Engine(Protocol):
    """Samples groups of completions in the calling thread; one contract test suite runs against every engine."""

    policy_version: int
    """Version of the weights that sample the next token."""
    generated_tokens: int
    """Completion tokens sampled so far."""
    devices: tuple[str, ...]
    """See `rlmed.core.weights.EngineHandle.devices`; if not empty, the engine is a `DirectEngine`."""

    @property
    def busy(self) -> bool:
        """True while requests wait or run."""
        ...

    def submit(self, request: RolloutRequest) -> None:
        """Queue a request.

        Raises:
            ValueError: if it can never run.
        """
        ...

    def step(self) -> list[RolloutGroup]:
        """Sample at least one token per running completion and return the groups this finished."""
        ...

    def abort(self) -> list[RolloutRequest]:
        """Drop all waiting and running work and return its requests."""
        ...

    def sleep(self) -> None:
        """Release memory until `begin_update`; the caller makes no `step` in between."""
        ...

    def begin_update(self, expected: Mapping[str, tuple[int, ...]] | None = None) -> None:
        """Prepare for new weights; nothing is sampled until `finish_update`.

        Args:
            expected: names and shapes of all tensors to come, if known.

        Raises:
            WeightError: if they differ from the engine's; it keeps its old weights.
        """
        ...

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Load some of the new weights: names as in the learner's `named_parameters()`, CPU tensors that must be copied.

        Raises:
            WeightError: for an unknown name or another shape.
        """
        ...

    def finish_update(self, version: int) -> None:
        """Complete the update: drop caches of the old weights and label tokens sampled from now on with `version`."""
        ...


class DirectEngine(Engine, Protocol):
    """Engine that accepts direct sends: `begin_update`, `receive` as often as needed, `finish_update`."""

    def connect(self, transport: str, info: Mapping[str, Any]) -> None:
        """Connect to the learner.

        Args:
            transport: "nccl" or "ipc".
            info: transport-specific, from the learner's side.

        Raises:
            ValueError: if the transport does not support this connection.
            RuntimeError: if connecting fails.
        """
        ...

    def receive(self, info: Mapping[str, Any]) -> None:
        """Receive some of the new weights while the learner sends them.

        Args:
            info: transport-specific, with "names" and "shapes".

        Raises:
            WeightError: for an unknown name or another shape; none of them was loaded.
        """
        ...
