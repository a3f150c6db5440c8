"""NIfTI slices: which way up, which voxels, and all that a damaged or hostile file gets wrong."""

import gzip
import itertools
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("nibabel", reason="needs rlmed's extra 'readers'")

import nibabel
from nibabel.testing import data_path

from rlmed.data.images import BadImageError
from rlmed.data.readers.volumes import nifti_slices
from rlmed.data.readers.volumes.display import Window
from rlmed.data.readers.volumes.nifti_slices import SliceChoice, render_slice

RNG = np.random.default_rng(0)
VOLUME = RNG.integers(0, 200, (10, 12, 14)).astype(np.int16)
"""In canonical orientation: right, front, up."""
WHOLE = Window(127.5, 255.0)
"""Shows 0 to 255 as they are."""


def write(path: Path, values: np.ndarray, affine=None, kind=nibabel.Nifti1Image, **header) -> Path:
    image = kind(values, np.diag([1.0, 1.0, 1.0, 1.0]) if affine is None else affine)
    for name, value in header.items():
        image.header[name] = value
    image.to_filename(path)
    return path


def shown(path: Path, plane: str = "axial", window: Window | None = WHOLE, **choice) -> np.ndarray:
    return np.asarray(render_slice(path, SliceChoice(plane, window=window, **choice)))


def test_each_plane_is_shown_as_radiologists_look_at_it(tmp_path):
    """A slab at the patient's right, front or top lies by convention in each picture."""
    nothing = None
    left_third, upper_third = np.s_[:, :3], np.s_[:3]
    wanted = {
        "right": {"axial": left_third, "coronal": left_third, "sagittal": nothing},
        "front": {"axial": upper_third, "coronal": nothing, "sagittal": left_third},
        "top": {"axial": nothing, "coronal": upper_third, "sagittal": upper_third},
    }
    for axis, (side, places) in enumerate(wanted.items()):
        volume = np.zeros((9, 9, 9), dtype=np.uint8)
        np.moveaxis(volume, axis, 0)[6:] = 255
        path = write(tmp_path / "a.nii", volume)
        for plane, place in places.items():
            if place is nothing:  # the slab has slices of its own, and others have nothing of it
                for index, value in ((4, 0), (8, 255)):
                    with pytest.raises(BadImageError, match=f"shows nothing: .*{value}"):
                        shown(path, plane, index=index)
                continue
            picture = np.zeros((9, 9), dtype=np.uint8)
            picture[place] = 255
            np.testing.assert_array_equal(shown(path, plane), picture, err_msg=f"{side} {plane}")


ORIENTATIONS = [
    (order, flips) for order in itertools.permutations(range(3)) for flips in itertools.product((1, -1), repeat=3)
]


@pytest.mark.parametrize("suffix", ["nii", "nii.gz"])
def test_all_48_ways_of_storing_a_volume_give_the_same_pictures(tmp_path, suffix):
    wanted = {
        "axial": VOLUME[::-1, ::-1, 4].T,
        "coronal": VOLUME[::-1, 4, ::-1].T,
        "sagittal": VOLUME[4, ::-1, ::-1].T,
    }
    for order, flips in ORIENTATIONS:
        stored = VOLUME.transpose(order)[tuple(slice(None, None, flip) for flip in flips)]
        affine = np.zeros((4, 4))
        affine[3, 3] = 1
        for axis, (canonical, flip) in enumerate(zip(order, flips, strict=True)):
            affine[canonical, axis] = flip
            affine[canonical, 3] = -50 if flip > 0 else 50
        path = write(tmp_path / f"a.{suffix}", np.ascontiguousarray(stored), affine)
        for plane, picture in wanted.items():
            np.testing.assert_array_equal(shown(path, plane, index=4), picture, err_msg=f"{order} {flips} {plane}")


def test_an_oblique_volume_is_shown_in_its_closest_plane(tmp_path):
    turn = np.radians(20)
    affine = np.eye(4)
    affine[:2, :2] = [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
    np.testing.assert_array_equal(shown(write(tmp_path / "a.nii", VOLUME, affine), index=3), VOLUME[::-1, ::-1, 3].T)


@pytest.mark.parametrize(
    ("choice", "index"),
    [
        ({"index": 0}, 0),
        ({"index": 13}, 13),
        ({}, 6),
        ({"fraction": 0.0}, 0),
        ({"fraction": 1.0}, 13),
        ({"fraction": 0.7}, 9),
    ],
)
def test_a_slice_is_chosen_by_index_or_fraction(tmp_path, choice, index):
    np.testing.assert_array_equal(shown(write(tmp_path / "a.nii", VOLUME), **choice), VOLUME[::-1, ::-1, index].T)


def test_pixels_become_square(tmp_path):
    path = write(tmp_path / "a.nii", VOLUME, np.diag([1.0, 2.0, 5.0, 1.0]))
    assert shown(path, "axial").shape == (24, 10)
    assert shown(path, "coronal").shape == (70, 10)
    assert shown(path, "sagittal").shape == (35, 12)


def test_a_volume_of_several_is_chosen(tmp_path):
    four = np.stack([VOLUME, VOLUME + 40], axis=-1)
    for name in ("a.nii", "a.nii.gz"):
        path = write(tmp_path / name, four)
        np.testing.assert_array_equal(shown(path, index=5), VOLUME[::-1, ::-1, 5].T)
        np.testing.assert_array_equal(shown(path, index=5, volume=1), VOLUME[::-1, ::-1, 5].T + 40)
        with pytest.raises(BadImageError, match=r"volume 2: .*0 to 1"):
            shown(path, volume=2)


def test_scaling_and_window_are_applied(tmp_path):
    image = nibabel.Nifti1Image(VOLUME, np.eye(4))
    image.header.set_slope_inter(2.0, -1024.0)
    # written raw, so that slope and intercept hold for these very numbers
    content = image.header.binaryblock + b"\0\0\0\0" + VOLUME.tobytes(order="F")
    path = tmp_path / "a.nii"
    path.write_bytes(content)
    assert nibabel.load(path).get_fdata()[1, 2, 3] == 2.0 * VOLUME[1, 2, 3] - 1024
    values = 2.0 * VOLUME[::-1, ::-1, 7].T - 1024
    wanted = np.clip((values + 1000) / 300, 0, 1) * 255
    np.testing.assert_allclose(shown(path, window=Window(-850, 300), index=7), wanted, atol=0.51)


def test_without_a_window_the_percentiles_of_the_slice_are_shown_and_nan_is_black(tmp_path):
    values = VOLUME.astype(np.float32)
    values[:, :, 7] += np.linspace(0, 5, 120, dtype=np.float32).reshape(10, 12)
    values[2, 3, 7] = np.nan
    values[0, 0, 6] = 1e30  # of another slice
    picture = shown(write(tmp_path / "a.nii", values), window=None, index=7)
    seen = values[::-1, ::-1, 7].T
    low, high = np.nanpercentile(seen, (0.5, 99.5))
    np.testing.assert_allclose(picture, np.clip(np.nan_to_num((seen - low) / (high - low)), 0, 1) * 255, atol=0.51)
    assert picture[11 - 3, 9 - 2] == 0


@pytest.mark.parametrize("dtype", ["u1", "i2", ">i2", "u2", "i4", "f4", ">f4", "f8", "i8"])
@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_every_type_byte_order_and_version_is_read(tmp_path, dtype, kind):
    header = kind.header_class(endianness=">" if dtype[0] == ">" else "<")
    header.set_data_dtype(np.dtype(dtype))
    kind(VOLUME.astype(dtype), np.eye(4), header).to_filename(tmp_path / "a.nii")
    np.testing.assert_array_equal(shown(tmp_path / "a.nii", index=5), VOLUME[::-1, ::-1, 5].T)


def test_real_files_are_nibabels_canonical_slices():
    for name in ("anatomical.nii", "example4d.nii.gz", "example_nifti2.nii.gz", "reoriented_anat_moved.nii"):
        path = Path(data_path) / name
        values = nibabel.as_closest_canonical(nibabel.load(path)).get_fdata()
        values = values[..., 1] if values.ndim == 4 else values
        window = Window(float(values.mean()), float(4 * values.std()))
        index = values.shape[2] // 3
        seen = values[::-1, ::-1, index].T
        wanted = np.clip((seen - window.center) / window.width + 0.5, 0, 1) * 255
        volume = 1 if "4d" in name or "nifti2" in name else 0
        np.testing.assert_allclose(shown(path, window=window, index=index, volume=volume), wanted, atol=0.6)


def test_one_slice_of_an_uncompressed_file_is_read(tmp_path):
    path = write(
        tmp_path / "a.nii", np.zeros((256, 256, 200), dtype=np.int16) + np.arange(256, dtype=np.int16)[:, None, None]
    )
    shown(path)
    tracemalloc.start()
    shown(path, index=150)
    assert tracemalloc.get_traced_memory()[1] < 4_000_000
    tracemalloc.stop()


def test_values_that_writers_leave_unset_are_understood(tmp_path):
    """No offset, no sign of the third axis, a negative voxel size; orientation in qform alone."""
    image = nibabel.Nifti1Image(VOLUME, None)
    image.header.set_qform(np.diag([1.0, 2.0, 1.0, 1.0]), 1)
    image.header["pixdim"][0] = 0
    image.header["pixdim"][2] = -2
    path = tmp_path / "a.nii"
    path.write_bytes(image.header.binaryblock + bytes(4) + VOLUME.tobytes(order="F"))
    assert image.header["vox_offset"] == 0
    assert shown(path, "axial").shape == (24, 10)
    np.testing.assert_array_equal(shown(path, "coronal", index=5), VOLUME[::-1, 5, ::-1].T)


@pytest.mark.parametrize(("plane", "count"), [("axial", 14), ("coronal", 12), ("sagittal", 10)])
def test_a_slice_out_of_range_is_an_error(tmp_path, plane, count):
    path = write(tmp_path / "a.nii", VOLUME)
    shown(path, plane, index=count - 1)
    with pytest.raises(BadImageError, match=f"{plane} slice {count}: .*0 to {count - 1}"):
        shown(path, plane, index=count)


def test_an_unknown_orientation_is_an_error_unless_allowed(tmp_path):
    path = write(tmp_path / "a.nii", VOLUME)
    content = path.read_bytes()
    assert content[252:256] == b"\0\0\2\0"  # qform_code and sform_code
    path.write_bytes(content[:252] + bytes(4) + content[256:])
    with pytest.raises(BadImageError, match=r"left .*from right"):
        shown(path)
    allowed = render_slice(path, SliceChoice("axial", window=WHOLE), allow_unknown_orientation=True)
    assert allowed.size == (10, 12)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"dim": [3, 30000, 30000, 30000, 1, 1, 1, 1]}, "more than is read"),
        ({"dim": [3, 0, 12, 14, 1, 1, 1, 1]}, "shape"),
        ({"dim": [3, -5, 12, 14, 1, 1, 1, 1]}, "shape|damaged"),
        ({"dim": [5, 10, 12, 7, 1, 2, 1, 1]}, "volumes of 3 axes"),
        ({"dim": [99, 10, 12, 14, 1, 1, 1, 1]}, "magic stands for 348"),
        ({"dim": [3, 10, 12, 15, 1, 1, 1, 1]}, "10x12x15 voxels of 2 bytes, .* 3952; it has 3712"),
        ({"datatype": 32, "bitpix": 64}, "not single real numbers"),
        ({"datatype": 128, "bitpix": 24}, "not single real numbers"),
        ({"datatype": 12345}, "damaged"),
        ({"vox_offset": 1e12}, "more than is read"),
        ({"vox_offset": float("nan")}, "more than is read|damaged"),
        ({"srow_x": [0, 0, 0, 0]}, "not a rotation"),
        ({"srow_x": [float("nan")] * 4}, "not a rotation"),
        ({"srow_x": [1000, 0, 0, 0]}, "more than 20 times"),
        ({"magic": b"ni1"}, "single-file"),
        ({"magic": b"xyz"}, "not a single-file NIfTI"),
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_a_header_that_lies_is_an_error(tmp_path, header, reason, zipped):
    image = nibabel.Nifti1Image(VOLUME, np.eye(4))
    image.to_filename(tmp_path / "whole.nii")
    content = bytearray((tmp_path / "whole.nii").read_bytes())
    damaged = nibabel.Nifti1Header(bytes(content[:348]), check=False)
    for name, value in header.items():
        damaged[name] = value
    content[:348] = damaged.binaryblock
    path = tmp_path / "a.nii"
    path.write_bytes(gzip.compress(content) if zipped else content)
    with pytest.raises(BadImageError, match=reason):
        shown(path, fraction=1.0)


def test_a_bomb_is_refused_before_it_is_inflated(tmp_path, monkeypatch):
    header = nibabel.Nifti1Header()
    header.set_data_shape((20000, 20000, 10))
    header.set_data_dtype(np.uint8)
    header.set_sform(np.eye(4), 1)
    path = tmp_path / "bomb.nii.gz"
    with gzip.open(path, "wb") as file:
        file.write(header.binaryblock)
        for _ in range(40):
            file.write(bytes(10**6))
    assert path.stat().st_size < 50_000
    tracemalloc.start()
    with pytest.raises(BadImageError, match="more than is read"):
        shown(path)
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()
    # a stated size within bounds, and far more in the file: the rest is never inflated
    monkeypatch.setattr(nifti_slices, "MAX_VOLUME", 10**6)
    header.set_data_shape((100, 100, 10))
    with gzip.open(path, "wb") as file:
        file.write(header.binaryblock + b"\0" * 4)
        for _ in range(40):
            file.write(bytes(10**6))
    tracemalloc.start()
    with pytest.raises(BadImageError, match=r"byte 100352; .*40000352 bytes"):
        shown(path)
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()


def test_a_long_extension_is_never_read(tmp_path):
    path = write(tmp_path / "a.nii", VOLUME, vox_offset=5_000_000)
    content = path.read_bytes()
    assert len(content) > 5_000_000
    # of 2 GB, by its own word
    path.write_bytes(content[:348] + b"\1\0\0\0" + (2**31 - 16).to_bytes(4, "little") + content[356:])
    np.testing.assert_array_equal(shown(path, index=5), VOLUME[::-1, ::-1, 5].T)


def test_a_truncated_or_damaged_file_is_an_error(tmp_path):
    for name in ("a.nii", "a.nii.gz"):
        whole = write(tmp_path / name, VOLUME).read_bytes()
        for length in range(0, len(whole) - 300, len(whole) // 30):
            (tmp_path / "cut").write_bytes(whole[:length])
            with pytest.raises(BadImageError):
                shown(tmp_path / "cut", index=13)
    rng = random.Random(0)
    for _ in range(200):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[rng.randrange(20, len(damaged))] = rng.randrange(256)
        (tmp_path / "cut").write_bytes(damaged)
        try:
            shown(tmp_path / "cut", index=13)
        except BadImageError:
            continue


def test_random_headers_never_raise_anything_else(tmp_path, capfd):
    rng = random.Random(1)
    outcomes = set()
    whole = write(tmp_path / "a.nii", VOLUME).read_bytes()
    for _ in range(500):
        damaged = bytearray(whole)
        for _ in range(rng.choice((1, 3, 10))):
            damaged[rng.randrange(352)] = rng.randrange(256)
        (tmp_path / "cut").write_bytes(damaged)
        try:
            shown(tmp_path / "cut", rng.choice(("axial", "coronal", "sagittal")))
            outcomes.add("read")
        except BadImageError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}
    assert capfd.readouterr().err == ""


def test_a_missing_file_or_a_folder_is_an_error_that_does_not_name_it(tmp_path):
    (tmp_path / "DOE").mkdir()
    for path in (tmp_path / "DOE", tmp_path / "DOE" / "1.nii"):
        with pytest.raises(BadImageError, match="cannot be read") as caught:
            shown(path)
        assert "DOE" not in str(caught.value)


def test_a_slice_of_too_many_voxels_is_refused_before_it_is_read(tmp_path, monkeypatch):
    path = write(tmp_path / "a.nii.gz", np.zeros((40, 30, 9), dtype=np.uint8))
    monkeypatch.setattr(nifti_slices, "MAX_SLICE", 400)
    with pytest.raises(BadImageError, match="axial slices have 40x30 voxels"):
        render_slice(path, SliceChoice("axial", index=4))
    monkeypatch.setattr(nifti_slices, "MAX_SLICE", 40 * 30)
    with pytest.raises(BadImageError, match="all its values are 0"):
        render_slice(path, SliceChoice("axial", index=4))
