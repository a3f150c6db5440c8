"""Ray shell around the learner: an actor a rank, and the handle that the loop drives. No logic of its own.

Imported where Ray is installed only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import torch

from learner.distributed import OneRank, Ranks, free_meeting_point, join
from learner.learner import PolicyLearner
from learner.weight_publisher import Published, publish
from rlmed.core.protocols import ClusterError, RolloutPool
from rlmed.core.types import TrainGroup

Report = Callable[[Sequence[TrainGroup], str], None]
"""Told of a batch that was skipped, and why."""
Build = Callable[[Report, Ranks], PolicyLearner]
"""Makes the learner of one rank: given what skipped batches are reported to, and the ranks that it is one of."""


class LearnerError(ClusterError):
    """A learner rank is gone or silent; the message names it, the cause and the cure."""


@ray.remote(num_cpus=0, max_restarts=0)
class LearnerActor:
    """One rank."""

    def __init__(self) -> None:
        """An empty process; `build` makes the learner."""
        self._skipped: list[str] = []
        self._learner: PolicyLearner

    def meeting_point(self) -> str:
        """Where the other ranks find this one."""
        return free_meeting_point(ray.util.get_node_ip_address())

    def build(
        self, build: Build, rank: int, size: int, meeting_point: str | None, device: str, timeout_s: float
    ) -> int:
        """Make the learner, together with the other ranks where there are any; returns its policy version."""
        ranks = join(rank, size, meeting_point, device=device, timeout_s=timeout_s) if meeting_point else OneRank()
        self._learner = build(lambda _, reason: self._skipped.append(reason), ranks)
        return self._learner.policy_version

    def step(self, groups: Sequence[TrainGroup]) -> tuple[dict[str, float], int, list[str]]:
        """Metrics, the new policy version, and why updates were skipped."""
        self._skipped.clear()
        metrics = self._learner.step(groups)
        return metrics, self._learner.policy_version, list(self._skipped)

    def publish(self, dtype: str | None) -> Published:
        """Put the current weights into the object store of this node."""
        return publish(self._learner.full_weights(), ray.put, dtype=None if dtype is None else getattr(torch, dtype))

    def save(self, folder: Path) -> None:
        """See `rlmed.core.protocols.Learner.save`."""
        self._learner.save(folder)

    def load(self, folder: Path) -> int:
        """See `rlmed.core.protocols.Learner.load`; returns the policy version."""
        self._learner.load(folder)
        return self._learner.policy_version


class RayLearner:
    """See `rlmed.core.protocols.Learner`: the ranks of a learner as Ray actors, driven together."""

    def __init__(
        self,
        build: Build,
        *,
        on_bad_step: Report,
        step_s: float,
        device: str = "cpu",
        dtype: str | None = None,
        options: Sequence[Mapping[str, Any]] = ({},),
    ) -> None:
        """Start the ranks and wait until they have loaded.

        Args:
            build: makes the learner of a rank, in its actor.
            on_bad_step: told of batches that were skipped.
            step_s: seconds that any call may take.
            device: of the ranks, "cpu" or "cuda".
            dtype: in which weights are pushed; None keeps the policy's.
            options: of each rank's actor: resources, placement; their number is the number of ranks.

        Raises:
            LearnerError: when a rank cannot be built.
        """
        self._on_bad_step, self._step_s, self._dtype = on_bad_step, step_s, dtype
        self._actors = [LearnerActor.options(**entry).remote() for entry in options]
        size = len(self._actors)
        meeting_point = None if size == 1 else self._call("start", "meeting_point", ranks=1)[0]
        each = [(build, rank, size, meeting_point, device, step_s) for rank in range(size)]
        self._version: int = self._call("load its model", "build", each=each)[0]

    @property
    def policy_version(self) -> int:
        """See `rlmed.core.protocols.Learner.policy_version`."""
        return self._version

    def step(self, groups: Sequence[TrainGroup]) -> dict[str, float]:
        """See `rlmed.core.protocols.Learner.step`; the groups travel once, whatever the number of ranks."""
        metrics, self._version, skipped = self._call("learn", "step", ray.put(list(groups)))[0]
        for reason in skipped:
            self._on_bad_step(groups, reason)
        return dict(metrics)

    def push_weights(self, pool: RolloutPool) -> None:
        """See `rlmed.core.protocols.Learner.push_weights`; the weights go from rank 0's node to the workers' directly."""
        published: Published = self._call("publish its weights", "publish", self._dtype)[0]
        pool.update_weights(self._version, published.buckets)

    def save(self, folder: Path) -> None:
        """See `rlmed.core.protocols.Learner.save`; the folder must be on a disk that rank 0 shares."""
        self._call("save", "save", folder.absolute())

    def load(self, folder: Path) -> None:
        """See `rlmed.core.protocols.Learner.load`."""
        self._version = self._call("load a checkpoint", "load", folder.absolute())[0]

    def close(self) -> None:
        """End the ranks."""
        for actor in self._actors:
            ray.kill(actor)

    def _call(
        self,
        action: str,
        method: str,
        *arguments: Any,
        each: Sequence[tuple[Any, ...]] | None = None,
        ranks: int | None = None,
    ) -> list[Any]:
        """Call a method of all ranks (or the first `ranks`), with the same arguments or `each` its own; wait for all answers.

        Raises:
            LearnerError: when a rank is gone, raises, or does not answer in time.
        """
        actors = self._actors[:ranks]
        calls = [
            getattr(actor, method).remote(*own)
            for actor, own in zip(actors, each or [arguments] * len(actors), strict=True)
        ]
        waiting = dict(zip(calls, range(len(calls)), strict=True))
        while waiting:
            # a rank that fails is seen at once, although the others wait for it
            ready, _ = ray.wait(list(waiting), timeout=self._step_s)
            if not ready:
                silent = ", ".join(str(rank) for rank in waiting.values())
                raise LearnerError(
                    f"learner rank {silent} did not {action} within {self._step_s:.0f} s (cluster.learner_timeout_s). Look at "
                    "its process, then go on from the last checkpoint with resume=auto"
                )
            rank = waiting.pop(ready[0])
            try:
                ray.get(ready[0])
            except ray.exceptions.RayTaskError as error:
                raise error.as_instanceof_cause() from None
            except ray.exceptions.RayError as error:
                cause = str(error).strip().splitlines()[0]
                raise LearnerError(
                    f"learner rank {rank} was lost while it should {action}: {cause} Go on from the last checkpoint with "
                    "resume=auto"
                ) from error
        return list(ray.get(calls))
