"""Find near duplicates: re-encoded, resized, brightened, slightly cropped, mirrored or rotated.

Three steps, each on what the previous one leaves. (1) Correlate 32x32 high-pass thumbnails, all
against all, in the windows and turns that a copy may have. (2) Align the best few of each picture:
refine the window's four edges by Gauss-Newton steps on the squared difference (Lucas and Kanade
1981). (3) Compare the aligned pair tile by tile; the score is a low quantile of the tiles'
correlations, since two different chests agree in outline, but not everywhere. docs/lab-log.md has
the measurements behind the constants.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from rlmed.data.images import load_image, resized
from rlmed.data.leakage.registration import align, highpass, pool, tile_correlations, warp

SIDE = 128
"""Side in pixels of a stored picture, which is squeezed to a square."""
CANDIDATES = 3
"""Most training pictures aligned with a test picture."""
SEARCH = 0.4
"""Least correlation of thumbnails; 8 % crops fall this low."""
GOING_ON = (0.6, 0.7)
"""Least correlation after alignment, at 32x32 and 64x64 pixels, for a pair to go on."""
WORST = 0.1
"""The score is this quantile of tile correlations: one of 16 may be spoilt, as by a label."""
SAME = 0.72
"""Least score of a copy; different radiographs reach 0.40."""
SAME_IN_CROWD = 0.96
"""The same for pictures drawn from one template; different generated phantoms reach 0.95."""
ALIKE = 0.40
CROWDED = 0.05
"""Copies and different radiographs hardly ever score between `ALIKE` and `SAME`.

If this share of the test pictures does, the pictures come from one template or one volume, and
`SAME_IN_CROWD` applies.
"""
BLOCK = 512
"""Training pictures per block of correlations."""
_SIZE = 32 * 32
"""Values of a thumbnail."""
_PAIRS = 32
"""Pairs per batch of alignments."""
_THREADS = 4
_KEPT = 4096
"""Pictures kept in memory, 16 KiB each."""

Floats = npt.NDArray[np.float32]

_CORNERS = ((0.0, 0.0), (0.05, 0.0), (0.0, 0.05), (0.05, 0.05), (0.025, 0.025))
_WHOLE = np.array([0, 0, 1, 1], np.float32)
WINDOWS: tuple[Floats, ...] = tuple(np.array([x, y, x + 0.95, y + 0.95], np.float32) for x, y in _CORNERS)
"""Windows of a picture that a copy may show: left, top, right, bottom edge in shares of sides."""
TURNS = 8
"""Orientations of a square picture: four quarter turns, mirrored or not."""


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """A picture prepared for comparison.

    Example:
        Thumbnail(pixels=uint8 [128, 128], detail=112) of a file of 140x112 pixels
    """

    pixels: npt.NDArray[np.uint8]
    """Grey values, squeezed to `SIDE` x `SIDE`."""
    detail: int
    """Shorter side of the file in pixels, at most `SIDE`: the file has no finer structure."""


@dataclass(frozen=True, slots=True)
class NearDuplicate:
    """A test picture and a training picture that count as the same.

    Example:
        NearDuplicate(test=3, train=17, score=0.97)
    """

    test: int
    train: int
    score: float
    """See `alignment_scores`."""


@dataclass(frozen=True, slots=True)
class NearDuplicates:
    """The pairs that a search found, by test picture, best first."""

    same: tuple[NearDuplicate, ...]
    doubtful: tuple[NearDuplicate, ...]
    """Pairs that score `SAME` or more but do not count: different pictures are as much alike."""


@lru_cache(maxsize=_KEPT)
def read_thumbnail(path: Path) -> Thumbnail:
    """Read a file for comparison.

    Raises:
        BadImageError: when it cannot be used.
    """
    # from the size that prompts need: it may be kept
    image = resized(load_image(path), 2 * SIDE).convert("L")
    squeezed = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    return Thumbnail(np.asarray(squeezed), min(SIDE, *image.size))


def read_thumbnails(paths: Sequence[Path]) -> list[Thumbnail]:
    """Read many files, several at a time."""
    # Pillow releases the GIL while it decodes
    with ThreadPoolExecutor(max_workers=_THREADS) as threads:
        return list(threads.map(read_thumbnail, paths))


def turned(pixels: npt.NDArray[np.generic], turn: int) -> npt.NDArray[np.generic]:
    """Rotate pictures [..., S, S] by `turn` % 4 quarter turns, mirrored first for `turn` ≥ 4."""
    laid = pixels[..., ::-1] if turn >= 4 else pixels
    return np.rot90(laid, turn % 4, axes=(-2, -1))


def _halves(pictures: Sequence[Thumbnail]) -> Floats:
    """Return pictures at 64x64 pixels, float32 [N, 64, 64]."""
    return pool(np.stack([picture.pixels for picture in pictures]).astype(np.float32))


def _vectors(halves: Floats, window: Floats | None = None, turn: int = 0) -> Floats:
    """Return each picture's 32x32 high-pass window, norm 1 (0 if flat), float32 [N, `_SIZE`]."""
    part = halves if window is None else warp(halves, np.broadcast_to(window, (len(halves), 4)))[0]
    flat = turned(highpass(pool(part), 2), turn).reshape(len(halves), -1)
    flat = flat - flat.mean(1, keepdims=True)
    length = np.linalg.norm(flat, axis=1, keepdims=True)
    vectors: Floats = flat / np.where(length < 1.0, np.float32(np.inf), length)
    return vectors


class NearDuplicateSearch:
    """Finds the training pictures that are the same as each test picture.

    Holds the test pictures (about 70 KB each) and a few candidates for each; training pictures come
    in blocks.

    Example:
        >>> search = NearDuplicateSearch(test_paths)                  # doctest: +SKIP
        >>> search.add(train_paths)                               # doctest: +SKIP
        >>> search.result().same                                  # doctest: +SKIP
        (NearDuplicate(test=3, train=17, score=0.97),)
    """

    def __init__(self, tests: Sequence[Path]) -> None:
        """Read the test pictures."""
        read_thumbnail.cache_clear()  # an earlier search may have cached a file since replaced
        self._tests = read_thumbnails(tests)
        self._train: list[Path] = []
        ways = [(None, 0), *((window, 0) for window in WINDOWS), *((None, turn) for turn in range(1, TURNS))]
        vectors = np.empty((len(ways), len(tests), _SIZE), np.float32)
        # blocks: intermediate arrays would take as much memory again
        for start in range(0, len(tests), BLOCK):
            block = slice(start, start + BLOCK)
            halves = _halves(self._tests[block])
            for way, (window, turn) in enumerate(ways):
                vectors[way, block] = _vectors(halves, window, turn)
        self._whole, self._windows, self._turns = vectors[0], vectors[1 : len(WINDOWS) + 1], vectors[len(WINDOWS) + 1 :]
        shape = (len(tests), CANDIDATES)
        self._best = np.full(shape, SEARCH, np.float32)
        self._which = np.full(shape, -1)
        self._way = np.zeros(shape, np.int8)

    def add(self, paths: Sequence[Path]) -> None:
        """Correlate with more training pictures; indices continue from the previous ones."""
        for start in range(0, len(paths), BLOCK):
            block = paths[start : start + BLOCK]
            self._correlate(read_thumbnails(block), len(self._train))
            self._train += block

    def _correlate(self, pictures: Sequence[Thumbnail], offset: int) -> None:
        halves = _halves(pictures)
        whole = _vectors(halves)
        best = self._whole @ whole.T
        way = np.zeros(best.shape, np.int8)
        windows = ((self._whole, _vectors(halves, window)) for window in WINDOWS)
        others = ((vectors, whole) for vectors in (*self._windows, *self._turns))
        for number, (mine, theirs) in enumerate(chain(windows, others), start=1):
            values = mine @ theirs.T
            way[values > best] = number
            np.maximum(best, values, out=best)
        which = np.broadcast_to(np.arange(offset, offset + len(pictures)), best.shape)
        pooled = np.concatenate([self._best, best], axis=1)
        order = np.argsort(-pooled, axis=1, kind="stable")[:, :CANDIDATES]
        self._best = np.take_along_axis(pooled, order, 1)
        self._which = np.take_along_axis(np.concatenate([self._which, which], axis=1), order, 1)
        self._way = np.take_along_axis(np.concatenate([self._way, way], axis=1), order, 1)

    def result(self) -> NearDuplicates:
        """Align the candidates and return the matches."""
        tests, ranks = np.nonzero(self._which >= 0)
        trains, ways = self._which[tests, ranks], self._way[tests, ranks]
        scores = np.full(self._which.shape, -1.0)
        parts = [slice(start, start + _PAIRS) for start in range(0, len(tests), _PAIRS)]
        with ThreadPoolExecutor(max_workers=_THREADS) as threads:  # numpy's loops release the GIL
            done = threads.map(lambda part: self._score(tests[part], trains[part], ways[part]), parts)
            for part, values in zip(parts, done, strict=True):
                scores[tests[part], ranks[part]] = values
        middling = ((scores >= ALIKE) & (scores < SAME)).any(1)
        crowded = len(scores) > 0 and float(middling.mean()) >= CROWDED
        pairs = [
            NearDuplicate(int(test), int(self._which[test, rank]), round(float(scores[test, rank]), 3))
            for test, rank in zip(*np.nonzero(scores >= SAME), strict=True)
        ]
        pairs.sort(key=lambda pair: (pair.test, -pair.score, pair.train))
        least = SAME_IN_CROWD if crowded else SAME
        return NearDuplicates(
            same=tuple(pair for pair in pairs if pair.score >= least),
            doubtful=tuple(pair for pair in pairs if pair.score < least),
        )

    def _score(self, tests: Iterable[int], trains: Iterable[int], ways: npt.NDArray[np.int8]) -> Floats:
        mine = [self._tests[test] for test in tests]
        others = [read_thumbnail(self._train[train]) for train in trains]
        detail = np.array([min(a.detail, b.detail) for a, b in zip(mine, others, strict=True)])
        turns = [max(0, way - 2 * len(WINDOWS)) for way in ways]
        left = np.stack([turned(a.pixels, turn) for a, turn in zip(mine, turns, strict=True)]).astype(np.float32)
        right = np.stack([b.pixels for b in others]).astype(np.float32)
        boxes = np.stack([_BOXES[way] if way < len(_BOXES) else _WHOLE for way in ways])
        return alignment_scores(left, right, boxes, detail)


def _around(window: Floats) -> Floats:
    """Return a picture's box in shares of its part in `window`: outside it, edges leave 0 to 1."""
    size = window[2:] - window[:2]
    return np.concatenate([-window[:2] / size, (1 - window[:2]) / size]).astype(np.float32)


_BOXES = (_WHOLE, *WINDOWS, *(_around(window) for window in WINDOWS))


def alignment_scores(left: Floats, right: Floats, boxes: Floats, detail: npt.NDArray[np.int64]) -> Floats:
    """Align pictures and score their agreement.

    Args:
        left: float32 [N, 128, 128].
        right: the same.
        boxes: float32 [N, 4], roughly where the left picture lies in the right one; see
            `registration.warp`.
        detail: int [N], pixels along the shorter side of the coarser picture of each pair.

    Returns:
        float32 [N], the quantile `WORST` of the correlations of 16 tiles, at 128x128 pixels, or at
        64x64 or 32x32 for files with no more detail; -1 for pairs rejected earlier.
    """
    halves = pool(left), pool(right)
    quarters = pool(halves[0]), pool(halves[1])
    boxes, agreement = align(*quarters, boxes, radius=2, steps=5)
    scores = np.full(len(left), -1.0, np.float32)
    going = np.flatnonzero(agreement >= GOING_ON[0])
    if not len(going):
        return scores
    boxes, agreement = align(halves[0][going], halves[1][going], boxes[going], radius=4, steps=3)
    levels = ((left, right), halves, quarters)
    fits = (detail >= 96, (detail < 96) & (detail >= 48), detail < 48)
    for (a, b), fit, radius in zip(levels, fits, (4, 2, 1), strict=True):
        here = fit[going] & (agreement >= GOING_ON[1])
        if here.any():
            pairs = going[here]
            tiles = tile_correlations(a[pairs], b[pairs], boxes[here], radius)
            scores[pairs] = np.nanquantile(tiles, WORST, axis=1)
    return scores


def thumbnail_correlations(left: Sequence[Path], right: Sequence[Path]) -> Floats:
    """Return the correlation of each pair's 32x32 high-pass thumbnails, unaligned; float32 [N]."""
    values = [np.zeros(0, np.float32)]
    for start in range(0, len(left), BLOCK):
        sides = (_vectors(_halves(read_thumbnails(paths[start : start + BLOCK]))) for paths in (left, right))
        values.append(np.einsum("nd,nd->n", *sides))
    return np.concatenate(values)
