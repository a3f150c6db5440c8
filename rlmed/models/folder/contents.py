"""Refuse model folders that rlmed cannot load correctly, before loading anything."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlmed.core.files.damage import read_json
from rlmed.models.folder.adapter import SETTINGS_FILE, WEIGHTS_FILE, adapter_base, is_adapter

ADAPTER_FILES = (
    "adapter_config.json",
    *(f"*{name}*.{ending}" for name in ("adapter", "lora") for ending in ("safetensors", "bin", "pt", "npz")),
)
"""Name patterns of adapter files from PEFT, MLX, Diffusers and LLaVA."""
QUANTIZATION_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""Files of AutoGPTQ, AutoAWQ and ModelOpt, beside or instead of the entry in config.json."""
CONFIG_FILE = "config.json"
JSON_FILES = (
    CONFIG_FILE,
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
)
"""Small files that transformers reads, or silently ignores if damaged."""


def check_folder(folder: Path) -> None:
    """Refuse what transformers ignores or crashes on: adapters, quantization, custom code, damage.

    Raises:
        ValueError: naming the file and what to do.
    """
    if is_adapter(folder):
        _check_adapter(folder)
    else:
        _refuse_adapter(folder)
    if not (folder / CONFIG_FILE).is_file():
        # a run's folder, the hub's cache, an archive unpacked into a folder of its name
        depths = ("*", "*/*", "*/*/*")  # and that of a name's runs
        inner = sorted({path.parent for depth in depths for path in folder.glob(f"{depth}/{CONFIG_FILE}")})
        near = f"; {inner[-1]} is one" if inner else ""
        raise ValueError(f"{folder} is not a Hugging Face model folder: config.json is missing{near}")
    contents = {name: read_json(folder / name) for name in JSON_FILES if (folder / name).is_file()}
    _refuse_quantization(folder, contents[CONFIG_FILE])
    for name, content in contents.items():
        if content.get("auto_map"):
            raise ValueError(
                f"{folder / name} requests custom code (auto_map: {_shown(content['auto_map'])}), which rlmed does not run: "
                "remove auto_map if the model is a plain one of its model_type, else use a model that transformers supports"
            )


def _check_adapter(folder: Path) -> None:
    """Check that an adapter is a model: see `rlmed.models.folder.adapter`."""
    base = adapter_base(folder)
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(
            f"{folder} is an adapter of {base} without {CONFIG_FILE}: copy that model's small files into it ({CONFIG_FILE}, "
            "generation_config.json, tokenizer and image processor; no weights)"
        )


def _refuse_adapter(folder: Path) -> None:
    found = sorted(path.name for pattern in ADAPTER_FILES for path in folder.glob(pattern))
    if not found:
        return
    described = folder / "adapter_config.json"
    base = read_json(described).get("base_model_name_or_path") if described.is_file() else None
    trained = f" of {base}" if base else ""
    raise ValueError(
        f"{folder / found[0]} is an adapter{trained}, but not with {SETTINGS_FILE} and {WEIGHTS_FILE} alone: merge it first "
        "(PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(folder), in Python with peft) and give "
        "the merged folder, or remove the adapter's files to use the weights beside it"
    )


def _refuse_quantization(folder: Path, config: Mapping[str, Any]) -> None:
    settings: dict[str, Any] = {}
    for part, values in (("", config), *((f"{key}.", config.get(key)) for key in ("text_config", "vision_config"))):
        if isinstance(values, dict):
            settings |= {
                f"{CONFIG_FILE} ({part}{key})": values[key]
                for key in ("quantization_config", "compression_config")
                if values.get(key)
            }
    settings |= {name: read_json(folder / name) for name in QUANTIZATION_FILES if (folder / name).is_file()}
    for source, value in settings.items():
        method = value.get("quant_method") if isinstance(value, dict) else None
        raise ValueError(
            f"{folder / source} says that the weights are quantized ({method or _shown(value)}), but rlmed trains and "
            "evaluates only float weights: use the original bfloat16 or float32 model"
        )


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:80]}…"
