"""Small random models that vLLM's CPU build can run."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, GenerationConfig

from rlmed.models.tiny.build import build_tiny_text, build_tiny_vl
from tests.conftest import GRID_FAMILIES, VISION_FAMILIES
from tests.tiny_vision import build_tiny_tiles


def build_model(folder: Path, family: str = "qwen2_vl") -> Path:
    """A random model, peaked distributions, heads of 32: the least that vLLM's CPU kernels take."""
    grids, vision = family in GRID_FAMILIES, family in VISION_FAMILIES
    (build_tiny_vl if grids else build_tiny_tiles if vision else build_tiny_text)(folder, family)
    config = AutoConfig.from_pretrained(folder)
    text = config.get_text_config()
    text.hidden_size = 128
    if grids:
        text.rope_parameters["mrope_section"] = [4, 6, 6]
        setattr(config.vision_config, "hidden_size" if family == "qwen2_vl" else "out_hidden_size", 128)
    if text.to_dict().get("head_dim"):
        text.head_dim = 32
    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng(devices=()), torch.no_grad():
        torch.manual_seed(0)
        model = (AutoModelForImageTextToText if vision else AutoModelForCausalLM).from_config(config)
        vocabulary = model.get_input_embeddings().num_embeddings
        for parameter in model.parameters():
            if parameter.ndim > 1:
                if not parameter.any():  # what training would begin with shows nothing
                    torch.nn.init.normal_(parameter, std=0.02)
                # LLaVA-OneVision norms nothing between tower and decoder, so rounding there grows
                plain = 4 if family == "llava_onevision" else 8
                parameter.mul_(6 if len(parameter) == vocabulary else plain)
            else:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.generation_config = GenerationConfig.from_pretrained(folder)
    # ordinary tokens end completions too, so that random ones are ragged
    model.generation_config.eos_token_id = [*model.generation_config.eos_token_id, *range(31, 39)]
    model.save_pretrained(folder)
    return folder
