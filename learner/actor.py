"""Ray wrapper around the learner: one actor per rank, and the handle that the loop drives.

No logic of its own.

Import it only where Ray is installed.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import ray
import torch

from learner.distributed import Parallelism, SingleProcess, free_init_method, init_distributed
from learner.learner import OnSkippedUpdate, PolicyLearner
from learner.likelihood import ScoringRequest
from learner.sharing import BatchShare, Split
from learner.supervised import SupervisedLearner
from learner.weight_push import DirectPush
from rlmed.core.process.collection import resume
from rlmed.core.protocols import ClusterError, RolloutPool
from rlmed.core.types import FloatArray
from rlmed.core.weights import OBJECT_STORE, EngineHandle, PushReport, StoredWeights, WeightUpdate
from rlmed.models.direct import DirectSender, DirectWeights
from rlmed.models.weights import gpu_name, make_buckets

LocalLearner = PolicyLearner | SupervisedLearner
"""What learns in a rank's process: from groups, or from written completions."""
Build = Callable[[OnSkippedUpdate, Parallelism], LocalLearner]
"""Builds a rank's learner from a callback for skipped batches and the parallelism of its ranks."""

LOSS_KNOWN_S = 30.0
"""Seconds to wait, after a rank fails, for the loss of another rank as its cause."""


class LearnerError(ClusterError):
    """A learner rank is lost or silent; the message names it, the cause and what to do."""


@ray.remote(num_cpus=0, max_restarts=0, concurrency_groups={"files": 1})
class LearnerActor:
    """Process that hosts one learner rank."""

    def __init__(self) -> None:
        """Start empty; `build` creates the learner."""
        resume()  # its libraries have been loaded
        self._skipped: list[str] = []
        self._learner: LocalLearner
        self._rank = 0
        self._sender: DirectSender | None = None
        self._shares_gpu = False
        self._write: Callable[[], None]

    def init_method(self) -> str:
        """Return the address at which the other ranks reach this one."""
        return free_init_method(ray.util.get_node_ip_address())

    def build(
        self,
        build: Build,
        rank: int,
        size: int,
        init_method: str | None,
        device: str,
        timeout_s: float,
        shares_gpu: bool,
    ) -> tuple[int, Split]:
        """Build the learner, with any other ranks; return its policy version and its split."""
        self._rank, self._shares_gpu = rank, shares_gpu
        parallelism = (
            init_distributed(rank, size, init_method, device=device, timeout_s=timeout_s)
            if init_method
            else SingleProcess()
        )
        self._learner = build(lambda _, reason: self._skipped.append(reason), parallelism)
        return self._learner.policy_version, self._learner.split

    def learn(self, share: BatchShare) -> tuple[dict[str, float], int, list[str]]:
        """Take a step; return metrics, new policy version, and the reasons for skipped updates."""
        self._skipped.clear()
        metrics = self._learner.learn(share)
        self._release_memory()
        return metrics, self._learner.policy_version, list(self._skipped)

    def logprobs(self, requests: Sequence[ScoringRequest]) -> list[list[FloatArray]]:
        """See `rlmed.core.protocols.Learner.logprobs`."""
        assert not isinstance(self._learner, SupervisedLearner), "only a learner of groups scores completions"
        answers = self._learner.logprobs(requests)
        self._release_memory()
        return answers

    def store_weights(self) -> StoredWeights:
        """Put the current weights into the object store of this node."""
        buckets = [ray.put(bucket) for bucket in make_buckets(self._learner.full_weights())]
        return StoredWeights(self._learner.policy_version, buckets)

    def device(self) -> str:
        """See `rlmed.core.weights.EngineHandle.devices`."""
        return gpu_name(self._learner.policy.device)

    def send(self, transport: str, engines: Sequence[EngineHandle], limit_s: float) -> None:
        """See `rlmed.models.direct.DirectSender.send`; the other ranks take part in gathering."""
        learner = self._learner
        weights, policy = learner.full_weights(on_device=True), learner.policy
        if self._rank > 0:
            for _ in weights:
                pass
            return
        if self._sender is None:
            parameters = ((weight.name, weight.value) for weight in policy.weights())
            self._sender = DirectSender(parameters, policy.device, ray.util.get_node_ip_address())

        def call(engine: EngineHandle, sent: DirectWeights) -> Future[PushReport]:
            told = StoredWeights(learner.policy_version, [ray.put(sent)])
            future: Future[PushReport] = engine.address.update_weights.remote(told).future()
            return future

        self._sender.send(transport, engines, call, weights, limit_s)
        self._release_memory()

    def save(self, folder: Path) -> None:
        """See `rlmed.core.protocols.Learner.save`; `write` calls the writer."""
        self._write = self._learner.save(folder)
        self._release_memory()

    @ray.method(concurrency_group="files")
    def write(self) -> None:
        """Write what `save` has secured, in a thread beside the calls of other methods."""
        self._write()
        del self._write  # and the copies in it

    def load(self, folder: Path) -> int:
        """See `rlmed.core.protocols.Learner.load`; returns the policy version."""
        self._learner.load(folder)
        self._release_memory()
        return self._learner.policy_version

    def _release_memory(self) -> None:
        """Release torch's cached memory, which an engine on the same GPU needs to wake up."""
        if self._shares_gpu and self._learner.policy.device.type == "cuda":
            torch.cuda.empty_cache()


class RayLearner:
    """`rlmed.core.protocols.Learner` whose ranks are Ray actors, driven together."""

    def __init__(
        self,
        build: Build,
        *,
        on_bad_step: OnSkippedUpdate,
        step_s: float,
        device: str = "cpu",
        options: Sequence[Mapping[str, Any]] = ({},),
        weight_transfer: str = OBJECT_STORE,
        push_s: float = 600.0,
        shares_gpu: bool = False,
    ) -> None:
        """Start the ranks and wait until they have loaded.

        Args:
            build: builds a rank's learner, inside its actor.
            on_bad_step: called for each skipped batch.
            step_s: timeout of any call, in seconds.
            device: "cpu" or "cuda", for all ranks.
            options: Ray options of each rank's actor: resources, placement; one entry per rank.
            weight_transfer: `cluster.weight_transfer`.
            push_s: timeout of a push; half of it remains to fetch weights that cannot be sent.
            shares_gpu: release unused GPU memory after each call.

        Raises:
            LearnerError: if a rank cannot be built.
        """
        self._on_bad_step, self._order = on_bad_step, threading.Lock()
        self._limit = (step_s, "cluster.learner_timeout_s")
        actor: Any = LearnerActor  # type checkers see the class, not what `ray.remote` makes of it
        self._actors = [actor.options(**entry).remote() for entry in options]
        size = len(self._actors)
        init_method = None if size == 1 else self._call("start", "init_method", ranks=1)[0]
        each = [(build, rank, size, init_method, device, step_s, shares_gpu) for rank in range(size)]
        self._version: int
        self._split: Split
        self._version, self._split = self._call("load its model", "build", each=each)[0]
        self._direct: DirectPush | None = None
        if weight_transfer != OBJECT_STORE:
            gpu = self._call("name its GPU", "device", ranks=1)[0]

            def send(transport: str, engines: Sequence[EngineHandle]) -> None:
                self._call(
                    "send its weights", "send", transport, engines, push_s / 2, limit=(push_s, "cluster.push_timeout_s")
                )

            self._direct = DirectPush(weight_transfer, gpu, send)

    @property
    def policy_version(self) -> int:
        """See `rlmed.core.protocols.Learner.policy_version`."""
        return self._version

    def step(self, batch: Sequence[Any]) -> dict[str, float]:
        """See `rlmed.core.protocols.Learner.step`; each rank is sent its share of the batch."""
        shares = self._split(batch, len(self._actors))
        metrics, self._version, skipped = self._call("learn", "learn", each=[(ray.put(share),) for share in shares])[0]
        for reason in skipped:
            self._on_bad_step(batch, reason)
        return dict(metrics)

    def logprobs(self, requests: Sequence[ScoringRequest]) -> list[list[FloatArray]]:
        """See `rlmed.core.protocols.Learner.logprobs`; requests are sent once for all ranks."""
        answers: list[list[FloatArray]] = self._call("score completions", "logprobs", ray.put(list(requests)))[0]
        return answers

    def push_weights(self, pool: RolloutPool) -> None:
        """See `rlmed.core.protocols.Learner.push_weights`.

        Weights go directly from rank 0's node to the workers'.
        """
        if self._direct is None:
            stored = self._call("store its weights", "store_weights")[0]
            weights = WeightUpdate(lambda: stored)
        else:
            # a reference: a worker that fetches waits until rank 0 has stored the weights
            store = functools.cache(lambda: self._submit(self._actors, "store_weights")[0])
            weights = WeightUpdate(store, self._direct.start)
        pool.update_weights(self._version, weights)

    def save(self, folder: Path) -> Callable[[], None]:
        """See `rlmed.core.protocols.Learner.save`; all ranks write on the folder's disk."""
        self._call("save", "save", folder.absolute())

        def write() -> None:
            self._call("write a checkpoint", "write")

        return write

    def load(self, folder: Path) -> None:
        """See `rlmed.core.protocols.Learner.load`."""
        self._version = self._call("load a checkpoint", "load", folder.absolute())[0]

    def close(self) -> None:
        """Kill the ranks."""
        for actor in self._actors:
            ray.kill(actor)

    def _call(
        self,
        action: str,
        method: str,
        *arguments: Any,
        each: Sequence[tuple[Any, ...]] | None = None,
        ranks: int | None = None,
        limit: tuple[float, str] | None = None,
    ) -> list[Any]:
        """Call a method on all ranks, or the first `ranks`, and wait for all.

        Arguments are shared or per rank (`each`). `limit` is a timeout in seconds and its key,
        that of a step if not given.

        Raises:
            LearnerError: if a rank is lost, raises, or does not answer in time.
        """
        actors = self._actors[:ranks]
        calls = self._submit(actors, method, each or [arguments] * len(actors))
        self._wait(action, calls, limit or self._limit)
        return list(ray.get(calls))

    def _submit(self, actors: Sequence[Any], method: str, each: Sequence[tuple[Any, ...]] | None = None) -> list[Any]:
        """Start a method on these ranks.

        Two threads' calls reach all ranks in the same order: most are collectives.
        """
        with self._order:
            each = each or [()] * len(actors)
            return [getattr(actor, method).remote(*own) for actor, own in zip(actors, each, strict=True)]

    def _wait(self, action: str, calls: Sequence[Any], limit: tuple[float, str]) -> None:
        """Wait until all calls have succeeded; see `_call`."""
        rank_of = {call: rank for rank, call in enumerate(calls)}
        waiting, end = list(calls), time.monotonic() + limit[0]
        failure: tuple[int, Exception] | None = None
        while waiting:
            # notice a failed rank at once, although the others wait for it
            ready, waiting = ray.wait(waiting, timeout=max(0.0, end - time.monotonic()))
            if not ready:
                break
            try:
                ray.get(ready[0])
            except ray.exceptions.RayTaskError as error:
                if failure is None:
                    # when a rank is lost, another may fail before the loss is known: report the
                    # loss
                    failure = (rank_of[ready[0]], error.as_instanceof_cause())
                    end = min(end, time.monotonic() + LOSS_KNOWN_S)
            except ray.exceptions.RayError as error:
                cause = str(error).strip().splitlines()[0].rstrip(".")
                raise LearnerError(
                    f"lost learner rank {rank_of[ready[0]]} while waiting for it to {action}: {cause}. Resume from "
                    "the last checkpoint with resume=auto"
                ) from error
        if failure is not None:
            rank, raised = failure
            if len(calls) > 1 and isinstance(raised, RuntimeError):  # torch's, of a collective
                raise LearnerError(
                    f"learner rank {rank} could not {action} with the other ranks: {str(raised).splitlines()[-1]}. "
                    "Resume from the last checkpoint with resume=auto"
                ) from raised
            raise raised
        if waiting:
            silent = ", ".join(str(rank_of[call]) for call in waiting)
            raise LearnerError(
                f"learner rank {silent} did not {action} within {limit[0]:.0f} s ({limit[1]}). Check "
                "its process, then resume from the last checkpoint with resume=auto"
            )
