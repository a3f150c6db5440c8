"""Pictures embedded in the report."""

import numpy as np
from PIL import Image

from rlmed.report.rollouts import FULL_SIZE, PICTURE_SIDE, Pictures


def numbered(folder, count):
    """Pictures that all differ, each twice as wide as high."""
    paths = [folder / f"{i}.png" for i in range(count)]
    for i, path in enumerate(paths):
        Image.fromarray(np.full((200, 400), 9 * i + 1, dtype=np.uint8)).save(path)
    return list(map(str, paths))


def test_missing_and_damaged_pictures_are_left_out(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    pictures = Pictures()
    assert pictures.add(None) is None
    assert pictures.add(str(tmp_path / "gone.png")) is None
    assert pictures.add(str(tmp_path / "broken.png")) is None
    assert pictures.uris == []


def test_many_images_of_a_question_are_small(tmp_path):
    paths = numbered(tmp_path, FULL_SIZE + 1)
    pictures = Pictures()
    sizes = [(entry["width"], entry["height"]) for entry in pictures.add_all(paths[:-1])]
    assert sizes == [(PICTURE_SIDE, PICTURE_SIDE // 2)] * FULL_SIZE
    sizes = [(entry["width"], entry["height"]) for entry in pictures.add_all(paths)]
    assert sizes == [(PICTURE_SIDE // 2, PICTURE_SIDE // 4)] * (FULL_SIZE + 1)
