"""Weights sent from learner rank 0 to all native engines at once, by a process group.

The group is apart from the learner's: gloo between CPUs, NCCL between GPUs. Rank 0 names each
bucket in a call to every engine and broadcasts its bytes, which go from device to device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from rlmed.core.weights import NCCL
from rlmed.models.sender import Engines, WeightSender
from rlmed.models.weights import BUCKET_BYTES, check_complete, check_shapes, pack, unpack

GLOO = "gloo"
"""Transport between CPUs."""


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


class DirectSender(WeightSender):
    """Learner rank 0's half."""

    def _open(self, transport: str, engines: Engines, host: str) -> _Group:
        size, limit = 1 + len(engines.handles), timedelta(seconds=self._limit_s)
        store = TCPStore(host, 0, size, is_master=True, timeout=limit, wait_for_workers=False)
        info = {"host": host, "port": store.port, "size": size, "limit_s": self._limit_s}
        engines.start("connect", "connect", [(transport, info | {"rank": rank}) for rank in range(1, size)])
        group = _Group(transport, store, 0, size, self._limit_s)
        engines.wait()
        return group

    def _send(self, connection: _Group, engines: Engines, weights: Iterator[tuple[str, Tensor]], version: int) -> None:
        engines.run("stop for new weights", "begin_update")
        for shapes, dtypes, values in pack(weights, BUCKET_BYTES, self._device):
            info = {"shapes": shapes, "dtypes": dtypes, "bytes": values.nbytes}
            engines.start("receive weights", "receive", [(info,)] * len(engines.handles))
            connection.broadcast(values)
            engines.wait()
        engines.run("take the new weights", "finish_update", version)

    def _close(self, connection: _Group) -> None:
        connection.close()


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
        shapes = info["shapes"]
        check_shapes(self._shapes, shapes)
        values = torch.empty(info["bytes"], dtype=torch.uint8, device=self._device)
        self._group.broadcast(values)
        with torch.no_grad():
            for name, tensor in unpack(values, shapes, info["dtypes"]):
                self._parameters[name].copy_(tensor)
        self._missing -= shapes.keys()

    def finish_update(self) -> None:
        """Check that all weights have arrived.

        Raises:
            WeightError: if not.
        """
        assert self._missing is not None, "call begin_update() first"
        missing, self._missing = self._missing, None
        check_complete(missing)
