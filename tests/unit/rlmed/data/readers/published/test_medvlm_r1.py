"""MedVLM-R1's data in small files: the paper's splits and prompt texts, no test row in training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlmed.core.statistics import leave_one_out_prior
from rlmed.data.examples import read_examples
from rlmed.data.prepare.prepared_data import write_prepared_data
from rlmed.data.readers.base import Skipped, SourceRow
from rlmed.data.readers.published.medvlm_r1 import READER, read
from tests.unit.rlmed.data.pictures import marked

SUBSETS = ("MR (Mag-netic Resonance Imaging)", "CT(Computed Tomography)", "X-Ray")


def question_row(number: int, subset: str = SUBSETS[0], **changes) -> dict:
    options = changes.pop("options", ["Hemorrhage", "Acute infarct", "Abscess"])
    place = changes.pop("place", number % len(options))
    question = changes.pop("question", f"What is apparent in image {number}?")
    lines = [str(question), *(f"{letter}) {option}" for letter, option in zip("ABCDEFGHIJ", options, strict=False))]
    row = {
        "image": [f"images/{number}.png"],
        "problem": "\n".join(lines),
        "solution": "ABCDEFGHIJ"[place],
        "question": question,
        "options": options,
        "answer": options[place],
        "dataset": "OmniMedVQA",
        "subset": subset,
    }
    return {key: value for key, value in {**row, **changes}.items() if value is not ...}


@pytest.fixture
def folder(tmp_path) -> Path:
    root = tmp_path / "source"
    (root / "images").mkdir(parents=True)
    for number in range(12):
        marked(number).save(root / "images" / f"{number}.png")
    return root


def write(path: Path, rows: list) -> Path:
    path.write_text(json.dumps(rows, indent=4), encoding="utf-8")
    return path


def train_file(path: Path, numbers, **changes) -> Path:
    keep = ("image", "question", "options", "answer", "dataset", "subset")
    rows = [{key: value for key, value in question_row(n, **changes).items() if key in keep} for n in numbers]
    if path.suffix == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pytest.importorskip("pyarrow").Table.from_pylist(rows), path)
        return path
    return write(path, rows)


def test_rows_go_where_the_paper_has_them_and_read_as_its_problems(folder, tmp_path):
    test = [question_row(number, SUBSETS[number // 2]) for number in range(6)]
    write(folder / "test.json", test)
    layout = write_prepared_data(read(folder), tmp_path / "out", reader=READER, source=folder, options={})
    assert {name: split.by_modality for name, split in layout.splits.items()} == {
        "test_mri": {"MRI": 2},
        "test_ct": {"CT": 2},
        "test_xray": {"X-ray": 2},
    }
    read_back = [row for name in layout.splits for row in read_examples(tmp_path / "out" / f"{name}.jsonl").examples]
    assert [(row.question_text, row.letter) for row in read_back] == [(row["problem"], row["solution"]) for row in test]
    assert [row.id for row in read_back] == [f"test-{number:03d}" for number in range(6)]
    assert [row.image.read_bytes() for row in read_back] == [
        (folder / "images" / f"{number}.png").read_bytes() for number in range(6)
    ]


@pytest.mark.parametrize(
    "options",
    [
        ["B", "A", "C"],  # letters as texts: the text counts
        ["A. carotis", "A. femoralis", "A. poplitea"],
        ["none of A and B", "both", "B only"],
        ["liver ", " spleen", "kidney\t"],
        ["leber und\tmilz", "größer als 3 cm", "“quoted”, ‘so’"],
        [f"finding {n}" for n in range(10)],
    ],
)
def test_odd_options_keep_their_letter(folder, tmp_path, options):
    test = [question_row(number, options=options, place=number % len(options)) for number in range(4)]
    path = write(folder / "test.json", test)
    layout = write_prepared_data(read(path), tmp_path / "out", reader=READER, source=path, options={})
    rows = read_examples(tmp_path / "out" / "test_mri.jsonl").examples
    assert layout.skipped == ()
    assert [row.letter for row in rows] == [row["solution"] for row in test]
    assert rows[1].options == tuple(option.strip() for option in options)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"solution": "C", "place": 1}, "'Acute infarct' is not its solution 'C'"),
        ({"answer": "Tumor"}, "'Tumor' is not among its options"),
        ({"options": "liver", "answer": "l", "place": 0}, "options are 'liver', not a list"),
        ({"problem": "Something else?\nA) x"}, "is not its question and"),
        ({"subset": "Dermoscopy"}, "subset 'Dermoscopy' is none of MRI, CT, X-ray"),
        ({"subset": ...}, "subset None is none of"),
        ({"image": ["images/1.png", "b.png"]}, "'b.png' does not exist"),
        ({"image": ["images/1.png", None]}, "one of its 2 images is blank"),
        ({"image": []}, "it has no image"),
        ({"image": ...}, "it has no image"),
        ({"image": ["images/99.png"]}, "'images/99.png' does not exist"),
        ({"image": ["../outside.png"]}, "leaves the folder"),
        ({"image": ["/etc/hostname"]}, "leaves the folder"),
        ({"image": ["images/1\0.png"]}, "not a path"),
        ({"image": [7]}, "'7' does not exist"),
        ({"image": ["half \ud800.png"]}, "not a path"),
        ({"image": ["x" * 300]}, "does not exist"),
        ({"question": {"a": 1}, "problem": None}, "question is {'a': 1}, not a text"),
    ],
)
def test_a_row_whose_parts_disagree_is_skipped(folder, changes, reason):
    marked().save(folder.parent / "outside.png")
    path = write(folder / "test.json", [question_row(1), question_row(2, **changes), "no object"])
    good, skip, nothing = read(path)
    assert isinstance(good, SourceRow)
    assert isinstance(skip, Skipped)
    assert (skip.where, skip.id) == ("row 1 of test.json", "test-001")
    assert reason in skip.reason
    assert "not a JSON object but 'no object'" in nothing.reason


def test_rows_about_several_images(folder, tmp_path):
    """Rows ask the same only if all their images are."""
    names = [[f"images/{number}.png" for number in numbers] for numbers in ((3, 0, 1), (3, 0), (3, 0, 1))]
    write(folder / "test.json", [question_row(0, image=names[0])])
    rows = [question_row(0, image=image) for image in names[1:]]
    write(tmp_path / "train.json", rows)
    test, train, repeated = read(folder, train=tmp_path / "train.json")
    assert [path.name for path in test.images] == ["3.png", "0.png", "1.png"]
    assert [path.name for path in train.images] == ["3.png", "0.png"]
    assert "it is a test row too" in repeated.reason


@pytest.mark.parametrize("ending", ["parquet", "json"])
def test_training_rows_are_the_first_mri_rows_that_are_no_test_rows(folder, tmp_path, ending):
    write(folder / "test.json", [question_row(number) for number in (0, 3)])
    data = train_file(tmp_path / f"train.{ending}", [0, 1, 2, 3, 1, 99, 4, 5])  # 99 has no image
    rows = list(read(folder, train=data, train_rows=3))
    assert [(row.split, row.id) for row in rows if isinstance(row, SourceRow)] == [
        ("test_mri", "test-000"),
        ("test_mri", "test-001"),
        ("train_mri", "train-00001"),
        ("train_mri", "train-00002"),
        ("train_mri", "train-00006"),
    ]
    *left, behind = [row for row in rows if isinstance(row, Skipped)]
    assert [row.where for row in left] == [f"row {n} of train.{ending}" for n in (0, 3, 4, 5)]
    assert (behind.rows, behind.chosen, behind.reason) == (1, True, "it comes after the 3 training rows")
    assert sum(row.rows if isinstance(row, Skipped) else 1 for row in rows) == 2 + 8
    assert all(row.chosen and "is a test row too" in row.reason for row in left[:2])
    assert (left[2].chosen, left[3].chosen) == (True, False)
    assert "training row before it" in left[2].reason
    assert rows[-2].options == ("Hemorrhage", "Acute infarct", "Abscess")


def test_rows_of_other_data_are_no_training_rows(folder, tmp_path):
    write(folder / "test.json", [question_row(0)])
    (tmp_path / "data").mkdir()
    train_file(tmp_path / "data" / "a.parquet", [1, 2], subset="CT(Computed Tomography)")
    train_file(tmp_path / "data" / "b.parquet", [3, 4])
    rows = list(read(folder, train=tmp_path / "data"))
    assert [row.id for row in rows if isinstance(row, SourceRow)] == ["test-000", "train-00000", "train-00001"]
    (others,) = [row for row in rows if isinstance(row, Skipped)]
    assert (others.where, others.rows, others.chosen, others.reason) == ("a.parquet", 2, True, "its subset is not MRI")


def test_a_whole_file_behind_the_training_rows_is_counted(folder, tmp_path):
    write(folder / "test.json", [question_row(0)])
    (tmp_path / "data").mkdir()
    train_file(tmp_path / "data" / "a.parquet", [1, 2])
    train_file(tmp_path / "data" / "b.json", [3, 4, 5])
    rows = list(read(folder, train=tmp_path / "data", train_rows=1))
    assert [(row.where, row.rows) for row in rows if isinstance(row, Skipped)] == [("a.parquet", 1), ("b.json", 3)]


def test_images_in_a_folder_of_another_layout(folder, tmp_path):
    images = tmp_path / "OmniMedVQA"
    (images / "Images" / "RadImageNet" / "brain").mkdir(parents=True)
    (images / "Images" / "other").mkdir()
    for number in (0, 1):
        (folder / "images" / f"{number}.png").rename(images / "Images" / "RadImageNet" / "brain" / f"{number}.png")
    (images / "Images" / "other" / "1.png").write_bytes(b"another of that name")
    path = write(folder / "test.json", [question_row(number) for number in (0, 1, 2)])
    found, several, none = read(path, images=images)
    assert found.image == images / "Images" / "RadImageNet" / "brain" / "0.png"
    assert "2 files have its name" in several.reason
    assert "does not exist" in none.reason


def test_a_file_of_that_name_elsewhere_is_taken_only_below_the_images_that_are_named(folder):
    (folder / "holiday").mkdir()
    (folder / "images" / "1.png").rename(folder / "holiday" / "1.png")
    path = write(folder / "test.json", [question_row(1)])
    (skip,) = read(path)
    assert "does not exist" in skip.reason
    (row,) = read(path, images=folder)
    assert row.image == folder / "holiday" / "1.png"


def test_without_images_the_controls_can_still_be_computed(folder, tmp_path):
    path = write(tmp_path / "test.json", [question_row(number, place=0) for number in range(20, 40)])
    with pytest.raises(ValueError, match=r"\b20\. .*does not exist"):
        write_prepared_data(read(path), tmp_path / "out", reader=READER, source=path, options={})
    layout = write_prepared_data(
        read(path, without_images=True), tmp_path / "out", reader=READER, source=path, options={}
    )
    split = layout.splits["test_mri"]
    rows = read_examples(tmp_path / "out" / "test_mri.jsonl").examples
    assert (split.rows, split.images) == (20, 0)
    assert split.priors.leave_one_out == leave_one_out_prior(rows) == 1.0
    assert split.priors.chance == pytest.approx(1 / 3)


def test_sources_that_cannot_be_read(folder, tmp_path):
    with pytest.raises(ValueError, match="holds 0 JSON files"):
        list(read(folder))
    write(folder / "a.json", [question_row(0)])
    with pytest.raises(ValueError, match="must be positive"):
        list(read(folder, train_rows=0))
    with pytest.raises(ValueError, match=r"neither a folder nor a \.zip"):
        list(read(folder, images=tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no parquet, JSON"):
        list(read(folder, train=tmp_path / "empty"))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 is how it starts")
    with pytest.raises(ValueError, match=r"bad\.parquet (cannot|is a )"):
        list(read(folder, train=tmp_path / "bad.parquet"))
    write(folder / "b.json", [])
    with pytest.raises(ValueError, match="holds 2 JSON files"):
        list(read(folder))
