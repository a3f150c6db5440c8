"""Read the header of a compressed frame, to detect a contradicting file header before decoding."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Literal

_NO_LENGTH = {0x01, *range(0xD0, 0xD9)}
"""JPEG markers that stand alone (ITU-T T.81, B.1.1.3)."""
_FRAME_HEADERS = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}
"""JPEG markers that begin a frame header (T.81, table B.1), and JPEG-LS's (ITU-T T.87, C.1.1)."""
_LOSSLESS = {0xC3, 0xC7, 0xCB, 0xCF}
_J2K_START = b"\xff\x4f\xff\x51"
"""Start of a JPEG 2000 codestream and of its size segment (ITU-T T.800, A.4.1 and A.5.1)."""
_CODING_STYLE = b"\xff\x52"
"""Marker of T.800, A.6.1."""

Kind = Literal["JPEG", "lossless JPEG", "JPEG-LS", "JPEG 2000"]


@dataclass(frozen=True, slots=True)
class FrameSize:
    """Rows, columns and samples per pixel.

    Example:
        FrameSize(rows=512, columns=640, samples=1)
    """

    rows: int
    columns: int
    samples: int


@dataclass(frozen=True, slots=True)
class Codestream:
    """The head of a compressed frame.

    Example:
        Codestream(kind="JPEG", size=FrameSize(512, 640, 3), precision=8, colours="YCbCr")
    """

    kind: Kind
    size: FrameSize
    precision: int
    """Bits per sample."""
    signed: bool | None = None
    """None if the kind does not state it."""
    colours: Literal["RGB", "YCbCr", ""] = ""
    """Meaning of three samples; "" if the stream does not say."""
    transformed: bool = False
    """True if decoding ends with JPEG 2000's multi-component transform, which yields RGB."""


def read_codestream(frame: bytes) -> Codestream | None:
    """Read the head of a compressed frame; None for an unknown kind."""
    return read_jpeg(frame) if frame.startswith(b"\xff\xd8") else read_jpeg2000(frame)


def read_jpeg(frame: bytes) -> Codestream | None:
    """Read the head of a JPEG or JPEG-LS stream; None without a frame header before the first scan.

    Determines colours as libjpeg does: by JFIF or Adobe markers, or by components named R, G and B.

    Example:
        >>> read_jpeg(bytes.fromhex("ffd8 ffc0000b 08 0200 0280 01 011100")).size
        FrameSize(rows=512, columns=640, samples=1)
    """
    offset, jfif, adobe = 0, False, -1
    while offset + 4 <= len(frame):
        if frame[offset] != 0xFF:
            return None
        marker = frame[offset + 1]
        if marker == 0xFF:  # a fill byte
            offset += 1
            continue
        if marker in _NO_LENGTH:
            offset += 2
            continue
        if marker in _FRAME_HEADERS:
            return _frame_header(frame, offset, jfif, adobe)
        if marker in (0xD9, 0xDA):  # the end, or a scan
            return None
        jfif = jfif or (marker == 0xE0 and frame[offset + 4 : offset + 9] == b"JFIF\0")
        if marker == 0xEE and frame[offset + 4 : offset + 9] == b"Adobe" and offset + 15 < len(frame):
            adobe = frame[offset + 15]
        offset += 2 + struct.unpack_from(">H", frame, offset + 2)[0]
    return None


def _frame_header(frame: bytes, offset: int, jfif: bool, adobe: int) -> Codestream | None:
    if offset + 10 > len(frame):
        return None
    marker, precision = frame[offset + 1], frame[offset + 4]
    size = FrameSize(*struct.unpack_from(">HHB", frame, offset + 5))
    kind: Kind = "JPEG-LS" if marker == 0xF7 else "lossless JPEG" if marker in _LOSSLESS else "JPEG"
    named = frame[offset + 10 : offset + 10 + 3 * size.samples : 3]
    colours: Literal["RGB", "YCbCr", ""] = ""
    if size.samples == 3 and kind == "JPEG":
        colours = "YCbCr" if jfif or adobe == 1 else "RGB" if adobe == 0 or named == b"RGB" else ""
    return Codestream(kind, size, precision, colours=colours)


def read_jpeg2000(frame: bytes) -> Codestream | None:
    """Read the head of a JPEG 2000 codestream, bare or in JP2.

    Return None unless there is one, with equal components.
    """
    offset = frame.find(_J2K_START)
    if offset < 0 or frame.count(_J2K_START) > 1 or offset + 42 > len(frame):
        return None
    right, bottom, left, top = struct.unpack_from(">IIII", frame, offset + 8)
    (samples,) = struct.unpack_from(">H", frame, offset + 40)
    depths = set(frame[offset + 42 : offset + 42 + 3 * samples : 3])
    if len(depths) != 1:
        return None
    (depth,) = depths
    return Codestream(
        "JPEG 2000",
        FrameSize(bottom - top, right - left, samples),
        precision=(depth & 0x7F) + 1,
        signed=bool(depth & 0x80),
        transformed=_transformed(frame, offset + 2),
    )


def _transformed(frame: bytes, offset: int) -> bool:
    """Return whether the main header requests the multi-component transform.

    `offset` is its first segment's offset.
    """
    while (
        offset + 9 <= len(frame) and frame[offset] == 0xFF and frame[offset + 1] not in (0x90, 0x93)
    ):  # a tile, its data
        if frame[offset : offset + 2] == _CODING_STYLE:
            return frame[offset + 8] == 1
        offset += 2 + struct.unpack_from(">H", frame, offset + 2)[0]
    return False
