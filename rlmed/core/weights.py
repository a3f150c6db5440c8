"""Weight sync: a learner's `push_weights` gives weights to a pool, `update_weights` to an engine.

| transport | who sends what | file |
| --- | --- | --- |
| none | one process: the engine reads the learner's parameters | |
| `object_store` | rank 0 puts buckets into Ray's object store, each worker fetches them | `rlmed.models.weights` |
| `ipc`, `nccl` | rank 0 sends to all engines at once, from GPU to GPU | `rollout.vllm_backend.weight_transfer` |
| `nccl` | the same to native engines; gloo between CPUs | `rlmed.models.direct` |

`learner.weight_push` chooses one for each push; `rlmed.models.sender` is what rank 0 does in every
direct one; `rollout.pool.pushes` delivers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

OBJECT_STORE, IPC, NCCL = "object_store", "ipc", "nccl"

STAGES = {"connect": False, "begin_update": True, "receive": True, "finish_update": False}
"""Engine methods that rank 0 calls to send directly; True: no engine step until the next call."""


class WeightError(RuntimeError):
    """Weights were damaged, incomplete or another model's; the message names tensor and remedy."""


class NotConnectedError(Exception):
    """Learner and engines could not connect directly; nothing was sent, no weights have changed."""


class TransferError(Exception):
    """A direct transfer was incomplete: the engines hold a mixture of old and new weights."""


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
    """Weights in a store that workers fetch from."""

    version: int
    """Policy version when stored: newer than the push's if the learner has made a step since."""
    buckets: list[Any]
    """The store's reference to each bucket."""


@dataclass(frozen=True, slots=True)
class WeightUpdate:
    """New weights that a learner pushes to a pool; neither call blocks."""

    stored: Callable[[], Any]
    """Return what workers fetch weights by: `StoredWeights`, or a handle that resolves to it."""
    send: Callable[[Sequence[EngineHandle]], Future[PushReport] | None] = lambda engines: None
    """Send the weights directly to all these engines at once; None if engines have to fetch them.

    The future's `NotConnectedError` means that they have to fetch after all, `TransferError` that
    they are lost.
    """


CallEngine = Callable[..., Future[None]]
"""Start a stage of a direct push at an engine: takes `EngineHandle`, one of `STAGES`, arguments."""


def last_line(error: BaseException) -> str:
    """Return an error's message without the traceback that Ray puts before it."""
    return (str(error).strip().splitlines() or [repr(error)])[-1].rstrip(".")
