"""Rows and pictures that stand in test and training data, by kind, and what is said of them."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from rlmed.core.types import Example
from rlmed.data.leakage.findings import (
    FileLeakage,
    Leak,
    LeakageReport,
    check_no_leakage,
    describe,
    doubt_lines,
    leakage_lines,
)
from rlmed.data.leakage.near_duplicates import NearDuplicate, NearDuplicates
from rlmed.data.leakage.search import find_leakage
from tests.unit.rlmed.data.pictures import picture, save


def row(
    name: str,
    image: Path | None,
    question: str = "Which?",
    options: tuple[str, ...] = ("a", "b"),
    answer: int = 0,
    more: tuple[Path, ...] = (),
):
    return Example(id=name, image=image, question=question, options=options, answer=answer, more_images=more)


@pytest.fixture
def train(tmp_path: Path) -> list[Example]:
    paths = [save(tmp_path, f"train/{name}.png", picture(seed)) for seed, name in enumerate("abcdefgh")]
    return [row(f"train-{place}", path) for place, path in enumerate(paths)]


def only(report: LeakageReport) -> Leak:
    (leak,) = report.leaks
    return leak


def test_the_same_file_under_another_name(train: list[Example], tmp_path: Path) -> None:
    copy = tmp_path / "test" / "other.png"
    copy.parent.mkdir()
    shutil.copy(train[2].image or "", copy)
    leak = only(find_leakage(train, {"ct": [row("t", copy)]}))
    assert (leak.kind, leak.likeness, leak.test_ids, leak.train_ids) == ("file", 1.0, ("t",), ("train-2",))
    assert (leak.test_image, leak.train_image) == (str(copy), str(train[2].image))


def test_the_same_pixels_in_another_file(train: list[Example], tmp_path: Path) -> None:
    copy = save(tmp_path, "test/x.tif", picture(4))
    leak = only(find_leakage(train, {"ct": [row("t", copy)]}))
    assert (leak.kind, leak.likeness, leak.train_ids) == ("pixels", 1.0, ("train-4",))


def test_a_changed_copy(train: list[Example], tmp_path: Path) -> None:
    copy = save(tmp_path, "test/x.jpg", picture(5).resize((100, 80)), quality=60)
    leak = only(find_leakage(train, {"ct": [row("t", copy)]}))
    assert (leak.kind, leak.train_ids) == ("near", ("train-5",))
    assert 0.72 <= leak.likeness < 1


def slices(folder: Path, numbers: list[int], kind: str = "png") -> list[Path]:
    """Pictures that drift from one to the next as slices do."""
    first, last = (np.asarray(picture(seed).filter(ImageFilter.GaussianBlur(2)), dtype=float) for seed in (50, 51))
    angles = [0.5 * number for number in numbers]
    mixed = [128 + np.cos(angle) * (first - 128) + np.sin(angle) * (last - 128) for angle in angles]
    return [
        save(folder, f"brain_{number:03d}.{kind}", Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)))
        for number, pixels in zip(numbers, mixed, strict=True)
    ]


def test_neighbouring_slices_need_name_and_look(train: list[Example], tmp_path: Path) -> None:
    even = slices(tmp_path / "s", [2, 12, 22])
    odd = slices(tmp_path / "s", [3, 7])
    other = save(tmp_path, "s/brain_013.png", picture(60))  # a neighbour by its name alone
    rows = [*train, *(row(path.stem, path) for path in even)]
    tests = [row(path.stem, path) for path in (*odd, other)]
    leak = only(find_leakage(rows, {"mri": tests}))
    assert (leak.kind, leak.test_ids, leak.train_ids) == ("slice", ("brain_003",), ("brain_002",))
    # without the names only the look is left, and the slices are not similar enough for a copy
    moved = [save(tmp_path, f"moved/{name}.png", Image.open(path)) for name, path in zip("xy", odd, strict=True)]
    assert not find_leakage(rows, {"mri": [row("m", path) for path in moved[1:]]}).leaks


def test_a_question_that_is_in_training_is_named(train: list[Example]) -> None:
    image = train[0].image
    tests = [
        row("same", image, "  WHICH? ", ("b", "A"), 1),
        row("other question", image, "Where?"),
        row("other options", image, "Which?", ("a", "c")),
        row("other answer", image, answer=1),
        row("other picture", train[3].image, "Where?"),
    ]
    report = find_leakage(train[:2], {"ct": tests})
    leak = only(report)
    assert leak.test_ids == ("same", "other question", "other options", "other answer")
    assert leak.repeated_ids == ("same",)
    (file,) = report.files
    assert (file.rows, file.leaking_rows, file.repeated_rows) == (5, 4, 1)
    assert (file.images, file.images_by_kind) == (2, {"file": 1})
    assert report.leaking_ids("ct") == set(leak.test_ids)
    assert report.leaking_ids("mri") == set()


def test_questions_of_other_tasks_repeat_whatever_the_order_of_their_answers(train: list[Example]) -> None:
    def asked(name: str, task: str, key: str, *answers: object) -> Example:
        return Example(name, train[0].image, "Which?", task=task, truth={key: list(answers)})

    known = [
        asked("o", "open", "answers", "the spleen", "spleen"),
        asked("l", "labels", "labels", "cyst", "mass"),
        asked("g", "grounding", "boxes", [0.1, 0.2, 0.3, 0.4], [0.5, 0.1, 0.9, 0.2]),
    ]
    tests = [
        asked("open", "open", "answers", "Spleen", "the spleen"),
        asked("labels", "labels", "labels", "mass", "Cyst"),
        asked("boxes", "grounding", "boxes", [0.5, 0.1, 0.9, 0.2], [0.1, 0.2, 0.3, 0.4]),
        asked("other corners", "grounding", "boxes", [0.2, 0.1, 0.3, 0.4], [0.5, 0.1, 0.9, 0.2]),
        asked("fewer", "labels", "labels", "mass"),
        row("letters", train[0].image, options=("mass", "cyst")),
    ]
    assert only(find_leakage(known, {"all": tests})).repeated_ids == ("open", "labels", "boxes")


def test_any_image_of_a_test_row_against_any_of_a_training_row(tmp_path: Path) -> None:
    a, b, c, d, e, f, g = (save(tmp_path, f"train/{name}.png", picture(i)) for i, name in enumerate("abcdefg"))
    new = [save(tmp_path, f"test/new{seed}.png", picture(seed)) for seed in range(70, 75)]
    near = save(tmp_path, "test/near.jpg", picture(6).resize((100, 80)), quality=60)  # of g
    train = [row("train-0", a, more=(b,)), row("train-1", c, more=(d, e)), row("train-2", f, "Where?", more=(g, g))]
    tests = [
        row("last", new[0], more=(new[1], e)),
        row("middle", new[2], "Where?", more=(near, new[3])),
        row("clean", new[4], more=(new[0],)),
        row("text", None),
    ]
    report = find_leakage(train, {"ct": tests})
    assert [(leak.kind, leak.test_ids, leak.train_ids, leak.repeated_ids) for leak in report.leaks] == [
        ("file", ("last",), ("train-1",), ("last",)),
        ("near", ("middle",), ("train-2",), ("middle",)),
    ]
    assert [(leak.test_image, leak.train_image) for leak in report.leaks] == [(str(e), str(e)), (str(near), str(g))]
    (file,) = report.files
    assert (file.rows, file.images, file.leaking_rows, file.repeated_rows) == (4, 7, 2, 2)
    assert file.images_by_kind == {"file": 1, "near": 1}
    texts = [describe(leak) for leak in report.leaks]
    assert re.match(r"row last \(image 3 of 3, e\.png\) and training row train-1 \(image 3 of 3, e\.png\)", texts[0])
    assert re.match(r"row middle \(image 2 of 3, near\.jpg\) .* \(image 2 of 3, g\.png\)", texts[1])
    assert LeakageReport.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_one_image_of_several_that_is_all_of_a_training_row(train: list[Example], tmp_path: Path) -> None:
    new = save(tmp_path, "test/new.png", picture(70))
    assert train[3].image is not None
    report = find_leakage(train, {"ct": [row("t", new, more=(train[3].image, train[3].image))]})
    leak = only(report)
    assert describe(leak).startswith("row t (image 2 of 3, d.png) and training row train-3 (d.png): same file")
    assert report.to_json()["leaks"][0].get("train_place") is None
    assert report.files[0].rows == 1


def test_rows_without_an_image() -> None:
    report = find_leakage(
        [row("a", None), row("b", None, "Where?")], {"t": [row("x", None, "Where?"), row("y", None, "Who?")]}
    )
    leak = only(report)
    assert (leak.kind, leak.test_image, leak.test_ids, leak.train_ids) == ("text", None, ("x",), ("b",))
    assert report.files[0].images_by_kind == {"text": 1}
    assert "row x asks what training row b asks" in leakage_lines(report)[0]


def test_a_text_that_many_rows_repeat_is_listed_once(train: list[Example]) -> None:
    """A report grows with the rows, not with rows times rows."""
    where, who = ([row(f"{who}{i}", None, who) for i in range(30)] for who in ("Where?", "Who?"))
    tests = [row(f"t{i}", None, question) for i, question in enumerate(["WHERE?", "What?", "Who?", "Where?"])]
    report = find_leakage([*train, *where, *who], {"t": [*tests, row("u", train[0].image)]})
    assert [(leak.kind, leak.test_ids, len(leak.train_ids)) for leak in report.leaks] == [
        ("file", ("u",), 1),
        ("text", ("t0", "t3"), 30),
        ("text", ("t2",), 30),
    ]
    (file,) = report.files
    assert (file.leaking_rows, file.repeated_rows, file.images_by_kind) == (4, 4, {"file": 1, "text": 3})
    assert report.leaks[1].repeated_ids == ("t0", "t3")


def test_who_leaks_is_not_in_doubt_too(train: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By another training picture than the one that it leaks from."""
    doubtful = (NearDuplicate(0, 5, 0.8), NearDuplicate(1, 6, 0.8), NearDuplicate(1, 7, 0.75))
    monkeypatch.setattr("rlmed.data.leakage.search.NearDuplicateSearch.result", lambda _: NearDuplicates((), doubtful))
    paths = [tmp_path / "test" / "a.png", save(tmp_path, "test/b.png", picture(80))]
    paths[0].write_bytes((train[2].image or tmp_path).read_bytes())
    (file,) = find_leakage(train, {"ct": [row(path.stem, path) for path in paths]}).files
    assert (file.images_by_kind, file.doubtful) == ({"file": 1}, 1)


def test_doubt_is_said_but_no_leak() -> None:
    files = (FileLeakage("ct", 30, 20, 0, 0, {}, 7), FileLeakage("mri", 30, 20, 0, 0, {}, 0))
    report = LeakageReport(100, 90, files, ())
    (line,) = doubt_lines(report)
    assert line.startswith("7 of 20 pictures of ct look much like a training picture")
    assert leakage_lines(report) == []
    check_no_leakage(report)


def test_each_picture_counts_once_under_its_surest_kind(train: list[Example], tmp_path: Path) -> None:
    again = save(tmp_path, "train/again.jpg", picture(1), quality=70)
    tests = {"ct": [row("x", train[1].image), row("y", train[1].image, "Where?")], "mri": [row("z", train[1].image)]}
    report = find_leakage([*train, row("again", again)], tests)
    assert [(leak.file, leak.kind, leak.train_ids) for leak in report.leaks] == [
        ("ct", "file", ("train-1",)),
        ("ct", "near", ("again",)),
        ("mri", "file", ("train-1",)),
        ("mri", "near", ("again",)),
    ]
    assert [file.images_by_kind for file in report.files] == [{"file": 1}, {"file": 1}]
    assert [file.leaking_rows for file in report.files] == [2, 1]


def test_clean_data_and_no_data(train: list[Example], tmp_path: Path) -> None:
    clean = [row(f"t{seed}", save(tmp_path, f"test/{seed}.png", picture(seed))) for seed in range(70, 76)]
    report = find_leakage(train, {"ct": clean})
    assert report.leaks == ()
    assert report.files[0].leaking_rows == 0
    assert leakage_lines(report) == []
    check_no_leakage(report)
    assert find_leakage([], {"ct": clean}).leaks == ()
    assert find_leakage(train, {}).files == ()


def test_strict_names_rows_and_advice(train: list[Example]) -> None:
    report = find_leakage(train, {"ct": [row("t-1", train[6].image), row("t-2", None)]})
    with pytest.raises(ValueError, match=r"1 of 2 .*\bct\b.*t-1 \(g\.png\).*train-6 \(g\.png\).*rlmed\.leakage"):
        check_no_leakage(report)
    assert "1 of them with question and answer" in leakage_lines(report)[0]
    assert "same file, likeness 1.00" in describe(report.leaks[0])


def test_a_report_comes_back_from_json(train: list[Example]) -> None:
    report = find_leakage(train, {"ct": [row("t", train[0].image)], "text": [row("u", None)]})
    assert report.leaks
    assert LeakageReport.from_json(json.loads(json.dumps(report.to_json()))) == report
    assert dataclasses.asdict(report)["files"][0]["name"] == "ct"
