"""Faithfulness to the picture, counted by hand."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rlmed.core.statistics import wilson_interval
from rlmed.evaluation.faithfulness import measure_faithfulness, read_faithfulness, write_faithfulness
from rlmed.evaluation.faithfulness_table import faithfulness_table
from rlmed.evaluation.records import Accuracy, EvalRow

ROW = EvalRow(
    file="ct", id="1", control="none", image="1.png", question_type="", question="Is there a mass?",
    options=("yes", "no"), answer="A", completion="", predicted_letter=None, correct=False, format=True, tokens=3,
    finish_reason="stop",
)  # fmt: skip


def choices(*answers: tuple[str | None, str | None, str | None], reasoning: str = "") -> list[EvalRow]:
    """Return rows from the letters on the own, the grey and another's picture; right is A."""
    rows = []
    for index, letters in enumerate(answers):
        for control, letter in zip(("none", "blank", "shuffled"), letters, strict=True):
            text = f"<think>{reasoning}</think><answer>{letter}</answer>"
            rows.append(
                dataclasses.replace(
                    ROW, id=str(index), control=control, predicted_letter=letter, correct=letter == "A", completion=text
                )
            )
    return rows


def test_four_questions_by_hand() -> None:
    rows = choices(("A", "A", "A"), ("A", "B", "A"), ("A", "B", "B"), ("B", "A", "B"), reasoning="A mass is seen.")
    (found,) = measure_faithfulness(rows)
    assert (found.file, found.task, found.rows) == ("ct", "choice", 4)
    # right: own 3, another's 2, grey 2
    assert (found.visual_reliance.value, found.blank_reliance.value) == (0.25, 0.25)
    assert found.visual_reliance.low <= 0.25 <= found.visual_reliance.high
    assert found.lost == Accuracy.of(2, 3)
    assert found.image_sensitivity == Accuracy.of(1, 4)
    assert found.blank_sensitivity == Accuracy.of(3, 4)
    assert found.visual_claims == found.blank_claims == Accuracy.of(4, 4)
    assert found.hallucinated_reasoning == Accuracy.of(3, 4)  # all but the one whose answer changes
    assert found.blank_answers == Accuracy.of(2, 4)  # "yes" to "Is there a mass?" over grey
    assert (found.image_sensitivity.low, found.image_sensitivity.high) == wilson_interval(1, 4)


def test_a_negative_reliance_is_a_model_that_does_better_with_another_picture() -> None:
    (found,) = measure_faithfulness(choices(("B", "B", "A"), ("B", "B", "B")))
    assert found.visual_reliance.value == -0.5
    assert found.lost is None  # no right answer to lose
    assert found.visual_claims == Accuracy.of(0, 2)


def test_without_controls_there_is_nothing(tmp_path: Path) -> None:
    own = [row for row in choices(("A", "A", "A")) if row.control == "none"]
    reordered = dataclasses.replace(own[0], control="reordered")
    assert measure_faithfulness([]) == measure_faithfulness([*own, reordered]) == ()
    write_faithfulness(tmp_path, ())
    assert list(tmp_path.iterdir()) == []
    assert read_faithfulness(tmp_path) == ()
    assert faithfulness_table(()) is None


def test_one_row_that_could_get_no_other_picture() -> None:
    rows = [row for row in choices(("A", "B", "A")) if row.control != "shuffled"]
    (found,) = measure_faithfulness(rows)
    assert found.rows == 1
    assert found.visual_reliance is found.image_sensitivity is found.hallucinated_reasoning is None
    assert found.blank_reliance.value == 1
    assert found.lost == Accuracy.of(1, 1)


@pytest.mark.parametrize("letter", ["A", "B", None])
def test_all_right_all_wrong_and_all_unreadable(letter: str | None) -> None:
    (found,) = measure_faithfulness(choices(*[(letter, letter, letter)] * 5))
    assert found.visual_reliance.value == found.image_sensitivity.value == 0
    assert found.blank_answers == Accuracy.of(5 if letter == "A" else 0, 5)


def test_an_answer_that_can_no_longer_be_read_has_changed() -> None:
    (found,) = measure_faithfulness(choices(("A", None, "A"), (None, "B", None)))
    assert found.blank_sensitivity == Accuracy.of(2, 2)
    assert found.image_sensitivity == Accuracy.of(0, 2)


def test_choices_without_a_way_to_assert_nothing_are_left_out() -> None:
    organs = [dataclasses.replace(row, options=("liver", "lung")) for row in choices(("A", "A", "A"))]
    (found,) = measure_faithfulness(organs)
    assert found.blank_answers is None


def other(task: str, truth: Any, scores: list[float], answers: list[str | None]) -> list[EvalRow]:
    name = {"open": "exact", "labels": "f1"}[task]
    return [
        dataclasses.replace(
            ROW, task=task, truth=truth, options=(), control=control, predicted=answer, scores={name: score},
            correct=score == 1, completion=f"<answer>{answer}</answer>",
        )
        for control, score, answer in zip(("none", "blank", "shuffled"), scores, answers, strict=True)
    ]  # fmt: skip


def test_other_tasks_compare_answers_in_their_own_way_and_stand_alone(tmp_path: Path) -> None:
    truth = {"labels": ["cyst", "mass"], "known": ["cyst", "mass", "edema"]}
    labels = other("labels", truth, [1.0, 0.0, 2 / 3], ["cyst, mass", "none", "mass"])
    opened = other("open", {"answers": ["liver"]}, [1.0, 1.0, 1.0], ["liver", "The liver.", "LIVER"])
    first, second, third = measure_faithfulness([*labels, *opened, *choices(("A", "A", "A"))])
    assert [one.task for one in (first, second, third)] == ["labels", "open", "choice"]
    assert first.visual_reliance.value == pytest.approx(1 / 3)  # of F1
    assert first.image_sensitivity == first.blank_sensitivity == Accuracy.of(1, 1)
    assert first.blank_answers == Accuracy.of(0, 1)
    assert second.image_sensitivity == second.blank_sensitivity == Accuracy.of(0, 1)
    assert second.blank_answers == Accuracy.of(1, 1)  # an organ, over grey
    write_faithfulness(tmp_path, (first, second, third))
    assert read_faithfulness(tmp_path) == (first, second, third)


def test_the_table_shows_each_figure_with_its_interval() -> None:
    found = measure_faithfulness(choices(("A", "B", "B"), ("A", "B", "A")))
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(faithfulness_table(found))
    lines = [line.strip() for line in console.export_text().splitlines()]
    shown = {line.split("  ")[0]: (line.split()[-1], after) for line, after in itertools.pairwise(lines) if line}
    assert shown["image sensitivity"] == ("50.0", "9 to 91")
    # both questions lost all: others could be 66 % of questions at most, and gain as much
    assert shown["score lost over grey"] == ("100.0", "-32 to 100")
    assert shown["findings asserted over grey"][0] == "0.0"
