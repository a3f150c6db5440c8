"""The reader of NIfTI volumes from the command line."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("nibabel", reason="needs rlmed's extra 'readers'")

import nibabel

from rlmed.data.examples import read_examples
from rlmed.prepare import parse_arguments, prepare
from tests.root import ROOT

VOLUME = np.random.default_rng(0).integers(0, 200, (10, 12, 14)).astype(np.int16)
HEADER = "file,plane,slice,fraction,volume,window,question,option_a,option_b,answer"


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tmp_path / "DOE"
    folder.mkdir()
    image = nibabel.Nifti1Image(VOLUME, np.eye(4))
    image.header["descrip"] = b"DOE^JANE 19600229"
    image.header["db_name"] = b"MRN-4711"
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"DOE^JANE"))
    image.to_filename(folder / "DOE_JANE.nii.gz")
    return folder


def table(folder: Path, *lines: str) -> None:
    content = [HEADER, *(f"DOE_JANE.nii.gz,{line},Which?,lung,liver,lung" for line in lines)]
    (folder / "questions.csv").write_text("\n".join(content) + "\n", encoding="utf-8")


def run(source: Path, out: Path, *options: str):
    return prepare(parse_arguments(["nifti", "--source", str(source), "--out", str(out), *options]))


def picture(out: Path, number: int) -> np.ndarray:
    return np.asarray(Image.open(out / "images" / f"{number:06d}.png"))


def test_each_row_has_its_slice(tmp_path, source):
    table(
        source,
        "axial,3,,,127.5 255",
        "Coronal,,1.0,,127.5 255",
        "sagittal,,,0,127.5 255",
        "axial,3,,,127.5 255",
        "axial,3,,,",
    )
    out = tmp_path / "out"
    assert not run(source, out, "--window", "100", "1").skipped
    rows = read_examples(out / "questions.jsonl", on_bad_row="error").examples
    assert [row.image.name for row in rows] == ["000001.png", "000002.png", "000003.png", "000001.png", "000004.png"]
    np.testing.assert_array_equal(picture(out, 1), VOLUME[::-1, ::-1, 3].T)
    np.testing.assert_array_equal(picture(out, 2), VOLUME[::-1, 11, ::-1].T)
    np.testing.assert_array_equal(picture(out, 3), VOLUME[4, ::-1, ::-1].T)
    assert set(np.unique(picture(out, 4))) <= {0, 128, 255}


@pytest.mark.parametrize(
    ("line", "option", "expected"),
    [
        ("axial,,,,", "5", [1, 4, 7, 9, 12]),  # of 14
        ("axial,,,,", "3", [2, 7, 11]),
        ("axial,,,,", "14", list(range(14))),
        ("axial,,,,", "9,3,13", [9, 3, 13]),
        ("axial,,,,", "0 1", [0, 1]),
        ("axial,5,,,", "3", [5]),  # the row's own
        ("axial,,1.0,,", "3", [13]),
    ],
)
def test_several_slices_are_the_images_of_a_row(tmp_path, source, line, option, expected):
    table(source, f"{line}100 200")
    out = tmp_path / "out"
    assert not run(source, out, "--slices", option).skipped
    (row,) = read_examples(out / "questions.jsonl", on_bad_row="error").examples
    assert len(row.images) == len(expected)
    for path, index in zip(row.images, expected, strict=True):
        shown = np.rint(np.clip(VOLUME[::-1, ::-1, index].T / 200, 0, 1) * 255)
        np.testing.assert_array_equal(np.asarray(Image.open(path)), shown)


def test_a_column_of_slices_and_shared_pictures(tmp_path, source):
    lines = ('coronal,,,"1,3"', 'coronal,,,"3;1"', "coronal,3,,", "sagittal,,,2", "coronal,,,", "axial,,,2")
    content = [f"DOE_JANE.nii.gz,{line},Which?,lung,liver,lung" for line in lines]
    header = "file,plane,slice,fraction,slices,question,option_a,option_b,answer"
    (source / "questions.csv").write_text("\n".join([header, *content]) + "\n", encoding="utf-8")
    out = tmp_path / "out"
    assert not run(source, out, "--slices", "4").skipped
    rows = read_examples(out / "questions.jsonl", on_bad_row="error").examples
    # of 12 coronal, 10 sagittal and 14 axial slices
    names = [[int(path.stem) for path in row.images] for row in rows]
    assert names == [[1, 2], [2, 1], [2], [3, 4], [1, 5, 6, 7], [8, 9]]
    for number, pixels in (
        (1, VOLUME[:, 1]),
        (2, VOLUME[:, 3]),
        (3, VOLUME[2]),
        (4, VOLUME[7]),
        (5, VOLUME[:, 4]),
        (6, VOLUME[:, 7]),
        (7, VOLUME[:, 10]),
    ):
        ranks = np.argsort(pixels[::-1, ::-1].T, axis=None, kind="stable")
        assert (np.diff(picture(out, number).ravel()[ranks].astype(int)) >= 0).all(), "the same slice, however windowed"


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        ("15", "it has 14 axial slices, and 15 are asked for"),
        ("3 14", "no axial slice 14: give some from 0 to 13"),
        ("3 3", "its slices must not name a slice twice"),
        ("0", "its slices must be 1 to 64 slices, not 0"),
        ("65", "its slices must be 1 to 64 slices, not 65"),
        ("DOE", "its slices must be how many, like 5, or which"),
        ("3 -1", "its slices must be how many"),
    ],
)
def test_slices_that_cannot_be_shown_cost_their_row(tmp_path, source, cell, reason):
    header = "file,plane,slices,question,option_a,option_b,answer"
    lines = [f"DOE_JANE.nii.gz,axial,{text},Which?,lung,liver,lung" for text in ("2", cell)]
    (source / "questions.csv").write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    (skipped,) = run(source, tmp_path / "out").skipped
    assert reason in skipped.reason
    assert "DOE" not in skipped.reason


def test_slices_beside_a_slice_and_a_slice_that_shows_nothing(tmp_path, source):
    values = VOLUME.astype(np.float32)
    values[:, :, 7] = 3
    nibabel.Nifti1Image(values, np.eye(4)).to_filename(source / "DOE_JANE.nii.gz")
    header = "file,plane,slice,slices,question,option_a,option_b,answer"
    lines = [f"DOE_JANE.nii.gz,axial,{cells},Which?,lung,liver,lung" for cells in ("1,3 4", ",3", ",3 4")]
    (source / "questions.csv").write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    both, empty = run(source, tmp_path / "out").skipped
    assert "it has both slices and a slice" in both.reason
    assert "its image 2 of 3: axial slice 7 of its file cannot be used: it shows nothing" in empty.reason
    assert len(list((tmp_path / "out" / "images").iterdir())) == 2
    with pytest.raises(ValueError, match="--slices five must be how many"):
        run(source, tmp_path / "other", "--slices", "five")


def test_bad_rows_are_skips_that_say_why(tmp_path, source):
    bad = (
        "oblique,3,,,",
        "axial,99,,,",
        "axial,x,,,",
        "axial,,1.5,,",
        "axial,,nan,,",
        "axial,3,0.5,,",
        "axial,3,,7,",
        "axial,3,,,soft",
    )
    table(source, "axial,3,,,", *bad)
    skipped = run(source, tmp_path / "out").skipped
    reasons = (
        "its plane must be one of",
        "no axial slice 99",
        "its slice must be a whole number",
        "its fraction must be a number from 0 to 1",
        "its fraction must be a number from 0 to 1",
        "both a slice",
        "no volume 7",
        "its window must be two numbers",
    )
    assert [row.where for row in skipped] == [f"line {line} of the table" for line in range(3, 11)]
    for row, reason in zip(skipped, reasons, strict=True):
        assert reason in row.reason


def test_an_unknown_orientation_needs_the_option(tmp_path, source):
    image = nibabel.Nifti1Image(VOLUME, None)
    image.to_filename(source / "DOE_JANE.nii.gz")
    table(source, "axial,3,,,")
    with pytest.raises(ValueError, match="--allow-unknown-orientation"):
        run(source, tmp_path / "out")
    assert not run(source, tmp_path / "out", "--allow-unknown-orientation").skipped


def test_no_patient_is_in_any_byte_of_what_is_written_or_said(tmp_path, source):
    (source / "cut DOE.nii").write_bytes((source / "DOE_JANE.nii.gz").read_bytes()[:500])
    table(source, "axial,3,,,", "axial,99,,,")
    with (source / "questions.csv").open("a", encoding="utf-8") as file:
        file.write(
            "cut DOE.nii,axial,,,,,Which?,a,b,a\nmissing DOE.nii,axial,,,,,Which?,a,b,a\n../DOE,axial,,,,,Which?,a,b,a\n"
        )
    command = [sys.executable, "-m", "rlmed.prepare", "nifti", "--source", ".", "--out", str(tmp_path / "out")]
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    ended = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, check=True)
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))["skipped"]["bad"] == 4
    said = ended.stdout + ended.stderr + "".join(str(path.relative_to(tmp_path)) for path in written)
    for content in (said.encode(), *(path.read_bytes() for path in written)):
        for secret in (b"DOE", b"JANE", b"19600229", b"MRN-4711"):
            assert secret not in content, secret


def test_a_slice_that_shows_nothing_costs_its_row(tmp_path, source):
    values = VOLUME.astype(np.float32)
    values[:, :, 3] = np.nan
    nibabel.Nifti1Image(values, np.eye(4)).to_filename(source / "DOE_JANE.nii.gz")
    table(source, "axial,3,,,", "axial,4,,,9000 10", "axial,4,,,", "coronal,3,,,")
    layout = run(source, tmp_path / "out")
    assert [row.id for row in layout.skipped] == ["line-2", "line-3"]
    assert "is a finite number" in layout.skipped[0].reason
    assert "8995 to 9005 is shown" in layout.skipped[1].reason
    assert not picture(tmp_path / "out", 4)[10].any()  # what is no number is black
