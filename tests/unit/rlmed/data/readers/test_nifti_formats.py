"""One known slice in every type of NIfTI comes out as that picture; differing facts are found."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("nibabel", reason="needs rlmed's extra 'readers'")

import nibabel

from rlmed.data.images import BadImageError
from rlmed.data.readers.volumes.display import Window
from rlmed.data.readers.volumes.nifti_slices import SliceChoice, render_slice
from tests.unit.rlmed.data.raw_files import known_grey

GREY = known_grey()
WHOLE = Window(127.5, 255.0)
VOLUME = np.stack([GREY[::-1, ::-1].T] * 6, axis=-1)
"""The known picture in each axial slice, as it is stored: to the right, to the front, up."""
SIZES = VOLUME.nbytes


def write(path: Path, values: np.ndarray, kind=nibabel.Nifti1Image, endianness: str = "<", **fields: object) -> Path:
    """A file of the raw values, whatever the fields say of them."""
    header = kind.header_class(endianness=endianness)
    header.set_data_dtype(values.dtype)
    header.set_data_shape(values.shape)
    header.set_sform(np.eye(4), 1)
    header["magic"] = header.single_magic
    header["vox_offset"] = header.single_vox_offset
    for name, value in fields.items():
        header[name] = value
    start = header.binaryblock.ljust(header.single_vox_offset, b"\0")
    content = start + values.astype(values.dtype.newbyteorder(endianness)).tobytes(order="F")
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def shown(path: Path, window: Window | None = WHOLE, **choice: object) -> np.ndarray:
    return np.asarray(render_slice(path, SliceChoice("axial", window=window, **choice))).astype(int)


def refused(path: Path, reason: str, window: Window | None = WHOLE, **choice: object) -> None:
    with pytest.raises(BadImageError, match=reason) as caught:
        shown(path, window, **choice)
    assert str(path) not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("endianness", ["<", ">"])
@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("suffix", ["nii", "nii.gz"])
@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"])
def test_every_type_with_its_whole_range_and_a_narrow_one_far_out(tmp_path, dtype, suffix, kind, endianness):
    kinds = np.dtype(dtype)
    ranges = [(-3e38, 3e38), (1.0, 1.0001)] if kinds.kind == "f" else []
    if kinds.kind != "f":
        info = np.iinfo(kinds)
        ranges = [(info.min, info.max)] + ([(2**30, 2**30 + 255)] if kinds.itemsize > 2 else [])
    for low, high in ranges:
        span = float(high) - float(low)
        values = (float(low) + VOLUME / 255.0 * span * (1 - 1e-9)).astype(kinds)
        path = write(tmp_path / f"a.{suffix}", values, kind, endianness)
        stored = values[..., 2].astype(float)
        wanted = ((stored - low) / span * 255)[::-1, ::-1].T
        np.testing.assert_allclose(
            shown(path, Window((float(low) + float(high)) / 2, span), index=2), wanted, atol=0.51
        )


@pytest.mark.parametrize(
    ("slope", "intercept", "times", "plus"),
    [
        (2.0, -100.0, 2.0, -100.0),
        (-1.0, 255.0, -1.0, 255.0),
        (0.0, 5.0, 1.0, 0.0),
        (np.nan, np.nan, 1.0, 0.0),
        (1.0, 7.0, 1.0, 7.0),
    ],
)
def test_a_slope_of_0_or_nan_is_none(tmp_path, slope, intercept, times, plus):
    path = write(tmp_path / "a.nii", VOLUME, scl_slope=slope, scl_inter=intercept)
    np.testing.assert_array_equal(shown(path), np.clip(GREY * times + plus, 0, 255))


def test_four_axes_and_nan(tmp_path):
    four = np.stack([VOLUME.astype(np.float32), 255 - VOLUME.astype(np.float32)], axis=-1)
    four[3, 3, :, 0] = np.nan
    path = write(tmp_path / "a.nii.gz", four)
    np.testing.assert_array_equal(shown(path, volume=1), 255 - GREY)
    wanted = GREY.copy()
    wanted[47 - 3, 63 - 3] = 0
    np.testing.assert_array_equal(shown(path), wanted)


@pytest.mark.parametrize(
    ("values", "fields", "reason"),
    [
        (VOLUME.astype(np.complex64), {}, "single real numbers"),
        (
            np.zeros(VOLUME.shape, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")]),
            {},
            "128 .RGB., not single real numbers",
        ),
        (VOLUME, {"datatype": 1}, r"datatype 1 \(binary\), not single real"),
        (VOLUME, {"bitpix": 16}, "bitpix 16 and .* uint8 of 8 bits"),
        (VOLUME, {"datatype": 4}, "bitpix 8 and .* int16 of 16 bits"),
        (VOLUME, {"datatype": 16, "bitpix": 32}, f"end at byte {352 + 4 * SIZES}; it has {352 + SIZES}"),
        (
            VOLUME.astype(np.float32),
            {"datatype": 4, "bitpix": 16},
            f"end at byte {352 + 2 * SIZES}; it has {352 + 4 * SIZES}",
        ),
        (VOLUME, {"dim": [3, 64, 48, 5, 1, 1, 1, 1]}, "64x48x5 voxels of 1 bytes"),
        (VOLUME, {"dim": [3, 64, 48, 7, 1, 1, 1, 1]}, "64x48x7 voxels of 1 bytes"),
        (VOLUME, {"dim": [3, 32, 96, 7, 1, 1, 1, 1]}, "32x96x7 voxels"),
        (np.stack([VOLUME] * 2, -1), {"dim": [3, 64, 48, 6, 2, 1, 1, 1]}, "64x48x6 voxels of 1 bytes"),
        (VOLUME, {"sizeof_hdr": 540}, "sizeof_hdr 540, its magic stands for 348"),
        (VOLUME, {"scl_slope": 2, "scl_inter": np.nan}, "scl_slope 2 and scl_inter nan"),
        (VOLUME, {"scl_slope": np.inf, "scl_inter": 0}, "scl_slope inf and scl_inter 0"),
        (VOLUME, {"scl_slope": -np.inf, "scl_inter": 0}, "scl_slope -inf and scl_inter 0"),
    ],
)
@pytest.mark.parametrize("suffix", ["nii", "nii.gz"])
def test_header_against_itself_and_the_data(tmp_path, values, fields, reason, suffix):
    refused(write(tmp_path / f"a.{suffix}", values, **fields), reason, index=2)


@pytest.mark.parametrize("level", [0, 1, 9])
@pytest.mark.parametrize("place", [0.2, 0.5, 0.9])
def test_a_damaged_byte_of_a_compressed_file_is_found_wherever_it_is(tmp_path, level, place):
    """Of a byte copied as it is, or a length turned into another, only the final sum tells."""
    volume = np.random.default_rng(0).integers(0, 200, (40, 40, 20)).astype(np.uint8)
    path = write(tmp_path / "a.nii.gz", volume)
    whole = gzip.compress(gzip.decompress(path.read_bytes()), level, mtime=0)
    path.write_bytes(whole)
    wanted = shown(path, index=3)
    damaged = bytearray(whole)
    damaged[int(len(damaged) * place)] ^= 4
    path.write_bytes(damaged)
    refused(path, "damaged", index=3)
    path.write_bytes(whole)
    np.testing.assert_array_equal(shown(path, index=3), wanted)


def test_harmless_differences_are_accepted(tmp_path):
    """A wrong name, a bitpix of 0, zeros behind the data, compression in zero-padded parts."""
    plain = write(tmp_path / "a.nii", VOLUME, bitpix=0)
    np.testing.assert_array_equal(shown(plain), GREY)
    content = plain.read_bytes()
    (tmp_path / "b.nii.gz").write_bytes(content + bytes(300))
    np.testing.assert_array_equal(shown(tmp_path / "b.nii.gz"), GREY)
    parts = b"".join(gzip.compress(content[start : start + 5000]) for start in range(0, len(content), 5000))
    (tmp_path / "c.nii").write_bytes(parts + bytes(600))
    np.testing.assert_array_equal(shown(tmp_path / "c.nii", index=5), GREY)
    (tmp_path / "d.nii").write_bytes(content + b"\1" * 300)
    refused(tmp_path / "d.nii", "it has 19084 bytes")


@pytest.mark.parametrize(
    ("qform", "sform", "reason"),
    [
        (np.diag([-1.0, 1, 1, 1]), np.eye(4), "qform .* LAS, its sform to RAS"),
        (np.eye(4), np.diag([-1.0, -1, 1, 1]), "RAS, its sform to LPS"),
        (np.eye(4), np.eye(4)[[0, 2, 1, 3]], "RAS, its sform to RSA"),
        (np.eye(4), np.diag([1.0, 1, 2, 1]), r"voxels of 1 x 1 x 1, .*sform of 1 x 1 x 2"),
        (np.eye(4), np.diag([1.1, 0.95, 1, 1]), ""),
    ],
)
def test_qform_against_sform(tmp_path, qform, sform, reason):
    image = nibabel.Nifti1Image(VOLUME, None)
    image.header.set_qform(qform, 1)
    image.header.set_sform(sform, 2)
    image.to_filename(tmp_path / "a.nii")
    if reason:
        refused(tmp_path / "a.nii", reason)
    for code in ("qform_code", "sform_code"):  # the advice
        cured = nibabel.load(tmp_path / "a.nii")
        cured.header[code] = 0
        content = (tmp_path / "a.nii").read_bytes()
        (tmp_path / "b.nii").write_bytes(cured.header.binaryblock + content[348:])
        assert shown(tmp_path / "b.nii").size


@pytest.mark.parametrize(
    ("values", "window", "reason"),
    [
        (np.full(VOLUME.shape, np.nan, np.float32), None, "none .*finite number"),
        (np.full(VOLUME.shape, np.inf, np.float32), WHOLE, "none .*finite number"),
        (np.full(VOLUME.shape, 3, np.int16), None, "all its values are 3"),
        (np.full(VOLUME.shape, 3, np.int16), WHOLE, "all its values are 3"),
        (VOLUME, Window(5000, 10), "values .*from 0 to 255, .*4995 to 5005 .*--window"),
        (VOLUME, Window(0, 1e6), "values .*from 0 to 255, .*-500000 to 500000 "),
    ],
)
def test_a_slice_that_shows_nothing_is_refused_with_the_cause(tmp_path, values, window, reason):
    refused(write(tmp_path / "a.nii.gz", values), reason, window)


def test_a_mask_of_one_voxel_is_a_picture(tmp_path):
    mask = np.zeros_like(VOLUME)
    mask[5, 5, 2] = 1
    assert shown(write(tmp_path / "a.nii", mask), None, index=2).sum() == 255
