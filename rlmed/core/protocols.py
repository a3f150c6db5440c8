"""The two parts that the loop drives. It knows nothing else of them, and they know nothing of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from rlmed.core.types import FloatArray, IntArray, Prompt, RolloutGroup, RolloutRequest, TrainGroup


class ClusterError(RuntimeError):
    """A process of the run is lost or silent and cannot be replaced; the message names it, the cause and the cure."""


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

    def flush(self) -> None:
        """Let the submitted requests start, all together; `collect` does the same. Without either they may wait."""
        ...

    def collect(self) -> RolloutGroup:
        """Wait for the next finished group, in order of completion; each request is answered exactly once.

        Raises:
            RuntimeError: when nothing is in flight.
        """
        ...

    def rest(self) -> None:
        """Nothing is asked for before the next `update_weights`: engines may give memory back that the learner can use."""
        ...

    def update_weights(self, version: int, weights: Any = None) -> None:
        """Sample from policy version `version` from now on.

        Args:
            version: of the weights.
            weights: where an engine elsewhere finds them, as its learner published them; None where pool and learner share
                the parameters.
        """
        ...

    def metrics(self) -> dict[str, float]:
        """Figures of the workers by name; none where there are none."""
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

    def logprobs(self, questions: Sequence[tuple[Prompt, Sequence[IntArray]]]) -> list[list[FloatArray]]:
        """How likely the policy finds completions that it need not have sampled.

        Args:
            questions: prompts, each with completions of it, int64 [T].

        Returns:
            For each prompt and each of its completions float32 [T]: log-probabilities at temperature 1.
        """
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
