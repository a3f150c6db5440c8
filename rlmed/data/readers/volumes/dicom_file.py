"""Read headers and stored pixel values of DICOM files, bounding everything a file could lie about.

Messages say what is wrong and never quote a header's text or the file's path: either may be a
patient's name.
"""

from __future__ import annotations

import io
import logging
import struct
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.encaps import get_frame
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.pixels import pixel_array
from pydicom.tag import Tag
from pydicom.uid import (
    UID,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)

from rlmed.data.images import BadImageError
from rlmed.data.readers.volumes.codestream import read_codestream
from rlmed.data.readers.volumes.damage import damage_reported
from rlmed.data.readers.volumes.decoder_process import DecoderProcess
from rlmed.data.readers.volumes.dicom_agreement import (
    MACROS,
    PixelFormat,
    check_codestream,
    check_pixel_data,
    check_rle,
    checked_format,
    overlay_above,
    unused_bits_checked,
)

MAX_READ = 1 << 29
"""Most bytes read of a file for its header, or for one frame."""
MODALITIES = {
    "MR": "MRI",
    "CT": "CT",
    **dict.fromkeys(("CR", "DX", "RG", "PX", "IO", "RF", "XA", "MG"), "X-ray"),
    "US": "Ultrasound",
    "PT": "PET",
    "NM": "Nuclear medicine",
}
"""rlmed's modality by the header's (PS3.3, C.7.3.1.1.1); empty for others."""

_LOOK_UPS = [
    f"{colour}PaletteColorLookupTable{part}" for colour in ("Red", "Green", "Blue") for part in ("Descriptor", "Data")
]
_OVERLAY_BITS = [Tag(group, 0x0102) for group in range(0x6000, 0x6020, 2)]
"""Overlay Bit Position, nonzero only for an overlay in the bits of pixels (PS3.3, C.9.2)."""
_WANTED = [
    *("Modality", "BurnedInAnnotation", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
    *(
        "SamplesPerPixel",
        "PhotometricInterpretation",
        "NumberOfFrames",
        "Rows",
        "Columns",
        "BitsAllocated",
        "BitsStored",
        "HighBit",
        "PresentationLUTShape",
    ),
    *("PixelRepresentation", "PlanarConfiguration"),
    *(f"{kind}PixelPadding{part}" for kind in ("", "Float", "DoubleFloat") for part in ("Value", "RangeLimit")),
    *("PixelAspectRatio", "PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing"),
    *("ModalityLUTSequence", "RescaleIntercept", "RescaleSlope"),
    *("VOILUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction"),
    *_LOOK_UPS,
    *("ExtendedOffsetTable", "ExtendedOffsetTableLengths"),
    *_OVERLAY_BITS,
]
"""All elements read from a header; others are skipped."""
_DAMAGE = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    RuntimeError,  # from decoders; includes RecursionError and NotImplementedError
    AssertionError,
    InvalidDicomError,
    BytesLengthException,
    struct.error,
)
"""What pydicom and its decoders raise for damaged files."""

_DECODER = DecoderProcess()

# Process-wide, since warnings.catch_warnings is not thread-safe. pydicom's warnings and log records
# quote the values they complain about.
warnings.filterwarnings("ignore", module=r"pydicom(\..*)?")
logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)


@dataclass(frozen=True, slots=True)
class DicomHeader:
    """What a file says about its pixels.

    Example:
        DicomHeader(dataset=…, transfer_syntax=ExplicitVRLittleEndian, modality="CT",
                    burned_in=False, overlay=False, pixels=PixelFormat(…), little_endian=True)
    """

    dataset: Dataset
    """Only elements needed to make a picture: no patient, no date, no identifier."""
    transfer_syntax: UID
    modality: str
    """rlmed's name, or empty."""
    overlay: bool
    """True if it says that bits of pixels hold an overlay."""
    burned_in: bool
    """True if the file states that text is burnt into its pixels."""
    pixels: PixelFormat
    little_endian: bool

    def frame_index(self, number: int | None) -> int:
        """Return the index (from 0) of a frame number (from 1); the middle frame's for None.

        Raises:
            BadImageError: for a number out of range.
        """
        if number is None:
            return self.pixels.frames // 2
        if not 1 <= number <= self.pixels.frames:
            raise BadImageError(f"it has no frame {number}: give one from 1 to {self.pixels.frames}")
        return number - 1


dicom_damage_reported = partial(
    damage_reported,
    _DAMAGE,
    message="it is damaged, truncated, or encoded in a way that is not supported: export it again",
    without_number="damaged pixels",
)
"""Context for calls of pydicom and its decoders."""


def _is_gzipped(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def read_header(path: Path) -> DicomHeader:
    """Read what a file says of its pixels, even without DICOM's preamble if it parses and has some.

    Raises:
        BadImageError: for a file that is missing, damaged, not DICOM, without pixels, larger than
            `dicom_agreement.MAX_SAMPLES`, or that contradicts itself.
    """
    with dicom_damage_reported(), BoundedStream(path) as stream:
        dataset = dcmread(stream, force=True, stop_before_pixels=True, specific_tags=_WANTED)
        if any(dataset.get(name) is None for name in ("Rows", "Columns", "BitsAllocated", "PhotometricInterpretation")):
            if _is_gzipped(path):
                raise BadImageError("it is compressed by gzip: unpack it")
            raise BadImageError("it is not a DICOM file, or has no pixels: give the file of an image")
        pixels = checked_format(dataset)
        implicit, little_endian = dataset.original_encoding
        guess = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian if little_endian else ExplicitVRBigEndian
        syntax = UID(dataset.file_meta.get("TransferSyntaxUID") or guess)
        check_pixel_data(stream, dataset, pixels, syntax, bool(implicit), bool(little_endian))
        return DicomHeader(
            dataset=dataset,
            transfer_syntax=syntax,
            modality=MODALITIES.get(str(dataset.get("Modality", "")).strip(), ""),
            overlay=overlay_above([dataset[tag].value for tag in _OVERLAY_BITS if tag in dataset], pixels),
            burned_in=str(dataset.get("BurnedInAnnotation", "")).strip().upper() == "YES",
            pixels=pixels,
            little_endian=bool(little_endian),
        )


def frame_dataset(header: DicomHeader, frame: int) -> Dataset:
    """Return one frame's header elements: an enhanced object states some of them per frame."""
    flat = Dataset()
    flat.update(header.dataset)
    shared = header.dataset.get("SharedFunctionalGroupsSequence") or []
    each = header.dataset.get("PerFrameFunctionalGroupsSequence") or []
    for groups in (*shared[:1], *each[frame : frame + 1]):
        for macro in MACROS:
            for item in (groups.get(macro) or [])[:1]:
                flat.update(item)
    return flat


def decode_frame(path: Path, header: DicomHeader, frame: int) -> np.ndarray:
    """Read the values of one frame only, [rows, columns] or [rows, columns, 3] (YBR made RGB).

    Args:
        frame: from 0.

    Raises:
        BadImageError: for pixels that are missing, truncated, not of the header's size, or in an
            encoding without an installed decoder.
    """
    with dicom_damage_reported(), BoundedStream(path) as stream:
        if header.transfer_syntax.is_encapsulated:
            _check_compressed(stream, header, frame)
            values = _DECODER.decode(path, header.transfer_syntax, frame)
        else:
            values = pixel_array(
                stream, index=frame, transfer_syntax_uid=header.transfer_syntax, correct_unused_bits=False
            )
    padding = header.dataset.get("PixelPaddingValue")
    values = unused_bits_checked(values, header.pixels, header.overlay, None if padding is None else int(padding))
    size = header.pixels.size
    wanted = (size.rows, size.columns, *((3,) if size.samples == 3 else ()))
    if values.shape != wanted:
        raise BadImageError(f"its pixels decode to {values.shape}, but its header says {wanted}: export it again")
    return values


class BoundedStream(io.BufferedReader):
    """A file that limits reading to `MAX_READ` bytes.

    pydicom requests all the rest of a file only to inflate a deflated data set, without a bound. It
    reads an element of undefined length to the end, even a skipped one.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))
        self._left = MAX_READ

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:
            raise BadImageError("its data set is deflated, which is unsupported: save it in Explicit VR Little Endian")
        self._left -= size
        if self._left < 0:
            raise BadImageError(f"its header or one of its frames has more than {MAX_READ} bytes: export it again")
        return super().read(size)


def _check_compressed(stream: BoundedStream, header: DicomHeader, frame: int) -> None:
    """Check a compressed frame's size against the header before a decoder allocates it."""
    dcmread(stream, force=True, stop_before_pixels=True, specific_tags=["Rows"])
    # tag, representation, two bytes, length: always explicit and little-endian (PS3.5, A.4)
    stream.read(12)
    tables = (header.dataset.get("ExtendedOffsetTable"), header.dataset.get("ExtendedOffsetTableLengths"))
    encoded = get_frame(
        stream, frame, number_of_frames=header.pixels.frames, extended_offsets=tables if all(tables) else None
    )
    if header.transfer_syntax == RLELossless:
        check_rle(encoded, header.pixels)
    else:
        check_codestream(read_codestream(encoded), header.pixels, header.transfer_syntax)
