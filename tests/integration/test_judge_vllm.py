"""The judge asks a real `vllm serve`, with pictures; what the tiny model says is no mark."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

import numpy as np
import pytest

from rewards.cache import RewardCache
from rewards.rubric import Rubric
from rewards.slow_parts import SlowRewards
from rlmed.core.config.composing import compose_config
from rlmed.data.examples import read_examples
from rlmed.data.images import load_image
from rlmed.export.server import served_name, serving
from tests.integration.processes import marked, new_mark, wait_until
from tests.unit.rewards.groups import group_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.skipif(
        not all(importlib.util.find_spec(name) for name in ("vllm", "openai")), reason="needs vllm and openai"
    ),
]


def test_a_model_that_answers_the_question_itself_gives_no_mark(
    base_copy: Path,
    generated_images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    mark = new_mark()
    for name, value in mark.items():
        monkeypatch.setenv(name, value)
    example = read_examples(generated_images / "test_mri.jsonl").examples[0]
    texts = [f"<think>x</think><answer>{answer}</answer>" for answer in ("A", "B", "")]
    with serving(base_copy, "--max-model-len", "1024") as client:
        settings = (
            "reward=judge",
            f"reward.judge.url={str(client.base_url).rstrip('/')}",
            f"reward.judge.model={served_name(base_copy)}",
            "reward.judge.images=true",
            "reward.judge.retries=0",
            "reward.judge.on_failure=missing",
        )
        config = compose_config("train", settings).reward
        slow = SlowRewards(config.slow, config.judge, RewardCache(tmp_path / "rewards.jsonl"), load_image)
        rubric = Rubric.from_config(config.weights, slow=slow)
        with caplog.at_level(logging.WARNING):
            scored = rubric.score(group_of(texts, example=example))
        rubric.close()
    # its words came back: nothing failed before them; a second such answer is counted alone
    assert caplog.text.count("its reply has no mark between 0 and 10: '<think>") == 1
    np.testing.assert_array_equal(scored.reward_parts["judge"], np.array([np.nan, np.nan, 0.0], np.float32))
    assert scored.rewards.tolist() == scored.reward_parts["format"].tolist()
    assert rubric.metrics()["reward/judge_missing"] == 2.0
    wait_until(lambda: not marked(mark), 30, "the server's processes end")
