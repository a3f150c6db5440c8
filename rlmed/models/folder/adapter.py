"""Adapter folders of peft: which are models, on which base, and their weights merged into it.

A folder with `adapter_config.json`, `adapter_model.safetensors` and the small files of a model
folder (config.json, tokenizer, …) is a model: its base's weights plus the adapter's.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from rlmed.core.files.damage import read_json
from rlmed.models.folder.weight_files import INDEX, WHOLE, read_header
from rlmed.models.merging import merge
from rlmed.models.tiny.toy import EMBEDDED, shipped_folder

SETTINGS_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What peft puts before a module's name in files."""
FACTORS = ("lora_A", "lora_B")
REFUSED = ("use_dora", "lora_bias", "modules_to_save", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "bias")
"""Settings of peft that change more than W + s B A, or s by layer."""


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds an adapter as the whole of its weights."""
    others = any((folder / name).is_file() for name in (WHOLE, INDEX))
    return not others and all((folder / name).is_file() for name in (SETTINGS_FILE, WEIGHTS_FILE))


def adapter_base(folder: Path) -> Path:
    """Return the folder or hub name of the base model of an adapter; see `is_adapter`.

    Raises:
        ValueError: if it names none or one that is gone, or is no plain LoRA adapter.
    """
    path = folder / SETTINGS_FILE
    settings = read_json(path)
    if settings.get("peft_type") != "LORA":
        raise ValueError(
            f"{path} is of peft_type {settings.get('peft_type')!r}, and rlmed reads LORA only: merge it first (peft's "
            "merge_and_unload())"
        )
    for key in REFUSED:
        if settings.get(key) not in (None, False, "none", [], {}):
            raise ValueError(
                f"{path} has {key}={settings[key]!r}, which rlmed does not read: merge it first (peft's merge_and_unload())"
            )
    base = settings.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(
            f"{path} names no base_model_name_or_path: enter the folder or hub name of the adapter's base model"
        )
    if base.startswith(EMBEDDED):
        return shipped_folder(base)
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise ValueError(
            f"{folder} is an adapter of {base}, which does not exist: correct base_model_name_or_path in {path}"
        )
    return Path(base)


def merge_adapter(model: nn.Module, folder: Path) -> None:
    """Merge the adapter in `folder` into the weights of its loaded base model, in place.

    Raises:
        ValueError: if the adapter belongs to another model.
    """
    settings, path = read_json(folder / SETTINGS_FILE), folder / WEIGHTS_FILE
    read_header(path)  # refuses a damaged file
    rank, alpha = settings["r"], settings["lora_alpha"]
    scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    parameters = dict(model.named_parameters())
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        for name in sorted(names):
            layer, found, _ = name.removeprefix(PREFIX).partition(f".{FACTORS[0]}.")
            if not found:
                _check_factor(path, name, names)
                continue
            weight = parameters.get(f"{layer}.weight")
            a, b = (file.get_tensor(f"{PREFIX}{layer}.{factor}.weight") for factor in FACTORS)
            _check_shapes(path, layer, weight, a, b)
            assert weight is not None
            factors = (b.to(weight.device), a.to(weight.device))
            weight.data = merge(f"{layer}.weight", weight, factors, scale)


def _check_factor(path: Path, name: str, names: set[str]) -> None:
    """Check that a tensor without A in its name is the B of one."""
    if name.replace(f".{FACTORS[1]}.", f".{FACTORS[0]}.") == name or (
        name.replace(f".{FACTORS[1]}.", f".{FACTORS[0]}.") not in names
    ):
        raise ValueError(f"{path} holds {name}, which is no pair of lora_A and lora_B: copy or train the adapter again")


def _check_shapes(path: Path, layer: str, weight: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor) -> None:
    expected = (b.shape[0], a.shape[1])
    if weight is None or tuple(weight.shape) != expected or a.shape[0] != b.shape[1]:
        there = "which it lacks" if weight is None else f"which is {list(weight.shape)} there"
        raise ValueError(
            f"{path} adapts {layer}.weight {list(expected)} of its base model, {there}: correct base_model_name_or_path in "
            f"{path.parent / SETTINGS_FILE}"
        )
