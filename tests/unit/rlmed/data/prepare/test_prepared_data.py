"""The layout: what is written is what `read_examples` takes; what it won't is a listed skip."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

from rlmed.core.files.atomic import RecordError
from rlmed.core.files.ownership import Owner
from rlmed.data.examples import read_examples
from rlmed.data.images import MAX_IMAGES, BadImageError
from rlmed.data.prepare import writer as layout_writer
from rlmed.data.prepare.prepared_data import write_prepared_data
from rlmed.data.readers.base import Picture, Reader, Skipped, SourceRow
from tests.unit.rlmed.data.pictures import marked

READER = Reader("mine", "a test", lambda source: iter(()), licence="CC0", citation="Someone 2024")


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    for name, grey in (("1.png", 10), ("2.png", 200), ("copy of 1.PNG", 10)):
        marked(grey).save(folder / name)
    (folder / "broken.png").write_bytes((folder / "1.png").read_bytes()[:60])
    return folder


def source_row(number: int = 1, **changes) -> SourceRow:
    content = {
        "where": f"line {number}",
        "split": "train",
        "id": f"q{number}",
        "question": "Which organ?",
        "options": ("liver", "spleen"),
        "answer": "liver",
        "image": None,
        "modality": "CT",
        "kind": "organ",
    }
    return SourceRow(**{**content, **changes})


def write(rows, folder: Path, source: Path, **changes):
    return write_prepared_data(rows, folder, **{"reader": READER, "source": source, "options": {}, **changes})


def test_the_manifest_lists_what_splits_share(tmp_path, source):
    rows = [
        source_row(1, image=source / "1.png"),
        source_row(2, image=source / "copy of 1.PNG", split="test_ct"),
        source_row(3, image=source / "2.png", split="test_mri"),
    ]
    write(rows, tmp_path / "out", source)
    found = json.loads((tmp_path / "out" / "manifest.json").read_text())["leakage"]
    assert [(file["name"], file["leaking_rows"]) for file in found["files"]] == [("test_ct", 1), ("test_mri", 0)]
    (leak,) = found["leaks"]
    assert (leak["kind"], leak["test_ids"], leak["repeated_ids"]) == ("file", ["q2"], ["q2"])
    assert (tmp_path / "out" / leak["test_image"]).is_file()  # a path inside of the folder
    write(rows, tmp_path / "unseen", source, leakage=False)
    assert json.loads((tmp_path / "unseen" / "manifest.json").read_text())["leakage"] is None
    assert write(rows[1:], tmp_path / "tests", source).leakage is None


def test_what_is_written_is_what_a_run_reads(tmp_path, source):
    rows = [
        source_row(1, image=source / "1.png", question=" Which organ? ", options=("liver ", "spleen"), answer="B"),
        source_row(2, image=source / "2.png", split="test_mri", modality="MRI"),
        source_row(3, split="train", answer="SPLEEN"),
    ]
    layout = write(rows, tmp_path / "out", source)
    read = read_examples(tmp_path / "out" / "train.jsonl", on_bad_row="error")
    first, third = read.examples
    assert (first.id, first.question, first.options, first.letter) == ("q1", "Which organ?", ("liver", "spleen"), "B")
    assert (first.modality, first.kind) == ("CT", "organ")
    assert first.image is not None
    assert first.image.read_bytes() == (source / "1.png").read_bytes()
    assert (third.image, third.letter) == (None, "B")
    assert json.loads((tmp_path / "out" / "train.jsonl").read_text().splitlines()[0])["answer"] == "spleen"
    assert list(layout.splits) == ["train", "test_mri"]
    assert layout.skipped == ()


def test_rows_about_several_images_keep_their_order_and_others_their_bytes(tmp_path, source):
    paths = [source / name for name in ("2.png", "1.png", "copy of 1.PNG")]
    rows = [
        source_row(1, image=paths[0], more_images=tuple(paths[1:])),
        source_row(2, image=paths[1]),
        source_row(3),
    ]
    layout = write(rows, tmp_path / "out", source)
    assert layout.skipped == ()
    examples = read_examples(tmp_path / "out" / "train.jsonl", on_bad_row="error").examples
    assert [image.read_bytes() for image in examples[0].images] == [path.read_bytes() for path in paths]
    assert [len(example.images) for example in examples] == [3, 1, 0]
    lines = [json.loads(line) for line in (tmp_path / "out" / "train.jsonl").read_text().splitlines()]
    assert [sorted(line.keys() & {"image", "images"}) for line in lines] == [["images"], ["image"], ["image"]]
    assert layout.splits["train"].images == 2  # equal bytes are one image


def task_row(number: int, task: str, answer: object, **changes) -> SourceRow:
    return source_row(number, **{"task": task, "answer": answer, "options": (), **changes})


def test_rows_of_other_tasks_are_written_as_a_run_reads_them(tmp_path, source):
    image = source / "1.png"
    rows = [
        task_row(1, "open", ["liver", "the liver"]),
        task_row(2, "grounding", [[1, 2, 20, 40.0]], image=image),
        task_row(3, "grounding", [], image=image, split="test"),
        task_row(4, "labels", ["cyst"], options=("mass", "cyst")),
        task_row(5, "report", "Clear.", image=image, more_images=(source / "2.png",)),
        source_row(6),
    ]
    layout = write(rows, tmp_path / "out", source)
    assert layout.skipped == ()
    assert layout.splits["train"].by_task == {"choice": 1, "grounding": 1, "labels": 1, "open": 1, "report": 1}
    assert layout.splits["train"].priors is not None
    assert layout.splits["train"].priors.chance == 0.5  # of the multiple-choice row alone
    assert (layout.splits["test"].rows, layout.splits["test"].priors) == (1, None)
    examples = read_examples(tmp_path / "out" / "train.jsonl", on_bad_row="error").examples
    assert [(example.id, example.task) for example in examples] == [
        ("q1", "open"), ("q2", "grounding"), ("q4", "labels"), ("q5", "report"), ("q6", "choice"),
    ]  # fmt: skip
    open_, box, labels, report, _ = examples
    assert open_.truth == {"answers": ["liver", "the liver"]}
    assert box.truth["boxes"] == [[1 / 40, 2 / 40, 20 / 40, 40 / 40]]
    assert labels.truth == {"labels": ["cyst"], "known": ["mass", "cyst"]}
    assert (report.truth, len(report.images)) == ({"references": ["Clear."]}, 2)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["splits"]["test"]["priors"] is None
    assert manifest["splits"]["test"]["by_task"] == {"grounding": 1}


def test_a_bad_row_of_another_task_is_skipped_and_leaves_no_image_of_its_own(tmp_path, source):
    first, second = source / "1.png", source / "2.png"
    rows = [
        task_row(1, "grounding", [[1, 2, 3, 4]], image=first),
        task_row(2, "grounding", [[1, 2, 41, 4]], image=second),
        task_row(3, "grounding", [[1, 2, 41, 4]], image=first),
        task_row(4, "grounding", [[1, 2, 3, 4]]),
        task_row(5, "labels", ["edema"], options=("mass", "cyst"), image=second),
        task_row(6, "open", "  "),
        task_row(7, "open", ["a", "b\0"]),
        task_row(1, "open", "liver", image=second),
        task_row(8, "grounding", [], image=source / "broken.png"),
    ]
    layout = write(rows, tmp_path / "out", source)
    reasons = [row.reason for row in layout.skipped]
    for reason, said in zip(
        reasons,
        ("41", "41", "no image", "'edema'", "answer", "answer holds a NUL", "used by line 1", "truncated"),
        strict=True,
    ):
        assert said in reason
    assert len(list((tmp_path / "out" / "images").iterdir())) == 1
    assert layout.splits["train"].rows == 1
    # an image of a bad row serves a good one
    again = write([rows[1], task_row(9, "grounding", [[1, 2, 3, 4]], image=second)], tmp_path / "again", source)
    assert again.splits["train"].images == 1
    (example,) = read_examples(tmp_path / "again" / "train.jsonl").examples
    assert example.images[0].read_bytes() == second.read_bytes()


def test_a_bad_image_among_several_costs_its_row_and_leaves_none_of_its_images(tmp_path, source):
    first, second, broken = (source / name for name in ("1.png", "2.png", "broken.png"))
    rows = [
        source_row(1, image=first),
        source_row(2, image=first, more_images=(second, broken)),
        source_row(3, image=second, more_images=(first,) * MAX_IMAGES),
    ]
    layout = write(rows, tmp_path / "out", source)
    reasons = [row.reason for row in layout.skipped]
    assert re.match(r"its image 3 of 3: image broken\.png is truncated", reasons[0])
    assert f"it has {MAX_IMAGES + 1} images, more than {MAX_IMAGES}" in reasons[1]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    kept = [path.name for path in (tmp_path / "out" / "images").iterdir()]
    assert [f"images/{name}" for name in kept] == list(manifest["images"])
    assert len(kept) == 1
    # an image that was taken back is there for the next row
    rows[2] = source_row(3, image=second)
    assert len(list((write(rows, tmp_path / "other", source).folder / "images").iterdir())) == 2


def test_the_manifest_says_what_there_is(tmp_path, source):
    rows = [
        source_row(1, image=source / "1.png"),
        source_row(2, image=source / "copy of 1.PNG", kind="size"),
        source_row(3, image=source / "2.png"),
        Skipped("line 4", "q4", "it is in Chinese", chosen=True),
        source_row(5, answer="kidney"),
    ]
    write(rows, tmp_path / "out", source, options={"images": source / "sub", "column": ["a=b"]})
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    train = manifest["splits"]["train"]
    assert (train["rows"], train["images"]) == (3, 2)  # equal bytes are one image
    assert (train["by_modality"], train["by_kind"]) == ({"CT": 3}, {"organ": 2, "size": 1})
    assert train["sha256"] == hashlib.sha256((tmp_path / "out" / "train.jsonl").read_bytes()).hexdigest()
    assert train["priors"]["chance"] == 0.5
    assert train["priors"]["leave_one_out"] == 1.0  # "liver" is always right
    assert len(manifest["images"]) == 2
    for name, digest in manifest["images"].items():
        assert hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == digest
    assert (manifest["reader"], manifest["source"]) == ("mine", "source")
    assert (manifest["data"]["licence"], manifest["data"]["citation"]) == ("CC0", "Someone 2024")
    assert manifest["options"] == {"images": "sub", "column": ["a=b"]}
    assert (manifest["skipped"]["bad"], manifest["skipped"]["by_choice"]) == (1, 1)
    assert [(row["where"], row["id"]) for row in manifest["skipped"]["rows"]] == [("line 4", "q4"), ("line 5", "q5")]
    assert "'kidney' is not among its options" in manifest["skipped"]["rows"][1]["reason"]
    assert str(tmp_path) not in (tmp_path / "out" / "manifest.json").read_text()


def test_a_private_reader_names_neither_source_nor_paths(tmp_path, source):
    reader = Reader("mine", "a test", lambda source: iter(()), private=True)
    write([source_row()], tmp_path / "out", source, reader=reader, options={"images": source, "window": (40.0, 400.0)})
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["source"], manifest["options"]) == ("", {"images": "", "window": [40.0, 400.0]})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"options": ("liver",), "answer": "liver"}, "1 option; 2 to 10"),
        ({"options": tuple(f"organ {i}" for i in range(11)), "answer": "organ 1"}, "11 options; 2 to 10"),
        ({"options": ("liver", "Liver")}, "more than once"),
        ({"options": ("liver", " ")}, "1 option; 2 to 10"),
        ({"answer": "kidney"}, "not among its options"),
        ({"answer": ""}, "it has no answer"),
        ({"question": "  "}, "it has no question"),
        ({"question": "Which\0organ?"}, "question holds a NUL"),
        ({"options": ("liver", "spl\0een")}, "options holds a NUL"),
        ({"question": "half \ud800 of it"}, "contains a lone surrogate"),
        ({"id": ""}, "id '' must be"),
        ({"id": "a\nb"}, "control character"),
        ({"id": "x" * 201}, "must be 1 to 200"),
        ({"split": "../up"}, "split '../up' cannot be"),
        ({"split": ""}, "split '' cannot be"),
        ({"id": "q1"}, "id was used by line 1"),
    ],
)
def test_a_bad_row_is_skipped_with_its_place(tmp_path, source, changes, reason):
    layout = write([source_row(1), source_row(2, **changes), source_row(3)], tmp_path / "out", source)
    (skip,) = layout.skipped
    assert skip.where == "line 2"
    assert reason in skip.reason
    assert [row.id for row in read_examples(tmp_path / "out" / "train.jsonl", on_bad_row="error").examples] == [
        "q1",
        "q3",
    ]
    with pytest.raises(ValueError, match=r"line 2 .*--on-bad-row skip"):
        write([source_row(1), source_row(2, **changes)], tmp_path / "strict", source, on_bad_row="error")
    assert not (tmp_path / "strict").exists()


def test_a_skip_is_plain_text_whatever_the_source_holds(tmp_path, source):
    odd = "\x1b[31m\ud800\n"
    rows = [
        source_row(1),
        Skipped(f"row 2 of {odd}.csv", odd, f"its kind is {odd}"),
        source_row(3, where=odd, id=odd, answer="kidney"),
        Skipped("row 4", "x" * 10**6, "y" * 10**6),
    ]
    write(rows, tmp_path / "out", source.rename(tmp_path / "so\udcffurce"))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["source"] == "so?urce"
    plain = r"\x1b[31m\ud800\n"
    assert [row["where"] for row in manifest["skipped"]["rows"]] == [f"row 2 of {plain}.csv", plain, "row 4"]
    assert [row["id"][:20] for row in manifest["skipped"]["rows"]] == [plain, plain, "x" * 20]
    assert all(len(text) <= 1001 for row in manifest["skipped"]["rows"] for text in map(str, row.values()))


def test_a_row_left_out_by_choice_is_no_error(tmp_path, source):
    rows = [source_row(1), Skipped("line 2", "q2", "it is in Chinese", chosen=True), source_row(3)]
    layout = write(rows, tmp_path / "out", source, on_bad_row="error")
    assert (layout.bad, len(layout.skipped), layout.splits["train"].rows) == (0, 1, 2)


def test_a_bad_image_costs_its_rows_and_is_named_from_the_source_on(tmp_path, source):
    rows = [source_row(1), *(source_row(n, image=source / "broken.png") for n in (2, 3))]
    layout = write(rows, tmp_path / "out", source)
    assert [skip.where for skip in layout.skipped] == ["line 2", "line 3"]
    assert layout.skipped[0].reason.startswith("image broken.png is truncated")
    assert list((tmp_path / "out" / "images").iterdir()) == []


def test_no_image_of_a_skipped_row_is_left(tmp_path, source):
    write([source_row(1), source_row(2, image=source / "1.png", answer="kidney")], tmp_path / "out", source)
    assert list((tmp_path / "out" / "images").iterdir()) == []


def test_an_image_file_of_more_bytes_than_any_picture_needs(tmp_path, source, monkeypatch):
    monkeypatch.setattr(layout_writer, "MAX_IMAGE_BYTES", 10)
    layout = write([source_row(1), source_row(2, image=source / "1.png")], tmp_path / "out", source)
    assert "more than 10" in layout.skipped[0].reason


def test_pictures_are_written_once_and_bare(tmp_path, source):
    loaded = []

    def load() -> Image.Image:
        loaded.append(1)
        image = Image.linear_gradient("L")
        info = PngImagePlugin.PngInfo()
        info.add_text("PatientName", "DOE^JANE")
        image.info = {"PatientName": "DOE^JANE", "icc_profile": b"DOE^JANE", "exif": b"DOE^JANE"}
        return image

    layout = write([source_row(n, image=Picture("000017", load)) for n in (1, 2)], tmp_path / "out", source)
    path = tmp_path / "out" / "images" / "000017.png"
    assert (len(loaded), layout.splits["train"].images) == (1, 1)
    assert Image.open(path).tobytes() == Image.linear_gradient("L").tobytes()
    with Image.open(path) as image:
        # an ICC profile is compressed, so a search of the bytes would not find it
        assert image.info == {}
    assert b"DOE" not in path.read_bytes()


def test_a_picture_that_cannot_be_made_or_used(tmp_path, source):
    def fails() -> Image.Image:
        raise BadImageError("slice 7 has no pixels")

    rows = [
        source_row(1),
        source_row(2, image=Picture("a", fails)),
        source_row(3, image=Picture("b", lambda: Image.new("L", (2, 2)))),
    ]
    layout = write(rows, tmp_path / "out", source)
    assert [skip.reason.split(":")[0] for skip in layout.skipped] == [
        "slice 7 has no pixels",
        "image images/b.png has 2x2 pixels, fewer than 4 a side",
    ]


@pytest.mark.parametrize(("key", "mode"), [("../a", "L"), ("a/b", "L"), ("", "L"), ("a", "RGBA")])
def test_a_reader_that_breaks_its_promise(tmp_path, source, key, mode):
    with pytest.raises(ValueError, match="picture"):
        write([source_row(image=Picture(key, lambda: Image.new(mode, (40, 40))))], tmp_path / "out", source)


def test_no_usable_row_is_an_error_that_says_why(tmp_path, source):
    with pytest.raises(ValueError, match=r"\b2\. line 1 \(q1\): .*no answer"):
        write([source_row(1, answer=""), source_row(2, answer="x")], tmp_path / "out", source)
    assert list(tmp_path.iterdir()) == [source]


def test_a_split_without_usable_rows_leaves_no_file(tmp_path, source):
    layout = write([source_row(1), source_row(2, split="test", answer="x")], tmp_path / "out", source)
    assert list(layout.splits) == ["train"]
    assert not (tmp_path / "out" / "test.jsonl").exists()


def test_too_many_splits(tmp_path, source):
    with pytest.raises(ValueError, match=r"more than 64 splits, 's64' .*name .*column"):
        write((source_row(n, split=f"s{n}") for n in range(65)), tmp_path / "out", source)


def test_an_earlier_layout_is_replaced_only_on_demand_and_only_by_a_whole_one(tmp_path, source):
    out = tmp_path / "out"
    write([source_row(1)], out, source)
    before = (out / "train.jsonl").read_bytes()
    with pytest.raises(ValueError, match="--overwrite"):
        write([source_row(2)], out, source)
    with pytest.raises(ValueError, match="no row can be used"):
        write([source_row(2, answer="x")], out, source, overwrite=True)
    assert (out / "train.jsonl").read_bytes() == before
    write([source_row(2, split="test")], out, source, overwrite=True)
    assert sorted(path.name for path in out.iterdir()) == ["images", "manifest.json", "test.jsonl"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_what_is_no_layout_is_never_replaced(tmp_path, source):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    with pytest.raises(ValueError, match="not prepared data"):
        write([source_row()], tmp_path / "thesis", source, overwrite=True)
    (source / "manifest.json").write_text("{}")
    for place in (source, source.parent):
        with pytest.raises(ValueError, match="holds the source itself"):
            write([source_row()], place, source, overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        write([source_row()], tmp_path / "file", source, overwrite=True)
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "years of work"


def test_rows_are_written_as_they_come(tmp_path, source):
    """A reader of 100,000 rows is never held as a list, and what is kept of a row is small."""

    def rows():
        for number in range(1, 2001):
            if number == 2000:
                (partial,) = tmp_path.glob(".out.partial-*")
                assert (partial / "train.jsonl").stat().st_size > 100_000
            yield source_row(number)

    assert write(rows(), tmp_path / "out", source).splits["train"].rows == 2000


def test_a_full_disk_says_so_and_leaves_nothing(tmp_path, source, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(layout_writer.shutil, "copyfile", full)
    with pytest.raises(RecordError, match="disk is full"):
        write([source_row(image=source / "1.png")], tmp_path / "out", source)
    assert list(tmp_path.iterdir()) == [source]


def test_the_same_source_gives_the_same_bytes(tmp_path, source):
    for name in ("a", "b"):
        write([source_row(1, image=source / "1.png"), source_row(2)], tmp_path / name, source)
    for path in (tmp_path / "a").rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


def test_of_two_at_once_the_first_is_kept(tmp_path, source):
    """The second sees at its end that the folder, which was free at its start, is another's."""

    def rows():
        yield source_row(1)
        write([source_row(2), source_row(3)], tmp_path / "out", source)

    with pytest.raises(ValueError, match="already contains files"):
        write(rows(), tmp_path / "out", source)
    assert len((tmp_path / "out" / "train.jsonl").read_text().splitlines()) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    write(rows_while_replaced(tmp_path, source), tmp_path / "out", source, overwrite=True)
    assert len((tmp_path / "out" / "train.jsonl").read_text().splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def rows_while_replaced(tmp_path, source):
    yield source_row(1)
    write([source_row(2), source_row(3)], tmp_path / "out", source, overwrite=True)


def test_a_folder_that_another_process_is_writing_is_refused_before_anything_is_read(tmp_path, source):
    me, parent = Owner.me(), os.getppid()
    start = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    busy = tmp_path / f".out.partial-{me.machine}-{parent}-{start}-0"
    busy.mkdir()
    with pytest.raises(ValueError, match=rf"out .*process {parent}\b"):
        write(iter(()), tmp_path / "out", source)
    assert busy.is_dir()


def test_a_folder_elsewhere_behind_a_link(tmp_path, source):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    write([source_row()], tmp_path / "out", source)
    assert (tmp_path / "disk" / "manifest.json").is_file()
    assert (tmp_path / "out").is_symlink()
