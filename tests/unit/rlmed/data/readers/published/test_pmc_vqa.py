"""PMC-VQA in small files of its two layouts, images in a zip archive."""

from __future__ import annotations

import csv
import io
import tracemalloc
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from rlmed.data.examples import read_examples
from rlmed.data.images import BadImageError
from rlmed.data.prepare.prepared_data import write_prepared_data
from rlmed.data.readers.base import Skipped, SourceRow
from rlmed.data.readers.formats import image_files
from rlmed.data.readers.published.pmc_vqa import READER, read
from tests.unit.rlmed.data.pictures import marked

FIRST = "Figure_path,Question,Answer,Choice A,Choice B,Choice C,Choice D,Answer_label"
SECOND = "index,Figure_path,Caption,Question,Choice A,Choice B,Choice C,Choice D,Answer,split"


def jpeg(grey: int) -> bytes:
    stream = io.BytesIO()
    marked(grey).save(stream, format="JPEG")
    return stream.getvalue()


@pytest.fixture
def folder(tmp_path) -> Path:
    root = tmp_path / "PMC-VQA"
    root.mkdir()
    for name, member in (("images.zip", "images/PMC1_F1.jpg"), ("images_2.zip", "figures/PMC2_F3.jpg")):
        with zipfile.ZipFile(root / name, "w") as archive:
            archive.writestr(member, jpeg(len(name)))
    return root


def test_both_versions(folder, tmp_path):
    train = (
        f"{FIRST}\nPMC1_F1.jpg, What is shown? , the gray matter , A:Gray matter , B:White matter, C:Bone, D:Fat ,A\n"
    )
    (folder / "train.csv").write_text(train)
    test = f'{SECOND}\n0,PMC2_F3.jpg,"A, caption",What is shown?, A: Lung, B: Liver,,,B,test\n'
    (folder / "test_2.csv").write_text(test)
    layout = write_prepared_data(read(folder), tmp_path / "out", reader=READER, source=folder, options={})
    assert layout.skipped == ()
    (first,) = read_examples(tmp_path / "out" / "train.jsonl").examples
    (second,) = read_examples(tmp_path / "out" / "test_2.jsonl").examples
    assert (first.options, first.letter) == (("Gray matter", "White matter", "Bone", "Fat"), "A")
    assert (second.options, second.letter) == (("Lung", "Liver"), "B")
    assert first.image.read_bytes() == jpeg(len("images.zip"))
    assert second.image.read_bytes() == jpeg(len("images_2.zip"))
    assert {first.image.suffix, second.image.suffix} == {".jpg"}


def test_unpacked_images(folder):
    (folder / "train.csv").write_text(f"{FIRST}\nPMC1_F1.jpg,What?,x,A:x,B:y,,,A\n")
    (folder / "images.zip").unlink()
    (folder / "images").mkdir()
    (folder / "images" / "PMC1_F1.jpg").write_bytes(jpeg(7))
    assert next(read(folder / "train.csv")).image == folder / "images" / "PMC1_F1.jpg"
    assert next(read(folder, images=folder / "images")).image == folder / "images" / "PMC1_F1.jpg"
    assert next(read(folder, without_images=True)).image is None


def row_of(folder: Path, texts: list[str], answer: str, label: str = "") -> SourceRow | Skipped:
    with (folder / "train.csv").open("w", newline="") as file:
        cells = csv.writer(file)
        cells.writerow(FIRST.split(","))
        cells.writerow(["PMC1_F1.jpg", "What?", answer, *texts, *[""] * (4 - len(texts)), label])
    return next(read(folder, without_images=True))


@pytest.mark.parametrize(
    ("texts", "answer", "expected", "right"),
    [
        (["A:x", "B: y", "C.z"], "C", ("x", "y", "z"), "z"),
        # not all have their letter: it may be part of the text
        (["A:x", "y"], "B", ("A:x", "y"), "y"),
        (["A large mass", "B cells"], "A", ("A large mass", "B cells"), "A large mass"),
        (["B:x", "A:y"], "y", ("x", "y"), "y"),
        (["x", "y", "", ""], "B", ("x", "y"), "y"),
        # the column called C, not the third of those that are there
        (["x", "", "z", "w"], "C", ("x", "z", "w"), "z"),
        (["A: x", "", "C: z", "D: w"], "D", ("x", "z", "w"), "w"),
    ],
)
def test_letters_before_choices(folder, texts, answer, expected, right):
    row = row_of(folder, texts, answer)
    assert (row.options, row.answer) == (expected, right)


@pytest.mark.parametrize(
    ("texts", "answer", "label", "reason"),
    [
        (["B:x", "A:y"], "A", "", "'x' by its column and 'y' by"),
        (["x", "y"], "x", "B", "its Answer 'x' is not its Answer_label 'B'"),
        (["x", "", "z"], "B", "", "'B' is missing by its column"),
    ],
)
def test_a_letter_that_means_two_choices_or_none(folder, texts, answer, label, reason):
    assert reason in row_of(folder, texts, answer, label).reason


def archive_of(folder: Path, **members: bytes) -> None:
    with zipfile.ZipFile(folder / "images.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"images/{name}.jpg", content)


def layout_of(folder: Path, out: Path, *figures: str):
    lines = [f"{figure},What?,x,A:x,B:y,,,A\n" for figure in ("good.jpg", *figures)]
    (folder / "train.csv").write_text(f"{FIRST}\n" + "".join(lines))
    return write_prepared_data(read(folder), out, reader=READER, source=folder, options={})


def test_what_an_archive_may_hold(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(image_files, "MAX_MEMBER_BYTES", 100_000)
    archive_of(folder, good=jpeg(1), bomb=bytes(10**7), text=b"no image", empty=b"")
    figures = ("bomb.jpg", "text.jpg", "empty.jpg", "absent.jpg", "../good.png", "/etc/hostname", "")
    layout = layout_of(folder, tmp_path / "out", *figures)
    reasons = [skip.reason for skip in layout.skipped]
    assert layout.splits["train"].rows == 1
    assert "unpacks to more than 100000 bytes" in reasons[0]
    assert "text.jpg is not an image" in reasons[1]
    assert "is an empty file" in reasons[2]
    assert all("does not exist" in reason for reason in reasons[3:6])
    assert "no Figure_path" in reasons[6]


def test_a_bomb_is_not_unpacked_beyond_the_bound(folder, monkeypatch):
    monkeypatch.setattr(image_files, "MAX_MEMBER_BYTES", 100_000)
    archive_of(folder, bomb=bytes(3 * 10**7))
    image = image_files.open_images(folder / "images.zip").find("bomb.jpg")
    tracemalloc.start()
    with pytest.raises(BadImageError, match="unpacks to more than 100000 bytes"):
        image.load()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10**6


def test_a_member_that_lies_about_its_size(folder, tmp_path, monkeypatch):
    """A header may say 10 bytes where ten million come out; what is read is bounded even so."""
    monkeypatch.setattr(image_files, "MAX_MEMBER_BYTES", 100_000)
    archive_of(folder, good=jpeg(1), bomb=bytes(10**7))
    content = (folder / "images.zip").read_bytes()
    size = (10**7).to_bytes(4, "little")
    assert content.count(size) == 2
    (folder / "images.zip").write_bytes(content.replace(size, (10).to_bytes(4, "little")))
    (skip,) = layout_of(folder, tmp_path / "out", "bomb.jpg").skipped
    assert "bomb.jpg" in skip.reason


def test_a_damaged_member_costs_its_rows(folder, tmp_path):
    archive_of(folder, good=jpeg(1), bad=bytes(range(256)) * 40)
    content = bytearray((folder / "images.zip").read_bytes())
    place = content.index(b"images/bad.jpg") + len("images/bad.jpg") + 20
    content[place : place + 40] = bytes(40)
    (folder / "images.zip").write_bytes(content)
    (skip,) = layout_of(folder, tmp_path / "out", "bad.jpg").skipped
    assert "damaged" in skip.reason


def test_random_damage_to_an_archive_costs_rows_or_says_so(folder, tmp_path):
    archive_of(folder, good=jpeg(1), other=jpeg(200))
    whole = (folder / "images.zip").read_bytes()
    rng, ended = np.random.default_rng(0), Counter()
    for number in range(150):
        content = bytearray(whole)
        for place in rng.integers(len(whole), size=rng.integers(1, 6)):
            content[place] = rng.integers(256)
        (folder / "images.zip").write_bytes(content)
        try:
            layout = layout_of(folder, tmp_path / str(number), "other.jpg")
        except ValueError as error:
            ended["unread" if "images.zip cannot be read" in str(error) else str(error)[:18]] += 1
        else:
            ended["skip" if layout.skipped else "whole"] += 1
    assert set(ended) == {"unread", "no row can be used", "skip", "whole"}


def test_a_version_of_the_format_that_is_not_known(folder):
    content = bytearray((folder / "images.zip").read_bytes())
    content[content.index(b"PK\x01\x02") + 6] = 200
    (folder / "images.zip").write_bytes(content)
    (folder / "train.csv").write_text(f"{FIRST}\nPMC1_F1.jpg,What?,x,A:x,B:y,,,A\n")
    with pytest.raises(ValueError, match=r"images\.zip .*\(zip file version"):
        list(read(folder))


def test_two_members_of_one_name(folder, tmp_path):
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for name in ("a/good.jpg", "b/two.jpg", "c/two.jpg"):
            archive.writestr(name, jpeg(3))
    (skip,) = layout_of(folder, tmp_path / "out", "two.jpg").skipped
    assert "2 files have its name" in skip.reason
    (folder / "train.csv").write_text(f"{FIRST}\nc/two.jpg,What?,x,A:x,B:y,,,A\n")
    assert isinstance(next(read(folder)), SourceRow)


def test_sources_that_are_something_else(folder):
    with pytest.raises(ValueError, match="holds no table"):
        list(read(folder))
    (folder / "train.csv").write_text("image,question,answer\n")
    with pytest.raises(ValueError, match=r"train\.csv .*\bFigure_path\b.*PMC-VQA"):
        list(read(folder))
    (folder / "train.csv").write_text(f"{FIRST}\nPMC1_F1.jpg,What?,x,A:x,B:y,,,A\n")
    (folder / "images.zip").write_bytes(b"PK no archive")
    with pytest.raises(ValueError, match=r"images\.zip cannot be read"):
        list(read(folder))
    with pytest.raises(ValueError, match=r"neither a folder nor a \.zip"):
        list(read(folder, images=folder / "none"))
