"""The probe takes what is faster, says so, and is asked once."""

from __future__ import annotations

import pytest
import torch

from rlmed.core.config_checks import PRODUCT_USES
from rlmed.models import products
from rlmed.models.policy import load_config
from rlmed.models.products import Shape, has_onednn, linear_shapes, probe_products, settle_products
from rlmed.setup import model_folder

needs_onednn = pytest.mark.skipif(not has_onednn(), reason="this torch has no oneDNN")


class Clock:
    """In the place of `time` in the probe: a product takes a millisecond, a slow one twenty more, on every machine."""

    now = 0.0

    def perf_counter(self):
        self.now += 0.001
        return self.now

    def sleep(self, seconds):
        self.now += seconds


CLOCK = Clock()


@pytest.fixture(autouse=True)
def unsettled(monkeypatch):
    monkeypatch.setattr(products._Choice, "uses", None)
    monkeypatch.setattr(products, "time", CLOCK)


def slow(x, weight, bias=None):
    CLOCK.sleep(0.02)
    return x @ weight.T


@needs_onednn
@pytest.mark.parametrize(("side", "expected"), [("onednn", ()), ("torch", PRODUCT_USES[:3])])
def test_the_slower_product_is_not_taken(monkeypatch, side, expected):
    monkeypatch.setattr(products, "_packing_pays", lambda shapes, unpacked: False)
    if side == "onednn":
        monkeypatch.setattr(products, "onednn", slow)
    else:
        monkeypatch.setattr(products.F, "linear", slow)
        monkeypatch.setattr(products, "_torch_gradient", slow_gradient)
    assert probe_products([Shape(24, 16, 2), Shape(16, 24, 2)]) == expected


@needs_onednn
def test_weights_are_packed_where_it_pays_and_memory_allows(monkeypatch):
    shapes = [Shape(24, 16, 2), Shape(16, 24, 2)]
    assert products._packing_pays(shapes, slow)
    monkeypatch.setattr(products, "_memory_bytes", lambda: 1000)
    assert not products._packing_pays(shapes, slow)
    monkeypatch.setattr(products, "_memory_bytes", lambda: 2**30)
    monkeypatch.setattr(
        products, "pack", lambda weight: CLOCK.sleep(0.02) or torch.ops.mkldnn._reorder_linear_weight(weight)
    )
    assert not products._packing_pays(shapes, lambda x, weight: None)


def slow_gradient(grad, x):
    CLOCK.sleep(0.02)
    return grad.T @ x


def test_without_onednn_torch_multiplies_and_asking_for_it_is_an_error(monkeypatch):
    monkeypatch.setattr(products, "has_onednn", lambda: False)
    config = load_config(model_folder("embedded:tiny_base"))
    assert settle_products(config) == ()
    with pytest.raises(ValueError, match=r"model\.onednn .* this build of torch has not: use model\.onednn=\[\]"):
        settle_products(config, ["few_rows"])


@needs_onednn
def test_a_process_is_probed_once_and_follows_what_it_is_given(monkeypatch):
    config = load_config(model_folder("embedded:tiny_base"))
    answers = iter([("few_rows",)])
    monkeypatch.setattr(products, "probe_products", lambda shapes: next(answers))
    assert settle_products(config) == settle_products(config) == ("few_rows",)
    assert settle_products(config, ["weight_gradients", "many_rows"]) == ("many_rows", "weight_gradients")
    assert settle_products(config) == ("many_rows", "weight_gradients")
    assert settle_products(config, []) == ()


def test_shapes_are_those_of_the_model():
    config = load_config(model_folder("embedded:tiny_base"))
    text = config.get_text_config()
    shapes = linear_shapes(config)
    width = text.hidden_size
    assert Shape(text.vocab_size, width) in shapes
    assert Shape(width, text.intermediate_size, text.num_hidden_layers) in shapes
    # queries, keys, values, output, gate, up and down of each layer, and the head
    assert sum(shape.layers for shape in shapes) == 7 * text.num_hidden_layers + 1


def test_the_gradients_of_both_products_are_the_same():
    grad, x = torch.randn(6, 5), torch.randn(6, 4)
    expected = grad.double().T @ x.double()
    torch.testing.assert_close(products._torch_gradient(grad, x).double(), expected, atol=1e-5, rtol=0)
    if has_onednn():
        torch.testing.assert_close(products._onednn_gradient(grad, x).double(), expected, atol=1e-5, rtol=0)
