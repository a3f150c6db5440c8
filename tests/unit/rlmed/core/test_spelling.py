"""The name that a misspelled one was meant to be."""

from __future__ import annotations

import pytest

from rlmed.core.config.overrides import group_options
from rlmed.core.spelling import closest


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("gpro", "grpo"),  # swapped: one edit, as gspo is, and it begins alike
        ("gsop", "gspo"),
        ("gropo", "grpo"),
        ("GRPO", "grpo"),
        ("dpao", "dapo"),
        ("dr_gpro", "dr_grpo"),
        ("dynamic", "grpo_dynamic"),
        ("xyz", None),
    ],
)
def test_the_nearest_option_is_meant(word: str, meant: str | None) -> None:
    assert closest(word, group_options("algo")) == meant


def test_among_equally_near_names_the_one_that_begins_alike_is_meant() -> None:
    assert closest("abx", ["xbx", "abc"]) == closest("abx", ["abc", "xbx"]) == "abc"


def test_without_names_none_is_meant() -> None:
    assert closest("abc", []) is None
