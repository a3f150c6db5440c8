"""Render one slice of a NIfTI volume as an 8-bit picture, in radiological orientation.

Slices are counted in the closest canonical orientation, from 0: axial from the feet up, coronal
from back to front, sagittal from the patient's left to the right. Axial and coronal slices are
shown with the patient's right on the left of the picture, axial ones with the front on top; coronal
and sagittal ones with the head on top, sagittal ones looking left. Oblique volumes are not
resampled: the plane closest to the one asked for is shown.

nibabel interprets header and voxels. The header is read first, on its own, so that what will be
read or inflated is known and bounded; extensions, which may be long and may name a patient, are
never read.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import BinaryIO, Literal, cast

import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.arrayproxy import ArrayProxy
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header
from nibabel.orientations import io_orientation
from nibabel.spatialimages import HeaderDataError
from PIL import Image

from rlmed.data.images import BadImageError
from rlmed.data.readers.volumes.damage import damage_reported
from rlmed.data.readers.volumes.display import Window, check_shown, percentile_range, stretch, to_picture
from rlmed.data.readers.volumes.nifti_agreement import check_header, check_length, check_orientation, end_of_data

MAX_VOLUME = 1 << 30
"""Most bytes read of one volume."""
MAX_SLICE = 1 << 24
"""Most voxels of a slice: its values take eight bytes each, several times over."""
MAX_INFLATED = 1 << 32
"""Most bytes inflated of a compressed file, up to the end of the volume."""
MAX_OFFSET = 1 << 24
"""Most bytes before the first voxel: the header and any extensions."""
FILES_KEPT = 256
"""Files known to be intact, cached for further rows about the same one."""
Plane = Literal["axial", "coronal", "sagittal"]
AXES: dict[Plane, int] = {"sagittal": 0, "coronal": 1, "axial": 2}
"""Canonical axis (to the right, to the front, up) along which slices of a plane follow."""

_GZIP = b"\x1f\x8b"
_HEADERS = ((348, 344, b"n+1\0", Nifti1Header), (540, 4, b"n+2\0", Nifti2Header))
"""Length of a header, where its magic is and what it reads, and nibabel's class."""
_DAMAGE = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    HeaderDataError,
    zlib.error,
    struct.error,
)
_nifti_damage_reported = partial(
    damage_reported,
    _DAMAGE,
    message="it is damaged or truncated: copy or export it again",
    without_number="damaged compression",
)


@dataclass(frozen=True, slots=True)
class SliceChoice:
    """A slice of a file, and how its values are shown.

    Example:
        SliceChoice(plane="axial", index=17, window=Window(40.0, 400.0))
    """

    plane: Plane
    index: int | None = None
    """From 0; None for `fraction` of the way through the volume."""
    fraction: float = 0.5
    """From 0.0, the first slice, to 1.0, the last one; used where there is no `index`."""
    volume: int = 0
    """Index, from 0, in a file of several volumes."""
    window: Window | None = None
    """In values after scaling; by default from the first to the second of `display.PERCENTILES`."""


def render_slice(path: Path, choice: SliceChoice, *, allow_unknown_orientation: bool = False) -> Image.Image:
    """Return the picture of one slice: mode L, square pixels, without header data. NaN is black.

    Args:
        path: a .nii or .nii.gz file, told apart by their first bytes.
        choice: the slice.
        allow_unknown_orientation: also read files without qform and sform; left and right may then
            be swapped.

    Raises:
        BadImageError: for a file that is missing, damaged, not NIfTI or too large, or a slice out
            of range; gives the reason but not the path.
    """
    values, spacing = _read_slice(path, choice, allow_unknown_orientation)
    window = choice.window
    low, high = (
        (window.center - window.width / 2, window.center + window.width / 2) if window else percentile_range(values)
    )
    pixels = stretch(values, low, high)
    check_shown(values, pixels, f"{low:g} to {high:g} is shown")
    return to_picture(pixels, *spacing)


def slice_values(path: Path, choice: SliceChoice, *, allow_unknown_orientation: bool = False) -> np.ndarray:
    """Return the finite values of a slice, after scaling: float [N].

    Raises:
        BadImageError: as `render_slice`.
    """
    values, _ = _read_slice(path, choice, allow_unknown_orientation)
    finite: np.ndarray = values[np.isfinite(values)]
    return finite


def _read_slice(path: Path, choice: SliceChoice, allow_unknown: bool) -> tuple[np.ndarray, tuple[float, float]]:
    """Return what `_oriented_slice` does, of a checked file."""
    with _nifti_damage_reported(), path.open("rb") as file:
        zipped = file.read(2) == _GZIP
        file.seek(0)
        # GzipFile inflates in small pieces on read
        stream = cast(BinaryIO, gzip.GzipFile(fileobj=file)) if zipped else file
        header = _read_header(stream)
        check_header(header)
        affine = _affine(header, allow_unknown)
        shape = _checked_shape(header, choice.volume, zipped)
        check_length(file, header, zipped, MAX_INFLATED)
        if zipped:
            state = path.stat()
            _check_sum(path, min(end_of_data(header), MAX_INFLATED), state.st_mtime_ns, state.st_size)
        return _oriented_slice(ArrayProxy(stream, header), affine, shape, choice)


def slice_count(path: Path, plane: Plane, *, allow_unknown_orientation: bool = False) -> int:
    """Return how many slices of a plane a file has, by its header.

    Raises:
        BadImageError: as `render_slice`.
    """
    return slice_counts(path, allow_unknown_orientation=allow_unknown_orientation)[plane]


def slice_counts(path: Path, *, allow_unknown_orientation: bool = False) -> dict[str, int]:
    """Return how many slices of each plane a file has, and its `"volumes"`, by its header.

    Raises:
        BadImageError: as `render_slice`.
    """
    with _nifti_damage_reported(), path.open("rb") as file:
        zipped = file.read(2) == _GZIP
        file.seek(0)
        header = _read_header(cast(BinaryIO, gzip.GzipFile(fileobj=file)) if zipped else file)
        check_header(header)
        affine = _affine(header, allow_unknown_orientation)
        shape = _checked_shape(header, 0, zipped)
        counts: dict[str, int] = {plane: shape[_axis_through(affine, plane)] for plane in AXES}
        return counts | {"volumes": shape[3] if len(shape) > 3 else 1}


@lru_cache(maxsize=FILES_KEPT)
def _check_sum(path: Path, end: int, changed: int, size: int) -> None:
    """Verify the checksum at the end of a compressed file: deflate itself detects little damage.

    Args:
        path: the file.
        end: bytes to inflate and discard; a checksum further on is not reached.
        changed: with `size`, tells this file from a later one of its name.
        size: see `changed`.

    Raises:
        OSError: if the checksum differs.
        EOFError: if the file is truncated.
    """
    with gzip.open(path) as stream:
        while stream.tell() <= end and stream.read(1 << 16):
            pass


def _read_header(stream: BinaryIO) -> Nifti1Header:
    raw = stream.read(540)
    for length, offset, magic, kind in _HEADERS:
        if len(raw) >= length and raw[offset : offset + 4] == magic:
            # unchecked, since nibabel's checks print to the terminal; the checks that matter are
            # below
            return _repaired(kind(raw[:length], check=False))
    raise BadImageError("it is not a single-file NIfTI (.nii or .nii.gz): convert it to one")


def _repaired(header: Nifti1Header) -> Nifti1Header:
    """Fill in values that writers leave unset, as the standard or else nibabel reads them."""
    if header["vox_offset"] < header.single_vox_offset:
        header["vox_offset"] = header.single_vox_offset
    if header["pixdim"][0] not in (-1, 1):  # the sign of the third axis
        header["pixdim"][0] = 1
    header["pixdim"][1:4] = np.abs(header["pixdim"][1:4])
    return header


def _affine(header: Nifti1Header, allow_unknown: bool) -> np.ndarray:
    if not allow_unknown and header["qform_code"] <= 0 and header["sform_code"] <= 0:
        raise BadImageError(
            "it does not state its orientation (qform and sform are unset), so left cannot be told from right: "
            "set one of them, or allow it with --allow-unknown-orientation"
        )
    check_orientation(header)
    affine = np.asarray(header.get_best_affine(), dtype=np.float64)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise BadImageError("its orientation matrix is not a rotation: set its qform or sform")
    return affine


def _checked_shape(header: Nifti1Header, volume: int, zipped: bool) -> tuple[int, ...]:
    """Check bounds; return the lengths of all axes longer than 1 or among the first three."""
    shape = tuple(int(length) for length in header.get_data_shape())
    shape = shape + (1,) * (3 - len(shape))
    if min(shape) < 1 or any(length > 1 for length in shape[4:]):
        raise BadImageError(
            f"its header says shape {shape}: volumes of 3 axes, or 4 with the last one for volumes, are read"
        )
    dtype = header.get_data_dtype()
    volumes = shape[3] if len(shape) > 3 else 1
    if not 0 <= volume < volumes:
        raise BadImageError(f"it has no volume {volume}: give one from 0 to {volumes - 1}")
    one = shape[0] * shape[1] * shape[2] * dtype.itemsize
    offset = float(header["vox_offset"])
    if one > MAX_VOLUME or (zipped and one * (volume + 1) > MAX_INFLATED) or not 0 <= offset <= MAX_OFFSET:
        raise BadImageError(
            f"its header says {shape[0]}x{shape[1]}x{shape[2]} voxels of {dtype.itemsize} bytes, volume {volume}, from byte "
            f"{offset:.0f}: more than is read (a volume of {MAX_VOLUME} bytes, {MAX_INFLATED} bytes inflated, "
            f"{MAX_OFFSET} bytes before it). Export the part that the question is about"
        )
    return shape


def _oriented_slice(
    voxels: ArrayProxy, affine: np.ndarray, shape: tuple[int, ...], choice: SliceChoice
) -> tuple[np.ndarray, tuple[float, float]]:
    """Return the slice's values as shown, rows from the top, and its row and column distances."""
    orientation = io_orientation(affine)
    canonical = [int(axis) for axis in orientation[:, 0]]
    through = _axis_through(affine, choice.plane)
    index = _slice_index(choice, shape[through])
    stored = index if orientation[through, 1] > 0 else shape[through] - 1 - index
    selection: list[int | slice] = [slice(None)] * 3
    selection[through] = stored
    selection += [choice.volume, *[0] * (len(shape) - 4)] if len(shape) > 3 else []
    rest = [axis for axis in range(3) if axis != through]
    if (rows := shape[rest[0]]) * (columns := shape[rest[1]]) > MAX_SLICE:
        raise BadImageError(
            f"its {choice.plane} slices have {rows}x{columns} voxels: more than {MAX_SLICE} are not read. Export the part "
            "that the question is about"
        )
    # reads only this slice, or inflates up to it
    values = np.asarray(voxels[tuple(selection[: len(voxels.shape)])])
    values = np.flip(values, [index for index, axis in enumerate(rest) if orientation[axis, 1] < 0])
    sizes = voxel_sizes(affine)
    if canonical[rest[0]] > canonical[rest[1]]:
        values, rest = values.T, rest[::-1]
    # now [first canonical axis, second one], both increasing: to the right or to the front, and to
    # the front or up
    return values[::-1, ::-1].T, (float(sizes[rest[1]]), float(sizes[rest[0]]))


def _axis_through(affine: np.ndarray, plane: Plane) -> int:
    """Return the stored axis along which the slices of a plane follow."""
    return [int(axis) for axis in io_orientation(affine)[:, 0]].index(AXES[plane])


def _slice_index(choice: SliceChoice, count: int) -> int:
    """Return the slice's index in canonical orientation."""
    if choice.index is None:
        return round(choice.fraction * (count - 1))
    if not 0 <= choice.index < count:
        raise BadImageError(f"it has no {choice.plane} slice {choice.index}: give one from 0 to {count - 1}")
    return choice.index
