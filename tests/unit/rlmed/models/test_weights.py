"""Tensors to buckets and back, and what is refused on the way."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import numpy as np
import pytest
import torch

from rlmed.core.weights import WeightError
from rlmed.models.weights import copy_weights, make_buckets

CPU = torch.device("cpu")


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(7, 5, generator=generator),
        "b.weight": torch.randn(33, generator=generator).to(torch.bfloat16),
        "c.transposed": torch.randn(4, 6, generator=generator).T,
        "d.scalar": torch.tensor(3.0),
        "e.large": torch.randn(100, 10, generator=generator),
    }


def stored(tensors: dict[str, torch.Tensor], **options: object) -> list:
    """As a store keeps them: a copy of each bucket, read-only as Ray gives it back."""
    kept = []
    for bucket in make_buckets(tensors.items(), **options):  # type: ignore[arg-type]
        kept.append(pickle.loads(pickle.dumps(bucket)))
        kept[-1].data.flags.writeable = False
    return kept


@pytest.mark.parametrize("bucket_bytes", [1, 300, 2**20])
def test_tensors_survive_the_way_bit_for_bit(tensors: dict[str, torch.Tensor], bucket_bytes: int) -> None:
    buckets = stored(tensors, bucket_bytes=bucket_bytes)
    assert all(bucket.data.nbytes <= bucket_bytes or len(bucket.shapes) == 1 for bucket in buckets)
    received = [entry for bucket in buckets for entry in bucket.tensors(CPU)]
    assert [name for name, _ in received] == list(tensors)
    for name, tensor in received:
        assert tensor.dtype == tensors[name].dtype
        torch.testing.assert_close(tensor, tensors[name], rtol=0, atol=0)


def test_a_damaged_byte_is_found(tensors: dict[str, torch.Tensor]) -> None:
    bucket = copy.deepcopy(next(iter(make_buckets(tensors.items()))))
    bucket.data[17] ^= 1
    with pytest.raises(WeightError, match=r"a\.weight … e\.large were damaged"):
        bucket.tensors(CPU)


def test_bytes_in_a_readonly_store_are_not_copied(tensors: dict[str, torch.Tensor]) -> None:
    (bucket,) = stored(tensors)
    (_, first), *_ = bucket.tensors(CPU)
    assert first.data_ptr() == bucket.data.__array_interface__["data"][0]
    assert not bucket.data.flags.writeable


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("z", (2, 2), "weights of z, .*not have"),
        ("a", (3,), r"received a with shape \(3,\), expected \(2, 2\)"),
    ],
)
def test_weights_of_another_model_are_refused(name: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(WeightError, match=message):
        copy_weights({"a": torch.zeros(2, 2)}, stored({name: torch.ones(shape)}), CPU)


def test_an_incomplete_push_is_refused() -> None:
    parameters = {"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(3)}
    with pytest.raises(WeightError, match=r"2 weights .*\bb: "):
        copy_weights(parameters, stored({"a": torch.ones(2)}), CPU)
    assert parameters["a"].tolist() == [0, 0], "nothing of it was copied"
    copy_weights(
        parameters, stored({name: torch.ones(len(value)) for name, value in parameters.items()}, bucket_bytes=1), CPU
    )
    assert all(value.tolist() == [1] * len(value) for value in parameters.values())


def test_copying_converts_to_the_parameters_dtype() -> None:
    parameter = torch.zeros(3, dtype=torch.bfloat16)
    copy_weights({"a": parameter}, stored({"a": torch.tensor([1.0, 2.0, 3.0])}), CPU)
    assert parameter.tolist() == [1.0, 2.0, 3.0]


def test_checksums_do_not_depend_on_what_lay_in_the_memory_before(tensors: dict[str, torch.Tensor]) -> None:
    first = [bucket.checksum for bucket in stored(tensors, bucket_bytes=300)]
    alone = [next(iter(make_buckets([(name, tensor)], bucket_bytes=1))).checksum for name, tensor in tensors.items()]
    assert first == [bucket.checksum for bucket in stored(tensors, bucket_bytes=300)]
    assert alone == [bucket.checksum for bucket in stored(tensors, bucket_bytes=1)]
    assert all(dataclasses.is_dataclass(bucket) and bucket.data.dtype == np.uint8 for bucket in stored(tensors))
