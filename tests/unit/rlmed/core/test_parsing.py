"""Parsing equals the paper's patterns and stays fast on the longest, strangest completions."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.deadline import call_within
from rlmed.core.parsing import (
    answer_text,
    evaluated_letter,
    format_parts,
    has_answer_format,
    has_format,
    option_letters,
    reasoning_text,
)

FORMAT = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>", re.DOTALL)
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
PIECES = ["<think>", "</think>", "<answer>", "</answer>", " ", "\n", "B", "x", "<", "</answer", "answer>", "\u00a0"]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)


@given(TEXTS)
def test_format_equals_the_papers_pattern(text):
    assert has_format(text) == (FORMAT.fullmatch(text) is not None)


@given(st.lists(st.sampled_from(PIECES), max_size=4).map("".join), TEXTS, TEXTS)
def test_format_equals_the_papers_pattern_where_it_often_matches(middle, reasoning, answer):
    text = f"<think>{reasoning}</think>{middle}<answer>{answer}</answer>"
    assert has_format(text) == (FORMAT.fullmatch(text) is not None)


@given(TEXTS)
def test_answer_equals_the_first_match_of_the_pattern(text):
    found = ANSWER.search(text)
    assert answer_text(text) == (found[1].strip() if found else None)


@pytest.mark.parametrize(
    ("answer", "letters"),
    [("", []), ("B", ["B"]), ("b", ["B"]), ("B) liver", ["B", "I", "E"]), ("K", []), ("aAz", ["A", "A"]), ("Ｂ", [])],
)
def test_option_letters(answer, letters):
    assert option_letters(answer) == letters


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("<answer>B</answer>", "B"),
        ("<answer> \n B\t</answer>", "B"),
        ("x<answer>Q</answer>y", "Q"),  # any capital letter counts as an answer, if a wrong one
        ("<answer>b</answer>", None),
        ("<answer>B)</answer>", None),
        ("<answer>AB</answer>", None),
        ("<answer></answer>", None),
        ("<answer>B", None),
        ("B", None),
        # the first pair that holds a letter alone
        ("<answer>B) liver</answer><answer>C</answer>", "C"),
        ("<answer>A</answer><answer>C</answer>", "A"),
        ("<answer><answer>D</answer></answer>", "D"),
        ("<ANSWER>B</ANSWER>", None),
        ("<answer>Ä</answer>", None),
    ],
)
def test_evaluated_letter(text, letter):
    assert evaluated_letter(text) == letter


@pytest.mark.parametrize(
    "text",
    [
        "<think>" + "</think><answer>" * 60_000,
        "<think>" + "</think><answer></answer>" * 40_000 + "x",
        "<think>" * 140_000 + "</answer>",
        "<answer>" * 120_000,
        "<think></think>" + " " * 1_000_000 + "x</answer>",
        "<think>" + ("</think>" + " " * 1000) * 1000 + "</answer>",
        "<answer>" + " " * 1_000_000,
        ("<answer>" + " " * 1000) * 1000,
    ],
)
def test_a_million_hostile_characters_are_parsed_at_once(text):
    for parse in (has_format, format_parts, has_answer_format, reasoning_text, answer_text, evaluated_letter):
        # the paper's patterns take minutes for some of these
        call_within(60, lambda parse=parse: parse(text))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<answer>B</answer>", True),
        (" <answer>\nB\n</answer>\n", True),
        ("<answer></answer>", True),
        ("<think>x</think><answer>B</answer>", False),
        ("<answer>B</answer> indeed", False),
        ("<answer>A</answer><answer>B</answer>", False),
        ("<answer>A<answer>B</answer>", False),
        ("<answer>B", False),
        ("", False),
    ],
)
def test_an_answer_without_reasoning_has_its_own_format(text, expected):
    assert has_answer_format(text) is expected


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("<think>x</think>\n<answer>B</answer>", 5),
        # of the whole format nothing is missing
        ("<think>x<think></think><answer>B</answer>", 5),
        ("<think>x</think> so <answer>B</answer>", 4),
        ("Well: <think>x</think><answer>B</answer>", 4),
        ("<think>x</think><answer>B", 3),
        ("<think>x</think>B", 2),
        ("<answer>B</answer>", 2),
        ("<think>x", 1),
        ("B</answer>", 1),
        # behind the answer's end nothing follows that counts
        ("</answer><think>", 1),
        ("<answer>B</answer><think>x</think>", 2),
        # a tag over and over is no part
        ("<think>" * 9, 0),
        ("<think><answer><answer>B</answer>", 2),
        ("B", 0),
        ("", 0),
    ],
)
def test_parts_of_the_format(text, parts):
    assert format_parts(text) == parts


@given(TEXTS)
def test_all_parts_are_the_whole_format(text):
    assert (format_parts(text) == 5) == has_format(text)
