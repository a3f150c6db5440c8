"""Records of the loop."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlmed.core.types import Example

QUESTION = {"id": "ct-3", "question": "Which?", "options": ("head", "knee"), "answer": 0}


def test_images_are_in_the_order_of_the_prompt() -> None:
    first, second, third = map(Path, ("/a.png", "/b.png", "/c.png"))

    assert Example(image=None, **QUESTION).images == ()
    assert Example(image=first, **QUESTION).images == (first,)
    assert Example(image=first, more_images=(second, third), **QUESTION).images == (first, second, third)


def test_more_images_need_a_first_one() -> None:
    with pytest.raises(ValueError, match=r"Example ct-3 .*/b\.png"):
        Example(image=None, more_images=(Path("/b.png"),), **QUESTION)
