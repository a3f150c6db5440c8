"""Files in COCO's format: a question for each image and category, boxes as corners."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rlmed.data.readers.base import Skipped, SourceRow
from rlmed.data.readers.boxes import corners
from rlmed.data.readers.formats.coco import read
from tests.unit.rlmed.data.pictures import marked


def content(**changes: Any) -> dict[str, Any]:
    return {
        "images": [
            {"id": 7, "file_name": "a.png", "width": 40, "height": 30},
            {"id": 8, "file_name": "b.png", "width": 40, "height": 30},
        ],
        "categories": [{"id": 1, "name": "nodule"}, {"id": 2, "name": " pleural effusion "}, {"id": 5, "name": "mass"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 2, "bbox": [1, 2, 10, 5.5]},
            {"id": 2, "image_id": 7, "category_id": 1, "bbox": [20, 10, 5, 5]},
            {"id": 3, "image_id": 7, "category_id": 2, "bbox": [30, 20, 10.4, 10], "iscrowd": 0},
        ],
        **changes,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in "ab":
        marked(ord(name), (40, 30)).save(tmp_path / f"{name}.png")
    return tmp_path


def put(folder: Path, name: str = "instances_train.json", **changes: Any) -> Path:
    path = folder / name
    path.write_text(json.dumps(content(**changes)))
    return path


def test_an_image_and_category_is_a_row_and_boxes_are_corners(folder: Path) -> None:
    rows = list(read(put(folder), modality="X-ray"))
    assert rows == [
        SourceRow(
            where="image 0 of instances_train.json",
            split="instances_train",
            id=f"7-{category}",
            question=f"Which part of the image shows {name}?",
            options=(),
            answer=answer,
            image=folder / "a.png",
            modality="X-ray",
            kind=name,
            task="grounding",
        )
        for category, name, answer in (
            # cut at the image's edge: 0.4 pixels are a rounding
            (2, "pleural effusion", [[1, 2, 11, 7.5], [30, 20, 40, 30]]),
            (1, "nodule", [[20, 10, 25, 15]]),
        )
    ]
    (first, *_) = read(folder / "instances_train.json", question="Mark each {category}.", split="test")
    assert isinstance(first, SourceRow)
    assert (first.question, first.split) == ("Mark each pleural effusion.", "test")


def test_absent_categories_are_asked_for_on_demand(folder: Path) -> None:
    path = put(folder)
    rows = [row for row in read(path, absent=2) if isinstance(row, SourceRow)]
    assert [(row.id, len(row.answer)) for row in rows[:3]] == [("7-2", 2), ("7-1", 1), ("7-5", 0)]
    assert Counter(row.id.partition("-")[0] for row in rows) == {"7": 3, "8": 2}
    assert rows == list(read(path, absent=2))
    drawn = {tuple(row.id for row in read(path, absent=1, seed=seed))[-1] for seed in range(20)}
    assert drawn == {"8-1", "8-2", "8-5"}


def test_a_folder_of_files_and_images_elsewhere(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    put(tmp_path / "annotations", "train.json")
    put(tmp_path / "annotations", "test.json")
    rows = list(read(tmp_path / "annotations", images=folder))
    assert [row.split for row in rows if isinstance(row, SourceRow)] == ["test", "test", "train", "train"]


@pytest.mark.parametrize(
    ("annotation", "reason"),
    [
        ({"bbox": [1, 2, 40.5, 3]}, "leaves its image of 40x30 pixels"),
        ({"bbox": [40.5, 2, 0.4, 3]}, "lies outside of its image"),
        ({"bbox": [1, 2, 3]}, "[1, 2, 3] is not four numbers"),
        ({}, "None is not four numbers"),
        ({"category_id": 9, "bbox": [1, 2, 3, 4]}, "its category 9 is not in the file's list"),
        ({"image_id": 99, "bbox": [1, 2, 3, 4]}, "their image 99 is not in the file's list"),
        ({"bbox": [1, 2, 3, 4], "iscrowd": 1}, "holds a crowd"),
    ],
)
def test_a_bad_box_costs_its_row(folder: Path, annotation: dict[str, Any], reason: str) -> None:
    good = {"image_id": 8, "category_id": 1, "bbox": [1, 2, 3, 4]}
    rows = list(read(put(folder, annotations=[{"image_id": 7, "category_id": 1, **annotation}, good])))
    (bad,) = (row for row in rows if isinstance(row, Skipped))
    assert reason in bad.reason
    assert bad.chosen == ("crowd" in reason)
    assert [row.id for row in rows if isinstance(row, SourceRow)] == ["8-1"]


def test_a_missing_image_costs_its_rows(folder: Path) -> None:
    path = put(folder, images=[{"id": 7, "file_name": "nowhere.png"}])
    assert ["does not exist" in row.reason for row in read(path) if isinstance(row, Skipped)] == [True, True]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": {}}, "no list 'images'"),
        ({"categories": [7]}, "no list 'categories'"),
        ({"categories": [{"id": 1, "name": " "}]}, "category 1 has the name ' '"),
        ({"annotations": [{"image_id": 7}]}, "element 0 of 'annotations' has no category_id"),
        ({"images": [{"id": 7, "file_name": "a.png"}] * 2}, "two images with the id 7"),
    ],
)
def test_a_file_of_another_kind_is_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(read(put(folder, **changes)))


def test_arguments_are_checked(folder: Path, tmp_path: Path) -> None:
    for options, message in (({"question": "Where?"}, "'Where[?]'"), ({"absent": -1}, "--absent -1")):
        with pytest.raises(ValueError, match=message):
            list(read(put(folder), **options))  # type: ignore[arg-type]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no \.json file"):
        list(read(tmp_path / "empty"))
    (folder / "x.json").write_text("[1,")
    with pytest.raises(ValueError, match=r"x\.json is not valid JSON"):
        list(read(folder / "x.json"))


def test_corners_cut_a_pixel_and_no_more() -> None:
    assert corners([-0.5, 3, 10, 4]) == [0, 3, 9.5, 7]
    assert corners([0, 0, 41, 30], (40, 30)) == [0, 0, 40, 30]
    with pytest.raises(ValueError, match=r"-1\.5"):
        corners([-1.5, 3, 10, 4])
    with pytest.raises(ValueError, match="inf"):
        corners([0, 3, float("inf"), 4])
