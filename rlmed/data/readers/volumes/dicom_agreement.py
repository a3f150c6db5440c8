"""Check that a DICOM file agrees with itself: redundant elements mutually, header with pixel data.

A reason names both values. It quotes only texts of the standard; others could be a patient's name.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from pydicom.dataset import Dataset
from pydicom.uid import UID, JPEG2000TransferSyntaxes, JPEGLSTransferSyntaxes, JPEGTransferSyntaxes, RLELossless

from rlmed.data.images import BadImageError
from rlmed.data.readers.volumes.codestream import Codestream, FrameSize, Kind

GREYS = ("MONOCHROME1", "MONOCHROME2")
COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
MACROS = ("PixelMeasuresSequence", "PixelValueTransformationSequence", "FrameVOILUTSequence")
"""Functional groups of an enhanced object that affect how a frame is shown (PS3.3, C.7.6.16)."""
MAX_SAMPLES = 50_000_000
"""Limit of a frame's rows x columns x samples; the largest radiographs have about 30 million."""
MAX_FRAGMENTS = 1_000_000
_AGAIN = "export it again"
_LOSSLESS_JPEG = ("1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70")
_UNDEFINED = 0xFFFFFFFF
_STARTS = (b"\xff\xd8\xff", b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  ")
"""First bytes of a compressed frame: JPEG and JPEG-LS, JPEG 2000, and that in a JP2 file."""


@dataclass(frozen=True, slots=True)
class PixelFormat:
    """How pixels are stored, according to the header.

    Example:
        PixelFormat(size=FrameSize(512, 512, 1), photometric="MONOCHROME2", bits_allocated=16,
                    bits_stored=12, high_bit=11, signed=False, frames=1)
    """

    size: FrameSize
    photometric: str
    bits_allocated: int
    bits_stored: int
    high_bit: int
    signed: bool
    frames: int

    @property
    def frame_bits(self) -> int:
        """Return a raw frame's bits; YBR_FULL_422 has two samples a pixel (PS3.3, C.7.6.3.1.2)."""
        bits = self.size.rows * self.size.columns * self.size.samples * self.bits_allocated
        return bits * 2 // 3 if self.photometric == "YBR_FULL_422" else bits

    def __str__(self) -> str:
        samples = f" of {self.size.samples} samples" if self.size.samples > 1 else ""
        return f"{self.frames} frame{'s' * (self.frames != 1)} of {self.size.columns}x{self.size.rows} pixels{samples}"


def checked_format(dataset: Dataset) -> PixelFormat:
    """Return the elements of a header that describe its pixels, after checking that they agree.

    Args:
        dataset: with Rows, Columns, BitsAllocated and PhotometricInterpretation.

    Raises:
        BadImageError: names both elements.
    """
    size = FrameSize(int(dataset.Rows), int(dataset.Columns), int(dataset.get("SamplesPerPixel", 1)))
    photometric = str(dataset.PhotometricInterpretation).strip()
    _check_colours(dataset, size, photometric)
    if size.rows * size.columns * size.samples > MAX_SAMPLES:
        raise BadImageError(
            f"its header says {size.columns}x{size.rows} pixels of {size.samples} samples, more than {MAX_SAMPLES} values: "
            "scale it down"
        )
    allocated = int(dataset.BitsAllocated)
    stored = int(dataset.get("BitsStored") or allocated)  # floats have none
    if not 1 <= stored <= allocated:
        raise BadImageError(f"its header says BitsStored {stored} and BitsAllocated {allocated}: {_AGAIN}")
    signed = int(dataset.get("PixelRepresentation") or 0)
    if signed not in (0, 1) or (signed and size.samples > 1):
        raise BadImageError(
            f"its header says PixelRepresentation {signed} and {size.samples} samples a pixel: {_AGAIN}"
        )
    frames = max(1, int(dataset.get("NumberOfFrames") or 1))
    groups = dataset.get("PerFrameFunctionalGroupsSequence") or []
    if len(groups) not in (0, frames) and any(group.get(macro) for group in groups for macro in MACROS):
        raise BadImageError(
            f"its header says NumberOfFrames {frames}, and how {len(groups)} are shown (PerFrameFunctionalGroupsSequence): "
            f"{_AGAIN}"
        )
    high = dataset.get("HighBit")
    return PixelFormat(
        size, photometric, allocated, stored, stored - 1 if high is None else int(high), bool(signed), frames
    )


def _check_colours(dataset: Dataset, size: FrameSize, photometric: str) -> None:
    samples = {**dict.fromkeys((*GREYS, "PALETTE COLOR"), 1), **dict.fromkeys(COLOURS, 3)}.get(photometric)
    if samples is None:
        known = ", ".join((*GREYS, "PALETTE COLOR", *COLOURS))
        raise BadImageError(f"its photometric interpretation is none of {known}: save it as RGB or MONOCHROME2")
    if size.samples != samples:
        raise BadImageError(
            f"its header says {size.samples} samples a pixel, but its colours need {samples} ({photometric}): {_AGAIN}"
        )
    planar = dataset.get("PlanarConfiguration")
    if samples > 1 and planar not in (0, 1):
        said = "no" if planar is None else f"{int(planar)} as"
        raise BadImageError(
            f"its header says {samples} samples a pixel and {said} PlanarConfiguration, which must be 0 or 1: {_AGAIN}"
        )
    # stated for radiographs (PS3.3, C.8.11.3.1.2); viewers differ in which of the two they trust
    shape = str(dataset.get("PresentationLUTShape") or "").strip()
    if (shape == "INVERSE" and photometric == "MONOCHROME2") or (shape == "IDENTITY" and photometric == "MONOCHROME1"):
        raise BadImageError(
            f"its header says {photometric} and PresentationLUTShape {shape}, so it may be the negative: "
            "correct one of them"
        )


def overlay_above(positions: Sequence[int], form: PixelFormat) -> bool:
    """Return whether pixel bits hold an overlay; position 0: stored separately (PS3.3, C.9.2).

    Raises:
        BadImageError: for an overlay in bits that hold values.
    """
    for position in positions:
        if form.high_bit - form.bits_stored < position <= form.high_bit and position > 0:
            raise BadImageError(
                f"its header says BitsStored {form.bits_stored} and HighBit {form.high_bit}, and an overlay in bit {position} "
                f"(OverlayBitPosition): {_AGAIN}"
            )
    return any(position > 0 for position in positions)


def check_pixel_data(
    stream: BinaryIO, dataset: Dataset, form: PixelFormat, syntax: UID, implicit: bool, little: bool
) -> None:
    """Compare the header with length and fragments of the pixel data at the position of `stream`.

    Raises:
        BadImageError: names what each says.
    """
    order = "<" if little else ">"
    head = stream.read(8)
    if len(head) < 8 or struct.unpack(f"{order}HH", head[:4]) not in ((0x7FE0, 8), (0x7FE0, 9), (0x7FE0, 0x10)):
        raise BadImageError("it has no pixels: give the file of an image")
    # an explicit element of this kind: two letters, two empty bytes, a length of four
    (length,) = struct.unpack(f"{order}I", head[4:] if implicit else stream.read(4))
    start = stream.tell()
    if syntax.is_encapsulated != (length == _UNDEFINED):
        said = ("compressed", "not") if syntax.is_encapsulated else ("uncompressed", "compressed")
        raise BadImageError(f"its transfer syntax says that its pixels are {said[0]}, but they are {said[1]}: {_AGAIN}")
    if syntax.is_encapsulated:
        _check_fragments(stream, dataset, form, syntax)
        return
    if form.photometric in ("YBR_ICT", "YBR_RCT"):
        raise BadImageError(
            f"its header says {form.photometric}, which only JPEG 2000 has, but its transfer syntax says that it is "
            f"uncompressed: {_AGAIN}"
        )
    wanted = -(-form.frame_bits * form.frames // 8)
    if length < wanted or (length > wanted + wanted % 2 and not _zeros(stream, wanted, length)):
        raise BadImageError(
            f"its header says {form} of {form.bits_allocated} bits, that is {wanted} bytes; its pixel data has {length}: "
            f"{_AGAIN}"
        )
    stream.seek(start + length)
    if stream.read(2) == struct.pack(f"{order}H", 0x7FE0):
        raise BadImageError(
            f"it holds pixels twice, as PixelData and as floats, and they need not be the same: {_AGAIN}"
        )


def _zeros(stream: BinaryIO, start: int, end: int) -> bool:
    """Return whether this part of the pixel data is all zeros: some writers pad with them."""
    stream.seek(start, 1)
    left = end - start
    while left > 0:
        piece = stream.read(min(left, 1 << 16))
        if not piece or any(piece):
            return False
        left -= len(piece)
    return True


def _check_fragments(stream: BinaryIO, dataset: Dataset, form: PixelFormat, syntax: UID) -> None:
    table, fragments, starts = b"", 0, 0
    while fragments <= MAX_FRAGMENTS:
        head = stream.read(8)
        # the end, or damage that decoding will find
        if len(head) < 8 or head[:4] != b"\xfe\xff\x00\xe0":
            break
        (length,) = struct.unpack("<I", head[4:])
        first = stream.read(min(length, 8))
        if fragments == 0:
            table = first[: min(length, 4)]
            offsets = length // 4
        else:
            starts += syntax == RLELossless or first.startswith(_STARTS)
        fragments += 1
        stream.seek(length - len(first), 1)
    extended = dataset.get("ExtendedOffsetTable")
    said = len(extended) // 8 if extended else offsets if table else starts
    if said and said != form.frames:
        raise BadImageError(
            f"its header says NumberOfFrames {form.frames}, its compressed pixels are {said} frames: {_AGAIN}"
        )


def check_codestream(stream: Codestream | None, form: PixelFormat, syntax: UID) -> None:
    """Compare a compressed frame's own header with the file's.

    Fewer bits than the header's give the same numbers; more are masked as in uncompressed pixels.
    JPEG 2000's own colour transform overrides a header that says RGB: the decoded pixels are RGB
    either way.

    Raises:
        BadImageError: names what each says.
    """
    size = form.size
    if stream is None or stream.size != size:
        shown = "no size" if stream is None else _sized(stream.size)
        raise BadImageError(
            f"its compressed pixels say {shown}, but its header says {size.columns}x{size.rows} of {size.samples}: {_AGAIN}"
        )
    kind = _kind(syntax)
    if kind is not None and stream.kind != kind:
        raise BadImageError(f"its transfer syntax says {kind}, its compressed pixels are {stream.kind}: {_AGAIN}")
    least = form.bits_stored if stream.kind == "JPEG" or size.samples > 1 else 1
    if not least <= stream.precision <= form.bits_allocated:
        raise BadImageError(
            f"its compressed pixels say {stream.precision} bits, but its header says BitsStored {form.bits_stored} and "
            f"BitsAllocated {form.bits_allocated}: {_AGAIN}"
        )
    if stream.signed is not None and stream.signed != form.signed:
        raise BadImageError(
            f"its compressed pixels say that values {_signed(stream.signed)}, but its header (PixelRepresentation "
            f"{int(form.signed)}) says that they {_signed(form.signed)}: {_AGAIN}"
        )
    if size.samples == 3:
        _check_stream_colours(stream, form.photometric)


def _check_stream_colours(stream: Codestream, photometric: str) -> None:
    said = ""
    if stream.kind == "JPEG 2000":
        if stream.transformed and photometric in ("YBR_FULL", "YBR_FULL_422"):
            said = "RGB after their own transform"
        # with YBR_RCT it is RGB: the differences of that transform would need one more bit
        elif not stream.transformed and photometric == "YBR_ICT":
            said = "three components without a transform"
    elif photometric in ("YBR_ICT", "YBR_RCT"):
        said = stream.kind
    elif stream.colours and stream.colours != ("RGB" if photometric == "RGB" else "YCbCr"):
        said = stream.colours
    if said:
        raise BadImageError(f"its compressed pixels say {said}, but its header says {photometric}: {_AGAIN}")


def unused_bits_checked(values: np.ndarray, form: PixelFormat, overlay: bool, padding: int | None) -> np.ndarray:
    """Check the bits above the stored ones, and return the values with an overlay in those masked.

    Args:
        values: as in the file.
        form: the header's description of them.
        overlay: True if the header says that bits above hold an overlay; these are masked.
        padding: a value that may need all bits.

    Raises:
        BadImageError: for values that need more bits than are stored, or bits other than the low
            ones.
    """
    bits = min(form.bits_stored, form.high_bit + 1)
    if bits == form.bits_allocated or values.dtype.kind not in "iu":
        return values
    least, most = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if form.signed else (0, (1 << bits) - 1)
    beyond = (values < least) | (values > most)
    if padding is not None:
        beyond &= values != np.array(padding).astype(values.dtype)
    if not beyond.any():
        return values
    if not overlay or form.high_bit != form.bits_stored - 1:
        raise BadImageError(
            f"its header says BitsStored {form.bits_stored} and HighBit {form.high_bit}, its values reach "
            f"{int(values[beyond].max())}: {_AGAIN}"
        )
    shift = form.bits_allocated - bits
    return np.where(beyond, (values << shift) >> shift, values)


def check_rle(frame: bytes, form: PixelFormat) -> None:
    """Compare the segments of an RLE frame with the header: one per byte of a pixel (PS3.5, G.2).

    Raises:
        BadImageError: names what each says.
    """
    segments = int.from_bytes(frame[:4], "little")
    wanted = form.size.samples * form.bits_allocated // 8
    if segments != wanted:
        raise BadImageError(
            f"its compressed pixels have {segments} bytes a pixel, but its header says {wanted} ({form.size.samples} samples "
            f"of {form.bits_allocated} bits): {_AGAIN}"
        )


def _kind(syntax: UID) -> Kind | None:
    if syntax in JPEG2000TransferSyntaxes:
        return "JPEG 2000"
    if syntax in JPEGLSTransferSyntaxes:
        return "JPEG-LS"
    if syntax in _LOSSLESS_JPEG:
        return "lossless JPEG"
    return "JPEG" if syntax in JPEGTransferSyntaxes else None


def _sized(size: FrameSize) -> str:
    return f"{size.columns}x{size.rows} pixels of {size.samples} samples"


def _signed(signed: bool) -> str:
    return "have a sign" if signed else "have none"
