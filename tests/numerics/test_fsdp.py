"""Two learner ranks (FSDP2 over gloo) against one: weights, metrics, skipped steps, checkpoints."""

from __future__ import annotations

import dataclasses
import importlib
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from learner.packing import PackItem, TrainSequence
from learner.sharing import share_by_tokens
from rlmed.core.types import ScoredGroup, TrainGroup
from tests.integration.same_training import stored_weights
from tests.rounding import GRADIENTS, LOGPROBS, updates_apart

# the other processes are given the path and find the module by its name
sys.path.insert(0, str(Path(__file__).parent))
fsdp_rank = importlib.import_module("fsdp_rank")
Job, Processes = fsdp_rank.Job, fsdp_rank.Processes

RANKS = 2
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks():
    processes = Processes(RANKS)
    yield processes
    processes.close()


@pytest.fixture
def new_folder(tmp_path):
    """`new_folder("a")`: an empty folder."""

    def make(name):
        (tmp_path / name).mkdir()
        return tmp_path / name

    return make


def worst_difference(actual, expected):
    """Largest difference of two sets of weights, and where it is."""
    assert list(actual) == list(expected)
    return max((float((actual[name] - value).abs().max()), name) for name, value in expected.items())


def worst_moment(actual, expected):
    """Largest difference of the first moments relative to the largest of their parameter."""
    states = [result.state["adamw"]["state"] for result in (actual, expected)]
    assert states[0].keys() == states[1].keys()
    return max(
        float((states[0][number]["exp_avg"] - entry["exp_avg"]).abs().max() / entry["exp_avg"].abs().max())
        for number, entry in states[1].items()
    )


def tolerance(job, result):
    """How far apart rounding may bring a weight; see `fsdp_rank.do` for the optimizer."""
    return updates_apart(job.config.get("lr", fsdp_rank.LR), result.version)


def assert_same_metrics(actual, expected, first_step=1, rel=GRADIENTS):
    """Each step adds its own rounding.

    Penalties are quadratic: of a distance below 0.1 and what it is off by.
    """
    for step, (numbers, others) in enumerate(zip(actual, expected, strict=True), first_step):
        assert numbers == pytest.approx(others, rel=step * rel, abs=step * 0.1 * LOGPROBS, nan_ok=True)


def agree(ranks, job, rel=GRADIENTS):
    """The results of all ranks, checked against one rank's."""
    results, expected = ranks.do(job), fsdp_rank.do(job)
    first, *others = results
    # bit for bit the same numbers on all ranks; NaN equals itself in text only
    assert all(str(result.metrics) == str(first.metrics) for result in others)
    assert_same_metrics(first.metrics, expected.metrics, rel=rel)
    worst, name = worst_difference(first.weights, expected.weights)
    assert worst <= tolerance(job, expected), name
    assert not any(result.weights for result in others)
    for result in results:
        assert (result.version, result.names) == (expected.version, expected.names)
        assert len(result.reports) == len(expected.reports)
    return results, expected


def assert_moved(job, result):
    """Training has changed the weights by far more than what is tolerated."""
    start = fsdp_rank.do(Job(job.base, [])).weights
    assert worst_difference(result.weights, start)[0] > 20 * tolerance(job, result)


def cut(groups, *shapes):
    """Groups (number, completions) with their first completions only."""
    result = []
    for number, size in shapes:
        group = groups[number]
        rollout = dataclasses.replace(group.rollout, completions=group.rollout.completions[:size])
        advantages = group.advantages[:size]
        result.append(TrainGroup(ScoredGroup(rollout, advantages, {}), advantages))
    return result


def spoiled(groups):
    """The groups with a NaN in the rollout log-probabilities of one completion."""
    first, *others = groups[0].rollout.completions
    first = dataclasses.replace(first, rollout_logprobs=np.full_like(first.rollout_logprobs, math.nan))
    rollout = dataclasses.replace(groups[0].rollout, completions=(first, *others))
    return [dataclasses.replace(groups[0], scored=dataclasses.replace(groups[0].scored, rollout=rollout)), *groups[1:]]


@pytest.mark.parametrize(
    ("steps", "config"),
    [(3, {}), (2, {"gradient_checkpointing": True, "epochs": 2}), (2, {"freeze": ("vision",), "weight_decay": 0.1})],
    ids=["all", "checkpointing", "frozen vision"],
)
def test_several_steps_are_those_of_one_rank(ranks, steps, config, tiny_folder, make_train_groups):
    """Images in some prompts only, a reference, several micro-batches and updates a step."""
    batches = [make_train_groups("qwen2_vl", 4, seed=seed) for seed in range(steps)]
    job = Job(tiny_folder("qwen2_vl"), batches, config={"token_budget": 90, "mini_batches": 2} | config)
    _, expected = agree(ranks, job)
    assert_moved(job, expected)


@pytest.mark.parametrize(
    ("family", "loss"),
    [
        ("llama", {"kl_coef": 0.0, "aggregation": "token_mean", "old_logprobs": "rollout", "importance_cap": 2.0}),
        ("qwen2_5_vl", {"clip": "dual", "aggregation": "sequence_sum", "ratio_level": "sequence"}),
        ("gemma3", {"kl_coef": 0.0}),
        ("smolvlm", {"kl_coef": 0.0}),
    ],
)
def test_other_families_and_settings(ranks, family, loss, tiny_folder, make_train_groups):
    batches = [make_train_groups(family, 3, seed=seed) for seed in range(2)]
    agree(ranks, Job(tiny_folder(family), batches, loss=loss, config={"token_budget": 150}))


@pytest.mark.parametrize("freeze", [(), ("language_model",), ("vision", "merger")], ids=str)
def test_images_on_one_rank_only(ranks, freeze, tiny_folder, make_train_groups, record_property):
    """First on one rank, then none (the vision tower's momentum must rest), then one again."""
    groups = make_train_groups("qwen2_vl", 2)
    one, none = cut(groups, (2, 2), (1, 2)), cut(groups, (1, 2), (3, 2))
    items = [
        PackItem(group.rollout.prompt, tuple(TrainSequence(entry, 1.0) for entry in group.rollout.completions))
        for group in one
    ]
    shares = share_by_tokens(items, RANKS)
    assert [any(bool(item.prompt.image_inputs) for item in share) for share in shares] in ([True, False], [False, True])
    job = Job(tiny_folder("qwen2_vl"), [one], loss={"kl_coef": 0.0}, config={"freeze": freeze})
    results, expected = agree(ranks, job)
    gradient = worst_moment(results[0], expected)
    record_property("gradient", gradient)
    assert gradient <= GRADIENTS
    _, expected = agree(ranks, dataclasses.replace(job, batches=[one, none, one]))
    assert_moved(job, expected)


@pytest.mark.parametrize("freeze", [(), ("language_model",)], ids=str)
def test_a_rank_without_any_completion(ranks, freeze, tiny_folder, make_train_groups):
    """It has no image either, and still takes part: in the vision tower's gradient, too."""
    groups = make_train_groups("qwen2_vl", 2)
    job = Job(tiny_folder("qwen2_vl"), [cut(groups, (0, 1)), cut(groups, (2, 1))], config={"freeze": freeze})
    _, expected = agree(ranks, job)
    assert_moved(job, expected)
    agree(ranks, dataclasses.replace(job, batches=[cut(groups, (1, 1))], config={}))


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_broken_number_on_one_rank_skips_the_step_on_all(ranks, broken, tiny_folder, make_train_groups):
    groups = cut(make_train_groups("qwen2", 2), (1, 2), (2, 2))
    first = spoiled(groups) if broken == "loss" else groups
    job = Job(tiny_folder("qwen2"), [first], loss={"kl_coef": 0.0}, spoil=0 if broken == "gradient" else None)
    results = ranks.do(job)
    assert [(result.version, len(result.reports)) for result in results] == [(0, 1)] * RANKS
    assert all(result.metrics[0]["skipped_steps"] == 1 for result in results)
    start = fsdp_rank.do(Job(job.base, [])).weights
    assert all(torch.equal(results[0].weights[name], value) for name, value in start.items())
    # and nothing is left behind that could reach the next step
    results, _ = agree(ranks, dataclasses.replace(job, batches=[first, groups]))
    assert [result.version for result in results] == [1] * RANKS


@pytest.mark.parametrize(
    ("dtype", "moments", "room"),
    [("float32", "float32", True), ("bfloat16", "float32", False), ("bfloat16", "bfloat16", True)],
)
def test_a_checkpoint_fits_any_number_of_ranks(dtype, moments, room, ranks, new_folder, tiny_folder, make_train_groups):
    """Two ranks, one, two again: bit for bit, and the same steps as one rank without a break."""
    batches = [make_train_groups("qwen2_vl", 2, seed=seed) for seed in range(3)]
    settings = {"lr": 1e-4, "lr_schedule": "cosine", "weight_decay": 0.01, "token_budget": 150, "moments": moments}
    whole = Job(tiny_folder("qwen2_vl"), batches, dtype=dtype, config=settings, save=new_folder("whole"), room=room)
    uninterrupted = fsdp_rank.do(whole)

    two = ranks.do(dataclasses.replace(whole, batches=batches[:1], save=new_folder("two")))[0]
    loaded = fsdp_rank.do(dataclasses.replace(whole, batches=[], start=whole.save.parent / "two", save=None))
    assert_identical(loaded, two)
    one = dataclasses.replace(whole, batches=batches[1:2], start=whole.save.parent / "two", save=new_folder("one"))
    one = fsdp_rank.do(one)
    loaded = ranks.do(dataclasses.replace(whole, batches=[], start=whole.save.parent / "one", save=None))
    assert_identical(loaded[0], one)
    assert [result.version for result in loaded] == [2] * RANKS
    last = dataclasses.replace(whole, batches=batches[2:], start=whole.save.parent / "one", save=new_folder("last"))
    last = ranks.do(last)[0]

    assert last.version == 3
    if dtype == "float32":
        assert worst_difference(last.weights, uninterrupted.weights)[0] <= tolerance(whole, uninterrupted)
        assert_same_metrics(last.metrics, uninterrupted.metrics[2:], first_step=3)
    saved = [stored_weights(whole.save.parent / name) for name in ("last", "whole")]
    assert saved[0].keys() == saved[1].keys()
    assert all(saved[0][name].dtype == value.dtype for name, value in saved[1].items())
    assert described(last.state) == described(uninterrupted.state)


def test_what_is_learnt_while_a_checkpoint_is_written_is_not_in_it(ranks, new_folder, tiny_folder, make_train_groups):
    """The write's own collectives do not disturb those of the steps either."""
    batches = [make_train_groups("qwen2", 2, seed=seed) for seed in range(3)]
    plain = Job(tiny_folder("qwen2"), batches[:1], loss={"kl_coef": 0.0}, save=new_folder("plain"))
    expected = ranks.do(plain)[0]
    busy = ranks.do(dataclasses.replace(plain, save=new_folder("busy"), after=batches[1:]))[0]
    assert busy.version == 3
    loaded = ranks.do(dataclasses.replace(plain, batches=[], start=plain.save.parent / "busy", save=None))[0]
    assert_identical(loaded, expected)
    through = ranks.do(dataclasses.replace(plain, batches=batches, save=None))[0]
    assert_identical(busy, through)


LORA = {"rank": 4, "target": ("vision", "language_model"), "dropout": 0.0}


@pytest.mark.parametrize("target", [("language_model",), ("vision", "merger", "language_model")], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_are_those_of_one_rank(target, checkpointing, ranks, tiny_folder, make_train_groups):
    """Their reference is the sharded policy itself; the first pass over it is without adapters."""
    pytest.importorskip("peft", reason="needs the extra lora")
    batches = [make_train_groups("qwen2_vl", 4, seed=seed) for seed in range(3)]
    config = {"token_budget": 90, "mini_batches": 2, "lr": 1e-2, "gradient_checkpointing": checkpointing}
    job = Job(tiny_folder("qwen2_vl"), batches, config=config, lora=LORA | {"target": target})
    results, expected = agree(ranks, job)
    assert worst_moment(results[0], expected) <= 10 * GRADIENTS
    start = fsdp_rank.do(Job(job.base, [])).weights
    assert list(start) == list(expected.weights)
    assert worst_difference(expected.weights, start)[0] > 20 * tolerance(job, expected)
    names = [name for name in expected.names if "lora_" in name]
    assert len(expected.state["adamw"]["state"]) == len(names) > 0
    assert expected.metrics[-1]["kl"] > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_of_adapters_fits_any_number_of_ranks(dtype, ranks, new_folder, tiny_folder, make_train_groups):
    pytest.importorskip("peft", reason="needs the extra lora")
    batches = [make_train_groups("qwen2_vl", 2, seed=seed) for seed in range(2)]
    job = Job(tiny_folder("qwen2_vl"), batches[:1], dtype=dtype, lora=LORA, save=new_folder("two"))
    two = ranks.do(job)[0]
    folder = job.save
    assert sorted(path.name for path in folder.glob("*.safetensors")) == ["adapter_model.safetensors"]
    after = dataclasses.replace(job, batches=[], start=folder, save=None)
    assert_identical(fsdp_rank.do(after), two)
    assert_identical(ranks.do(after)[0], two)
    through = ranks.do(dataclasses.replace(job, batches=batches, save=None))[0]
    resumed = ranks.do(dataclasses.replace(after, batches=batches[1:]))[0]
    assert_identical(resumed, through)


def test_a_rank_writes_its_share_alone(ranks, new_folder, tiny_folder, make_train_groups):
    job = Job(tiny_folder("qwen2_vl"), [make_train_groups("qwen2_vl", 2)], dtype="bfloat16", save=new_folder("saved"))
    ranks.do(job)
    weights = [path.stat().st_size for path in sorted(job.save.glob("model-*.safetensors"))]
    shards = [path.stat().st_size for path in sorted((job.save / "optimizer").glob("*.distcp"))]
    for sizes in (weights, shards):
        assert len(sizes) == RANKS
        assert max(sizes) < 1.2 * min(sizes)
    assert not (job.save / "model.safetensors").exists()
    assert not (job.save / "optimizer.pt").exists()


@pytest.mark.parametrize(
    ("full", "told"), [("optimizer/__1_0.distcp", [0, 1]), ("model-00002-of-00002.safetensors", [1])]
)
@pytest.mark.parametrize("room", [True, False])
def test_a_rank_whose_disk_is_full_says_so_and_lets_no_other_wait(
    full, told, room, ranks, new_folder, tiny_folder, make_train_groups
):
    job = Job(tiny_folder("qwen2"), [make_train_groups("qwen2", 2)], loss={"kl_coef": 0.0}, room=room)
    job.save = new_folder("saved")
    (job.save / "optimizer").mkdir()
    (job.save / full).symlink_to("/dev/full")
    reports = [result.reports for result in ranks.do(job)]
    assert [rank for rank, said in enumerate(reports) if said] == told
    assert all("No space left on device" in said[0] for said in reports if said)
    # a rank whose weights are written adds nothing to a folder that is about to be removed
    written = sorted(path.name for path in (job.save / "optimizer").iterdir())
    assert written == [] or told == [0, 1]


def test_a_first_rank_that_cannot_write_settings_says_so_and_lets_no_other_wait(
    ranks, new_folder, tiny_folder, make_train_groups
):
    job = Job(tiny_folder("qwen2"), [make_train_groups("qwen2", 2)], loss={"kl_coef": 0.0}, save=new_folder("saved"))
    (job.save / "config.json").mkdir()
    reports = [result.reports for result in ranks.do(job)]
    assert [len(said) for said in reports] == [1, 0]
    assert "Is a directory" in reports[0][0]
    assert [path.name for path in job.save.iterdir()] == ["config.json"]


def assert_identical(actual, expected):
    """Weights and optimizer state, bit for bit."""
    assert list(actual.weights) == list(expected.weights)
    assert all(torch.equal(actual.weights[name], value) for name, value in expected.weights.items())
    assert described(actual.state) == described(expected.state)
    pairs = zip(tensors(actual.state), tensors(expected.state), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def described(state):
    """A nest with each tensor replaced by its kind, without what each step sets anew."""
    if isinstance(state, dict):
        return {key: described(value) for key, value in state.items() if key != "param_groups"}
    if isinstance(state, torch.Tensor):
        return state.dtype, state.shape, type(state), state.device
    return state


def tensors(state):
    if isinstance(state, dict):
        return [tensor for key in sorted(state, key=str) for tensor in tensors(state[key])]
    return [state] if isinstance(state, torch.Tensor) else []


def test_bfloat16_ranks_keep_float32_masters(ranks, tiny_folder, make_train_groups):
    batches = [make_train_groups("qwen2_vl", 4, seed=seed) for seed in range(2)]
    job = Job(tiny_folder("qwen2_vl"), batches, dtype="bfloat16", config={"token_budget": 90})
    result, expected = ranks.do(job)[0], fsdp_rank.do(job)
    # a value is rounded to 8 bits some 50 times on its way, to either side: √50 · 2^-8
    assert result.metrics[0]["grad_norm"] == pytest.approx(expected.metrics[0]["grad_norm"], rel=50**0.5 * 2**-8)
    masters = result.state["masters"]
    assert masters.keys() == result.weights.keys()
    assert {master.dtype for master in masters.values()} == {torch.float32}
    assert all(torch.equal(result.weights[name], master.bfloat16()) for name, master in masters.items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_ranks_on_gpus(tiny_folder, make_train_groups):
    """NCCL, a rank a GPU, against one rank on the first."""
    batches = [make_train_groups("qwen2_vl", 4, seed=seed) for seed in range(2)]
    job = Job(tiny_folder("qwen2_vl"), batches, device="cuda:0", config={"token_budget": 90})
    processes = Processes(torch.cuda.device_count(), "cuda")
    try:
        agree(processes, job, rel=10 * GRADIENTS)  # a GPU adds in an order of its own each time
    finally:
        processes.close()
