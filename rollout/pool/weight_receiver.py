"""The engine's half of a weight push; `learner.weight_publisher` is the learner's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

from rlmed.core.weights import WeightBucket
from rlmed.models.weights import bucket_tensors
from rollout.engine import DirectEngine, Engine


def update_weights(engine: Engine, version: int, buckets: Sequence[WeightBucket]) -> None:
    """Load the weights of `version` into an engine; call it between two steps, in the engine's thread.

    Raises:
        WeightError: if the bytes are damaged or belong to another model; the engine keeps its old weights.
    """
    for bucket in buckets:
        bucket.verify()
    engine.begin_update({spec.name: spec.shape for bucket in buckets for spec in bucket.specs})
    for bucket in buckets:
        engine.load_weights(bucket_tensors(bucket))
    engine.finish_update(version)


class BetweenSteps(Protocol):
    """See `rollout.pool.runner.EngineRunner.between_steps`."""

    def __call__(self, job: Callable[[], None], *, hold: bool = False) -> None:
        """See above."""
        ...


class DirectWeightReceiver:
    """Receives weights that the learner sends directly; each method waits until the engine is done.

    From `begin` to `finish` the engine makes no step. An abandoned push leaves it so: the worker is replaced, or
    fetches all weights from the store.
    """

    def __init__(self, engine: Engine, between_steps: BetweenSteps) -> None:
        """Wrap a `DirectEngine`; engines without `devices` never receive these calls."""
        self._engine, self._between_steps = cast(DirectEngine, engine), between_steps

    def connect(self, transport: str, info: Mapping[str, Any]) -> None:
        """See `DirectEngine.connect`."""
        self._between_steps(lambda: self._engine.connect(transport, info))

    def begin(self) -> None:
        """See `Engine.begin_update`."""
        self._between_steps(self._engine.begin_update, hold=True)

    def receive(self, info: Mapping[str, Any]) -> None:
        """See `DirectEngine.receive`."""
        self._between_steps(lambda: self._engine.receive(info), hold=True)

    def finish(self, version: int) -> None:
        """See `Engine.finish_update`."""
        self._between_steps(lambda: self._engine.finish_update(version))
