"""Convert tensors to buckets of bytes and back; see `rlmed.core.weights`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from rlmed.core.weights import TensorSpec, WeightBucket, WeightError

BUCKET_BYTES = 256 * 2**20
"""Size of one bucket: bounds the copies in flight, and large enough to make per-message cost negligible."""
ALIGNMENT = 64
"""Bytes; every tensor in a bucket starts at a multiple of it."""


def make_buckets(tensors: Iterable[tuple[str, Tensor]], bucket_bytes: int = BUCKET_BYTES) -> Iterator[WeightBucket]:
    """Copy named tensors, in order, into buckets of at most `bucket_bytes` (a larger tensor gets its own).

    Args:
        tensors: names and tensors of any shape on any device; consumed one at a time.
        bucket_bytes: bound on a bucket.

    Yields:
        Buckets whose bytes are valid until the next one is requested: they share one buffer, because first touching fresh
        memory costs several times as much as copying into it.
    """
    memory = torch.empty(0, dtype=torch.uint8)
    for group, size in _grouped(tensors, bucket_bytes):
        if len(memory) < size:
            memory = torch.empty(max(size, bucket_bytes), dtype=torch.uint8)
        yield _bucket(group, memory[:size])


def _grouped(
    tensors: Iterable[tuple[str, Tensor]], bucket_bytes: int
) -> Iterator[tuple[list[tuple[str, Tensor]], int]]:
    """Yield the tensors of each bucket and its size in bytes."""
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
    """Return names and CPU tensors of a bucket; the tensors are read-only views of its bytes."""
    data = bucket.data if bucket.data.flags.writeable else _writeable_view(bucket.data)
    flat = torch.from_numpy(data)
    return [
        (spec.name, flat[spec.start : spec.end].view(getattr(torch, spec.dtype)).view(spec.shape))
        for spec in bucket.specs
    ]


def gpu_name(device: torch.device) -> str:
    """Return a GPU's UUID, or "" for a CPU; see `rlmed.core.weights.EngineHandle.devices`."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def check_shapes(parameters: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Check that names and shapes match the parameters exactly.

    Raises:
        WeightError: naming the first mismatch.
    """
    cure = "learner and engine need the same model (model.path)"
    for name, shape in expected.items():
        if name not in parameters:
            raise WeightError(f"received weights of {name}, which this model does not have: {cure}")
        if tuple(parameters[name].shape) != tuple(shape):
            raise WeightError(
                f"received {name} with shape {tuple(shape)}, expected {tuple(parameters[name].shape)}: {cure}"
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
    """Copy tensors into uint8 memory of exactly their size."""
    specs, start = [], 0
    for name, tensor in tensors:
        end, following = start + tensor.nbytes, start + _padded(tensor.nbytes)
        memory[start:end].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        memory[end:following] = 0  # the checksum covers the padding
        specs.append(TensorSpec(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), start, end))
        start = following
    return WeightBucket.seal(tuple(specs), memory.numpy())


def _writeable_view(data: np.ndarray) -> np.ndarray:
    """View the memory without numpy's read-only flag, about which torch warns; nothing here writes to it."""
    interface = dict(data.__array_interface__)
    interface["data"] = (interface["data"][0], False)

    class _Holder:
        __array_interface__ = interface
        owner = data

    return np.asarray(_Holder())
