"""Transport `nccl`, gloo between CPUs, and what it shares with `ipc`; see `rlmed.core.weights`.

Rank 0 calls each engine's `update_weights` once in a push, with `DirectWeights` in place of buckets
from a store, and sends the tensors while the engine iterates them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store, TCPStore

from rlmed.core.weights import IPC, NCCL, EngineHandle, NotConnectedError, TransferError, last_line
from rlmed.models.shared_memory import SharedMemory, open_shared, share
from rlmed.models.weights import BUCKET_BYTES, Packed, pack, unpack

JOINED = "joined"
"""Key of the number of processes that have come to a store."""
REACH_S = 10.0
"""Seconds to reach rank 0's store, which is open before an engine is called."""
POLL_S = 0.001
"""Interval at which rank 0 looks whether a bucket was sent."""
CAUSE_S = 5.0
"""Seconds to learn who broke a transfer: its peers notice that before Ray reports its death."""


class _Kept(threading.local):
    """An engine's process group, which lasts from push to push; its thread has no other."""

    address: tuple[str, int] | None = None
    group: Any = None


_kept = _Kept()


@dataclass(frozen=True, slots=True)
class DirectWeights:
    """A `WeightPart` that is all of a push."""

    transport: str
    address: tuple[str, int]
    """Host and port of the store where the processes meet; new for each group."""
    size: int
    """Number of processes: rank 0, and one for each GPU of an engine."""
    limit_s: float
    shapes: dict[str, tuple[int, ...]]
    dtypes: tuple[torch.dtype, ...]
    memory: Any = None
    """Handle to shared memory, for `ipc`."""

    def tensors(self, device: torch.device) -> Iterator[tuple[str, Tensor]]:
        """See `WeightPart.tensors`."""
        limit = timedelta(seconds=self.limit_s)
        if _kept.address != self.address:
            if _kept.group is not None:
                _kept.group.abort()
            store = TCPStore(*self.address, is_master=False, timeout=timedelta(seconds=REACH_S))
            store.set_timeout(limit)
            memory = None if self.memory is None else open_shared(self.memory, device)
            _kept.address, _kept.group = self.address, self.join(store, store.add(JOINED, 1), memory)
            _kept.group.broadcast(torch.empty(1, dtype=torch.uint8, device=device), 0).wait(limit)
        for shapes, dtypes, like in self.buckets():
            values = torch.empty(like.nbytes, dtype=torch.uint8, device=device)
            _kept.group.broadcast(values, 0).wait(limit)
            yield from unpack(values, shapes, dtypes)
        if self.memory is not None:
            _kept.group.abort()

    def buckets(self) -> Iterator[Packed]:
        """Yield the buckets that these weights make, without values."""
        pairs = zip(self.shapes.items(), self.dtypes, strict=True)
        like = ((name, torch.empty(shape, dtype=dtype, device="meta")) for (name, shape), dtype in pairs)
        return pack(like, BUCKET_BYTES, torch.device("meta"))

    def join(self, store: Store, rank: int, memory: Tensor | None) -> Any:
        """Return the process group, which is apart from the learner's, or `memory` in place of it."""
        if memory is not None:
            return SharedMemory(store, rank, self.size, memory)
        limit = timedelta(seconds=self.limit_s)
        if self.transport != NCCL:
            return dist.ProcessGroupGloo(store, rank, self.size, limit)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = 10 * limit  # its watchdog ends the process; our own, shorter limit ends the push alone
        return dist.ProcessGroupNCCL(store, rank, self.size, options)


class DirectSender:
    """Learner rank 0's half; forms a new group with other engines, and after a failure."""

    def __init__(self, parameters: Iterable[tuple[str, Tensor]], device: torch.device, host: str) -> None:
        """Send full tensors like `parameters`, names and tensors, from `device` at address `host`."""
        like = dict(parameters)
        self._shapes = {name: tuple(tensor.shape) for name, tensor in like.items()}
        self._dtypes = tuple(tensor.dtype for tensor in like.values())
        self._device, self._host = device, host
        self._members: tuple[Any, ...] = ()
        self._weights: DirectWeights
        self._group: Any = None

    def send(
        self,
        transport: str,
        engines: Sequence[EngineHandle],
        call: Callable[[EngineHandle, DirectWeights], Future[Any]],
        tensors: Iterator[tuple[str, Tensor]],
        limit_s: float,
    ) -> None:
        """Send `tensors` in at most `limit_s`; `call` starts `update_weights` at an engine.

        Exhausts `tensors` in any case: the other ranks gather them, too.

        Raises:
            NotConnectedError: if none could be sent.
            TransferError: if not all could.
        """
        end, calls = time.monotonic() + limit_s, list[Future[Any]]()
        members = (transport, *(engine.address for engine in engines))

        def until(done: Callable[[], bool]) -> None:
            pause = 0.0
            while not any(call.exception() for call in wait(calls, pause, FIRST_EXCEPTION).done):
                if done():
                    return
                if time.monotonic() > end:
                    raise RuntimeError(f"not done within {limit_s:.0f} s (half of cluster.push_timeout_s)")
                pause = POLL_S
            raise RuntimeError("an engine failed")

        def broadcast(values: Tensor) -> None:
            work = self._group.broadcast(values, 0)
            until(work.is_completed)
            work.wait()  # raises its error

        store: TCPStore | None = None
        try:
            if members != self._members:
                store, memory = self._offer(transport, engines, limit_s)
            calls += [call(engine, self._weights) for engine in engines]
            if store is not None:
                until(lambda: store.add(JOINED, 0) == self._weights.size - 1)
                self._group = self._weights.join(store, 0, memory)
                broadcast(torch.zeros(1, dtype=torch.uint8, device=self._device))
                self._members = members
            for _, _, values in pack(tensors, BUCKET_BYTES, self._device):
                broadcast(values)
            until(lambda: all(call.done() for call in calls))
            if transport == IPC:  # memory that the engines need
                self._close()
        except RuntimeError as error:
            connected, store = self._members == members, None
            self._close()  # without group and store, engines that wait fail
            reason = _explain(error, engines, calls)
            for _ in tensors:
                pass
            if connected:
                raise TransferError(f"not all engines have the new weights: {reason}") from error
            raise NotConnectedError(f"cannot connect learner and engines by {transport}: {reason}") from error

    def _offer(self, transport: str, engines: Sequence[EngineHandle], limit_s: float) -> tuple[TCPStore, Tensor | None]:
        """Set what engines are told in order to join a new group; return its store and memory."""
        self._close()
        store = TCPStore(self._host, 0, is_master=True, timeout=timedelta(seconds=limit_s), wait_for_workers=False)
        size, memory = 1 + sum(max(1, len(engine.devices)) for engine in engines), None
        told = DirectWeights(transport, (self._host, store.port), size, limit_s, self._shapes, self._dtypes)
        if transport == IPC:
            largest = max(like.nbytes for _, _, like in told.buckets())
            memory = torch.empty(largest, dtype=torch.uint8, device=self._device)
        self._weights = told if memory is None else replace(told, memory=share(memory))
        return store, memory

    def _close(self) -> None:
        if self._group is not None:
            self._group.abort()
        self._members, self._group = (), None


def _explain(own: RuntimeError, engines: Sequence[EngineHandle], calls: Sequence[Future[Any]]) -> str:
    """Return rank 0's own error, and which engines failed or are silent.

    Who notices a broken connection first did not break it, so all have time to say.
    """
    silent, reasons = wait(calls, CAUSE_S).not_done, [last_line(own)]
    for engine, call in zip(engines, calls, strict=False):  # no calls if rank 0 cannot open a store
        if call in silent:
            reasons.append(f"{engine.name} did not answer")
        elif cause := call.exception():
            reasons.append(f"{engine.name}: {last_line(cause)}")
    return "; ".join(reasons)
