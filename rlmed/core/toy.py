"""The embedded model knows generated pictures only: how a folder is known to hold it, or what was trained from it."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from rlmed.core.files import ASSETS

EMBEDDED = "embedded:"
"""Begins the name of a model that ships with rlmed."""
TOY_NOTE = (
    "This model is the embedded toy, or was trained from it: it was made on generated pictures. Do not believe what it says "
    "about real ones."
)
_TOKENIZER = "tokenizer.json"


def is_toy(folder: Path) -> bool:
    """Whether a folder holds the embedded model or one that was trained from it, over whatever stages.

    Training changes all weights and keeps the vocabulary, which was made of the generated questions: nothing else has it.
    """
    vocabulary = _vocabulary(folder / _TOKENIZER)
    return vocabulary is not None and vocabulary == _shipped()


@functools.cache
def _shipped() -> Any:
    return _vocabulary(ASSETS / "tiny_base" / _TOKENIZER)


def _vocabulary(path: Path) -> Any:
    """What a tokenizer's file has for its vocabulary; None where it has none, or is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a hub name, a tokenizer in other files; whoever loads it says what is wrong
        return None
    model = content.get("model") if isinstance(content, dict) else None
    return model.get("vocab") if isinstance(model, dict) else None
