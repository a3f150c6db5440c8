"""Check once that a NIfTI file agrees with itself: redundant header fields, and header with data.

A reason names both values. Silently accepted: a slope of 0 or NaN, which means no scaling
(nifti1.h); a compressed file named .nii, or an uncompressed one named .nii.gz; a bitpix of 0; zero
bytes after the last voxel.
"""

from __future__ import annotations

import gzip
import math
import os
import struct
from typing import BinaryIO

import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.nifti1 import Nifti1Header
from nibabel.orientations import aff2axcodes
from nibabel.spatialimages import HeaderDataError

from rlmed.data.images import BadImageError

SAME_SIZE = 1.25
"""Largest ratio of voxel sizes between qform and sform, which may come from a registration."""
_PIECE = 1 << 16
_AGAIN = "export it again"


def check_header(header: Nifti1Header) -> None:
    """Compare the fields of a header with one another.

    Raises:
        BadImageError: names both.
    """
    length = int(header["sizeof_hdr"])
    if length != header.template_dtype.itemsize:
        raise BadImageError(
            f"its header says sizeof_hdr {length}, its magic stands for {header.template_dtype.itemsize}: {_AGAIN}"
        )
    try:
        dtype = header.get_data_dtype()
    except HeaderDataError:
        raise BadImageError(
            f"its header says datatype {int(header['datatype'])}, which is not read: save it as int16 or float32"
        ) from None
    if dtype.kind not in "iuf":
        code = int(header["datatype"])
        label = header.get_value_label("datatype")  # nibabel's name for the code
        raise BadImageError(f"its voxels are of datatype {code} ({label}), not single real numbers: convert it")
    bits = int(header["bitpix"])
    if bits not in (0, 8 * dtype.itemsize):
        raise BadImageError(
            f"its header says bitpix {bits} and datatype {dtype} of {8 * dtype.itemsize} bits: {_AGAIN}"
        )
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if math.isinf(slope) or (slope != 0 and not math.isnan(slope) and not math.isfinite(intercept)):
        raise BadImageError(f"its header says scl_slope {slope:g} and scl_inter {intercept:g}: correct them")


def check_orientation(header: Nifti1Header) -> None:
    """Compare qform and sform, if a file has both.

    Raises:
        BadImageError: names the directions or sizes of both.
    """
    if header["qform_code"] <= 0 or header["sform_code"] <= 0:
        return
    try:
        forms = (header.get_qform(), header.get_sform())
    except (HeaderDataError, ValueError):  # an invalid quaternion
        raise BadImageError("its qform is not a rotation, though its qform_code says so: set qform_code to 0") from None
    if not all(np.isfinite(form).all() and abs(np.linalg.det(form[:3, :3])) > 1e-12 for form in forms):
        return  # the one in use is checked separately
    axes = ["".join(str(code) for code in aff2axcodes(form)) for form in forms]
    if axes[0] != axes[1]:
        raise BadImageError(
            f"its qform says that its axes go to {axes[0]}, its sform to {axes[1]}, so left cannot be told from right: "
            "set the code of the wrong one to 0"
        )
    sizes = [voxel_sizes(form) for form in forms]
    ratio = sizes[0] / sizes[1]
    if not ((ratio > 1 / SAME_SIZE) & (ratio < SAME_SIZE)).all():
        shown = [" x ".join(f"{size:.3g}" for size in each) for each in sizes]
        raise BadImageError(
            f"its qform (pixdim) says voxels of {shown[0]}, its sform of {shown[1]}: set the code of the wrong one to 0"
        )


def end_of_data(header: Nifti1Header) -> int:
    """Return the bytes of a file up to the end of its last voxel."""
    voxels = math.prod(int(length) for length in header.get_data_shape())
    return int(header["vox_offset"]) + voxels * int(header.get_data_dtype().itemsize)


def check_length(file: BinaryIO, header: Nifti1Header, zipped: bool, most: int) -> None:
    """Compare the length of the data with the header; keeps the position of `file`.

    A compressed file states its size in its last bytes. It is inflated, and the result discarded,
    only if that is too little, as in a file of several members, and should be at most `most` bytes.

    Raises:
        BadImageError: names both, in bytes.
    """
    shape = header.get_data_shape()
    wanted = end_of_data(header)
    offset = file.tell()
    size = file.seek(0, os.SEEK_END)
    if zipped:
        file.seek(max(0, size - 4))
        (size,) = struct.unpack("<I", file.read(4).rjust(4, b"\0"))
        size += (wanted - size) & ~0xFFFFFFFF if wanted > size else 0  # stated modulo 2**32
        if size < wanted <= most:
            file.seek(0)
            size = _inflated(file, wanted)
    more = size > wanted and (zipped or not _empty(file, wanted))
    file.seek(offset)
    if (size < wanted and not (zipped and wanted > most)) or more:
        raise BadImageError(
            f"its header says {'x'.join(str(int(length)) for length in shape)} voxels of "
            f"{header.get_data_dtype().itemsize} bytes, which end at byte {wanted}; it has {size} bytes: {_AGAIN}"
        )


def _inflated(file: BinaryIO, enough: int) -> int:
    stream, length = gzip.GzipFile(fileobj=file), 0
    while length < enough:
        piece = stream.read(min(_PIECE, enough - length))
        if not piece:
            break
        length += len(piece)
    return length


def _empty(file: BinaryIO, start: int) -> bool:
    """Return whether a file has only zeros from an offset on, and not many."""
    file.seek(start)
    rest = file.read(_PIECE + 1)
    return len(rest) <= _PIECE and not any(rest)
