"""The engine's half of a weight push; `learner.weight_publisher` is the other."""

from __future__ import annotations

from collections.abc import Sequence

from rlmed.core.weights import WeightBucket
from rlmed.models.weights import bucket_tensors
from rollout.engine import Engine


def update_weights(engine: Engine, version: int, buckets: Sequence[WeightBucket]) -> None:
    """Give an engine the weights of `version`; between two of its steps, in the thread that runs it.

    Raises:
        WeightError: when the bytes are damaged or belong to another model; the engine keeps its old weights then.
    """
    for bucket in buckets:
        bucket.verify()
    engine.begin_update({spec.name: spec.shape for bucket in buckets for spec in bucket.specs})
    for bucket in buckets:
        engine.load_weights(bucket_tensors(bucket))
    engine.finish_update(version)
