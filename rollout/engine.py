"""Engine protocol: requests in, finished groups out, weight updates between two steps."""

from __future__ import annotations

from typing import Protocol

from rlmed.core.types import RolloutGroup, RolloutRequest
from rlmed.models.weights import Weights


class Engine(Protocol):
    """Samples groups of completions in the calling thread; all engines pass one contract suite."""

    policy_version: int
    """Version of the weights that sample the next token."""
    generated_tokens: int
    """Completion tokens sampled so far."""
    devices: tuple[str, ...]
    """See `rlmed.core.weights.EngineHandle.devices`."""

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
        """Release memory until the next weights; the caller makes no `step` in between."""
        ...

    def update_weights(self, version: int, weights: Weights = ()) -> None:
        """Sample from policy version `version` from now on, and drop caches of older weights.

        Args:
            version: label of the tokens sampled from now on.
            weights: all weights; none if the engine shares the learner's parameters.

        Raises:
            WeightError: for weights of another model, or only some of this one's; nothing has
                changed.
            RuntimeError: if they were damaged or did not arrive. The caller makes no `step` until
                others have.
        """
        ...
