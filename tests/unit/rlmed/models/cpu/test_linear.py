"""Linear layers through oneDNN give torch's numbers, gradients included."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rlmed.core.config.checks import PRODUCT_USES
from rlmed.models.cpu import linear as fast
from rlmed.models.cpu import products
from rlmed.models.cpu.products import has_onednn
from tests.rounding import rounding


@pytest.mark.parametrize("shape", [(7, 12), (1, 12), (2, 5, 12), (0, 12)])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_torch(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, requires_grad=True)
    weight = torch.randn(9, 12, requires_grad=True)
    offset = torch.randn(9, requires_grad=True) if bias else None
    inputs = [tensor for tensor in (x, weight, offset) if tensor is not None]
    upstream = torch.randn(*shape[:-1], 9)
    expected, got = F.linear(x, weight, offset), fast.linear(x, weight, offset)
    close = rounding(12, 12 * 4)  # sums of a dozen products, which are seldom above 4
    torch.testing.assert_close(got, expected, atol=close, rtol=0)
    for ours, theirs in zip(
        torch.autograd.grad(got, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=close, rtol=0)


def test_only_what_needs_a_gradient_gets_one() -> None:
    x, weight = torch.randn(3, 4), torch.randn(5, 4, requires_grad=True)
    fast.linear(x, weight).sum().backward()
    assert weight.grad is not None
    assert x.grad is None


@pytest.fixture(params=[(), PRODUCT_USES, *((use,) for use in PRODUCT_USES)], ids="+".join, autouse=True)
def chosen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """What oneDNN computes: each choice may occur on some processor, so all are tested on each."""
    if request.param and not has_onednn():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(products._Choice, "uses", frozenset(request.param))
    return request.param


def test_it_is_used_for_float32_and_for_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "onednn", lambda *_: pytest.fail("bfloat16 went through the float32 path"))
    x, weight = torch.randn(3, 4).bfloat16(), torch.randn(5, 4).bfloat16()
    bfloat16 = rounding(4, 4 * 4, torch.bfloat16)
    torch.testing.assert_close(fast.linear(x, weight), F.linear(x, weight), atol=bfloat16, rtol=0)


@pytest.mark.parametrize(("rows", "use"), [(127, "few_rows"), (128, "many_rows")])
def test_each_use_goes_where_it_was_sent(
    monkeypatch: pytest.MonkeyPatch, chosen: tuple[str, ...], rows: int, use: str
) -> None:
    calls: list[tuple[int, ...]] = []
    monkeypatch.setattr(
        fast, "onednn", lambda x, weight, bias=None: (calls.append(x.shape), F.linear(x, weight, bias))[1]
    )
    x, weight = torch.randn(rows, 4), torch.randn(5, 4, requires_grad=True)
    fast.linear(x, weight).sum().backward()
    assert calls == [(rows, 4)] * (use in chosen) + [(5, rows)] * ("weight_gradients" in chosen)


def test_a_model_keeps_its_parameters() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.GELU(), torch.nn.Linear(6, 2, bias=False))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.randn(3, 4)
    expected = model(x)
    fast.use_fast_linears(model)
    torch.testing.assert_close(model(x), expected, atol=rounding(6, 6), rtol=0)
    assert {name: tensor.equal(before[name]) for name, tensor in model.state_dict().items()} == dict.fromkeys(
        before, True
    )
