"""The DICOM reader on the command line: what is written and skipped, and no patient in either."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("pydicom", reason="needs rlmed's extra 'readers'")

from pydicom.uid import JPEGBaseline8Bit

from rlmed.data.examples import read_examples
from rlmed.data.prepare.prepared_data import PreparedData
from rlmed.prepare import parse_arguments, prepare
from tests.root import ROOT
from tests.unit.rlmed.data.readers.dicom_files import dataset_of, save, shipped, write_compressed, write_dicom

CT = np.random.default_rng(0).integers(-1000, 1000, (32, 48)).astype(np.int16)
HEADER = "file,frame,question,option_a,option_b,answer,split,modality,window"
PATIENT = {
    "PatientName": "DOE^JANE",
    "PatientID": "MRN-4711",
    "AccessionNumber": "ACC-0815",
    "PatientBirthDate": "19600229",
    "StudyDate": "20240517",
    "InstitutionName": "Saint Elsewhere",
    "ReferringPhysicianName": "HOUSE^GREGORY",
    "StudyInstanceUID": "1.2.276.0.7230010.3.1.2.4711",
    "StudyDescription": "DOE JANE follow-up",
}
SECRETS = ("DOE", "JANE", "MRN-4711", "ACC-0815", "19600229", "20240517", "Elsewhere", "HOUSE", "1.2.276.0.7230010")


def table(folder: Path, *lines: str, header: str = HEADER) -> None:
    (folder / "questions.csv").write_text("\n".join((header, *lines)) + "\n", encoding="utf-8")


def run(source: Path, out: Path, *options: str) -> PreparedData:
    return prepare(parse_arguments(["dicom", "--source", str(source), "--out", str(out), *options]))


def picture(out: Path, number: int) -> np.ndarray:
    return np.asarray(Image.open(out / "images" / f"{number:06d}.png"))


def test_what_is_written_is_what_a_run_reads(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    write_dicom(source / "a.dcm", CT, Modality="CT", WindowCenter=0, WindowWidth=2000)
    frames = np.arange(4, dtype=np.uint8)[:, None, None] * np.full((8, 8), 60, dtype=np.uint8)
    frames[:, 7, 7] = frames[:, 7, 6] = 250  # a mark, since a frame of one grey value is none
    write_dicom(source / "b.dcm", frames, frames=True, Modality="DX", WindowCenter=128, WindowWidth=256)
    table(
        source,
        "a.dcm,,Which?,lung,liver,lung,test_ct,,",
        "a.dcm,1,Where?,left,right,A,test_ct,,",  # frame 1 is the middle one of one
        "a.dcm,,Which?,lung,liver,lung,test_ct,,-500 100",
        "b.dcm,4,What?,bone,air,bone,test_xray,,",
        "b.dcm,,What?,bone,air,air,test_xray,CT,",
    )
    layout = run(source, tmp_path / "out")
    assert not layout.skipped
    ct = read_examples(tmp_path / "out" / "test_ct.jsonl", on_bad_row="error").examples
    xray = read_examples(tmp_path / "out" / "test_xray.jsonl", on_bad_row="error").examples
    assert [row.image.name for row in (*ct, *xray)] == [f"{number:06d}.png" for number in (1, 1, 2, 3, 4)]
    assert [row.modality for row in (*ct, *xray)] == ["CT", "CT", "CT", "X-ray", "CT"]
    assert [row.letter for row in (*ct, *xray)] == ["A", "A", "A", "A", "B"]
    np.testing.assert_allclose(picture(tmp_path / "out", 1), (CT.astype(float) + 999.5 + 0.5) / 1999 * 255, atol=0.6)
    assert picture(tmp_path / "out", 2).mean() > picture(tmp_path / "out", 1).mean() + 30
    assert (picture(tmp_path / "out", 3)[:7] == 180).all()
    assert (picture(tmp_path / "out", 4)[:7] == 120).all()


def test_the_window_of_the_command_line_holds_for_rows_without_one(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    write_dicom(source / "a.dcm", CT)
    table(source, "a.dcm,,Which?,lung,liver,lung,,,", "a.dcm,,Which?,lung,liver,lung,,,0 1")
    run(source, tmp_path / "out", "--window", "0", "1000")
    np.testing.assert_allclose(picture(tmp_path / "out", 1), np.clip((CT + 500) / 999, 0, 1) * 255, atol=0.6)
    assert set(np.unique(picture(tmp_path / "out", 2))) == {0, 255}
    with pytest.raises(ValueError, match="width positive"):
        run(source, tmp_path / "other", "--window", "0", "-5")


def test_burnt_in_text_is_left_out_unless_allowed(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    write_dicom(source / "a.dcm", CT, BurnedInAnnotation="YES")
    write_dicom(source / "b.dcm", CT, BurnedInAnnotation="NO")
    table(source, *(f"{name}.dcm,,Which?,lung,liver,lung,,," for name in "ab"))
    (skipped,) = run(source, tmp_path / "out").skipped
    assert (skipped.where, skipped.id) == ("line 2 of the table", "line-2")
    assert "burnt into its pixels" in skipped.reason
    assert not run(source, tmp_path / "all", "--allow-burned-in").skipped


@pytest.fixture
def clinic(tmp_path) -> Path:
    """A folder in which everything is named after a patient, and most files are bad somehow."""
    source = tmp_path / "clinic"
    folder = source / "DOE^JANE"
    folder.mkdir(parents=True)
    write_dicom(folder / "DOE_JANE_1.dcm", CT, Modality="CT", **PATIENT)
    write_dicom(folder / "burned.dcm", CT, BurnedInAnnotation="YES", **PATIENT)
    write_dicom(folder / "lies.dcm", CT, **{**PATIENT, "PhotometricInterpretation": "DOE^JANE"})
    write_dicom(folder / "nopixels.dcm", CT, PixelData=None, **PATIENT)
    write_compressed(folder / "jpeg.dcm", [b"DOE^JANE" * 20], CT.astype(np.uint8), JPEGBaseline8Bit, **PATIENT)
    whole = save(folder / "whole.dcm", dataset_of(CT, WindowCenter="12345678", **PATIENT)).read_bytes()
    (folder / "cut.dcm").write_bytes(whole[:-500])
    (folder / "value.dcm").write_bytes(whole.replace(b"12345678", b"DOE^JANE"))
    assert b"DS\x08\x00DOE^JANE" in (folder / "value.dcm").read_bytes()
    syntax = b"1.2.840.10008.1.2.1\0"
    assert whole.count(syntax) == 1
    (folder / "syntax.dcm").write_bytes(whole.replace(syntax, b"DOE^JANE".ljust(len(syntax), b"\0")))
    (folder / "text.dcm").write_text("Patient: DOE^JANE\n" * 50, encoding="utf-8")
    (folder / "folder.dcm").mkdir()
    (folder / "link.dcm").symlink_to(tmp_path / "outside DOE")
    names = (
        "DOE_JANE_1",
        "burned",
        "lies",
        "nopixels",
        "jpeg",
        "cut",
        "value",
        "syntax",
        "text",
        "folder",
        "link",
        "missing DOE",
    )
    rows = [f"DOE^JANE/{name}.dcm,,Which?,lung,liver,lung,,," for name in names]
    slipped = [f"DOE^JANE/DOE_JANE_1.dcm,{cells}" for cells in ("DOE^JANE,Which?,a,b,a,,,", ",Which?,a,b,a,,,DOE^JANE")]
    table(source, *rows, "/DOE/1,,Which?,a,b,a,,,", *slipped)
    return source


@pytest.mark.parametrize("option", ["skip", "error"])
def test_no_patient_is_in_any_byte_of_what_is_written_or_said(tmp_path, clinic, option):
    command = [sys.executable, "-m", "rlmed.prepare", "dicom", "--source", ".", "--out", str(tmp_path / "out")]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "PYTHONWARNINGS": "default"}
    ended = subprocess.run(
        [*command, "--on-bad-row", option],
        cwd=clinic,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == (0 if option == "skip" else 2), ended.stderr
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    if option == "skip":
        manifest = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))
        assert manifest["skipped"]["bad"] == 13, manifest["skipped"]
        # the second with a picture is the file whose window is no number
        names = {"questions.jsonl", "manifest.json", "000001.png", "000004.png"}
        assert {path.name for path in written} == names
        assert manifest["source"] == ""
    else:
        assert "line 3 of the table" in ended.stderr
        assert not written
    said = ended.stdout + ended.stderr + "".join(str(path.relative_to(tmp_path)) for path in written)
    for content in (said.encode(), *(path.read_bytes() for path in written)):
        for secret in SECRETS:
            assert secret.lower().encode() not in content.lower(), secret


def test_real_files_with_a_question_each(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    names = ("CT_small", "MR_small_RLE", "examples_ybr_color", "examples_palette", "JPEG2000")
    for name in names:
        (source / f"{name}.dcm").write_bytes(shipped(f"{name}.dcm").read_bytes())
    table(source, *(f"{name}.dcm,,Which?,a,b,a,,," for name in names))
    layout = run(source, tmp_path / "out")
    assert not layout.skipped
    assert layout.splits["questions"].by_modality == {"CT": 1, "MRI": 1, "Nuclear medicine": 1, "Ultrasound": 2}
    assert [picture(tmp_path / "out", n).shape for n in range(1, 6)] == [
        *((128, 128), (64, 64), (240, 320, 3), (350, 800, 3), (1024, 256)),
    ]


@pytest.mark.slow
def test_a_folder_called_dl_where_the_command_runs_is_not_taken_for_a_module(tmp_path):
    (tmp_path / "dl").mkdir()
    (tmp_path / "a.dcm").write_bytes(shipped("JPEG2000.dcm").read_bytes())
    table(tmp_path, "a.dcm,,Which?,a,b,a,,,")
    ended = subprocess.run(
        [sys.executable, "-m", "rlmed.prepare", "dicom", "--source", ".", "--out", "out", "--on-bad-row", "error"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr


def test_nothing_usable_is_an_error_that_says_why(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.dcm").write_bytes(b"no DICOM")
    table(source, "a.dcm,,Which?,a,b,a,,,", "a.dcm,x,Which?,a,b,a,,,")
    with pytest.raises(ValueError, match=r"\b2\. line 2 .*\(line-2\): its file "):
        run(source, tmp_path / "out")


def test_a_picture_that_shows_nothing_costs_its_row_and_the_cause_is_said(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    write_dicom(source / "good.dcm", CT, RescaleSlope=1, RescaleIntercept=0, WindowCenter=0, WindowWidth=2000)
    write_dicom(source / "slope.dcm", CT, RescaleSlope=0, RescaleIntercept=0, WindowCenter=0, WindowWidth=2000)
    write_dicom(source / "beside.dcm", CT, WindowCenter=20000, WindowWidth=400)
    table(source, *(f"{name}.dcm,,Which?,lung,liver,lung,,," for name in ("good", "slope", "beside")))
    with (source / "questions.csv").open("a", encoding="utf-8") as file:
        file.write("beside.dcm,,Where?,lung,liver,lung,,,0 2000\n")
    layout = run(source, tmp_path / "out")
    assert [row.id for row in layout.skipped] == ["line-3", "line-4"]
    assert "RescaleSlope 0" in layout.skipped[0].reason
    assert f"values go from {CT.min()} to {CT.max()}" in layout.skipped[1].reason
    assert "center 20000 and width 400" in layout.skipped[1].reason
    rows = read_examples(tmp_path / "out" / "questions.jsonl", on_bad_row="error").examples
    good, cured = (np.asarray(Image.open(row.image)) for row in rows)
    # the window of the row shows what the file's own does not
    np.testing.assert_array_equal(good, cured)
