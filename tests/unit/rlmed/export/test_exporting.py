"""`python -m rlmed.export` of runs on other tasks than multiple choice."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rlmed.data.prompts import PromptRenderer, load_processor
from rlmed.export.command import main
from rlmed.tasks import registry

STAGING = """
from rlmed.tasks.base import Task
class Staging(Task):
    name, template, main, score_names, placeholder = "staging", "{question} A stage.", "near", ("near",), 1
    def read(self, answer, options, size):
        return {"stage": answer}
    def write(self, truth):
        return str(truth["stage"])
    def score(self, answer, truth):
        return {"near": float(answer == str(truth["stage"]))}
"""
ROWS = {
    "staging": {"task": "staging", "question": "Which stage?", "answer": 2},
    "labels": {"task": "labels", "question": "Which findings?", "options": ["cyst", "mass"], "answer": ["cyst"]},
    "choice": {"question": "Which organ?", "options": ["liver", "lung"], "answer": "lung"},
}


@pytest.fixture
def make_run(
    tiny_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[str]]:
    """`make_run("labels")`: arguments that export a run on rows of these tasks."""
    monkeypatch.setattr(registry, "_TASKS", dict(registry._TASKS))
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "exported_staging.py").write_text(STAGING)

    def make(*tasks: str, rows: tuple[str, ...] = ()) -> list[str]:
        run = tmp_path / "run"
        checkpoint = shutil.copytree(tiny_folder("llama"), run / "checkpoints" / "step-000005")
        PromptRenderer(*load_processor(checkpoint), max_prompt_tokens=512).save(checkpoint)
        (run / "config.yaml").write_text("data:\n  extra_tasks: ['exported_staging:Staging']\neval:\n  max_tokens: 8\n")
        entry = {"name": "test", "path": "test.jsonl", "rows": 1, "sha256": "0a", "tasks": list(tasks)}
        (run / "data.json").write_text(json.dumps({"files": [entry, entry]}))
        questions = tmp_path / "test.jsonl"
        questions.write_text("".join(json.dumps(ROWS[name]) + "\n" for name in rows or tasks))
        return [str(run), "--out", str(tmp_path / "mine"), "--check", "2", "--questions", str(questions)]

    return make


@pytest.mark.parametrize("tasks", [("labels",), ("choice", "labels"), ("staging",)])
def test_an_export_of_other_tasks_answers_as_its_checkpoint(
    make_run: Callable[..., list[str]], tmp_path: Path, tasks: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    main(make_run(*tasks))  # the run's own task is found where it can be imported
    assert capsys.readouterr().out.count(f"{len(tasks)} of {len(tasks)} answers are the checkpoint's") == 2
    card = (tmp_path / "mine" / "README.md").read_text()
    assert f"--task {tasks[-1]} " in card
    # of one task, the prompt is in the chat template
    template = (tmp_path / "mine" / "chat_template.jinja").read_text()
    assert ("rlmed" in template) == (len(tasks) == 1)
    assert ("A stage." in template) == ("staging" in tasks)


@pytest.mark.parametrize(
    ("tasks", "rows", "message"),
    [
        (("staging",), ("choice",), "--extra-tasks exported_staging:Staging"),
        (("choice",), ("labels",), "rows of the task labels"),
    ],
)
def test_a_task_that_is_not_known_is_an_error(
    make_run: Callable[..., list[str]],
    tmp_path: Path,
    tasks: tuple[str, ...],
    rows: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = make_run(*tasks, rows=rows)
    (tmp_path / "exported_staging.py").unlink()
    sys.modules.pop("exported_staging", None)
    importlib.invalidate_caches()
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "mine").exists()
