"""Schedules by hand, clipping, AdamW against torch's own, master weights."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.checkpoint import read_optimizer, write_optimizer
from learner.distributed import SingleProcess
from learner.optimizer import Optimizer, lr_factor
from tests.configs import learner_config
from tests.rounding import rounding


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, [1, 1, 1, 1, 1, 1]),
        ("constant", 2, [0.5, 1, 1, 1, 1, 1]),
        ("linear", 0, [1, 0.75, 0.5, 0.25, 0, 0]),
        ("linear", 2, [0.5, 1, 1, 0.5, 0, 0]),
        ("cosine", 0, [1, (2 + math.sqrt(2)) / 4, 0.5, (2 - math.sqrt(2)) / 4, 0, 0]),
        ("cosine", 1, [1, 1, 0.75, 0.25, 0, 0]),
    ],
)
def test_schedules_worked_by_hand(schedule, warmup, expected):
    # four steps in total; a run that goes on stays at the end of its schedule
    assert [lr_factor(step, 4, warmup, schedule) for step in range(6)] == pytest.approx(expected, abs=1e-12)


@given(st.integers(1, 50), st.integers(0, 60), st.sampled_from(["constant", "linear", "cosine"]), st.integers(0, 200))
def test_a_factor_is_between_zero_and_one_and_the_first_step_learns(total, warmup, schedule, step):
    assert 0.0 <= lr_factor(step, total, warmup, schedule) <= 1.0
    assert lr_factor(0, total, warmup, schedule) > 0.0
    # warm-up rises, what follows never does
    factors = [lr_factor(i, total, warmup, schedule) for i in range(200)]
    assert factors[:warmup] == sorted(factors[:warmup])
    assert factors[warmup:] == sorted(factors[warmup:], reverse=True)


def parameter(values, dtype=torch.float32):
    return torch.nn.Parameter(torch.tensor(values, dtype=dtype))


def optimizer(*parameters, total_steps=10, **config):
    settings = learner_config(**{"lr": 0.1, "lr_schedule": "constant", "max_grad_norm": 1e9, **config})
    return Optimizer([(f"p{i}", entry) for i, entry in enumerate(parameters)], settings, total_steps)


def backward(loss, *optimizers):
    loss.backward()
    for entry in optimizers:
        entry.accumulate()


def test_a_step_is_torchs_adamw_under_the_schedule():
    weight, twin = parameter([1.0, -2.0, 3.0]), parameter([1.0, -2.0, 3.0])
    ours = optimizer(weight, lr_schedule="linear", warmup_steps=2, weight_decay=0.1, betas=(0.8, 0.95), total_steps=6)
    theirs = torch.optim.AdamW([twin], lr=0.1, weight_decay=0.1, betas=(0.8, 0.95))
    for factor in (0.5, 1.0, 1.0, 0.75, 0.5):
        assert ours.lr == pytest.approx(0.1 * factor)
        backward((weight**3).sum(), ours)
        ours.step()
        theirs.param_groups[0]["lr"] = 0.1 * factor
        theirs.zero_grad()
        (twin**3).sum().backward()
        theirs.step()
        # five updates of a dozen operations
        torch.testing.assert_close(weight, twin, atol=rounding(5 * 12, 3), rtol=0)
    assert ours.steps_taken == 5


def test_the_norm_is_returned_before_clipping_and_the_step_sees_it_after():
    # AdamW's first step only sees signs, so the second one shows the clipping: gradients (0.6,
    # 0.8), then (0.06, 0.08)
    weight, free = parameter([0.0, 0.0]), parameter([0.0, 0.0])
    clipped, unclipped = optimizer(weight, max_grad_norm=1.0), optimizer(free)
    for scale, norm in ((10.0, 10.0), (0.1, 0.1)):
        for tensor, entry in ((weight, clipped), (free, unclipped)):
            backward((tensor * torch.tensor([0.6, 0.8]) * scale).sum(), entry)
            assert entry.step() == pytest.approx(norm, rel=rounding(8))
    moments = {
        name: entry.state_dict()["adamw"]["state"][0]["exp_avg"] for name, entry in (("c", clipped), ("u", unclipped))
    }
    # m = 0.9 * 0.1 * g1 + 0.1 * g2; torch adds 1e-6 to the norm that it divides by
    close = {"atol": 1e-6 + rounding(8), "rtol": 0}
    torch.testing.assert_close(moments["c"], torch.tensor([0.6, 0.8]) * (0.09 * 1.0 + 0.1 * 0.1), **close)
    torch.testing.assert_close(moments["u"], torch.tensor([0.6, 0.8]) * (0.09 * 10.0 + 0.1 * 0.1), **close)


def test_the_norm_is_over_all_parameters():
    one, other = parameter([0.0]), parameter([0.0])
    both = optimizer(one, other)
    backward(3 * one.sum() + 4 * other.sum(), both)
    assert both.step() == pytest.approx(5.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_micro_batches_add_up_and_are_cleared_by_the_step(dtype):
    weight = parameter([1.0, 1.0], dtype)
    entry = optimizer(weight)
    for scale in (1.0, 2.0, 3.0):
        backward((weight * scale).sum(), entry)
    assert entry.step() == pytest.approx(6 * math.sqrt(2), rel=rounding(8))
    backward((weight * 0.5).sum(), entry)
    assert entry.step() == pytest.approx(0.5 * math.sqrt(2), rel=rounding(8))


def test_bfloat16_gradients_are_added_in_float32():
    # 256 + 1 is 256 in bfloat16
    weight = parameter([0.0], torch.bfloat16)
    entry = optimizer(weight)
    for scale in (256.0, 1.0, 1.0):
        backward((weight * scale).sum(), entry)
    assert entry.step() == pytest.approx(258.0)


def test_master_weights_keep_updates_that_bfloat16_would_lose():
    weight = parameter([1.0], torch.bfloat16)
    entry = optimizer(weight, lr=1e-4)
    seen = []
    for _ in range(60):
        backward(weight.float().sum(), entry)
        entry.step()
        seen.append(weight.item())
    # next below 1 is 1 - 2^-8: twenty steps of 1e-4 bring the master half way there
    assert seen[:15] == [1.0] * 15
    assert seen[30] == 1 - 2**-8
    assert entry.state_dict()["masters"]["p0"].item() == pytest.approx(1 - 60e-4, abs=rounding(60))


def test_a_float32_parameter_is_its_own_master():
    assert optimizer(parameter([1.0])).state_dict()["masters"] == {}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_that_is_not_finite_changes_nothing(dtype, value):
    weight, healthy = parameter([1.0], dtype), parameter([2.0], dtype)
    entry = optimizer(weight, healthy)
    backward((weight * value).sum() + healthy.sum(), entry)
    assert not math.isfinite(entry.step())
    entry.drop_gradients()
    assert (weight.item(), healthy.item(), entry.steps_taken) == (1.0, 2.0, 0)
    backward((weight + healthy).sum(), entry)
    assert entry.step() == pytest.approx(math.sqrt(2))
    assert weight.item() < 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropped_gradients_do_not_reach_the_next_step(dtype):
    weight = parameter([1.0], dtype)
    entry = optimizer(weight)
    backward(100 * weight.sum(), entry)
    (50 * weight.sum()).backward()  # not even accumulated yet
    entry.drop_gradients()
    backward(weight.sum(), entry)
    assert entry.step() == pytest.approx(1.0)


def test_only_parameters_that_require_gradients_are_trained():
    frozen, trained = parameter([1.0]), parameter([1.0])
    frozen.requires_grad_(False)
    entry = optimizer(frozen, trained, weight_decay=0.5)
    backward((frozen * trained).sum(), entry)
    entry.step()
    assert frozen.item() == 1.0
    assert trained.item() < 1.0
    assert entry.state_dict()["parameters"] == ["p1"]


def test_a_parameter_without_gradient_is_left_alone():
    used, unused = parameter([1.0]), parameter([1.0])
    entry = optimizer(used, unused, weight_decay=0.5)
    backward(used.sum(), entry)
    assert entry.step() == pytest.approx(1.0)
    assert unused.item() == 1.0


def test_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match=r"learner\.freeze leaves nothing to train"):
        optimizer(parameter([1.0]).requires_grad_(False))


def test_half_precision_moments_follow_float32_ones_and_decay():
    torch.manual_seed(0)
    start = torch.randn(2000).tolist()
    half, full = parameter(start), parameter(start)
    entries = optimizer(half, moments="bfloat16", lr=1e-3), optimizer(full, lr=1e-3)
    for step in range(60):
        scale = 1.0 if step < 5 else 1e-3  # the second moment must forget the first steps
        for weight, entry in zip((half, full), entries, strict=True):
            backward((weight * torch.arange(2000).sin() * scale).sum(), entry)
            entry.step()
    ours, theirs = (entry.state_dict()["adamw"]["state"][0] for entry in entries)
    assert ours["exp_avg"].dtype == ours["exp_avg_sq"].dtype == torch.bfloat16
    # rounded by chance, the mean of many is that of float32; to nearest, it would not decay
    assert float(ours["exp_avg_sq"].float().mean() / theirs["exp_avg_sq"].mean()) == pytest.approx(1, abs=2e-3)
    assert float((half - full).detach().abs().mean()) < 0.02 * float((full.detach() - torch.tensor(start)).abs().mean())


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_optimizer_goes_on_bit_for_bit(moments, dtype, tmp_path):
    def step(weight, entry, scale):
        backward((weight * torch.tensor([0.3, 0.2, -0.1], dtype=dtype) * scale).sum(), entry)
        entry.step()

    weight = parameter([1.0, -2.0, 3.0], dtype)
    entry = optimizer(weight, moments=moments, lr=1e-2)
    for scale in (1.0, 2.0):
        step(weight, entry, scale)
    write_optimizer(entry.state_dict(), SingleProcess(), tmp_path)
    twin = parameter(weight.tolist(), dtype)
    resumed = optimizer(twin, moments=moments, lr=1e-2)
    read_optimizer(resumed, SingleProcess(), tmp_path)
    for scale in (3.0, 0.5):
        step(weight, entry, scale)
        step(twin, resumed, scale)
    assert torch.equal(weight, twin)
    mine, theirs = (each.state_dict()["adamw"]["state"][0] for each in (entry, resumed))
    assert all(mine[name].dtype == theirs[name].dtype and torch.equal(mine[name], theirs[name]) for name in mine)


def test_moments_of_another_dtype_are_an_error_that_names_the_key(tmp_path):
    weight = parameter([1.0])
    entry = optimizer(weight)
    backward(weight.sum(), entry)
    entry.step()
    write_optimizer(entry.state_dict(), SingleProcess(), tmp_path)
    with pytest.raises(ValueError, match=r"learner\.moments"):
        read_optimizer(optimizer(parameter([1.0]), moments="bfloat16"), SingleProcess(), tmp_path)


@pytest.mark.slow
def test_8bit_moments_follow_the_schedule_and_go_on_after_a_checkpoint(tmp_path):
    """Bit for bit; torchao stores what has fewer than 4,096 numbers as it is."""
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    weight = parameter(torch.randn(64, 128).tolist())
    entry = optimizer(weight, moments="8bit", lr=1e-2, lr_schedule="linear", total_steps=4)
    changes = []

    def step(weight, entry, scale):
        backward((weight**2 * scale).sum(), entry)
        entry.step()

    for scale in (1.0, 1.0):
        before = weight.detach().clone()
        step(weight, entry, scale)
        changes.append(float((weight - before).detach().abs().mean()))
    # AdamW's first steps are the learning rate's size
    assert changes == pytest.approx([1e-2, 0.75e-2], rel=0.1)
    assert entry.state_dict()["adamw"]["state"][0]["exp_avg"].codes.dtype == torch.uint8
    write_optimizer(entry.state_dict(), SingleProcess(), tmp_path)
    twin = parameter(weight.tolist())
    resumed = optimizer(twin, moments="8bit", lr=1e-2, lr_schedule="linear", total_steps=4)
    read_optimizer(resumed, SingleProcess(), tmp_path)
    for scale in (3.0, 0.5):
        step(weight, entry, scale)
        step(twin, resumed, scale)
    assert torch.equal(weight, twin)


def test_8bit_moments_of_several_ranks_are_refused(monkeypatch):
    monkeypatch.setattr("learner.moments.DTensor", torch.nn.Parameter)  # a shard stands for itself
    with pytest.raises(ValueError, match=r"learner\.moments=8bit .*cluster\.learner_ranks=1\b"):
        optimizer(parameter([1.0]), moments="8bit")


def test_the_state_of_an_earlier_version_is_read(tmp_path):
    """It did not name its moments, and they were float32."""
    weight, twin = parameter([1.0, -2.0]), parameter([1.0, -2.0])
    entry, resumed = optimizer(weight), optimizer(twin)
    backward((weight**2).sum(), entry)
    entry.step()
    state = entry.state_dict()
    del state["moments"]
    torch.save(state, tmp_path / "optimizer.pt")
    read_optimizer(resumed, SingleProcess(), tmp_path)
    assert torch.equal(resumed.state_dict()["adamw"]["state"][0]["exp_avg"], state["adamw"]["state"][0]["exp_avg"])
    assert resumed.steps_taken == 1


def test_8bit_moments_without_a_library_say_what_to_install(monkeypatch):
    monkeypatch.setattr("learner.moments.LIBRARY", "no_such_library")
    with pytest.raises(ValueError, match=r"learner\.moments=8bit needs torchao"):
        optimizer(parameter([1.0]), moments="8bit")


def test_many_tensors_are_accumulated_and_written_back_as_one_by_one():
    torch.manual_seed(0)
    weights = [parameter(torch.randn(5).tolist(), torch.bfloat16) for _ in range(3)]
    entry = optimizer(*weights, lr=1e-2)
    expected = [torch.zeros(5) for _ in weights]
    for scale in (1.0, 0.37, 2.0):
        for used, (weight, total) in enumerate(zip(weights, expected, strict=True)):
            if scale != 0.37 or used != 1:  # one is left out once
                (weight * torch.arange(5) * scale).sum().backward()
                total += weight.grad.float()
        entry.accumulate()
    assert all(torch.equal(pair.master.grad, total) for pair, total in zip(entry._pairs, expected, strict=True))
    entry.step()
    masters = entry.state_dict()["masters"].values()
    assert all(torch.equal(weight, master.bfloat16()) for weight, master in zip(weights, masters, strict=True))
