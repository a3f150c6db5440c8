"""Admit whole groups in order while rows are free."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from rlmed.core.types import RolloutRequest

START_SHARE = 0.25
"""Share of the rows that must be free before part of a backlog starts beside what runs."""


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Limits that bound the engine's memory."""

    max_completions: int = 64
    """Completions sampled at the same time."""
    max_prompt_tokens: int = 1024
    """Longest prompt accepted."""
    prefill_tokens: int = 8192
    """Prompt tokens per forward pass, which always computes at least one prompt."""


class Scheduler:
    """Queue of requests; a group starts once all its completions fit."""

    def __init__(self, limits: EngineLimits) -> None:
        """Start with an empty queue."""
        self.limits = limits
        self._waiting: deque[RolloutRequest] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def submit(self, request: RolloutRequest) -> None:
        """Queue a request.

        Raises:
            ValueError: if it can never run.
        """
        length, limits = len(request.prompt.token_ids), self.limits
        if request.group_size < 1:
            raise ValueError(f"group_size must be at least 1, got {request.group_size}")
        if request.group_size > limits.max_completions:
            raise ValueError(
                f"group_size {request.group_size} exceeds rollout.max_completions={limits.max_completions}: raise the latter"
            )
        if not 0 < length <= limits.max_prompt_tokens:
            raise ValueError(
                f"prompt {request.prompt.example.id!r} has {length} tokens; the engine accepts 1 to {limits.max_prompt_tokens}"
                ": raise data.max_prompt_tokens"
            )
        if request.sampling.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {request.sampling.max_tokens}")
        self._waiting.append(request)

    def admit(self, free_rows: int, *, running: bool = False) -> list[RolloutRequest]:
        """Remove and return the requests that start now, first come, first served.

        Small groups never overtake: order of completion already favours short ones. While others
        are `running`, a backlog waits until a share of the rows is free, since each start holds up
        all that run.
        """
        admitted: list[RolloutRequest] = []
        if running and free_rows < START_SHARE * self.limits.max_completions and not self._all_fit(free_rows):
            return admitted
        tokens = 0
        while self._waiting:
            request = self._waiting[0]
            tokens += len(request.prompt.token_ids)
            if request.group_size > free_rows or (admitted and tokens > self.limits.prefill_tokens):
                break
            admitted.append(self._waiting.popleft())
            free_rows -= request.group_size
        return admitted

    def _all_fit(self, free_rows: int) -> bool:
        return sum(request.group_size for request in self._waiting) <= free_rows
