"""Packed weights give the same products and are never stale."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rlmed.models.cpu import linear as fast
from rlmed.models.cpu import products
from rlmed.models.weights import copy_weights, make_buckets

EPSILON = torch.finfo(torch.float32).eps

pytestmark = pytest.mark.skipif(not products.has_onednn(), reason="this torch has no oneDNN")


@pytest.fixture(autouse=True)
def packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a probe would choose here."""
    monkeypatch.setattr(products._Choice, "uses", frozenset(["packed_weights"]))


def bound(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """How far apart two float32 sums of K products may be.

    Each is off by at most K eps sum |a b| (Higham 2002, 3.1).
    """
    return 2 * left.shape[1] * EPSILON * (left.abs() @ right.abs())


def assert_within(actual: torch.Tensor, expected: torch.Tensor, limit: torch.Tensor) -> None:
    assert actual.shape == expected.shape
    assert bool(((actual - expected).abs() <= limit).all())


@pytest.mark.parametrize("rows", [1, 8, 64, 100])
def test_a_packed_weight_serves_any_number_of_rows(rows):
    x, weight = torch.randn(rows, 48), nn.Parameter(torch.randn(80, 48))
    packs = fast.PackedWeights()
    with torch.inference_mode(), packs.active():
        got = fast.linear(x, weight)
    assert len(packs) == 1
    assert_within(got, F.linear(x, weight).detach(), bound(x, weight.detach().T))


def sgd_step(weight):
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=1.0).step()


def adamw_step(weight):
    weight.grad = torch.ones_like(weight)
    torch.optim.AdamW([weight], lr=1.0, foreach=True).step()


def fused_step(weight):
    weight.grad = torch.ones_like(weight)
    torch.optim.AdamW([weight], lr=1.0, fused=True).step()


def in_place(weight):
    with torch.no_grad():
        weight.add_(1.0)


def in_inference_mode(weight):
    with torch.inference_mode():
        weight.add_(1.0)


def through_a_view(weight):
    with torch.no_grad():
        weight[1:3, 2] += 5.0


def loaded(weight):
    copy_weights({"weight": weight}, list(make_buckets([("weight", torch.randn_like(weight))])), weight.device)


def state_dict_loaded(weight):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = weight
    layer.load_state_dict({"weight": torch.randn(weight.shape)})


def other_storage(weight):
    weight.data = torch.randn_like(weight)


CHANGES = [
    sgd_step,
    adamw_step,
    fused_step,
    in_place,
    in_inference_mode,
    through_a_view,
    loaded,
    state_dict_loaded,
    other_storage,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_the_next_product_sees_a_changed_weight(change):
    x, weight = torch.randn(8, 16), nn.Parameter(torch.randn(32, 16))
    packs = fast.PackedWeights()
    with torch.inference_mode(), packs.active():
        before = fast.linear(x, weight)
    change(weight)
    with torch.inference_mode(), packs.active():
        after = fast.linear(x, weight)
    limit = bound(x, weight.detach().T)
    assert_within(after, F.linear(x, weight).detach(), limit)
    assert not bool(((after - before).abs() <= limit).all())
    assert len(packs) == 1  # the stale copy is gone


def test_what_could_change_unnoticed_is_not_packed():
    packs = fast.PackedWeights()
    with torch.inference_mode():
        inference = nn.Parameter(torch.randn(4, 4), requires_grad=False)
    plain = torch.randn(4, 4)
    assert packs.of(inference) is inference
    assert packs.of(plain) is plain
    assert len(packs) == 0


def test_nothing_is_packed_outside_of_decoding():
    packs = fast.PackedWeights()
    weight = nn.Parameter(torch.randn(4, 4))
    with packs.active():
        pass
    fast.linear(torch.randn(2, 4), weight)
    assert len(packs) == 0


def test_two_packed_weights_of_one_shape_are_told_apart():
    packs, x = fast.PackedWeights(), torch.randn(8, 16)
    weights = [nn.Parameter(torch.randn(32, 16)) for _ in range(3)]
    with torch.inference_mode(), packs.active():
        got = [fast.linear(x, weight) for weight in weights + weights]
    for output, weight in zip(got, weights + weights, strict=True):
        assert_within(output, F.linear(x, weight).detach(), bound(x, weight.detach().T))


def test_without_the_choice_nothing_is_packed(monkeypatch):
    monkeypatch.setattr(products._Choice, "uses", frozenset(["few_rows"]))
    packs = fast.PackedWeights()
    with torch.inference_mode(), packs.active():
        fast.linear(torch.randn(2, 4), nn.Parameter(torch.randn(4, 4)))
    assert len(packs) == 0
