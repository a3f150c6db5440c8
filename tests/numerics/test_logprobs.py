"""Log-probabilities by blocks against log-softmax and gather in float64, and the memory that they
promise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from rlmed.models import logprobs as module
from rlmed.models.logprobs import CPU_BLOCK_BYTES, chunked_logprobs, logprobs_no_grad, masked_logits
from tests.rounding import rounding

ROWS, WIDTH, VOCABULARY = 37, 12, 50
BANNED = (3, 49)
STORED = {torch.float32: 0.0, torch.bfloat16: torch.finfo(torch.bfloat16).eps / 2}
"""Relative error of storing a number in the parameters' dtype, beside what float32 sums cost."""


def problem(dtype=torch.float32, rows=ROWS):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, WIDTH, generator=generator).to(dtype)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator).to(dtype)
    allowed = torch.tensor([token for token in range(VOCABULARY) if token not in BANNED])
    targets = allowed[torch.randint(len(allowed), (rows,), generator=generator)]
    return hidden, weight, targets


def plain(hidden, weight, targets, temperature, banned):
    """The definition, with every logit in memory."""
    logits = hidden @ weight.T / temperature
    logits = logits.index_fill(1, banned, -math.inf)
    log_softmax = logits.log_softmax(1)
    kept = [token for token in range(len(weight)) if token not in banned]
    entropy = -(log_softmax[:, kept].exp() * log_softmax[:, kept]).sum(1)
    return log_softmax.gather(1, targets[:, None])[:, 0], entropy


def upstream(rows=ROWS):
    return torch.linspace(-1, 2, rows)


def with_gradients(function, tensors, temperature=1.0, banned=()):
    hidden, weight, targets = tensors
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    ids = torch.tensor(banned, dtype=torch.int64)
    logprobs, entropy = function(hidden, weight, targets, temperature=temperature, banned=ids)
    (logprobs * upstream(len(targets))).sum().backward()
    return logprobs.detach(), entropy.detach(), hidden.grad, weight.grad


def in_float64(tensors, temperature=1.0, banned=()):
    hidden, weight, targets = tensors
    return with_gradients(plain, (hidden.double(), weight.double(), targets), temperature, banned)


def assert_near(actual, expected, tensors, temperature):
    """Values to the rounding of float32 sums, whatever the dtype; gradients too, or to that of
    their factors in bfloat16.
    """
    hidden, weight, targets = tensors
    # logits are sums of WIDTH products, normalized over VOCABULARY; gradients add up over ROWS
    magnitude = float((hidden.double().abs() @ weight.double().abs().T).max()) / temperature
    for one, other, length in zip(actual, expected, (WIDTH, WIDTH, VOCABULARY, len(targets)), strict=True):
        bound = rounding(length, magnitude)
        if one.dtype == torch.float32:
            torch.testing.assert_close(one.double(), other, atol=bound, rtol=0)
        else:
            # both factors are rounded, and the result; hidden states' gradients are a sum over
            # blocks
            assert float((one.double() - other).norm()) <= 3 * STORED[one.dtype] * float(other.norm()) + bound


@pytest.fixture(params=[None, 1, 5, 36, 49])
def block(request, monkeypatch):
    """Everything at once, or blocks of so many tokens of the vocabulary; the last one is
    smaller.
    """
    if request.param is not None:
        use_blocks(monkeypatch, request.param)
    return request.param


def use_blocks(monkeypatch, tokens, rows=ROWS):
    monkeypatch.setattr(module, "CPU_BYTES", 0)
    monkeypatch.setattr(module, "CPU_BLOCK_BYTES", 4 * max(rows, WIDTH) * tokens)
    assert module._blocks(rows, torch.empty(VOCABULARY, WIDTH))[0] == slice(0, tokens)


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("banned", [(), BANNED])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_values_and_gradients_are_those_of_the_definition(block, temperature, banned, dtype):
    tensors = problem(dtype)
    actual = with_gradients(chunked_logprobs, tensors, temperature, banned)
    assert [tensor.dtype for tensor in actual] == [torch.float32, torch.float32, dtype, dtype]
    assert_near(actual, in_float64(tensors, temperature, banned), tensors, temperature)


@pytest.mark.parametrize("dtype", STORED)
def test_the_gradient_of_a_tied_head_is_that_of_both_uses(block, dtype):
    _, weight, targets = problem(dtype)
    inputs = targets.roll(1)

    def tied(function, weight):
        weight = weight.clone().requires_grad_()
        empty = torch.zeros(0, dtype=torch.int64)
        logprobs, _ = function(weight[inputs], weight, targets, temperature=1.0, banned=empty)
        (logprobs * upstream()).sum().backward()
        return weight.grad.double()

    magnitude = float((weight[inputs].double().abs() @ weight.double().abs().T).max())
    # two gradients, each rounded, that autograd adds up and rounds
    largest = float(tied(plain, weight.double()).abs().max())
    bound = rounding(ROWS + VOCABULARY, magnitude) + (ROWS + 3) * STORED[dtype] * largest
    torch.testing.assert_close(tied(chunked_logprobs, weight), tied(plain, weight.double()), atol=bound, rtol=0)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_is_frozen_gets_no_gradient_and_costs_none(block, frozen, monkeypatch):
    tensors = problem()
    expected = dict(zip(("hidden", "weight"), with_gradients(chunked_logprobs, tensors)[2:], strict=True))
    products = []
    for name in ("_product", "matmul_transposed", "weight_gradient"):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *x, of=name, function=function: products.append(of) or function(*x))
    inputs = {"hidden": tensors[0].clone(), "weight": tensors[1].clone()}
    for name, tensor in inputs.items():
        tensor.requires_grad_(name != frozen)
    empty = torch.zeros(0, dtype=torch.int64)
    logprobs, _ = chunked_logprobs(*inputs.values(), tensors[2], temperature=1.0, banned=empty)
    (logprobs * upstream()).sum().backward()
    trained = "weight" if frozen == "hidden" else "hidden"
    assert inputs[frozen].grad is None
    assert torch.equal(inputs[trained].grad, expected[trained])
    blocks = 1 if block is None else -(-VOCABULARY // block)
    # at once: logits, then one gradient; in blocks the logits a second time
    logits = blocks * (1 if block is None else 2)
    assert products.count("weight_gradient") == (blocks if trained == "weight" else 0)
    assert products.count("_product") == logits
    assert products.count("matmul_transposed") == logits + (blocks if trained == "hidden" else 0)


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("rows", [0, 1])
def test_no_row_and_one_row(block, rows, dtype):
    tensors = problem(dtype, rows=rows)
    actual, expected = with_gradients(chunked_logprobs, tensors, 0.7, BANNED), in_float64(tensors, 0.7, BANNED)
    assert [tensor.shape for tensor in actual] == [(rows,), (rows,), (rows, WIDTH), (VOCABULARY, WIDTH)]
    if rows:
        assert_near(actual, expected, tensors, 0.7)
    else:
        assert not actual[3].any()
    frozen = logprobs_no_grad(*tensors, temperature=0.7, banned=torch.tensor(BANNED))
    assert torch.equal(frozen, actual[0])


@pytest.mark.parametrize("dtype", STORED)
def test_frozen_ones_are_the_same_numbers(block, dtype):
    hidden, weight, targets = problem(dtype)
    settings = {"temperature": 0.7, "banned": torch.tensor(BANNED)}
    expected, _ = chunked_logprobs(hidden, weight, targets, **settings)
    assert torch.equal(logprobs_no_grad(hidden.requires_grad_(), weight, targets, **settings), expected)


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


@pytest.mark.parametrize("common", [120.0, -120.0])
@pytest.mark.parametrize("dtype", STORED)
def test_logits_near_120_keep_their_differences(block, common, dtype):
    # 8 * 15 + step / 32: exact in float32, and all of them 120 in bfloat16, whose numbers are 0.5
    # apart there
    steps = torch.arange(8) / 32
    hidden = torch.tensor([[8.0, 1.0]], dtype=dtype).expand(ROWS, 2)
    weight = torch.stack([torch.full((8,), common / 8), steps], dim=1).to(dtype)
    targets = torch.arange(ROWS) % 8
    empty = torch.zeros(0, dtype=torch.int64)
    right, entropy = plain(steps.double()[None], torch.eye(8).double(), torch.zeros(1, dtype=torch.int64), 1.0, empty)
    assert torch.equal(masked_logits(hidden, weight, empty), (common + steps).expand(ROWS, 8))
    found, spread = chunked_logprobs(hidden, weight, targets, temperature=1.0, banned=empty)
    # the sums of 8 numbers near 1; that with the largest logit rounds at 120
    bound = rounding(16) + rounding(1, abs(common))
    torch.testing.assert_close(found.double(), (right + steps.double())[targets], atol=bound, rtol=0)
    torch.testing.assert_close(spread.double(), entropy.expand(ROWS), atol=bound, rtol=0)


def test_a_banned_token_has_no_gradient_and_no_probability(block):
    hidden, weight, _ = problem()
    targets = torch.full((ROWS,), 7)
    gradient = with_gradients(chunked_logprobs, (hidden, weight, targets), banned=BANNED)[3]
    assert not gradient[list(BANNED)].any()
    assert gradient.any(dim=1).sum() == VOCABULARY - len(BANNED)
    banned = torch.tensor(BANNED)
    logprobs, _ = chunked_logprobs(hidden, weight, torch.full((ROWS,), 3), temperature=1.0, banned=banned)
    assert (logprobs == -math.inf).all()


def test_the_backward_pass_can_run_twice(block):
    hidden, weight, targets = problem()
    hidden.requires_grad_()
    logprobs, _ = chunked_logprobs(hidden, weight, targets, temperature=1.0, banned=torch.tensor(BANNED))
    (first,) = torch.autograd.grad(logprobs.sum(), hidden, retain_graph=True)
    (second,) = torch.autograd.grad(logprobs.sum(), hidden)
    assert torch.equal(first, second)


@pytest.mark.parametrize("limit", [2**20, 0])
def test_beyond_the_cpu_the_products_write_float32(limit, monkeypatch):
    products = []
    multiply = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *x, **options: products.append(options) or multiply(*x, **options))
    monkeypatch.setattr(module, "CUDA_BYTES", limit)
    monkeypatch.setattr(module, "_fits", lambda rows, weight: limit > 0)
    monkeypatch.setattr(module, "_blocks", lambda rows, weight: [slice(0, 30), slice(30, VOCABULARY)])
    hidden, weight, targets = (tensor.to("meta") for tensor in problem(torch.bfloat16))
    hidden.requires_grad_()
    weight.requires_grad_()
    banned = torch.zeros(0, dtype=torch.int64, device="meta" if limit else "cpu")
    logprobs, _ = chunked_logprobs(hidden, weight, targets, temperature=1.0, banned=banned)
    logprobs.sum().backward()
    # logits, in blocks a second time for the backward pass
    assert products == [{"out_dtype": torch.float32}] * (1 if limit else 4)
    assert (hidden.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.bfloat16)


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_sampling_in_bfloat16_sees_unrounded_logits(family, fresh_policy, mixed_prompts, run_engine, monkeypatch):
    policy = fresh_policy(family, dtype="bfloat16")  # with a tied head and with a separate one
    assert (policy.projection.weight is policy.model.get_input_embeddings().weight) == (family == "qwen2")
    right, bounds = [], []
    compute = policy.logits

    def logits(hidden):
        weight = policy.projection.weight.double()
        products = hidden.double() @ weight.T
        right.extend(products[:, allowed(policy)].log_softmax(1).max(1).values.tolist())
        magnitude = float((hidden.double().abs() @ weight.abs().T).max())
        bounds.append(rounding(hidden.shape[1], magnitude) + rounding(len(weight)))
        return compute(hidden)

    monkeypatch.setattr(policy, "logits", logits)
    (group,) = run_engine(policy, mixed_prompts(family, 1), temperature=0.0)
    found = group.completions[0].rollout_logprobs
    assert len(found) == len(right) > 1
    assert max(abs(one - other) for one, other in zip(found, right, strict=True)) < max(bounds)
    assert max(bounds) < 1e-3, "bfloat16's rounding must show"


def allowed(policy):
    return [token for token in range(policy.projection.out_features) if token not in policy.banned_token_ids]


class LiveBytes(TorchDispatchMode):
    """Remembers the most bytes that were alive at once of what operations returned."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {entry.untyped_storage()._cdata for entry in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        for entry in _tensors(result):
            storage = entry.untyped_storage()
            if storage._cdata not in given:
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result


def _tensors(tree) -> Iterator[torch.Tensor]:
    return (entry for entry in tree_iter(tree) if isinstance(entry, torch.Tensor))


@pytest.mark.parametrize("dtype", STORED)
def test_the_head_of_a_large_vocabulary_stays_within_two_blocks(dtype):
    rows, width, vocabulary = 2048, 64, 151_936
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    banned = torch.arange(151_652, 151_657)
    with LiveBytes() as live:
        logprobs, entropy = chunked_logprobs(hidden, weight, targets, temperature=1.0, banned=banned)
        logprobs.sum().backward()
    gradients = (rows + vocabulary) * width * dtype.itemsize
    narrow = 8 * rows * width * 4 + 32 * rows * 8  # hidden states and columns
    parts = 3 * CPU_BLOCK_BYTES // rows * width  # a block's weights and their gradient in float32
    assert live.peak <= gradients + 2 * CPU_BLOCK_BYTES + narrow + parts
    assert live.peak < rows * vocabulary * 4 / 10
    assert 0 < float(entropy.detach().mean()) < math.log(vocabulary)
