"""Scores by models beside those of a task: a tiny encoder, and a module in radeval's place."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from rewards.embedding import Embedder
from rewards.extra import RewardError
from rlmed.core.config.composing import compose_config
from rlmed.core.types import Example
from rlmed.data.loading import EvalFile
from rlmed.evaluation.records import EvalRow
from rlmed.evaluation.report_metrics import report_metrics
from rlmed.evaluation.results import EvalSummary, read_rows
from rlmed.evaluation.score_table import score_table
from rlmed.report.task_scores import show_scores
from tests.rounding import rounding
from tests.unit.rewards.test_embedding import bert  # noqa: F401
from tests.unit.rewards.test_radeval import STAND_IN
from tests.unit.rlmed.evaluation.test_run import ScriptedPool, renderer, run  # noqa: F401
from tests.unit.rlmed.evaluation.test_scores import row

REPORTS = tuple(
    Example(f"r{i}", None, "Report?", task="report", truth={"references": ["a cyst", text]})
    for i, text in enumerate(("a mass", "no finding"))
)
OPEN = Example("o", None, "What?", task="open", truth={"answers": ["a mass"]})
CHOICE = Example("c", None, "Which?", ("a cyst", "a mass"), 1)
CLOSE = rounding(1000)
"""As in tests/unit/rewards/test_embedding.py."""


@pytest.fixture
def radeval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Any]]:
    """Returns the module in radeval's place."""
    (tmp_path / "radeval.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "radeval", raising=False)
    yield lambda: sys.modules["radeval"]
    sys.modules.pop("radeval", None)


def scored(entry: str, *rows: EvalRow) -> list[EvalRow]:
    (metric,) = report_metrics([entry], [EvalFile("f", (*REPORTS, OPEN, CHOICE))])
    return metric.score(rows)


def test_an_evaluation_scores_each_row_and_control_and_shows_it(
    tmp_path: Path,
    bert: Path,  # noqa: F811
    radeval: Callable[[], Any],
    renderer: Any,  # noqa: F811
) -> None:
    reports = []
    for i, example in enumerate(REPORTS):
        Image.new("RGB", (56, 84), (40 + 90 * i,) * 3).save(tmp_path / f"{i}.png")
        reports.append(dataclasses.replace(example, image=tmp_path / f"{i}.png"))
    files = [EvalFile("mri", (*reports, CHOICE)), EvalFile("ct", (OPEN,))]
    metrics = report_metrics(["radeval:radgraph_simple", f"embedding:{bert}"], files)
    pool = ScriptedPool(renderer, lambda *_: "<think>x</think><answer>a mass</answer>")
    summary = run(files, renderer, tmp_path / "evaluations", pool, report_metrics=metrics)
    folder = tmp_path / "evaluations/step-000003"

    rows = read_rows(folder)
    by_place = {(one.file, one.id, one.control): one.scores for one in rows}
    assert [by_place["mri", name, "none"]["radgraph_simple"] for name in ("r0", "r1")] == [1.0, 0.5]
    assert by_place["mri", "r0", "blank"] == by_place["mri", "r0", "none"]
    assert "radgraph_simple" not in by_place["ct", "o", "none"]
    assert by_place["mri", "c", "none"] == {}

    encoder = Embedder(str(bert), batch_size=1, device="cpu")
    vectors = encoder.embed(["a mass", "a cyst", "no finding"])
    nearest = max(float(vectors[0] @ vectors[1]), float(vectors[0] @ vectors[2]), 0.0)
    found = [by_place[key]["embedding"] for key in (("mri", "r0", "none"), ("mri", "r1", "none"), ("ct", "o", "none"))]
    assert found == pytest.approx([1.0, nearest, 1.0], abs=CLOSE)

    task = summary.files[0].tasks[0]
    assert list(task.scores) == ["rouge_l", "bleu", "f1", "radgraph_simple", "embedding"]
    figure = task.scores["radgraph_simple"]
    assert (figure.value, task.controls["shuffled"]["radgraph_simple"].value) == (0.75, 0.75)
    assert figure.low < 0.75 < figure.high
    assert list(summary.files[1].tasks[0].scores)[-1] == "embedding"
    assert EvalSummary.read(folder) == summary
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(score_table(None, summary, None))
    assert "radgraph_simple" in console.export_text()
    shown = show_scores(None, summary, ([], rows), None, None)
    assert shown is not None
    assert {line["name"] for line in shown["lines"]} >= {"radgraph_simple", "embedding"}


def test_a_row_without_an_answer_gets_0_and_asks_nothing(radeval: Callable[[], Any]) -> None:
    rows = [row(REPORTS[0], "a cyst"), dataclasses.replace(row(REPORTS[1], "x"), predicted=None)]
    assert [one.scores["ratescore"] for one in scored("radeval:ratescore", *rows)] == [1.0, 0.0]
    assert radeval().asked == [(["a cyst", "a mass"], ["a cyst", "a cyst"])]


def test_a_row_without_a_score_is_left_out_and_said(
    radeval: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> None:
    found = scored("radeval:ratescore", row(REPORTS[0], "a cyst"), row(REPORTS[1], "odd"))
    assert [one.scores.get("ratescore") for one in found] == [1.0, None]
    assert "radeval:ratescore gives 1 of 2 answers no score" in caplog.text


def test_a_model_that_fails_costs_its_score_and_no_answers(
    radeval: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> None:
    (metric,) = report_metrics(["radeval:chexbert"], [EvalFile("f", REPORTS)])
    metric.model.load()
    radeval().KEYS.pop("f1chexbert")
    rows = [row(REPORTS[0], "a cyst")]
    assert metric.score(rows) == rows
    assert "radeval:chexbert failed: KeyError" in caplog.text


def test_a_model_that_cannot_be_had_ends_an_evaluation_before_its_first_answer(
    tmp_path: Path,
    radeval: Callable[[], Any],
    renderer: Any,  # noqa: F811
) -> None:
    files, pool = [EvalFile("f", REPORTS)], ScriptedPool(renderer)
    with pytest.raises(RewardError, match="green cannot be loaded: OSError: no connection to the hub"):
        run(files, renderer, tmp_path, pool, report_metrics=report_metrics(["radeval:green"], files))
    assert pool.requests == []


def test_what_cannot_be_scored_is_refused_with_its_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [EvalFile("f", (OPEN, CHOICE))]
    with pytest.raises(ValueError, match=r"radeval:green is for the task report, and data\.eval has choice, open:"):
        report_metrics(["radeval:green"], files)
    with pytest.raises(ValueError, match=r"eval\.report_metrics=embedding:/nowhere: no such folder"):
        report_metrics(["embedding:/nowhere"], files)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"eval\.report_metrics=radeval:green needs .*pip install 'radeval"):
        report_metrics(["radeval:green"], [EvalFile("f", REPORTS)])
    assert report_metrics(["embedding:/nowhere"], []) == ()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["meteor:x"], r"eval\.report_metrics='meteor:x'"),
        (["embedding"], r"expected .*embedding:FOLDER"),
        (["radeval:meteor"], r"eval\.report_metrics=radeval.*ratescore"),
        (["embedding:a", "embedding:b"], "embedding twice"),
    ],
)
def test_entries_that_mean_nothing_are_refused(entries: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compose_config("evaluate", ["data=jsonl", f"eval.report_metrics={json.dumps(entries)}"])
