"""PNG and TIFF by byte, in kinds that Pillow reads but doesn't write, and the picture they show."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np


def known_grey() -> np.ndarray:
    """uint8, [48, 64]: brighter to the right, a white bar upper left, a black one lower right."""
    grey = np.tile(np.linspace(10, 245, 64).round().astype(np.uint8), (48, 1))
    grey[4:12, 6:26] = 255
    grey[36:44, 46:58] = 0
    return grey


def known_colour() -> np.ndarray:
    """uint8, [48, 64, 3]: the grey picture in red, mirrored in green, upside down in blue."""
    grey = known_grey()
    return np.stack([grey, grey[:, ::-1], grey[::-1]], axis=-1)


def in_bits(grey: np.ndarray, bits: int) -> np.ndarray:
    """Grey values of 8 bits in fewer or more: 0 stays 0, and 255 becomes the largest."""
    return np.round(grey / 255.0 * (2**bits - 1)).astype(np.uint64)


def packed(values: np.ndarray, bits: int) -> bytes:
    """Rows of values of 1, 2, 4, 12 or … bits, highest first; each row ends with a whole byte."""
    rows = values.reshape(len(values), -1).astype(np.uint64)
    each = (rows[..., None] >> np.arange(bits - 1, -1, -1, dtype=np.uint64)) & np.uint64(1)
    return np.packbits(each.reshape(len(rows), -1).astype(np.uint8), axis=1).tobytes()


def write_png(path: Path, values: np.ndarray, bits: int, colour_type: int, **chunks: bytes) -> Path:
    """Values [height, width] or [height, width, samples]; more chunks (PLTE, tRNS, …) before."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width = values.shape[:2]
    rows = packed(values, bits)
    stride = len(rows) // height
    lines = b"".join(b"\0" + rows[start : start + stride] for start in range(0, len(rows), stride))
    content = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0))
    content += b"".join(chunk(kind.encode(), data) for kind, data in chunks.items())
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b""))
    return path


def write_tiff(path: Path, pixels: bytes | list[bytes], size: tuple[int, int], order: str = "<", **tags: Any) -> Path:
    """An uncompressed TIFF file of one page.

    Args:
        path: where it goes.
        pixels: one strip, or several (planes).
        size: width and height.
        order: "<" or ">".
        tags: t258=16 and the like; integers, or tuples of them, all stored as SHORT.
    """
    strips = [pixels] if isinstance(pixels, bytes) else pixels
    entries: dict[int, tuple[str, tuple[int, ...]]] = {
        256: ("I", (size[0],)),
        257: ("I", (size[1],)),
        259: ("H", (1,)),
        273: ("I", tuple(0 for _ in strips)),
        278: ("I", (size[1],)),
        279: ("I", tuple(len(strip) for strip in strips)),
    }
    for name, value in tags.items():
        entries[int(name[1:])] = ("H", value if isinstance(value, tuple) else (value,))
    start = 8
    places = []
    for strip in strips:
        places.append(start)
        start += len(strip)
    entries[273] = ("I", tuple(places))
    table, more = b"", b""
    after = start + 2 + 12 * len(entries) + 4
    for tag, (kind, values) in sorted(entries.items()):
        data = struct.pack(f"{order}{len(values)}{kind}", *values)
        if len(data) > 4:
            field = struct.pack(f"{order}I", after + len(more))
            more += data
        else:
            field = data.ljust(4, b"\0")
        table += struct.pack(f"{order}HHI", tag, {"H": 3, "I": 4}[kind], len(values)) + field
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", start)
    path.write_bytes(head + b"".join(strips) + struct.pack(f"{order}H", len(entries)) + table + bytes(4) + more)
    return path
