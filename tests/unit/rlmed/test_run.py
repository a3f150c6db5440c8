"""What a run checks before it starts, and after each step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from rlmed.core.config.composing import compose_config
from rlmed.evaluation_run import evaluate_reliability
from rlmed.run import Run
from tests.configs import renderer_of
from tests.unit.rlmed.data.pictures import marked


def run(limit: float | None) -> Run:
    config = SimpleNamespace(rollout=SimpleNamespace(max_mismatch_kl=limit, engine="vllm"))
    return cast(Run, SimpleNamespace(config=config))


@pytest.mark.parametrize("mismatch", [2e-6, float("nan"), float("inf")])
def test_a_mismatch_above_the_limit_ends_the_run_as_a_mistake_that_a_retry_does_not_fix(mismatch: float) -> None:
    with pytest.raises(ValueError, match=r"step 7: mismatch_kl=.* rollout\.max_mismatch_kl=1e-06"):
        Run._check_agreement(run(1e-6), 7, {"mismatch_kl": mismatch})


@pytest.mark.parametrize(
    ("limit", "metrics"), [(1e-6, {"mismatch_kl": 1e-6}), (1e-6, {}), (None, {"mismatch_kl": 1.0})]
)
def test_a_mismatch_within_the_limit_or_without_one_does_not(limit: float | None, metrics: dict[str, float]) -> None:
    Run._check_agreement(run(limit), 7, metrics)


def test_a_failed_run_lets_go_of_workers_before_it_waits_for_loggers() -> None:
    """And of all of them, although the first cannot be closed."""
    order: list[object] = []

    def broken() -> None:
        order.append("rubric")
        raise OSError("disk")

    def train() -> None:
        raise ValueError("of the loop")

    failing = SimpleNamespace(
        _train=train,
        rubric=SimpleNamespace(close=broken),
        cluster=SimpleNamespace(close=lambda: order.append("cluster")),
        recorder=SimpleNamespace(close=lambda failed: order.append(("loggers", failed))),
    )
    with pytest.raises(ValueError, match="of the loop"):
        Run.execute(cast(Run, failing))
    assert order == ["rubric", "cluster", ("loggers", True)]


@pytest.fixture
def mixed(tmp_path: Path, tiny_folder: Callable[..., Path]) -> list[str]:
    """Settings for a choice, an open question and labels, whose images cannot be decoded."""
    rows = [
        {"question": "Which?", "options": ["liver", "spleen"], "answer": "spleen"},
        {"task": "open", "question": "Which?", "answer": "spleen"},
        {"task": "labels", "question": "Which?", "answer": ["cyst"]},
    ]
    marked(size=(56, 56)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    text = "".join(json.dumps({**row, "image": "cut.png"}) + "\n" for row in rows)
    (tmp_path / "mixed.jsonl").write_text(text)
    return ["data=jsonl", f"data.eval=[{tmp_path / 'mixed.jsonl'}]", f"model.path={tiny_folder('qwen2_vl')}"]


def test_a_reward_of_letters_is_refused_for_other_tasks_before_any_image_is_decoded(
    tmp_path: Path, mixed: list[str]
) -> None:
    mixed.append(f"data.train={tmp_path / 'mixed.jsonl'}")
    config = compose_config("train", [*mixed, "reward=format_choice"])
    with pytest.raises(ValueError, match=r"names choice, .*\(1 open, 1 labels\): set reward=task"):
        Run(config, tmp_path / "run")
    for more in ("reward=task", "data.limit=1"):  # these get further, to the images
        with pytest.raises(ValueError, match=r"no row can be used .*cut\.png"):
            Run(compose_config("train", [*mixed, "reward=format_choice", more]), tmp_path / "run")


def test_reliability_refuses_other_tasks_before_any_image_is_decoded(tmp_path: Path, mixed: list[str]) -> None:
    config = compose_config("reliability", mixed)
    with pytest.raises(ValueError, match=r"data\.eval has other tasks \(labels, open\)"):
        evaluate_reliability(config, tmp_path / "run")
    with pytest.raises(ValueError, match=r"no row can be used .*cut\.png"):
        evaluate_reliability(compose_config("reliability", [*mixed, "eval.limit=1"]), tmp_path / "run")


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("opne", "prompt.by_task: task 'opne' is unknown: did you mean open"),
        ("choice", r"prompt\.by_task\.choice is not read: set prompt\.template"),
    ],
)
def test_a_prompt_of_no_other_task_is_refused(mixed: list[str], task: str, said: str) -> None:
    config = compose_config("train", [*mixed, f"+prompt.by_task.{task}='{{question}}'"])
    with pytest.raises(ValueError, match=said):
        renderer_of(config)
