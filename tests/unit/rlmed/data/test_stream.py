"""The request stream depends on seed, index and what was observed, and on nothing else."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from rlmed.core.config.schema import DataConfig
from rlmed.core.types import LETTERS, Example, RolloutGroup, RolloutRequest, SamplingParams, ScoredGroup
from rlmed.data.prompts import PromptRenderer, load_processor
from rlmed.data.stream import PromptStream
from tests.configs import data_config, selection_config

EXAMPLES = [
    Example(id=f"q{i}", image=None, question=f"Question {i}?", options=("w", "x", "y", "z"), answer=i % 4)
    for i in range(5)
]


def stream(folder: Path, data: DataConfig | None = None, *, shuffle: bool = False) -> PromptStream:
    renderer = PromptRenderer(*load_processor(folder), max_prompt_tokens=512)
    data = data or data_config(shuffle_options=shuffle)
    return PromptStream(EXAMPLES, renderer, SamplingParams(max_tokens=9), data, group_size=4, seed=3)


def scored(request: RolloutRequest, choice: list[float]) -> ScoredGroup:
    rewards = np.array(choice, dtype=np.float32)
    return ScoredGroup(RolloutGroup(request, ()), rewards, {"choice": rewards})


def test_each_epoch_has_every_example_in_another_order(tiny_folder: Callable[..., Path]) -> None:
    requests = [stream(tiny_folder("qwen2")).request(index) for index in range(10)]
    epochs = [[request.prompt.example.id for request in requests[start : start + 5]] for start in (0, 5)]
    assert [sorted(epoch) for epoch in epochs] == [["q0", "q1", "q2", "q3", "q4"]] * 2
    assert epochs[0] != epochs[1]
    assert len({request.sampling.seed for request in requests}) == 10
    assert {(request.group_size, request.sampling.max_tokens) for request in requests} == {(4, 9)}


def test_rows_with_a_written_completion_are_shuffled_too(tiny_folder: Callable[..., Path]) -> None:
    written = [dataclasses.replace(example, completion="<answer>A</answer>") for example in EXAMPLES]
    renderer = PromptRenderer(*load_processor(tiny_folder("qwen2")), max_prompt_tokens=512)
    data = data_config(shuffle_options=True)
    asked = PromptStream(written, renderer, SamplingParams(max_tokens=9), data, group_size=4, seed=3)
    plain = stream(tiny_folder("qwen2"), shuffle=True)
    for index in range(10):
        assert asked.request(index).prompt.text == plain.request(index).prompt.text


def test_another_stream_with_the_same_seed_asks_the_same(tiny_folder: Callable[..., Path]) -> None:
    first, second = (stream(tiny_folder("qwen2"), shuffle=True) for _ in range(2))
    for index in (7, 0, 23):
        one, other = first.request(index), second.request(index)
        assert one.prompt.example == other.prompt.example
        assert one.sampling == other.sampling
        np.testing.assert_array_equal(one.prompt.token_ids, other.prompt.token_ids)


def test_shuffling_moves_the_answer_with_its_text(tiny_folder: Callable[..., Path]) -> None:
    shuffled = stream(tiny_folder("qwen2"), shuffle=True)
    letters = set()
    for index in range(40):
        example = shuffled.request(index).prompt.example
        original = EXAMPLES[int(example.id[1:])]
        assert example.options[example.answer] == original.options[original.answer]
        letters.add((example.id, LETTERS[example.answer]))
    assert len(letters) > len(EXAMPLES)


def test_the_order_in_which_groups_finished_does_not_matter(tiny_folder: Callable[..., Path]) -> None:
    """Also where a step holds one example twice: half right is not right."""
    data = data_config(selection=selection_config("pass_rate"))
    streams = [stream(tiny_folder("qwen2"), data) for _ in range(2)]
    for turn, one in enumerate(streams):
        groups = [scored(one.request(index), [1, 1, 1, 1] if index < 5 else [1, 0.5, 1, 1]) for index in range(8)]
        metrics = one.observe(reversed(groups) if turn else groups)
        # all five were right in the first epoch; three of them were not all right when they came
        # again
        assert metrics == {"prompts/set_aside": 0.4, "prompts/too_easy": 0.4, "prompts/too_hard": 0.0}
    asked = [[one.request(index).prompt.example.id for index in range(8, 30)] for one in streams]
    assert asked[0] == asked[1]


def test_a_restored_stream_asks_for_the_same_again(tiny_folder: Callable[..., Path]) -> None:
    data = data_config(selection=selection_config("pass_rate"), shuffle_options=True)
    first, second = (stream(tiny_folder("qwen2"), data) for _ in range(2))
    for index in range(12):
        first.observe([scored(first.request(index), [1, 1, 0, 1] if index % 3 else [0, 0, 0, 0])])
    first.request(13)
    second.restore(json.loads(json.dumps(first.state())))
    for index in range(12, 40):
        assert first.request(index).prompt.example == second.request(index).prompt.example
