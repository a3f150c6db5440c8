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
