"""Letters, keys, places and texts of options agree, or the row is left out, both readings named."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlmed.core.types import LETTERS
from rlmed.data.options.choices import Options, choose, plain_options, written_answer
from rlmed.data.options.sources import parse_options, read_options
from rlmed.data.readers.formats.table import option_text
from rlmed.data.rows import BadRowError

ORGANS = ("liver", "spleen", "kidney", "lung")


def chosen(options: Any, answer: str, **how: Any) -> str:
    found = choose(read_options(options, option_text), answer, **how)
    return found.options[found.answer]


def options_of(options: Any, answer: str) -> tuple[str, ...]:
    return choose(read_options(options, option_text), answer).options


def reason(options: Any, answer: str, **how: Any) -> str:
    with pytest.raises(BadRowError) as error:
        choose(read_options(options, option_text), answer, **how)
    return str(error.value)


@pytest.mark.parametrize(
    ("options", "answer", "right"),
    [
        # a letter is missing
        ({"A": "liver", "C": "spleen", "D": "kidney"}, "C", "spleen"),
        ({"A": "liver", "B": None, "C": "spleen", "D": "kidney"}, "C", "spleen"),
        ({"A": "liver", "B": "", "C": "spleen", "D": "kidney"}, "D", "kidney"),
        ({"A": "liver", "B": float("nan"), "C": "spleen"}, "C", "spleen"),
        ({"A": "liver", "B": "nan", "C": "spleen"}, "C", "spleen"),
        ({"B": "lung", "C": "spleen"}, "B", "lung"),
        ({"B": "lung", "C": "spleen"}, "c", "spleen"),
        ([("A", "liver"), ("C", "spleen"), ("D", "kidney")], "C", "spleen"),
        ({"option_a": "liver", "option_c": "spleen", "option_d": "kidney"}, "C", "spleen"),
        ({"A.": "liver", "(C)": "spleen", "D)": "kidney"}, "C", "spleen"),
        ({"label": ["A", "C", "D"], "text": ["liver", "spleen", "kidney"]}, "C", "spleen"),
        ([{"key": "A", "value": "liver"}, {"key": "C", "value": "spleen"}, {"key": "D", "value": "kidney"}], "C", "spleen"),
        # another order, lower case
        ({"C": "spleen", "A": "liver", "B": "lung"}, "B", "lung"),
        ({"c": "spleen", "a": "liver", "b": "lung"}, "B", "lung"),
        ({"c": "spleen", "A": "liver", "b": "lung"}, "c", "spleen"),
        # numbers
        ({"1": "liver", "2": "spleen", "3": "kidney"}, "2", "spleen"),
        ({"0": "liver", "1": "spleen", "2": "kidney"}, "2", "kidney"),
        ({"1": "liver", "3": "spleen", "4": "kidney"}, "3", "spleen"),
        ({1: "liver", 2: "spleen", 3: "kidney"}, "2", "spleen"),
        ({"1": "liver", "2": "spleen", "3": "kidney"}, "B", "spleen"),
        ({"0": "liver", "1": "spleen", "2": "kidney"}, "B", "spleen"),
        ({str(n): f"finding {n}" for n in (10, 1, 2, 3, 4, 5, 6, 7, 8, 9)}, "10", "finding 10"),
        ({str(n): f"finding {n}" for n in (10, 1, 2, 3, 4, 5, 6, 7, 8, 9)}, "B", "finding 2"),
        # other keys
        ({"first": "liver", "second": "spleen"}, "second", "spleen"),
        ({"1": "liver", "2": "spleen", "note": None}, "B", "spleen"),
        ({"A": "liver", "B": "spleen", "note": None, "1": ""}, "B", "spleen"),
        ({"A": None, "B": None, "C": None, "a": "liver", "b": "spleen"}, "b", "spleen"),
        ({"A": None, "B": None, "1": "liver", "2": "spleen"}, "2", "spleen"),
        ({"A": None, "B": None, "1": "liver", "2": "spleen"}, "B", "spleen"),
        ({"z": "liver", "y": "spleen"}, "B", "spleen"),
        # lists with blanks: where letters before and after agree, or the text is said
        (["liver", "spleen", None, "kidney"], "B", "spleen"),
        (["liver", None, "spleen", "kidney"], "spleen", "spleen"),
        (["liver", "spleen", "", None], "B", "spleen"),
        # letter and text
        (["liver", "spleen"], "B. spleen", "spleen"),
        (["liver", "spleen"], "(b) Spleen", "spleen"),
        (["liver", "spleen"], "2. spleen", "spleen"),
        ({"A": "liver", "C": "spleen", "D": "kidney"}, "C) spleen", "spleen"),
        (["liver", "spleen"], "Option B", "spleen"),
        (["liver", "spleen"], "(B)", "spleen"),
        # letters and numbers as texts
        (["A", "B", "AB", "0"], "B", "B"),
        (["B", "A"], "A) B", "B"),
        (["2", "3", "1"], "2", "2"),
        ([2, 3, 1], "2", "2"),
        # letters of the texts' own
        (["A. liver", "B. spleen", "C. kidney"], "B", "spleen"),
        (["A. liver", "B. spleen", "C. kidney"], "B. spleen", "spleen"),
        (["A. liver", "B. spleen", "C. kidney"], "spleen", "spleen"),
        (["B. spleen", "A. liver", "C. kidney"], "B", "spleen"),
        (["B. spleen", "A. liver", "C. kidney"], "A. liver", "liver"),
        (["1. liver", "2. spleen", "3. kidney"], "2", "spleen"),
        (["1. liver", "2. spleen", "3. kidney"], "B", "spleen"),
        (["C. difficile", "E. coli", "B. fragilis", "F. nucleatum"], "C. difficile", "C. difficile"),
        (["C. difficile", "E. coli", "S. aureus", "B. fragilis"], "B", "E. coli"),
        (["C. difficile", "E. coli"], "B", "E. coli"),
        (["A) liver", "C) spleen", "D) kidney"], "C", "spleen"),
        (["A. liver", "C. spleen", "D. kidney"], "D", "kidney"),
        (["A. liver", "C. spleen", "D. kidney"], "spleen", "spleen"),
        (["A. liver", "C. spleen", "D. kidney"], "C) spleen", "spleen"),
        (["B. cereus", "E. coli"], "A) B. cereus", "B. cereus"),
        ({"A": "B. spleen", "B": "A. liver"}, "A) spleen", "spleen"),
        (["A. liver", None, "C. spleen", "D. kidney"], "C", "spleen"),
        ({"A": "A. liver", "C": "C. spleen", "D": "D. kidney"}, "C", "spleen"),
        ({"1": "A. liver", "2": "B. spleen"}, "2", "spleen"),
        ({"1": "A. liver", "2": "B. spleen"}, "B", "spleen"),
        ({"A": "B. spleen", "B": "A. liver"}, "liver", "liver"),
        # letters that only some texts bring
        (["A. liver", "B. spleen", "none of these"], "C", "none of these"),
        (["B. spleen", "A. liver", "none of these"], "B", "spleen"),
        (["B. spleen", "A. liver", "none of these"], "C", "none of these"),
        (["none of these", "A. liver", "B. spleen"], "A", "liver"),
        (["A) liver", "spleen", "C) kidney"], "B", "spleen"),
        (["A) liver", "spleen", "C) kidney"], "C", "kidney"),
        (["A. liver", "spleen", "C. kidney", "D. lung"], "D", "lung"),
        ({"A": "A. liver", "C": "C. spleen", "D": "none"}, "D", "none"),
        (["1. liver", "2. spleen", "none"], "2", "spleen"),
        # what nobody can see
        (["\u200bA. liver", "\ufeffB. spleen"], "B\u200b", "spleen"),
        (["liver", "spleen\u200b"], "\ufeffspleen", "spleen"),
        # other alphabets
        ({"А": "liver", "Б": "spleen", "В": "kidney"}, "В", "kidney"),
    ],
)  # fmt: skip
def test_by_name(options, answer, right):
    assert chosen(options, answer) == right


@pytest.mark.parametrize(
    ("options", "answer", "first", "second"),
    [
        (["liver", None, "spleen", "kidney"], "C", "'kidney' by its position", "'spleen' by its position in the"),
        (["liver", "", "spleen", "kidney"], "B", "'spleen' by its position", "missing by its position"),
        ({"A": "liver", "B": None, "C": "spleen"}, "B", "missing", "by its key"),
        (["B", "A", "C"], "B", "'B' as a text", "'A' by its position"),
        (["O", "A", "B", "AB"], "A", "'A' as a text", "'O' by its position"),
        ({"A": "C", "B": "A", "C": "B"}, "A", "'A' as a text", "'C' by its key"),
        ({"1": "2", "2": "1"}, "1", "'1' as a text", "'2' by its key"),
        (["A. liver", "C. spleen", "D. kidney"], "C", "'C. spleen' by the options' own letters", "'D. kidney' by its position"),
        (["D. kidney", "A. liver", "B. spleen"], "B", "'B. spleen' by the options' own letters", "'A. liver' by its position"),
        (["B. lung", "C. spleen"], "B", "'B. lung' by the options' own letters", "'C. spleen' by its position"),
        ({"A": "B. spleen", "B": "A. liver"}, "A", "'spleen' by its key", "'liver' by the options' own letters"),
        ({"1": "liver", "3": "spleen", "4": "kidney"}, "C", "'kidney' by its position", "'spleen' by its position in the"),
        (["2. spleen", "1. liver"], "B", "'spleen' by its position", "'liver' by its position in the"),
        ({"1": "liver", "3": "spleen", "4": "kidney"}, "B", "'spleen' by its position", "missing by its position in"),
        (["liver", "\u200b", "spleen", "kidney"], "C", "'kidney' by its position", "'spleen' by its position in the"),
        (["none of these", "A. liver", "B. spleen"], "C", "'none of these' by its position", "'spleen' by its position in"),
        (["C) kidney", "spleen", "A) liver"], "A", "'A) liver' by the options' own", "'C) kidney' by its position"),
        ({"A": "B. spleen", "B": "A. liver", "C": "x"}, "A", "'spleen' by its key", "'liver' by the options' own letters"),
        ({"first": "liver", "second": None, "third": "spleen"}, "B", "'spleen' by its position", "missing by its position in"),
        (["liver", "spleen", "kidney"], "C. spleen", "'spleen' as a text", "'kidney' by its position"),
        ({"A": "liver", "C": "spleen", "D": "kidney"}, "C. kidney", "'kidney' as a text", "'spleen' by its key"),
    ],
)  # fmt: skip
def test_a_contradiction_is_told_with_both_readings(options, answer, first, second):
    said = reason(options, answer)
    assert first in said
    assert second in said
    assert f"its answer '{answer}' is " in said
    assert "write letter and text" in said


@pytest.mark.parametrize(
    ("options", "answer", "first", "right"),
    [
        (["liver", "spleen", "kidney"], "2", 0, "kidney"),
        (["liver", "spleen", "kidney"], "2", 1, "spleen"),
        (["3", "1", "2"], "1", 0, "1"),
        (["3", "1", "2"], "1", 1, "3"),
        (["B", "A"], "0", 0, "B"),
        (["A. liver", "B. spleen"], "1", 0, "spleen"),
        (["1. liver", "2. spleen"], "1", 0, "spleen"),
        (["liver", "spleen", None], "1", 0, "spleen"),
        ({"A": "liver", "B": "spleen", "D": "kidney"}, "1", 0, "spleen"),
        ({"0": "liver", "1": "spleen"}, "1", 0, "spleen"),
    ],
)
def test_a_place_whose_first_is_known(options, answer, first, right):
    assert chosen(options, answer, first=first) == right


@pytest.mark.parametrize(
    ("options", "answer", "first", "readings"),
    [
        ({"A": "liver", "C": "spleen", "D": "kidney"}, "2", 0, ("'kidney' counted from 0", "'spleen' counted from 0 as")),
        ({"A": "liver", "B": None, "C": "spleen"}, "1", 0, ("'spleen' counted from 0", "missing counted from 0")),
        (["liver", None, "spleen", "kidney"], "3", 1, ("'kidney' counted from 1", "'spleen' counted from 1 in the source")),
        ({"A": "liver", "B": "spleen", "D": "kidney"}, "2", 0, ("'kidney' counted from 0", "missing counted from 0 as the")),
        ({"C": "spleen", "A": "liver", "B": "lung"}, "0", 0, ("'liver' counted from 0", "'spleen' counted from 0 in the")),
        (["B. spleen", "A. liver"], "0", 0, ("'liver' counted from 0", "'spleen' counted from 0 in the source")),
        ({"1": "liver", "2": "spleen"}, "1", 0, ("'spleen' counted from 0", "'liver' by its key")),
    ],
)  # fmt: skip
def test_a_place_that_a_gap_makes_doubtful(options, answer, first, readings):
    said = reason(options, answer, first=first)
    assert all(reading in said for reading in readings)


@pytest.mark.parametrize(
    ("texts", "shown"),
    [
        (["A. liver", "B. spleen", "All of the above"], ("liver", "spleen", "All of the above")),
        (["B. spleen", "none of these", "A. liver"], ("liver", "spleen", "none of these")),
        (["(a) liver", "(b) spleen", "both"], ("liver", "spleen", "both")),
        (["A) liver", "spleen", "C) kidney"], ("liver", "spleen", "kidney")),
        (["A. liver", "B. spleen", "kidney"], ("liver", "spleen", "kidney")),
    ],
)
def test_letters_that_some_options_bring_are_not_shown(texts, shown):
    assert plain_options(texts) == shown
    for text in texts:
        found = choose(Options(tuple(texts)), text)
        assert found.options == shown
        assert text.endswith(shown[found.answer])


@pytest.mark.parametrize(
    ("answer", "said"), [("В", r"'\u0412', which only looks like 'B'"), ("sрleen", "looks like 'spleen'")]
)
def test_an_answer_in_letters_that_only_look_latin(answer, said):
    assert said in reason(list(ORGANS), answer)


def test_a_number_whose_meaning_nobody_has_said():
    said = reason(list(ORGANS), "2")
    assert "not among its options" in said
    assert re.search("from 0 .* 'kidney', .*from 1 .* 'spleen': .*--answer-index", said)
    # held as a number, beside options that are texts, it may be a place though it reads like an
    # option
    said = reason(["1", "2", "3", "4"], "2", number=True)
    assert "'2' as a text" in said
    assert "'3' counted from 0" in said
    assert chosen([1, 2, 3, 4], "2", number=True) == "2"
    assert chosen({"1": "liver", "2": "spleen"}, "2", number=True) == "spleen"
    assert chosen(["1. liver", "2. spleen"], "2", number=True) == "spleen"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"A": "liver", "a": "spleen"}, "key A twice, for 'liver' and 'spleen'"),
        ({"A": "liver", "A.": "spleen"}, "the key A twice"),
        ([("A", "liver"), ("A", "spleen")], "the key A twice"),
        ({"label": ["A", "A"], "text": ["liver", "spleen"]}, "the key A twice"),
        ({"label": ["A"], "text": ["liver", "spleen"]}, "1 names and 2 texts"),
        ({"A": "liver", "1": "spleen"}, "all by letters A to J"),
        ({"A": "liver", "B": "spleen", "note": "x"}, "all by letters A to J"),
        ({"A": "liver", "B": "Liver"}, "'liver' occurs more than once"),
        (["A. liver", "B. Liver"], "'liver' occurs more than once"),
        (["A. liver", "B. spleen", "C. liver"], "'liver' occurs more than once"),
        ({"A": "liver", "B": None}, "it has 1 option"),
        ({}, "it has 0 options"),
        ([None, None], "it has 0 options"),
        ({"A": ["liver"], "B": "spleen"}, "not a text"),
        ([["liver"], "spleen"], "not a text"),
        ("liver", "not a list"),
        (7, "not a list"),
        ({"A": "liver", "C": "spleen", "D": "A and C"}, "'A and C' refers to other"),
        ({"1": "liver", "2": "spleen", "3": "1 and 2"}, "'1 and 2' refers to other"),
        (["liver", "", "spleen", "A and B"], "'A and B' refers to other"),
    ],
)
def test_options_that_cannot_be_used(options, message):
    assert message in reason(options, "spleen" if "liver" in str(options) else "x")


def test_one_key_twice_in_a_cell():
    with pytest.raises(BadRowError, match=r"the key 'A' twice, for 'liver' and 'spleen'"):
        parse_options('{"A": "liver", "A": "spleen"}')


def test_options_that_name_letters_stay_where_all_letters_are_there():
    assert options_of({"B": "spleen", "C": "A and B", "A": "liver"}, "C") == ("liver", "spleen", "A and B")
    assert options_of(["A. liver", "B. spleen", "C. A and B"], "C") == ("liver", "spleen", "A and B")
    # by numbers they could not be read any more
    assert options_of(["1. liver", "2. spleen", "3. 1 and 2"], "3") == ("1. liver", "2. spleen", "3. 1 and 2")


@pytest.mark.parametrize(
    "options", [("B", "A", "C"), ("A", "B"), ("A) x", "x"), ("B. x", "y"), ("1", "0"), ("(A)", "A", "a.")]
)
def test_what_is_written_is_read_as_the_same(options):
    for place in range(len(options)):
        found = choose(Options(options), written_answer(options, place))
        assert (found.options, found.answer) == (options, place)


names = st.lists(st.sampled_from(LETTERS[:6]), min_size=2, max_size=5, unique=True)
texts = st.permutations(
    ["liver", "spleen", "kidney", "lung", "A", "B", "C", "2", "E. coli", "A. carotis", "all of the above"]
)


@given(names, texts, st.booleans(), st.data())
def test_a_letter_is_never_taken_for_another(names, texts, blanks, data):
    """Any keys in any order: the answer is the text of its key, or there is none."""
    options = dict(zip(names, texts, strict=False))
    if blanks:
        options = {letter: options.get(letter) for letter in LETTERS[:6]}
    answer = data.draw(st.sampled_from(names))
    try:
        found = choose(read_options(options, option_text), answer)
    except BadRowError:
        return
    # "E. coli" of the key E, beside "A. carotis" of the key A, brings its letter
    assert found.options[found.answer] in (options[answer], options[answer].removeprefix(f"{answer}. "))
    again = choose(Options(found.options), written_answer(found.options, found.answer))
    assert (again.options, again.answer) == (found.options, found.answer)


@given(st.permutations(range(4)), st.integers(0, 3), st.sampled_from(["{}. {}", "({}) {}", "{}: {}", "{}、{}"]))
def test_own_letters_in_any_order(order, right, form):
    labelled = [form.format(LETTERS[place], ORGANS[place]) for place in order]
    assert plain_options(labelled) == ORGANS
    for answer in (LETTERS[right], ORGANS[right], labelled[order.index(right)]):
        found = choose(Options(tuple(labelled)), answer)
        assert (found.options, found.answer) == (ORGANS, right)


def test_letters_written_a_thousand_times():
    assert plain_options(["A. " * 5000 + "liver", "B. " * 5000 + "spleen"]) == ("liver", "spleen")


@given(st.permutations(LETTERS[:5]), st.integers(2, 5), st.sampled_from(["{}. {}", "{}) {}", "{} - {}"]), st.data())
def test_own_letters_with_gaps_in_any_order(letters, count, form, data):
    """Any letters, anywhere: the answer is the option that brings its letter, or there is none."""
    meant = {letter: f"finding {letter}" for letter in letters[:count]}
    answer = data.draw(st.sampled_from(letters[:count]))
    try:
        found = choose(Options(tuple(form.format(letter, text) for letter, text in meant.items())), answer)
    except BadRowError:
        return
    assert found.options[found.answer].endswith(meant[answer])
