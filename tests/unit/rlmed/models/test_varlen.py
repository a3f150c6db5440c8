"""What the unpadded layout hands its backends, in which order and shape, and how one is chosen."""

from __future__ import annotations

import importlib.metadata
import sys
import types
from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from rlmed.models import varlen
from rlmed.models.varlen import AttentionChoice, VarlenLayout, choose_attention, first_that_works, probe
from rlmed.models.varlen_backends import FlashAttn, Reference, Row, Spans, TorchFlash
from tests.dense_attention import allowed, dense_attention, row_tensors

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SCALE = 0.6
GROUPS = [(3, (4, 1, 2)), (1, ()), (6, (0, 5))]
SHAPES = st.lists(st.tuples(st.integers(1, 5), st.lists(st.integers(0, 4), max_size=4)), min_size=1, max_size=4)
FLASH = torch.ops.aten._flash_attention_forward.default, torch.ops.aten._flash_attention_backward.default


def spans_of(query_starts, key_starts, longest_query, longest_key, causal):
    """What a kernel reads from its arguments; here it is checked as the CUDA code checks it."""
    for starts, longest in ((query_starts, longest_query), (key_starts, longest_key)):
        assert starts.dtype == torch.int32
        assert starts.is_contiguous()
        lengths = [end - start for start, end in pairwise(starts.tolist())]
        assert 0 < min(lengths) <= max(lengths) <= longest
    assert longest_query > 1
    assert len(query_starts) == len(key_starts)
    return Spans(query_starts, key_starts, longest_query, longest_key, causal)


def check_rows(*rows):
    for row in rows:
        assert row.ndim == 3
        assert row.shape[-1] % 8 == 0
        assert row.stride(-1) == 1
        assert row.dtype == rows[0].dtype
        assert row.dtype in (torch.bfloat16, torch.float16)


class FlashOperators(TorchDispatchMode):
    """torch's flash operators on a CPU: arguments by schema names, numbers by the reference."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls.append(function)
        if function not in FLASH:
            return function(*args, **(kwargs or {}))
        given = dict(zip((argument.name for argument in function._schema.arguments), args, strict=False)) | kwargs
        assert given["dropout_p"] == 0
        spans = spans_of(*(given[name] for name in ("cum_seq_q", "cum_seq_k", "max_q", "max_k", "is_causal")))
        row = Row(given["query"], given["key"], given["value"])
        if function is FLASH[0]:
            check_rows(*row)
            assert not given["return_debug_mask"]
            output, logsumexp = Reference().forward(row, spans, given["scale"])
            return output, logsumexp, row[0].new_empty(2), row[0].new_empty(0), row[0].new_empty(0)
        check_rows(*row, given["out"], given["grad_out"].contiguous())  # as the CUDA code makes it
        check_logsumexp(given["logsumexp"], row[0])
        return Reference().backward(given["grad_out"], row, given["out"], given["logsumexp"], spans, given["scale"])


def check_logsumexp(logsumexp, query):
    assert logsumexp.shape == (query.shape[1], len(query))
    assert logsumexp.dtype == torch.float32
    assert logsumexp.is_contiguous()


def flash_attn_2_8():
    """The two functions with the signatures of flash-attn 2.8.3."""

    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False, block_table=None,
        leftpad_k=None, seqused_k=None, zero_tensors=False,
    ):  # fmt: skip
        assert dropout_p == 0
        check_rows(q, k, v)
        spans = spans_of(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal)
        return *Reference().forward(Row(q, k, v), spans, softmax_scale), None, None

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
        zero_tensors=False,
    ):  # fmt: skip
        assert dropout_p == softcap == 0
        assert window_size_left == window_size_right == -1
        assert alibi_slopes is None
        check_rows(q, k, v, out, dq, dk, dv, dout.contiguous())  # as its Python code makes it
        check_logsumexp(softmax_lse, q)
        spans = spans_of(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal)
        gradients = Reference().backward(dout, Row(q, k, v), out, softmax_lse, spans, softmax_scale)
        for place, gradient in zip((dq, dk, dv), gradients, strict=True):
            place.copy_(gradient)
        return torch.empty(0)

    module = types.ModuleType("flash_attn.flash_attn_interface")
    module._flash_attn_varlen_forward = _flash_attn_varlen_forward
    module._flash_attn_varlen_backward = _flash_attn_varlen_backward
    return module


@pytest.fixture
def installed(monkeypatch):
    """`installed("2.8.3")`: that version of flash-attn seems to be there."""

    def install(version):
        versions = importlib.metadata.version
        monkeypatch.setattr(
            importlib.metadata, "version", lambda name: version if name == "flash-attn" else versions(name)
        )
        monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
        monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", flash_attn_2_8())

    return install


@pytest.mark.parametrize("name", ["torch", "flash-attn"])
@pytest.mark.parametrize("width", [8, 5, 20])
def test_backends_get_what_they_expect_and_what_they_return_is_read_rightly(name, width, installed):
    installed("2.8.3")
    tensors = row_tensors(GROUPS, 4, 2, width, torch.bfloat16)
    # as the decoder gives them: heads outside, tokens inside
    row = [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in tensors]
    backend = TorchFlash() if name == "torch" else FlashAttn()
    with FlashOperators() if name == "torch" else nullcontext() as operators:
        output = VarlenLayout.build(GROUPS, backend).attend(0, *row, SCALE)
        gradients = torch.autograd.grad((output.float() * torch.arange(width)).sum(), tensors)
    if name == "torch":
        assert [call for call in operators.calls if call in FLASH] == [FLASH[0]] * 2 + [FLASH[1]] * 2
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    expected = dense_attention(*exact, allowed(GROUPS), SCALE)
    assert output.shape == expected.shape
    right = torch.autograd.grad((expected * torch.arange(width)).sum(), exact)
    for found, one in zip((output, *gradients), (expected, *right), strict=True):
        # ten roundings at most, of 2**-9 each
        torch.testing.assert_close(found.double(), one, atol=0.02 * float(one.detach().abs().max()), rtol=0)


def test_torchs_operators_take_these_arguments_and_a_layer_reads_nothing_back_from_the_device():
    # meta tensors have no numbers: whatever asked for one would raise
    layout = VarlenLayout.build(GROUPS, TorchFlash(), "meta")
    tensors = [tensor.detach().to("meta").requires_grad_() for tensor in row_tensors(GROUPS, 4, 2, 16, torch.bfloat16)]
    output = layout.attend(0, *tensors, SCALE)
    gradients = torch.autograd.grad(output.sum(), tensors)
    assert [gradient.shape for gradient in gradients] == [tensor.shape for tensor in tensors]


def test_gradients_of_a_prompt_are_never_added_in_any_order():
    # an atomic addition in half precision would give other bits at every run
    tensors = row_tensors(GROUPS, 4, 2, 8, torch.bfloat16)
    with FlashOperators() as operators:
        output = VarlenLayout.build(GROUPS, TorchFlash()).attend(0, *tensors, SCALE)
        operators.calls.clear()
        torch.autograd.grad(output.sum(), tensors)
    names = {str(function) for function in operators.calls}
    assert any("index_copy" in name for name in names)
    assert not any(word in name for name in names for word in ("index_add", "index_put", "scatter"))


@given(SHAPES)
def test_spans_cover_the_row_and_give_each_completion_its_prompt(groups):
    layout = VarlenLayout.build(groups, Reference())
    mask = torch.zeros_like(allowed(groups))
    for start, end in pairwise(layout.segments.query_starts.tolist()):
        mask[start:end, start:end] = torch.ones(end - start, end - start).tril().bool()
    if layout.suffixes is not None:
        spans = layout.suffixes.spans
        starts = spans.query_starts.tolist(), spans.key_starts.tolist()
        for own, keys in zip(*map(pairwise, starts), strict=True):
            rows = layout.suffixes.completion_tokens[slice(*own)]
            prompt = layout.suffixes.prompt_tokens[slice(*keys)]
            mask[rows.unsqueeze(1), prompt] = True
    assert torch.equal(mask, allowed(groups))
    assert (layout.suffixes is None) == (not any(sum(lengths) for _, lengths in groups))


def test_the_longest_query_is_never_one():
    suffixes = VarlenLayout.build([(5, (1,)), (7, (1,))], Reference()).suffixes
    assert (suffixes.spans.longest_query, suffixes.spans.longest_key) == (2, 7)
    assert suffixes.spans.query_starts.tolist() == [0, 1, 2]


def test_a_row_of_prompts_is_one_attention():
    tensors = row_tensors([(4, ()), (2, ())], 4, 2, 8, torch.bfloat16)
    with FlashOperators() as operators, torch.inference_mode():
        VarlenLayout.build([(4, ()), (2, ())], TorchFlash()).attend(0, *tensors, SCALE)
    assert [call for call in operators.calls if call in FLASH] == [FLASH[0]]


def test_flash_attn_says_why_it_is_not_used(installed):
    with pytest.raises(ImportError, match=r"^not installed$"):
        FlashAttn()
    installed("2.7.4.post1")
    with pytest.raises(ImportError, match=r"^2\.7\.4\.post1 is older than 2\.8$"):
        FlashAttn()
    installed("2.10.0")
    assert FlashAttn().name == "flash-attn"


class Broken(Reference):
    name = "broken"

    def forward(self, *arguments):
        raise RuntimeError("no kernel image is available\nfor this device")


class Wrong(Reference):
    name = "wrong"

    def backward(self, *arguments):
        query, key, value = super().backward(*arguments)
        return Row(query, key, 2 * value)


class NotFinite(Reference):
    name = "not finite"

    def backward(self, *arguments):
        query, key, value = super().backward(*arguments)
        return Row(query.index_fill(0, torch.tensor([3]), torch.nan), key, value)


def test_the_first_backend_that_computes_the_right_numbers_is_chosen():
    choice = first_that_works((FlashAttn, Broken, Wrong, NotFinite, Reference), CPU, torch.bfloat16, 20)
    assert isinstance(choice.backend, Reference)
    assert str(choice) == (
        "reference (flash-attn: not installed; broken: no kernel image is available; wrong: off by 1 in a probe; "
        "not finite: off by inf in a probe)"
    )
    assert str(first_that_works((Broken,), CPU, torch.bfloat16, 20)) == "padded (broken: no kernel image is available)"
    assert str(first_that_works((Reference,), CPU, torch.float16, 20)) == "reference (installed)"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_probe_leaves_half_precision_room(dtype):
    assert 0 < probe(Reference(), CPU, dtype, 128) < varlen.PROBE_TOLERANCE / 3


@pytest.fixture
def forgetful():
    """Nothing is chosen yet, and what the test chooses is forgotten."""
    choose_attention.cache_clear()
    yield
    choose_attention.cache_clear()


@pytest.mark.usefixtures("forgetful")
def test_only_half_precision_on_cuda_asks_for_a_backend(monkeypatch):
    asked = []
    monkeypatch.setattr(
        varlen,
        "first_that_works",
        lambda *question: asked.append(question) or AttentionChoice(Reference(), "installed"),
    )
    assert str(choose_attention(CPU, torch.bfloat16, 64)) == "padded (faster without CUDA)"
    assert str(choose_attention(CUDA, torch.float32, 64)) == "padded (flash attention has no float32)"
    assert not asked
    assert choose_attention(CUDA, torch.bfloat16, 64) is choose_attention(CUDA, torch.bfloat16, 64)
    assert asked == [((FlashAttn, TorchFlash), CUDA, torch.bfloat16, 64)]


@pytest.mark.usefixtures("forgetful")
def test_padding_on_a_gpu_that_should_need_none_is_a_warning(monkeypatch, caplog):
    monkeypatch.setattr(varlen, "first_that_works", lambda *_: first_that_works((Broken,), CPU, torch.bfloat16, 64))
    choose_attention(CUDA, torch.bfloat16, 64)
    assert caplog.messages == [
        "attention of packed rows: padded (broken: no kernel image is available); it takes more time and memory than "
        "without padding"
    ]
