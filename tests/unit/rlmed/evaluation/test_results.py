"""Lines of rows.jsonl."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from rlmed.evaluation.records import EvalRow
from rlmed.evaluation.results import EvalSummary, evaluation_folders, last_evaluation, read_rows, write_evaluation

ROW = EvalRow(
    file="ct", id="ct-7", control="none", image="/data/7.png", question_type="", question="Which organ?",
    options=("liver", "lung"), answer="B", completion="<answer>B</answer>", predicted_letter="B", correct=True,
    format=False, tokens=3, finish_reason="stop",
)  # fmt: skip


def test_rows_about_one_image_are_written_as_before_and_those_about_several_name_all(tmp_path: Path) -> None:
    several = dataclasses.replace(ROW, id="ct-8", more_images=("/data/9.png", "/data/8.png"))
    none = dataclasses.replace(ROW, id="ct-9", image=None)
    summary = EvalSummary(model="x", step=0, seconds=1.0, max_tokens=8, train_rows=0, files=())
    folder = write_evaluation(tmp_path, summary, [ROW, several, none])
    lines = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert [line.get("more_images") for line in lines] == [None, ["/data/9.png", "/data/8.png"], None]
    absent = {"more_images", "task", "truth", "predicted", "scores"}
    assert list(lines[0]) == [field.name for field in dataclasses.fields(EvalRow) if field.name not in absent]
    read = read_rows(folder)
    assert read == [ROW, several, none]
    assert [row.images for row in read] == [("/data/7.png",), ("/data/7.png", "/data/9.png", "/data/8.png"), ()]


def test_evaluations_are_in_the_order_of_their_steps(tmp_path: Path) -> None:
    for step in (1_000_000, 20, 999_999):
        summary = EvalSummary(model="x", step=step, seconds=1.0, max_tokens=8, train_rows=0, files=())
        write_evaluation(tmp_path / "evaluations", summary, [ROW])
    assert [int(path.name[5:]) for path in evaluation_folders(tmp_path / "evaluations")] == [20, 999_999, 1_000_000]
    assert last_evaluation(tmp_path).name == "step-1000000"
    assert evaluation_folders(tmp_path / "missing") == []
