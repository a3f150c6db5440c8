from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from rewards.deadline import call_within
from rlmed.tasks.metrics.text import exact_match, normalise, recall, token_f1, tokens, yes_no
from tests.unit.rlmed.tasks.metrics.hostile import LONG, mixed, repeated

NORMALISED = {
    "Left Lung": "left lung",
    "the left lung": "left lung",
    "A mass in an area of the liver.": "mass in area of liver",
    "the": "the",
    "A": "a",
    "": "",
    "...": "",
    "!?;:/\\[]{}()=@`_<>,\"'": "",
    "x-ray": "x ray",
    "T2-weighted": "t2 weighted",
    "it isn't": "it isnt",
    "Crohn’s disease": "crohns disease",
    "patients' lungs": "patients lungs",
    "two nodules, TEN cysts": "2 nodules 10 cysts",
    "eleven": "eleven",
    "someone": "someone",
    "none": "none",
    "1.5 cm.": "1.5 cm",
    "5.": "5",
    ".5 cm": ".5 cm",
    "fig.5": "fig 5",
    "1,200 ml": "1200 ml",
    "1,200,000": "1200000",
    "1,2": "1 2",
    "12,34": "12 34",
    "-50 HU": "-50 hu",
    "−50 HU": "-50 hu",
    "10-15": "10 15",
    "HER2+, ER-": "her2+ er-",
    "HER2-positive": "her2 positive",
    "liver - left": "liver left",
    "50 %": "50 %",
    "left_lung": "left lung",
    " a \t\n lung ": "lung",
    "**Liver**": "liver",
    "```\nliver\n```": "liver",
    "<answer><answer>liver": "answer answer liver",
    r"\boxed{\text{liver}}": "liver",
    r"$\frac{1}{2}$": "1 2",
    r"$5\,\mathrm{mm}$": "5 mm",
    "ＬＥＦＴ　ｌｕｎｇ，１．５": "left lung 1.5",
    "左肺，下叶。": "左肺 下叶",
    "左 肺": "左 肺",
    "肝右葉「結節」": "肝右葉 結節",
    "हिन्दी में": "हिन्दी में",
    "Émphysème": "émphysème",
    "E\u0301mphyse\u0300me": "émphysème",
    "ОПУХОЛЬ лёгкого": "опухоль лёгкого",
    "soft\u00adware\u200b": "software",
    "\ufeffliver\x00": "liver",
    "liver\ud800": "liver",
    "NaN, Infinity, 1e400": "nan infinity 1e400",
    "😀 liver 😀": "liver",
}


@pytest.mark.parametrize(("text", "expected"), NORMALISED.items(), ids=range(len(NORMALISED)))
def test_texts_are_normalised(text: str, expected: str) -> None:
    assert normalise(text) == expected


def test_hostile_texts_are_normalised() -> None:
    texts = [*NORMALISED, *mixed(500, seed=4), *repeated(10_000)]
    for text in texts:
        normal = normalise(text)
        assert normal == " ".join(normal.split())
        assert not {*'[]{}()<>"\\,:;`$_\n\t\x00'} & {*normal}
        assert normal == normal.lower()


@given(st.text())
def test_what_is_normalised_has_tokens_that_stay(text: str) -> None:
    normal = normalise(text)
    assert Counter("".join(tokens(text))) == Counter(normal.replace(" ", ""))
    assert all(token and not token.isspace() for token in tokens(text))


def test_normalising_takes_linear_time() -> None:
    for text in [*repeated(LONG)[:70], "a" + "\u0301\u0316" * (LONG // 2)]:
        call_within(60, lambda text=text: normalise(text))  # something quadratic would take minutes


def test_runs_of_marks_are_cut_after_thirty() -> None:
    assert normalise("a" + "\u0316" * 1000 + "b") == "a" + "\u0316" * 30 + "b"


def test_each_chinese_character_is_a_token() -> None:
    assert tokens("左肺CT 扫描, two 結節") == ["左", "肺", "ct", "扫", "描", "2", "結", "節"]
    assert tokens("\U00020000かな") == ["\U00020000", "か", "な"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("yes", "yes"),
        ("No.", "no"),
        ("Yes, there is", "yes"),
        ("  **No**, it is normal", "no"),
        ("<answer>yes", None),
        ("no-one", "no"),
        ("not seen", None),
        ("none", None),
        ("yesterday", None),
        ("There is no fracture", None),
        ("ｙｅｓ", "yes"),
        ("", None),
        ("...", None),
        ("是", None),
    ],
)
def test_yes_and_no_are_read_from_the_beginning(text: str, expected: str | None) -> None:
    assert yes_no(text) == expected


@pytest.mark.parametrize(
    ("answer", "references", "expected"),
    [
        ("The Liver.", ["liver"], 1.0),
        ("liver", "the liver", 1.0),
        ("hepar", ["liver", "Hepar"], 1.0),
        ("left liver", ["liver"], 0.0),
        ("two", ["2"], 1.0),
        ("1,200", ["1200"], 1.0),
        ("5", ["-5"], 0.0),
        ("1.5", ["15"], 0.0),
        ("her2+", ["her2-"], 0.0),
        ("left lung", ["lung left"], 0.0),
        ("左 肺", ["左肺"], 1.0),
        ("右肺", ["左肺"], 0.0),
        ("Yes, there is", ["yes"], 1.0),
        ("no, yes", ["Yes."], 0.0),
        ("it is yes", ["yes"], 0.0),
        ("yes", ["yes, on the left"], 0.0),
        ("", ["liver"], 0.0),
        ("", [""], 0.0),
        ("...", ["!"], 0.0),
        ("+", [" + "], 1.0),
        ("the", ["a"], 0.0),
        ("a", ["A."], 1.0),
    ],
)
def test_exact_match(answer: str, references: list[str], expected: float) -> None:
    assert exact_match(answer, references) == expected


@pytest.mark.parametrize(
    ("answer", "references", "f1", "found"),
    [
        ("left lung", ["lung"], 2 / 3, 1.0),
        ("lung", ["left lung"], 2 / 3, 1 / 2),
        ("left left lung", ["left lung lung"], 4 / 6, 2 / 3),
        ("the left lung", ["a right lung", "LEFT lung!"], 1.0, 1.0),
        ("right kidney", ["left lung", "kidney stone seen"], 2 / 5, 1 / 3),
        ("左肺", ["左上肺"], 4 / 5, 2 / 3),
        ("", ["lung"], 0.0, 0.0),
        ("lung", [""], 0.0, 0.0),
        ("", [""], 0.0, 0.0),
    ],
)
def test_f1_and_recall_of_tokens(answer: str, references: list[str], f1: float, found: float) -> None:
    assert token_f1(answer, references) == pytest.approx(f1, abs=1e-15)
    assert recall(answer, references) == pytest.approx(found, abs=1e-15)


WORDS = st.lists(st.sampled_from(["liver", "lung", "left", "mass", "cyst", "2"]), min_size=1, unique=True)


@given(WORDS, WORDS)
def test_f1_of_distinct_tokens_equals_scikit_learn(answer: list[str], reference: list[str]) -> None:
    every = sorted({*answer, *reference})
    expected = f1_score([word in reference for word in every], [word in answer for word in every])
    assert token_f1(" ".join(answer), " ".join(reference)) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("score", [exact_match, token_f1, recall])
def test_without_references_there_is_no_score(score) -> None:
    with pytest.raises(ValueError, match="references="):
        score("liver", [])
