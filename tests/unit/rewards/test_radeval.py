"""Scores of reports by radeval: what it is asked, and what becomes of its results.

A module with the signature of radeval 2.2 stands in for it: its models come from a hub.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from rewards.cache import RewardCache
from rewards.extra import RewardError
from rewards.radeval import METRICS
from rewards.rubric import Rubric
from rewards.slow_parts import SlowRewards
from rlmed.core.config.composing import compose_config
from rlmed.core.config.rewarding import RADEVAL_METRICS
from rlmed.core.types import Example
from tests.unit.rewards.groups import group_of

REPORT = Example(id="r-1", image=None, question="Report?", task="report", truth={"references": ["a cyst", "a mass"]})
STAND_IN = """
asked = []
KEYS = {"radgraph": ("radgraph_simple", "radgraph_partial", "radgraph_complete"), "green": ("green",)}
KEYS |= {"f1chexbert": ("f1chexbert_sample_acc_5", "f1chexbert_sample_acc_all"), "ratescore": ("ratescore",)}

class RadEval:
    def __init__(self, metrics=None, openai_api_key=None, gemini_api_key=None, per_sample=False, detailed=False,
                 show_progress=True, cache_dir=None):
        assert per_sample and not show_progress
        if metrics == ["green"]:
            raise OSError("no connection\\nto the hub")
        (self.metric,) = metrics

    def __call__(self, refs, hyps):
        assert isinstance(refs, list) and isinstance(hyps, list)
        asked.append((refs, hyps))
        words = [len({*ref.split()} & {*hyp.split()}) / 2 if hyp != "odd" else float("nan")
                 for ref, hyp in zip(refs, hyps, strict=True)]
        return {key: [value / (i + 1) for value in words] for i, key in enumerate(KEYS[self.metric])}
"""


@pytest.fixture
def make_rubric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Rubric]]:
    (tmp_path / "radeval.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "radeval", raising=False)
    rubrics = []

    def make(metric: str, *settings: str) -> Rubric:
        config = compose_config(
            "train", ["reward=radeval", f"reward.radeval.metric={metric}", "reward.slow.wait_s=0.001", *settings]
        ).reward
        slow = SlowRewards(config.slow, config.judge, RewardCache(None), scored_by=config.radeval)
        rubrics.append(Rubric.from_config(config.weights, slow=slow))
        return rubrics[-1]

    yield make
    for rubric in rubrics:
        rubric.close()
    sys.modules.pop("radeval", None)


def answers(*texts: str) -> list[str]:
    return [f"<think>x</think><answer>{text}</answer>" for text in texts]


def test_each_report_has_the_score_of_its_best_reference(make_rubric: Callable[..., Rubric]) -> None:
    rubric = make_rubric("radgraph_simple", "reward.radeval.batch_size=2")
    scored = rubric.score(group_of([*answers("a mass", "the cyst", "nothing"), "no tags"], example=REPORT))
    assert scored.reward_parts["radeval"].tolist() == [1.0, 0.5, 0.0, 0.0]
    pairs = [("a cyst", "a mass"), ("a mass", "a mass"), ("a cyst", "the cyst"), ("a mass", "the cyst")]
    asked = sys.modules["radeval"].asked
    assert [list(zip(*call, strict=True)) for call in asked] == [pairs, [("a cyst", "nothing"), ("a mass", "nothing")]]


@pytest.mark.parametrize(
    ("metric", "expected"), [("radgraph", 1 / 2), ("chexbert", 1 / 2), ("chexbert_5", 1.0), ("ratescore", 1.0)]
)
def test_each_metric_is_read_by_its_key(metric: str, expected: float, make_rubric: Callable[..., Rubric]) -> None:
    scored = make_rubric(metric).score(group_of(answers("a cyst"), example=REPORT))
    assert scored.reward_parts["radeval"].tolist() == [expected]


def test_a_report_without_a_score_is_missing_and_never_zero(make_rubric: Callable[..., Rubric]) -> None:
    rubric = make_rubric("ratescore", "reward.radeval.on_failure=missing", "reward.radeval.batch_size=1")
    scored = rubric.score(group_of(answers("a cyst", "odd"), example=REPORT))
    np.testing.assert_array_equal(scored.reward_parts["radeval"], np.array([1.0, math.nan], np.float32))
    with pytest.raises(RewardError, match="ratescore is nan for 'odd'"):
        make_rubric("ratescore").score(group_of(answers("odd"), example=REPORT))


def test_models_that_cannot_be_had_stop_the_run_at_once(make_rubric: Callable[..., Rubric]) -> None:
    rubric = make_rubric("green", "reward.radeval.on_failure=missing")
    with pytest.raises(RewardError, match="green cannot be loaded: OSError: no connection to the hub"):
        rubric.score(group_of(answers("a cyst"), example=REPORT))


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = compose_config("train", ["reward=radeval", "reward.radeval.metric=green"]).reward
    slow = SlowRewards(config.slow, config.judge, scored_by=config.radeval)
    with pytest.raises(ValueError, match="pip install 'radeval"):
        Rubric.from_config(config.weights, slow=slow)


def test_the_settings_know_each_metric() -> None:
    assert tuple(METRICS) == RADEVAL_METRICS
    with pytest.raises(ValueError, match=r"reward\.radeval\.metric"):
        compose_config("train", ["reward=radeval", "reward.radeval.metric=meteor"])
