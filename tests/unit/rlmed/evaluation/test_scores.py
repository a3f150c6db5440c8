"""Scores of tasks over a file: intervals, chance and the image-free priors."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rlmed.core.config.building import build_record
from rlmed.core.statistics import wilson_interval
from rlmed.core.types import Example
from rlmed.data.loading import EvalFile
from rlmed.evaluation.records import Accuracy, EvalRow
from rlmed.evaluation.results import EvalSummary, compare, write_evaluation
from rlmed.evaluation.scores import Baselines, TaskSummary, summarise_task
from rlmed.evaluation.summary import summarise
from rlmed.evaluation.table import summary_table
from rlmed.tasks.registry import task_of


def question(index: int, answer: str, kind: str = "", text: str = "What is it?") -> Example:
    return Example(f"{index}", None, text, kind=kind, task="open", truth={"answers": [answer]})


def row(example: Example, answer: str, control: Any = "none") -> EvalRow:
    judged = task_of(example).judge(example, f"<answer>{answer}</answer>")
    return EvalRow(
        file="f", id=example.id, control=control, image=None, question_type=example.kind, question=example.question,
        options=example.options, answer=task_of(example).right_answer(example), completion=f"<answer>{answer}</answer>",
        predicted_letter=judged.answer if example.is_choice else None, correct=judged.correct, format=True, tokens=3,
        finish_reason="stop", task=example.task, truth=example.truth, predicted=judged.answer, scores=judged.scores,
    )  # fmt: skip


def summary(examples: Sequence[Example], answers: Sequence[str], train: Sequence[Example] = ()) -> TaskSummary:
    rows = [row(example, answer) for example, answer in zip(examples, answers, strict=True)]
    return summarise_task(rows, Baselines.of(examples[0].task, examples, train))


def test_scores_are_means_over_rows_with_an_interval_and_by_control() -> None:
    examples = [question(i, "liver") for i in range(40)]
    rows = [row(example, "liver" if i % 4 else "lung") for i, example in enumerate(examples)]
    rows += [row(example, "lung", "blank") for example in examples]
    found = summarise_task(rows, Baselines.of("open", examples, ()))
    exact = found.scores["exact"]
    assert (found.rows, found.main, exact.value) == (40, "exact", 0.75)
    assert 0.5 < exact.low < 0.75 < exact.high < 0.95
    assert found.controls["blank"]["exact"].value == 0


def test_the_prior_is_the_best_constant_answer_however_late_in_the_file_it_comes() -> None:
    rare = [question(i, f"finding {i}") for i in range(300)]
    train = [*rare, *(question(1000 + i, "normal") for i in range(100))]
    examples = [question(i, "normal" if i % 4 == 0 else f"other {i}") for i in range(40)]
    found = summary(examples, ["x"] * 40, train)
    assert found.prior is not None
    assert found.prior["exact"] == 0.25


def test_the_prior_goes_by_question_then_by_kind_and_own_halves_have_all_kinds() -> None:
    # kinds in turn: halves of every other row would each lack one of them
    examples = [
        question(i, "yes" if i % 2 else "no", kind="ab"[i % 2], text=f"Is it {'ab'[i % 2]}?") for i in range(40)
    ]
    found = summary(examples, ["x"] * 40, examples)
    assert found.prior == {"exact": 1.0, "f1": 1.0, "recall": 1.0}
    assert found.own_prior == {"exact": 1.0, "f1": 1.0, "recall": 1.0}
    assert found.chance == {"exact": 1.0, "f1": 1.0, "recall": 1.0}  # answers of the same kind
    assert summary(examples, ["x"] * 40).prior is None


def test_a_single_row_has_no_baselines() -> None:
    found = summary([question(0, "liver")], ["liver"])
    assert (found.chance, found.own_prior, found.prior) == (None, None, None)
    assert found.scores["exact"].value == 1


def test_an_interval_of_average_precision_holds_it_when_right_rows_come_first() -> None:
    box = [[0.1, 0.1, 0.5, 0.5]]
    examples = [
        Example(f"{i}", None, "Where?", task="grounding", truth={"boxes": box, "frame": [1000, 1000]})
        for i in range(60)
    ]
    found = summary(examples, ["[[100, 100, 500, 500]]"] * 30 + ["[[700, 700, 900, 900]]"] * 30)
    precision = found.over_file["AP50"]
    assert precision.value == pytest.approx(0.5, abs=0.01)
    assert precision.low < precision.value < precision.high


@pytest.mark.parametrize("named", ["normal", "none", "cyst", ""])
def test_labels_of_a_file_without_findings_are_evaluated(named: str) -> None:
    truth = {"labels": [], "known": ["cyst", "mass"]}
    examples = [Example(f"{i}", None, "What?", task="labels", truth=truth) for i in range(12)]
    found = summary(examples, [named] * 12)
    assert found.scores["exact"].value == float(named == "none")


def test_a_mixed_file_has_shares_over_all_rows_and_scores_by_task() -> None:
    choice = [Example(f"c{i}", None, "Which?", ("liver", "lung"), i % 2) for i in range(4)]
    opened = [question(i, "liver") for i in range(4)]
    rows = [*(row(example, "A") for example in choice), *(row(example, "liver") for example in opened)]
    found = summarise(EvalFile("f", (*choice, *opened)), rows, [*choice, *opened])
    assert found.accuracy.value == 0.75
    assert found.chance == pytest.approx((0.5 + 1.0) / 2)
    assert [task.name for task in found.tasks] == ["open"]
    assert found.image_free_prior is not None
    only = summarise(EvalFile("f", (*choice, *opened)), rows, choice)
    assert only.image_free_prior is None  # no training row of one task


def test_a_mixed_file_has_a_part_for_each_task_with_controls_over_its_rows_alone() -> None:
    choice = [Example(f"c{i}", None, "Which?", ("liver", "lung"), i % 2) for i in range(4)]
    opened = [question(i, "liver") for i in range(6)]
    rows = [*(row(example, "A") for example in choice), *(row(example, "liver") for example in opened)]
    rows += [row(choice[i], "A", "reordered") for i in range(3)]
    rows += [row(example, "lung", "blank") for example in opened[:5]] + [row(choice[0], "A", "blank")]
    found = summarise(EvalFile("f", (*choice, *opened)), rows, choice)
    assert [(part.name, part.rows, part.accuracy.value) for part in found.parts] == [
        ("choice", 4, 0.5),
        ("open", 6, 1.0),
    ]
    first, second = found.parts
    assert (first.reordered, second.reordered) == (Accuracy.of(2, 3), None)
    assert (first.other_order, found.other_order) == (Accuracy.of(2, 3), None)  # all rows have no such figure
    assert (first.blank, second.blank, found.blank) == (Accuracy.of(1, 1), Accuracy.of(0, 5), Accuracy.of(1, 6))
    assert (first.majority_letter, second.majority_letter) == (0.5, None)
    assert (first.image_free_prior, second.image_free_prior) == (0.5, None)  # no open question to fit on
    assert (first.chance, first.tasks, second.parts) == (0.5, (), ())
    assert found.tasks[0].control_rows == {"blank": 5}
    alone = summarise(EvalFile("f", tuple(choice)), [one for one in rows if one.task == "choice"], choice)
    assert alone.parts == ()
    assert alone.other_order == Accuracy.of(2, 3)
    whole = EvalSummary(model="m", step=0, seconds=1, max_tokens=8, train_rows=4, files=(found,))
    assert build_record(EvalSummary, json.loads(json.dumps(dataclasses.asdict(whole)))) == whole
    assert whole.accuracies == {"f": 0.8}
    assert whole.accuracies_by_task == {"f/choice": 0.5, "f/open": 1.0}
    cells = [[str(cell) for cell in column.cells] for column in summary_table(None, whole, None).columns]
    assert cells[0] == ["f\n10 rows", "· choice\n  4 rows", "· open\n  6 rows"]
    assert cells[3] == ["16.7\n3–56\nn=6", "100.0\n21–100\nn=1", "0.0\n0–43\nn=5"]
    assert cells[4] == ["–", "66.7\n21–94\nn=3", "–"]


@pytest.mark.parametrize("given", ["[[700, 700, 900, 900]]", "[[100, 100, 500, 500]]"])
def test_scores_that_are_all_equal_are_not_certain(given: str) -> None:
    truth = {"boxes": [[0.1, 0.1, 0.5, 0.5]], "frame": [1000, 1000]}
    examples = [Example(f"{i}", None, "Where?", task="grounding", truth=truth) for i in range(5)]
    found = summary(examples, [given] * 5)
    right = 5 * (given == "[[100, 100, 500, 500]]")
    for figure in (*found.scores.values(), *found.over_file.values()):
        assert (figure.low, figure.high) == pytest.approx(wilson_interval(right, 5), abs=1e-6)  # fractions of boxes


def test_parts_are_compared_by_task(tmp_path: Path) -> None:
    choice = [Example(f"c{i}", None, "Which?", ("liver", "lung"), 1) for i in range(4)]
    opened = [question(i, "liver") for i in range(6)]
    folders = []
    for step, (letter, text) in enumerate((("A", "liver"), ("B", "lung"))):
        rows = [*(row(example, letter) for example in choice), *(row(example, text) for example in opened)]
        file = summarise(EvalFile("f", (*choice, *opened)), rows, choice)
        whole = EvalSummary(model="m", step=step, seconds=1, max_tokens=8, train_rows=4, files=(file,))
        folders.append(write_evaluation(tmp_path, whole, rows))
    comparison = compare(*folders)
    tasks = comparison["files"]["f"]["tasks"]
    assert {name: (one["rows"], one["gained"], one["lost"]) for name, one in tasks.items()} == {
        "choice": (4, 4, 0),
        "open": (6, 0, 6),
    }
    assert tasks["choice"]["p_value"] == 2 / 2**4
    table = summary_table(EvalSummary.read(folders[0]), EvalSummary.read(folders[1]), comparison)
    assert list(table.columns[2].cells)[1:] == ["0.125", "0.031"]


@pytest.mark.parametrize(
    ("reference", "answer", "right"),
    [
        ("20", "21", False),
        ("1950", "1951", False),
        ("20", "20", True),
        ("20 mm", "2.05 cm", True),
        ("20 mm", "22 mm", False),
    ],
)
def test_a_bare_number_is_exact_and_a_quantity_has_a_tolerance(reference: str, answer: str, right: bool) -> None:
    example = question(0, reference)
    assert task_of(example).judge(example, f"<answer>{answer}</answer>").correct == right


def test_the_legend_speaks_of_options_only_where_there_are_some() -> None:
    choice = [Example(f"c{i}", None, "Which?", ("liver", "lung"), i % 2) for i in range(4)]
    opened = [question(i, "liver") for i in range(4)]

    def legend(*examples: Example) -> str:
        file = summarise(EvalFile("f", examples), [row(example, "A") for example in examples], [])
        whole = EvalSummary(model="m", step=0, seconds=1, max_tokens=8, train_rows=0, files=(file,))
        return str(summary_table(None, whole, None).caption)

    assert "option text" in legend(*choice)
    assert "without its image" not in legend(*choice)
    assert "option text" not in legend(*opened)
    assert "without its image" in legend(*opened)
    assert "option text" in legend(*choice, *opened)
    assert "without its image" in legend(*choice, *opened)
