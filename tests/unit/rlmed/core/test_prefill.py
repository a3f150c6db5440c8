"""A completion is what the template and the model have written together."""

from __future__ import annotations

import pytest

from rlmed.core.parsing import evaluated_letter, has_answer_format, has_format, reasoning_text
from rlmed.core.prefill import joined, opens_thinking, prefill_of, remaining


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        ("assistant\n", ""),
        ("assistant\n<think>", "<think>"),
        ("assistant\n<think>\n", "<think>\n"),
        ("assistant\n<think>\n\n</think>\n\n", "<think>\n\n</think>\n\n"),
        ("assistant\n</think>\n\n", "</think>\n\n"),
        ("assistant\nnever </think> there", ""),
        ("assistant\n<answer>", "<answer>"),
        ("assistant\n<think></think><answer>", "<think></think><answer>"),
        ("assistant\nLet me see. <think>\nFirst, ", "<think>\nFirst, "),
        # an example of the template's own is not the beginning of this completion
        ("assistant\n<think>a</think><answer>A</answer>\n<think>", "<think>"),
        ("assistant\n<think>a</think><answer>A</answer>\n", ""),
        ("", ""),
    ],
)
def test_where_a_completion_begins(turn: str, expected: str) -> None:
    assert prefill_of(turn) == expected


@pytest.mark.parametrize(
    ("prefill", "written", "reasoning"),
    [
        ("", "<think>x</think><answer>B</answer>", "x"),
        ("<think>", "x</think><answer>B</answer>", "x"),
        ("<think>\n", "x\n</think>\n<answer>B</answer>", "x"),
        # the prompt asks for the tag, so many models write it again
        ("<think>\n", "<think>x</think><answer>B</answer>", "x"),
        ("<think>\n", "\n<think>x</think><answer>B</answer>", "x"),
        # reasoning is switched off: answered at once, or reasoned all the same
        ("<think>\n\n</think>\n\n", "<answer>B</answer>", ""),
        ("<think>\n\n</think>\n\n", "<think>x</think><answer>B</answer>", "x"),
        ("</think>\n\n", "<think>x</think><answer>B</answer>", "x"),
        ("<think></think><answer>", "B</answer>", ""),
        ("<think></think><answer>", "<answer>B</answer>", ""),
        ("<think>\nFirst, ", "x</think><answer>B</answer>", "First, x"),
    ],
)
def test_both_halves_are_judged(prefill: str, written: str, reasoning: str) -> None:
    text = joined(prefill, written)
    assert has_format(text)
    assert reasoning_text(text) == reasoning
    assert evaluated_letter(text) == "B"


@pytest.mark.parametrize(
    ("prefill", "written"),
    [
        ("", "x</think><answer>B</answer>"),
        ("<think>", "x<answer>B</answer>"),
        ("<think>", "x</think> so <answer>B</answer>"),
        ("<answer>", "B</answer>"),
        ("<think></think>", "B"),
        ("</think>\n\n", "x<answer>B</answer>"),
    ],
)
def test_a_prefill_alone_makes_no_format(prefill: str, written: str) -> None:
    assert not has_format(joined(prefill, written))


@pytest.mark.parametrize(
    "prefill", ["", "<answer>", "<think>\n\n</think>\n\n", "</think>\n\n", "<think></think><answer>"]
)
def test_the_answer_format_does_not_mind_that_reasoning_is_switched_off(prefill: str) -> None:
    assert has_answer_format(joined(prefill, remaining(prefill, "<answer>B</answer>")))
    assert not has_answer_format(joined(prefill, "B</answer> indeed"))


@pytest.mark.parametrize(
    ("prefill", "text", "expected"),
    [
        ("", "<think>x</think><answer>B</answer>", "<think>x</think><answer>B</answer>"),
        ("<think>", "<think>x</think><answer>B</answer>", "x</think><answer>B</answer>"),
        ("<think>\n", "<think>x</think><answer>B</answer>", "x</think><answer>B</answer>"),
        ("<think>\n", "<think>\n x</think><answer>B</answer>", "x</think><answer>B</answer>"),
        ("<think>", "<think>\nx</think><answer>B</answer>", "\nx</think><answer>B</answer>"),
        # written for such a template
        ("<think>\n", "x</think><answer>B</answer>", "x</think><answer>B</answer>"),
        # without a reasoning: it is closed, or the answer would stand inside it
        ("<think>\n", "<answer>B</answer>", "</think>\n<answer>B</answer>"),
        ("<think>\n\n</think>\n\n", "<answer>B</answer>", "<answer>B</answer>"),
        ("<think>\n\n</think>\n\n", "<think></think>\n<answer>B</answer>", "<answer>B</answer>"),
        ("<think>\n\n</think>\n\n", "<think>x</think><answer>B</answer>", "<think>x</think><answer>B</answer>"),
        ("</think>\n\n", "<answer>B</answer>", "<answer>B</answer>"),
        ("</think>\n\n", "<think>x</think><answer>B</answer>", "<think>x</think><answer>B</answer>"),
        ("<answer>", "<answer>B</answer>", "B</answer>"),
        ("<think></think><answer>", "<answer>B", "B"),
    ],
)
def test_what_remains_to_be_written(prefill: str, text: str, expected: str) -> None:
    assert remaining(prefill, text) == expected


def test_a_reasoning_cannot_be_written_after_an_opened_answer() -> None:
    with pytest.raises(ValueError, match=r"opened <answer>.*'<think>x"):
        remaining("<answer>", "<think>x</think><answer>B</answer>")


@pytest.mark.parametrize(
    ("prefill", "expected"), [("", False), ("<think>\n", True), ("<think></think>", False), ("<answer>", False)]
)
def test_whether_the_model_goes_on_inside_a_reasoning(prefill: str, expected: bool) -> None:
    assert opens_thinking(prefill) is expected
