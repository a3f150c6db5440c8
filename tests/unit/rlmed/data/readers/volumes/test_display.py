"""Windows, percentiles and square pixels, against values worked by hand."""

import numpy as np
import pytest

from rlmed.data.images import MAX_SIDE, BadImageError
from rlmed.data.readers.volumes.display import Window, check_shown, parse_window, percentile_range, stretch, to_picture


@pytest.mark.parametrize("text", ["40 400", " 40.0,400 ", "40;400", "40/400", "4e1 400"])
def test_a_window_is_read_however_it_is_parted(text):
    assert parse_window(text) == Window(40.0, 400.0)


def test_a_blank_text_is_no_window():
    assert parse_window("  ") is None


@pytest.mark.parametrize("text", ["40", "40 400 1", "soft tissue", "40 0", "40 -400", "nan 400", "40 inf", "40 4OO"])
def test_other_texts_are_errors(text):
    with pytest.raises(ValueError, match="window"):
        parse_window(text)


def test_stretch_is_linear_between_its_ends_and_flat_outside():
    values = np.array([[-1000.0, -160.0, 40.0, 240.0, 3000.0, np.nan, np.inf, -np.inf]])
    np.testing.assert_array_equal(stretch(values, -160, 240), [[0, 0, 128, 255, 255, 0, 255, 0]])


def test_an_empty_range_parts_the_values_in_two():
    np.testing.assert_array_equal(stretch(np.array([[1, 2, 3]]), 2, 2), [[0, 0, 255]])


def test_percentiles_leave_out_the_extremes_and_what_is_not_finite():
    values = np.append(np.arange(1000.0), [np.nan, np.inf])
    assert percentile_range(values) == pytest.approx((0.005 * 999, 0.995 * 999))


def test_a_mask_is_shown_from_its_least_to_its_largest_value():
    mask = np.zeros(1000)
    mask[0] = 1
    assert percentile_range(mask) == (0.0, 1.0)
    assert percentile_range(np.array([np.nan])) == (0.0, 0.0)


def test_square_pixels_come_through_unchanged():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60), dtype=np.uint8)
    np.testing.assert_array_equal(np.asarray(to_picture(pixels, 0.7, 0.7)), pixels)


def test_the_coarser_direction_is_stretched():
    pixels = np.zeros((40, 60), dtype=np.uint8)
    # a quarter of each side at the upper left, whatever the shape of the picture
    pixels[:10, :15] = 255
    for spacing, size in (((2.0, 1.0), (60, 80)), ((1.0, 2.0), (120, 40)), ((0.5, 0.4), (60, 50))):
        picture = to_picture(pixels, *spacing)
        assert picture.size == size
        bright = np.argwhere(np.asarray(picture) > 127)
        assert tuple(bright.max(0) + 1) == pytest.approx((size[1] / 4, size[0] / 4), abs=1)


def test_large_pictures_are_scaled_down_and_keep_their_shape():
    assert to_picture(np.zeros((3000, 6000), dtype=np.uint8)).size == (MAX_SIDE, MAX_SIDE // 2)


@pytest.mark.parametrize(
    ("shape", "spacing", "reason"),
    [
        ((40, 3), (1.0, 1.0), "fewer than 4 a side"),
        ((10, 2010), (1.0, 1.0), "more than 200 times"),
        ((10, 150), (1.0, 15.0), "more than 200 times"),
        ((40, 40), (1.0, 21.0), "more than 20 times"),
        ((40, 40), (0.0, 1.0), "must be positive"),
        ((40, 40), (1.0, float("nan")), "must be positive"),
    ],
)
def test_impossible_shapes_and_spacings_are_errors(shape, spacing, reason):
    with pytest.raises(BadImageError, match=reason):
        to_picture(np.zeros(shape, dtype=np.uint8), *spacing)


def test_a_window_beside_all_values_but_few_shows_nothing_and_a_mask_does():
    values = np.arange(100.0 * 200).reshape(100, 200)
    values[0, :2] = 1e6  # 2 of 20,000
    shown = stretch(values, 9e5, 1e6)
    with pytest.raises(BadImageError, match=r"from 2 to 1e\+06, .*is elsewhere"):
        check_shown(values, shown, "the window is elsewhere")
    values[0, 2] = 1e6
    check_shown(values, stretch(values, 9e5, 1e6), "")
    mask = (values == 1e6).astype(np.uint8)
    mask[0, 1:] = 0
    check_shown(mask, stretch(mask, 0, 1), "")


@pytest.mark.parametrize("window", [(30000.0, 30010.0), (-5.0, -1.0), (0.0, 1e9)])
def test_a_window_beside_all_values_or_too_wide_for_them_shows_nothing(window):
    values = np.arange(400.0).reshape(20, 20)
    with pytest.raises(BadImageError, match=r"from 0 to 399, .*elsewhere"):
        check_shown(values, stretch(values, *window), "it is elsewhere")


@pytest.mark.parametrize(("low", "high"), [(-3e38, 3e38), (1e9, 1e9 + 1), (0.0, 1e-40)])
def test_stretch_is_exact_for_ranges_that_singles_cannot_tell_apart(low, high):
    values = low + np.linspace(0, 1, 11)[None] * (high - low)
    np.testing.assert_allclose(stretch(values, low, high), np.linspace(0, 255, 11)[None], atol=0.51)
