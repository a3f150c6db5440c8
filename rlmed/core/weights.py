"""Weight sync: a learner's `push_weights` gives weights to a pool, `update_weights` to an engine.

| transport | who sends what | file |
| --- | --- | --- |
| none | one process: the engine reads the learner's parameters | |
| `object_store` | rank 0 puts buckets into Ray's object store, each worker fetches them | `rlmed.models.weights` |
| `nccl` | rank 0 broadcasts to all engines at once; gloo between CPUs | `rlmed.models.direct` |
| `ipc` | rank 0 and all engines share memory of one GPU | `rlmed.models.shared_memory` |

`learner.weight_push` chooses one for each push, `rollout.pool.pushes` delivers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

OBJECT_STORE, IPC, NCCL = "object_store", "ipc", "nccl"


class WeightError(RuntimeError):
    """Weights were damaged, incomplete or another model's; the message names tensor and remedy."""


class TransferError(Exception):
    """A direct push failed, and the engines have to fetch all weights; the message says why."""


@dataclass(frozen=True, slots=True)
class PushReport:
    """Cost of a weight update for one engine."""

    fetch_s: float
    """Seconds until all weights had arrived; the engine keeps sampling meanwhile."""
    apply_s: float
    """Seconds between engine steps: waiting for the engine, checking, copying, dropping caches."""


@dataclass(frozen=True, slots=True)
class EngineHandle:
    """What the learner knows of an engine."""

    name: str
    """Shown in messages."""
    address: Any
    """How another process reaches it; equal only for the same process."""
    devices: tuple[str, ...]
    """UUIDs of its GPUs; empty on a CPU, or if direct transfer is impossible."""


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """What a worker gets in a push."""

    version: int
    """Policy version when stored: newer than the push's if the learner has made a step since."""
    parts: list[Any]
    """The store's references to them; see `rlmed.models.weights.WeightPart`."""


@dataclass(frozen=True, slots=True)
class WeightUpdate:
    """New weights that a learner pushes to a pool; neither call blocks."""

    stored: Callable[[], Any]
    """Return what workers fetch weights by: `StoredWeights`, or a handle that resolves to it."""
    send: Callable[[Sequence[EngineHandle]], Future[PushReport | None] | None] = lambda engines: None
    """Send the weights directly to all these engines; None, or a future of None: it cannot."""


def last_line(error: BaseException) -> str:
    """Return an error's message without the traceback that Ray puts before it."""
    return (str(error).strip().splitlines() or [repr(error)])[-1].rstrip(".")
