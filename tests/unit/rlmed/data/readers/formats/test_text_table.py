"""Every table line is one row or one skip, whatever is wrong; an unclosed mark costs its line."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlmed.data.prepare.prepared_data import write_prepared_data
from rlmed.data.readers.base import Skipped
from rlmed.data.readers.formats import csv_table
from rlmed.data.readers.formats.csv_table import READER, read
from rlmed.data.readers.formats.text_table import TableRow, read_table
from rlmed.data.readers.published import pmc_vqa

HEADER = "image,question,A,B,answer"


def records(tmp_path: Path, text: str, name: str = "q.csv", delimiter: str | None = None) -> list[TableRow]:
    (tmp_path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    return list(read_table(tmp_path / name, delimiter)[1])


def good(number: int) -> str:
    return f"{number}.png,Question {number}?,liver,lung,lung"


def questions(rows: list[TableRow]) -> list[str]:
    """The question of each row, or the line and its fault."""
    return [f"{row.line}: {row.reason}" if row.reason else str(row.record["question"]) for row in rows]


@pytest.mark.parametrize("place", range(6))
def test_a_mark_that_is_not_closed_costs_its_own_line(tmp_path, place):
    lines = [good(number) for number in range(6)]
    lines[place] = lines[place].replace("Q", '"Q')
    rows = records(tmp_path, "\n".join([HEADER, *lines]) + "\n")
    assert len(rows) == 6
    assert [row.line for row in rows if row.reason] == [place + 2]
    assert re.search(rf"\bline {place + 2}\b.* end of ", str(rows[place].reason))


@pytest.mark.parametrize(
    "faults",
    [
        {1: ("Q", '"Q'), 4: ("Q", '"Q')},  # closed by the mark that opens the next one
        {1: ("Q", '"Q'), 4: ("?", '?"')},  # closed by one that ends a cell: a row by its commas
        {1: ("Q", '"Q'), 2: ("?", '?"')},
        {1: (",liver,lung,lung", ',liver,lung,"lung'), 5: ("lung", 'lung"')},
        {1: ("1.png", '"1.png'), 3: ("Question 3?", '"Question, 3?"')},
        {0: ("0.png", '"0.png'), 5: ("5.png", '5.png"')},
    ],
)
def test_a_mark_that_another_one_closes_takes_no_rows_along(tmp_path, faults):
    lines = [good(number) for number in range(6)]
    for place, (old, new) in faults.items():
        lines[place] = lines[place].replace(old, new, 1)
    rows = records(tmp_path, "\n".join([HEADER, *lines]))
    assert [row.line for row in rows] == [2, 3, 4, 5, 6, 7]
    sound = [number for number in range(6) if number not in faults]
    assert [questions(rows)[number] for number in sound] == [f"Question {number}?" for number in sound]
    first = min(faults)
    assert re.search(rf"\bline {first + 2}\b", rows[first].reason)


@pytest.mark.parametrize(
    "text",
    [
        "Look:\nwhich organ?",
        "Findings: a, b, c, d and e\n\n(see, if you can, the left, or right, side)\nWhich?",
        'He said "which",\r\nand left',
        "1,5 cm\n2,5 cm",
        "\n",
        "a\rb",
        ";\t|\n;",
        '"quoted"\n"lines"\n',
    ],
)
def test_a_text_of_several_lines_is_one_row(tmp_path, text):
    file = io.StringIO()
    csv.writer(file).writerows([["1.png", text, "liver", "lung", "lung"], ["2.png", "After?", "liver", "lung", "lung"]])
    rows = records(tmp_path, HEADER + "\n" + file.getvalue())
    assert questions(rows) == [text, "After?"]


def test_a_row_of_several_lines_with_too_few_cells_is_one_bad_row(tmp_path):
    rows = records(tmp_path, f'{HEADER}\n1.png,"Which\norgan?",liver,lung\n{good(2)}\n')
    assert questions(rows) == [
        "2: it has 4 cells, and the header has 5: it is cut, or cells are missing",
        "Question 2?",
    ]


@pytest.mark.parametrize("cell", ['5" disc', 'a "b" c', "it's", '"a ""b"" c"', '"a\tb"'])
def test_marks_within_a_cell(tmp_path, cell):
    rows = records(tmp_path, f"{HEADER}\n1.png,{cell},liver,lung,lung\n{good(2)}\n")
    assert questions(rows) == [next(csv.reader([cell]))[0], "Question 2?"]


@pytest.mark.parametrize("cell", ['"5" disc"', '"a" b', '"a"b"'])
def test_text_behind_a_closing_mark_costs_its_line(tmp_path, cell):
    first, second = records(tmp_path, f"{HEADER}\n1.png,{cell},liver,lung,lung\n{good(2)}\n")
    assert "text follows a closing" in first.reason
    assert second.record["question"] == "Question 2?"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_of_all_systems_and_blank_lines(tmp_path, end):
    rows = records(tmp_path, end.join([HEADER, good(1), "", good(2), "  ", ",,,,", good(3), "", ""]))
    assert [row.line for row in rows] == [2, 4, 6, 7]
    assert [row.blank for row in rows] == [False, False, True, False]


@pytest.mark.parametrize("separator", ["\u2028", "\x85", "\x0b", "\x0c", "\x1e"])
def test_what_is_no_line_end_stays_in_its_cell(tmp_path, separator):
    (row,) = records(tmp_path, f"{HEADER}\n1.png,a{separator}b,liver,lung,lung\n")
    assert row.record["question"] == f"a{separator}b"


@pytest.mark.parametrize(
    "header",
    [
        'image,"question,A,B,answer',
        '"image,question,A,B,answer',
        'image,question,A,B,"answer',
        '"image"x,question,A,B,answer',
    ],
)
def test_a_mark_that_is_not_closed_in_the_header_is_an_error(tmp_path, header):
    for last in (good(3), good(3).replace("?", '?"'), good(3) + '"'):
        with pytest.raises(ValueError, match=r"q\.csv: .*first line .*quotation mark"):
            records(tmp_path, "\n".join([header, good(1), good(2), last]))


def test_a_header_of_several_lines_is_one(tmp_path):
    rows = records(tmp_path, f'image,question,A,B,answer,"what\nelse"\n{good(1)},x\n')
    assert rows[0].record["what\nelse"] == "x"


def test_tables_put_behind_each_other(tmp_path):
    rows = records(tmp_path, f"\ufeff{HEADER}\n{good(1)}\n{HEADER}\n{good(2)}\n")
    assert questions(rows) == ["Question 1?", "3: it repeats the names of the columns: remove the line", "Question 2?"]


def test_the_summary_and_the_manifest_add_up(tmp_path, capsys):
    lines = [HEADER, good(1), good(2).replace("Q", '"Q'), *(good(n) for n in range(3, 11)), ",,,,", "", "11.png,short"]
    path = tmp_path / "q.csv"
    path.write_text("\n".join(lines))
    layout = write_prepared_data(
        read(path, without_images=True), tmp_path / "out", reader=READER, source=path, options={}, leakage=False
    )
    assert (layout.read, layout.written, layout.bad, layout.by_choice) == (12, 9, 2, 1)


PIECES = st.sampled_from([*'ab1" \n\r\0\u2028\ufeff\x85?', ", ", "; ", "\t "])
CELLS = st.lists(PIECES, max_size=6).map("".join)
DELIMITERS = {",": "q.csv", ";": "q.csv", "\t": "q.tsv"}


def physical_lines(text: str) -> list[str]:
    return io.StringIO(text, newline="").readlines()


def check_every_line_is_accounted_for(path: Path, delimiter: str | None) -> None:
    lines = physical_lines(path.read_bytes().decode("utf-8"))
    header, found = read_table(path, delimiter)
    rows = list(found)
    assert len(header) >= 1
    starts = [row.line for row in rows]
    assert starts == sorted(set(starts))
    covered = set()
    for row, after in zip(rows, [*starts, len(lines) + 1][1:], strict=True):
        span = range(row.line, after)
        filled = [line for line in span if lines[line - 1].strip()]
        # several lines are one row only where the line ends are within its cells
        breaks = sum(len(physical_lines(str(cell) + "x")) - 1 for cell in row.record.values())
        whole = not row.reason or row.blank or "cells, and the header" in row.reason
        assert len(filled) == 1 or whole, row
        assert row.reason or len(filled) <= breaks + 1, row
        covered |= {*filled}
    assert covered == {number for number, line in enumerate(lines, 1) if line.strip()} - {1}


@settings(max_examples=150, deadline=None)
@given(delimiter=st.sampled_from([*DELIMITERS]), text=st.text(st.sampled_from('ab1", \n\r;\t\u2028?'), max_size=80))
def test_any_text_behind_a_header(tmp_path_factory, delimiter, text):
    path = tmp_path_factory.mktemp("any") / DELIMITERS[delimiter]
    path.write_text(delimiter.join(["a", "b", "c"]) + "\n" + text, encoding="utf-8", newline="")
    check_every_line_is_accounted_for(path, "tab" if delimiter == "\t" else delimiter)


@settings(max_examples=100, deadline=None)
@given(
    delimiter=st.sampled_from([*DELIMITERS]),
    table=st.lists(st.lists(CELLS, min_size=3, max_size=3), max_size=8),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
)
def test_a_sound_table_comes_back_row_by_row(tmp_path_factory, delimiter, table, end):
    path = tmp_path_factory.mktemp("sound") / DELIMITERS[delimiter]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL)
        writer.writerows([["one", "two", "three"], *table])
    rows = list(read_table(path, "tab" if delimiter == "\t" else delimiter)[1])
    assert [[*row.record.values()] for row in rows if not row.blank] == [
        cells for cells in table if any(cell.strip() for cell in cells)
    ]
    assert len(rows) == len(table)


@settings(max_examples=100, deadline=None)
@given(lost=st.sets(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=4), count=st.integers(1, 10))
def test_marks_that_got_lost_cost_at_most_their_lines(tmp_path_factory, lost, count):
    """Every cell is quoted; a lost mark makes its own line bad, or does no harm, and no other."""
    lines = [[f'"{number}.png"', f'"Question {number}?"', '"liver"', '"lung"', '"lung"'] for number in range(count)]
    hit = set()
    for number, mark in lost:
        if number < count:
            cell = lines[number][mark // 2]
            lines[number][mark // 2] = cell.lstrip('"') if mark % 2 else cell.rstrip('"')
            hit.add(number)
    path = tmp_path_factory.mktemp("lost") / "q.csv"
    path.write_text("\n".join([HEADER, *(",".join(line) for line in lines)]) + "\n")
    rows = list(read_table(path)[1])
    assert [row.line for row in rows] == [number + 2 for number in range(count)]
    assert all(not row.reason for number, row in enumerate(rows) if number not in hit)


def test_rows_and_skips_of_the_reader_are_the_lines(tmp_path):
    lines = [good(1), good(2).replace("?", '?"'), good(3) + ",x", "4.png", good(5), '6.png,"x,liver,lung,lung']
    path = tmp_path / "q.csv"
    path.write_text("\n".join([HEADER, *lines]))
    rows = list(read(path, without_images=True))
    assert len(rows) == len(lines)
    assert [row.where for row in rows if isinstance(row, Skipped)] == [f"line {n} of q.csv" for n in (4, 5, 7)]


def test_a_mark_that_is_not_closed_is_not_searched_for_through_a_huge_file(tmp_path, monkeypatch):
    limit = csv.field_size_limit(2**30)
    try:
        text = HEADER + "\n" + good(0).replace("Q", '"Q') + "\n" + "".join(f"{good(n)}\n" for n in range(40_000))
        rows = records(tmp_path, text)
    finally:
        csv.field_size_limit(limit)
    assert len(rows) == 40_001
    assert re.search(r"\bline 2\b.* \d+ ", rows[0].reason), rows[0].reason


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("q.csv", "image|question|A|B|answer\n1.png|q|liver|spleen|A\n", r"--delimiter '\|'"),
        ("q.tsv", "image,question,A,B,answer\n1.png,q,liver,spleen,A\n", "--delimiter ','"),
        ("q.csv", "sep=;\nimage;question;A;B;answer\n1.png;q;liver;spleen;A\n", "remove the first line"),
        (
            "q.csv",
            "image,question,A,B,Answer,answer \n1.png,q,liver,spleen,A,B\n",
            "more than .*'Answer', 'answer'",
        ),
    ],
)
def test_a_header_that_is_parted_or_named_in_two_ways(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=said):
        list(csv_table.read(tmp_path / name, without_images=True))


def test_one_column_of_answers_twice_in_the_published_table(tmp_path):
    (tmp_path / "test.csv").write_text("Figure_path,Question,Answer,Choice A,Choice B,Answer\n1.png,q,A,x,y,B\n")
    with pytest.raises(ValueError, match="more than one column Answer"):
        list(pmc_vqa.read(tmp_path / "test.csv", without_images=True))
