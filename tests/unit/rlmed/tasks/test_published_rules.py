"""Answers judged as published evaluations do, and what an answer asserts."""

from __future__ import annotations

import pytest

from rlmed.tasks.metrics.claims import asserts_finding, claims_to_see
from rlmed.tasks.metrics.published import (
    all_answers,
    llava_med_closed,
    llava_med_recall,
    medevalkit_choice,
    medevalkit_closed,
    medevalkit_open,
    said,
    slake_exact,
    vlmevalkit_choice,
)
from rlmed.tasks.metrics.text import exact_match, recall
from rlmed.tasks.registry import task_named

OPTIONS = ("liver", "left lung", "lung")
HOSTILE = (
    "", " ", "<answer>", "</answer><answer>", "<answer></answer>", "<answer>" * 2000, "</think>" * 2000, "(" * 5000,
    "（" * 5000, "\0", "\ud800", "是的", r"\boxed{B}", "A" * 10_000, "yes no " * 2000, "🩻", ". . .", "B\n\nB",
)  # fmt: skip


def test_which_part_of_a_completion_is_judged() -> None:
    two = "<think>dark</think><answer>yes</answer> or <answer>no</answer>"
    assert (said(two), all_answers(two)) == ("yes", "yes no")
    assert said("<think>a <b></think>liver ") == "liver"
    assert said("liver <answer>lu") == all_answers("liver <answer>lu") == "liver <answer>lu"


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("yes", "yes", True),
        ("Yes, clearly", "yes", True),
        ("yes and no", "yes", False),
        ("no", "yes", False),
        ("normal", "no", True),  # letters, not words
        ("there is one", "yes", False),
    ],
)
def test_closed_questions_of_medevalkit(answer: str, reference: str, right: bool) -> None:
    assert medevalkit_closed(f"<think>no</think><answer>{answer}</answer>", reference) is right


def test_open_questions_differ_in_what_is_normalised() -> None:
    assert exact_match("The liver.", "liver") == 1
    assert not medevalkit_open("<answer>The liver.</answer>", "liver")
    assert not slake_exact("The liver.", "liver")
    assert slake_exact(" Liver (right)!", "liver")
    assert slake_exact("x-ray", "X Ray")
    assert slake_exact("有", "Yes")
    assert not slake_exact("没有", "yes")


@pytest.mark.parametrize(
    ("answer", "medevalkit", "vlmevalkit"),
    [
        ("B", True, True),
        ("b", True, False),  # VLMEvalKit reads capitals, and the text of no option is in it
        ("B. left lung", True, True),
        ("Left lung", True, False),  # "lung" is in it, too: two options
        ("A", False, False),
        ("A or B", False, False),
        ("the left lnug", True, False),  # the option most alike
        ("C", False, False),
    ],
)
def test_choices(answer: str, medevalkit: bool, vlmevalkit: bool) -> None:
    assert medevalkit_choice(f"<answer>{answer}</answer>", OPTIONS, "B") is medevalkit
    assert vlmevalkit_choice(answer, OPTIONS, "B") is vlmevalkit


def test_llava_med() -> None:
    assert llava_med_closed("Yes.", "yes")
    assert not llava_med_closed("Yes.", "no")
    assert llava_med_recall("lung lung", "left lung") == 2 / 3  # two of the answer's words, one missing
    assert recall("lung lung", "left lung") == 1 / 2
    assert llava_med_recall("liver", "left lung") == llava_med_recall("", "lung") == llava_med_recall("lung", "") == 0


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_nothing_that_a_model_writes_stops_them(text: str) -> None:
    assert isinstance(said(text), str)
    assert {type(rule(text, "left lung")) for rule in (medevalkit_closed, medevalkit_open, slake_exact)} == {bool}
    assert {type(rule(text, OPTIONS, "B")) for rule in (medevalkit_choice, vlmevalkit_choice)} == {bool}
    assert 0 <= llava_med_recall(text, "left lung") <= 1
    assert type(asserts_finding(text)) is type(claims_to_see(text)) is bool


@pytest.mark.parametrize(
    ("text", "asserts", "sees"),
    [
        ("liver", True, False),
        ("No lesion", False, False),
        ("none", False, False),
        ("0", False, False),
        ("1.5 cm", True, False),
        ("There is no effusion, edema or mass.", False, False),
        ("There is a mass in the liver.", True, True),
        ("The liver appears normal, with no signs of enlargement.", True, True),
        ("No effusion. The heart appears enlarged.", True, True),
        ("I cannot see the image.", False, False),
        ("The picture is blank but the liver is shown", True, True),
        ("It can't be determined", False, False),
        ("", False, False),
    ],
)
def test_what_a_text_asserts(text: str, asserts: bool, sees: bool) -> None:
    assert (asserts_finding(text), claims_to_see(text)) == (asserts, sees)


def test_tasks_compare_answers_and_tell_which_assert_something() -> None:
    labels, boxes, choice = (task_named(name) for name in ("labels", "grounding", "choice"))
    truth = {"labels": ["cyst"], "known": ["cyst", "mass"]}
    assert labels.same("mass, cyst", "Cyst and mass", truth)
    assert not labels.same("mass", "none", truth)
    assert (labels.asserts("none", truth, ()), labels.asserts("cyst", truth, ())) == (False, True)
    frame = {"boxes": [], "frame": [1000, 1000]}
    assert boxes.same("[[0, 0, 100, 100]]", "[[0, 0, 100, 60]]", frame)  # IoU 0.6
    assert not boxes.same("[[0, 0, 100, 100]]", "[[0, 0, 100, 40]]", frame)
    assert boxes.same("[]", "none", frame)
    assert (boxes.asserts("[]", frame, ()), boxes.asserts("[[0, 0, 9, 9]]", frame, ())) == (False, True)
    assert choice.same("A", "A", None)
    assert not choice.same("A", "B", None)
    assert choice.asserts("A", None, ("yes", "no")) is True
    assert choice.asserts("B", None, ("yes", "no")) is False
    assert choice.asserts("D", None, ("yes", "no")) is False
    assert choice.asserts("A", None, ("liver", "lung")) is None
    assert task_named("open").same("The liver.", "liver", {"answers": ["lung"]})
    assert not task_named("open").same(".", "?", {"answers": ["lung"]})
