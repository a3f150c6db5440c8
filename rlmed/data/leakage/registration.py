"""Locate one picture in another, in batches: refine a window of one until it agrees with the other.

Pictures are float32 [N, S, S]; a box [N, 4] holds the left, top, right and bottom edge of the
window, as shares of the sides. Edges below 0 or above 1 lie outside the picture; comparisons ignore
what is out there.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

TILES = 4
"""Tiles per side."""
FAINT = 0.25
"""Tiles below this share of the tiles' mean structure are ignored: background, plain tissue."""
_STEP = 0.03
"""Largest move of an edge in one step, as a share of the side."""
_REACH = 0.15
"""Largest final distance of an edge from the picture's own."""
_DAMPING = 1e-3


def pool(pictures: Floats) -> Floats:
    """Halve the side by means of 2x2 pixels."""
    rows = pictures[:, ::2] + pictures[:, 1::2]
    return (rows[:, :, ::2] + rows[:, :, 1::2]) * np.float32(0.25)


def highpass(pictures: Floats, radius: int) -> Floats:
    """Subtract each picture's means over squares of 2 · radius + 1 pixels; edge pixels repeat."""
    down = _running_means(pictures, radius)
    return pictures - _running_means(down.transpose(0, 2, 1), radius).transpose(0, 2, 1)


def _running_means(pictures: Floats, radius: int) -> Floats:
    """Return means over 2 · radius + 1 rows; no matrix products: they keep BLAS threads waiting."""
    first, last = pictures[:, :1], pictures[:, -1:]
    padded = np.concatenate([*[first] * radius, pictures, *[last] * radius], axis=1)
    side = pictures.shape[1]
    sums: Floats = padded[:, :side].copy()
    for shift in range(1, 2 * radius + 1):  # faster than differences of cumulative sums
        sums += padded[:, shift : shift + side]
    sums *= np.float32(1 / (2 * radius + 1))
    return sums


def warp(pictures: Floats, boxes: Floats) -> tuple[Floats, Floats]:
    """Stretch windows linearly to the pictures' size; also return a mask, 1 inside the picture."""
    down, seen_down = _resampled(pictures, boxes[:, 1], boxes[:, 3])
    across, seen_across = _resampled(down.transpose(0, 2, 1), boxes[:, 0], boxes[:, 2])
    mask = seen_down[:, :, None] & seen_across[:, None, :]
    return across.transpose(0, 2, 1), mask.astype(np.float32)


def _resampled(pictures: Floats, low: Floats, high: Floats) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Return the rows from `low` to `high` (shares of height), and [N, S] which lie inside."""
    count, side, _ = pictures.shape
    share = (np.arange(side, dtype=np.float32) + 0.5) / side
    positions = (low[:, None] + share * (high - low)[:, None]) * side - 0.5
    inside = (positions >= -0.5) & (positions <= side - 0.5)
    positions = np.clip(positions, 0, side - 1)
    below = np.minimum(positions.astype(np.int64), side - 2)
    weight = (positions - below).astype(np.float32)[:, :, None]
    each = np.arange(count)[:, None]
    return pictures[each, below] * (1 - weight) + pictures[each, below + 1] * weight, inside


def _unit(pictures: Floats, mask: Floats) -> Floats:
    """Normalize to mean 0, norm 1 in the mask, 0 outside; without structure, values stay near 0."""
    mean = _dot(pictures, mask) / np.maximum(mask.sum((1, 2)), 1)
    centred = (pictures - mean[:, None, None]) * mask
    length = np.sqrt(_dot(centred, centred))
    unit: Floats = centred / np.maximum(length, 1.0)[:, None, None]
    return unit


def _dot(left: Floats, right: Floats) -> Floats:
    """Return sums of products, [N]."""
    sums: Floats = np.einsum("nij,nij->n", left, right)
    return sums


def align(left: Floats, right: Floats, boxes: Floats, *, radius: int, steps: int) -> tuple[Floats, Floats]:
    """Refine the boxes so that the windows of `right` best match `left`.

    Gauss-Newton over the four edges on the squared difference of both, high-passed and scaled to
    norm 1 (Lucas and Kanade 1981); keeps the best box seen, so the result is never worse than the
    start.

    Args:
        left: float32 [N, S, S].
        right: the same.
        boxes: float32 [N, 4], the starting point.
        radius: see `highpass`.
        steps: refinements.

    Returns:
        The boxes, and the correlation [N] that they reach.
    """
    goal = highpass(left, radius)
    best, best_score = boxes, np.full(len(left), -np.inf, np.float32)
    for step in range(steps + 1):
        window, mask = warp(right, boxes)
        window, target = _unit(highpass(window, radius), mask), _unit(goal, mask)
        score = _dot(window, target)
        better = score > best_score
        best = np.where(better[:, None], boxes, best)
        best_score = np.maximum(score, best_score)
        if step < steps:
            boxes = np.clip(boxes + _newton_step(window, target - window, mask, boxes), *_LIMITS)
    return best, best_score


_LIMITS = (
    np.array([-_REACH, -_REACH, 1 - _REACH, 1 - _REACH], np.float32),
    np.array([_REACH, _REACH, 1 + _REACH, 1 + _REACH], np.float32),
)


def _newton_step(window: Floats, rest: Floats, mask: Floats, boxes: Floats) -> Floats:
    """Return the moves of the edges [N, 4] that reduce the residual."""
    count, side, _ = window.shape
    share = (np.arange(side, dtype=np.float32) + 0.5) / side
    slope_x, slope_y = np.zeros_like(window), np.zeros_like(window)
    slope_x[:, :, 1:-1] = (window[:, :, 2:] - window[:, :, :-2]) / 2
    slope_y[:, 1:-1] = (window[:, 2:] - window[:, :-2]) / 2
    # pixels by which a window pixel moves when an edge moves by the whole side
    slope_x *= mask * (side / (boxes[:, 2] - boxes[:, 0]))[:, None, None]
    slope_y *= mask * (side / (boxes[:, 3] - boxes[:, 1]))[:, None, None]
    down = share[:, None]
    slopes = np.stack([slope_x * (1 - share), slope_y * (1 - down), slope_x * share, slope_y * down], axis=1)
    slopes = slopes.reshape(count, 4, -1)
    normal = slopes @ slopes.transpose(0, 2, 1)
    damping = _DAMPING * np.trace(normal, axis1=1, axis2=2) / 4 + 1e-6
    normal += damping[:, None, None] * np.eye(4, dtype=np.float32)
    move = np.linalg.solve(normal, slopes @ rest.reshape(count, -1, 1))[:, :, 0]
    return np.clip(move, -_STEP, _STEP)


def tile_correlations(left: Floats, right: Floats, boxes: Floats, radius: int) -> Floats:
    """Correlate `left` with `right`'s window by tile, float32 [N, TILES²]; NaN in faint tiles."""
    window, mask = warp(right, boxes)
    cut = _tiles(mask)
    tiles = [_tiles(highpass(pictures, radius) * mask) for pictures in (left, window)]
    strength = np.sqrt(np.maximum(*(_dot(tile, tile) for tile in tiles)))
    values = _dot(*(_unit(tile, cut) for tile in tiles))
    values, strength = (entry.reshape(len(left), -1) for entry in (values, strength))
    return np.where(strength >= FAINT * strength.mean(1, keepdims=True), values, np.nan)


def _tiles(pictures: Floats) -> Floats:
    count, side, _ = pictures.shape
    size = side // TILES
    cut = pictures.reshape(count, TILES, size, TILES, size).transpose(0, 1, 3, 2, 4)
    return cut.reshape(count * TILES * TILES, size, size)
