"""The request stream is a pure function of seed and index."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from rlmed.core.types import LETTERS, Example, SamplingParams
from rlmed.data.prompts import PromptRenderer, load_processor
from rlmed.stream import PromptStream

EXAMPLES = [
    Example(id=f"q{i}", image=None, question=f"Question {i}?", options=("w", "x", "y", "z"), answer=i % 4)
    for i in range(5)
]


def stream(folder: Path, *, seed: int = 3, shuffle: bool = False) -> PromptStream:
    renderer = PromptRenderer(*load_processor(folder), max_prompt_tokens=512)
    return PromptStream(EXAMPLES, renderer, SamplingParams(max_tokens=9), group_size=4, seed=seed, shuffle=shuffle)


def test_each_epoch_has_every_example_in_another_order(tiny_folder: Callable[..., Path]) -> None:
    requests = [stream(tiny_folder("qwen2")).request(index) for index in range(10)]
    epochs = [[request.prompt.example.id for request in requests[start : start + 5]] for start in (0, 5)]
    assert [sorted(epoch) for epoch in epochs] == [["q0", "q1", "q2", "q3", "q4"]] * 2
    assert epochs[0] != epochs[1]
    assert len({request.sampling.seed for request in requests}) == 10
    assert {(request.group_size, request.sampling.max_tokens) for request in requests} == {(4, 9)}


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
