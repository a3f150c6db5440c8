"""Windows and their refinement against pictures cut by Pillow and by hand."""

from __future__ import annotations

import numpy as np
import pytest

from rlmed.data.leakage.registration import TILES, align, highpass, pool, tile_correlations, warp
from tests.rounding import rounding
from tests.unit.rlmed.data.pictures import picture

WHOLE = np.array([[0, 0, 1, 1]], np.float32)


def grey(seed: int, side: int = 64, box: tuple[float, float, float, float] | None = None):
    image = picture(seed, 256, 256).convert("L")
    return np.asarray(image.resize((side, side), 2, box=box), dtype=np.float32)[None]


def test_pool_takes_means_of_four() -> None:
    pixels = np.arange(16, dtype=np.float32).reshape(1, 4, 4)
    assert pool(pixels).tolist() == [[[2.5, 4.5], [10.5, 12.5]]]


def test_highpass_takes_the_local_mean_away() -> None:
    pixels = np.zeros((1, 5, 5), np.float32)
    pixels[0, 2, 2] = 9
    out = highpass(pixels, 1)[0]
    assert out[2, 2] == pytest.approx(8)
    assert out[1, 1] == pytest.approx(-1)
    assert out[0, 0] == 0
    assert np.allclose(
        highpass(np.full((1, 8, 8), 7, np.float32), 2), 0, atol=rounding(2 * 8, 8 * 7)
    )  # sums along both sides


def test_warp_of_the_whole_is_the_picture() -> None:
    pixels = grey(0)
    window, mask = warp(pixels, WHOLE)
    assert np.allclose(window, pixels)
    assert mask.all()


def test_warp_by_whole_pixels_shifts_and_masks_what_is_outside() -> None:
    pixels = grey(0, 32)
    shift = np.array([[4 / 32, -2 / 32, 1 + 4 / 32, 1 - 2 / 32]], np.float32)
    window, mask = warp(pixels, shift)
    assert np.allclose(
        window[0, 2:, :28], pixels[0, :30, 4:], atol=rounding(16, 255)
    )  # of grey values, at places that are rounded
    assert not mask[0, :, 28:].any()
    assert not mask[0, :2].any()
    assert mask[0, 2:, :28].all()


@pytest.mark.parametrize("box", [(0.0, 0.0, 0.95, 0.95), (0.03, 0.0, 1.0, 0.94), (0.02, 0.03, 0.97, 0.98)])
def test_align_finds_the_window_that_was_cut(box: tuple[float, ...]) -> None:
    left = grey(1, 64, tuple(256 * edge for edge in box))  # type: ignore[arg-type]
    right = grey(1, 64)
    start = align(left, right, WHOLE, radius=4, steps=0)[1]
    boxes, score = align(left, right, WHOLE, radius=4, steps=10)
    assert np.allclose(boxes[0], box, atol=0.004)
    assert score[0] > 0.98 > 0.9 > start[0]


def test_align_never_gets_worse_and_leaves_flat_pictures_alone() -> None:
    left, right = np.concatenate([grey(1), np.zeros((1, 64, 64), np.float32)]), np.concatenate([grey(2), grey(3)])
    whole = np.repeat(WHOLE, 2, axis=0)
    before = align(left, right, whole, radius=4, steps=0)[1]
    boxes, after = align(left, right, whole, radius=4, steps=6)
    assert (after >= before).all()
    assert np.isfinite(boxes).all()
    assert after[1] == 0


def test_tiles_see_a_local_difference_that_the_whole_hides() -> None:
    left, right = grey(4, 128), grey(4, 128)
    right[0, :32, 32:64] = grey(5, 128)[0, :32, 32:64]
    tiles = tile_correlations(left, right, WHOLE, 4)[0]
    assert tiles.shape == (TILES**2,)
    assert tiles[1] < 0.5
    assert np.delete(tiles, 1).min() > 0.9


def test_tiles_without_structure_do_not_count() -> None:
    left = grey(6, 128)
    left[0, :, :64] = 20
    tiles = tile_correlations(left, left, WHOLE, 4)[0].reshape(TILES, TILES)
    assert np.isnan(tiles[:, 0]).all()
    assert np.allclose(tiles[:, 3], 1, atol=rounding((128 // TILES) ** 2))  # sums over a tile
