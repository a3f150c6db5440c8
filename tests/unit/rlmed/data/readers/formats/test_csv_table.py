"""Tables of questions: columns are found or named, and what is wrong with a row costs that row."""

from __future__ import annotations

import re
import tracemalloc
from itertools import islice
from pathlib import Path

import pytest

from rlmed.data.prepare.prepared_data import write_prepared_data
from rlmed.data.readers.base import Skipped, SourceRow
from rlmed.data.readers.formats.csv_table import READER, read
from tests.unit.rlmed.data.pictures import marked

HEADER = "image,question,option_a,option_b,option_c,answer,modality,kind,id,split"


@pytest.fixture
def folder(tmp_path) -> Path:
    root = tmp_path / "source"
    root.mkdir()
    marked().save(root / "1.png")
    marked().save(tmp_path / "outside.png")
    return root


def table(folder: Path, *lines: str, name: str = "questions.csv", encoding: str = "utf-8") -> Path:
    path = folder / name
    path.write_text("\n".join(lines) + "\n", encoding=encoding)
    return path


def rows(source: Path, **options) -> list[SourceRow | Skipped]:
    return list(read(source, **options))


def test_a_full_row_field_by_field(folder):
    path = table(folder, HEADER, '1.png,"Which, organ?",liver,spleen,kidney,B,CT,organ,q7,test_ct')
    assert rows(path) == [
        SourceRow(
            where="line 2 of questions.csv",
            split="test_ct",
            id="q7",
            question="Which, organ?",
            options=("liver", "spleen", "kidney"),
            answer="spleen",
            image=folder / "1.png",
            modality="CT",
            kind="organ",
        )
    ]


@pytest.mark.parametrize(
    ("header", "line"),
    [
        ("image,question,options,answer", '1.png,Which?,"[""liver"", ""spleen""]",liver'),
        ("IMAGE,Question,A,B,Answer", "1.png,Which?,liver,spleen,liver"),
        ("image,question,Choice A,Choice B,answer", "1.png,Which?,liver,spleen,liver"),
        ("image;question;A;B;answer", "1.png;Which?;liver;spleen;liver"),
        ("image\tquestion\tA\tB\tC\tanswer", "1.png\tWhich?\tliver\tspleen\t\tliver"),
        ("image_path,question,choices,answer,comment", '1.png,Which?,"[""liver"", ""spleen""]",liver,"a, b"'),
    ],
)
def test_usual_ways_of_writing_a_table(folder, header, line):
    (row,) = rows(table(folder, header, line))
    assert (row.options, row.answer, row.image) == (("liver", "spleen"), "liver", folder / "1.png")
    assert (row.split, row.id, row.modality, row.kind) == ("questions", "questions-2", "", "")


def test_columns_of_other_names(folder):
    path = table(folder, "Bild,Frage,Antwort 1,Antwort 2,richtig", "1.png,Was?,Leber,Milz,Milz")
    given = ["image=Bild", "question=Frage", "option_a=Antwort 1", "option_b=Antwort 2", "answer=richtig"]
    (row,) = rows(path, column=given, split="train")
    assert (row.question, row.options, row.answer, row.split) == ("Was?", ("Leber", "Milz"), "Milz", "train")


@pytest.mark.parametrize(
    ("header", "cells", "expected"),
    [
        ("images", "b/2.png|1.png", ["b/2.png", "1.png"]),
        ("image_paths", " 1.png | b/2.png | 1.png ", ["1.png", "b/2.png", "1.png"]),
        ("images", '"[""1.png"", ""b/2.png""]"', ["1.png", "b/2.png"]),
        ("images", "1.png", ["1.png"]),
        ("image,images", "1.png,", ["1.png"]),
        ("image,images", ",1.png|b/2.png", ["1.png", "b/2.png"]),
        ("image", "a|b.png", ["a|b.png"]),  # a column of one path
    ],
)
def test_a_cell_of_several_images(folder, header, cells, expected):
    (folder / "b").mkdir()
    for name in ("b/2.png", "a|b.png"):
        marked(9).save(folder / name)
    (row,) = rows(table(folder, f"{header},question,A,B,answer", f"{cells},Which?,liver,spleen,liver"))
    assert isinstance(row, SourceRow)
    assert list(row.images) == [folder / name for name in expected]


@pytest.mark.parametrize(
    ("image", "images", "reason"),
    [
        ("1.png", "1.png|1.png", "both an image and images: .*--column image=NAME"),
        ("", "1.png||1.png", r"of its 3 images, parted by \|, one is blank"),
        ("", "1.png|", "of its 2 images"),
        ("", '"[""1.png"", null]"', "its image 2 of 2 is missing"),
        ("", "1.png|none.png", "image 'none.png' does not exist"),
        ("", "../outside.png|1.png", r"'\.\./outside\.png' leaves the folder"),
        ("", "", "it has no image"),
    ],
)
def test_a_bad_cell_of_several_images_costs_its_row(folder, image, images, reason):
    lines = ["image,images,question,A,B,answer", f"{image},{images},Which?,liver,spleen,liver"]
    (row,) = rows(table(folder, *lines))
    assert isinstance(row, Skipped)
    assert re.search(reason, row.reason)


def test_of_two_columns_of_images_one_can_be_named(folder):
    marked(9).save(folder / "2.png")
    path = table(folder, "image,images,question,A,B,answer", "1.png,2.png|1.png,Which?,liver,spleen,liver")
    (one,), (several,) = rows(path, column=["image=image"]), rows(path, column=["images=images"])
    assert [image.name for image in one.images] == ["1.png"]
    assert [image.name for image in several.images] == ["2.png", "1.png"]


@pytest.mark.parametrize(("first", "cell", "expected"), [(0, "1", "spleen"), (1, "1", "liver"), (0, "0", "liver")])
def test_an_answer_that_is_a_place(folder, first, cell, expected):
    (row,) = rows(table(folder, "image,question,A,B,answer", f"1.png,Which?,liver,spleen,{cell}"), answer_index=first)
    assert row.answer == expected


@pytest.mark.parametrize("cell", ["2", "-1", "B", "1.5", "99999"])
def test_a_place_that_there_is_not(folder, cell):
    (skip,) = rows(table(folder, "image,question,A,B,answer", f"1.png,Which?,liver,spleen,{cell}"), answer_index=0)
    assert re.search(f"'{cell}' is not the index .* 2 options", skip.reason)


def test_images_of_another_folder_and_no_images_at_all(folder, tmp_path):
    tables = tmp_path / "tables"
    tables.mkdir()
    path = table(tables, "image,question,A,B,answer", "1.png,Which?,liver,spleen,A")
    assert rows(path, images=folder)[0].image == folder / "1.png"
    assert rows(path, without_images=True)[0].image is None
    bare = table(tables, "question,A,B,answer", "Which?,liver,spleen,A")
    assert rows(bare, without_images=True)[0].image is None
    with pytest.raises(ValueError, match=r"no column for image.*--column image=NAME"):
        rows(bare)


def test_a_folder_of_tables(folder):
    table(folder, "image,question,A,B,answer", "1.png,Which?,liver,spleen,A", name="train.csv")
    table(folder, "image\tquestion\tA\tB\tanswer", "1.png\tWhich?\tliver\tspleen\tB", name="my test.tsv")
    assert [(row.split, row.answer) for row in rows(folder)] == [("my_test", "spleen"), ("train", "liver")]
    with pytest.raises(ValueError, match="holds no table"):
        rows(folder.parent)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("../outside.png,Which?,liver,spleen,A", "leaves the folder"),
        ("/etc/hostname,Which?,liver,spleen,A", "leaves the folder"),
        ("link.png,Which?,liver,spleen,A", "leaves the folder"),
        (",Which?,liver,spleen,A", "it has no image"),
        (f"{'long' * 100}.png,Which?,liver,spleen,A", "does not exist"),
        (f"{'1.png/' * 1000},Which?,liver,spleen,A", "does not exist"),
        ("1.png,Which?,liver,spleen", "4 cells, and the header has 5"),
        ("1.png,Which?,liver,spleen,A,B", "6 cells, and the header has 5"),
    ],
)
def test_a_bad_line_is_skipped(folder, line, reason):
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    good = "1.png,Which?,liver,spleen,A"
    first, skip, last = rows(table(folder, "image,question,A,B,answer", good, line, good))
    assert isinstance(first, SourceRow)
    assert isinstance(last, SourceRow)
    assert (skip.where, skip.id) == ("line 3 of questions.csv", "questions-3")
    assert reason in skip.reason


@pytest.mark.parametrize("cell", ["liver", '"{1: 2}"', "7", "null", '"' + "[" * 5000 + '"'])
def test_options_that_are_no_list(folder, cell):
    (skip,) = rows(table(folder, "image,question,options,answer", f"1.png,Which?,{cell},A"))
    assert "its options" in skip.reason
    assert len(skip.reason) < 400


@pytest.mark.parametrize(
    ("cell", "found"),
    [
        ("images\\1.png", "images/1.png"),
        ("images/gr\u00f6\u00dfe.png", "images/gro\u0308\u00dfe.png"),
        ("Images/1.png", "is 'images/1.png', which differs in case"),
        ("images/1.png\u200b", "'images/1.png\\u200b' does not exist: there is 'images/1.png'"),
        ("C:\\data\\images\\1.png", "file: there is 'images/1.png' in it"),
        ("/home/x/images/1.png", "file: there is 'images/1.png' in it"),
        ("..\\outside.png", "leaves the folder"),
        ("images\\..\\..\\outside.png", "leaves the folder"),
        ("images/2.png", "not exist: copy it there"),
    ],
)
def test_image_paths_as_other_systems_write_them(folder, cell, found):
    (folder / "images").mkdir()
    for name in ("1.png", "gro\u0308\u00dfe.png"):
        marked().save(folder / "images" / name)
    (row,) = rows(table(folder, "image,question,A,B,answer", f"{cell},Which?,liver,spleen,A"))
    if isinstance(row, Skipped):
        assert found in row.reason
    else:
        assert row.image == folder / found


def test_a_missing_image_and_a_nul_byte(folder, tmp_path):
    good = "1.png,Which?,liver,spleen,A"
    path = table(folder, "image,question,A,B,answer", good, "9.png,Which?,liver,spleen,A", "1.png,a\0b,liver,spleen,A")
    layout = write_prepared_data(rows(path), tmp_path / "out", reader=READER, source=path, options={})
    assert [skip.where[:6] for skip in layout.skipped] == ["line 3", "line 4"]
    assert "'9.png' does not exist" in layout.skipped[0].reason
    assert "NUL" in layout.skipped[1].reason


def test_bytes_that_are_no_utf8_cost_their_row(folder):
    path = folder / "latin.csv"
    path.write_bytes("image,question,A,B,answer\n1.png,Größe?,a,b,A\n1.png,Size?,a,b,A\n".encode("latin-1"))
    skip, row = rows(path)
    assert "save the table as UTF-8" in skip.reason
    assert row.question == "Size?"


def test_a_header_with_what_cannot_be_seen(folder):
    path = table(folder, "\ufeffimage,question\u200b,A,B,\u00a0answer", "1.png,Which?,a,b,A", encoding="utf-8-sig")
    assert rows(path)[0].question == "Which?"


def test_a_table_in_utf16_is_told(folder):
    path = folder / "wide.csv"
    path.write_bytes("image,question,A,B,answer\n".encode("utf-16-le"))
    with pytest.raises(ValueError, match=r"wide\.csv .*UTF-8"):
        rows(path)


def test_a_header_that_is_no_utf8_is_told(folder):
    path = folder / "latin.csv"
    path.write_bytes("image,question,A,B,Lösung\n1.png,Size?,a,b,A\n".encode("cp1252"))
    with pytest.raises(ValueError, match=r"latin\.csv .*UTF-8"):
        rows(path)


def test_a_byte_order_mark_is_no_part_of_the_header(folder):
    path = table(folder, "image,question,A,B,answer", "1.png,Größe?,a,b,A", encoding="utf-8-sig")
    assert rows(path)[0].question == "Größe?"


def test_a_quotation_mark_that_is_not_closed(folder):
    first, second = rows(table(folder, "image,question,A,B,answer", '1.png,"Which?,a,b,A', "1.png,Size?,a,b,A"))
    assert (first.where, first.id) == ("line 2 of questions.csv", "questions-2")
    assert re.search(r"\bline 2\b", first.reason)
    assert (second.where, second.question) == ("line 3 of questions.csv", "Size?")
    path = table(folder, "image,question,A,B,answer", '1.png,"' + "x" * 200_000 + '",a,b,A', "1.png,Size?,a,b,A")
    first, second = rows(path)
    assert "field limit" in first.reason
    assert second.question == "Size?"


@pytest.mark.parametrize(
    ("lines", "given", "message"),
    [
        ((" ",), (), "is empty"),
        (("image,question,A,answer",), (), "no column for options"),
        (("image,A,B,answer",), (), r"no column for question: .*--column question=NAME\."),
        (
            ("picture,text,A,B,truth",),
            (),
            r"no column for image, .*--column image=NAME --column question=NAME --column answer=NAME\.",
        ),
        ((HEADER,), ("question=Frage", "answer=Antwort"), "no column for --column question=Frage, answer=Antwort; its"),
        (("image,image,question,A,B,answer",), (), "more than one column 'image'"),
        ((HEADER,), ("question=Frage",), "no column for --column question=Frage; .*columns: image"),
        ((HEADER,), ("frage=question",), "--column question=frage.* images, .* split or option_a"),
        ((HEADER,), ("question",), "write FIELD=NAME"),
        ((HEADER,), ("question=id", "question=kind"), "given twice"),
    ],
)
def test_a_table_without_its_columns(folder, lines, given, message):
    with pytest.raises(ValueError, match=message):
        rows(table(folder, *lines), column=given)


def test_a_table_that_is_not_there(folder):
    with pytest.raises(ValueError, match=r"none\.csv .*No such file"):
        rows(folder / "none.csv")
    with pytest.raises(ValueError, match="--delimiter"):
        rows(table(folder, HEADER), delimiter="x")


def test_a_file_without_ends_of_lines_is_not_read_as_a_whole(folder):
    path = folder / "endless.csv"
    with path.open("w") as file:
        file.write("image,question,A,B,answer\n")
        file.truncate(500_000_000)  # zeros that take no room on the disk
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"endless\.csv .*\b16777216 characters"):
        rows(path)
    assert tracemalloc.get_traced_memory()[1] < 150_000_000
    tracemalloc.stop()


def test_a_header_of_many_columns_is_read_once(folder):
    header = "image,question,A,B,answer," + ",".join(f"c{n}" for n in range(30_000))
    assert rows(table(folder, header)) == []
    with pytest.raises(ValueError, match="more than one column 'c7'"):
        rows(table(folder, f"{header},c7"))


@pytest.mark.slow
def test_thirty_thousand_rows_in_little_memory(folder, tmp_path):
    path = folder / "many.csv"
    with path.open("w") as file:
        file.write("question,A,B,answer\n")
        file.writelines(f"Is the finding of number {n} to be seen in this picture?,yes,no,A\n" for n in range(30_000))
    tracemalloc.start()
    for _ in islice(read(path, without_images=True), 10_000):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # the rows would take over 5 MiB; other threads of the tests' process, as Ray's, take some too
    assert peak < 2 * 2**20
    layout = write_prepared_data(
        read(path, without_images=True), tmp_path / "out", reader=READER, source=path, options={}
    )
    assert layout.splits["many"].rows == 30_000
