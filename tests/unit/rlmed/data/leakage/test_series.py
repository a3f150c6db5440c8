"""File names that stand next to each other."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlmed.data.leakage.series import neighbours, series_of


def near(test: str, train: str) -> bool:
    return bool(list(neighbours([[Path(test)]], [[Path(train)]])))


@pytest.mark.parametrize(
    ("test", "train"),
    [
        ("/d/brain_012.png", "/d/brain_013.png"),
        ("/d/brain_9.png", "/d/brain_12.jpg"),
        ("/d/12.png", "/d/11.png"),
        ("/d/p7_slice_3_t.png", "/d/p7_slice_4_t.png"),
        ("/test/p7_012.png", "/train/p7_013.png"),  # two folders, and the name holds the patient
        ("/test/patient7/3.png", "/train/patient7/4.png"),
    ],
)
def test_neighbours(test: str, train: str) -> None:
    assert near(test, train)
    assert near(train, test)


@pytest.mark.parametrize(
    ("test", "train"),
    [
        ("/d/brain_012.png", "/d/brain_012.png"),
        ("/d/brain_012.png", "/d/brain_016.png"),
        ("/d/brain_012.png", "/d/chest_013.png"),
        ("/d/brain.png", "/d/brain2.png"),
        ("/test/12.png", "/train/13.png"),  # rows numbered in two folders
        ("/test/patient7/3.png", "/train/patient8/4.png"),
        ("/d/p7_t1.png", "/d/p8_t1.png"),  # the last number is the same
        ("/d/1234567890123456789.png", "/d/1234567890123456788.png"),
    ],
)
def test_no_neighbours(test: str, train: str) -> None:
    assert not near(test, train)


def test_a_name_of_every_patient_names_no_series_across_folders() -> None:
    train = [[Path(f"/train/{name}/IM-0001-0012.png")] for name in "abcdef"]
    assert list(neighbours([[Path("/test/x/IM-0001-0013.png")]], train[:2])) == [(0, 0), (0, 1)]
    assert not list(neighbours([[Path("/test/x/IM-0001-0013.png")]], train))
    assert list(neighbours([[Path("/train/c/IM-0001-0013.png")]], train)) == [(0, 2)]


def test_one_file_in_two_places_is_one_pair() -> None:
    assert list(neighbours([[Path("/a/x1.png"), Path("/b/x1.png")]], [[Path("/a/x2.png"), Path("/b/x2.png")]])) == [
        (0, 0)
    ]


def test_names_without_a_number() -> None:
    assert series_of(Path("/d/brain.png")) is None
