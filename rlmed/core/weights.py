"""Weights on their way from the learner to the engines: offered to a pool, and sent as buckets of bytes or from GPU to GPU."""

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
    """Weights arrived damaged, incomplete or for another model; the message names the tensor and the cure."""


class NotConnectedError(Exception):
    """Learner and engines could not be connected directly; nothing was sent, and the engines have the weights they had."""


class TransferError(Exception):
    """Weights that were sent directly did not all arrive: the engines that should take them hold a mixture."""


@dataclass(frozen=True, slots=True)
class PushReport:
    """What applying new weights took."""

    bytes: int
    fetch_s: float
    """Seconds until all bytes were here; the engine goes on sampling meanwhile."""
    apply_s: float
    """Seconds between two steps of the engine: waiting for it, checking, copying, dropping caches."""


@dataclass(frozen=True, slots=True)
class Recipient:
    """An engine as the learner needs to know it."""

    name: str
    """For messages."""
    address: Any
    """What another process reaches it by; equal for the same process only."""
    devices: tuple[str, ...]
    """Names of its GPUs, the same in every process (UUIDs); empty on a CPU, or where it cannot be sent to directly."""


class Peer(Protocol):
    """An engine in another process as learner rank 0 speaks to it; see `rollout.engine.DirectEngine`. No method waits."""

    name: str
    """For messages."""
    devices: tuple[str, ...]
    """See `Recipient.devices`."""

    def connect(self, transport: str, info: Mapping[str, Any]) -> Future[None]:
        """Meet the learner."""
        ...

    def begin_update(self) -> Future[None]:
        """Expect weights."""
        ...

    def receive(self, info: Mapping[str, Any]) -> Future[None]:
        """Take some of them."""
        ...

    def finish_update(self, version: int) -> Future[None]:
        """All are here."""
        ...


class WeightSender(Protocol):
    """What learner rank 0 sends weights to engines by."""

    def connect(self, transport: str, peers: Sequence[Peer], host: str) -> None:
        """Meet these engines, in place of those before.

        Args:
            transport: "nccl" or "ipc".
            peers: the engines.
            host: address of this machine.

        Raises:
            NotConnectedError: naming the engine and the cause.
        """
        ...

    def send(self, version: int) -> int:
        """Send the weights of now to all of them, as `version`; returns the bytes. Other ranks gather with this one meanwhile.

        Raises:
            TransferError: naming the engine and the cause; the connection is gone.
        """
        ...


class WeightOffer(Protocol):
    """New weights as a learner offers them to a pool; no method waits."""

    def send(self, recipients: Sequence[Recipient]) -> Future[PushReport] | None:
        """Send them to these engines, all at once, by a way of the learner's own; None where they have to fetch them.

        The future fails with `NotConnectedError` when they have to fetch them after all, with `TransferError` when they cannot
        be used any more.
        """
        ...

    def stored(self) -> Any:
        """What a worker fetches them by: `Published`, or what becomes one on the way to the worker."""
        ...


@dataclass(frozen=True, slots=True)
class Published:
    """Weights in a store, from which workers fetch them; a `WeightOffer` by itself."""

    version: int
    buckets: list[Any]
    """What the store gave for each bucket; kept for as long as a worker may need these weights."""
    bytes: int
    gather_s: float
    """Seconds for copying (and gathering) the parameters and putting them into the store."""

    def send(self, recipients: Sequence[Recipient]) -> Future[PushReport] | None:
        """See `WeightOffer.send`; there is no other way."""
        return None

    def stored(self) -> Published:
        """See `WeightOffer.stored`."""
        return self


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor's place in a bucket.

    Example:
        TensorSpec("lm_head.weight", "bfloat16", (748, 256), 0, 383_000)
    """

    name: str
    """As in the learner's `named_parameters()`."""
    dtype: str
    """Of torch, without its prefix: "float32" or "bfloat16"."""
    shape: tuple[int, ...]
    start: int
    """First byte in the bucket."""
    end: int
    """One past the last byte."""


@dataclass(frozen=True, slots=True)
class WeightBucket:
    """Several tensors, one after the other, in one array of bytes: numpy has no bfloat16, and one array travels fastest."""

    specs: tuple[TensorSpec, ...]
    data: ByteArray
    """uint8 [bytes]."""
    checksum: int
    """CRC-32 of `data` where it was made."""

    @classmethod
    def seal(cls, specs: tuple[TensorSpec, ...], data: ByteArray) -> WeightBucket:
        """A bucket with the checksum of its bytes."""
        return cls(specs, data, zlib.crc32(data.data))

    def verify(self) -> None:
        """Compare the bytes with the checksum.

        Raises:
            WeightError: when they are not the ones that were sent.
        """
        if zlib.crc32(self.data.data) != self.checksum:
            names = f"{self.specs[0].name} … {self.specs[-1].name}"
            raise WeightError(f"the weights {names} were damaged on their way (checksum differs); push them again")
