"""Check that a folder's weights fit its configuration, by what transformers says of loading."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from rlmed.core.files.damage import read_json
from rlmed.models.folder.contents import CONFIG_FILE
from rlmed.models.folder.weight_files import HEAD, own_head_differs

COMPUTED_BUFFERS = (".inv_freq", ".attn.bias", ".attn.masked_bias", ".position_ids")
"""Buffers in weight files of older versions; models compute them."""


def check_loaded(folder: Path, found: Mapping[str, Collection[Any]], *, tied: bool) -> None:
    """Check that weights fit config.json: transformers fills missing ones randomly, drops others.

    Args:
        folder: source of the model.
        found: transformers' loading info.
        tied: whether config.json ties token embeddings and vocabulary projection.

    Raises:
        ValueError: naming the first parameter that differs or that only one of them has.
    """
    advice = "its files do not match its config.json; copy or download the folder again"
    if reshaped := sorted(found["mismatched_keys"]):
        name, stored, expected = reshaped[0]
        raise ValueError(
            f"model {str(folder)!r}: {name} is {list(stored)} in the weights and {list(expected)} by config.json "
            f"({len(reshaped)} parameters differ): {advice}"
        )
    if absent := sorted(found["missing_keys"]):
        if absent == [HEAD]:
            advice = (
                "config.json does not tie the vocabulary projection to the token embeddings: set tie_word_embeddings to true "
                "if they are tied, else copy or download the folder again"
            )
        raise ValueError(
            f"model {str(folder)!r} has no weights for {len(absent)} parameters of its config.json, the first is {absent[0]}: "
            f"{advice}"
        )
    unknown = sorted(name for name in found["unexpected_keys"] if not name.endswith(COMPUTED_BUFFERS))
    if adapted := [name for name in unknown if "lora_" in name or ".base_layer." in name]:
        raise ValueError(
            f"model {str(folder)!r} contains an adapter that was not merged into its weights ({adapted[0]}): merge it first "
            "(peft's merge_and_unload()) and save the model again"
        )
    if unknown:
        raise ValueError(
            f"model {str(folder)!r} has weights for {len(unknown)} parameters unknown to its config.json, the first is "
            f"{unknown[0]}: {advice}"
        )
    if tied and folder.is_dir() and own_head_differs(folder):
        text = read_json(folder / CONFIG_FILE).get("text_config")
        within = "text_config." if isinstance(text, dict) and text.get("tie_word_embeddings") else ""
        raise ValueError(
            f"model {str(folder)!r}: config.json says {within}tie_word_embeddings=true, but the weights have an lm_head.weight "
            "that differs from the token embeddings: set it to false if it was trained separately, else remove lm_head.weight"
        )
