"""The benchmarks measure the same work on every side and add up what they found.

No test asserts a time.
"""

from __future__ import annotations

import json
import platform
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from benchmarks.common import (
    Timing,
    alternate,
    machine_facts,
    make_renderer,
    never_end,
    render_prompts,
    with_visual_tokens,
    write_examples,
    write_result,
)
from benchmarks.learner_memory import compare, make_items, packed_way, padded_way, stretch
from benchmarks.rollout_sides import generate_side, native_side, padded_inputs
from rlmed.models.policy import load_policy
from rlmed.models.tiny.build import build_tiny_vl
from tests.rounding import GRADIENTS, LOGPROBS


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny_vl")
    build_tiny_vl(folder)
    return folder


def test_sides_take_turns_and_warmup_does_not_count():
    calls: list[str] = []
    durations = {"a": iter([9.0, 1.0, 3.0]), "b": iter([9.0, 2.0, 4.0])}

    def side(name: str):
        def run() -> float:
            calls.append(name)
            return next(durations[name])

        return run

    timings = alternate({name: side(name) for name in durations}, rounds=2, warmup=1, settle_s=0.0)
    assert calls == ["a", "b", "a", "b", "a", "b"]
    assert timings == {"a": Timing((1.0, 3.0)), "b": Timing((2.0, 4.0))}


def test_nothing_measured_is_an_error():
    with pytest.raises(ValueError, match="rounds=0"):
        alternate({"a": lambda: 1.0}, rounds=0)


def test_timing_summary_is_minimum_and_median():
    assert Timing((4.0, 1.0, 2.0)).summary() == {"min_s": 1.0, "median_s": 2.0, "runs_s": [4.0, 1.0, 2.0]}


def test_results_name_versions_but_neither_host_nor_paths(tmp_path: Path):
    path = write_result("example", {"ratio": 2.0}, tmp_path / "results")
    text = path.read_text(encoding="utf-8")
    content = json.loads(text)
    assert content["ratio"] == 2.0
    assert content["machine"]["torch"] == metadata.version("torch")
    assert str(Path.home()) not in text
    assert platform.node() not in machine_facts().values()


def test_both_sides_of_the_speed_benchmark_do_the_whole_work(tiny: Path, tmp_path: Path):
    renderer = make_renderer(tiny)
    prompts = render_prompts(renderer, write_examples(tmp_path / "questions", 2))
    model = AutoModelForImageTextToText.from_pretrained(tiny, dtype=torch.float32, attn_implementation="sdpa").eval()
    pad = renderer.tokenizer.pad_token_id
    inputs = padded_inputs(model, prompts, pad)
    for row, prompt in enumerate(prompts):
        kept = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
        assert kept.tolist() == prompt.token_ids.tolist()
    for cache in ("dynamic", "static"):
        assert generate_side(model, prompts, pad, 3, 5, cache)().shape == (6, 5)
    policy = load_policy(tiny)
    run = native_side(policy, prompts, renderer.decode, 3, 5)
    # every token ends its completion
    policy.end_token_ids = frozenset(range(policy.projection.out_features))
    with pytest.raises(RuntimeError, match="made 6 tokens"):
        run()
    never_end(policy)
    run()


def test_stretched_prompts_keep_image_and_ends(tiny: Path, tmp_path: Path):
    prompt = render_prompts(make_renderer(tiny), write_examples(tmp_path / "questions", 1))[0]
    length = len(prompt.token_ids)
    longer = stretch(prompt, length + 30)
    assert len(longer.token_ids) == length + 30
    assert longer.token_ids[: length - 8].tolist() == prompt.token_ids[:-8].tolist()
    assert longer.token_ids[-8:].tolist() == prompt.token_ids[-8:].tolist()
    with pytest.raises(ValueError, match="raise --prompt-lengths"):
        stretch(prompt, length - 1)


def test_a_model_shows_as_many_visual_tokens_as_wanted_and_keeps_its_weights(tiny: Path, tmp_path: Path):
    folder = with_visual_tokens(tiny, 256, tmp_path / "large")
    examples = write_examples(tmp_path / "questions", 1)
    image = load_policy(folder).model.config.image_token_id
    counts = [
        int((render_prompts(make_renderer(path), examples)[0].token_ids == image).sum()) for path in (tiny, folder)
    ]
    assert counts == [16, 256]
    assert (folder / "model.safetensors").read_bytes() == (tiny / "model.safetensors").read_bytes()


def test_all_ways_of_the_memory_benchmark_give_the_same_logprobs_and_gradients(tiny: Path, tmp_path: Path):
    length = len(render_prompts(make_renderer(tiny), write_examples(tmp_path / "questions", 1))[0].token_ids)
    case = {"prompts": 2, "group_size": 3, "prompt_length": length + 40, "max_tokens": 6}
    items = make_items(tiny, case, tmp_path / "questions")
    ways = [packed_way(tiny, items), padded_way(tiny, items, chunked=True), padded_way(tiny, items, chunked=False)]
    logprobs = [compute() for compute, _ in ways]
    assert logprobs[0].shape == (2 * 3 * 6,)
    for other in logprobs[1:]:
        torch.testing.assert_close(other, logprobs[0], atol=LOGPROBS, rtol=0.0)
    expected = dict(ways[0][1].named_parameters())
    for _, model in ways[1:]:
        for name, parameter in model.named_parameters():
            wanted = expected[name].grad
            close = GRADIENTS * float(wanted.abs().max())
            torch.testing.assert_close(parameter.grad, wanted, atol=close, rtol=0, msg=name)


def test_disagreement_stops_the_memory_benchmark():
    ways = ("packed", "padded_chunked", "padded_full")
    found = {way: {"logprobs": np.zeros(3), "norm": 1.0, "peak": 2**20, "seconds": np.ones(1)} for way in ways}
    assert compare({}, found)["memory_ratio_padded_full"] == 1.0
    found["padded_full"]["logprobs"] = np.array([0.0, 0.0, 1e-3])
    with pytest.raises(SystemExit, match="padded_full and packed differ"):
        compare({}, found)
