"""Render one frame of a DICOM file as an 8-bit picture, as a viewer would show it.

The order of steps is the standard's (PS3.4, N.2.1): stored values, modality look-up table or
rescale, values-of-interest look-up table or window, inversion for MONOCHROME1. pydicom parses and
decodes; everything that determines memory is checked before it decodes. Messages say what is wrong
and never quote a header's text, which may be a patient's name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydicom.dataset import Dataset

from rlmed.data.images import BadImageError, check_contrast
from rlmed.data.readers.volumes.dicom_agreement import GREYS
from rlmed.data.readers.volumes.dicom_file import DicomHeader, decode_frame, dicom_damage_reported, frame_dataset
from rlmed.data.readers.volumes.display import SQUARE, Window, check_shown, percentile_range, stretch, to_picture

_SPACINGS = ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing", "PixelAspectRatio")
"""Elements with a pixel's shape, best first: row and column distance or ratio (PS3.3, 10.7.1.3)."""


def render_frame(path: Path, header: DicomHeader, frame: int, window: Window | None = None) -> Image.Image:
    """Return the picture of one frame: mode L, or RGB for colour; square pixels; no header data.

    Without `window`, grey values are mapped by the file's own look-up table, else its first window,
    else from the first to the second of `display.PERCENTILES`. Padding is black.

    Args:
        path: the file.
        header: from `read_header` for this file.
        frame: from 0.
        window: in values after rescale, such as Hounsfield units.

    Raises:
        BadImageError: for a file that is undecodable or too large; gives the reason but not the
            path.
    """
    with dicom_damage_reported(), np.errstate(all="ignore"):
        dataset = frame_dataset(header, frame)
        stored = decode_frame(path, header, frame)
        if header.pixels.photometric in GREYS:
            pixels = _grey(stored, dataset, header, window)
        elif header.pixels.photometric == "PALETTE COLOR":
            pixels = _palette(stored, dataset, header)
        else:
            pixels = _to_8_bits(stored, header.pixels.bits_stored)
        picture = to_picture(pixels, *_spacing(dataset))
        check_contrast("it", picture)
        return picture


def grey_values(path: Path, header: DicomHeader, frame: int) -> np.ndarray:
    """Return the finite values of a frame of grey, after rescale and without padding: float [N].

    Raises:
        BadImageError: as `render_frame`.
    """
    with dicom_damage_reported(), np.errstate(all="ignore"):
        dataset = frame_dataset(header, frame)
        stored = decode_frame(path, header, frame)
        padding, values = _padding(stored, dataset), _rescale(stored, dataset, header)
        inside = values.ravel() if padding is None else values[~padding]
        finite: np.ndarray = inside[np.isfinite(inside)]
        return finite


def own_windows(header: DicomHeader, frame: int) -> list[Window]:
    """Return the windows that a file states for a frame; empty without a usable one."""
    with dicom_damage_reported():
        dataset = frame_dataset(header, frame)
        stated = zip(*(_numbers(dataset.get(name)) for name in ("WindowCenter", "WindowWidth")), strict=False)
        return [Window(center, width) for center, width in stated if width > 0 and math.isfinite(center + width)]


def _grey(stored: np.ndarray, dataset: Dataset, header: DicomHeader, window: Window | None) -> np.ndarray:
    padding = _padding(stored, dataset)
    values = _rescale(stored, dataset, header)
    table = None if window is not None else _first(dataset, "VOILUTSequence")
    if table is not None:
        signed = header.pixels.signed or bool((values < 0).any())
        entries = _Table.of(table.LUTDescriptor, table.LUTData, little_endian=header.little_endian, signed=signed)
        if not 1 << (entries.bits - 1) <= entries.largest < 1 << entries.bits:
            # a table that says 16 bits and holds 12 would make the picture nearly black
            raise BadImageError(
                f"its VOI look-up table says {entries.bits} bits an entry, its largest entry is {entries.largest}: "
                "give a window instead (rlmed.prepare: the window column or --window)"
            )
        pixels = _to_8_bits(entries.look_up(np.rint(values)), entries.bits)
        shown = "its VOI look-up table makes all of them one grey value"
    else:
        pixels, shown = _windowed(values, dataset, window, padding)
    inside = np.s_[:] if padding is None else ~padding
    check_shown(values[inside], pixels[inside], shown, "" if padding is None else " (beside its padding)")
    if header.pixels.photometric == "MONOCHROME1":
        pixels = 255 - pixels
    if padding is not None:
        pixels[padding] = 0
    return pixels


def _padding(stored: np.ndarray, dataset: Dataset) -> np.ndarray | None:
    """Return the mask of padding (PS3.3, C.7.5.1.1.2); None without padding."""
    if stored.dtype.kind in "iu":
        kind = "PixelPadding"
    else:
        kind = "FloatPixelPadding" if stored.dtype.itemsize == 4 else "DoubleFloatPixelPadding"
    value = dataset.get(f"{kind}Value")
    if value is None:
        return None
    # cast like the pixels: some files state a negative value as a large one
    edges = np.array([value, dataset.get(f"{kind}RangeLimit", value)]).astype(stored.dtype)
    mask = (stored >= edges.min()) & (stored <= edges.max())
    return mask if mask.any() and not mask.all() else None


def _rescale(stored: np.ndarray, dataset: Dataset, header: DicomHeader) -> np.ndarray:
    """Return values in the modality's unit, as Hounsfield's; float32 or float64 (PS3.3, C.11.1)."""
    table = _first(dataset, "ModalityLUTSequence")
    if table is not None:
        slopes, intercepts = _numbers(dataset.get("RescaleSlope")), _numbers(dataset.get("RescaleIntercept"))
        if slopes[:1] not in ([], [1.0]) or intercepts[:1] not in ([], [0.0]):
            raise BadImageError(
                f"its header says both a modality look-up table and RescaleSlope {(slopes or [1.0])[0]:g}, RescaleIntercept "
                f"{(intercepts or [0.0])[0]:g}, of which a file has one: remove the other"
            )
        entries = _Table.of(
            table.LUTDescriptor, table.LUTData, little_endian=header.little_endian, signed=header.pixels.signed
        )
        return entries.look_up(stored).astype(np.float32)
    slope = (_numbers(dataset.get("RescaleSlope")) or [1.0])[0]
    intercept = (_numbers(dataset.get("RescaleIntercept")) or [0.0])[0]
    if slope == 0 or not math.isfinite(slope) or not math.isfinite(intercept):
        raise BadImageError(
            f"its header says RescaleSlope {slope:g} and RescaleIntercept {intercept:g}"
            f"{f', which make every value {intercept:g}' if slope == 0 else ''}: correct them"
        )
    # float32 distinguishes 16-bit values unless the intercept is far larger than they are; nor has
    # it such slopes
    beyond = not 1e-30 < abs(slope) < 1e30
    wide = stored.dtype.itemsize > 2 or beyond or abs(intercept) > abs(slope) * (1 << 22)
    kind = np.dtype(np.float64 if wide else np.float32)
    return stored.astype(kind) * kind.type(slope) + kind.type(intercept)


_FUNCTIONS = ("LINEAR", "LINEAR_EXACT", "SIGMOID")
"""Window functions (PS3.3, C.11.2.1.3); the first is the default."""


def _windowed(
    values: np.ndarray, dataset: Dataset, window: Window | None, padding: np.ndarray | None
) -> tuple[np.ndarray, str]:
    """Return (picture, what it shows) by PS3.3, C.11.2.1.2 and C.11.2.1.3; black 0, white 255."""
    function, whose = "LINEAR", "the given window"
    if window is None:
        window, whose = _own_window(dataset), "its own window (WindowCenter and WindowWidth)"
        function = str(dataset.get("VOILUTFunction") or _FUNCTIONS[0]).strip()
        if window is not None and function not in _FUNCTIONS:
            known = ", ".join(_FUNCTIONS)
            raise BadImageError(
                f"its VOILUTFunction {function!r} is none of {known}: give a window, or export it again"
            )
    if window is None:
        low, high = percentile_range(values if padding is None else values[~padding])
        return stretch(values, low, high), f"{low:g} to {high:g} is shown"
    center, width = window.center, window.width
    shown = f"{whose}, center {center:g} and width {width:g}, has none of them inside"
    if function == "SIGMOID":
        exponent = np.clip(-4.0 * (values - np.float32(center)) / np.float32(width), -80.0, 80.0)
        return np.rint(255.0 / (1.0 + np.exp(exponent))).astype(np.uint8), shown
    if function == "LINEAR_EXACT" or width < 1:
        return stretch(values, center - width / 2, center + width / 2), shown
    return stretch(values, center - 0.5 - (width - 1) / 2, center - 0.5 + (width - 1) / 2), shown


def _own_window(dataset: Dataset) -> Window | None:
    """Return the file's first window; None without a usable one."""
    try:
        return Window(*(_numbers(dataset.get(name))[0] for name in ("WindowCenter", "WindowWidth")))
    except (LookupError, ValueError):
        return None


def _palette(stored: np.ndarray, dataset: Dataset, header: DicomHeader) -> np.ndarray:
    """Apply the palette (PS3.3, C.7.6.3.1.5); uint8 [height, width, 3]."""
    if "RedPaletteColorLookupTableData" not in dataset:
        raise BadImageError("its palette is missing or stored in segments, which is not read: save it as RGB")
    names = [f"{colour}PaletteColorLookupTable" for colour in ("Red", "Green", "Blue")]
    descriptors = [[int(number) for number in dataset[f"{name}Descriptor"].value] for name in names]
    if any(descriptor != descriptors[0] for descriptor in descriptors):
        raise BadImageError(
            f"its palette's red, green and blue descriptors are {descriptors}, not alike: export it again"
        )
    tables = [
        _Table.of(
            descriptor, dataset[f"{name}Data"].value, little_endian=header.little_endian, signed=header.pixels.signed
        )
        for name, descriptor in zip(names, descriptors, strict=True)
    ]
    bits, largest = tables[0].bits, max(table.largest for table in tables)
    if largest >= 1 << bits or (bits > 8 and largest < 1 << 8):
        raise BadImageError(f"its palette says {bits} bits an entry, its largest entry is {largest}: save it as RGB")
    return np.stack([_to_8_bits(table.look_up(stored), bits) for table in tables], axis=-1)


@dataclass(frozen=True, slots=True)
class _Table:
    """A look-up table (PS3.3, C.11.1.1 and C.7.6.3.1.5).

    Example:
        _Table(entries=np.arange(4096), first=-1024, bits=12)  # -1024 and less become 0, 3071 and
        more 4095
    """

    entries: np.ndarray
    first: int
    """Value mapped to the first entry."""
    bits: int
    """Bits per entry, from 1 to 16."""

    @classmethod
    def of(cls, descriptor: Any, data: Any, *, little_endian: bool, signed: bool) -> _Table:
        """Parse a table from its two elements.

        Args:
            descriptor: number of entries, first value, bits per entry: 16 bits each, whose sign the
                reader must know.
            data: the entries, as bytes or as numbers.
            little_endian: byte order of the file.
            signed: True if values, and so the first one, may be negative.

        Raises:
            BadImageError: if the number of entries differs from the descriptor's.
        """
        count, first, bits = (int(number) for number in descriptor)
        count = count % (1 << 16) or 1 << 16
        first = first - (1 << 16) if signed and first >= 1 << 15 else first
        if isinstance(data, bytes):
            # 8-bit entries may be stored in 8 or 16 bits, and an odd number of bytes is padded
            width = 1 if len(data) < 2 * count else 2
            whole = count if len(data) == count + 1 else len(data) // width
            entries = np.frombuffer(data, np.dtype(f"{'<' if little_endian else '>'}u{width}"), whole)
        else:
            entries = np.asarray(_numbers(data), dtype=np.int64)
        if len(entries) != count or not 1 <= bits <= 16:
            raise BadImageError(
                f"one of its look-up tables says {count} entries of {bits} bits and holds {len(entries)}: export it again"
            )
        return cls(entries, first, bits)

    @property
    def largest(self) -> int:
        return int(self.entries.max())

    def look_up(self, values: np.ndarray) -> np.ndarray:
        """Look up integer values; those out of range take the first or the last entry."""
        # clip before the cast, since a float may exceed any integer
        indices = np.clip(values.astype(np.float64) - self.first, 0, len(self.entries) - 1).astype(np.int64)
        return self.entries[indices]


def _to_8_bits(values: np.ndarray, bits: int) -> np.ndarray:
    return values.astype(np.uint8) if bits == 8 else stretch(values, 0, (1 << bits) - 1)


def _spacing(dataset: Dataset) -> tuple[float, float]:
    """Return row and column distances in one unit; their elements must agree on a pixel's shape."""
    found: dict[str, list[float]] = {}
    for name in _SPACINGS:
        numbers = _numbers(dataset.get(name))
        if len(numbers) == 2 and min(numbers) > 0:
            found[name] = numbers
    if not found:
        return 1.0, 1.0
    first, *others = found.items()
    for other in others:
        if abs(first[1][0] * other[1][1] / (first[1][1] * other[1][0]) - 1) > SQUARE:
            said = " and ".join(f"{name} {row:g} by {column:g}" for name, (row, column) in (first, other))
            raise BadImageError(f"its header says {said}, pixels of another shape: correct one of them")
    row, column = first[1]
    return row, column


def _numbers(value: Any) -> list[float]:
    """Return the numbers of an element that holds none, one or several."""
    if value is None or value == "":
        return []
    return [float(number) for number in value] if hasattr(value, "__iter__") else [float(value)]


def _first(dataset: Dataset, sequence: str) -> Dataset | None:
    items = dataset.get(sequence)
    return items[0] if items else None
