"""Uploaded files: what is read of them, what can be chosen, and what is refused."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("pydicom", reason="needs rlmed's extra 'readers'")
pytest.importorskip("nibabel", reason="needs rlmed's extra 'readers'")

import nibabel

from rlmed.data.images import BadImageError
from rlmed.data.readers.volumes.dicom_file import read_header
from rlmed.data.readers.volumes.dicom_pixels import render_frame
from rlmed.data.readers.volumes.display import Window
from rlmed.data.readers.volumes.nifti_slices import SliceChoice, render_slice
from rlmed.studio import uploads as uploads_module
from rlmed.studio.uploads import Uploads
from rlmed.studio.volumes import HOUNSFIELD, View
from tests.unit.rlmed.data.pictures import marked
from tests.unit.rlmed.data.readers.dicom_files import write_dicom

CT = np.random.default_rng(0).integers(-1000, 1500, (32, 48)).astype(np.int16)
PATIENT = {"PatientName": "DOE^JANE", "PatientID": "MRN-4711", "WindowCenterWidthExplanation": "DOE"}


@pytest.fixture
def uploads():
    kept = Uploads()
    folder = kept.folder
    yield kept
    kept.close()
    assert not folder.exists()


def send(uploads: Uploads, content: bytes, piece: int = 1000) -> str:
    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(content), piece):
            yield content[start : start + piece]

    return asyncio.run(uploads.receive(pieces()))


def send_file(uploads: Uploads, path: Path) -> str:
    return send(uploads, path.read_bytes(), 1 << 20)


def only(uploads: Uploads, *names: str):
    sources, problems = uploads.open(names)
    assert problems == []
    assert len(sources) == 1
    return uploads.source(sources[0])


def problem(uploads: Uploads, content: bytes) -> str:
    sources, problems = uploads.open([send(uploads, content)])
    assert sources == []
    assert [place for place, _ in problems] == [0]
    return problems[0][1]


def volume(tmp_path: Path, values: np.ndarray, name: str = "v.nii.gz") -> Path:
    image = nibabel.Nifti1Image(values, np.eye(4))
    image.header["descrip"] = b"DOE^JANE"
    image.to_filename(tmp_path / name)
    return tmp_path / name


def test_a_picture_is_the_file_that_was_sent(uploads, tmp_path):
    marked(size=(60, 40)).save(tmp_path / "a.png")
    source = only(uploads, send_file(uploads, tmp_path / "a.png"))
    assert source.describe()["planes"] == {"": 1}
    assert source.describe()["windows"] == []
    assert source.file(View()).read_bytes() == (tmp_path / "a.png").read_bytes()
    assert source.picture(View()).size == (60, 40)


def test_a_ct_has_its_own_windows_and_those_of_hounsfield_units(uploads, tmp_path):
    path = write_dicom(
        tmp_path / "a",
        CT,
        Modality="CT",
        RescaleIntercept=-24,
        WindowCenter=[30, 500],
        WindowWidth=[300, 900],
        **PATIENT,
    )
    source = only(uploads, send_file(uploads, path))
    said = source.describe()
    assert (said["kind"], said["modality"]) == ("DICOM", "CT")
    names = [window["name"] for window in said["windows"]]
    assert names == ["own", "own-2", "percentiles", "range", "soft tissue", "lung", "bone", "brain", "custom"]
    assert said["windows"][1]["label"] == "the file's (500, 900)"
    header = read_header(path)

    def same(view: View, window: Window | None) -> None:
        np.testing.assert_array_equal(source.picture(view), render_frame(path, header, 0, window))

    same(View(), None)
    same(View(window="own-2"), Window(500, 900))
    same(View(window="lung"), HOUNSFIELD["lung"])
    same(View(window="custom", center=100, width=50), Window(100, 50))
    whole = np.asarray(source.picture(View(window="range")), dtype=float)
    np.testing.assert_allclose(whole, (CT - CT.min()) / float(np.ptp(CT)) * 255, atol=0.51)
    assert "DOE" not in json.dumps(said)
    with pytest.raises(ValueError, match="width 0"):
        source.picture(View(window="custom", center=100))
    with pytest.raises(BadImageError, match="no slice 2"):
        source.picture(View(index=1))


def test_files_of_a_series_are_one_stack_in_the_order_of_their_places(uploads, tmp_path):
    heights = [30, 10, 20]
    names = []
    for height in heights:
        pixels = np.full((16, 16), height, dtype=np.int16)
        pixels[0, :8] = 200
        path = write_dicom(
            tmp_path / f"{height}", pixels, Modality="MR", SeriesInstanceUID="1.2.3",
            ImagePositionPatient=[0, 0, height], ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
        )  # fmt: skip
        names.append(send_file(uploads, path))
    other = write_dicom(tmp_path / "other", np.arange(256, dtype=np.uint8).reshape(16, 16), SeriesInstanceUID="1.2.4")
    frames = write_dicom(
        tmp_path / "frames", np.random.default_rng(0).integers(0, 255, (5, 16, 16), dtype=np.uint8), frames=True
    )
    names += [send_file(uploads, other), send_file(uploads, frames)]
    sources, problems = uploads.open(names)
    assert problems == []
    stack, single, loop = (uploads.source(name) for name in sources)
    assert [one.describe()["planes"] for one in (stack, single, loop)] == [{"": 3}, {"": 1}, {"": 5}]
    shown = [np.asarray(stack.picture(View(index=i, window="custom", center=100, width=200)))[8, 8] for i in range(3)]
    assert shown == sorted(shown)
    assert len(set(shown)) == 3
    assert not any("soft tissue" in str(one.describe()) for one in (stack, single, loop))


def test_a_compressed_volume_is_inflated_and_shown_by_plane(uploads, tmp_path):
    values = np.random.default_rng(0).integers(-900, 900, (10, 12, 14)).astype(np.int16)
    path = volume(tmp_path, values)
    source = only(uploads, send_file(uploads, path))
    said = source.describe()
    assert said["planes"] == {"sagittal": 10, "coronal": 12, "axial": 14}
    assert "lung" in [window["name"] for window in said["windows"]]  # it has values of air
    for view, choice in (
        (View("axial", 3), SliceChoice("axial", 3)),
        (View("coronal", 11, window="bone"), SliceChoice("coronal", 11, window=HOUNSFIELD["bone"])),
    ):
        np.testing.assert_array_equal(source.picture(view), render_slice(path, choice))
    with pytest.raises(BadImageError, match="sagittal, coronal, axial"):
        source.picture(View("", 3))
    assert said["notes"] == []


def test_a_volume_without_orientation_says_so(uploads, tmp_path):
    image = nibabel.Nifti1Image(np.random.default_rng(0).integers(0, 90, (8, 8, 8)).astype(np.int16), None)
    image.header["qform_code"] = image.header["sform_code"] = 0
    image.to_filename(tmp_path / "v.nii")
    source = only(uploads, send_file(uploads, tmp_path / "v.nii"))
    assert "left and right" in source.describe()["notes"][0]
    assert source.picture(View("axial", 4)).size == (8, 8)


def test_files_that_cannot_be_used_cost_a_sentence_each(uploads, tmp_path):
    marked(size=(60, 40)).save(tmp_path / "a.png")
    picture = (tmp_path / "a.png").read_bytes()
    assert "neither a picture" in problem(uploads, b"hello" * 100)
    assert "truncated" in problem(uploads, picture[: len(picture) // 2])
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr("a.png", picture)
    assert "archive" in problem(uploads, archive.getvalue())
    assert "unpack it" in problem(uploads, gzip.compress(picture))
    assert "damaged" in problem(uploads, gzip.compress(b"x" * 5000)[:30])
    black = io.BytesIO()
    Image.new("L", (40, 40)).save(black, "PNG")
    assert problem(uploads, black.getvalue()).startswith("it shows nothing: it is all of one colour")
    path = write_dicom(tmp_path / "d", CT, **PATIENT)
    with pytest.raises(BadImageError, match=r"truncated|bytes") as cut:
        only(uploads, send(uploads, path.read_bytes()[:-500])).picture(View())
    assert not [secret for secret in (str(uploads.folder), "DOE", "MRN") if secret in str(cut.value)]
    # the others are opened nevertheless
    good = send(uploads, picture)
    sources, problems = uploads.open([send(uploads, b"?" * 700), good])
    assert (len(sources), [place for place, _ in problems]) == (1, [0])


def test_a_small_file_that_inflates_without_end_is_refused(tmp_path):
    uploads = Uploads(most_bytes=1 << 20)
    try:
        bomb = gzip.compress(bytes(5 << 20))
        assert len(bomb) < 1 << 16
        assert "inflates to more than 4 MiB" in problem(uploads, bomb)
        assert [path.suffix for path in uploads.folder.iterdir()] == [""]
    finally:
        uploads.close()


def test_files_beyond_the_limits_are_refused_or_make_room(tmp_path):
    uploads = Uploads(most_bytes=3000, most_total=5000)
    try:
        with pytest.raises(BadImageError, match="MiB"):
            send(uploads, bytes(3001))
        assert list(uploads.folder.iterdir()) == []
        marked(size=(60, 40)).save(tmp_path / "a.png")
        content = (tmp_path / "a.png").read_bytes()
        first = send(uploads, content)
        (source,), _ = uploads.open([first])
        for _ in range(2):
            send(uploads, bytes(2600))
        with pytest.raises(BadImageError, match="choose it again"):
            uploads.source(source)
        with pytest.raises(BadImageError, match="choose it again"):
            uploads.open([first])
        assert len(list(uploads.folder.iterdir())) == 1
    finally:
        uploads.close()


def test_files_on_their_way_count_and_make_room():
    uploads = Uploads(most_bytes=3000, most_total=5000)
    sizes = []

    async def slow(size: int, wait: int) -> AsyncIterator[bytes]:
        for _ in range(0, size, 100):
            await asyncio.sleep(0)
            sizes.append(sum(path.stat().st_size for path in uploads.folder.iterdir()))
            yield bytes(100)
        for _ in range(wait):
            await asyncio.sleep(0)

    async def send_all() -> list[str | BaseException]:
        coming = (uploads.receive(slow(2500, 200)) for _ in range(4))
        return await asyncio.gather(*coming, return_exceptions=True)

    try:
        kept = send(uploads, bytes(2000))
        done = asyncio.run(send_all())
        refused = [one for one in done if isinstance(one, BadImageError)]
        assert 0 < len(refused) < 4
        assert all("at the same time" in str(one) for one in refused)
        # files are written by the buffer, so less may lie there than has come
        assert max(sizes) <= 5000
        with pytest.raises(BadImageError, match="choose it again"):
            uploads.open([kept])
        assert len(list(uploads.folder.iterdir())) == 4 - len(refused)
        send(uploads, bytes(2900))  # nothing is on its way any more
    finally:
        uploads.close()


def test_the_oldest_sources_make_room(uploads, tmp_path, monkeypatch):
    monkeypatch.setattr(uploads_module, "MOST_SOURCES", 2)
    marked(size=(60, 40)).save(tmp_path / "a.png")
    name = send_file(uploads, tmp_path / "a.png")
    first, second, third = (uploads.open([name])[0][0] for _ in range(3))
    assert uploads.source(second).files == uploads.source(third).files
    with pytest.raises(BadImageError, match="choose it again"):
        uploads.source(first)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "", "x"])
def test_a_client_names_no_path(uploads, name):
    with pytest.raises(BadImageError, match="choose it again"):
        uploads.open([name])
