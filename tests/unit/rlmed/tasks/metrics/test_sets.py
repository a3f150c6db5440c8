from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import precision_recall_fscore_support

from rewards.deadline import call_within
from rlmed.tasks.metrics.sets import (
    macro_scores,
    micro_scores,
    parse_set,
    precision,
    read_synonyms,
    recall,
    sample_scores,
    set_f1,
)
from tests.unit.rlmed.tasks.metrics.hostile import LONG, mixed, repeated

KNOWN = ("cyst", "mass", "pleural effusion", "head and neck", "edema, cardiac", "5 mm nodule", "肿块", "stage: late")
SYNONYMS = {"cysts": "cyst", "Fluid & effusion": "pleural effusion", "hydrothorax": "Pleural Effusion", "cyst": "mass"}
TWO = ("cyst", "mass")

WRITTEN = {
    "cyst, mass": TWO,
    "cyst;mass": TWO,
    "cyst and mass": TWO,
    "cyst AND mass": TWO,
    "cyst, and mass": TWO,
    "Cyst\nMASS": TWO,
    "cyst, mass, cyst": TWO,
    "cyst,, mass,": TWO,
    "cysts, mass": TWO,
    "a cyst and the mass.": TWO,
    "- cyst\n- mass": TWO,
    "* cyst\n* mass": TWO,
    "1. cyst\n2. mass": TWO,
    "1) cyst\n2) mass": TWO,
    '["cyst", "mass"]': TWO,
    "['cyst', 'mass',]": TWO,
    '{"labels": ["cyst", "mass"]}': TWO,
    "Findings: cyst, mass": TWO,
    "**cyst**, **mass**": TWO,
    r"\text{cyst}, \text{mass}": TWO,
    "ｃｙｓｔ，ｍａｓｓ": TWO,
    "cyst、mass": TWO,
    "cyst和mass": TWO,
    "cyst以及mass": TWO,
    "[[[cyst]], mass]": TWO,
    "mass, cyst": ("mass", "cyst"),
    "肿块，cyst。": ("肿块", "cyst"),
    "head and neck": ("head and neck",),
    "mass and head and neck and cyst": ("mass", "head and neck", "cyst"),
    "cardiac edema; edema, cardiac": ("cardiac edema", "edema, cardiac"),
    "hydrothorax": ("pleural effusion",),
    "fluid and effusion": ("fluid", "effusion"),  # the synonym has another sign between
    "five mm nodule": ("5 mm nodule",),
    "stage: late": ("stage: late",),
    "none, cyst": ("none", "cyst"),
    "no cyst": ("no cyst",),
    "cystic": ("cystic",),
    "NaN, 1e400, -Infinity": ("nan", "1e400", "infinity"),
    "there is a cyst": ("there is cyst",),
    "left  lung/mass": ("left lung mass",),
    "-5": ("-5",),
}
AROUND = [
    "{}",
    " \n{}\n ",
    "```\n{}\n```",
    "```json\n{}```",
    "<answer>{}",
    "<answer><answer>{}</answer>",
    "<|im_start|>{}",
]
NOTHING = [
    "",
    " ",
    "none",
    "None.",
    "NONE\n",
    "[]",
    "[[]]",
    "{}",
    "- none",
    '["none"]',
    "```\nnone\n```",
    ",;\n",
    "...",
    "<b></b>",
]
assert len(WRITTEN) * len(AROUND) + len(NOTHING) > 290


@pytest.mark.parametrize("around", AROUND)
def test_labels_are_read_in_every_notation(around: str) -> None:
    read = {text: parse_set(around.replace("{}", text), KNOWN, SYNONYMS) for text in WRITTEN}
    assert read == WRITTEN


@pytest.mark.parametrize("text", NOTHING)
def test_none_is_no_label(text: str) -> None:
    assert parse_set(text, KNOWN) == ()


def test_none_may_be_a_label() -> None:
    assert parse_set("None", ["none", "cyst"]) == ("none",)


def test_without_known_labels_they_are_as_normalised() -> None:
    assert parse_set("The Left lung; two Cysts and X-ray") == ("left lung", "2 cysts", "x ray")


def test_a_known_label_is_no_synonym_and_a_synonym_may_be_unknown() -> None:
    assert parse_set("cyst, Tumour", ["cyst"], {"cyst": "mass", "tumour": "Neoplasm"}) == ("cyst", "Neoplasm")


def test_random_texts_give_distinct_labels() -> None:
    read = [parse_set(text, KNOWN, SYNONYMS) for text in [*mixed(2000, seed=3), *repeated(10_000)]]
    assert all(len({*labels}) == len(labels) and all(label.strip() for label in labels) for labels in read)
    assert any("cyst" in labels for labels in read)
    assert () in read


def test_reading_takes_linear_time() -> None:
    for text in repeated(LONG)[:70]:
        call_within(60, lambda text=text: parse_set(text, KNOWN, SYNONYMS))  # something quadratic would take minutes


@pytest.mark.parametrize(
    ("predicted", "truth", "expected"),
    [
        ((), (), (1.0, 1.0, 1.0)),
        (("a",), (), (0.0, 0.0, 0.0)),
        ((), ("a",), (0.0, 0.0, 0.0)),
        (("a", "b"), ("a", "c", "d"), (1 / 2, 1 / 3, 2 / 5)),
        (("a", "a", "a"), ("a",), (1.0, 1.0, 1.0)),
        (["b", "a"], {"a", "b"}, (1.0, 1.0, 1.0)),
    ],
)
def test_scores_by_hand(predicted, truth, expected: tuple[float, float, float]) -> None:
    assert (precision(predicted, truth), recall(predicted, truth), set_f1(predicted, truth)) == expected


LABELS = [f"label {number}" for number in range(9)]


def random_rows(seed: int) -> tuple[np.ndarray, np.ndarray, list[tuple[list[str], list[str]]]]:
    """Predicted and true labels, [rows, labels] and as lists; the last label is never seen.

    The first row has none on either side, which is 1 here and 0 in scikit-learn.
    """
    source = np.random.default_rng(seed)
    shares = source.uniform(0.02, 0.6, len(LABELS))
    truth = source.random((80, len(LABELS))) < shares
    predicted = truth ^ (source.random(truth.shape) < 0.15)
    truth[:, -1] = predicted[:, -1] = truth[0] = predicted[0] = False

    def named(row: np.ndarray) -> list[str]:
        return [LABELS[place] for place in np.flatnonzero(row)]

    return predicted, truth, [(named(one), named(other)) for one, other in zip(predicted, truth, strict=True)]


@pytest.mark.parametrize("seed", range(5))
def test_scores_equal_scikit_learn(seed: int) -> None:
    predicted, truth, rows = random_rows(seed)
    seen = (predicted | truth).any(axis=0)

    def expected(average: str, keep: slice | np.ndarray, labels: np.ndarray) -> tuple[float, ...]:
        return precision_recall_fscore_support(
            truth[keep][:, labels], predicted[keep][:, labels], average=average, zero_division=0.0
        )[:3]

    everything = np.ones(len(LABELS), dtype=bool)
    # 1e-12: means and quotients of a few hundred numbers up to 1, see CONTRIBUTING.md
    assert micro_scores(rows) == pytest.approx(expected("micro", slice(None), everything), abs=1e-12)
    assert macro_scores(rows) == pytest.approx(expected("macro", slice(None), seen), abs=1e-12)
    assert macro_scores(rows, LABELS) == macro_scores(rows)
    some = np.arange(len(LABELS)) < 4
    assert macro_scores(rows, LABELS[:4]) == pytest.approx(expected("macro", slice(None), some), abs=1e-12)
    kept = (predicted | truth).any(axis=1)
    nonempty = [row for row, keep in zip(rows, kept, strict=True) if keep]
    assert sample_scores(nonempty) == pytest.approx(expected("samples", kept, everything), abs=1e-12)
    assert sample_scores(rows).f1 == pytest.approx(
        precision_recall_fscore_support(truth, predicted, average="samples", zero_division=1.0)[2], abs=1e-12
    )


def test_an_invented_label_counts_unless_labels_are_given() -> None:
    rows = [(("cyst", "invented"), ("cyst",))]
    assert macro_scores(rows).f1 == 0.5
    assert macro_scores(rows, ["cyst", "mass"]).f1 == 1.0
    assert micro_scores(rows).f1 == pytest.approx(2 / 3, abs=1e-15)


def test_rows_without_labels() -> None:
    assert micro_scores([((), ()), ((), ())]) == micro_scores([]) == (1.0, 1.0, 1.0)
    assert sample_scores([((), ())]) == (1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="labels"):
        macro_scores([((), ())])
    with pytest.raises(ValueError, match="rows"):
        sample_scores([])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", '{"cysts": "cyst", "Fluid, free": "effusion", "肿瘤": "mass"}'),
        ("a.JSON", '\ufeff{"cysts": "cyst", "cysts ": "cyst", " Fluid, free": "effusion", "肿瘤": "mass"}'),
        ("a.csv", 'cysts,cyst\n"Fluid, free", effusion\n\n肿瘤,mass\n'),
        ("a.txt", '\ufeffcysts , cyst\r\n"Fluid, free",effusion\r\n肿瘤,mass\r\ncysts,cyst'),
    ],
)
def test_synonyms_are_read(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    synonyms = read_synonyms(tmp_path / name)
    assert synonyms == {"cysts": "cyst", "Fluid, free": "effusion", "肿瘤": "mass"}
    assert parse_set("free cysts; CYSTS; fluid, free", (), synonyms) == ("free cysts", "cyst", "effusion")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", b"[1]", "object"),
        ("a.json", b"{", "object"),
        ("a.json", b"[" * 100_000, "object"),
        ("a.json", b'{"cysts": ["cyst"]}', "'cysts'"),
        ("a.json", b'{"cysts": ""}', "'cysts'"),
        ("a.json", b'{"cysts": "cyst", "cysts": "mass"}', "'mass'"),
        ("a.csv", b"cysts,cyst\ncysts,mass", "line 2: 'cysts'"),
        ("a.csv", b"cysts,cyst\ncysts", "line 2: 1 columns"),
        ("a.csv", b"a,b,c", "line 1: 3 columns"),
        ("a.csv", b",b", "line 1"),
        ("a.csv", b"\xff\xfe", "UTF-8"),
        ("a.csv", None, "a.csv"),
    ],
)
def test_a_file_that_holds_no_synonyms_is_refused(name: str, content: bytes | None, said: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said) as raised:
        read_synonyms(tmp_path / name)
    assert name in str(raised.value)
