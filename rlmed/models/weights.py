"""Tensors to buckets of bytes and back; see `rlmed.core.weights`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from rlmed.core.weights import TensorSpec, WeightBucket, WeightError

BUCKET_BYTES = 256 * 2**20
"""Size of one bucket: bounds the copies on their way, and is large enough that a message's own cost vanishes."""
ALIGNMENT = 64
"""Bytes; every tensor of a bucket starts at a multiple of it."""


def make_buckets(tensors: Iterable[tuple[str, Tensor]], bucket_bytes: int = BUCKET_BYTES) -> Iterator[WeightBucket]:
    """Copy named tensors, in their order, into buckets of at most `bucket_bytes` (a larger tensor has one of its own).

    Args:
        tensors: names and tensors of any shape on any device; taken from the iterator one after the other.
        bucket_bytes: bound on a bucket.

    Yields:
        Buckets whose bytes are valid until the next one is asked for: they share one piece of memory, because a first touch
        of fresh memory costs several times as much as the copy into it.
    """
    memory = torch.empty(0, dtype=torch.uint8)
    for group, size in _grouped(tensors, bucket_bytes):
        if len(memory) < size:
            memory = torch.empty(max(size, bucket_bytes), dtype=torch.uint8)
        yield _bucket(group, memory[:size])


def _grouped(
    tensors: Iterable[tuple[str, Tensor]], bucket_bytes: int
) -> Iterator[tuple[list[tuple[str, Tensor]], int]]:
    """The tensors of each bucket, and its bytes."""
    waiting: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in tensors:
        length = _padded(tensor.nbytes)
        if waiting and size + length > bucket_bytes:
            yield waiting, size
            waiting, size = [], 0
        waiting.append((name, tensor.detach()))
        size += length
    if waiting:
        yield waiting, size


def bucket_tensors(bucket: WeightBucket) -> list[tuple[str, Tensor]]:
    """Names and CPU tensors of a bucket; they are views of its bytes and must not be written to."""
    data = bucket.data if bucket.data.flags.writeable else _writeable_view(bucket.data)
    flat = torch.from_numpy(data)
    return [
        (spec.name, flat[spec.start : spec.end].view(getattr(torch, spec.dtype)).view(spec.shape))
        for spec in bucket.specs
    ]


def gpu_name(device: torch.device) -> str:
    """See `rlmed.core.weights.Recipient.devices`; empty for a CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def check_shapes(parameters: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Make sure that names and shapes are exactly those of the parameters.

    Raises:
        WeightError: naming the first that is not.
    """
    cure = "learner and engine need one model (model.path)"
    for name, shape in expected.items():
        if name not in parameters:
            raise WeightError(f"weights of {name} arrived, which this model does not have: {cure}")
        if tuple(parameters[name].shape) != tuple(shape):
            raise WeightError(
                f"weights of {name} arrived with shape {tuple(shape)}, here it is {tuple(parameters[name].shape)}: {cure}"
            )
    if absent := sorted(parameters.keys() - expected.keys()):
        raise WeightError(f"{len(absent)} weights did not arrive, the first is {absent[0]}: {cure}")


def copy_into(parameters: Mapping[str, Tensor], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Copy named tensors into the parameters of the same names and shapes.

    Raises:
        WeightError: for an unknown name or another shape.
    """
    with torch.no_grad():
        for name, tensor in tensors:
            check_shapes({name: parameters[name]} if name in parameters else {}, {name: tuple(tensor.shape)})
            parameters[name].copy_(tensor)


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _bucket(tensors: list[tuple[str, Tensor]], memory: Tensor) -> WeightBucket:
    """Copy tensors into uint8 memory of just the right size."""
    specs, start = [], 0
    for name, tensor in tensors:
        end, following = start + tensor.nbytes, start + _padded(tensor.nbytes)
        memory[start:end].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        memory[end:following] = 0  # the checksum is of these bytes too
        specs.append(TensorSpec(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), start, end))
        start = following
    return WeightBucket.seal(tuple(specs), memory.numpy())


def _writeable_view(data: np.ndarray) -> np.ndarray:
    """The same memory without numpy's read-only flag, which torch warns of; nothing here writes to it."""
    interface = dict(data.__array_interface__)
    interface["data"] = (interface["data"][0], False)

    class _Holder:
        __array_interface__ = interface
        owner = data

    return np.asarray(_Holder())
