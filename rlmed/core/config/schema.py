"""Configuration as typed records, validated once: Hydra composes a mapping, `building` checks it.

Each part of the program receives only its own section. A key is documented above its value in
`conf/`, the only source of defaults: no field has one here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from rlmed.core.config.checks import PRODUCT_USES, require, require_one_of
from rlmed.core.config.rewarding import RewardConfig
from rlmed.core.config.running import (
    LOGGERS,
    CheckpointConfig,
    ClusterConfig,
    DebugConfig,
    EvalConfig,
    LoggingConfig,
    PreflightConfig,
    ReliabilityConfig,
    RolloutConfig,
    SftConfig,
)

MAX_SEED = 2**40
"""Larger seeds would overflow, multiplied, the 64-bit seeds of completions."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model to load, and how."""

    path: str
    dtype: str
    device: str
    min_pixels: int | None
    max_pixels: int | None
    onednn: tuple[str, ...] | None
    compiled_decode: bool | None

    def __post_init__(self) -> None:
        for use in self.onednn or ():
            require_one_of("model.onednn", use, PRODUCT_USES)
        require_one_of("model.dtype", self.dtype, ("auto", "float32", "bfloat16"))
        require(
            re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device) is not None,
            f"Invalid model.device={self.device!r}; expected auto, cpu, cuda, or cuda:N for one of several",
        )
        for key, value in (("min_pixels", self.min_pixels), ("max_pixels", self.max_pixels)):
            require(value is None or value > 0, f"model.{key}={value} must be positive or null")
        pixels = (self.min_pixels or 0, self.max_pixels or 2**62)
        require(pixels[0] <= pixels[1], f"model.min_pixels={pixels[0]} exceeds model.max_pixels={pixels[1]}")


@dataclass(frozen=True, kw_only=True)
class SelectionConfig:
    """Which training prompts to skip for a while; see `rlmed.data.curriculum.PassRates`."""

    mode: str
    window: int
    min_pass_rate: float
    max_pass_rate: float
    cooldown_epochs: int

    def __post_init__(self) -> None:
        require_one_of("data.selection.mode", self.mode, ("all", "pass_rate"))
        require(self.window >= 1, f"data.selection.window={self.window} must be at least 1")
        require(
            0 <= self.min_pass_rate < self.max_pass_rate <= 1,
            f"data.selection.min_pass_rate={self.min_pass_rate} and data.selection.max_pass_rate={self.max_pass_rate} must "
            "satisfy 0 <= min < max <= 1: prompts with a pass rate between them are kept",
        )
        require(
            self.cooldown_epochs >= 1,
            f"data.selection.cooldown_epochs={self.cooldown_epochs} must be at least 1 epoch: to use all prompts, set "
            "data.selection.mode=all",
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Data sources, and how questions become prompts."""

    source: str
    train: str | None
    eval: tuple[str, ...]
    phantom_seed: int
    phantom_folder: str | None
    task: str | None
    max_prompt_tokens: int
    max_images: int | None
    shuffle_options: bool
    mix: Mapping[str, float] | None
    selection: SelectionConfig
    on_bad_row: str
    leakage: str
    limit: int | None
    download: str | None
    extra_tasks: tuple[str, ...]
    synonyms: str | None
    box_frame: str

    def __post_init__(self) -> None:
        require_one_of("data.source", self.source, ("jsonl", "phantom"))
        require_one_of("data.on_bad_row", self.on_bad_row, ("skip", "error"))
        require_one_of("data.leakage", self.leakage, ("report", "strict", "off"))
        require_one_of("data.box_frame", self.box_frame, ("auto", "thousandths", "pixels"))
        if self.task is not None:
            require_one_of("data.task", self.task, ("open", "grounding", "labels", "report", "mixed"))
        require(self.phantom_seed >= 0, f"data.phantom_seed={self.phantom_seed} must not be negative")
        require(self.max_prompt_tokens > 0, f"data.max_prompt_tokens={self.max_prompt_tokens} must be positive")
        require(
            self.max_images is None or self.max_images > 0,
            f"data.max_images={self.max_images} must be positive or null",
        )
        require(self.limit is None or self.limit > 0, f"data.limit={self.limit} must be positive or null")
        require(
            self.mix is None or len(self.mix) > 0, "data.mix={} names no modality: give shares, or null for all rows"
        )
        for name, share in (self.mix or {}).items():
            require(
                0 < share < math.inf,
                f"data.mix.{name}={share} must be a positive number: omit a modality to draw none of it",
            )


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """Prompt templates; see `rlmed.data.prompts.PromptRenderer`."""

    template: str
    by_modality: Mapping[str, str]
    by_task: Mapping[str, str]

    def __post_init__(self) -> None:
        named = {f"{key}.{k}": v for key in ("by_modality", "by_task") for k, v in getattr(self, key).items()}
        for key, text in {"template": self.template, **named}.items():
            require(
                text.count("{question}") == 1,
                f"prompt.{key}={text!r} must contain {{question}} exactly once, where question and options go",
            )


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Settings of the policy loss: formulas in `learner.losses`, keys and defaults in `conf/algo/`.

    Example:
        `compose_config("train", ["algo=dapo"]).algo.loss.clip_ratio_high` is 0.28.
    """

    ratio_level: str
    clip: str
    clip_ratio_low: float
    """Lowest ratio is 1 - clip_ratio_low; in (0, 1], 1 means no lower bound."""
    clip_ratio_high: float
    """Highest ratio is 1 + clip_ratio_high; larger than clip_ratio_low is DAPO's clip-higher."""
    dual_clip: float
    """Highest ratio of a completion with negative advantage for clip="dual"; above 1."""
    kl_coef: float
    kl_estimator: str
    aggregation: str
    old_logprobs: str
    importance_cap: float | None
    """Highest weight exp(old_logprobs - rollout_logprobs) of a token; at least 1.

    None: every weight is 1.
    """
    mask_truncated: bool

    def __post_init__(self) -> None:
        require_one_of("algo.loss.ratio_level", self.ratio_level, ("token", "sequence"))
        require_one_of("algo.loss.clip", self.clip, ("ppo", "dual", "cispo", "none"))
        require_one_of("algo.loss.kl_estimator", self.kl_estimator, ("k1", "k2", "k3", "none"))
        require_one_of("algo.loss.aggregation", self.aggregation, ("sequence_mean", "token_mean", "sequence_sum"))
        require_one_of("algo.loss.old_logprobs", self.old_logprobs, ("learner", "rollout"))
        require(0 < self.clip_ratio_low <= 1, f"algo.loss.clip_ratio_low={self.clip_ratio_low} must be in (0, 1]")
        require(
            0 < self.clip_ratio_high < math.inf,
            f"algo.loss.clip_ratio_high={self.clip_ratio_high} must be positive and finite",
        )
        require(1 < self.dual_clip < math.inf, f"algo.loss.dual_clip={self.dual_clip} must be finite and above 1")
        require(0 <= self.kl_coef < math.inf, f"algo.loss.kl_coef={self.kl_coef} must be finite: 0 means no penalty")
        require(
            self.kl_coef == 0 or self.kl_estimator != "none",
            f"algo.loss.kl_coef={self.kl_coef} needs an estimator: set algo.loss.kl_estimator=k3, or algo.loss.kl_coef=0",
        )
        require(
            self.importance_cap is None or 1 <= self.importance_cap < math.inf,
            f"algo.loss.importance_cap={self.importance_cap} must be finite and at least 1, or null: below 1 even tokens "
            "without mismatch would be scaled down",
        )


@dataclass(frozen=True, kw_only=True)
class AlgoConfig:
    """Settings of the policy-gradient algorithm; docs/papers.md gives the source of each."""

    group_size: int
    groups_per_step: int
    advantage: str
    normalize_by: str | None
    dynamic_sampling: bool
    max_refills: int
    max_staleness: int
    loss: LossConfig

    def __post_init__(self) -> None:
        require_one_of("algo.advantage", self.advantage, ("grpo", "dr_grpo", "rloo"))
        require(
            self.normalize_by in (None, "modality"),
            f"Invalid algo.normalize_by={self.normalize_by!r}; expected modality or null",
        )
        require(
            self.group_size >= 2,
            f"algo.group_size={self.group_size} must be at least 2 for the group-relative advantage {self.advantage!r}: "
            "it compares a completion with the others of its group",
        )
        require(self.groups_per_step >= 1, f"algo.groups_per_step={self.groups_per_step} must be at least 1")
        require(self.max_staleness >= 0, f"algo.max_staleness={self.max_staleness} must not be negative")
        require(self.max_refills >= 0, f"algo.max_refills={self.max_refills} must not be negative")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters; see `rlmed.models.adapters`."""

    rank: int | None
    alpha: float
    target: tuple[str, ...]
    dropout: float
    quantize: str | None

    def __post_init__(self) -> None:
        require(self.rank is None or self.rank >= 1, f"learner.lora.rank={self.rank} must be at least 1, or null")
        require(self.alpha > 0, f"learner.lora.alpha={self.alpha} must be positive")
        for part in self.target:
            require_one_of("learner.lora.target", part, ("vision", "merger", "language_model"))
        require(bool(self.target), "learner.lora.target=[] names no part of the model: nothing would be trained")
        require(0 <= self.dropout < 1, f"learner.lora.dropout={self.dropout} must be in [0, 1)")
        require(
            self.quantize in (None, "nf4"), f"Invalid learner.lora.quantize={self.quantize!r}; expected nf4 or null"
        )


@dataclass(frozen=True, kw_only=True)
class LearnerConfig:
    """Optimizer, batching, freezing and adapters."""

    lr: float
    lr_schedule: str
    warmup_steps: int
    betas: tuple[float, float]
    weight_decay: float
    max_grad_norm: float
    token_budget: int
    epochs: int
    mini_batches: int
    gradient_checkpointing: bool | None
    moments: str
    freeze: tuple[str, ...]
    lora: LoraConfig

    def __post_init__(self) -> None:
        require_one_of("learner.lr_schedule", self.lr_schedule, ("constant", "linear", "cosine"))
        require_one_of("learner.moments", self.moments, ("float32", "bfloat16", "8bit"))
        require(self.lr > 0, f"learner.lr={self.lr} must be positive")
        require(self.warmup_steps >= 0, f"learner.warmup_steps={self.warmup_steps} must not be negative")
        require(
            all(0 <= beta < 1 for beta in self.betas),
            f"learner.betas={list(self.betas)} must be in [0, 1), as [0.9, 0.999]",
        )
        require(self.weight_decay >= 0, f"learner.weight_decay={self.weight_decay} must not be negative")
        require(self.max_grad_norm > 0, f"learner.max_grad_norm={self.max_grad_norm} must be positive")
        require(self.token_budget >= 1, f"learner.token_budget={self.token_budget} must be at least 1")
        require(self.epochs >= 1, f"learner.epochs={self.epochs} must be at least 1")
        require(self.mini_batches >= 1, f"learner.mini_batches={self.mini_batches} must be at least 1")
        for part in self.freeze:
            require_one_of("learner.freeze", part, ("vision", "merger", "language_model"))
        require(len(set(self.freeze)) < 3, "learner.freeze names every part of the model: nothing would be trained")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Configuration of a run."""

    name: str
    seed: int
    steps: int
    model: ModelConfig
    data: DataConfig
    prompt: PromptConfig
    algo: AlgoConfig
    reward: RewardConfig
    rollout: RolloutConfig
    learner: LearnerConfig
    cluster: ClusterConfig
    eval: EvalConfig
    reliability: ReliabilityConfig
    checkpoint: CheckpointConfig
    preflight: PreflightConfig
    sft: SftConfig
    debug: DebugConfig
    loggers: tuple[str, ...]
    logging: LoggingConfig
    profile: str | None
    resume: str | None
    compare_to: str | None

    def __post_init__(self) -> None:
        require(bool(self.name.strip()), f"name={self.name!r} must not be empty: it names the run's folder")
        require(self.steps >= 1, f"steps={self.steps} must be at least 1")
        for logger in self.loggers:
            require_one_of("loggers", logger, LOGGERS)
        require(0 <= self.seed <= MAX_SEED, f"seed={self.seed} must be between 0 and {MAX_SEED}")
        require(
            self.rollout.engine != "vllm" or self.cluster.kind == "ray",
            f"rollout.engine={self.rollout.engine} runs in its own worker process: use cluster=ray",
        )
        require(
            self.reward.slow.workers == 0 or self.cluster.kind == "ray",
            f"reward.slow.workers={self.reward.slow.workers} are Ray's processes: use cluster=ray, or reward.slow.workers=0, "
            "which calls rewards in threads",
        )
        require(
            self.cluster.kind == "local" or ":" not in self.model.device,
            f"model.device={self.model.device} is not supported with cluster=ray, where Ray assigns GPUs to each process: "
            "use model.device=cuda, and CUDA_VISIBLE_DEVICES to hide GPUs from Ray",
        )
        require(
            self.rollout.tensor_parallel_size == 1
            or self.cluster.gpus_per_worker is None
            or self.cluster.gpus_per_worker >= self.rollout.tensor_parallel_size,
            f"cluster.gpus_per_worker={self.cluster.gpus_per_worker} is less than rollout.tensor_parallel_size="
            f"{self.rollout.tensor_parallel_size}, the GPUs of an engine: use cluster.gpus_per_worker=null",
        )
        require(
            not self.rollout.sleep or (self.rollout.engine == "vllm" and self.algo.max_staleness == 0),
            f"rollout.sleep=true with rollout.engine={self.rollout.engine} and algo.max_staleness={self.algo.max_staleness}: "
            "only vLLM can sleep, and not while it samples for later steps. Use rollout=vllm and "
            "algo.max_staleness=0, or rollout.sleep=null",
        )
        require(
            self.rollout.max_mismatch_kl is None
            or (self.algo.max_staleness == 0 and self.algo.loss.old_logprobs == "learner"),
            f"rollout.max_mismatch_kl={self.rollout.max_mismatch_kl} compares engine and learner at the same weights: it needs "
            "algo.max_staleness=0 and algo.loss.old_logprobs=learner",
        )
        require(
            self.data.selection.mode != "pass_rate" or not {"choice", "task"}.isdisjoint(self.reward.weights),
            f"data.selection.mode={self.data.selection.mode} needs the reward part choice or task, which reward.weights lacks: "
            "add reward.weights.choice, with weight 0 if it should not count (+reward.weights.choice=0)",
        )
        require(
            self.learner.lora.quantize is None or self.cluster.learner_ranks == 1,
            f"learner.lora.quantize={self.learner.lora.quantize} works in one learner rank only: set "
            "cluster.learner_ranks=1, or learner.lora.quantize=null",
        )
        require(
            self.learner.mini_batches <= self.algo.groups_per_step,
            f"learner.mini_batches={self.learner.mini_batches} exceeds algo.groups_per_step={self.algo.groups_per_step}: "
            "a mini-batch needs at least one group",
        )

    def check_groups(self) -> None:
        """Check that a training group fits one sampling batch; evaluations sample once per prompt.

        Raises:
            ConfigError: if a group is larger than rollout.max_completions.
        """
        require(
            self.algo.group_size <= self.rollout.max_completions,
            f"algo.group_size={self.algo.group_size} exceeds rollout.max_completions={self.rollout.max_completions}: "
            "a group is sampled together, so raise rollout.max_completions",
        )

    def check_samples(self) -> None:
        """Check that the samples of a question fit into one sampling batch.

        Raises:
            ConfigError: if there are more than rollout.max_completions.
        """
        require(
            self.reliability.samples <= self.rollout.max_completions,
            f"reliability.samples={self.reliability.samples} exceeds rollout.max_completions="
            f"{self.rollout.max_completions}: all samples of a question are drawn together, so raise rollout.max_completions",
        )
