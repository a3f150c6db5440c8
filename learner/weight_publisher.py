"""The learner's half of a weight push; `rollout.pool.weight_receiver` is the engine's."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

from rlmed.core.config.checks import require
from rlmed.core.weights import StoredWeights, WeightBucket
from rlmed.models.weights import BUCKET_BYTES, make_buckets

OBJECT_STORE, IPC, NCCL = "object_store", "ipc", "nccl"
"""Transports: bytes in Ray's object store; GPU memory shared by two processes; messages between GPUs."""


def publish(
    tensors: Iterable[tuple[str, Tensor]],
    store: Callable[[WeightBucket], Any],
    *,
    version: int,
    bucket_bytes: int = BUCKET_BYTES,
) -> StoredWeights:
    """Copy the current weights into buckets and pass each to `store`.

    Args:
        tensors: names and full tensors; if gathered from many ranks, all ranks iterate, and this one stores.
        store: copies a bucket and returns a reference by which a worker fetches the copy.
        version: policy version.
        bucket_bytes: bound on a bucket, and so on the memory needed besides the store's.
    """
    start, size = time.perf_counter(), 0
    references = []
    for bucket in make_buckets(tensors, bucket_bytes):
        size += bucket.data.nbytes
        references.append(store(bucket))
    return StoredWeights(version, references, size, time.perf_counter() - start)


def choose_transport(setting: str, learner: str, engines: Sequence[Sequence[str]]) -> str:
    """Choose the transport from learner rank 0 to the engines.

    Args:
        setting: `cluster.weight_transfer`.
        learner: name of rank 0's GPU (see `EngineHandle.devices`); empty without one.
        engines: names of each engine's GPUs.

    Returns:
        "ipc" if all engines run on rank 0's GPU; "nccl" if none does and no two share a GPU, since an NCCL group may
        contain a GPU only once; else "object_store".

    Raises:
        ConfigError: if the setting names a transport that these devices do not allow.
    """
    devices = [device for engine in engines for device in engine]
    known = bool(learner) and len(engines) > 0 and all(engines)
    together = known and set(devices) == {learner}
    apart = known and len({learner, *devices}) == 1 + len(devices)
    if setting == "auto":
        return IPC if together else NCCL if apart else OBJECT_STORE
    where = f"rank 0 is on {learner or 'a CPU'}, the engines are on {[list(engine) for engine in engines]}"
    require(
        setting != IPC or together,
        f"cluster.weight_transfer=ipc needs learner rank 0 and all vLLM engines on one GPU: {where}. Use auto",
    )
    require(
        setting != NCCL or apart,
        f"cluster.weight_transfer=nccl needs a GPU for learner rank 0 and others, each used once, for vLLM engines: {where}. "
        "Use auto",
    )
    return setting
