"""Parquet files as the hub's, in local folders: columns, inner images, options for bare answers."""

from __future__ import annotations

import io
import json
import sys
import tracemalloc
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from rlmed.data.examples import read_examples
from rlmed.data.images import MAX_IMAGES
from rlmed.data.prepare.prepared_data import write_prepared_data
from rlmed.data.readers.base import Encoded, Skipped, SourceRow
from rlmed.data.readers.formats import huggingface, parquet_rows
from rlmed.data.readers.formats.huggingface import READER, read, split_name
from tests.unit.rlmed.data.pictures import marked

pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.parquet")


def picture(grey: int, format: str = "PNG") -> bytes:
    stream = io.BytesIO()
    marked(grey).save(stream, format=format)
    return stream.getvalue()


def record(number: int, **changes) -> dict:
    row = {
        "image": {"bytes": picture(number), "path": f"{number}.png"},
        "question": f"Which organ is number {number}?",
        "options": ["liver", "spleen", "kidney"],
        "answer": "spleen",
        "modality": "CT",
    }
    return {key: value for key, value in {**row, **changes}.items() if value is not ...}


def put(path: Path, records: list[dict], features: dict | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_pylist(records)
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pyarrow.parquet.write_table(table, path)
    return path


def test_rows_and_images_come_out_as_they_went_in(tmp_path):
    folder = tmp_path / "mine"
    put(folder / "data" / "train-00000-of-00002.parquet", [record(0), record(1)])
    put(
        folder / "data" / "train-00001-of-00002.parquet", [record(2, image={"bytes": picture(9, "JPEG"), "path": None})]
    )
    put(folder / "data" / "test-00000-of-00001-0123456789abcdef.parquet", [record(3, answer="C")])
    layout = write_prepared_data(read(folder), tmp_path / "out", reader=READER, source=folder, options={})
    assert layout.skipped == ()
    train = read_examples(tmp_path / "out" / "train.jsonl").examples
    (test,) = read_examples(tmp_path / "out" / "test.jsonl").examples
    assert [row.id for row in train] == ["train-0", "train-1", "train-2"]
    assert [row.image.read_bytes() for row in train] == [picture(0), picture(1), picture(9, "JPEG")]
    assert [row.image.suffix for row in train] == [".png", ".png", ".jpg"]
    assert (train[0].question, train[0].options) == ("Which organ is number 0?", ("liver", "spleen", "kidney"))
    assert (train[0].letter, test.letter, test.modality) == ("B", "C", "CT")


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("data/train-00000-of-00003.parquet", "train"),
        ("data/test-00000-of-00001-0a1b2c.parquet", "test"),
        ("default/validation/0000.parquet", "validation"),
        ("mri questions.parquet", "mri_questions"),
        ("0000.parquet", "0000"),
    ],
)
def test_splits_are_called_as_the_hub_calls_them(path, split):
    assert split_name(Path(path)) == split


@pytest.mark.parametrize(
    "options",
    ['["liver", "spleen"]', {"A": "liver", "B": "spleen", "C": None}, ["liver", "spleen"]],
)
def test_ways_of_holding_options(tmp_path, options):
    path = put(tmp_path / "a.parquet", [record(0, options=options)])
    assert next(read(path)).options == ("liver", "spleen")


def test_options_in_a_map(tmp_path):
    letters = pyarrow.array([[("B", "spleen"), ("A", "liver")]], type=pyarrow.map_(pyarrow.string(), pyarrow.string()))
    pyarrow.parquet.write_table(
        pyarrow.table({"question": ["Which?"], "options": letters, "answer": ["A"]}), tmp_path / "a.parquet"
    )
    (row,) = read(tmp_path, without_images=True)
    assert row.options == ("liver", "spleen")


def test_options_in_columns_and_answers_as_places(tmp_path):
    row = record(0, options=..., answer=1, A="liver", B="spleen", Frage="Was?", question=...)
    path = put(tmp_path / "a.parquet", [row])
    found = next(read(path, column=["question=Frage"], answer_index=0))
    assert (found.question, found.options, found.answer) == ("Was?", ("liver", "spleen"), "spleen")


def test_names_of_classes_stand_for_their_numbers(tmp_path):
    features = {
        "answer": {"names": ["liver", "spleen"], "_type": "ClassLabel"},
        "modality": {"names": ["CT", "MRI"], "_type": "ClassLabel"},
        "question": {"dtype": "string", "_type": "Value"},
    }
    path = put(tmp_path / "a.parquet", [record(0, answer=1, modality=1), record(1, answer=0, modality=7)], features)
    first, second = read(path)
    assert (first.answer, first.modality) == ("spleen", "MRI")
    assert (second.answer, second.modality) == ("liver", "7")
    broken = put(tmp_path / "b.parquet", [record(0)], {"answer": {"_type": "ClassLabel"}})
    assert next(read(broken)).answer == "spleen"


@pytest.mark.parametrize(
    "image",
    [
        picture(1),
        "pictures/1.png",
        {"bytes": picture(1), "path": None},
        {"bytes": None, "path": "pictures/1.png"},
        ["pictures/1.png"],
    ],
    ids=["bytes", "path", "feature", "feature by path", "list"],
)
def test_images_as_bytes_or_by_path(tmp_path, image):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "1.png").write_bytes(picture(1))
    found = next(read(put(tmp_path / "a.parquet", [record(0, image=image)]))).image
    content = found.load() if isinstance(found, Encoded) else found.read_bytes()
    assert content == picture(1)


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (None, "it has no image"),
        ({"bytes": None, "path": None}, "it has no image"),
        ({"bytes": None, "path": "../outside.png"}, "leaves the folder"),
        ({"bytes": None, "path": "none.png"}, "does not exist"),
        ({"bytes": b"no image", "path": "a.png"}, "a.png is not an image"),
        ({"bytes": b"", "path": "a.png"}, "is an empty file"),
        ({"bytes": picture(1)[:60], "path": "a.png"}, "truncated or damaged"),
        ([picture(1), picture(2)[:60]], "its image 2 of 2: image in the table"),
        ([], "it has no image"),
        ([{"bytes": picture(1), "path": None}, None], "its image 2 of 2 is missing"),
        ([{"bytes": None, "path": "none.png"}] * 2, "image 'none.png' does not exist"),
        ([picture(1)] * (MAX_IMAGES + 1), f"{MAX_IMAGES + 1} images, more than {MAX_IMAGES}"),
        (7, "neither bytes nor a path"),
    ],
)
def test_a_bad_image_costs_its_row(tmp_path, image, reason):
    (tmp_path / "outside.png").write_bytes(picture(1))
    folder = tmp_path / "mine"
    put(folder / "a.parquet", [record(0)])
    put(folder / "b.parquet", [record(1, image=image)])
    layout = write_prepared_data(read(folder), tmp_path / "out", reader=READER, source=folder, options={})
    (skip,) = layout.skipped
    assert skip.where == "row 0 of b.parquet"
    assert reason in skip.reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"options": None}, "its options are None"),
        ({"options": "liver"}, "not a JSON list"),
        ({"answer": ["spleen"]}, "answer is ['spleen'], not a text"),
        ({"answer": "heart"}, "not among its options"),
        ({"question": "a\0b"}, "NUL"),
        ({"question": None}, "no question"),
    ],
)
def test_a_bad_row_is_skipped(tmp_path, changes, reason):
    folder = tmp_path / "mine"
    put(folder / "a.parquet", [record(0)])
    put(folder / "b.parquet", [record(1, **changes)])
    layout = write_prepared_data(read(folder), tmp_path / "out", reader=READER, source=folder, options={})
    (skip,) = layout.skipped
    assert reason in skip.reason


def test_an_image_of_too_many_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface, "MAX_MEMBER_BYTES", 10)
    (skip,) = read(put(tmp_path / "a.parquet", [record(0)]))
    assert isinstance(skip, Skipped)
    assert "more than 10" in skip.reason


def test_answers_without_options(tmp_path):
    answers = ["Yes.", "Liver", "Spleen", "no", "Left kidney"]
    rows = [record(n, options=..., answer=answers[n % 5]) for n in range(20)]
    path = put(tmp_path / "a.parquet", rows)
    found = list(read(path))
    assert found[0].options == ("yes", "no")
    assert (found[0].answer, found[3].answer) == ("yes", "no")
    assert all(
        set(row.options) == {"Liver", "Spleen", "Left kidney"} for row in found if row.answer not in ("yes", "no")
    )
    left = list(read(path, open="skip"))
    assert sum(isinstance(row, SourceRow) for row in left) == 8
    assert all(row.chosen for row in left if isinstance(row, Skipped))


@pytest.mark.parametrize(
    ("column", "kind"),
    [*product(("image", "images", "views"), ("features", "bytes", "paths")), ("images", "JSON"), ("views", "JSON")],
)
def test_lists_of_images_are_read_in_order(tmp_path, column, kind):
    folder, numbers = tmp_path / "mine", [5, 2, 9]
    folder.mkdir()
    for number in numbers:
        (folder / f"{number}.png").write_bytes(picture(number))
    value = {
        "features": [{"bytes": picture(number), "path": f"{number}.png"} for number in numbers],
        "bytes": [picture(number) for number in numbers],
        "paths": [f"{number}.png" for number in numbers],
        "JSON": json.dumps([f"{number}.png" for number in numbers]),
    }[kind]
    put(folder / "a.parquet", [record(0, **{"image": ..., column: value})])
    given = ["images=views"] if column == "views" else []
    rows = read(folder, column=given)
    layout = write_prepared_data(rows, tmp_path / "out", reader=READER, source=folder, options={})
    assert layout.skipped == ()
    (row,) = read_examples(tmp_path / "out" / "a.jsonl").examples
    assert [path.read_bytes() for path in row.images] == [picture(number) for number in numbers]


def test_only_some_files_and_no_images(tmp_path):
    put(tmp_path / "data" / "train-00000-of-00001.parquet", [record(0, image=...)])
    put(tmp_path / "data" / "test-00000-of-00001.parquet", [record(1, image=...)])
    (row,) = read(tmp_path, files="data/test-*", without_images=True, split="mine")
    assert (row.question, row.image, row.split) == ("Which organ is number 1?", None, "mine")
    with pytest.raises(ValueError, match=r"no column for image"):
        next(read(tmp_path))


def test_images_are_read_a_few_at_a_time(tmp_path):
    """Two hundred images of a megabyte each are never in memory together."""
    image = {"bytes": picture(1) + bytes(2**20), "path": "a.png"}
    path = put(tmp_path / "a.parquet", [record(n, image=image) for n in range(200)])
    tracemalloc.start()
    assert sum(1 for _ in parquet_rows.ParquetTable(path).rows()) == 200
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * parquet_rows.BATCH * 2**20


def test_a_group_that_unpacks_to_too_much(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_rows, "MAX_GROUP_BYTES", 100)
    with pytest.raises(ValueError, match="smaller row groups"):
        next(read(put(tmp_path / "a.parquet", [record(0)])))


def test_sources_that_cannot_be_read(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"holds no parquet files.*refs/convert/parquet"):
        next(read(tmp_path))
    path = put(tmp_path / "a.parquet", [record(0)])
    content = bytearray(path.read_bytes())
    content[4 : len(content) // 2] = bytes(len(content) // 2 - 4)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.parquet (is damaged|cannot be read)"):
        list(read(path))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"a\.parquet cannot be read"):
        list(read(path))
    for pattern in ("/etc/*", ""):
        with pytest.raises(ValueError, match=r"--files .*relative"):
            list(read(tmp_path, files=pattern))
    with pytest.raises(ValueError, match=r"neither a local path"):
        next(read(tmp_path / "none"))
    with pytest.raises(ValueError, match="neither a local path"):
        next(read(Path("../up")))


def test_values_that_python_has_not(tmp_path):
    columns = {"question": ["Which?"], "options": [["liver", "spleen"]], "answer": ["A"]}
    late = pyarrow.array([2**55], type=pyarrow.timestamp("ms"))  # beyond the year 9999
    no_text = pyarrow.Array.from_buffers(
        pyarrow.string(), 1, [None, pyarrow.py_buffer(bytes(4) + b"\1\0\0\0"), pyarrow.py_buffer(b"\xff")]
    )
    for name, column in (("id", late), ("question", no_text)):
        pyarrow.parquet.write_table(pyarrow.table({**columns, name: column}), tmp_path / "a.parquet")
        with pytest.raises(ValueError, match=r"a\.parquet is damaged after row 0"):
            list(read(tmp_path, without_images=True))


def test_random_damage_costs_rows_or_says_so(tmp_path):
    whole = put(tmp_path / "a.parquet", [record(0), record(1)]).read_bytes()
    rng, ended = np.random.default_rng(0), Counter()
    for _ in range(200):
        content = bytearray(whole)
        for place in rng.integers(len(whole), size=rng.integers(1, 6)):
            content[place] = rng.integers(256)
        (tmp_path / "a.parquet").write_bytes(content)
        try:
            said = "; ".join(row.reason for row in read(tmp_path) if isinstance(row, Skipped))
        except ValueError as error:
            said = str(error)
            ended["an error" if "a.parquet" in said else said] += 1
        else:
            ended["skips" if said else "whole"] += 1
    assert set(ended) <= {"an error", "skips", "whole"}
    assert ended["an error"] > 100


def test_a_data_set_by_its_name_where_there_is_no_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"some/data .*hf download some/data --repo-type dataset"):
        next(read(Path("some/data")))


def test_a_data_set_by_its_name(tmp_path, monkeypatch):
    """What the hub would put into its cache; the name stays in the manifest."""
    put(tmp_path / "cache" / "data" / "train-00000-of-00001.parquet", [record(0)])
    asked = {}

    def snapshot_download(name, **options):
        asked.update(options, name=name)
        return str(tmp_path / "cache")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    source = Path("some/data")
    write_prepared_data(read(source, revision="main"), tmp_path / "out", reader=READER, source=source, options={})
    assert (asked["name"], asked["repo_type"], asked["revision"]) == ("some/data", "dataset", "main")
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["source"] == "some/data"


def test_without_pyarrow_the_message_says_what_to_install(tmp_path, monkeypatch):
    path = put(tmp_path / "a.parquet", [record(0)])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"pip install .*\.\[readers\]"):
        next(read(path))
