"""Several DICOM images of a question: slices of a series' folder, frames, several files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("pydicom", reason="needs rlmed's extra 'readers'")

from rlmed.data.examples import read_examples
from rlmed.data.prepare.prepared_data import PreparedData
from rlmed.prepare import parse_arguments, prepare
from tests.unit.rlmed.data.readers.dicom_files import write_dicom

AXIAL, CORONAL, SAGITTAL = (1, 0, 0, 0, 1, 0), (1, 0, 0, 0, 0, -1), (0, 1, 0, 0, 0, -1)
HEADER = "file,frame,slices,question,option_a,option_b,answer"
SECRET = "DOE"


def pixels(level: int) -> np.ndarray:
    """A picture that shows which one it is: a mark on dark ground."""
    values = np.zeros((8, 8), dtype=np.uint8)
    values[0, :2] = 255
    values[4:, 4:] = level
    return values


def write_slice(path: Path, level: int, **elements: object) -> Path:
    return write_dicom(path, pixels(level), **{"WindowCenter": 128, "WindowWidth": 256, "Modality": "CT", **elements})


def write_series(folder: Path, places: Sequence[float | None], axis: int, orientation: Sequence[float] = AXIAL) -> None:
    """Files in an order of names that says nothing; slice i has the grey value 10 i."""
    folder.mkdir(parents=True)
    for level, place in enumerate(places, start=1):
        position = None if place is None else [place if at == axis else -17.5 for at in range(3)]
        where = {} if position is None else {"ImagePositionPatient": position}
        name = folder / f"{SECRET}{7 * level % 11}"
        write_slice(
            name,
            10 * level,
            SeriesInstanceUID="1.2.3",
            InstanceNumber=100 - level,
            ImageOrientationPatient=list(orientation),
            **where,
        )


def run(source: Path, *lines: str, options: Sequence[str] = (), header: str = HEADER) -> PreparedData:
    content = [f"{line},Which?,lung,liver,lung" for line in lines]
    (source / "questions.csv").write_text("\n".join([header, *content]) + "\n", encoding="utf-8")
    out = source.parent / "out"
    return prepare(parse_arguments(["dicom", "--source", str(source), "--out", str(out), *options]))


def levels(prepared: PreparedData) -> list[list[int]]:
    """The grey values that tell the images of each row."""
    rows = read_examples(prepared.folder / "questions.jsonl", on_bad_row="error").examples
    return [[int(np.asarray(Image.open(image))[6, 6]) for image in row.images] for row in rows]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    ("axis", "orientation", "places", "expected"),
    [
        pytest.param(2, AXIAL, [30.0, 10.0, -20.0, 40.0, 0.5], [3, 5, 2, 1, 4], id="axial: from the feet up"),
        pytest.param(2, (1, 0, 0, 0, -1, 0), [30.0, 10.0, -20.0], [3, 2, 1], id="axial, rows upside down"),
        pytest.param(2, (1, 0, 0, 0, 0.99, -0.14), [30.0, 10.0, -20.0], [3, 2, 1], id="oblique"),
        pytest.param(1, CORONAL, [30.0, 10.0, -20.0], [1, 2, 3], id="coronal: from back to front"),
        pytest.param(0, SAGITTAL, [30.0, 10.0, -20.0], [1, 2, 3], id="sagittal: from left to right"),
        pytest.param(2, AXIAL, [None, None, None], [3, 2, 1], id="no places: by InstanceNumber"),
        pytest.param(2, AXIAL, [1.0, None, 3.0], [3, 2, 1], id="some places: by InstanceNumber"),
    ],
)
def test_slices_of_a_series_go_by_their_place(source, axis, orientation, places, expected):
    write_series(source / SECRET, places, axis, orientation)
    prepared = run(source, f"{SECRET},,{len(places)}", f"{SECRET},,", f"{SECRET},1,", f"{SECRET},,3 1")
    assert prepared.skipped == ()
    found = [10 * level for level in expected]
    # without slices the middle one; a frame is a slice, counted from 1
    assert levels(prepared) == [found, [found[len(found) // 2]], [found[0]], [found[2], found[0]]]
    assert SECRET not in (prepared.folder / "manifest.json").read_text()


def test_evenly_chosen_slices_frames_and_files_of_one_row(source):
    write_series(source / "ct", range(11), 2)
    frames = np.stack([pixels(20 * frame) for frame in range(1, 7)])
    write_dicom(source / "frames.dcm", frames, frames=True, WindowCenter=128, WindowWidth=256)
    write_slice(source / "pa.dcm", 200)
    write_slice(source / "lateral.dcm", 210)
    for litter in (".DS_Store", "DICOMDIR"):
        (source / "ct" / litter).write_bytes(b"x")
    lines = (
        "ct,,",
        "ct,,5",
        'ct,,"11,2"',
        "ct,4,",
        "frames.dcm,,",
        "frames.dcm,6,",
        "pa.dcm|lateral.dcm,,1",
        "ct|pa.dcm,,1",
    )
    prepared = run(source, *lines, options=["--slices", "3"], header=HEADER.replace("file", "files"))
    assert prepared.skipped == ()
    assert levels(prepared) == [
        [20, 60, 100],
        [20, 40, 60, 80, 100],
        [110, 20],
        [40],
        [40, 80, 120],
        [120],
        [200, 210],
        [60, 200],
    ]
    rows = read_examples(prepared.folder / "questions.jsonl").examples
    assert [row.modality for row in rows] == ["CT"] * 4 + [""] * 2 + ["CT"] * 2
    # one slice is one picture, whichever row shows it
    assert rows[0].images[0] == rows[1].images[0] == rows[2].images[1]


def series_with(folder: Path, **changes: object) -> None:
    """Three slices; the last has these elements, None for none."""
    write_series(folder, [1.0, 2.0], 2)
    elements = {
        "SeriesInstanceUID": "1.2.3",
        "InstanceNumber": 1,
        "ImageOrientationPatient": list(AXIAL),
        "ImagePositionPatient": [-17.5, -17.5, 3.0],
    }
    given = {name: value for name, value in {**elements, **changes}.items() if value is not None}
    write_slice(folder / "last", 30, **given)


BAD_FOLDERS = {
    "two series": (
        lambda folder: series_with(folder, SeriesInstanceUID=f"1.2.{SECRET}"),
        "holds 2 series",
    ),
    "two of one place": (
        lambda folder: series_with(folder, ImagePositionPatient=[-17.5, -17.5, 2.0]),
        "1 of the 3 files of its folder lie where another one does",
    ),
    "order unknown": (
        lambda folder: series_with(folder, ImagePositionPatient=None, InstanceNumber=99),
        "order of the 3 files",
    ),
    "order unknown, other orientation": (
        lambda folder: series_with(folder, ImageOrientationPatient=list(CORONAL), InstanceNumber=None),
        "order of the 3 files",
    ),
    "another file": (
        lambda folder: (series_with(folder), (folder / f"{SECRET}.txt").write_text(SECRET)),
        "1 of the 4 files of its folder are no DICOM images",
    ),
    "no files": (lambda folder: (folder / "deeper").mkdir(parents=True), "without files"),
    "many frames": (
        lambda folder: (
            folder.mkdir(),
            write_dicom(folder / SECRET, np.stack([pixels(9)] * 2), frames=True),
        ),
        "slice 1 of its folder has 2 frames",
    ),
    "text burnt in": (lambda folder: series_with(folder, BurnedInAnnotation="YES"), "burnt into its pixels"),
    "blank slice": (
        lambda folder: series_with(folder, WindowCenter=9000),
        "its image 2 of 2: slice 3 of its file cannot be used: it shows nothing",
    ),
    "link out of the source": (
        lambda folder: (
            series_with(folder),
            write_slice(folder.parent.parent / "outside", 5),
            os.symlink(folder.parent.parent / "outside", folder / "zz"),
        ),
        "1 of the 4 files of its folder are links",
    ),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_a_folder_that_is_no_series_costs_its_row(source, case):
    make, reason = BAD_FOLDERS[case]
    make(source / SECRET)
    write_slice(source / "good.dcm", 5)
    slices = "1" if case == "many frames" else "1 3"
    (skipped,) = run(source, "good.dcm,,", f"{SECRET},,{slices}").skipped
    assert reason in skipped.reason
    assert SECRET not in skipped.reason


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        (",4", "it has 3 slices, and 4 are asked for"),
        (",3 4", "it has no slice 4: give some from 1 to 3"),
        (",0 1", "it has no slice 0"),
        ("4,", "it has no slice 4"),
        ("2,1 2", "it has both slices and a frame"),
        (f",{SECRET}", "its slices must be how many, like 5, or which"),
    ],
)
def test_slices_that_there_are_not_cost_their_row(source, cells, reason):
    write_series(source / "ct", [1.0, 2.0, 3.0], 2)
    (skipped,) = run(source, "ct,,", f"ct,{cells}").skipped
    assert reason in skipped.reason
    assert SECRET not in skipped.reason
