"""What a command prints at its end: results, compared if there is anything to, and paths."""

from pathlib import Path

from rlmed.evaluation.results import write_evaluation
from rlmed.report.terminal import show_results
from tests.unit.rlmed.report.test_page import row, summary


def evaluation(run: Path, step: int, correct: int) -> Path:
    rows = [row(i, right=i < correct) for i in range(10)]
    return write_evaluation(run / "evaluations", summary(step, rows), rows)


def test_two_evaluations_are_compared(tmp_path: Path, capsys) -> None:
    before, _ = evaluation(tmp_path, 0, 3), evaluation(tmp_path, 4, 9)
    (tmp_path / "checkpoints" / "step-000004").mkdir(parents=True)
    show_results(tmp_path, 4, before=before)
    shown = capsys.readouterr().out
    assert "30.0 → 90.0" in shown
    assert (tmp_path / "evaluations/step-000004/comparison.json").is_file()
    assert shown.splitlines()[-3:] == [
        f"rows:       {tmp_path}/evaluations/step-000004/rows.jsonl",
        f"report:     {tmp_path}/report.html",
        f"checkpoint: {tmp_path}/checkpoints/step-000004",
    ]


def test_without_an_earlier_evaluation_there_is_nothing_to_compare(tmp_path: Path, capsys) -> None:
    evaluation(tmp_path, 4, 9)
    show_results(tmp_path, 4, before=tmp_path / "evaluations/step-000000", note="a toy")
    shown = capsys.readouterr().out
    assert "90.0" in shown
    assert "→" not in shown
    assert "note: a toy" in shown
    assert "checkpoint" not in shown


def test_a_run_that_was_not_evaluated_at_its_end_says_where_it_is(tmp_path: Path, capsys) -> None:
    before = evaluation(tmp_path, 0, 3)
    show_results(tmp_path, 4, before=before)
    assert capsys.readouterr().out == f"report:     {tmp_path}/report.html\n"
