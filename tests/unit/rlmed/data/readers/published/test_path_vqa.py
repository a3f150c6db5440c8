"""PathVQA in small files of both layouts: the authors' pickles, and the hub's parquet."""

from __future__ import annotations

import collections
import io
import json
import os
import pickle
import struct
from pathlib import Path

import pytest

from rlmed.data.examples import read_examples
from rlmed.data.prepare.prepared_data import write_prepared_data
from rlmed.data.readers.base import Skipped, SourceRow
from rlmed.data.readers.formats.pickle_rows import read_pickled_rows
from rlmed.data.readers.published.path_vqa import READER, read
from tests.unit.rlmed.data.pictures import marked

QUESTIONS = {
    "train": [
        ("train_0000", "Where are liver stem cells located?", "in the canals of Hering"),
        ("train_0000", "Is the liver shown?", "Yes"),
        ("train_0001", "What is shown?", "necrosis"),
        ("train_0001", "what does the arrow mark?", "a granuloma"),
        ("train_0001", "What is shown?", "necrosis"),
    ],
    "val": [("val_0000", "What have lost their nuclei?", "neutrophils")],
    "test": [("test_0000", "How many cells divide?", 2), ("test_0000", "is it benign?", "no")],
}


def rows_of(split: str) -> list[dict]:
    return [dict(zip(("image", "question", "answer"), row, strict=True)) for row in QUESTIONS[split]]


@pytest.fixture
def released(tmp_path) -> Path:
    """The folder that the authors' archive unpacks to."""
    for split in QUESTIONS:
        (tmp_path / "pvqa" / "qas" / split).mkdir(parents=True)
        (tmp_path / "pvqa" / "images" / split).mkdir(parents=True)
        (tmp_path / "pvqa" / "qas" / split / f"{split}_qa.pkl").write_bytes(pickle.dumps(rows_of(split)))
        for number in range(2):
            marked(number).save(tmp_path / "pvqa" / "images" / split / f"{split}_{number:04d}.jpg")
    return tmp_path / "pvqa"


@pytest.fixture
def hub_copy(tmp_path) -> Path:
    """The hub's files, whose images have no name; one is in the training and the test file."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    folder = tmp_path / "path-vqa"
    (folder / "data").mkdir(parents=True)
    for split in QUESTIONS:
        records = []
        for row in rows_of(split):
            stream = io.BytesIO()
            marked(int(row["image"][-1])).save(stream, format="JPEG")
            records.append(row | {"image": {"bytes": stream.getvalue(), "path": None}, "answer": str(row["answer"])})
        name = {"val": "validation"}.get(split, split)
        parquet.write_table(pyarrow.Table.from_pylist(records), folder / "data" / f"{name}-00000-of-00001-ab12.parquet")
    return folder


def usable(rows) -> dict[str, SourceRow]:
    return {row.id: row for row in rows if isinstance(row, SourceRow)}


@pytest.mark.parametrize("inside", [True, False])
def test_the_release_field_by_field(released, inside):
    rows = list(read(released if inside else released.parent, open="keep"))
    where, yes, what, arrow = (row for row in rows if isinstance(row, SourceRow) and row.split == "train")
    assert where == SourceRow(
        where="row 0 of train_qa.pkl",
        split="train",
        id="train-0",
        question="Where are liver stem cells located?",
        options=(),
        answer="in the canals of Hering",
        image=released / "images" / "train" / "train_0000.jpg",
        modality="Pathology",
        kind="where",
        task="open",
    )
    assert (yes.task, yes.options, yes.answer, yes.kind) == ("choice", ("yes", "no"), "yes", "yes/no")
    assert (what.kind, arrow.kind) == ("what", "what")
    tested = usable(rows)
    assert (tested["test-0"].answer, tested["test-0"].kind) == ("2", "how many")
    assert {row.split for row in tested.values()} == {"train", "val", "test"}


def test_rows_that_repeat_one_of_their_split_are_left_out(released):
    (left,) = (row for row in read(released, open="keep") if isinstance(row, Skipped))
    assert (left.id, left.chosen) == ("train-4", True)


@pytest.mark.parametrize(("open", "tasks"), [("all", 7 * ["open"]), ("skip", 2 * ["choice"])])
def test_what_becomes_of_open_questions(released, open, tasks):
    assert [row.task for row in usable(read(released, open=open)).values()] == tasks


def test_distractors_are_answers_to_the_same_kind_of_question(released):
    row = usable(read(released, distractors=2))["train-2"]
    assert {*row.options} == {"necrosis", "a granuloma", "neutrophils"}
    assert row.answer == "necrosis"


def test_the_copy_on_the_hub(hub_copy, released, tmp_path):
    rows = list(read(hub_copy, open="keep"))
    found = usable(rows)
    assert {row.split for row in found.values()} == {"train", "validation", "test"}
    ours = usable(read(released, open="keep"))
    for split, name in (("train", "train"), ("val", "validation"), ("test", "test")):
        theirs = [(row.question, row.answer, row.task, row.kind) for row in found.values() if row.split == name]
        assert theirs == [(row.question, row.answer, row.task, row.kind) for row in ours.values() if row.split == split]
    assert [row.id for row in rows if isinstance(row, Skipped)] == ["train-4"]
    layout = write_prepared_data(rows, tmp_path / "out", reader=READER, source=hub_copy, options={})
    assert layout.splits["train"].by_task == {"choice": 1, "open": 3}
    read_back = read_examples(tmp_path / "out" / "train.jsonl", on_bad_row="error").examples
    assert [row.truth["answers"] for row in read_back if not row.is_choice][:2] == [
        ["in the canals of Hering"],
        ["necrosis"],
    ]
    assert len(list((tmp_path / "out" / "images").iterdir())) == 2  # each image once, though in several splits


def test_a_question_that_the_test_asks_of_the_same_pixels_is_left_out(hub_copy):
    parquet = pytest.importorskip("pyarrow.parquet")
    path = hub_copy / "data" / "train-00000-of-00001-ab12.parquet"
    table = parquet.read_table(path)
    parquet.write_table(table.set_column(1, "question", [["IS IT BENIGN?", *table["question"].to_pylist()[1:]]]), path)
    left = [row for row in read(hub_copy, open="keep") if isinstance(row, Skipped)]
    assert [(row.id, row.chosen) for row in left] == [("train-0", True), ("train-4", True)]


def test_without_images_questions_alone_are_read(hub_copy, released):
    for source in (hub_copy, released):
        rows = usable(read(source, open="all", without_images=True))
        assert all(row.image is None for row in rows.values())
    # images tell whether a row repeats another, and the hub's have no names
    assert len(usable(read(hub_copy, open="all", without_images=True))) == 8


class _Call:
    def __reduce__(self):
        return os.system, ("touch called",)


class _Named(str):
    """A text of a class of its own, as numpy's are."""


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (pickle.dumps([_Call()]), "STACK_GLOBAL"),
        (pickle.dumps([_Call()], protocol=0), r"GLOBAL \(\w+ system\)"),
        (b"(lp0\n(S'touch called'\nios\nsystem\na.", r"INST \(os system\)"),
        (pickle.dumps([collections.OrderedDict()], protocol=2), r"GLOBAL \(collections OrderedDict\)"),
        (pickle.dumps([{"question": _Named("Which?")}]), "STACK_GLOBAL"),
        (b"\x80\x02]\x82\x01a.", "EXT1"),
        (b"\x80\x02]q\x00(Pmine\nae.", "PERSID"),
    ],
)
def test_a_pickle_that_wants_more_than_plain_rows_is_not_loaded(released, monkeypatch, content, named):
    monkeypatch.chdir(released)
    (released / "qas" / "val" / "val_qa.pkl").write_bytes(content)
    with pytest.raises(ValueError, match=rf"val_qa\.pkl .*\({named}"):
        list(read(released))
    assert not (released / "called").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04",
        pickle.dumps(rows_of("train"))[:-40],
        b"]r" + struct.pack("<I", 2**32 - 1) + b".",  # a memo of four billion places
        b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"text.",
        b"aaaa.",
    ],
)
def test_a_damaged_pickle_is_named(tmp_path, content):
    (tmp_path / "train_qa.pkl").write_bytes(content)
    with pytest.raises(ValueError, match=r"train_qa\.pkl is damaged .*copy it again"):
        read_pickled_rows(tmp_path / "train_qa.pkl")


def test_a_small_pickle_that_is_without_end_as_text_is_refused(tmp_path):
    value: list = []
    for _ in range(60):  # as text, two to the power of sixty brackets
        value = [value, value]
    (tmp_path / "train_qa.pkl").write_bytes(pickle.dumps([{"image": value}]))
    with pytest.raises(ValueError, match="lists of lists"):
        read_pickled_rows(tmp_path / "train_qa.pkl")


def test_a_pickle_of_something_else_is_named(tmp_path):
    (tmp_path / "ans2label.pkl").write_bytes(pickle.dumps({"yes": 0}))
    with pytest.raises(ValueError, match=r"ans2label\.pkl holds a dict, not a list"):
        read_pickled_rows(tmp_path / "ans2label.pkl")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"image": "test_0009", "question": "What?", "answer": "x"}, "its image 'test/test_0009.jpg' does not exist"),
        ({"image": "../../secret", "question": "What?", "answer": "x"}, "its image 'test/../../secret.jpg' leaves"),
        ({"image": "test_0000", "question": "What?"}, "it has no answer"),
        ({"image": ["test_0000"], "question": "What?", "answer": "x"}, "its image is ['test_0000'], not a text"),
        (["test_0000", "What?", "x"], "it is not a JSON object but"),
    ],
)
def test_a_bad_row_is_skipped_with_its_place(released, row, reason):
    (released / "qas" / "test" / "test_qa.pkl").write_bytes(pickle.dumps([row]))
    *_, skipped = read(released, open="keep")
    assert isinstance(skipped, Skipped)
    assert (skipped.where, skipped.reason.startswith(reason)) == ("row 0 of test_qa.pkl", True), skipped.reason


def test_a_folder_of_neither_layout_says_what_is_missing(tmp_path):
    (tmp_path / "train.json").write_text(json.dumps([]))
    with pytest.raises(ValueError, match=r"neither qas/train/train_qa\.pkl .* nor parquet"):
        list(read(tmp_path))
    (tmp_path / "qas").mkdir()
    with pytest.raises(ValueError, match=r"qas holds none of train/train_qa\.pkl, val/val_qa\.pkl, test/test_qa\.pkl"):
        list(read(tmp_path))
