"""Resolve a run's model folder, device and dtype."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from rlmed.core.config.schema import DataConfig, ModelConfig
from rlmed.models.folder.agreement import position_doubt
from rlmed.models.policy import load_config
from rlmed.models.tiny.toy import EMBEDDED, shipped_folder

log = logging.getLogger(__name__)
NATIVE = (8, 0)
"""Lowest compute capability of GPUs that compute in bfloat16 themselves (Ampere)."""


def model_folder(path: str) -> Path:
    """Return the model's path: `embedded:NAME` is rlmed's own, others are folders or hub names.

    Raises:
        ValueError: for an unknown embedded model.
    """
    return shipped_folder(path) if path.startswith(EMBEDDED) else Path(path)


def resolve_device(config: ModelConfig) -> torch.device:
    """Resolve `model.device` on this machine.

    Raises:
        ValueError: for a CUDA device that is not available.
    """
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"model.device={config.device}: torch sees no CUDA device here; use model.device=cpu or auto")
    device = torch.device(config.device)
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise ValueError(
            f"model.device={config.device}: torch sees {torch.cuda.device_count()} CUDA devices, numbered from cuda:0"
        )
    return device


def check_dtype(config: ModelConfig) -> None:
    """Raise ValueError for `model.dtype=bfloat16` on a CUDA device that only emulates it."""
    device = resolve_device(config)
    if config.dtype == "bfloat16" and device.type == "cuda" and torch.cuda.get_device_capability(device) < NATIVE:
        raise ValueError(
            f"model.dtype=bfloat16: {torch.cuda.get_device_name(device)} has no bfloat16 of its own; use "
            "model.dtype=float32 or auto"
        )


def resolve_dtype(config: ModelConfig) -> str:
    """Resolve `model.dtype` on this machine."""
    if config.dtype != "auto":
        return config.dtype
    device = resolve_device(config)
    # on CPUs float32 is exact and fused; bfloat16 is opt-in
    native = device.type == "cuda" and torch.cuda.get_device_capability(device) >= NATIVE
    return "bfloat16" if native else "float32"


def check_positions(model: ModelConfig, data: DataConfig, *, max_tokens: int) -> None:
    """Warn if the longest prompt plus `max_tokens` of completion exceeds the model's positions."""
    longest = data.max_prompt_tokens
    doubt = position_doubt(
        load_config(model_folder(model.path)),
        tokens=longest + max_tokens,
        what=f"data.max_prompt_tokens={longest} and {max_tokens} completion tokens",
        advice="data.max_prompt_tokens, rollout.max_tokens or eval.max_tokens",
    )
    if doubt:
        log.warning("%s", doubt)
