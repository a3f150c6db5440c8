"""Ray shell around one engine: an actor, and the handle by which a pool speaks to it. No logic of its own.

Imported where Ray is installed only.
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

from rlmed.core.types import Prompt, RolloutRequest
from rlmed.core.weights import Published, PushReport
from rollout.engine import Engine
from rollout.runner import EngineRunner
from rollout.weight_receiver import Reception
from rollout.worker import FinishedGroup, WorkerStatus

COLLECT_S = 5.0
"""A call of `collect` returns after so long without a group, so that no call waits for ever on a process that is gone."""
CALLS_AT_A_TIME = 8


@ray.remote(num_cpus=0, max_restarts=0, max_concurrency=CALLS_AT_A_TIME)
class RolloutActor:
    """One process with one engine."""

    def __init__(self, build: Callable[[], Engine], on_push: str) -> None:
        """Build the engine here, in the process that will run it."""
        self._engine = engine = build()
        self._runner = EngineRunner(engine, on_push=on_push, where=f"{socket.gethostname()}, process {os.getpid()}")
        self._reception = Reception(engine, self._runner.between_steps)

    def identity(self) -> tuple[str, int]:
        """Ray's id of this node, and the process id."""
        return ray.get_runtime_context().get_node_id(), os.getpid()

    def submit(self, requests: Sequence[tuple[RolloutRequest, ray.ObjectRef[Prompt]]]) -> None:
        """Queue requests, whose prompts lie in the object store."""
        prompts = [_owned(prompt) for prompt in ray.get([prompt for _, prompt in requests])]
        self._runner.submit(
            [_with_prompt(request, prompt) for (request, _), prompt in zip(requests, prompts, strict=True)]
        )

    def collect(self) -> list[FinishedGroup]:
        """Finished groups; none after a while."""
        return self._runner.collect(COLLECT_S)

    def update_weights(self, weights: Published) -> PushReport:
        """Fetch the buckets while the engine goes on, then apply them between two of its steps."""
        start = time.perf_counter()
        fetched = ray.get(list(weights.buckets))
        middle = time.perf_counter()
        self._runner.update_weights(weights.version, fetched)
        size = sum(bucket.data.nbytes for bucket in fetched)
        return PushReport(size, middle - start, time.perf_counter() - middle)

    def connect(self, transport: str, info: Mapping[str, Any]) -> None:
        """See `rollout.weight_receiver.Reception`, as for the next three; the learner calls them."""
        self._reception.connect(transport, info)

    def begin_update(self) -> None:
        """The learner is about to send."""
        self._reception.begin()

    def receive(self, info: Mapping[str, Any]) -> None:
        """Some weights are on their way."""
        self._reception.receive(info)

    def finish_update(self, version: int) -> None:
        """All weights are here."""
        self._reception.finish(version)

    def rest(self) -> None:
        """The engine sleeps until it is given weights."""
        self._runner.between_steps(self._engine.sleep, hold=True)

    def status(self) -> WorkerStatus:
        """How the engine is."""
        return self._runner.status()


class RayWorker:
    """A `rollout.worker.Worker` that is a Ray actor."""

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
            build: makes the engine, in the actor.
            on_push: see `rollout.runner.ON_PUSH`.
            options: of the actor: resources, placement, environment.
        """
        self.name = name
        self._actor = RolloutActor.options(**(options or {})).remote(build, on_push)
        self._identity = self._actor.identity.remote()
        self.address = self._actor

    def submit(self, requests: Sequence[RolloutRequest]) -> Future[None]:
        """See `Worker.submit`; a prompt with its pixels travels once."""
        sent = [(_with_prompt(request, None), ray.put(request.prompt)) for request in requests]
        return self._actor.submit.remote(sent).future()

    def collect(self) -> Future[list[FinishedGroup]]:
        """See `Worker.collect`."""
        return self._actor.collect.remote().future()

    def update_weights(self, version: int, weights: Any) -> Future[PushReport]:
        """See `Worker.update_weights`; `weights` are `Published`, or a reference to them. The version is theirs."""
        return self._actor.update_weights.remote(weights).future()

    def rest(self) -> Future[None]:
        """See `Worker.rest`."""
        return self._actor.rest.remote().future()

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
    # None only on the way, while the prompt itself lies in the object store
    return RolloutRequest(request.index, prompt, request.group_size, request.sampling)  # type: ignore[arg-type]


def _owned(prompt: Prompt) -> Prompt:
    """A copy whose arrays are not the store's read-only ones, which torch warns of."""
    images = {name: np.array(array) for name, array in prompt.image_inputs.items()}
    return dataclasses.replace(prompt, token_ids=np.array(prompt.token_ids), image_inputs=images)


def _kill_process(identity: Any) -> None:
    """End the process of an actor that may not listen: a stopped one does not hear `ray.kill`."""
    try:
        node, pid = ray.get(identity, timeout=1.0)
    except ray.exceptions.RayError:
        return  # it had died before it could say who it is
    # soft=False: on another node, the process id would be somebody else's. Nobody waits: the node may be gone or out of reach
    strategy = NodeAffinitySchedulingStrategy(node, soft=False)
    _signal_process.options(scheduling_strategy=strategy).remote(pid)


@ray.remote(num_cpus=0, max_retries=0)
def _signal_process(pid: int) -> None:
    """Kill a process of this node, if it still is an actor of ours."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            ours = b"RolloutActor" in file.read()
    except OSError:
        return
    if ours:
        os.kill(pid, signal.SIGKILL)
