"""A table about pictures, DICOM files, series and NIfTI volumes, from the command line."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("nibabel", reason="needs rlmed's extra 'readers'")
pytest.importorskip("pydicom", reason="needs rlmed's extra 'readers'")

import nibabel

from rlmed.data.examples import read_examples
from rlmed.prepare import parse_arguments, prepare
from tests.unit.rlmed.data.readers.dicom_files import write_dicom

HEADER = "file,slices,frame,plane,slice,window,question,option_a,option_b,answer"
RAMP = (np.arange(32 * 32) // 4).astype(np.uint8).reshape(32, 32)
VOLUME = np.random.default_rng(0).integers(0, 200, (10, 12, 14)).astype(np.int16)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mixed") / "Röntgen und CT"
    (folder / "series").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x010E] = "DOE^JANE"
    Image.fromarray(RAMP).save(folder / "DOE.png", exif=exif)
    colours = np.stack([RAMP, RAMP.T, RAMP], axis=2)
    Image.fromarray(colours).save(folder / "colour.jpg", quality=95)
    Image.new("L", (32, 32), 7).save(folder / "blank.png")
    (folder / "cut.png").write_bytes((folder / "DOE.png").read_bytes()[:90])
    (folder / "notes.txt").write_text("DOE^JANE")
    for number in range(1, 6):
        pixels = np.full((32, 32), number, np.int16) + RAMP
        write_dicom(
            folder / "series" / f"{number}.dcm", pixels, SeriesInstanceUID="1.2", InstanceNumber=number, Modality="CT"
        )
    whole = write_dicom(folder / "one.dcm", RAMP, Modality="CR").read_bytes()
    (folder / "bare").write_bytes(whole[132:])
    nibabel.Nifti1Image(VOLUME, np.eye(4)).to_filename(folder / "volume.nii.gz")
    return folder


def run(source: Path, out: Path, *lines: str, header: str = HEADER, options: tuple[str, ...] = ()):
    table = out.with_suffix(".csv")
    table.write_text("\n".join((header, *(f"{line},Which?,a,b,b" for line in lines))) + "\n", encoding="utf-8")
    arguments = ["files", "--source", str(source), "--out", str(out), "--questions", str(table), *options]
    return prepare(parse_arguments(arguments))


def test_each_row_shows_what_the_reader_of_its_file_shows(tmp_path, source):
    out = tmp_path / "out"
    lines = ["DOE.png,,,,,", "colour.jpg,,,,,", "one.dcm,,,,,128 256", "bare,,,,,", "series,,2,,,", "series,3,,,,"]
    prepared = run(source, out, *lines, "volume.nii.gz,,,axial,3,127.5 255")
    assert not prepared.skipped
    rows = read_examples(out / "questions.jsonl", on_bad_row="error").examples
    assert [row.modality for row in rows] == ["", "", "X-ray", "X-ray", "CT", "CT", ""]
    assert [len(row.images) for row in rows] == [1, 1, 1, 1, 1, 3, 1]
    shown = [np.asarray(Image.open(row.image)) for row in rows]
    np.testing.assert_array_equal(shown[0], RAMP)
    assert shown[1].shape == (32, 32, 3)
    np.testing.assert_array_equal(shown[2], RAMP)
    # the anterior on top, the patient's right on the left
    np.testing.assert_array_equal(shown[6], VOLUME[::-1, ::-1, 3].T)
    for path in out.rglob("*"):
        assert path.is_dir() or b"DOE" not in path.read_bytes()


def test_several_files_of_a_row_may_be_of_several_kinds(tmp_path, source):
    header = HEADER.replace("file", "files")
    out = tmp_path / "out"
    run(source, out, "DOE.png|volume.nii.gz|one.dcm,,,axial,,", header=header)
    (row,) = read_examples(out / "questions.jsonl", on_bad_row="error").examples
    assert [Image.open(image).size for image in row.images] == [(32, 32), (10, 12), (32, 32)]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("DOE.png,,,,,40 400", "its window has no effect on a picture"),
        ("one.dcm,,,axial,,", r"its plane has no effect on a DICOM file: .*frame, slices, window"),
        ("volume.nii.gz,,3,axial,,", r"its frame has no effect on a NIfTI volume: .*plane, slice, fraction"),
        ("volume.nii.gz,,,,,", "its plane must be one of"),
        ("notes.txt,,,,,", "neither a picture .* nor DICOM nor NIfTI"),
        ("cut.png,,,,,", "it is truncated or damaged"),
        ("blank.png,,,,,", r"it shows nothing: .*7 of 255"),
        ("series,,9,,,", "it has no slice 9"),
        ("doe.png,,,,,", "its file is missing: there is one which differs in case"),
    ],
)
def test_a_bad_row_is_named_with_its_cure_and_without_its_file(tmp_path, source, line, reason):
    out = tmp_path / "out"
    (skipped,) = run(source, out, line, "DOE.png,,,,,").skipped
    assert (skipped.where, skipped.id) == ("line 2 of the table", "line-2")
    assert re.search(reason, skipped.reason), skipped.reason
    assert "DOE" not in skipped.reason


def test_the_table_itself_is_a_source_and_any_column_may_have_another_name(tmp_path, source):
    table = source / "Fragen.csv"
    table.write_text("Bild,Fenster,question,a,b,answer\none.dcm,64 128,Which?,a,b,b\n", encoding="utf-8")
    columns = ("--column", "file=Bild", "--column", "window=Fenster")
    out = tmp_path / "out"
    prepare(parse_arguments(["files", "--source", str(table), "--out", str(out), *columns]))
    (row,) = read_examples(out / "questions.jsonl", on_bad_row="error").examples
    assert set(np.asarray(Image.open(row.image))[16:].ravel()) == {255}
    table.unlink()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "windw=Fenster",
            r"'windw' is no field: did you mean --column window=Fenster\? .* file, files, frame, .* plane",
        ),
        ("Fenster=window", "did you mean --column window=Fenster"),
        ("window=Fenstr", "no column for --column window=Fenstr; its columns: file, slices"),
        ("id=file", "'id' is no field"),
    ],
)
def test_an_unknown_column_is_told_which_are_known(tmp_path, source, given, message):
    with pytest.raises(ValueError, match=message):
        run(source, tmp_path / "out", "DOE.png,,,,,", options=("--column", given))


@pytest.mark.parametrize("reader", ["files", "dicom", "nifti"])
def test_help_names_the_columns_that_may_be_named(reader, capsys):
    with pytest.raises(SystemExit):
        parse_arguments([reader, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "fields: file, files, " in shown
    assert ("frame" in shown, "plane" in shown) == (reader != "nifti", reader != "dicom")
