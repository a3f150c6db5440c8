"""Weight transfer from learner to engines: interfaces, and the byte buckets of the object store."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

ByteArray = npt.NDArray[np.uint8]


class WeightError(RuntimeError):
    """Weights arrived damaged, incomplete or for another model; the message names the tensor and what to do."""


class NotConnectedError(Exception):
    """Learner and engines could not connect directly; nothing was sent, and the engines keep their weights."""


class TransferError(Exception):
    """A direct transfer was incomplete: the receiving engines hold a mixture of old and new weights."""


@dataclass(frozen=True, slots=True)
class PushReport:
    """Cost of a weight update."""

    bytes: int
    fetch_s: float
    """Seconds until all bytes had arrived; the engine keeps sampling meanwhile."""
    apply_s: float
    """Seconds between two engine steps: waiting for the engine, checking, copying, dropping caches."""


@dataclass(frozen=True, slots=True)
class EngineHandle:
    """What the learner knows of an engine."""

    name: str
    """Name used in messages."""
    address: Any
    """How another process reaches it; equal only for the same process."""
    devices: tuple[str, ...]
    """UUIDs of its GPUs; empty on a CPU, or if direct transfer is impossible."""


class Peer(Protocol):
    """An engine in another process, as seen by learner rank 0; see `rollout.engine.DirectEngine`. No method blocks."""

    name: str
    """For messages."""
    devices: tuple[str, ...]
    """See `EngineHandle.devices`."""

    def connect(self, transport: str, info: Mapping[str, Any]) -> Future[None]:
        """Connect to the learner."""
        ...

    def begin_update(self) -> Future[None]:
        """Prepare to receive weights."""
        ...

    def receive(self, info: Mapping[str, Any]) -> Future[None]:
        """Receive some of the weights."""
        ...

    def finish_update(self, version: int) -> Future[None]:
        """Apply the received weights as `version`."""
        ...


class WeightSender(Protocol):
    """Send weights directly from learner rank 0 to engines."""

    def connect(self, transport: str, peers: Sequence[Peer], host: str) -> None:
        """Connect to these engines, replacing earlier connections.

        Args:
            transport: "nccl" or "ipc".
            peers: the engines.
            host: address of this machine.

        Raises:
            NotConnectedError: naming the engine and the cause.
        """
        ...

    def send(self, version: int) -> int:
        """Send the current weights to all engines as `version`; return the bytes. Other ranks gather meanwhile.

        Raises:
            TransferError: naming the engine and the cause; the connection is gone.
        """
        ...


class WeightUpdate(Protocol):
    """New weights that a learner offers to a pool; no method blocks."""

    def send(self, recipients: Sequence[EngineHandle]) -> Future[PushReport] | None:
        """Send directly to all these engines at once; None if they have to fetch the weights.

        The future fails with `NotConnectedError` if they have to fetch the weights after all, and with `TransferError`
        if the engines are no longer usable.
        """
        ...

    def stored(self) -> Any:
        """Return what workers fetch weights by: `StoredWeights`, or a handle that resolves to it at the worker."""
        ...


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """Weights in a store that workers fetch from; itself a `WeightUpdate`."""

    version: int
    buckets: list[Any]
    """The store's reference to each bucket, kept while a worker may need these weights."""
    bytes: int
    gather_s: float
    """Seconds to gather and copy the parameters and put them into the store."""

    def send(self, recipients: Sequence[EngineHandle]) -> Future[PushReport] | None:
        """Return None: workers fetch from the store (see `WeightUpdate.send`)."""
        return None

    def stored(self) -> StoredWeights:
        """Return self (see `WeightUpdate.stored`)."""
        return self


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Position of one tensor in a bucket.

    Example:
        TensorSpec("lm_head.weight", "bfloat16", (748, 256), 0, 383_000)
    """

    name: str
    """As in the learner's `named_parameters()`."""
    dtype: str
    """torch dtype without its prefix: "float32" or "bfloat16"."""
    shape: tuple[int, ...]
    start: int
    """First byte in the bucket."""
    end: int
    """One past the last byte."""


@dataclass(frozen=True, slots=True)
class WeightBucket:
    """Several tensors packed into one byte array: numpy has no bfloat16, and one array transfers fastest."""

    specs: tuple[TensorSpec, ...]
    data: ByteArray
    """uint8 [bytes]."""
    checksum: int
    """CRC-32 of `data` at the sender."""

    @classmethod
    def seal(cls, specs: tuple[TensorSpec, ...], data: ByteArray) -> WeightBucket:
        """Return a bucket with the checksum of its bytes."""
        return cls(specs, data, zlib.crc32(data.data))

    def verify(self) -> None:
        """Check the bytes against the checksum.

        Raises:
            WeightError: if they differ from those sent.
        """
        if zlib.crc32(self.data.data) != self.checksum:
            names = f"{self.specs[0].name} … {self.specs[-1].name}"
            raise WeightError(f"the weights {names} were damaged in transfer (checksum mismatch); push them again")
