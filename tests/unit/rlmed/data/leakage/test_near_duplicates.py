"""Planted copies are found among other pictures, and other pictures are not taken for copies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance

from rlmed.data.images import BadImageError
from rlmed.data.leakage.near_duplicates import (
    SAME_IN_CROWD,
    TURNS,
    NearDuplicateSearch,
    read_thumbnail,
    thumbnail_correlations,
    turned,
)
from rlmed.data.phantom.studies import Split, write_dataset
from tests.rounding import rounding
from tests.unit.rlmed.data.pictures import cropped, picture, save

TRAIN = 24


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("train")
    return [save(folder, f"{seed}.png", picture(seed)) for seed in range(TRAIN)]


def search(tests: list[Path], train: list[Path]):
    found = NearDuplicateSearch(tests)
    found.add(train[:10])
    found.add(train[10:])
    return found.result()


def labelled(image: Image.Image) -> Image.Image:
    copy = image.copy()
    ImageDraw.Draw(copy).rectangle((4, 4, 36, 24), fill="white")
    return copy


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "as it is": lambda image: image,
    "half the size": lambda image: image.resize((image.width // 2, image.height // 2)),
    "squeezed": lambda image: image.resize((128, 128)),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.3),
    "less contrast": lambda image: ImageEnhance.Contrast(image).enhance(0.6),
    "cropped by 2 %": lambda image: cropped(image, 0.02, 0.2, 0.9),
    "cropped by 5 %": lambda image: cropped(image, 0.05, 0.7, 0.3),
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "turned": lambda image: image.transpose(Image.Transpose.ROTATE_90),
    "upside down": lambda image: image.transpose(Image.Transpose.ROTATE_180),
    "labelled": labelled,
    "all at once": lambda image: ImageEnhance.Brightness(cropped(image, 0.03)).enhance(1.2).resize((120, 96)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_copy_is_found_and_nothing_else(change: str, train: list[Path], tmp_path: Path) -> None:
    copies = [save(tmp_path, f"{seed}.jpg", CHANGES[change](picture(seed)), quality=50) for seed in (3, 11, 20)]
    found = search(copies, train)
    assert [(pair.test, pair.train) for pair in found.same] == [(0, 3), (1, 11), (2, 20)]
    assert not found.doubtful


def test_the_bigger_one_may_be_the_test_picture(tmp_path: Path) -> None:
    whole = [save(tmp_path, f"whole-{seed}.png", picture(seed)) for seed in range(4)]
    parts = [save(tmp_path, f"part-{seed}.png", cropped(picture(seed), 0.05, 0.0, 1.0)) for seed in range(4)]
    assert [(pair.test, pair.train) for pair in search(whole, parts).same] == [(n, n) for n in range(4)]


def test_other_pictures_are_not_copies(train: list[Path], tmp_path: Path) -> None:
    others = [save(tmp_path, f"{seed}.png", picture(seed)) for seed in range(100, 140)]
    found = search(others, train)
    assert not found.same
    assert not found.doubtful


def test_flat_pictures_are_like_nothing(train: list[Path], tmp_path: Path) -> None:
    flat = [save(tmp_path, f"{grey}.png", Image.new("L", (50, 40), grey)) for grey in (0, 128)]
    assert not search(flat, [*train, *flat]).same


def test_generated_pictures_give_no_false_alarm_but_a_planted_copy_does(tmp_path: Path) -> None:
    paths = write_dataset(tmp_path / "phantom", 0, [Split("train_mri", "MRI", 150), Split("test_mri", "MRI", 60)])
    train, tests = (sorted((paths[name].parent / "images" / name).glob("*.png")) for name in ("train_mri", "test_mri"))
    with Image.open(train[7]) as image:
        copy = save(tmp_path, "copy.jpg", image.convert("RGB"), quality=90)
    found = search([*tests, copy], train)
    assert [(pair.test, pair.train) for pair in found.same] == [(len(tests), 7)]
    assert found.doubtful  # they do look alike, and that is said
    assert all(pair.score < SAME_IN_CROWD for pair in found.doubtful)


def test_a_file_that_was_replaced_is_read_again(train: list[Path], tmp_path: Path) -> None:
    path = save(tmp_path, "x.png", picture(5))
    assert [(pair.test, pair.train) for pair in search([path], train).same] == [(0, 5)]
    save(tmp_path, "x.png", picture(9))
    assert [(pair.test, pair.train) for pair in search([path], train).same] == [(0, 9)]


def test_nothing_to_compare_with(train: list[Path]) -> None:
    assert not NearDuplicateSearch(train[:2]).result().same


def test_turns_are_all_different_and_keep_the_pixels() -> None:
    pixels = np.arange(16).reshape(4, 4)
    turns = [turned(pixels, turn) for turn in range(TURNS)]
    assert len({turn.tobytes() for turn in map(np.ascontiguousarray, turns)}) == TURNS
    assert all(sorted(turn.ravel()) == list(range(16)) for turn in turns)
    assert (turned(pixels, 4) == pixels[:, ::-1]).all()


def test_thumbnails_of_pairs(train: list[Path]) -> None:
    values = thumbnail_correlations([train[0], train[0]], [train[0], train[1]])
    assert values[0] == pytest.approx(1, abs=rounding(32 * 32))  # sums over a thumbnail
    assert values[1] < 0.5
    assert thumbnail_correlations([], []).shape == (0,)


def test_a_file_that_is_no_image(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_text("no image")
    with pytest.raises(BadImageError, match=r"a\.png is not an image"):
        read_thumbnail(path)
