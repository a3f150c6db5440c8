"""Scores of tasks over a file: intervals, chance and the image-free priors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from rlmed.core.types import Example
from rlmed.data.loading import EvalFile
from rlmed.evaluation.records import EvalRow
from rlmed.evaluation.results import EvalSummary
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
