"""Weights sent from learner rank 0 to all native engines at once, by a process group.

The group is apart from the learner's: gloo between CPUs, NCCL between GPUs. Rank 0 names each
bucket in a call to every engine and broadcasts its bytes, which go from device to device. Every
wait has a limit: an engine that dies or stays silent costs this push (`TransferError`), never the
learner.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from rlmed.core.weights import NCCL, CallEngine, EngineHandle, NotConnectedError, last_line
from rlmed.models.weights import BUCKET_BYTES, aligned, check_complete, check_shapes, end_transfer

GLOO = "gloo"
"""Transport between CPUs."""
DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}


class _Group:
    """A process group of rank 0 and the engines."""

    def __init__(self, transport: str, store: Store, rank: int, size: int, limit_s: float) -> None:
        """Join; return when all have joined."""
        self._limit, prefixed = timedelta(seconds=limit_s), PrefixStore("weights", store)
        self._group: Any
        if transport == NCCL:
            options = dist.ProcessGroupNCCL.Options()
            # its watchdog ends the process; our own, shorter limit ends the push alone
            options._timeout = 10 * self._limit
            self._group = dist.ProcessGroupNCCL(prefixed, rank, size, options)
        else:
            self._group = dist.ProcessGroupGloo(prefixed, rank, size, self._limit)

    def broadcast(self, values: Tensor) -> None:
        """Send rank 0's values to all others, in place."""
        self._group.broadcast(values, 0).wait(self._limit)

    def close(self) -> None:
        """End what still runs."""
        self._group.abort()


class DirectSender:
    """`rlmed.core.weights.WeightSender` of learner rank 0 for native engines."""

    def __init__(
        self, weights: Callable[[], Iterator[tuple[str, Tensor]]], device: torch.device, limit_s: float
    ) -> None:
        """Send what `weights` yields; `limit_s` bounds connecting and each bucket."""
        self._weights, self._device, self._limit_s = weights, device, limit_s
        self._connection: tuple[_Group, Sequence[EngineHandle], CallEngine] | None = None

    def connect(self, transport: str, engines: Sequence[EngineHandle], call: CallEngine, host: str) -> None:
        """See `WeightSender.connect`."""
        self._disconnect()
        size, limit = 1 + len(engines), timedelta(seconds=self._limit_s)
        try:
            store = TCPStore(host, 0, size, is_master=True, timeout=limit, wait_for_workers=False)
            info = {"host": host, "port": store.port, "size": size, "limit_s": self._limit_s}
            calls = [call(each, "connect", transport, info | {"rank": 1 + i}) for i, each in enumerate(engines)]
            group = self._together(lambda: _Group(transport, store, 0, size, self._limit_s), engines, calls, "connect")
        except Exception as error:
            raise NotConnectedError(f"cannot connect learner and engines by {transport}: {error}") from error
        self._connection = group, engines, call

    def send(self, version: int) -> None:
        """See `WeightSender.send`."""
        assert self._connection is not None, "connect first"
        group, engines, call = self._connection
        weights = self._weights()

        def tell(action: str, stage: str, *arguments: Any, work: Callable[[], Any] = lambda: None) -> None:
            calls = [call(engine, stage, *arguments) for engine in engines]
            self._together(work, engines, calls, action)

        try:
            tell("stop for new weights", "begin_update")
            for info, values in _buckets(weights):
                # rank 0's group sends while the engines' calls receive
                tell("receive weights", "receive", info, work=functools.partial(group.broadcast, values))
            tell("take the new weights", "finish_update", version)
        except Exception as error:
            self._disconnect()  # ends the group's calls, and so the thread
            end_transfer(self._thread, weights, version, error)

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection[0].close()
        self._connection = None

    def _together(
        self, work: Callable[[], Any], engines: Sequence[EngineHandle], calls: Sequence[Future[None]], action: str
    ) -> Any:
        """Do rank 0's part of a collective in a thread while the engines' calls run."""
        own: Future[Any] = Future()

        def run() -> None:
            try:
                if self._device.type == "cuda":
                    torch.cuda.set_device(self._device)
                own.set_result(work())
            except BaseException as error:  # raised below, in the thread that waits
                own.set_exception(error)

        self._thread = threading.Thread(target=run, name="weight transfer", daemon=True)
        self._thread.start()
        # shorter than the group's own limit, to name a silent engine first
        ended, _ = wait([own, *calls], 0.9 * self._limit_s, return_when=FIRST_EXCEPTION)
        for engine, each in zip(engines, calls, strict=True):  # an engine's error explains rank 0's
            if each in ended and (cause := each.exception()) is not None:
                raise RuntimeError(f"{engine.name} could not {action}: {last_line(cause)}") from cause
        silent = [engine.name for engine, each in zip(engines, calls, strict=True) if each not in ended]
        if (own in ended and not silent) or (own in ended and own.exception() is not None):
            return own.result()
        raise TimeoutError(f"{', '.join(silent) or 'rank 0'} did not {action} within {self._limit_s:.0f} s")


class DirectReceiver:
    """A native engine's half: copies what arrives into its parameters."""

    def __init__(self, parameters: Mapping[str, Tensor], device: torch.device) -> None:
        """Receive into `parameters`, which are on `device`."""
        self._parameters, self._device = parameters, device
        self._shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        self._missing: set[str] | None = None
        self._group: _Group | None = None

    def connect(self, transport: str, info: Mapping[str, Any]) -> None:
        """Join rank 0's group, in place of an earlier one."""
        if self._group is not None:
            self._group.close()
        limit = timedelta(seconds=info["limit_s"])
        store = TCPStore(info["host"], info["port"], info["size"], is_master=False, timeout=limit)
        self._group = _Group(transport, store, info["rank"], info["size"], info["limit_s"])

    def begin_update(self) -> None:
        """Expect all weights."""
        self._missing = set(self._shapes)

    def receive(self, info: Mapping[str, Any]) -> None:
        """Receive one bucket and copy it.

        Raises:
            WeightError: for weights of another model.
        """
        assert self._group is not None, "connect first"
        assert self._missing is not None, "call begin_update() first"
        received = dict(zip(info["names"], info["shapes"], strict=True))
        check_shapes(self._shapes, received)
        values = torch.empty(info["bytes"], dtype=torch.uint8, device=self._device)
        self._group.broadcast(values)
        with torch.no_grad():
            dtypes = [DTYPES[name] for name in info["dtypes"]]
            for (name, shape), dtype, start in zip(received.items(), dtypes, info["starts"], strict=True):
                end = start + dtype.itemsize * math.prod(shape)
                self._parameters[name].copy_(values[start:end].view(dtype).view(tuple(shape)))
        self._missing -= received.keys()

    def finish_update(self) -> None:
        """Check that all weights have arrived.

        Raises:
            WeightError: if not.
        """
        assert self._missing is not None, "call begin_update() first"
        missing, self._missing = self._missing, None
        check_complete(missing)


def _buckets(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """Yield what names the tensors of a bucket, and its bytes on their device."""
    waiting: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in weights:
        if waiting and size + tensor.nbytes > BUCKET_BYTES:
            yield _bucket(waiting)
            waiting, size = [], 0
        waiting.append((name, tensor.detach()))
        size += aligned(tensor.nbytes)
    if waiting:
        yield _bucket(waiting)


def _bucket(tensors: Sequence[tuple[str, Tensor]]) -> tuple[dict[str, Any], Tensor]:
    starts, end = [], 0
    for _, tensor in tensors:
        starts.append(end)
        end += aligned(tensor.nbytes)
    values = torch.zeros(end, dtype=torch.uint8, device=tensors[0][1].device)
    for (_, tensor), start in zip(tensors, starts, strict=True):
        values[start : start + tensor.nbytes] = tensor.contiguous().view(-1).view(torch.uint8)
    info = {
        "names": [name for name, _ in tensors],
        "shapes": [tuple(tensor.shape) for _, tensor in tensors],
        "dtypes": [str(tensor.dtype) for _, tensor in tensors],
        "starts": starts,
        "bytes": end,
    }
    return info, values
