"""Map measured values to what a viewer shows: windows, percentiles, square pixels.

Shared by DICOM and NIfTI.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from rlmed.data.images import MAX_ASPECT, MAX_SIDE, MIN_CONTRAST, MIN_SIDE, BadImageError

PERCENTILES = (0.5, 99.5)
"""Default window: values up to the first percentile are black, from the second one white."""
MAX_SPACING_RATIO = 20.0
"""Pixels more elongated than this count as a defect of the header."""
_ROWS = 256
"""Rows of a picture computed at a time."""
SQUARE = 0.01
"""Pixels whose sides differ by less than this fraction count as square."""


@dataclass(frozen=True, slots=True)
class Window:
    """The values shown from black to white, in their own unit (Hounsfield units for CT).

    Example:
        >>> Window(center=40.0, width=400.0) == parse_window("40 400")  # soft tissue in CT: -160 is black, 240 is white
        True
    """

    center: float
    width: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.center) and math.isfinite(self.width) and self.width > 0):
            raise ValueError(
                f"invalid window, center {self.center} and width {self.width}: give two numbers, the width positive"
            )


def parse_window(text: str) -> Window | None:
    """Parse "CENTER WIDTH", separated by a blank, comma, semicolon or slash; None for blank text.

    Raises:
        ValueError: for anything else.
    """
    parts = text.replace(",", " ").replace(";", " ").replace("/", " ").split()
    if not parts:
        return None
    try:
        center, width = (float(part) for part in parts)
    except ValueError:
        raise ValueError(f"window {text!r} must be two numbers, center and width, like '40 400'") from None
    return Window(center, width)


def stretch(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Map values to 8-bit grey: 0 up to `low`, 255 from `high`, linear between.

    If `high` is not above `low`, everything above `low` is white.

    Args:
        values: [height, width], any number; NaN is shown black.
    """
    shown = np.empty(values.shape, dtype=np.uint8)
    for start in range(0, len(values), _ROWS):
        # in double: a range may be narrow relative to its offset, or wider than float32's largest
        rows = values[start : start + _ROWS].astype(np.float64)
        shares = (rows - low) / (high - low) if high > low else (rows > low).astype(np.float64)
        shown[start : start + _ROWS] = np.rint(
            np.nan_to_num(shares, nan=0.0, posinf=1.0, neginf=0.0).clip(0.0, 1.0) * 255.0
        )
    return shown


def check_shown(values: np.ndarray, pixels: np.ndarray, shown: str, empty: str = "") -> None:
    """Check that a picture of measured values shows them.

    A picture shows nothing if all but one pixel in 10,000 (or all but one) are alike because the
    others lie outside the window. If the values themselves are so, as in a mask, it is a valid
    picture.

    Args:
        values: any shape; without padding.
        pixels: uint8, the rendered values.
        shown: the range shown, for the message: "the window … shows … to …".
        empty: why all values may be alike; "" if unknown.

    Raises:
        BadImageError: with the cause.
    """
    finite = np.isfinite(values)
    if not finite.any():
        raise BadImageError("it shows nothing: none of its values is a finite number (all are NaN or infinite)")
    if not finite.all():
        values, pixels = values[finite], pixels[finite]
    low, high = values.min(), values.max()
    if low == high:
        raise BadImageError(f"it shows nothing: all its values are {low:g}{empty}")
    beside = max(1, values.size // 10_000)
    if int(np.ptp(pixels)) < MIN_CONTRAST or (_contrast(pixels, beside) < MIN_CONTRAST and _varies(values, beside)):
        raise BadImageError(
            f"it shows nothing: its values go from {low:g} to {high:g}, and {shown}. Give a window that they lie in "
            "(rlmed.prepare: the window column or --window)"
        )


def _contrast(pixels: np.ndarray, beside: int) -> int:
    """Return brightest minus darkest, ignoring so many pixels at either end."""
    totals = np.bincount(pixels.ravel(), minlength=256).cumsum()
    darkest, brightest = np.searchsorted(totals, (beside + 1, pixels.size - beside))
    return int(brightest) - int(darkest)


def _varies(values: np.ndarray, beside: int) -> bool:
    """Return whether more than so many values at either end differ from the others."""
    if values.size <= 2 * beside:
        return False
    ranks = (beside, values.size - 1 - beside)
    ordered = np.partition(values.ravel(), ranks)
    return bool(ordered[ranks[0]] < ordered[ranks[1]])


def percentile_range(values: np.ndarray) -> tuple[float, float]:
    """Return the range shown without a window, between the `PERCENTILES` of the finite values.

    For a picture of nearly one value (a mask), the range is its minimum to its maximum.
    """
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 0.0, 0.0
    low, high = (float(edge) for edge in np.percentile(finite, PERCENTILES))
    return (low, high) if high > low else (float(finite.min()), float(finite.max()))


def to_picture(pixels: np.ndarray, row_spacing: float = 1.0, column_spacing: float = 1.0) -> Image.Image:
    """Return an 8-bit picture with square pixels, scaled down to at most `MAX_SIDE`.

    Args:
        pixels: uint8, [height, width] or [height, width, 3].
        row_spacing: distance between the centres of neighbouring rows, in any unit.
        column_spacing: the same for columns, in the same unit. Stretches the coarser direction, so
            that no detail is lost.

    Raises:
        BadImageError: for a picture that is too small or too elongated, or for impossible spacings.
    """
    height, width = pixels.shape[:2]
    if not (math.isfinite(row_spacing) and math.isfinite(column_spacing) and row_spacing > 0 and column_spacing > 0):
        raise BadImageError(f"its pixels are {row_spacing} by {column_spacing}: both spacings must be positive")
    ratio = row_spacing / column_spacing
    if not 1 / MAX_SPACING_RATIO <= ratio <= MAX_SPACING_RATIO:
        raise BadImageError(
            f"its pixels are {row_spacing} by {column_spacing}, one side more than {MAX_SPACING_RATIO:.0f} times the other: "
            "correct the spacing in the file's header"
        )
    if min(height, width) < MIN_SIDE:
        raise BadImageError(f"it has {width}x{height} pixels, fewer than {MIN_SIDE} a side: export it again, larger")
    square = abs(ratio - 1) < SQUARE
    tall, wide = (height, width) if square else (height * max(ratio, 1.0), width * max(1 / ratio, 1.0))
    if max(tall, wide) > MAX_ASPECT * min(tall, wide):
        raise BadImageError(f"it has {width}x{height} pixels, one side more than {MAX_ASPECT} times the other: crop it")
    scale = min(1.0, MAX_SIDE / max(tall, wide))
    size = (max(MIN_SIDE, round(wide * scale)), max(MIN_SIDE, round(tall * scale)))
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    # reducing_gap lets Pillow average whole blocks first, which is faster
    return picture if size == picture.size else picture.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)
