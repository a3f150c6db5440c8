"""Weights on their way from the learner to the engines: named tensors as bytes, in buckets of bounded size."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

ByteArray = npt.NDArray[np.uint8]


class WeightError(RuntimeError):
    """Weights arrived damaged, incomplete or for another model; the message names the tensor and the cure."""


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
