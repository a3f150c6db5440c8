"""Tables about files of many pictures: what rows become; no table or message tells a file name."""

import os
import re
import subprocess
import sys
import tracemalloc
from itertools import islice
from pathlib import Path

import pytest
from PIL import Image

from rlmed.data.examples import BadRowError
from rlmed.data.images import BadImageError
from rlmed.data.readers.base import Skipped
from rlmed.data.readers.volumes.display import Window
from rlmed.data.readers.volumes.picture_table import PictureChoice, cell_number, cell_window, read_picture_table
from tests.root import ROOT

HEADER = "file,page,question,option_a,option_b,answer,id,modality"


def write(folder: Path, *lines: str, header: str = HEADER, name: str = "questions.csv") -> Path:
    (folder / name).write_text("\n".join((header, *lines)) + "\n", encoding="utf-8")
    return folder


def choose(path: Path, cells) -> list[PictureChoice]:
    assert path.is_file()
    if cells["page"] == "late":

        def fail() -> Image.Image:
            raise BadImageError("it is broken inside")

        return [PictureChoice((cells["page"],), fail)]
    return [PictureChoice((cells["page"],), lambda: Image.new("L", (8, 8)), "CT")]


def rows(folder: Path, **changes) -> list:
    options = {"questions": None, "column": (), "answer_index": None, "split": None, **changes}
    return list(read_picture_table(folder, choose, ("page", "absent"), **options))


@pytest.fixture
def folder(tmp_path) -> Path:
    source = tmp_path / "source"
    (source / "DOE^JANE").mkdir(parents=True)
    for name in ("1.dcm", "2.dcm"):
        (source / "DOE^JANE" / name).write_bytes(b"")
    os.mkfifo(source / "DOE^JANE" / "pipe.dcm")
    (tmp_path / "outside.dcm").write_bytes(b"")
    (source / "link.dcm").symlink_to(tmp_path / "outside.dcm")
    return source


def test_a_row_has_its_picture_and_names_neither_file_nor_id(folder):
    (row,) = rows(write(folder, "DOE^JANE/1.dcm,1,Which organ?,liver,spleen,B,DOE-17,"))
    assert (row.where, row.id, row.split) == ("line 2 of the table", "line-2", "questions")
    assert (row.question, row.options, row.answer, row.modality) == (
        "Which organ?",
        ("liver", "spleen"),
        "spleen",
        "CT",
    )
    assert row.image.key == "000001"
    assert row.image.load().size == (8, 8)
    assert "DOE" not in repr(row).replace(repr(row.image), "")


def test_several_files_of_a_row_are_its_images_in_order(folder):
    lines = ["DOE^JANE/2.dcm|DOE^JANE/1.dcm,1,Which?,a,b,a,,", "DOE^JANE/1.dcm,1,Which?,a,b,a,,"]
    header = HEADER.replace("file", "files")
    found = rows(write(folder, *lines, "DOE^JANE/1.dcm|DOE^JANE/9.dcm,1,Which?,a,b,a,,", header=header))
    assert [[image.key for image in row.images] for row in found[:2]] == [["000001", "000002"], ["000002"]]
    assert "its file is missing" in found[2].reason
    assert "DOE" not in found[2].reason


def test_rows_about_the_same_picture_share_one(folder):
    lines = [f"DOE^JANE/{name}.dcm,{page},Which?,a,b,a,,MRI" for name, page in (("1", 1), ("2", 1), ("1", 2), ("1", 1))]
    found = rows(write(folder, *lines))
    assert [row.image.key for row in found] == ["000001", "000002", "000003", "000001"]
    assert {row.modality for row in found} == {"MRI"}


@pytest.mark.parametrize(
    "file",
    [
        "../outside.dcm",
        "DOE^JANE/../../outside.dcm",
        "link.dcm",
        "/etc/DOE^JANE",
        "DOE^JANE/nothing.dcm",
        "DOE^JANE",
        "DOE^JANE/pipe.dcm",
        "DOE" * 200,
        "",
    ],
)
def test_a_file_outside_or_missing_is_a_skip_that_does_not_name_it(folder, file):
    bad, good = rows(write(folder, f"{file},1,Which?,a,b,a,,", "DOE^JANE/1.dcm,1,Which?,a,b,a,,"))
    assert isinstance(bad, Skipped)
    assert not isinstance(good, Skipped)
    assert "its file" in bad.reason
    assert "DOE" not in bad.reason
    assert "outside.dcm" not in bad.reason


@pytest.mark.parametrize("file", ["DOE^JANE\\1.dcm", " DOE^JANE/1.dcm ", "./DOE^JANE/1.dcm", ".\\DOE^JANE\\1.dcm"])
def test_a_path_of_another_system_finds_its_file(folder, file):
    (row,) = rows(write(folder, f"{file},1,Which?,a,b,a,,"))
    assert not isinstance(row, Skipped)


@pytest.mark.parametrize(
    ("file", "hint"),
    [
        ("Doe^Jane/1.DCM", "folder: .* in case; give"),
        ("DOE^JANE/1", "folder: .* in its ending; give"),
        ("DOE^JANE/1.dcm\u200b", "folder: .* in characters .*; give"),
        ("C:\\studies\\DOE^JANE\\1.dcm", "not a path .* that name; give"),
        ("1.dcm", "folder: .* in another folder; give"),
        ("..\\outside.dcm", "not a path [^:]*: give"),
        ("DOE^JANE/9.dcm", "missing, [^:]*: give"),
    ],
)
def test_a_near_file_is_hinted_at_and_not_named(folder, file, hint):
    (row,) = rows(write(folder, f"{file},1,Which?,a,b,a,,"))
    assert re.search(hint, row.reason)
    assert "doe" not in row.reason.lower()


def test_a_file_that_breaks_when_it_is_shown_says_that_it_is_the_file(folder):
    (row,) = rows(write(folder, "DOE^JANE/1.dcm,late,Which?,a,b,a,,"))
    with pytest.raises(BadImageError, match=r"its file .*broken inside"):
        row.image.load()


def test_a_broken_line_costs_its_row(folder):
    bad, good = rows(write(folder, "too,few", "DOE^JANE/1.dcm,1,Which?,a,b,a,,"))
    assert "cells" in bad.reason
    assert good.id == "line-3"


@pytest.mark.slow
def test_many_rows_in_little_memory(folder):
    write(folder, *(f"DOE^JANE/1.dcm,{n % 7},Is finding {n} to be seen?,a,b,a,," for n in range(6000)))
    found = read_picture_table(folder, choose, ("page",), questions=None, column=(), answer_index=None, split=None)
    assert len({row.image.key for row in islice(found, 1000)}) == 7
    tracemalloc.start()
    assert sum(1 for _ in found) == 5000
    # the rows would take over 4 MiB; other threads of the tests' process, as Ray's, take some too
    assert tracemalloc.get_traced_memory()[1] < 2 * 2**20
    tracemalloc.stop()


@pytest.mark.parametrize("field", ["file", "image"])
def test_the_column_of_files_has_two_names(folder, field):
    write(folder, "DOE^JANE/1.dcm,1,Which organ?,liver,spleen,B,,", header=HEADER.replace("file", "Datei"))
    (row,) = rows(folder, column=(f"{field}=Datei",))
    assert row.answer == "spleen"


def test_a_table_elsewhere_with_other_columns_and_split(folder, tmp_path):
    write(tmp_path, "DOE^JANE/1.dcm,1,Which?,a,b,1,test", header="Datei,Page,question,A,B,answer,Teil", name="DOE.csv")
    (row,) = rows(
        folder, questions=tmp_path / "DOE.csv", column=("image=Datei", "split=Teil"), answer_index=0, split="other"
    )
    assert (row.answer, row.split) == ("b", "test")
    write(tmp_path, "DOE^JANE/1.dcm,1,Which?,a,b,a", header="file,page,question,A,B,answer", name="DOE.csv")
    assert [row.split for row in rows(folder, questions=tmp_path / "DOE.csv")] == ["questions"]


def test_a_source_that_is_no_folder_or_has_no_table_is_an_error(folder, tmp_path):
    with pytest.raises(ValueError, match="must be a folder"):
        rows(tmp_path / "outside.dcm")
    with pytest.raises(ValueError, match=r"questions\.csv cannot be read"):
        rows(folder)
    with pytest.raises(ValueError, match="no column for image"):
        rows(write(folder, header="page,question,A,B,answer"))


def test_numbers_in_cells():
    assert cell_number({"frame": "12"}, "frame") == 12
    assert cell_number({"frame": ""}, "frame") is cell_number({}, "frame") is None
    for text in ("1.5", "-1", "x", "²", "9" * 5000):
        with pytest.raises(BadRowError, match=r"^its frame .*whole number"):
            cell_number({"frame": text}, "frame")


def test_windows_in_cells():
    assert cell_window({"window": "40 400"}, (1, 2)) == Window(40, 400)
    assert cell_window({"window": ""}, (1, 2)) == cell_window({}, (1, 2)) == Window(1, 2)
    assert cell_window({}, None) is None
    for text in ("DOE JANE", "40", "40 -400", "nan 1"):
        with pytest.raises(BadRowError, match=r"^its window .*'40 400'"):
            cell_window({"window": text}, None)


@pytest.mark.parametrize(("reader", "library"), [("dicom", "pydicom"), ("nifti", "nibabel")])
def test_without_its_library_a_reader_says_how_to_install_it(folder, reader, library):
    """In a process of its own: here the library is imported long since."""
    code = (
        "import pathlib, sys\n"
        f"sys.modules[{library!r}] = None\n"
        f"from rlmed.data.readers.volumes import {reader} as module\n"
        f"list(module.read(pathlib.Path({str(write(folder))!r})))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    last = result.stderr.splitlines()[-1]
    assert re.match(rf"ValueError: .* needs {library}: pip install .*\[readers\]", last), result.stderr
