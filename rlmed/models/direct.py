"""Transport `nccl`, gloo between CPUs, and what `ipc` shares with them; see `rlmed.core.weights`.

Rank 0 calls each engine's `update_weights` once in a push, with `DirectWeights` in place of buckets
from a store, and broadcasts the tensors while the engines iterate them.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store, TCPStore
from torch.multiprocessing.reductions import reduce_tensor

from rlmed.core.weights import IPC, NCCL, EngineHandle, TransferError, last_line
from rlmed.models.shared_memory import SharedMemory, open_shared
from rlmed.models.weights import BUCKET_BYTES, Packed, pack, unpack

JOINED, ENDED = "joined", "ended"
"""Keys of a store: number of engines' processes that have come; set when rank 0 closes it."""
POLL_S = 0.001
REACH_S = 10.0
"""Seconds to reach rank 0's store, which is open before an engine is called."""
CAUSE_S = 5.0
"""Seconds to learn who broke a transfer: its peers notice that before Ray reports its death."""


class _Kept(threading.local):
    """A thread's process group, which lasts from push to push; an engine has one thread."""

    address: tuple[str, int] | None = None
    store: Store
    group: Any = None

    def check(self) -> None:
        if self.store.check([ENDED]):
            raise RuntimeError("learner rank 0 has ended the push")

    def leave(self) -> None:
        if self.group is not None:
            self.group.abort()
        self.address = self.group = None


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
        """Yield names and tensors; raises RuntimeError if rank 0 ends the push."""
        if _kept.address != self.address:
            _kept.leave()
            socket.create_connection(self.address, REACH_S).close()  # else TCPStore tries again and again
            _kept.store = TCPStore(*self.address, is_master=False, timeout=timedelta(seconds=self.limit_s))
            _kept.group = self.join(_kept.store, _kept.store.add(JOINED, 1), device, _kept.check)
            _kept.address = self.address
        try:
            for shapes, dtypes, like in self.buckets():
                values = torch.empty(like.nbytes, dtype=torch.uint8, device=device)
                _broadcast(_kept.group, values, _kept.check)
                yield from unpack(values, shapes, dtypes)
        except RuntimeError:
            _kept.leave()
            raise
        if self.memory is not None:
            _kept.leave()

    def buckets(self) -> Iterator[Packed]:
        """Yield the buckets that these weights make, without values."""
        pairs = zip(self.shapes.items(), self.dtypes, strict=True)
        like = ((name, torch.empty(shape, dtype=dtype, device="meta")) for (name, shape), dtype in pairs)
        return pack(like, BUCKET_BYTES, torch.device("meta"))

    def join(self, store: Store, rank: int, device: torch.device, check: Callable[[], object]) -> Any:
        """Return the process group, which is apart from the learner's, or shared memory.

        Waits for all engines, unless `check` raises: to form a group without one may never end.
        """
        _until(lambda: store.add(JOINED, 0) == self.size - 1, check)
        if self.memory is not None:
            return SharedMemory(store, rank, self.size, open_shared(self.memory, device))
        limit = timedelta(seconds=self.limit_s)
        if self.transport != NCCL:
            return dist.ProcessGroupGloo(store, rank, self.size, limit)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = 10 * limit  # its watchdog ends the process; our own, shorter limit ends the push alone
        return dist.ProcessGroupNCCL(store, rank, self.size, options)


class DirectSender:
    """Learner rank 0's half; forms a new group with other engines, and after a failure."""

    def __init__(self, parameters: Iterable[tuple[str, Tensor]], device: torch.device, host: str) -> None:
        """Send full tensors like `parameters`, by name, from `device` at address `host`."""
        like = dict(parameters)
        self._shapes = {name: tuple(tensor.shape) for name, tensor in like.items()}
        self._dtypes = tuple(tensor.dtype for tensor in like.values())
        self._device, self._host = device, host
        self._members: tuple[Any, ...] = ()
        self._weights: DirectWeights
        self._store: Any = None
        self._group: Any = None

    def send(
        self,
        transport: str,
        engines: Sequence[EngineHandle],
        call: Callable[[EngineHandle, DirectWeights], Future[Any]],
        tensors: Iterator[tuple[str, Tensor]],
        limit_s: float,
    ) -> None:
        """Send `tensors`; `call` starts `update_weights` at an engine.

        Exhausts `tensors` in any case: the other ranks gather them, too.

        Raises:
            TransferError: if an engine fails, or not all is done within `limit_s`.
        """
        end, calls = time.monotonic() + limit_s, list[Future[Any]]()
        members = (transport, *(engine.address for engine in engines))

        def check() -> None:
            if any(call.done() and call.exception() for call in calls):
                raise RuntimeError("an engine failed")
            if time.monotonic() > end:
                raise RuntimeError(f"not done within {limit_s:.0f} s (half of cluster.push_timeout_s)")

        try:
            if members != self._members:
                self._open(transport, engines, limit_s)
            calls += [call(engine, self._weights) for engine in engines]
            self._group = self._group or self._weights.join(self._store, 0, self._device, check)
            for _, _, values in pack(tensors, BUCKET_BYTES, self._device):
                _broadcast(self._group, values, check)
            _until(lambda: all(call.done() for call in calls), check)
            check()
            self._members = members
            if transport == IPC:  # memory that the engines need
                self._close()
        except RuntimeError as error:
            self._close()
            reason = _explain(error, engines, calls)
            for _ in tensors:
                pass
            raise TransferError(f"weights sent by {transport} did not reach all engines: {reason}") from error

    def _open(self, transport: str, engines: Sequence[EngineHandle], limit_s: float) -> None:
        """Prepare a new group."""
        self._close()
        limit, size = timedelta(seconds=limit_s), 1 + sum(max(1, len(engine.devices)) for engine in engines)
        self._store = TCPStore(self._host, 0, is_master=True, timeout=limit, wait_for_workers=False)
        address = (self._host, self._store.port)
        self._weights = DirectWeights(transport, address, size, limit_s, self._shapes, self._dtypes)
        if transport == IPC:
            largest = max(like.nbytes for _, _, like in self._weights.buckets())
            memory = torch.empty(largest, dtype=torch.uint8, device=self._device)
            self._weights = replace(self._weights, memory=reduce_tensor(memory))
            self._group = SharedMemory(self._store, 0, size, memory)

    def _close(self) -> None:
        """End the group; engines that wait for it fail."""
        if self._store is not None:
            self._store.set(ENDED, "")
        if self._group is not None:
            self._group.abort()
        self._members, self._group, self._store = (), None, None


def _broadcast(group: Any, values: Tensor, check: Callable[[], object]) -> None:
    """Send values, or receive them, unless `check` raises."""
    work = group.broadcast(values, 0)
    _until(work.is_completed, check)
    work.wait(timedelta(seconds=1))  # it is over; with a limit, NCCL's raises its error


def _until(done: Callable[[], bool], check: Callable[[], object]) -> None:
    while not done():
        check()
        time.sleep(POLL_S)


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
