"""Size that a compressed frame states itself, so that a header that says otherwise is found before anything is decoded."""

from __future__ import annotations

import struct
from dataclasses import dataclass

_NO_LENGTH = {0x01, *range(0xD0, 0xD9)}
"""JPEG markers that stand alone (ITU-T T.81, B.1.1.3)."""
_FRAME_HEADERS = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}
"""JPEG markers that begin a frame header (T.81, table B.1), and that of JPEG-LS (ITU-T T.87, C.1.1)."""
_J2K_START = b"\xff\x4f\xff\x51"
"""Start of a JPEG 2000 codestream and of its size segment (ITU-T T.800, A.4.1 and A.5.1)."""


@dataclass(frozen=True, slots=True)
class FrameSize:
    """Rows, columns and samples of each pixel.

    Example:
        FrameSize(rows=512, columns=640, samples=1)
    """

    rows: int
    columns: int
    samples: int


def jpeg_size(frame: bytes) -> FrameSize | None:
    """Size in the frame header of a JPEG or JPEG-LS stream; None where there is none before the first scan.

    Example:
        >>> jpeg_size(bytes.fromhex("ffd8 ffc0000b 08 0200 0280 01 011100"))
        FrameSize(rows=512, columns=640, samples=1)
    """
    place = 0
    while place + 4 <= len(frame):
        if frame[place] != 0xFF:
            return None
        marker = frame[place + 1]
        if marker == 0xFF:  # a fill byte
            place += 1
        elif marker in _NO_LENGTH:
            place += 2
        elif marker in _FRAME_HEADERS:
            if place + 10 > len(frame):
                return None
            return FrameSize(*struct.unpack_from(">HHB", frame, place + 5))
        elif marker in (0xD9, 0xDA):  # the end, or a scan
            return None
        else:
            place += 2 + struct.unpack_from(">H", frame, place + 2)[0]
    return None


def jpeg2000_size(frame: bytes) -> FrameSize | None:
    """Size in the size segment of a JPEG 2000 codestream, bare or in a JP2 file; None where there is none, or several."""
    place = frame.find(_J2K_START)
    if place < 0 or frame.count(_J2K_START) > 1 or place + 42 > len(frame):
        return None
    right, bottom, left, top = struct.unpack_from(">IIII", frame, place + 8)
    (samples,) = struct.unpack_from(">H", frame, place + 40)
    return FrameSize(bottom - top, right - left, samples)
