"""Models of real geometry with random weights, the paper's prompts, timing on a device."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from benchmarks.common import DEFAULT_MODEL, make_renderer, render_prompts, write_examples
from rlmed.core.types import Prompt
from rlmed.models.loading import model_folder

PATCH = 28
"""Pixels along one side of what becomes a visual token."""
COMMON_LOGIT = -120.0
"""What the heads' scores have in common, as in Qwen: it must not spoil their differences."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes of a Qwen2-VL model."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    tied: bool
    vision_depth: int
    vision_width: int
    vocabulary: int = 151936

    def config(self, tokens: dict[str, Any]) -> Qwen2VLConfig:
        """Return the configuration; `tokens` are the ids of its control tokens."""
        quarter = self.hidden // self.heads // 8
        return Qwen2VLConfig(
            text_config={
                "hidden_size": self.hidden,
                "num_hidden_layers": self.layers,
                "num_attention_heads": self.heads,
                "num_key_value_heads": self.kv_heads,
                "intermediate_size": self.intermediate,
                "vocab_size": self.vocabulary,
                "max_position_embeddings": 32768,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e6,
                    "mrope_section": [quarter, 3 * quarter // 2, 3 * quarter // 2],
                },
                "tie_word_embeddings": self.tied,
            },
            vision_config={
                "depth": self.vision_depth,
                "embed_dim": self.vision_width,
                "num_heads": self.vision_width // 80,
                "mlp_ratio": 4,
                "hidden_size": self.hidden,
            },
            tie_word_embeddings=self.tied,
            **tokens,
        )


GEOMETRIES = {
    "small": Geometry(256, 2, 4, 2, 512, True, 2, 160),  # proves that everything runs
    "2b": Geometry(1536, 28, 12, 2, 8960, True, 32, 1280),  # Qwen2-VL-2B-Instruct
    "7b": Geometry(3584, 28, 28, 4, 18944, False, 32, 1280, vocabulary=152064),  # Qwen2-VL-7B-Instruct
}


def model_folder_of(
    name: str, folder: Path, device: torch.device, visual_tokens: int, common_logit: float = COMMON_LOGIT
) -> Path:
    """Write a model folder of this geometry, or a copy of the tiny one, with larger images.

    Args:
        name: of `GEOMETRIES`, or "tiny".
        folder: written if it does not exist.
        device: makes the random weights.
        visual_tokens: of every image, rounded up to a square: 512 become 23 x 23.
        common_logit: of random weights' heads.
    """
    if folder.exists():
        return folder
    tiny = model_folder(DEFAULT_MODEL)
    aside = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    keep = None if name == "tiny" else shutil.ignore_patterns("*.safetensors")
    shutil.copytree(tiny, aside, ignore=keep)
    if name != "tiny":
        small = json.loads((tiny / "config.json").read_text())
        tokens = {key: value for key, value in small.items() if key.endswith("_token_id") and value is not None}
        random_model(GEOMETRIES[name].config(tokens), device, common_logit).save_pretrained(aside)
    processor = aside / "preprocessor_config.json"
    settings = json.loads(processor.read_text())
    pixels = visual_tokens * PATCH**2
    settings |= {"min_pixels": pixels, "max_pixels": pixels, "size": {"shortest_edge": pixels, "longest_edge": pixels}}
    processor.write_text(json.dumps(settings))
    aside.rename(folder)
    return folder


@torch.no_grad()
def random_model(
    config: Qwen2VLConfig, device: torch.device, common_logit: float = COMMON_LOGIT
) -> Qwen2VLForConditionalGeneration:
    """Build a model with random bfloat16 weights and scores near `common_logit`."""
    with torch.device("meta"):
        model = Qwen2VLForConditionalGeneration(config).to(torch.bfloat16)
    model = model.to_empty(device=device)
    model.tie_weights()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight") or (".norm" in name and name.endswith("weight")):
            parameter.fill_(1.0)
        else:
            parameter.normal_(std=0.02)
    text = config.text_config
    width = text.hidden_size // text.num_attention_heads
    # the slowest channel turns by less than 0.01 in 8,000 positions: its product is the same for
    # all
    slowest = width // 2 - 1
    bias = (-common_logit * width**0.5) ** 0.5
    for layer in model.model.language_model.layers:
        layer.self_attn.q_proj.bias.view(-1, width)[:, slowest] = bias
        layer.self_attn.k_proj.bias.view(-1, width)[:, slowest] = -bias
    return model


def make_prompts(folder: Path, count: int, length: int, scratch: Path) -> tuple[list[Prompt], Any]:
    """Render `count` prompts with an image, stretched to `length` tokens; also return the renderer.

    Raises:
        ValueError: if a prompt is longer already.
    """
    renderer = make_renderer(folder)
    prompts = render_prompts(renderer, write_examples(scratch / "questions", count))
    return [_stretch(prompt, length) for prompt in prompts], renderer


def _stretch(prompt: Prompt, length: int) -> Prompt:
    """Repeat words at the end of a prompt's question until it has `length` tokens."""
    missing = length - len(prompt.token_ids)
    if missing < 0:
        raise ValueError(f"a prompt has {len(prompt.token_ids)} tokens already: it cannot be cut to {length}")
    end = len(prompt.token_ids) - 10
    filler = np.resize(prompt.token_ids[end - 12 : end], missing)
    ids = np.concatenate([prompt.token_ids[:end], filler, prompt.token_ids[end:]])
    return dataclasses.replace(prompt, token_ids=ids)


def device_of(arguments: argparse.Namespace) -> torch.device:
    """Return the device to measure."""
    return torch.device("cpu" if arguments.smoke or not torch.cuda.is_available() else "cuda")


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], object], device: torch.device, *, rounds: int, warmup: int = 2) -> float:
    """Return the median wall time of one call, the device's work included."""
    taken = []
    for turn in range(warmup + rounds):
        synchronise(device)
        start = time.perf_counter()
        work()
        synchronise(device)
        if turn >= warmup:
            taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def batched_seconds(work: Callable[[], object], device: torch.device, *, calls: int) -> float:
    """Return the time of one call among many without waiting in between."""

    def many() -> None:
        for _ in range(calls):
            work()

    return seconds(many, device, rounds=3, warmup=1) / calls


@dataclass
class PeakMemory:
    """Largest memory of the device between two calls; on a CPU nothing is known."""

    device: torch.device

    def start(self) -> None:
        """Begin to measure."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def gib(self) -> float | None:
        """Return the peak in GiB; None on a CPU."""
        return torch.cuda.max_memory_allocated(self.device) / 2**30 if self.device.type == "cuda" else None


def rounded(values: dict[str, Any]) -> dict[str, Any]:
    """Round the numbers to four digits, for the result file."""
    return {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in values.items()}


def lines(rows: Sequence[dict[str, Any]], keys: Sequence[str]) -> list[str]:
    """Format rows as a table: a line of names, then one a row."""
    cells = [list(keys), *([_cell(row.get(key)) for key in keys] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(keys))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str("-" if value is None else value)
