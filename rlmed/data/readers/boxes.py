"""Boxes as data sets publish them, [x, y, width, height], as rows for grounding have them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rlmed.data.examples import BadRowError, shorten

ROUNDING = 1.0
"""Pixels by which a box may leave its image, as rounded edges do; it is cut off there."""


def corners(box: Any, size: tuple[int, int] | None = None) -> list[float]:
    """Return [x0, y0, x1, y1] in pixels of a box [x, y, width, height].

    Args:
        box: from the source.
        size: width and height of the image, at which the box is cut if it leaves it by at most
            `ROUNDING`; None if unknown.

    Raises:
        BadRowError: for anything else than four finite numbers, an empty box, or one that leaves
            the image.

    Example:
        >>> corners([10, 20, 30.5, 4])
        [10, 20, 40.5, 24]
    """
    if not isinstance(box, Sequence) or len(box) != 4 or not all(_is_number(value) for value in box):
        raise BadRowError(f"its box {shorten(box)} is not four numbers: x, y, width and height")
    x, y, width, height = box
    if width <= 0 or height <= 0:
        raise BadRowError(f"its box {shorten(box)} has no area: it is x, y, width and height")
    edges = [x, y, x + width, y + height]
    limits = (math.inf, math.inf) if size is None else size
    cut = [min(max(edge, 0), limits[axis % 2]) for axis, edge in enumerate(edges)]
    if max(abs(edge - inside) for edge, inside in zip(edges, cut, strict=True)) > ROUNDING:
        shown = "" if size is None else f" of {size[0]}x{size[1]} pixels"
        raise BadRowError(f"its box {shorten(box)} leaves its image{shown}: it is x, y, width and height")
    if cut[0] >= cut[2] or cut[1] >= cut[3]:
        raise BadRowError(f"its box {shorten(box)} lies outside of its image")
    return cut


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
