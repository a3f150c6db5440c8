"""The learner's half of a weight push; `rollout.weight_receiver` is the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rlmed.core.weights import WeightBucket
from rlmed.models.weights import BUCKET_BYTES, make_buckets


@dataclass(frozen=True, slots=True)
class Published:
    """Weights that engines may fetch."""

    buckets: list[Any]
    """What the store gave for each bucket; kept for as long as a worker may need these weights."""
    bytes: int
    gather_s: float
    """Seconds for copying (and gathering) the parameters and putting them into the store."""


def publish(
    tensors: Iterable[tuple[str, Tensor]],
    store: Callable[[WeightBucket], Any],
    *,
    bucket_bytes: int = BUCKET_BYTES,
) -> Published:
    """Copy the current weights into buckets and give each to `store`.

    Args:
        tensors: names and whole tensors; where they are gathered from many ranks, all ranks iterate, and this one stores.
        store: copies a bucket and returns what a worker fetches the copy by.
        bucket_bytes: bound on a bucket, and so on the memory that is needed besides the store's.
    """
    start, size = time.perf_counter(), 0
    references = []
    for bucket in make_buckets(tensors, bucket_bytes):
        size += bucket.data.nbytes
        references.append(store(bucket))
    return Published(references, size, time.perf_counter() - start)
