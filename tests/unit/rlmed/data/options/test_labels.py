"""Which beginnings of option texts are letters of their own, and which are part of the text."""

import pytest

from rlmed.data.options.choices import Choice, choose, plain_options
from rlmed.data.options.labels import Label, bare_name, key_name, own_label
from rlmed.data.options.sources import Options

TEXTS = ("liver", "spleen", "kidney")


@pytest.mark.parametrize(
    "form",
    [
        "{A}. {x}", "{A}) {x}", "({A}) {x}", "{A}: {x}", "[{A}] {x}", "{A} - {x}", "{A} – {x}", "{A}.{x}", "{A}:{x}",
        "{A}){x}", "({A}){x}", "{A}.) {x}", "{A}． {x}", "{A}．{x}", "{A}、{x}", "（{A}）{x}", "{A}）{x}", "【{A}】{x}",
        "{A}：{x}",
        "Option {A}: {x}", "choice {A}. {x}", "  {A} .  {x} ", "{A}\t{x}", "{A}- {x}", "{{{A}}} {x}", "<{A}> {x}",
        "{A}. {A}. {x}",
        "({A}) {A}. {x}", "**{A}.** {x}", "**{A})** {x}", "**{A}. {x}**", "__{A}__. {x}", "*{A}.* {x}", "`{A}`: {x}",
        "\"{A}\": {x}", "'{A}'. {x}", "• {A}. {x}", "- {A}) {x}", "* **{A}**: {x}", "{A}/ {x}",
    ],
)  # fmt: skip
@pytest.mark.parametrize("letters", ["ABC", "abc", "ＡＢＣ"])
def test_forms_of_letters_that_all_options_have(form, letters):
    assert plain_options([form.format(A=letter, x=text) for letter, text in zip(letters, TEXTS, strict=True)]) == TEXTS


@pytest.mark.parametrize(
    "form", ["{n}. {x}", "{n}) {x}", "({n}) {x}", "[{n}] {x}", "{n}: {x}", "{n}、{x}", "{n}．{x}", "{n}.) {x}"]
)
@pytest.mark.parametrize("numbers", ["123", "012", "１２３", ("01", "02", "03")])
def test_forms_of_numbers_that_all_options_have(form, numbers):
    assert plain_options([form.format(n=number, x=text) for number, text in zip(numbers, TEXTS, strict=True)]) == TEXTS


@pytest.mark.parametrize("form", ["{n}. {x}", "{n}) {x}", "({n}) {x}", "{n}: {x}", "{n}、{x}", "({n}). {x}", "{n}.{x}"])
@pytest.mark.parametrize(
    "names",
    [("I", "II", "III"), ("i", "ii", "iii"), "АБВ", "абв", "ΑΒΓ", "αβγ", "甲乙丙", "가나다"],
    ids=["roman", "small roman", "cyrillic", "small cyrillic", "greek", "small greek", "stems", "hangul"],
)
def test_options_counted_in_another_way(form, names):
    written = [form.format(n=name, x=text) for name, text in zip(names, TEXTS, strict=True)]
    assert plain_options(written) == TEXTS
    assert plain_options(written[::-1]) == TEXTS
    for place, answer in enumerate([names[0], f"({names[1]})", written[2]]):
        assert choose(Options(tuple(written)), answer) == Choice(TEXTS, place, same_letters=True)
    assert choose(Options(tuple(written)), "B").answer == 1  # as they are shown


@pytest.mark.parametrize("names", ["①②③", "ⒶⒷⒸ", "ⓐⓑⓒ", "⒈⒉⒊", "⑴⑵⑶", "⒜⒝⒞", "🄰🄱🄲"])
@pytest.mark.parametrize("form", ["{n} {x}", "{n}{x}"])
def test_signs_that_hold_a_letter_or_number(names, form):
    written = [form.format(n=name, x=text) for name, text in zip(names, TEXTS, strict=True)]
    assert plain_options(written) == plain_options(written[::-1]) == TEXTS
    assert choose(Options(tuple(written)), names[1]).answer == 1


def test_ten_options_with_numbers():
    assert plain_options([f"{n}. finding {n}" for n in range(1, 11)]) == tuple(f"finding {n}" for n in range(1, 11))


@pytest.mark.parametrize("texts", [("C. kidney", "A. liver", "B. spleen"), ("(3) kidney", "(1) liver", "(2) spleen")])
def test_letters_in_another_order_are_followed(texts):
    assert plain_options(texts) == TEXTS


@pytest.mark.parametrize(
    "texts",
    [
        ("A. carotis", "A. femoralis"),
        ("C. difficile", "E. coli"),
        ("E. coli", "C. difficile", "S. aureus"),
        ("B. fragilis", "C. difficile", "E. coli"),
        ("T1 weighted", "T2 weighted"),
        ("A. liver", "spleen"),
        ("A. liver", "spleen", "C. kidney"),
        ("A. carotis", "vena cava", "C. spine"),
        ("A. baumannii", "B. cereus", "Candida", "E. coli"),
        ("1. liver", "2. spleen", "both 1 and 2"),
        ("C. mass", "D. mass"),
        ("A-mode", "B-mode"),
        ("A line", "B line"),
        ("A", "B", "C", "D"),
        ("A.", "B."),
        ("1.5 cm", "2.0 cm", "3.2 cm"),
        ("1:10", "2:5"),
        ("1 - 2 cm", "2 - 4 cm"),
        ("1 - 2 cm", "2 - 3 cm"),
        ("1:10", "2:10"),
        ("1. Rippe", "2. Rippe"),
        ("1/2", "2/3"),
        ("A, B", "B, C"),
        ("A、B", "B、C"),
        ("A - B", "B - C"),
        ("A and B", "B and C"),
        ("A. liver", "2. spleen"),
        ("Ascites", "Bleeding"),
        ("D. melanogaster", "A. baumannii"),
        ("1. liver", "2. spleen", "3. both 1 and 2"),
        ("II", "III", "V"),
        ("I. liver", "III. spleen"),
        ("V. cava", "I. liver"),
        ("- liver", "- spleen"),
        ("*liver*", "*spleen*"),
        ("**liver**", "**spleen**"),
        ("α-fetoprotein", "β-hCG"),
        ("¹H", "³¹P"),
    ],
)  # fmt: skip
def test_texts_that_only_look_so_survive(texts):
    assert plain_options(texts) == texts


def test_names():
    assert own_label("(b) spleen") == Label("B", "spleen", sure=True)
    assert own_label("B. spleen") == Label("B", "spleen", sure=False)
    assert [own_label(text) for text in ("", "B", "K. x", "liver", "AB. x", "11. x")] == [None] * 6
    assert [bare_name(text) for text in ("B", "b", "(B)", "B.", "B)", "Option B", "answer: b", "Ｂ", "2")] == [
        *["B"] * 8,
        "2",
    ]
    assert [bare_name(text) for text in ("", "AB", "E. coli", "liver", "K", "11", "optional", "B and C")] == [None] * 8
    keys = ("A", "a", " a ", "option_a", "Option A", "choice-a", "A.", "(A)", "opa", "Ａ")
    assert [key_name(key) for key in keys] == ["A"] * len(keys)
    assert [key_name(key) for key in ("1", "01", "option_1", "choice 1", "10")] == ["1", "1", "1", "1", "10"]
    assert [key_name(key) for key in ("First", "note", "K", "2²")] == ["first", "note", "k", "22"]
