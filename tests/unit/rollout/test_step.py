"""A decode step needs nothing from the host and writes in place; the host may be a step behind."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rollout.native.engine import NativeEngine
from rollout.native.scheduler import EngineLimits
from rollout.native.slots import StepPlan
from rollout.native.step import StepGraphs, decode_step, fixed_part
from tests.plans import PLANS

WAITS = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "lift_fresh", "unique")
"""Operators that read a tensor's values on the host, or bring values from it."""


class Calls(TorchDispatchMode):
    """Counts operators that would make the host wait for a device."""

    def __init__(self):
        super().__init__()
        self.waits = Counter()
        self.all = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.all += 1
        self.waits[name] += name in WAITS
        if name in ("index", "index_put_", "index_put"):
            self.waits["boolean mask"] += any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in ("_to_copy", "to") and (kwargs or {}).get("device") is not None:
            self.waits["host copy"] += kwargs["device"] != args[0].device
        return func(*args, **(kwargs or {}))


def test_the_counter_counts():
    ones = torch.ones(3)
    with Calls() as calls:
        ones[ones > 0], ones.sum().item(), bool((ones > 0).all()), torch.tensor([1.0]), ones.nonzero()
        torch.arange(3, device="meta").to("meta")
    assert {name for name, count in calls.waits.items() if count} >= {
        "boolean mask", "_local_scalar_dense", "lift_fresh", "nonzero",
    }  # fmt: skip


def running(policy, prompts, make_request, plan, **sampling):
    """An engine in the middle of its work."""
    engine = NativeEngine(policy, lambda ids: "", EngineLimits(max_completions=16), PLANS[plan])
    for i, prompt in enumerate(prompts):
        request = make_request(i, group_size=1 + i, max_tokens=20, **sampling)
        engine.submit(type(request)(i, prompt, request.group_size, request.sampling))
    for _ in range(3):
        engine.step()
    return engine


@pytest.mark.parametrize(
    "sampling",
    [{}, {"temperature": 0.7, "top_k": 5, "top_p": 0.9}, {"temperature": 0.0}],
    ids=["plain", "all", "greedy"],
)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen2", "qwen3", "llama"])
@torch.inference_mode()
def test_a_step_reads_and_writes_fixed_tensors_and_never_waits(
    family, plan, sampling, tiny_policy, mixed_prompts, make_request
):
    policy = tiny_policy(family)
    engine = running(policy, mixed_prompts(family, 4), make_request, plan, **sampling)
    decoder, shape = engine._decoder, engine._shape
    if shape is None:
        shape = decoder.lay_out(engine._rows, engine._groups)
    shape = shape.widened(engine._plan.width(max(row.sampled for row in engine._rows)))
    tensors = [*decoder.slots.tensors(), *decoder.prefix.keys, *decoder.suffix.values]
    before = [(tensor.data_ptr(), tensor.shape) for tensor in tensors]
    counts = decoder.slots.counts.clone()
    with Calls() as calls:
        decode_step(policy, decoder.slots, decoder.prefix, decoder.suffix, shape, kernels=decoder.kernels)
    # a compiled step looks up angles by position on the CPU, where there is nothing to wait for
    assert +calls.waits == Counter() or decoder.kernels.compiled
    assert calls.all > 50 or decoder.kernels.compiled
    after = [*decoder.slots.tensors(), *decoder.prefix.keys, *decoder.suffix.values]
    assert [(tensor.data_ptr(), tensor.shape) for tensor in after] == before
    assert decoder.slots.counts[: len(engine._rows)].sum() > counts[: len(engine._rows)].sum()


@torch.inference_mode()
def test_an_ended_row_counts_no_further_and_writes_nowhere_else(chain, make_request):
    engine = NativeEngine(chain({5: [0]}), lambda ids: "", EngineLimits(max_completions=8), PLANS["static"])
    engine.submit(make_request(0, start=3, max_tokens=3))  # 4, 5, then the end token
    engine.submit(make_request(1, start=10, max_tokens=9))
    engine.step()
    slots, decoder = engine._decoder.slots, engine._decoder
    shape = engine._shape.widened(16)
    seen = []
    for _ in range(4):
        decode_step(engine.policy, slots, decoder.prefix, decoder.suffix, shape)
        seen.append((slots.tokens[:2].tolist(), slots.counts[:2].tolist(), slots.alive[:2].tolist()))
    assert seen == [
        ([5, 12], [2, 2], [True, True]),
        ([0, 13], [3, 3], [False, True]),
        ([0, 14], [3, 4], [False, True]),
        ([0, 15], [3, 5], [False, True]),
    ]
    assert not slots.alive[2:].any()


@torch.inference_mode()
def test_what_stays_between_steps_is_what_a_step_would_make(tiny_policy, mixed_prompts, make_request):
    policy = tiny_policy("qwen2")
    tokens = []
    for kept in (True, False):
        engine = running(policy, mixed_prompts("qwen2", 3), make_request, "exact", temperature=1.0)
        decoder = engine._decoder
        shape = decoder.lay_out(engine._rows, engine._groups).widened(max(row.sampled for row in engine._rows))
        fixed = fixed_part(decoder.slots, decoder.prefix, decoder.suffix, shape, decoder.kernels) if kept else None
        decode_step(policy, decoder.slots, decoder.prefix, decoder.suffix, shape, fixed)
        tokens.append(decoder.slots.tokens.tolist())
    assert tokens[0] == tokens[1]


def test_an_overrun_past_a_stop_string_is_cut_off_and_not_counted(chain, make_request):
    decode = lambda ids: "".join(chr(97 + i) for i in ids)  # noqa: E731
    engine = NativeEngine(chain(), decode, EngineLimits(max_completions=8), PLANS["behind"])
    engine.submit(make_request(0, start=1, max_tokens=20, stop=("e",)))
    engine.submit(make_request(1, start=1, max_tokens=9))
    groups = []
    while engine.busy:
        groups += engine.step()
    assert [(group.request.index, group.completions[0].token_ids.tolist()) for group in groups] == [
        (0, [2, 3, 4]),
        (1, [2, 3, 4, 5, 6, 7, 8, 9, 10]),
    ]
    assert engine.generated_tokens == 12


def test_new_weights_first_read_what_older_ones_have_sampled(chain, make_request):
    engine = NativeEngine(chain(), lambda ids: "", EngineLimits(max_completions=8), PLANS["behind"])
    engine.submit(make_request(0, max_tokens=3))
    engine.submit(make_request(1, max_tokens=6))
    for _ in range(3):
        engine.step()
    engine.update_weights(5)
    assert engine.busy
    groups = []
    while engine.busy:
        groups += engine.step()
    found = [
        (group.request.index, group.completions[0].min_version, group.completions[0].max_version) for group in groups
    ]
    assert found == [(0, 0, 0), (1, 0, 5)]


@pytest.mark.parametrize(("size", "bucket"), [(1, 8), (8, 8), (9, 16), (33, 64), (90, 100), (100, 100)])
def test_rows_come_in_buckets(size, bucket):
    assert PLANS["static"].bucket(size, smallest=8, largest=100) == bucket
    assert PLANS["exact"].bucket(size, smallest=8, largest=100) == size


def test_widths_are_whole_pages_on_cuda():
    plan = StepPlan.for_device(torch.device("cuda"))
    assert plan.lag == 1
    assert plan.graphs
    assert {plan.width(tokens) % plan.page_tokens for tokens in range(1, 2000)} == {0}
    assert all(tokens <= plan.width(tokens) < max(65, 2 * tokens) for tokens in range(1, 2000))


def test_graphs_are_forgotten_if_memory_has_moved():
    graphs = StepGraphs()
    graphs.keep_if((1, 2))
    graphs._graphs["shape"] = "graph"
    graphs.keep_if((1, 2))
    assert graphs._graphs
    graphs.keep_if((1, 3))
    assert not graphs._graphs
