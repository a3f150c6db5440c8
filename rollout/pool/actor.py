"""Ray wrapper around one engine: the actor and the pool's handle on it. No logic of its own.

Import it only where Ray is installed.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlmed.core.process.collection import resume
from rlmed.core.types import Prompt, RolloutRequest
from rlmed.core.weights import PushReport, StoredWeights
from rollout.engine import Engine
from rollout.pool.runner import EngineRunner
from rollout.pool.worker import FinishedGroup, WorkerStatus

COLLECT_S = 5.0
"""Seconds until `collect` returns without a group, so no call waits forever on a dead process."""
CALLS_AT_A_TIME = 8


@ray.remote(num_cpus=0, max_restarts=0, max_concurrency=CALLS_AT_A_TIME)
class RolloutActor:
    """Process that hosts one engine."""

    def __init__(self, build: Callable[[], Engine], on_push: str) -> None:
        """Build the engine in this process, which will run it."""
        resume()  # its libraries have been loaded
        self._engine = engine = build()
        self._runner = EngineRunner(engine, on_push=on_push, where=f"{socket.gethostname()}, process {os.getpid()}")

    def identity(self) -> tuple[str, int]:
        """Return Ray's node id and the process id."""
        return ray.get_runtime_context().get_node_id(), os.getpid()

    def submit(self, requests: Sequence[tuple[RolloutRequest, ray.ObjectRef[Prompt]]]) -> None:
        """Queue requests; their prompts are in the object store."""
        prompts = [_owned(prompt) for prompt in ray.get([prompt for _, prompt in requests])]
        self._runner.submit(
            [_with_prompt(request, prompt) for (request, _), prompt in zip(requests, prompts, strict=True)]
        )

    def collect(self) -> list[FinishedGroup]:
        """Return finished groups; an empty list after `COLLECT_S` without one."""
        return self._runner.collect(COLLECT_S)

    def update_weights(self, weights: StoredWeights) -> PushReport:
        """Fetch weights while the engine keeps sampling, then apply them between two steps."""
        start = time.perf_counter()
        fetched = ray.get(weights.parts)
        middle = time.perf_counter()
        self._runner.update_weights(weights.version, fetched)
        return PushReport(middle - start, time.perf_counter() - middle)

    def sleep(self) -> None:
        """Put the engine to sleep until the next weights arrive."""
        self._runner.between_steps(self._engine.sleep, hold=True)

    def status(self) -> WorkerStatus:
        """Return the engine's status."""
        return self._runner.status()


class RayWorker:
    """A `rollout.pool.worker.Worker` that is a Ray actor."""

    def __init__(
        self,
        name: str,
        build: Callable[[], Engine],
        *,
        on_push: str = "continue",
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """Start an actor without waiting for it.

        Args:
            name: for messages.
            build: builds the engine inside the actor.
            on_push: see `rollout.pool.runner.ON_PUSH`.
            options: Ray options of the actor: resources, placement, environment.
        """
        self.name = name
        actor: Any = RolloutActor  # type checkers see the class, not what `ray.remote` makes of it
        self._actor = actor.options(**(options or {})).remote(build, on_push)
        self._identity = self._actor.identity.remote()
        self.address = self._actor

    def submit(self, requests: Sequence[RolloutRequest]) -> Future[None]:
        """See `Worker.submit`; each prompt is sent once, with its pixels."""
        sent = [(_with_prompt(request, None), ray.put(request.prompt)) for request in requests]
        return self._actor.submit.remote(sent).future()

    def collect(self) -> Future[list[FinishedGroup]]:
        """See `Worker.collect`."""
        return self._actor.collect.remote().future()

    def update_weights(self, weights: Any) -> Future[PushReport]:
        """See `Worker.update_weights`."""
        return self._actor.update_weights.remote(weights).future()

    def sleep(self) -> Future[None]:
        """See `Worker.sleep`."""
        return self._actor.sleep.remote().future()

    def status(self) -> Future[WorkerStatus]:
        """See `Worker.status`."""
        return self._actor.status.remote().future()

    def kill(self) -> None:
        """See `Worker.kill`."""
        ray.kill(self._actor)
        ready, _ = ray.wait([self._identity], timeout=0)
        if ready:
            _kill_process(self._identity)


def _with_prompt(request: RolloutRequest, prompt: Prompt | None) -> RolloutRequest:
    # None only in transit, while the prompt itself is in the object store
    return RolloutRequest(request.index, prompt, request.group_size, request.sampling)  # type: ignore[arg-type]


def _owned(prompt: Prompt) -> Prompt:
    """Return a copy with writable arrays: torch warns about the store's read-only ones."""
    images = {name: np.array(array) for name, array in prompt.image_inputs.items()}
    return dataclasses.replace(prompt, token_ids=np.array(prompt.token_ids), image_inputs=images)


def _kill_process(identity: Any) -> None:
    """Kill an actor's process by signal: a stopped process ignores `ray.kill`."""
    try:
        node, pid = ray.get(identity, timeout=1.0)
    except ray.exceptions.RayError:
        return  # the actor died before it reported its process id
    # soft=False: on another node the process id means another process. Don't wait: the node may be
    # gone or unreachable
    strategy = NodeAffinitySchedulingStrategy(node, soft=False)
    _signal_process.options(scheduling_strategy=strategy).remote(pid)


@ray.remote(num_cpus=0, max_retries=0)
def _signal_process(pid: int) -> None:
    """Kill a process on this node if it is still one of our actors."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            ours = b"RolloutActor" in file.read()
    except OSError:
        return
    if ours:
        os.kill(pid, signal.SIGKILL)
