"""What other people's code raises becomes one line."""

from __future__ import annotations

import pytest

from rlmed.core.process.foreign import brief, foreign


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("bad\n  thing."), "bad thing"),
        (OSError(2, "No such file", "x.json"), "[Errno 2] No such file: 'x.json'"),
        (KeyError("added_tokens"), "KeyError: 'added_tokens'"),
        (RecursionError(), "RecursionError"),
        (ValueError(), "ValueError"),
        (Exception("a bare one"), "Exception: a bare one"),
    ],
)
def test_an_error_is_one_line_with_place_and_advice(error: Exception, expected: str) -> None:
    assert brief(error) == expected
    with (
        pytest.raises(ValueError, match=r"^x\.json cannot be read: ") as raised,
        foreign("x.json cannot be read", "Mend it"),
    ):
        raise error
    assert str(raised.value) == f"x.json cannot be read: {expected}. Mend it"
    assert raised.value.__cause__ is error


def test_long_messages_are_cut() -> None:
    assert len(brief(ValueError("x" * 5000))) == 401


@pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt(), SystemExit(3)])
def test_what_is_not_about_the_file_passes(error: BaseException) -> None:
    with pytest.raises(type(error)) as raised, foreign("x", "y"):
        raise error
    assert raised.value is error
