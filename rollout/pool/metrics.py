"""Metrics of a worker pool."""

from __future__ import annotations

from collections.abc import Sequence

from rlmed.core.weights import PushReport
from rollout.pool.state import Slot


class PoolMetrics:
    """Worker losses since the start, idle time since the last reading, last push's duration."""

    def __init__(self, now: float) -> None:
        """Start at time `now`, in seconds."""
        self.workers_lost = self.groups_sampled_again = self.groups_late = 0
        self._measured, self._idle_s, self._idle_of_lost_s = now, 0.0, 0.0
        self._push: dict[str, float] = {}

    def lose(self, slot: Slot, now: float) -> None:
        """Count a lost worker and the groups it held."""
        self.workers_lost += 1
        self.groups_sampled_again += len(slot.leases)
        self._idle_of_lost_s += slot.idle(now)

    def pushed(self, reports: Sequence[PushReport]) -> None:
        """Record a push; its duration is that of the slowest worker."""
        if reports:
            self._push = {
                "rollout/push_fetch_s": max(report.fetch_s for report in reports),
                "rollout/push_apply_s": max(report.apply_s for report in reports),
            }

    def read(self, slots: Sequence[Slot], now: float) -> dict[str, float]:
        """Return the metrics; `rollout/idle_share` is workers' idle share since last reading."""
        idle = sum(slot.idle(now) for slot in slots) + self._idle_of_lost_s
        span = (now - self._measured) * len(slots)
        share = (idle - self._idle_s) / span if span > 0 else 0.0
        self._measured, self._idle_s = now, idle
        return {
            "rollout/workers_ready": float(sum(slot.ready for slot in slots)),
            "rollout/idle_share": min(1.0, max(0.0, share)),
            "rollout/workers_lost": float(self.workers_lost),
            "rollout/groups_sampled_again": float(self.groups_sampled_again),
            "rollout/groups_late": float(self.groups_late),
            **self._push,
        }
