"""Engine state of a running completion and of its group."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from rlmed.core.types import Completion, FinishReason, RolloutGroup, RolloutRequest


@dataclass(slots=True)
class Sequence:
    """A running completion."""

    group: SequenceGroup
    seed: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    min_version: int = 0
    max_version: int = 0
    text: str = ""
    sampled: int = 0
    """Tokens sampled, unread ones included; may exceed `max_tokens` after the end."""
    pages: list[int] = field(default_factory=list)
    """Its pages of keys and values."""


@dataclass(slots=True)
class SequenceGroup:
    """A request with its sequences and its prompt's positions."""

    request: RolloutRequest
    positions: Tensor
    """int64 [R, P] rotary positions of the prompt."""
    next_position: int
    """Position of the first completion token."""
    sequences: list[Sequence] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    """The prompt's pages of keys and values."""

    @classmethod
    def of(cls, request: RolloutRequest, positions: Tensor) -> SequenceGroup:
        """Make the group of a request, without sequences, from its prompt's positions."""
        return cls(request, positions, int(positions.max()) + 1)

    @property
    def finished(self) -> bool:
        """True once every completion has finished."""
        return all(sequence.finish_reason is not None for sequence in self.sequences)

    def to_rollout(self) -> RolloutGroup:
        """Return the finished group as a frozen record."""
        return RolloutGroup(self.request, tuple(_to_completion(sequence) for sequence in self.sequences))


def _to_completion(sequence: Sequence) -> Completion:
    assert sequence.finish_reason is not None
    return Completion(
        token_ids=np.asarray(sequence.token_ids, dtype=np.int64),
        rollout_logprobs=np.asarray(sequence.logprobs, dtype=np.float32),
        text=sequence.text,
        finish_reason=sequence.finish_reason,
        min_version=sequence.min_version,
        max_version=sequence.max_version,
    )
