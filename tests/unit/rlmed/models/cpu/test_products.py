"""The probe takes what is faster, says so, and is asked once."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from rlmed.core.config.checks import PRODUCT_USES
from rlmed.models.cpu import products
from rlmed.models.cpu.products import Shape, has_onednn, linear_shapes, probe_products, settle_products
from rlmed.models.loading import model_folder
from rlmed.models.policy import load_config

needs_onednn = pytest.mark.skipif(not has_onednn(), reason="this torch has no oneDNN")


class Clock:
    """In place of `time` in the probe: a product takes a millisecond, a slow one twenty more."""

    now = 0.0

    def perf_counter(self):
        self.now += 0.0005
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


def slow_gradient(grad, x):
    CLOCK.sleep(0.02)
    return grad.T @ x


SHAPES = (Shape(24, 16, 2), Shape(16, 24, 2))
PACKED = 4 * 4 * 24 * 16


@needs_onednn
@pytest.mark.parametrize(("side", "expected"), [("onednn", ()), ("torch", PRODUCT_USES[:3])])
def test_the_slower_product_is_not_taken(monkeypatch, side, expected):
    monkeypatch.setattr(products, "PACKED_SHARE", 0)
    if side == "onednn":
        monkeypatch.setattr(products, "onednn", slow)
    else:
        monkeypatch.setattr(products.F, "linear", slow)
        monkeypatch.setattr(products, "_torch_gradient", slow_gradient)
    assert probe_products(SHAPES) == expected


@needs_onednn
def test_a_slow_gradient_of_the_input_counts_where_many_rows_are_learnt(monkeypatch):
    """It goes through the same product, along the other side of the weight."""
    plain = products.onednn

    def slow_transposed(x, weight, bias=None):
        if not weight.is_contiguous():
            CLOCK.sleep(0.02)
        return plain(x, weight, bias)

    monkeypatch.setattr(products, "onednn", slow_transposed)
    monkeypatch.setattr(products.F, "linear", lambda x, weight: CLOCK.sleep(0.002) or x @ weight.T)
    assert "many_rows" not in probe_products(SHAPES)


@needs_onednn
def test_weights_are_packed_where_it_pays(monkeypatch):
    monkeypatch.setattr(products.F, "linear", slow)
    plain = products.onednn

    def slow_unpacked(x, weight, bias=None):
        return plain(x, weight, bias) if weight.is_mkldnn else slow(x, weight)

    monkeypatch.setattr(products, "onednn", slow_unpacked)
    assert "packed_weights" in probe_products(SHAPES)
    # packing that takes longer than it saves in the steps of a rollout
    plain_pack = products.pack
    monkeypatch.setattr(products, "PACKED_STEPS", 1)
    monkeypatch.setattr(products, "pack", lambda weight: CLOCK.sleep(0.05) or plain_pack(weight))
    assert "packed_weights" not in probe_products(SHAPES)


@needs_onednn
@pytest.mark.parametrize(("engines", "memory", "packs"), [
    (1, PACKED / products.PACKED_SHARE, True), (1, PACKED / products.PACKED_SHARE - 4, False),
    (2, PACKED / products.PACKED_SHARE, False), (3, 3 * PACKED / products.PACKED_SHARE, True),
])  # fmt: skip
def test_all_engines_of_a_machine_together_pack_a_part_of_its_memory(monkeypatch, engines, memory, packs):
    asked = []
    monkeypatch.setattr(products, "_memory_bytes", lambda: memory)
    monkeypatch.setattr(products, "_probe_decoding", lambda weights, may_pack: asked.append(may_pack) or [])
    probe_products(SHAPES, engines=engines)
    assert asked == [packs]
    monkeypatch.setattr(products, "probe_products", lambda shapes, engines: (str(engines),))
    monkeypatch.setattr(products, "PRODUCT_USES", ("3",))
    assert settle_products(load_config(model_folder("embedded:tiny_base")), engines=3) == ("3",)


LARGE = (Shape(1536, 1536, 28), Shape(256, 1536, 56), Shape(8960, 1536, 56), Shape(1536, 8960, 28), Shape(151936, 1536))
WIDE_HEAD = (Shape(64, 64, 2), Shape(256_000, 64))
DEEP = (Shape(8, 8, 1000), Shape(4, 8, 2000))


@pytest.mark.parametrize("shapes", [SHAPES, LARGE, WIDE_HEAD, DEEP])
@pytest.mark.parametrize("room", [2**26, 2**21])
def test_the_probe_of_decoding_reads_as_many_weights_as_memory_allows_and_none_twice(monkeypatch, shapes, room):
    monkeypatch.setattr(products, "STEP_BYTES", room)
    monkeypatch.setattr(products, "_memory_bytes", lambda: 2**40)
    weights = products._sample(shapes)
    size, whole = sum(weight.nbytes for weight in weights), products.packed_bytes(shapes)
    assert len({weight.data_ptr() for weight in weights}) == len(weights)
    assert size == pytest.approx(min(room, whole), rel=0.1)
    # each kind of layer has its share, the vocabulary projection too
    for shape in shapes:
        own = sum(weight.nbytes for weight in weights if weight.shape[1] == shape.inputs)
        model = products.packed_bytes(other for other in shapes if other.inputs == shape.inputs)
        assert own / size == pytest.approx(model / whole, rel=0.1)


def test_the_probe_of_decoding_leaves_small_machines_their_memory(monkeypatch):
    monkeypatch.setattr(products, "_memory_bytes", lambda: 2**30)
    assert sum(weight.nbytes for weight in products._sample(LARGE)) <= 2**30 / 30
    monkeypatch.setattr(products, "_memory_bytes", lambda: 0)  # the system does not say
    assert 2**23 < sum(weight.nbytes for weight in products._sample(LARGE)) <= 2**25


@pytest.mark.parametrize("limits", [(None, None), (5, None), (None, 5), (9, 5), (5, 9)])
def test_memory_is_what_machine_container_and_ulimit_leave(monkeypatch, limits):
    monkeypatch.setattr(products, "memory_limit", lambda: limits[0])
    monkeypatch.setattr(products, "address_limit", lambda: limits[1])
    assert products._memory_bytes() == 5 if any(limits) else products._memory_bytes() > 2**20


def refused(*_):
    raise RuntimeError("could not create a primitive")


@pytest.mark.parametrize(
    ("name", "replacement"),
    [
        ("pack", refused),
        ("onednn", refused),
        ("onednn", lambda x, weight: x @ torch.zeros(16, 32)),
        ("pack", lambda weight: 2 * weight),
    ],
)
def test_a_onednn_that_cannot_pack_or_is_wrong_is_none(monkeypatch, name, replacement):
    monkeypatch.setattr(products, name, replacement)
    assert not has_onednn.__wrapped__()


@pytest.mark.parametrize("missing", ["_linear_pointwise", "_reorder_linear_weight"])
def test_a_torch_without_one_of_the_operators_has_no_onednn(monkeypatch, missing):
    operators = {"_linear_pointwise": products.onednn, "_reorder_linear_weight": products.pack}
    monkeypatch.setattr(
        products.torch.ops, "mkldnn", SimpleNamespace(**{k: v for k, v in operators.items() if k != missing})
    )
    assert not has_onednn.__wrapped__()


def test_without_onednn_torch_multiplies_and_asking_for_it_is_an_error(monkeypatch):
    monkeypatch.setattr(products, "has_onednn", lambda: False)
    config = load_config(model_folder("embedded:tiny_base"))
    assert settle_products(config) == ()
    with pytest.raises(ValueError, match=r"model\.onednn .*model\.onednn=\[\]"):
        settle_products(config, ["few_rows"])


@needs_onednn
def test_a_process_is_probed_once_and_follows_what_it_is_given(monkeypatch):
    config = load_config(model_folder("embedded:tiny_base"))
    answers = iter([("few_rows",)])
    monkeypatch.setattr(products, "probe_products", lambda shapes, engines: next(answers))
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
