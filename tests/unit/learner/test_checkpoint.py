"""What a learner of one process saves and resumes from; for ranks see numerics/test_fsdp.py."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from safetensors.torch import load_file
from torch.testing._internal.two_tensor import TwoTensor

from learner import checkpoint
from learner.checkpoint import begin_save, read_optimizer, write_optimizer
from learner.distributed import SingleProcess
from learner.optimizer import Optimizer
from rlmed.models.policy import load_policy
from tests.configs import learner_config


def trained(policy, **config):
    """An optimizer that has made two steps, without gradients of vision."""
    optimizer = Optimizer(
        policy.model.named_parameters(), learner_config(**{"lr": 1e-2, "lr_schedule": "constant", **config}), 10
    )
    step(policy, optimizer)
    step(policy, optimizer)
    return optimizer


def step(policy, optimizer):
    for number, (name, parameter) in enumerate(policy.model.named_parameters()):
        if "visual" not in name:
            parameter.grad = torch.full_like(parameter, 0.1 * (number % 7 - 3))
    optimizer.accumulate()
    optimizer.step()


def identical(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(identical(value, other[key]) for key, value in one.items())
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return one == other


@pytest.fixture
def save(tmp_path):
    """`save(policy, optimizer)`: the folder of a checkpoint, of which nothing is left in memory."""

    def run(policy, optimizer):
        begin_save(policy, optimizer, SingleProcess(), tmp_path)()
        return tmp_path

    return run


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("room", [2, 10**9])
def test_a_resumed_learner_goes_on_bit_for_bit(moments, dtype, room, tiny_folder, save, monkeypatch):
    monkeypatch.setattr(checkpoint, "ROOM", room)
    policy = load_policy(tiny_folder("qwen2_vl"), dtype=dtype)
    optimizer = trained(policy, moments=moments)
    folder = save(policy, optimizer)
    twin = load_policy(folder, dtype=dtype)
    resumed = Optimizer(
        twin.model.named_parameters(), learner_config(lr=1e-2, lr_schedule="constant", moments=moments), 10
    )
    read_optimizer(resumed, SingleProcess(), folder)
    assert identical(resumed.state_dict(), optimizer.state_dict())
    assert 0 < len(resumed.state_dict()["adamw"]["state"]) < len(resumed.masters)  # vision has none
    step(policy, optimizer)
    step(twin, resumed)
    assert identical(resumed.state_dict(), optimizer.state_dict())
    assert identical(dict(twin.model.named_parameters()), dict(policy.model.named_parameters()))


def test_the_state_is_that_of_the_moment_of_saving(tiny_folder, tmp_path):
    policy = load_policy(tiny_folder("qwen2_vl"), dtype="bfloat16")
    optimizer = trained(policy)
    weights = {name: value.detach().clone() for name, value in policy.model.named_parameters()}
    state = copy.deepcopy(optimizer.state_dict())
    write = begin_save(policy, optimizer, SingleProcess(), tmp_path)
    step(policy, optimizer)
    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    saved = load_policy(tmp_path, dtype="bfloat16")
    assert identical(dict(saved.model.named_parameters()), weights)
    resumed = Optimizer(saved.model.named_parameters(), learner_config(lr=1e-2, lr_schedule="constant"), 10)
    read_optimizer(resumed, SingleProcess(), tmp_path)
    assert identical(resumed.state_dict(), state)


@pytest.mark.parametrize("free", [None, 0, 10**15])
def test_without_room_for_a_copy_it_is_written_at_once(free, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "available_memory", lambda **_: free)
    policy = load_policy(tiny_folder("qwen2"))
    write = begin_save(policy, trained(policy), SingleProcess(), tmp_path)
    at_once = (tmp_path / "model.safetensors").exists()
    assert at_once == (free != 10**15)
    write()
    assert load_file(tmp_path / "model.safetensors")


def test_a_checkpoint_of_an_earlier_version_is_resumed(tiny_folder, tmp_path):
    """One file, and at first without the count of skipped steps and the moments' dtype."""
    policy = load_policy(tiny_folder("qwen2_vl"), dtype="bfloat16")
    optimizer = trained(policy)
    state = optimizer.state_dict()
    earlier = {key: value for key, value in state.items() if key not in ("moments", "skipped_steps")}
    torch.save(earlier, tmp_path / "optimizer.pt")
    resumed = Optimizer(
        load_policy(tiny_folder("qwen2_vl"), dtype="bfloat16").model.named_parameters(),
        learner_config(lr=1e-2, lr_schedule="constant"),
        10,
    )
    read_optimizer(resumed, SingleProcess(), tmp_path)
    assert identical(resumed.state_dict(), state)


def test_moments_of_a_librarys_own_type_are_resumed(tmp_path):
    """Torch's stand-in for 8-bit moments, which hold codes and scales in one tensor."""

    def make():
        weight = torch.nn.Parameter(torch.ones(3))
        optimizer = Optimizer([("w", weight)], learner_config(lr=1e-2), 10)
        weight.grad = torch.ones(3)
        optimizer.step()
        return optimizer, optimizer._adamw.state[weight]

    optimizer, entry = make()
    entry["exp_avg"] = TwoTensor(torch.arange(3.0), torch.arange(3.0) + 1)
    copied = checkpoint._host_copy(optimizer.state_dict())
    entry["exp_avg"].a.add_(5.0)
    write_optimizer(copied, SingleProcess(), tmp_path)
    resumed, _ = make()
    with torch.serialization.safe_globals([TwoTensor]):
        read_optimizer(resumed, SingleProcess(), tmp_path)
        got = resumed.state_dict()["adamw"]["state"][0]
        assert isinstance(got["exp_avg"], TwoTensor)
        assert (got["exp_avg"].a.tolist(), got["exp_avg"].b.tolist()) == ([0, 1, 2], [1, 2, 3])
        assert torch.equal(got["exp_avg_sq"], copied["adamw"]["state"][0]["exp_avg_sq"])


def test_the_learning_rate_may_be_a_tensor():
    """As in torchao's 8-bit AdamW, which refuses a number."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = Optimizer([("w", weight)], learner_config(lr=1e-2, lr_schedule="linear"), 10)
    rate = optimizer._adamw.param_groups[0]["lr"] = torch.tensor(1.0)
    for expected in (1e-2, 0.9e-2):
        weight.grad = torch.ones(3)
        optimizer.step()
        assert optimizer._adamw.param_groups[0]["lr"] is rate
        assert float(rate) == pytest.approx(expected)


def test_another_selection_of_parameters_is_an_error(tiny_folder, save):
    policy = load_policy(tiny_folder("qwen2_vl"))
    folder = save(policy, trained(policy))
    policy.freeze(["vision"])
    with pytest.raises(ValueError, match=r"other parameters.*learner\.freeze"):
        read_optimizer(trained(policy), SingleProcess(), folder)


def test_a_full_disk_is_an_oserror(tiny_folder, tmp_path):
    policy = load_policy(tiny_folder("qwen2"))
    optimizer = trained(policy)
    (tmp_path / "optimizer").mkdir()
    (tmp_path / "optimizer" / "__0_0.distcp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        write_optimizer(optimizer.state_dict(), SingleProcess(), tmp_path)
