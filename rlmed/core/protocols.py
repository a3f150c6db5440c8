"""Interfaces of the two parts that the loop drives: rollout pool and learner.

Neither knows the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from rlmed.core.types import FloatArray, IntArray, Prompt, RolloutGroup, RolloutRequest, TrainGroup
from rlmed.core.weights import WeightUpdate

LOST = 3
"""Exit status when a process of the run is lost: repeat the command with resume=auto."""


class ClusterError(RuntimeError):
    """A process is lost, silent or out of step, for good; the message says which and what to do."""


class RolloutPool(Protocol):
    """Samples groups of completions."""

    @property
    def in_flight(self) -> int:
        """Number of requests submitted and not yet collected."""
        ...

    def submit(self, request: RolloutRequest) -> None:
        """Queue a request.

        Raises:
            ValueError: if it can never be sampled.
        """
        ...

    def flush(self) -> None:
        """Start the submitted requests together; implied by `collect`. Until then they may wait."""
        ...

    def collect(self) -> RolloutGroup:
        """Wait for the next group, in order of completion; each request is answered exactly once.

        Raises:
            RuntimeError: if nothing is in flight.
        """
        ...

    def on_sampled(self, seen: Callable[[RolloutGroup], None]) -> None:
        """Call `seen` with each group as soon as it is sampled, before `collect` returns it.

        It may run in another thread, while the learner works, and must return soon.
        """
        ...

    def sample_ahead(self) -> None:
        """Finish what is in flight, if nobody samples it while the learner works; else no-op."""
        ...

    def sleep(self) -> None:
        """Release GPU memory for the learner until the next `update_weights`."""
        ...

    def update_weights(self, version: int, weights: WeightUpdate | None = None) -> None:
        """Give every ready worker the weights of policy `version`; return when they have them.

        Args:
            version: policy version of the weights.
            weights: how engines in other processes get the weights; None if pool and learner share
                parameters.
        """
        ...

    def metrics(self) -> dict[str, float]:
        """Return the workers' metrics by name; empty without workers."""
        ...

    def close(self) -> None:
        """Release the pool's resources; requests in flight are dropped."""
        ...


class Learner(Protocol):
    """Updates the policy."""

    @property
    def policy_version(self) -> int:
        """Number of optimizer steps taken so far."""
        ...

    def step(self, groups: Sequence[TrainGroup]) -> dict[str, float]:
        """Train on one batch of groups and return the step's metrics by name."""
        ...

    def logprobs(self, requests: Sequence[tuple[Prompt, Sequence[IntArray]]]) -> list[list[FloatArray]]:
        """Return the policy's log-probabilities of completions, which it need not have sampled.

        Args:
            requests: prompts, each with its completions, int64 [T].

        Returns:
            Per prompt and completion: float32 [T], log-probabilities at temperature 1.
        """
        ...

    def push_weights(self, pool: RolloutPool) -> None:
        """Send current weights and version to the pool; return when all ready workers have them."""
        ...

    def save(self, folder: Path) -> Callable[[], None]:
        """Secure the model, as a Hugging Face folder, and the optimizer's state; return the writer.

        The state is that of this moment: the learner may go on while another thread calls the
        writer, which fills `folder`, an existing one. One is called before the next `save`.
        """
        ...

    def load(self, folder: Path) -> None:
        """Restore the state written by `save`."""
        ...
