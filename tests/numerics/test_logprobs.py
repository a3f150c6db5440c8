"""Chunked log-probabilities against log-softmax and gather with autograd, and the memory that they promise."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from rlmed.models import logprobs as module
from rlmed.models.logprobs import chunk_rows, chunked_logprobs, logprobs_no_grad
from tests.rounding import rounding

ROWS, WIDTH, VOCABULARY = 37, 12, 50
BANNED = (3, 49)


def problem(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, generator=generator).to(dtype)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator).to(dtype)
    allowed = torch.tensor([token for token in range(VOCABULARY) if token not in BANNED])
    targets = allowed[torch.randint(len(allowed), (ROWS,), generator=generator)]
    return hidden, weight, targets


def plain(hidden, weight, targets, temperature, banned):
    """The definition, with every logit in memory."""
    logits = (hidden @ weight.T).float() / temperature
    logits = logits.index_fill(1, banned, -math.inf)
    log_softmax = logits.log_softmax(1)
    kept = [token for token in range(VOCABULARY) if token not in banned]
    entropy = -(log_softmax[:, kept].exp() * log_softmax[:, kept]).sum(1)
    return log_softmax.gather(1, targets[:, None])[:, 0], entropy


def with_gradients(function, temperature, banned, dtype=torch.float32):
    hidden, weight, targets = problem(dtype)
    hidden.requires_grad_()
    weight.requires_grad_()
    logprobs, entropy = function(hidden, weight, targets, temperature=temperature, banned=banned)
    (logprobs * torch.linspace(-1, 2, ROWS)).sum().backward()
    return logprobs.detach(), entropy.detach(), hidden.grad, weight.grad


@pytest.fixture(params=[None, 1, 5, 36])
def rows_per_chunk(request, monkeypatch):
    """Everything at once, or chunks of so many rows; the last one is smaller."""
    if request.param is not None:
        monkeypatch.setattr(module, "CHUNK_BYTES", 4 * VOCABULARY * request.param)
        assert chunk_rows(VOCABULARY) == request.param
    return request.param


@pytest.mark.parametrize("banned", [(), BANNED])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_values_and_gradients_are_those_of_the_definition(rows_per_chunk, temperature, banned):
    ids = torch.tensor(banned, dtype=torch.int64)
    actual, expected = with_gradients(chunked_logprobs, temperature, ids), with_gradients(plain, temperature, ids)
    # logits are sums of WIDTH products, normalized over VOCABULARY; gradients add up over ROWS
    hidden, weight, _ = problem()
    magnitude = float((hidden.abs() @ weight.abs().T).max()) / temperature
    for one, other, length in zip(actual, expected, (WIDTH, WIDTH, VOCABULARY, ROWS), strict=True):
        torch.testing.assert_close(one, other, atol=rounding(length, magnitude), rtol=0)


def test_bfloat16_gradients_have_the_parameters_dtype_and_are_near(rows_per_chunk):
    ids = torch.tensor(BANNED)
    actual = with_gradients(chunked_logprobs, 0.8, ids, torch.bfloat16)
    expected = with_gradients(plain, 0.8, ids, torch.bfloat16)
    assert [tensor.dtype for tensor in actual] == [torch.float32, torch.float32, torch.bfloat16, torch.bfloat16]
    for one, other in zip(actual, expected, strict=True):
        difference = (one.float() - other.float()).norm() / other.float().norm()
        assert difference < 0.01


def test_frozen_ones_are_the_same_numbers(rows_per_chunk):
    hidden, weight, targets = problem()
    settings = {"temperature": 0.7, "banned": torch.tensor(BANNED)}
    expected, _ = chunked_logprobs(hidden, weight, targets, **settings)
    assert torch.equal(logprobs_no_grad(hidden.requires_grad_(), weight, targets, **settings), expected)
    assert logprobs_no_grad(hidden[:0], weight, targets[:0], **settings).shape == (0,)


def test_values_worked_by_hand():
    # logits ln 1, ln 2, ln 5 and a banned one: probabilities 1/8, 2/8, 5/8
    hidden = torch.tensor([[1.0]])
    weight = torch.tensor([[1.0], [2.0], [5.0], [99.0]]).log()
    logprobs, entropy = chunked_logprobs(hidden, weight, torch.tensor([2]), temperature=1.0, banned=torch.tensor([3]))
    assert logprobs.item() == pytest.approx(math.log(5 / 8), abs=rounding(8))
    assert entropy.item() == pytest.approx(0.900256, abs=1e-6 + rounding(8))
    # temperature 1/2 squares them: 1/30, 4/30, 25/30
    logprobs, _ = chunked_logprobs(hidden, weight, torch.tensor([1]), temperature=0.5, banned=torch.tensor([3]))
    assert logprobs.item() == pytest.approx(math.log(4 / 30), abs=rounding(8, 3))


def test_a_banned_token_has_no_gradient_and_no_probability():
    hidden, weight, _ = problem()
    weight.requires_grad_()
    targets = torch.full((ROWS,), 7)
    logprobs, _ = chunked_logprobs(hidden, weight, targets, temperature=1.0, banned=torch.tensor(BANNED))
    logprobs.sum().backward()
    assert not weight.grad[list(BANNED)].any()
    assert weight.grad.any(dim=1).sum() == VOCABULARY - len(BANNED)


def test_the_backward_pass_can_run_twice(rows_per_chunk):
    hidden, weight, targets = problem()
    hidden.requires_grad_()
    logprobs, _ = chunked_logprobs(hidden, weight, targets, temperature=1.0, banned=torch.tensor(BANNED))
    (first,) = torch.autograd.grad(logprobs.sum(), hidden, retain_graph=True)
    (second,) = torch.autograd.grad(logprobs.sum(), hidden)
    assert torch.equal(first, second)


def test_no_rows_are_no_error():
    hidden, weight, _ = problem()
    empty = torch.zeros(0, dtype=torch.int64)
    logprobs, entropy = chunked_logprobs(hidden[:0], weight, empty, temperature=1.0, banned=empty)
    assert logprobs.shape == entropy.shape == (0,)


class LargestTensor(TorchDispatchMode):
    """Remembers the largest number of elements that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_tensor_of_tokens_by_vocabulary_is_ever_made(monkeypatch):
    rows_at_a_time = 2
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * VOCABULARY * rows_at_a_time)
    with LargestTensor() as chunked:
        with_gradients(chunked_logprobs, 1.0, torch.tensor(BANNED))
    with LargestTensor() as whole:
        with_gradients(plain, 1.0, torch.tensor(BANNED))
    assert whole.elements == ROWS * VOCABULARY
    # the projection's gradient [V, d] and the hidden states [M, d] are there anyway
    assert chunked.elements == max(rows_at_a_time * VOCABULARY, VOCABULARY * WIDTH)
