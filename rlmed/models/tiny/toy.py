"""Recognise the embedded model, which knows only generated images, and models trained from it."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

SHIPPED = Path(__file__).parent
"""Folder of the models that ship with rlmed."""
EMBEDDED = "embedded:"
"""Prefix of the name of a model that ships with rlmed."""
TOY_NOTE = (
    "This model is the embedded toy, or was trained from it: it knows only generated images. Do not believe what it says "
    "about real ones."
)
_TOKENIZER = "tokenizer.json"


def shipped_folder(name: str) -> Path:
    """Return the folder of a model that ships with rlmed, `embedded:NAME`.

    Raises:
        ValueError: if there is no such model.
    """
    folder = SHIPPED / name.removeprefix(EMBEDDED)
    if not folder.is_dir():
        raise ValueError(f"model.path={name} does not ship with rlmed; `make tiny-base` builds tiny_base")
    return folder


def toy_note(folder: Path) -> str:
    """Return `TOY_NOTE` if a folder holds such a model, else ""."""
    return TOY_NOTE if is_toy(folder) else ""


def is_toy(folder: Path) -> bool:
    """Return if a folder holds the embedded model or one trained from it over any number of stages.

    Training changes all weights but keeps the vocabulary, which is unique: it was built from the
    generated questions.
    """
    vocabulary = _vocabulary(folder / _TOKENIZER)
    return vocabulary is not None and vocabulary == _shipped()


@functools.cache
def _shipped() -> Any:
    return _vocabulary(SHIPPED / "tiny_base" / _TOKENIZER)


def _vocabulary(path: Path) -> Any:
    """Read the vocabulary from a tokenizer file; None if it is missing or not a tokenizer."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a hub name, or a tokenizer in other files; loading it reports any error
        return None
    model = content.get("model") if isinstance(content, dict) else None
    return model.get("vocab") if isinstance(model, dict) else None
