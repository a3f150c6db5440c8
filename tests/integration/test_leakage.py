"""Training pictures among the evaluated ones: reported, refused, or not looked for."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from rlmed import evaluate
from rlmed.core.config.composing import compose_config
from rlmed.data.leakage.findings import LeakageReport
from tests.unit.rlmed.data.pictures import picture, save


@pytest.fixture
def settings(random_model: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Overrides of an evaluation of six rows, the first over a re-encoded training picture."""

    def rows(name: str, seeds: range, kind: str) -> Path:
        lines = []
        for seed in seeds:
            image = save(tmp_path, f"{name}{chr(97 + seed)}.{kind}", picture(seed, 84, 56))
            row = {"id": f"{name}-{seed}", "image": image.name, "question": "Which?", "options": ["a", "b", "c"]}
            lines.append(json.dumps({**row, "answer": "b"}) + "\n")
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(lines))
        return path

    train, test = rows("train", range(6), "png"), rows("test", range(5, 11), "jpg")

    def make(*overrides: str) -> list[str]:
        data = ["data=jsonl", f"data.train={train}", f"data.eval=[{test}]", f"model.path={random_model}"]
        return [*data, "eval.max_tokens=6", "eval.controls=false", "cluster.threads=1", *overrides]

    return make


def test_a_leak_is_logged_and_written_down(
    settings: Callable[..., list[str]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with caplog.at_level(logging.WARNING):
        evaluate.main(compose_config("evaluate", settings()), folder)
    assert re.search(r"\b1 of 6 .*\btest\b.*, 1 .*\btest-5\b.*\btrain-5\b", caplog.text)
    content = json.loads((folder / "data.json").read_text())
    report = LeakageReport.from_json(content["leakage"])
    assert report.leaking_ids("test") == {"test-5"}
    assert report.leaks[0].train_ids == ("train-5",)
    page = (folder / "report.html").read_text()
    assert "Evaluated rows that also occur in the training data: 1, see" in page
    assert "without the<br>leaking rows" in page
    assert "near duplicate" in page
    assert "test: test-5" in page
    assert "training: train-5" in page


def test_strict_stops_before_anything_is_answered(settings: Callable[..., list[str]], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.leakage=strict: 1 of 6 .*test-5.*train-5"):
        evaluate.main(compose_config("evaluate", settings("data.leakage=strict")), tmp_path)
    assert not (tmp_path / "evaluations").exists()


def test_strict_without_training_rows_is_refused(settings: Callable[..., list[str]], tmp_path: Path) -> None:
    """Nothing would be compared, and nothing said of it."""
    with pytest.raises(ValueError, match=r"data\.leakage=strict .*data\.train"):
        evaluate.main(compose_config("evaluate", settings("data.leakage=strict", "data.train=null")), tmp_path)
    assert not (tmp_path / "evaluations").exists()


def test_off_does_not_look(
    settings: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    evaluate.main(compose_config("evaluate", settings("data.leakage=off")), folder)
    assert "leakage" not in json.loads((folder / "data.json").read_text())
    assert "training data too" not in caplog.text
    assert "training data too" not in (folder / "report.html").read_text()


def test_another_word_is_refused(settings: Callable[..., list[str]]) -> None:
    with pytest.raises(ValueError, match=r"data\.leakage='?maybe"):
        compose_config("evaluate", settings("data.leakage=maybe"))
