"""Which checkpoint of a run is exported, and what is known of its base."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rlmed.evaluation.records import Accuracy
from rlmed.evaluation.results import EvalSummary, FileSummary, write_evaluation
from rlmed.export.source import earlier_models, evaluated_files, find_source, licence_of, public_name


def evaluated(run: Path, step: int, correct: int) -> None:
    file = FileSummary(
        name="ct",
        rows=10,
        accuracy=Accuracy.of(correct, 10),
        format_rate=1.0,
        mean_tokens=9.0,
        cut_by_length=0.0,
        chance=0.25,
        majority_letter=0.3,
        image_free_prior=0.3,
        image_free_prior_by_rate=0.3,
        leave_one_out_prior=0.3,
        leave_one_out_prior_by_rate=0.3,
        blank=None,
        shuffled=None,
        by_question_type={},
    )
    write_evaluation(run / "evaluations", EvalSummary("x", step, 1.0, 64, 0, (file,)), [])


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """`make_run("sft", "models/base", 5, 10)`: a run's folder with its checkpoints' names."""

    def make(name: str, model: str, *steps: int) -> Path:
        run = tmp_path / "outputs" / name / "now"
        for step in steps:
            folder = run / "checkpoints" / f"step-{step:06d}"
            folder.mkdir(parents=True)
            (folder / "config.json").write_text("{}")
        (run / "config.yaml").write_text(f"model:\n  path: {model}\ndata:\n  train: t.jsonl\n")
        return run

    return make


def test_the_last_a_numbered_and_the_best_checkpoint(make_run: Callable[..., Path]) -> None:
    run = make_run("rl", "models/base", 5, 10, 15, 20)
    for step, correct in ((0, 9), (5, 6), (10, 8), (15, 8)):
        evaluated(run, step, correct)
    chosen = {wanted: find_source(run, wanted) for wanted in (None, "last", "best", "5")}
    assert {wanted: source.step for wanted, source in chosen.items()} == {None: 20, "last": 20, "best": 15, "5": 5}
    assert [source.best_of for source in chosen.values()] == [0, 0, 3, 0]
    assert [path.name for path in chosen["best"].evaluations] == ["step-000000", "step-000015"]
    assert [path.name for path in chosen["last"].evaluations] == ["step-000000"]
    assert find_source(run / "checkpoints" / "step-000010", None).run == run


@pytest.mark.parametrize(
    ("wanted", "message"),
    [("7", "--checkpoint 7: .*step 5, 10"), ("newest", "--checkpoint newest"), ("best", "--checkpoint best: no step")],
)
def test_a_checkpoint_that_is_not_there(make_run: Callable[..., Path], wanted: str, message: str) -> None:
    run = make_run("rl", "models/base", 5, 10)
    evaluated(run, 0, 9)
    with pytest.raises(ValueError, match=message):
        find_source(run, wanted)


def test_what_is_no_run_and_no_model_is_refused(tmp_path: Path, base_copy: Path) -> None:
    with pytest.raises(ValueError, match="holds neither"):
        find_source(tmp_path, None)
    with pytest.raises(ValueError, match="does not exist"):
        find_source(tmp_path / "absent", None)
    with pytest.raises(ValueError, match="--checkpoint last"):
        find_source(base_copy, "last")
    assert find_source(base_copy, None).step is None


def test_a_chain_of_runs_leads_to_the_base(make_run: Callable[..., Path], tmp_path: Path) -> None:
    base = tmp_path / "models" / "Base-2B"
    base.mkdir(parents=True)
    (base / "README.md").write_text("---\nlicense: mit\ntags: [a]\n---\n# Base\n")
    first = make_run("sft", str(base), 5)
    second = make_run("rl", str(first / "checkpoints" / "step-000005"), 10)
    models = earlier_models(find_source(second, None))
    assert [public_name(model) for model in models] == ["step-000005", "Base-2B"]
    assert licence_of(models[-1]) == "mit"
    assert licence_of(models[0]) is None
    (base / "README.md").write_text("---\nlicense: [a, b\n---\n")
    assert licence_of(str(base)) is None


def test_a_relative_base_is_found_from_the_runs_folder(
    make_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, run = tmp_path / "models" / "Base-2B", make_run("rl", "models/Base-2B", 5)
    base.mkdir(parents=True)
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (model,) = earlier_models(find_source(run, None))
    assert (public_name(model), licence_of(model)) == ("Base-2B", "mit")
    # no part of a path that leads nowhere passes for an owner on the hub
    (lost,) = earlier_models(find_source(make_run("lost", "models/gone", 5), None))
    assert (public_name(lost), licence_of(lost)) == ("gone", None)


def test_the_rows_of_training_are_no_evaluation(make_run: Callable[..., Path]) -> None:
    run = make_run("rl", "models/base", 5)
    (run / "data.json").write_text(json.dumps({"files": [{"name": "train", "path": "train.jsonl"}]}))
    source = find_source(run, None)
    assert [file["name"] for file in source.trained_on] == ["train"]
    assert list(evaluated_files(source)) == []


def test_evaluation_files_are_found_from_another_folder(
    make_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run("rl", "models/base", 5)
    entries = [{"name": name, "path": f"data/{name}.jsonl"} for name in ("train", "test")]
    (run / "data.json").write_text(json.dumps({"files": entries}))
    (tmp_path / "data").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"data/test\.jsonl.*--questions"):
        list(evaluated_files(find_source(run, None)))
    (tmp_path / "data" / "test.jsonl").write_text("")
    assert list(evaluated_files(find_source(run, None))) == [tmp_path / "data" / "test.jsonl"]


def test_the_tasks_of_a_run_are_those_of_its_rows(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run("rl", "models/base", 5)
    names = ("train", "test", "gone")
    entries: list[dict[str, object]] = [{"name": name, "path": f"data/{name}.jsonl"} for name in names]
    entries[0]["tasks"] = ["open"]
    (run / "data.json").write_text(json.dumps({"files": entries}))
    assert find_source(run, None).tasks == ("choice", "open")  # without a record, a run had no other
    (tmp_path / "data").mkdir()
    lines = ['\ufeff{"task": "grounding"}', '{"task": null}', "no row", "[]", ""]
    (tmp_path / "data" / "test.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert find_source(run, None).tasks == ("choice", "grounding", "open")
    (run / "data.json").unlink()
    assert find_source(run, None).tasks == ()
