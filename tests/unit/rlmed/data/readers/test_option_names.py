"""Each way in keeps the answer by letter, key or column, and removes options' own letters."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from rlmed.core.types import Example
from rlmed.data.examples import parse_row, read_examples
from rlmed.data.prepare.prepared_data import write_prepared_data
from rlmed.data.readers.base import Picture, Reader, Skipped, SourceRow
from rlmed.data.readers.formats import csv_table, huggingface
from rlmed.data.readers.published import medvlm_r1, omnimedvqa
from rlmed.data.readers.volumes import picture_table

LABELLED = ["A. liver", "B. spleen", "C. kidney", "D. lung"]


def cells(path: Path, header: list[str], *lines: list[str]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *lines])
    return path


def written(reader: Reader, rows: Any, folder: Path) -> tuple[list[str], list[str]]:
    """Right texts and reasons of what a run reads of the rows."""
    layout = write_prepared_data(rows, folder, reader=reader, source=folder.parent, options={})
    examples = [row for name in layout.splits for row in read_examples(folder / f"{name}.jsonl").examples]
    assert sum(split.rows for split in layout.splits.values()) == len(examples)
    return [row.options[row.answer] for row in examples], [skip.reason for skip in layout.skipped]


def mapped(tmp_path: Path, mapping: Any, *answers: str) -> list[SourceRow | Skipped]:
    lines = [["Which?", json.dumps(mapping) if not isinstance(mapping, str) else mapping, answer] for answer in answers]
    path = cells(tmp_path / "q.csv", ["question", "options", "answer"], *lines)
    return list(csv_table.read(path, without_images=True))


def test_a_mapping_with_a_gap_in_a_cell(tmp_path):
    rows = [
        ["Which?", '{"A": "liver", "C": "spleen", "D": "kidney"}', "C"],
        ["Which?", '{"A": "liver", "B": "lung", "C": "spleen", "D": "kidney"}', "C"],
        ["Which?", '{"B": "lung", "C": "spleen"}', "B"],
        ["Which?", '{"A": "liver", "B": null, "C": "spleen"}', "B"],
        ["Which?", '{"A": "liver", "A": "spleen", "B": "lung"}', "A"],
        ["Which?", '{"D": "kidney", "A": "liver", "C": NaN, "B": "lung"}', "b"],
        ["Which?", '{"2": "kidney", "10": "liver", "1": "lung"}', "10"],
    ]
    path = cells(tmp_path / "q.csv", ["question", "options", "answer"], *rows)
    texts, reasons = written(csv_table.READER, csv_table.read(path, without_images=True), tmp_path / "out")
    assert texts == ["spleen", "spleen", "lung", "lung", "liver"]
    assert len(reasons) == 2
    assert "'B' is missing by its key" in reasons[0]
    assert "the key 'A' twice, for 'liver' and 'spleen'" in reasons[1]


@pytest.mark.parametrize(
    ("header", "line", "answer", "right"),
    [
        (["A", "B", "D"], ["liver", "spleen", "kidney"], "D", "kidney"),
        (["A", "B", "C", "D"], ["liver", "", "spleen", "kidney"], "C", "spleen"),
        (["A", "B", "C", "D"], ["liver", "NaN", "spleen", "kidney"], "D", "kidney"),
        (["D", "C", "B", "A"], ["kidney", "spleen", "lung", "liver"], "B", "lung"),
        (["option_a", "option_c"], ["liver", "spleen"], "C", "spleen"),
        (["Choice B", "Choice C"], ["liver", "spleen"], "B", "liver"),
        (["A", "B"], ["A. liver", "B. spleen"], "B. spleen", "spleen"),
        (["A", "C", "D"], ["A. liver", "C. spleen", "D. kidney"], "C", "spleen"),
        (["A", "B", "C"], ["liver", "spleen", "E. coli"], "C", "E. coli"),
    ],
)
def test_columns_are_called_by_their_letters(tmp_path, header, line, answer, right):
    path = cells(tmp_path / "q.csv", ["question", *header, "answer"], ["Which?", *line, answer])
    texts, reasons = written(csv_table.READER, csv_table.read(path, without_images=True), tmp_path / "out")
    assert (texts, reasons) == ([right], [])


def test_columns_that_the_user_names_have_gaps_too(tmp_path):
    path = cells(tmp_path / "q.csv", ["question", "eins", "drei", "answer"], ["Which?", "liver", "spleen", "C"])
    (row,) = csv_table.read(path, without_images=True, column=["option_a=eins", "option_c=drei"])
    assert (row.options, row.answer) == (("liver", "spleen"), "spleen")


def test_two_columns_of_one_letter(tmp_path):
    path = cells(tmp_path / "q.csv", ["question", "A", "B", "a", "answer"], ["Which?", "liver", "spleen", "lung", "A"])
    with pytest.raises(ValueError, match="option A, 'A' and 'a'"):
        list(csv_table.read(path, without_images=True))


@pytest.mark.parametrize(
    ("cell", "answer", "reason"),
    [
        ('["liver", null, "spleen", "kidney"]', "C", "'kidney' by .* and 'spleen' .* in the source"),
        ('["B", "A", "C"]', "B", "'B' as a text and 'A' by .*position"),
        ('["liver", "spleen", "kidney"]', "2", "from 0 .* 'kidney', .*from 1 .* 'spleen': "),
        ('{"A": "B. spleen", "B": "A. liver"}', "A", "'spleen' by its key .*'liver' .*own letters"),
    ],
)
def test_a_doubtful_row_is_left_out_with_both_readings(tmp_path, cell, answer, reason):
    (skip,) = mapped(tmp_path, cell, answer)
    assert isinstance(skip, Skipped)
    assert re.search(reason, skip.reason)


def test_options_that_bring_their_letters_are_shown_with_one(tmp_path):
    rows = mapped(tmp_path, LABELLED, "A", "B", "C. kidney", "lung")
    texts, reasons = written(csv_table.READER, rows, tmp_path / "out")
    assert (texts, reasons) == (["liver", "spleen", "kidney", "lung"], [])
    (example, *_) = read_examples(tmp_path / "out" / "q.jsonl").examples
    assert example.question_text == "Which?\nA) liver\nB) spleen\nC) kidney\nD) lung"


@pytest.mark.parametrize(
    ("options", "answer", "expected"),
    [
        (LABELLED, "C", ("liver", "spleen", "kidney", "lung")),
        (["B. spleen", "A. liver"], "B", ("liver", "spleen")),
        (["A. carotis", "A. femoralis"], "B", ("A. carotis", "A. femoralis")),
        ({"A": "liver", "C": "spleen"}, "C", ("liver", "spleen")),
        ({"2": "spleen", "1": "liver"}, "2", ("liver", "spleen")),
    ],
)
def test_a_handwritten_line(tmp_path, options, answer, expected):
    (tmp_path / "q.jsonl").write_text(json.dumps({"question": "Which?", "options": options, "answer": answer}))
    (example,) = read_examples(tmp_path / "q.jsonl").examples
    assert example.options == expected
    right = {"C": expected[-1] if len(expected) == 2 else expected[2], "B": expected[1], "2": "spleen"}
    assert example.options[example.answer] == right[answer]


def test_a_key_twice_in_a_line_costs_the_line(tmp_path):
    good = '{"question": "Which?", "options": ["liver", "spleen"], "answer": "A"}'
    twice = '{"question": "Which?", "options": {"A": "liver", "A": "lung", "B": "spleen"}, "answer": "A"}'
    answers = '{"question": "Which?", "options": ["liver", "spleen"], "answer": "A", "answer": "B"}'
    (tmp_path / "q.jsonl").write_text(f"{good}\n{twice}\n{answers}\n")
    read = read_examples(tmp_path / "q.jsonl")
    assert len(read.examples) == 1
    assert [(skip.line, skip.id) for skip in read.skipped] == [(2, "q-2"), (3, "q-3")]
    assert "'A' twice, for 'liver' and 'lung'" in read.skipped[0].reason
    assert "'answer' twice, for 'A' and 'B'" in read.skipped[1].reason


def test_a_written_completion_names_the_letters_that_are_shown():
    row = {"question": "Which?", "answer": "C", "completion": "<think>x</think><answer>C</answer>"}
    whole = {"C": "kidney", "A": "liver", "B": "spleen"}
    _, example = parse_row({**row, "options": whole}, "1", Path())
    assert isinstance(example, Example)
    assert example.letter == "C"
    _, reason = parse_row({**row, "options": {"A": "liver", "C": "kidney"}}, "1", Path())
    assert "letters in its completion have" in str(reason)


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    struct = [
        {"A": "liver", "B": None, "C": "spleen", "D": "kidney"},
        {"A": "liver", "B": "lung", "C": "spleen", "D": "kidney"},
        {"A": None, "B": "lung", "C": "spleen", "D": None},
        {"A": "liver", "B": None, "C": "spleen", "D": None},
    ]
    pairs = pyarrow.array(
        [[("D", "kidney"), ("A", "liver"), ("C", "spleen")]], pyarrow.map_(pyarrow.string(), pyarrow.string())
    )
    numbered = pyarrow.array(
        [[(3, "kidney"), (1, "liver"), (2, "spleen")]], pyarrow.map_(pyarrow.int64(), pyarrow.string())
    )
    tables = {
        "a": {"question": ["Which?"] * 4, "options": struct, "answer": ["C", "C", "B", "B"]},
        "b": {"question": ["Which?"], "options": pairs, "answer": ["D"]},
        "c": {"question": ["Which?"], "options": [{"label": ["A", "C"], "text": ["liver", "spleen"]}], "answer": ["C"]},
        "d": {
            "question": ["Which?"] * 2,
            "options": [LABELLED, [*LABELLED[1::-1], *LABELLED[2:]]],
            "answer": ["B", "B"],
        },
        "e": {"question": ["Which?"], "options": [["1", "2", "3", "4"]], "answer": [2]},
        "f": {"question": ["Which?"], "options": [[1, 2, 3, 4]], "answer": [2]},
        "g": {"question": ["Which?"], "options": numbered, "answer": [2]},
        "h": {"question": ["Which?"], "A": ["liver"], "B": [float("nan")], "C": ["spleen"], "answer": ["C"]},
    }
    for name, columns in tables.items():
        if name == "h":
            columns["B"] = pyarrow.array([float("nan")])
        parquet.write_table(pyarrow.table(columns), tmp_path / f"{name}.parquet")
    rows = huggingface.read(tmp_path, without_images=True)
    texts, reasons = written(huggingface.READER, rows, tmp_path / "out")
    assert texts == ["spleen", "spleen", "lung", "kidney", "spleen", "spleen", "spleen", "2", "spleen", "spleen"]
    assert len(reasons) == 2
    assert "'B' is missing by its key" in reasons[0]
    assert "'2' is '2' as a text and '3' counted" in reasons[1]


def test_omnimedvqa(tmp_path):
    folder = tmp_path / "QA_information" / "Open-access"
    folder.mkdir(parents=True)
    common = {"question": "Which?", "image_path": "x.png", "modality_type": "CT"}
    gap = {"option_A": "liver", "option_B": None, "option_C": "spleen", "option_D": "kidney"}
    rows = [
        {**common, **gap, "gt_answer": "C"},
        {**common, **gap, "gt_answer": "spleen"},
        {**common, **dict(zip(gap, LABELLED, strict=True)), "gt_answer": "spleen"},
        {**common, **gap, "gt_answer": "B"},
        {**common, "option_A": "B", "option_B": "A", "gt_answer": "A"},
    ]
    (folder / "a.json").write_text(json.dumps(rows))
    texts, reasons = written(omnimedvqa.READER, omnimedvqa.read(tmp_path, without_images=True), tmp_path / "out")
    assert texts == ["spleen"] * 3
    assert "its answer 'B' is missing" in reasons[0]
    assert "'A' as a text and 'B' by its" in reasons[1]


def test_medvlm_r1(tmp_path):
    def row(options: Any, answer: str, letter: str) -> dict[str, Any]:
        return {"question": "Which?", "options": options, "answer": answer, "solution": letter, "subset": "CT"}

    shown = "Which?\nA) A. liver\nB) B. spleen\nC) C. kidney\nD) D. lung"
    rows = [
        {**row(LABELLED, "B. spleen", "B"), "problem": shown},
        row(["B. spleen", "A. liver"], "B. spleen", "B"),
        row({"A": "liver", "C": "spleen"}, "spleen", "C"),
        row(["liver", "", "spleen", "kidney"], "spleen", "C"),
    ]
    (tmp_path / "test.json").write_text(json.dumps(rows))
    texts, reasons = written(
        medvlm_r1.READER, medvlm_r1.read(tmp_path / "test.json", without_images=True), tmp_path / "out"
    )
    assert texts == ["spleen"] * 3
    assert "'kidney' by its position and 'spleen' by" in reasons[0]


def test_tables_of_volumes(tmp_path):
    """The tables of DICOM and NIfTI files, whose pictures are made elsewhere."""
    (tmp_path / "1.dcm").write_bytes(b"x")
    header = ["file", "question", "A", "B", "C", "D", "answer"]
    lines = [["1.dcm", "Which?", "liver", "", "spleen", "kidney", "C"], ["1.dcm", "Which?", *LABELLED, "D"]]
    cells(tmp_path / "questions.csv", header, *lines)
    choice = picture_table.PictureChoice((1,), lambda: Image.new("L", (40, 40)))
    rows = list(
        picture_table.read_picture_table(
            tmp_path, lambda *_: [choice], (), questions=None, column=(), answer_index=None, split=None
        )
    )
    assert [row.answer for row in rows] == ["spleen", "lung"]
    assert rows[1].options == ("liver", "spleen", "kidney", "lung")
    assert all(isinstance(row.image, Picture) for row in rows)
