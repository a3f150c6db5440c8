"""The configuration as typed records, validated once at the edge: Hydra composes a mapping, `config_building` checks it.

Each part of the program receives its own sub-config only. What a key means is said above it in `conf/`, the only place for its
default: no field has one here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from rlmed.core.config_checks import PRODUCT_USES, require, require_one_of
from rlmed.core.config_running import (
    CheckpointConfig,
    ClusterConfig,
    DebugConfig,
    EvalConfig,
    PreflightConfig,
    RolloutConfig,
    SftConfig,
)

MAX_SEED = 2**40
"""Larger ones would not fit, multiplied, into the 64-bit seeds of completions."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model, and how it is held."""

    path: str
    dtype: str
    device: str
    min_pixels: int | None
    max_pixels: int | None
    onednn: tuple[str, ...] | None

    def __post_init__(self) -> None:
        for use in self.onednn or ():
            require_one_of("model.onednn", use, PRODUCT_USES)
        require_one_of("model.dtype", self.dtype, ("auto", "float32", "bfloat16"))
        require(
            re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device) is not None,
            f"model.device={self.device!r} is not possible: use auto, cpu, cuda, or cuda:N for one of several",
        )
        for key, value in (("min_pixels", self.min_pixels), ("max_pixels", self.max_pixels)):
            require(value is None or value > 0, f"model.{key}={value} must be positive or null")
        pixels = (self.min_pixels or 0, self.max_pixels or 2**62)
        require(pixels[0] <= pixels[1], f"model.min_pixels={pixels[0]} exceeds model.max_pixels={pixels[1]}")


@dataclass(frozen=True, kw_only=True)
class SelectionConfig:
    """Which training prompts are passed over for a while; see `rlmed.data.curriculum.PassRates`."""

    mode: str
    min_visits: int
    low: float
    high: float
    retest_after: int

    def __post_init__(self) -> None:
        require_one_of("data.selection.mode", self.mode, ("all", "pass_rate"))
        require(self.min_visits >= 1, f"data.selection.min_visits={self.min_visits} must be at least 1")
        require(
            0 <= self.low < self.high <= 1,
            f"data.selection.low={self.low} and data.selection.high={self.high} must satisfy 0 <= low < high <= 1: prompts "
            "with a pass rate between them are kept",
        )
        require(
            self.retest_after >= 1,
            f"data.selection.retest_after={self.retest_after} must be at least 1 epoch: to take all prompts, set "
            "data.selection.mode=all",
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where questions come from and how they become prompts."""

    source: str
    train: str | None
    eval: tuple[str, ...]
    phantom_seed: int
    phantom_folder: str | None
    max_prompt_tokens: int
    shuffle_options: bool
    mix: Mapping[str, float] | None
    selection: SelectionConfig
    on_bad_row: str
    leakage: str
    limit: int | None
    download: str | None

    def __post_init__(self) -> None:
        require_one_of("data.source", self.source, ("jsonl", "phantom"))
        require_one_of("data.on_bad_row", self.on_bad_row, ("skip", "error"))
        require_one_of("data.leakage", self.leakage, ("report", "strict", "off"))
        require(self.phantom_seed >= 0, f"data.phantom_seed={self.phantom_seed} must not be negative")
        require(self.max_prompt_tokens > 0, f"data.max_prompt_tokens={self.max_prompt_tokens} must be positive")
        require(self.limit is None or self.limit > 0, f"data.limit={self.limit} must be positive or null")
        require(
            self.mix is None or len(self.mix) > 0, "data.mix={} names no modality: give shares, or null for all rows"
        )
        for name, share in (self.mix or {}).items():
            require(
                0 < share < math.inf,
                f"data.mix.{name}={share} must be a positive number: leave a modality out to draw nothing of it",
            )


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """What is asked; see `rlmed.data.prompts.PromptRenderer`."""

    template: str
    by_modality: Mapping[str, str]

    def __post_init__(self) -> None:
        for key, text in (("template", self.template), *((f"by_modality.{k}", v) for k, v in self.by_modality.items())):
            require(
                text.count("{question}") == 1,
                f"prompt.{key} must hold {{question}} exactly once, where question and options go; it is {text!r}",
            )


@dataclass(frozen=True, kw_only=True)
class AlgoConfig:
    """The policy-gradient algorithm as settings; docs/papers.md gives the source of each.

    The keys of the loss are checked where they are used, by `learner.losses.PolicyLossConfig`, before anything is loaded.
    """

    group_size: int
    groups_per_step: int
    advantage: str
    normalize_by: str | None
    ratio_level: str
    clip: str
    clip_ratio_low: float
    clip_ratio_high: float
    dual_clip: float
    kl_coef: float
    kl_estimator: str
    aggregation: str
    old_logprobs: str
    importance_cap: float | None
    dynamic_sampling: bool
    max_refills: int
    mask_truncated: bool
    max_staleness: int

    def __post_init__(self) -> None:
        require_one_of("algo.advantage", self.advantage, ("grpo", "dr_grpo", "rloo"))
        require(
            self.normalize_by in (None, "modality"),
            f"algo.normalize_by={self.normalize_by!r} is not possible: choose modality or null",
        )
        require_one_of("algo.old_logprobs", self.old_logprobs, ("learner", "rollout"))
        require(
            self.group_size >= 2,
            f"algo.group_size={self.group_size} is not possible with the group-relative advantage {self.advantage!r}: "
            "a completion is compared with the others of its group, so set algo.group_size to 2 or more",
        )
        require(self.groups_per_step >= 1, f"algo.groups_per_step={self.groups_per_step} must be at least 1")
        require(self.max_staleness >= 0, f"algo.max_staleness={self.max_staleness} must not be negative")
        require(self.max_refills >= 0, f"algo.max_refills={self.max_refills} must not be negative")


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """What a completion is rewarded for."""

    weights: Mapping[str, float]
    extra: tuple[str, ...]
    timeout_s: float

    def __post_init__(self) -> None:
        require(
            any(self.weights.values()) or bool(self.extra),
            f"reward.weights={dict(self.weights)} rewards nothing: give at least one reward a weight other than 0",
        )
        require(self.timeout_s > 0, f"reward.timeout_s={self.timeout_s} must be positive")


@dataclass(frozen=True, kw_only=True)
class LearnerConfig:
    """How the policy is updated."""

    lr: float
    lr_schedule: str
    warmup_steps: int
    betas: tuple[float, float]
    weight_decay: float
    max_grad_norm: float
    token_budget: int
    epochs: int
    mini_batches: int
    gradient_checkpointing: bool
    freeze: tuple[str, ...]

    def __post_init__(self) -> None:
        require_one_of("learner.lr_schedule", self.lr_schedule, ("constant", "linear", "cosine"))
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
        require(len(set(self.freeze)) < 3, "learner.freeze names every part: nothing would be trained")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run."""

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
    checkpoint: CheckpointConfig
    preflight: PreflightConfig
    sft: SftConfig
    debug: DebugConfig
    profile: str
    resume: str | None
    before: str | None

    def __post_init__(self) -> None:
        require(bool(self.name.strip()), f"name={self.name!r} must not be empty: the run's folder is called so")
        require(self.steps >= 1, f"steps={self.steps} must be at least 1")
        require(0 <= self.seed <= MAX_SEED, f"seed={self.seed} must be between 0 and {MAX_SEED}")
        require_one_of("profile", self.profile, ("auto", "embedded", "paper"))
        require(
            not self.eval.trust or self.eval.samples <= self.rollout.max_completions,
            f"eval.samples={self.eval.samples} exceeds rollout.max_completions={self.rollout.max_completions}: the samples of "
            "a question are drawn together, so raise rollout.max_completions",
        )
        require(
            self.rollout.engine != "vllm" or self.cluster.kind == "ray",
            f"rollout.engine={self.rollout.engine} runs in a worker of its own, which rlmed.launch alone has: add cluster=ray "
            "there",
        )
        require(
            self.cluster.kind == "local" or ":" not in self.model.device,
            f"model.device={self.model.device} has no meaning with cluster=ray, where Ray gives each process GPUs of its own: "
            "use model.device=cuda, and CUDA_VISIBLE_DEVICES to keep some from Ray",
        )
        require(
            self.rollout.engine == "vllm" or self.cluster.weight_transfer in ("auto", "object_store"),
            f"cluster.weight_transfer={self.cluster.weight_transfer} is a way to vLLM's engines: use rollout=vllm, or auto",
        )
        require(
            self.rollout.tensor_parallel_size == 1
            or self.cluster.worker_gpus is None
            or self.cluster.worker_gpus >= self.rollout.tensor_parallel_size,
            f"cluster.worker_gpus={self.cluster.worker_gpus} is less than rollout.tensor_parallel_size="
            f"{self.rollout.tensor_parallel_size}, the GPUs of an engine: use cluster.worker_gpus=null",
        )
        require(
            not self.rollout.sleep or (self.rollout.engine == "vllm" and self.algo.max_staleness == 0),
            f"rollout.sleep=true with rollout.engine={self.rollout.engine} and algo.max_staleness={self.algo.max_staleness}: "
            "only vLLM's engine can sleep, and not while it samples for later steps. Use rollout=vllm and "
            "algo.max_staleness=0, or rollout.sleep=null",
        )
        require(
            self.rollout.max_mismatch_kl is None
            or (self.algo.max_staleness == 0 and self.algo.old_logprobs == "learner"),
            f"rollout.max_mismatch_kl={self.rollout.max_mismatch_kl} compares engine and learner at the same weights: it needs "
            "algo.max_staleness=0 and algo.old_logprobs=learner",
        )
        require(
            self.data.selection.mode != "pass_rate" or "choice" in self.reward.weights,
            f"data.selection.mode={self.data.selection.mode} goes by the reward part choice, which reward.weights lacks: add "
            "reward.weights.choice, with the weight 0 if it shall not count (+reward.weights.choice=0)",
        )
        require(
            self.learner.mini_batches <= self.algo.groups_per_step,
            f"learner.mini_batches={self.learner.mini_batches} exceeds algo.groups_per_step={self.algo.groups_per_step}: "
            "a mini-batch needs a group at least",
        )

    def check_groups(self) -> None:
        """Make sure that the groups of training can be sampled; evaluations sample one completion of a prompt.

        Raises:
            ConfigError: where a group is larger than what is sampled at once.
        """
        require(
            self.algo.group_size <= self.rollout.max_completions,
            f"algo.group_size={self.algo.group_size} exceeds rollout.max_completions={self.rollout.max_completions}: "
            "a group is sampled together, so raise rollout.max_completions",
        )
