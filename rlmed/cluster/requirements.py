"""Refuse what this machine lacks before anything is read, written or sampled."""

from __future__ import annotations

import importlib.util
import os

import torch

from learner.moments import check_eight_bits
from rlmed.core.config.schema import ModelConfig, RunConfig
from rlmed.models.adapters import check_peft
from rlmed.models.loading import check_dtype, resolve_device
from rlmed.models.quantized import check_four_bits

NO_RAY = "cluster=ray needs Ray: pip install -c requirements.lock -e '.[ray]' in rlmed's checkout"


def check_device(model: ModelConfig) -> torch.device:
    """Return the model's device; ValueError if it is not there, or lacks the dtype."""
    check_dtype(model)
    return resolve_device(model)


def check_machine(config: RunConfig, *, learns: bool) -> None:
    """Check that the run's device and libraries are there.

    What only the workers need is checked if they run on this machine, in this environment; in a
    cluster that is already up they may have what this machine lacks.

    Args:
        config: of any command.
        learns: whether the command trains.

    Raises:
        ValueError: names the setting, what is missing and what to do.
    """
    cluster = config.cluster
    if cluster.kind == "ray" and importlib.util.find_spec("ray") is None:
        raise ValueError(NO_RAY)
    elsewhere = cluster.kind == "ray" and bool(cluster.address or os.environ.get("RAY_ADDRESS") or cluster.runtime_env)
    if elsewhere:
        return
    device = check_device(config.model)
    if config.rollout.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        from rollout.vllm_backend.environment import NOT_INSTALLED

        raise ValueError(NOT_INSTALLED)
    if not learns:
        return
    if config.learner.lora.rank is not None:
        check_peft()
    if config.learner.lora.quantize:
        check_four_bits(device)
    if config.learner.moments == "8bit":
        check_eight_bits()
