"""Differences of words between an answer and a reference."""

import pytest

from rlmed.report.differences import WORDS, differences


def marked(answer, *references):
    marks = {"same": "{}", "added": "+{}+", "missing": "-{}-"}
    return "".join(part.space + marks[part.kind].format(part.text) for part in differences(answer, references))


@pytest.mark.parametrize(
    ("answer", "references", "expected"),
    [
        ("The Liver.", ["liver"], "The Liver."),
        ("left lung", ["right lung"], "-right- +left+ lung"),
        ("cyst", ["small cyst of the liver"], "-small- cyst -of the liver-"),
        ("a cyst", ["no finding", "cyst", "mass"], "a cyst"),
        ("two nodules , here", ["2 nodules"], "two nodules , +here+"),
        ("", ["liver"], "-liver-"),
        ("the", ["liver"], "-liver- +the+"),
        ("左下肺", ["左上肺"], "左-上-+下+肺"),
        ("x\n  b c", ["x c"], "x\n  +b+ c"),
        ("…", ["liver"], "-liver- +…+"),
    ],
)
def test_words_only_in_one_are_marked(answer, references, expected):
    assert marked(answer, *references) == expected


def test_no_word_of_the_answer_is_lost():
    answer = "the a , “x” a\tb\n\nthe . c the"
    parts = differences(answer, ["b c d"])
    kept = "".join(part.space + part.text for part in parts if part.kind != "missing")
    assert kept.split() == answer.split()


def test_words_beyond_the_limit_are_left_as_they_are():
    words = [f"w{i}" for i in range(WORDS + 5)]
    last = differences(" ".join(words), ["w0"])[-1]
    assert (last.kind, last.text) == ("same", " ".join(words[WORDS:]))
