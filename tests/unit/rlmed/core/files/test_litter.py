"""What systems, editors and tools leave beside data is told from it, in any folder or archive."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from rlmed.core.files.litter import is_litter, litter_clause, sift, walk_data
from rlmed.data.examples import BadRowError
from rlmed.data.readers.base import SourceRow
from rlmed.data.readers.formats import csv_table, huggingface
from rlmed.data.readers.formats.image_files import open_images
from rlmed.data.readers.published import medvlm_r1, omnimedvqa
from rlmed.recording.batches import list_batches

LITTER = [
    "._questions.csv",
    ".DS_Store",
    "__MACOSX/questions.csv",
    "__macosx/._questions.csv",
    "Thumbs.db",
    "desktop.ini",
    "Desktop.ini",
    "~$questions.csv",
    ".~lock.questions.csv#",
    ".questions.csv.swp",
    "questions.csv~",
    "#questions.csv#",
    ".#questions.csv",
    ".ipynb_checkpoints/questions-checkpoint.csv",
    "@eaDir/questions.csv",
    "a/@eaDir/b/questions.csv",
    ".git/questions.csv",
    "questions.csv.part",
]
DATA = [
    "questions.csv",
    "a.b/questions.csv",
    "my ~ data/q.csv",
    "a#/q#.csv",
    "../q.csv",
    "./q.csv",
    "e@aDir/1.png",
    "git/1.png",
    "-.csv",
]
ROW = "1.png,Which?,liver,lung,lung\n"
TABLE = "image,question,A,B,answer\n" + ROW
APPLE = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        " + bytes(26)
"""How a file begins that macOS leaves beside each on a foreign disk."""


@pytest.mark.parametrize("name", LITTER)
def test_litter(name):
    assert is_litter(name)


@pytest.mark.parametrize("name", DATA)
def test_data(name):
    assert not is_litter(name)


def put(root: Path, name: str, content: bytes) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(content)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Below a folder that would itself be litter."""
    root = tmp_path / ".git" / "data"
    root.mkdir(parents=True)
    Image.new("L", (40, 40)).save(root / "1.png")
    return root


def test_tables_of_a_folder(folder):
    put(folder, "questions.csv", TABLE.encode())
    for name in LITTER:
        put(folder, name, APPLE)
    assert [row.where for row in csv_table.read(folder) if isinstance(row, SourceRow)] == ["line 2 of questions.csv"]


def test_a_folder_of_litter_alone_is_told(folder):
    put(folder, "._questions.csv", APPLE)
    put(folder, "~$more.csv", APPLE)
    with pytest.raises(ValueError, match=r"no table .*'\._questions\.csv' and 1 more"):
        list(csv_table.read(folder))


def test_litter_that_is_named_is_told(folder):
    put(folder, "._questions.csv", APPLE)
    put(folder, "questions.csv", TABLE.encode())
    with pytest.raises(ValueError, match=r"metadata of questions\.csv"):
        list(csv_table.read(folder / "._questions.csv"))


def test_parquet_files(folder):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for name in ("._train.parquet", "__MACOSX/train.parquet", ".cache/huggingface/train.parquet"):
        put(folder, name, APPLE)
    with pytest.raises(ValueError, match=r"parquet.*'\._train\.parquet' (and 1 more|and 2 more)"):
        list(huggingface.read(folder))
    row = {"image": "1.png", "question": "Which?", "options": ["liver", "lung"], "answer": "lung"}
    parquet.write_table(pyarrow.Table.from_pylist([row]), folder / "train.parquet")
    assert [row.split for row in huggingface.read(folder)] == ["train"]


def test_json_files(folder):
    row = {"image": ["1.png"], "question": "Which?", "options": ["liver", "lung"], "answer": "lung", "subset": "MRI"}
    put(folder, "test.json", json.dumps([row]).encode())
    put(folder, "._test.json", APPLE)
    assert medvlm_r1.test_file(folder) == folder / "test.json"
    put(folder, ".ipynb_checkpoints/test-checkpoint.json", b"[]")
    assert medvlm_r1.data_files(folder) == [folder / "test.json"]


def test_omnimedvqa(folder):
    asked = {"question_id": "1", "question": "Which?", "option_A": "liver", "option_B": "lung", "gt_answer": "lung"}
    open_access = "QA_information/Open-access"
    put(folder, f"{open_access}/._a.json", APPLE)
    with pytest.raises(ValueError, match=r"'\._a\.json' was skipped"):
        list(omnimedvqa.read(folder))
    put(
        folder, f"{open_access}/a.json", json.dumps([{**asked, "image_path": "1.png", "modality_type": "MRI"}]).encode()
    )
    assert [row.where for row in omnimedvqa.read(folder)] == ["row 0 of a.json"]


LITTER_OF_AN_IMAGE = ["__MACOSX/ct/7.png", "@eaDir/7.png", ".ipynb_checkpoints/7.png", ".git/7.png"]


def test_images_that_are_searched_for(folder):
    (folder / "ct").mkdir()
    Image.new("L", (40, 40)).save(folder / "ct" / "7.png")
    for name in LITTER_OF_AN_IMAGE:
        put(folder, name, APPLE)
    assert open_images(folder).find("old/7.png") == (folder / "ct" / "7.png").resolve()
    # a path that names it finds it all the same
    assert open_images(folder).find("@eaDir/7.png") == (folder / "@eaDir" / "7.png").resolve()


def test_images_of_an_archive(tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for name in ["ct/7.png", "__MACOSX/ct/._7.png", *LITTER_OF_AN_IMAGE]:
            archive.writestr(name, b"")
        archive.writestr("__MACOSX/ct/8.png", b"")
    images = open_images(tmp_path / "images.zip")
    assert images.find("7.png").name == "ct/7.png"
    with pytest.raises(BadRowError, match="does not exist"):
        images.find("8.png")


def test_recorded_batches(folder):
    put(folder, "000001.npz", b"")
    put(folder, "._000001.npz", APPLE)
    assert list_batches(folder) == [folder / "000001.npz"]


def test_walks_and_clauses(folder):
    put(folder, ".git/config.csv", b"")
    put(folder, "b/2.png", b"")
    assert [names for _, _, names in walk_data(folder)] == [["1.png"], ["2.png"]]
    kept, left = sift([folder / "b" / "2.png", folder / ".git" / "config.csv", folder / "1.png"], folder)
    assert (kept, left) == ([folder / "1.png", folder / "b" / "2.png"], [folder / ".git" / "config.csv"])
    assert litter_clause([]) == ""
