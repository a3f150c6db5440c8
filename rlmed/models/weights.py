"""Weights in byte buckets, and transport `object_store`; see `rlmed.core.weights`."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rlmed.core.weights import WeightError

if TYPE_CHECKING:
    from rlmed.models.direct import DirectWeights

BUCKET_BYTES = 256 * 2**20
"""Size of one bucket: it bounds copies in flight and makes the cost per message negligible."""
ALIGNMENT = 64
"""Bytes; every tensor in a bucket starts at a multiple of it."""
SAME_MODEL = "learner and engine need the same model (model.path)"


@dataclass(frozen=True, slots=True)
class WeightBucket:
    """A `WeightPart` in a store: numpy has no bfloat16, and one array transfers fastest."""

    shapes: dict[str, tuple[int, ...]]
    """By name as in the learner's `named_parameters()`, in the order of the bytes."""
    dtypes: tuple[torch.dtype, ...]
    data: npt.NDArray[np.uint8]
    """[bytes]."""
    checksum: int
    """CRC-32 of `data` at the sender."""

    def tensors(self, device: torch.device) -> list[tuple[str, Tensor]]:
        """Return names and tensors, on a CPU views of `data`: read them only.

        Raises:
            WeightError: if the bytes were damaged.
        """
        if zlib.crc32(self.data.data) != self.checksum:
            names = list(self.shapes)
            raise WeightError(
                f"the weights {names[0]} … {names[-1]} were damaged in transfer (checksum mismatch); push them again"
            )
        # without the read-only flag of Ray's arrays, about which torch warns
        interface = self.data.__array_interface__
        interface["data"] = (interface["data"][0], False)
        flat = torch.from_numpy(np.asarray(SimpleNamespace(__array_interface__=interface, owner=self.data)))
        return unpack(flat.to(device), self.shapes, self.dtypes)


WeightPart: TypeAlias = "WeightBucket | DirectWeights"
"""Weights, to be read one by one: each is valid until the next is requested."""
Weights = Sequence[WeightPart]
"""All weights of a push."""


def make_buckets(tensors: Iterable[tuple[str, Tensor]], bucket_bytes: int = BUCKET_BYTES) -> Iterator[WeightBucket]:
    """Yield buckets for a store; see `pack`."""
    for shapes, dtypes, values in pack(tensors, bucket_bytes, torch.device("cpu")):
        data = values.numpy()
        yield WeightBucket(shapes, dtypes, data, zlib.crc32(data.data))


Packed = tuple[dict[str, tuple[int, ...]], tuple[torch.dtype, ...], Tensor]
"""Shapes by name, dtypes, and all bytes of some tensors, uint8 [bytes]."""


def pack(tensors: Iterable[tuple[str, Tensor]], bucket_bytes: int, device: torch.device) -> Iterator[Packed]:
    """Copy named tensors, in order, into buckets of at most `bucket_bytes`, larger ones alone.

    Args:
        tensors: names and tensors of any shape on any device; consumed one at a time. If gathered
            from many ranks, all ranks iterate.
        bucket_bytes: bound on a bucket, and so on the memory needed besides the tensors'.
        device: where the buckets lie.

    Yields:
        Buckets whose bytes are valid until the next one is requested: they share one buffer,
        because first touching fresh memory costs several times as much as copying into it.
    """
    memory = torch.empty(bucket_bytes, dtype=torch.uint8, device=device)
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: list[torch.dtype] = []
    start = 0
    for name, tensor in tensors:
        if shapes and start + aligned(tensor.nbytes) > bucket_bytes:
            yield shapes, tuple(dtypes), memory[:start]
            shapes, dtypes, start = {}, [], 0
        end = start + tensor.nbytes
        following = aligned(end)
        if following > len(memory):
            memory = torch.empty(following, dtype=torch.uint8, device=device)
        memory[start:end].view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())
        memory[end:following] = 0  # a checksum covers the padding
        shapes[name] = tuple(tensor.shape)
        dtypes.append(tensor.dtype)
        start = following
    if shapes:
        yield shapes, tuple(dtypes), memory[:start]


def unpack(
    values: Tensor, shapes: Mapping[str, tuple[int, ...]], dtypes: Iterable[torch.dtype]
) -> list[tuple[str, Tensor]]:
    """Return the names and tensors of a bucket, views of its bytes."""
    tensors, start = [], 0
    for (name, shape), dtype in zip(shapes.items(), dtypes, strict=True):
        end = start + dtype.itemsize * math.prod(shape)
        tensors.append((name, values[start:end].view(dtype).view(shape)))
        start = aligned(end)
    return tensors


def aligned(size: int) -> int:
    """Return where the next tensor of a bucket may start, `size` bytes being taken."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def copy_weights(parameters: Mapping[str, Tensor], weights: Weights, device: torch.device) -> None:
    """Copy weights into the parameters of the same names on `device`, converted to their dtypes.

    Raises:
        WeightError: if they were damaged, and see `check_weights`.
    """
    check_weights({name: tuple(parameter.shape) for name, parameter in parameters.items()}, weights)
    with torch.no_grad():
        for part in weights:
            for name, tensor in part.tensors(device):
                parameters[name].copy_(tensor)


def check_weights(expected: Mapping[str, tuple[int, ...]], weights: Weights) -> None:
    """Check, before anything is loaded, that weights are complete and of the expected shapes.

    Raises:
        WeightError: naming the first that is not.
    """
    received = {name: shape for part in weights for name, shape in part.shapes.items()}
    for name, shape in received.items():
        if name not in expected:
            raise WeightError(f"received weights of {name}, which this model does not have: {SAME_MODEL}")
        if shape != expected[name]:
            raise WeightError(f"received {name} with shape {shape}, expected {expected[name]}: {SAME_MODEL}")
    if missing := expected.keys() - received.keys():
        raise WeightError(f"{len(missing)} weights did not arrive, the first is {min(missing)}: {SAME_MODEL}")


def gpu_name(device: torch.device) -> str:
    """Return a GPU's UUID, or "" for a CPU; see `rlmed.core.weights.EngineHandle.devices`."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""
