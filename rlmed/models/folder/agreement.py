"""Check a model folder for contradictions between configuration, tokenizer and image processor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt
from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from rlmed.core.chat import OLD_TEMPLATE_FILE, PROCESSOR, TEMPLATE_FILE, template_source, unopened_turn
from rlmed.core.files.damage import read_json
from rlmed.core.process.foreign import foreign
from rlmed.core.types import IntArray
from rlmed.models.families import family_of
from rlmed.models.folder.adapter import is_adapter
from rlmed.models.folder.contents import CONFIG_FILE
from rlmed.models.folder.end_tokens import TOKENIZER_CONFIG, find_end_tokens
from rlmed.models.folder.weight_files import check_weight_files

CONTROL_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_token_id": "<|vision_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
"""The Qwen-VL families' token for each key of config.json."""
GRID = {"patch_size": "patch_size", "merge_size": "spatial_merge_size", "temporal_patch_size": "temporal_patch_size"}
"""Keys of preprocessor_config.json and their counterparts in config.json's vision_config."""
PREPROCESSOR = "preprocessor_config.json"
DEFAULT_SECTIONS = [16, 24, 24]
"""M-RoPE sections of a vision model whose config.json names none."""


def check_agreement(
    folder: Path,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    image_processor: BaseImageProcessor | None,
) -> list[str]:
    """Compare the files of a model folder or hub name.

    Args:
        folder: model folder or hub name.
        config: its `load_config`.
        tokenizer: its tokenizer.
        image_processor: its image processor; None for a text model.

    Returns:
        Resolved differences, one line each, naming what is used.

    Raises:
        ValueError: for a difference that changes the trained model, naming both values and what to
            do.
    """
    where = repr(str(folder))
    _check_architecture(where, config)
    _check_vocabulary(where, config, tokenizer)
    _check_positions(where, config)
    if image_processor is not None and family_of(config).grids:
        _check_grid(where, config, image_processor)
    doubts = find_end_tokens(folder, config, tokenizer).doubts(tokenizer)
    if Path(folder).is_dir():
        doubts += [] if is_adapter(Path(folder)) else check_weight_files(folder)
        doubts += _told_twice(folder, config, tokenizer)
        if image_processor is not None:
            doubts += _processor_settings(folder, image_processor)
    if opening := unopened_turn(tokenizer):
        doubts.append(
            f"{template_source(tokenizer)} begins an answer with {opening!r} but does not write that at the end of a prompt: "
            "the model would have to write it itself, so let the template write it where add_generation_prompt is true"
        )
    if "strftime_now" in str(tokenizer.chat_template):
        doubts.append(
            f"{template_source(tokenizer)} writes today's date: prompts, and so results, change from day to day; use a fixed "
            "date to make runs repeatable"
        )
    return doubts


def check_visual_tokens(
    folder: Path, config: PreTrainedConfig, token_ids: IntArray, image_inputs: Mapping[str, npt.NDArray[Any]]
) -> None:
    """Check that a picture has as many tokens in a prompt as the model makes of its tiles.

    Args:
        folder: model folder or hub name.
        config: its `load_config`.
        token_ids: int64 [P], of a prompt with one picture.
        image_inputs: of the same.

    Raises:
        ValueError: naming both numbers.
    """
    family, seen = family_of(config), config.to_dict()["vision_config"]
    if family.grids or "image_sizes" in image_inputs:  # counted by the grid; tiles are cut and rows end with a token
        return
    tiles, _, height, width = image_inputs["pixel_values"].shape
    patch = seen["patch_size"]
    side = patch if isinstance(patch, int) else patch[0]
    made = tiles * (height // side) * (width // side) // family.patches_per_token(config)
    written = int((token_ids == config.image_token_id).sum())
    if written != made:
        raise ValueError(
            f"model {str(folder)!r}: its processor writes {written} visual tokens (image_token_id={config.image_token_id}) for "
            f"{tiles} tiles of {height} x {width} pixels, where the model makes {made}: copy {PREPROCESSOR}, {PROCESSOR} and "
            "config.json from the model that this one was trained from"
        )


def position_doubt(config: PreTrainedConfig, *, tokens: int, what: str, advice: str) -> str | None:
    """Return a warning if prompt and completion may exceed the model's positions, else None.

    Args:
        config: the model's.
        tokens: length of both together.
        what: their lengths, for the message.
        advice: keys to lower, for the message.
    """
    limit = config.get_text_config().max_position_embeddings
    if tokens <= limit:
        return None
    return (
        f"{what} are more than the {limit} positions that the model supports (max_position_embeddings in config.json): "
        f"don't trust tokens beyond them; lower {advice}"
    )


def _check_architecture(where: str, config: PreTrainedConfig) -> None:
    vision = family_of(config).vision
    names = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if vision else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    expected = names[config.model_type]
    named = config.architectures or expected
    found = [str(name) for name in named] if isinstance(named, (list, tuple)) else [str(named)]
    # written by trainers that wrapped the model
    found = [name.removeprefix("FSDP") for name in found]
    if expected not in found:
        raise ValueError(
            f"model {where}: config.json says architectures {', '.join(found)} and model_type {config.model_type}, which is "
            f"{expected}: rlmed would load its weights as those of a model that writes text; use one that does, or correct "
            "config.json"
        )


def _check_vocabulary(where: str, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = config.get_text_config().vocab_size
    vocabulary = tokenizer.get_vocab()
    # a padding token is often added without an embedding row, and never used
    unused = {
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.special and token.content not in str(tokenizer.chat_template)
    }
    highest = max(vocabulary.keys() - unused, key=lambda token: vocabulary[token])
    if vocabulary[highest] >= rows:
        raise ValueError(
            f"model {where}: its tokenizer has {highest!r} as token {vocabulary[highest]}, and vocab_size in config.json is "
            f"{rows}: the tokenizer belongs to another model; copy the one that this model was trained with"
        )
    values = config.to_dict()
    for key, token in CONTROL_TOKENS.items() if family_of(config).grids else ():
        if values.get(key) is not None and token in vocabulary and values[key] != vocabulary[token]:
            raise ValueError(
                f"model {where}: config.json says {key}={values[key]}, and {token} is {vocabulary[token]} in the tokenizer: "
                "they belong to two models; copy both from the model that this one was trained from"
            )


def _check_positions(where: str, config: PreTrainedConfig) -> None:
    text = config.get_text_config().to_dict()
    width = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    with foreign(f"model {where}: mrope_section in config.json cannot be read", "Copy config.json again"):
        rotation = text.get("rope_parameters") or {}
        sections = rotation.get("mrope_section", DEFAULT_SECTIONS if family_of(config).position_rows > 1 else None)
        said = "says" if "mrope_section" in rotation else "leaves it at"
        rotated = width if sections is None else 2 * sum(sections)
    if rotated != width:
        raise ValueError(
            f"model {where}: config.json {said} mrope_section={sections}, which is half of {rotated} channels, and heads have "
            f"{width}: they belong to two models; copy config.json from the model that this one was trained from"
        )


def _check_grid(where: str, config: PreTrainedConfig, image_processor: BaseImageProcessor) -> None:
    seen, prepared = config.to_dict()["vision_config"], image_processor.to_dict()
    for key, name in GRID.items():
        if prepared[key] != seen[name]:
            raise ValueError(
                f"model {where}: {PREPROCESSOR} says {key}={prepared[key]}, and config.json vision_config.{name}={seen[name]}: "
                "images would be split into other patches than in training; copy both from the model that this one was "
                "trained from"
            )


def _processor_settings(folder: Path, image_processor: BaseImageProcessor) -> Iterator[str]:
    """Yield contradictions in image processor files; transformers prefers processor_config.json."""
    files = {}
    if (folder / PROCESSOR).is_file() and isinstance(
        inner := read_json(folder / PROCESSOR).get("image_processor"), dict
    ):
        files[PROCESSOR] = inner
    if (folder / PREPROCESSOR).is_file():
        files[PREPROCESSOR] = read_json(folder / PREPROCESSOR)
    for name, said in files.items():
        size = said["size"] if isinstance(said.get("size"), dict) else {}
        for key, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
            other = edge if edge in size else key  # older versions used the outer name here too
            if said.get(key) is not None and size.get(other) is not None and said[key] != size[other]:
                yield (
                    f"{folder / name} says {key}={said[key]} and size.{other}={size[other]}: "
                    f"{image_processor.to_dict()['size'][edge]} is used; model.{key} overrules both"
                )
    if len(files) == 2:
        inner, outer = files.values()
        for key in sorted(inner.keys() & outer.keys() - {"processor_class"}):
            if inner[key] != outer[key]:
                yield (
                    f"model {str(folder)!r}: {PROCESSOR} says {key}={inner[key]} and {PREPROCESSOR} {key}={outer[key]}: "
                    f"{PROCESSOR} is used"
                )


def _told_twice(folder: Path, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    yield from _templates(folder, tokenizer)
    yield from _token_ids(folder, tokenizer)
    for path in sorted(folder.glob("*/adapter_config.json")):
        yield f"model {str(folder)!r}: ignoring the adapter in {path.parent.name}; merge it into the weights to use it"
    content = read_json(folder / CONFIG_FILE)
    inner, used = content.get("text_config"), config.get_text_config().to_dict()
    if isinstance(inner, dict):
        for key in sorted(content.keys() & inner.keys() & used.keys()):
            if content[key] != inner[key] and _counts(key, content[key]):
                yield (
                    f"{folder / CONFIG_FILE} says {key}={content[key]} and text_config.{key}={inner[key]}: {used[key]} is used"
                )
    bases = dict(_rotation_bases(content))
    if len({*bases.values()}) > 1:
        said = " and ".join(f"{key}={value}" for key, value in bases.items())
        yield f"{folder / CONFIG_FILE} says {said}: {used['rope_parameters']['rope_theta']} is used"


def _rotation_bases(content: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the path and value of every `rope_theta` in a config.json."""
    if "rope_theta" in content:
        yield f"{where}rope_theta", content["rope_theta"]
    for key in ("rope_parameters", "rope_scaling", "text_config"):
        if isinstance(content.get(key), dict):
            yield from _rotation_bases(content[key], f"{where}{key}.")


def _counts(key: str, value: Any) -> bool:
    """Return whether a key of config.json affects the computation.

    End tokens are compared elsewhere, and no supported model uses an attention window.
    """
    ignored = ("_token_id", "_cache", "tie_word_embeddings", "sliding_window", "max_window_layers")
    return isinstance(value, (int, float)) and not key.endswith(ignored)


def _templates(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    found: dict[str, Any] = {}
    if (folder / TEMPLATE_FILE).is_file():
        found[TEMPLATE_FILE] = (folder / TEMPLATE_FILE).read_text(encoding="utf-8-sig")
    for name in (TOKENIZER_CONFIG, OLD_TEMPLATE_FILE, PROCESSOR):
        if (folder / name).is_file() and (template := read_json(folder / name).get("chat_template")):
            found[name] = template
    used = _default(tokenizer.chat_template)
    others = [name for name, template in found.items() if _default(template) != used]
    if others:
        owner = next((name for name in found if name not in others), "the tokenizer's")
        yield f"model {str(folder)!r} has a different chat template in {', '.join(others)} than in {owner}: {owner} is used"


def _default(template: Any) -> Any:
    """Return the default of one or several named templates, stripped as transformers does."""
    if isinstance(template, list):
        template = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
    if isinstance(template, dict):
        template = template.get("default")
    return template.strip() if isinstance(template, str) else template


def _token_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Yield contradictions between the token ids in tokenizer.json and in other files."""
    vocabulary = tokenizer.get_vocab()
    for name, tokens in _named_tokens(folder):
        odd = {token: token_id for token, token_id in tokens.items() if vocabulary.get(token) != token_id}
        if odd:
            token, token_id = next(iter(odd.items()))
            yield (
                f"{folder / name} gives {token!r} the id {token_id}, and the tokenizer has {vocabulary.get(token)} "
                f"({len(odd)} tokens differ): the tokenizer's is used"
            )


def _named_tokens(folder: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name in ("added_tokens.json", "vocab.json"):
        if (folder / name).is_file():
            yield name, read_json(folder / name)
    if (folder / TOKENIZER_CONFIG).is_file():
        decoder = read_json(folder / TOKENIZER_CONFIG).get("added_tokens_decoder")
        if isinstance(decoder, dict):
            yield (
                TOKENIZER_CONFIG,
                {
                    entry["content"]: int(token_id)
                    for token_id, entry in decoder.items()
                    if isinstance(entry, dict) and "content" in entry and token_id.isdigit()
                },
            )
