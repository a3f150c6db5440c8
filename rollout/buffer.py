"""Admit prompts, score their groups, and choose which groups a step trains on."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from rlmed.core.protocols import ClusterError, RolloutPool
from rlmed.core.types import RolloutGroup, RolloutRequest, ScoredGroup


class GroupBuffer:
    """Buffer of admitted groups: oldest admission step first, then in order of completion.

    At most `groups_per_step * (1 + max_staleness)` groups are in the buffer or the batch, and each
    step takes the `groups_per_step` oldest, so no group waits longer than `max_staleness` steps,
    however slow it is. (By order of completion alone, a long group could be overtaken forever.)

    Example:
        >>> buffer = GroupBuffer(pool, stream.request, rubric.score, groups_per_step=4) # doctest: +SKIP
        >>> batch, discarded = buffer.next_batch(step=1, steps=300, version=0)          # doctest: +SKIP
    """

    def __init__(
        self,
        pool: RolloutPool,
        request: Callable[[int], RolloutRequest],
        score: Callable[[RolloutGroup], ScoredGroup],
        *,
        groups_per_step: int,
        max_staleness: int = 0,
        max_discarded: int = 0,
        is_kept: Callable[[ScoredGroup], bool] = lambda _: True,
        begin: Callable[[RolloutGroup], None] | None = None,
    ) -> None:
        """Start empty; `next_batch` admits the first requests.

        Args:
            pool: samples the groups.
            request: returns the request at an index; the same one until its group is consumed or
                discarded.
            score: computes a group's rewards.
            groups_per_step: size of a batch.
            max_staleness: steps between admission and consumption; 0 is on-policy.
            max_discarded: a step that has discarded more groups than this admits no replacements.
            is_kept: False to discard a group and replace it.
            begin: starts to score a group, without waiting; called when one is sampled, in whatever
                thread sees it first. With it, `score` is called for the groups of a batch together,
                when all of them are sampled, and waits for what was begun. None where scores take
                no time.
        """
        self._pool, self._request, self._score, self._is_kept = pool, request, score, is_kept
        self._groups_per_step, self._max_staleness, self._max_discarded = groups_per_step, max_staleness, max_discarded
        self._cursor = 0
        self._interrupted: list[int] = []
        # step and policy version at admission, by index
        self._admitted: dict[int, tuple[int, int]] = {}
        self._finished: dict[int, RolloutGroup] = {}  # in order of completion
        self._begin = begin
        self._scoring_s = 0.0
        if begin is not None:
            pool.on_sampled(self._begin_admitted)

    @property
    def on_policy(self) -> bool:
        """True when every group is trained on by the weights that sampled it."""
        return self._max_staleness == 0

    @property
    def pending(self) -> list[int]:
        """Indices admitted and not consumed."""
        return [*self._interrupted, *self._admitted]

    def state(self) -> dict[str, Any]:
        """Return the state as JSON for a checkpoint: next index, and indices to request again."""
        return {"cursor": self._cursor, "pending": self.pending}

    def restore(self, cursor: int, pending: list[int]) -> None:
        """Resume from `state`; the next batch requests the pending groups again."""
        self._cursor, self._interrupted = cursor, list(pending)

    def next_batch(self, step: int, *, steps: int, version: int) -> tuple[list[ScoredGroup], list[ScoredGroup]]:
        """Admit prompts, wait for their groups, score them, and return those of a step.

        Args:
            step: the step that will train on them, counted from 1.
            steps: the last step of the run; nothing is admitted beyond it.
            version: policy version last pushed to the workers.

        Returns:
            The batch, smaller than `groups_per_step` if too many were discarded, and the discarded
            groups.

        Raises:
            ClusterError: if a group is too old: an engine did not use the weights pushed to it.
        """
        for index in self._interrupted:
            self._submit(index, step, version)
        self._interrupted = []
        batch: list[ScoredGroup] = []
        discarded: list[ScoredGroup] = []
        # the oldest groups are consumed first, so one admitted now is consumed within
        # `max_staleness` steps
        admissible = self._groups_per_step * min(1 + self._max_staleness, steps - step + 1)
        while len(batch) < self._groups_per_step:
            while len(self._admitted) + len(batch) < admissible and len(discarded) <= self._max_discarded:
                self._submit(self._cursor, step, version)
                self._cursor += 1
            self._pool.flush()
            if not self._admitted:  # replacement limit reached: train on what there is
                break
            for group in self._take(step, self._groups_per_step - len(batch)):
                start = time.perf_counter()
                scored = self._score(group)
                self._scoring_s += time.perf_counter() - start
                (batch if self._is_kept(scored) else discarded).append(scored)
        return batch, discarded

    def metrics(self) -> dict[str, float]:
        """Return the seconds for which `next_batch` waited for scores since the last reading."""
        waited, self._scoring_s = self._scoring_s, 0.0
        return {"seconds/reward": waited}

    def _submit(self, index: int, step: int, version: int) -> None:
        request = self._request(index)
        self._admitted[index] = (step, version)
        self._pool.submit(request)

    def _begin_admitted(self, group: RolloutGroup) -> None:
        """Start to score a group of this buffer; others may share its pool."""
        if self._begin is not None and group.request.index in self._admitted:
            self._begin(group)

    def _take(self, step: int, wanted: int) -> list[RolloutGroup]:
        """Wait for the next groups to consume: one, or all that are `wanted` if scores take time.

        Which groups these are, and in which order, does not depend on how long scores take.
        """
        if self._begin is None:
            return [self._collect(step)]
        groups = [self._collect(step) for _ in range(min(wanted, len(self._admitted)))]
        if not self.on_policy:
            self._pool.sample_ahead()  # so that the next step's scores come while this one is learnt
        return groups

    def _collect(self, step: int) -> RolloutGroup:
        """Wait for the next group to consume and return it."""
        oldest = min(admitted for admitted, _ in self._admitted.values())
        while (index := next((i for i in self._finished if self._admitted[i][0] == oldest), None)) is None:
            group = self._pool.collect()
            self._finished[group.request.index] = group
        admitted, version = self._admitted.pop(index)
        group = self._finished.pop(index)
        if step - admitted > self._max_staleness or group.min_version < version:
            raise ClusterError(
                f"group {index} was admitted for step {admitted} under policy version {version}, sampled by version "
                f"{group.min_version} and would be trained on in step {step}, with algo.max_staleness={self._max_staleness}: "
                "an engine has older weights than were pushed to it"
            )
        return group
