"""What a worker pool counts and measures of itself."""

from __future__ import annotations

from collections.abc import Sequence

from rollout.leases import Slot
from rollout.worker import PushReport


class PoolMetrics:
    """Losses since the start, idleness between two readings, and the last push of weights."""

    def __init__(self, now: float) -> None:
        """Begin at time `now`, in seconds."""
        self.workers_lost = self.groups_sampled_again = self.groups_late = 0
        self._measured, self._idle_s, self._idle_of_lost_s = now, 0.0, 0.0
        self._push: dict[str, float] = {}

    def lose(self, slot: Slot, now: float) -> None:
        """A slot's worker is lost with what it held."""
        self.workers_lost += 1
        self.groups_sampled_again += len(slot.leases)
        self._idle_of_lost_s += slot.idle(now)

    def pushed(self, reports: Sequence[PushReport]) -> None:
        """The workers have new weights; the slowest counts."""
        if reports:
            self._push = {
                "rollout/push_fetch_s": max(report.fetch_s for report in reports),
                "rollout/push_apply_s": max(report.apply_s for report in reports),
            }

    def read(self, slots: Sequence[Slot], now: float) -> dict[str, float]:
        """The figures; `rollout/idle_share` is the share of the workers' time since the last reading without work."""
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
