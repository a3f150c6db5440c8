"""Run a native engine whose groups come in batches."""

from __future__ import annotations

from collections.abc import Sequence

from rlmed.core.types import Completion, RolloutRequest
from rlmed.models.policy import Policy
from rollout.native.engine import NativeEngine
from rollout.native.scheduler import EngineLimits
from rollout.native.slots import StepPlan


def completions_of(policy: Policy, plan: StepPlan, requests: Sequence[RolloutRequest]) -> list[Completion]:
    """Submit some requests while others run; return all completions in the requests' order."""
    engine = NativeEngine(policy, lambda ids: "", EngineLimits(max_completions=8), plan)
    waiting, groups = list(requests), []
    while engine.busy or waiting:
        if waiting:
            engine.submit(waiting.pop(0))
        groups += engine.step()
    groups.sort(key=lambda group: group.request.index)
    return [completion for group in groups for completion in group.completions]
