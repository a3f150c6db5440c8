"""Pool for `cluster=local`: one engine in this process, usually on the learner's own parameters."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from rlmed.core.types import RolloutGroup, RolloutRequest
from rlmed.core.weights import WeightUpdate
from rollout.engine import Engine


class LocalPool:
    """See `rlmed.core.protocols.RolloutPool`."""

    def __init__(self, engine: Engine, *, on_push: str = "continue") -> None:
        """Step `engine` inside `collect`; `on_push` is one of `rollout.pool.runner.ON_PUSH`."""
        self._on_push = on_push
        self.engine = engine
        self._finished: deque[RolloutGroup] = deque()
        self._in_flight = 0
        self._seen: Callable[[RolloutGroup], None] = lambda group: None

    @property
    def in_flight(self) -> int:
        """Number of requests submitted and not yet collected."""
        return self._in_flight

    def submit(self, request: RolloutRequest) -> None:
        """Queue a request; raises ValueError if it can never run."""
        self.engine.submit(request)
        self._in_flight += 1

    def flush(self) -> None:
        """No-op: the engine runs inside `collect`."""

    def collect(self) -> RolloutGroup:
        """Sample until a group finishes and return it."""
        if self._in_flight == 0:
            raise RuntimeError("collect() was called with no request in flight")
        while not self._finished:
            self._step()
        self._in_flight -= 1
        return self._finished.popleft()

    def on_sampled(self, seen: Callable[[RolloutGroup], None]) -> None:
        """Call `seen` with each group when its last completion has ended, in this thread."""
        self._seen = seen

    def sample_ahead(self) -> None:
        """Sample all that is in flight; `collect` then returns it at once."""
        while self.engine.busy:
            self._step()

    def sleep(self) -> None:
        """No-op: on a CPU the engine has freed its pages; on a GPU graphs know their addresses."""

    def update_weights(self, version: int, weights: WeightUpdate | None = None) -> None:
        """Set the policy version; the engine reads the learner's parameters."""
        if weights is not None:
            raise ValueError("the local pool shares the learner's parameters and takes no others")
        if self._on_push == "finish":
            self.sample_ahead()
        self.engine.update_weights(version)

    def metrics(self) -> dict[str, float]:
        """Return no metrics: there are no workers."""
        return {}

    def close(self) -> None:
        """Drop everything in flight."""
        self.engine.abort()
        self._finished.clear()
        self._in_flight = 0

    def _step(self) -> None:
        groups = self.engine.step()
        for group in groups:
            self._seen(group)
        self._finished.extend(groups)
