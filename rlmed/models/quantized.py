"""Keep the frozen weights below adapters in 4 bits (QLoRA, arXiv 2305.14314), by bitsandbytes."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedConfig

from rlmed.models.families import family_of
from rlmed.models.size import meta_model

LIBRARIES = ("bitsandbytes", "accelerate")


def check_four_bits(device: torch.device) -> None:
    """Raise ValueError if weights on this device cannot be kept in 4 bits."""
    if device.type != "cuda":
        raise ValueError(
            f"learner.lora.quantize=nf4 needs a CUDA device, and the model is on {device}: use learner.lora.quantize=null"
        )
    absent = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if absent:
        raise ValueError(
            f"learner.lora.quantize=nf4 needs {' and '.join(absent)}: pip install -c requirements.lock -e '.[qlora]' in "
            "rlmed's checkout, or use learner.lora.quantize=null"
        )


def four_bits(
    config: PreTrainedConfig, parts: Collection[str], dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Return arguments of `from_pretrained` that keep the linear layers of `parts` as NF4.

    Args:
        config: of the model.
        parts: of `rlmed.models.families.PARTS`.
        dtype: of everything else, and of products.
        device: a GPU.

    Raises:
        ValueError: without a GPU or the libraries.
    """
    check_four_bits(device)
    model, family = meta_model(config), family_of(config)
    head = model.get_output_embeddings()
    kept = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and (module is head or family.part_of(f"{name}.weight") not in parts)
    ]
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=kept,  # transformers' name for both widths
    )
    index = torch.cuda.current_device() if device.index is None else device.index
    return {"quantization_config": settings, "device_map": {"": index}}


def check_not_quantized(folder: Path, parts: Collection[str]) -> None:
    """Refuse to quantize an adapter's base, whose merged weights 4 bits would round away.

    Raises:
        ValueError: if there are `parts` to quantize.
    """
    if parts:
        raise ValueError(
            f"learner.lora.quantize=nf4 and model {str(folder)!r}, an adapter: merge it first (peft's "
            "merge_and_unload()), and give the merged folder"
        )
