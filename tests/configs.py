"""Sections of a run's configuration as in `conf/`, with changes: defaults live there alone."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from rlmed.cluster.engines import make_renderer
from rlmed.core.config.composing import compose_config
from rlmed.core.config.schema import (
    AlgoConfig,
    DataConfig,
    LearnerConfig,
    LoraConfig,
    LossConfig,
    RunConfig,
    SelectionConfig,
)
from rlmed.data.prompts import PromptRenderer


@functools.cache
def _defaults() -> RunConfig:
    return compose_config("train", ["data=jsonl"])


def algo_config(**changes: Any) -> AlgoConfig:
    """`algo_config(groups_per_step=2)`."""
    return dataclasses.replace(_defaults().algo, **changes)


def loss_config(**changes: Any) -> LossConfig:
    """`loss_config(kl_coef=0.0)`: GRPO without a reference."""
    return dataclasses.replace(_defaults().algo.loss, **changes)


def learner_config(**changes: Any) -> LearnerConfig:
    """`learner_config(lr=1e-3)`."""
    return dataclasses.replace(_defaults().learner, **changes)


def lora_config(**changes: Any) -> LoraConfig:
    """`lora_config(rank=4)`: adapters of the language model, without dropout."""
    return dataclasses.replace(_defaults().learner.lora, **changes)


def data_config(**changes: Any) -> DataConfig:
    """`data_config(shuffle_options=True)`: questions of one's own."""
    return dataclasses.replace(_defaults().data, **changes)


def selection_config(mode: str, **changes: Any) -> SelectionConfig:
    """`selection_config("pass_rate", window=2)`."""
    return dataclasses.replace(_defaults().data.selection, mode=mode, **changes)


def renderer_of(config: RunConfig) -> PromptRenderer:
    """The renderer that a run with this configuration has."""
    return make_renderer(config.model, config.data, config.prompt, freeze=config.learner.freeze)
