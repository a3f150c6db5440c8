"""The configuration as typed records, validated once at the edge: Hydra composes a mapping, `config_building` checks it.

Each part of the program receives its own sub-config only. What a key means is said above it in `conf/`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MAX_SEED = 2**40
"""Larger ones would not fit, multiplied, into the 64-bit seeds of completions."""


class ConfigError(ValueError):
    """A key or value that cannot be; the message names the key and the cure."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _require_one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    _require(value in allowed, f"{key}={value!r} is not possible: choose one of {', '.join(allowed)}")


@dataclass(frozen=True)
class ModelConfig:
    """Which model, and how it is held."""

    path: str
    dtype: str = "auto"
    device: str = "auto"
    min_pixels: int | None = None
    max_pixels: int | None = None

    def __post_init__(self) -> None:
        _require_one_of("model.dtype", self.dtype, ("auto", "float32", "bfloat16"))
        _require(
            re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device) is not None,
            f"model.device={self.device!r} is not possible: use auto, cpu, cuda, or cuda:N for one of several",
        )
        for key, value in (("min_pixels", self.min_pixels), ("max_pixels", self.max_pixels)):
            _require(value is None or value > 0, f"model.{key}={value} must be positive or null")
        pixels = (self.min_pixels or 0, self.max_pixels or 2**62)
        _require(pixels[0] <= pixels[1], f"model.min_pixels={pixels[0]} exceeds model.max_pixels={pixels[1]}")


@dataclass(frozen=True)
class DataConfig:
    """Where questions come from and how they become prompts."""

    source: str = "jsonl"
    train: str | None = None
    eval: tuple[str, ...] = ()
    phantom_seed: int = 0
    phantom_folder: str | None = None
    max_prompt_tokens: int = 1024
    shuffle_options: bool = False
    on_bad_row: str = "skip"
    limit: int | None = None
    download: str | None = None

    def __post_init__(self) -> None:
        _require_one_of("data.source", self.source, ("jsonl", "phantom"))
        _require_one_of("data.on_bad_row", self.on_bad_row, ("skip", "error"))
        _require(self.phantom_seed >= 0, f"data.phantom_seed={self.phantom_seed} must not be negative")
        _require(self.max_prompt_tokens > 0, f"data.max_prompt_tokens={self.max_prompt_tokens} must be positive")
        _require(self.limit is None or self.limit > 0, f"data.limit={self.limit} must be positive or null")


@dataclass(frozen=True)
class PromptConfig:
    """What is asked; see `rlmed.data.prompts.PromptRenderer`."""

    template: str
    by_modality: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key, text in (("template", self.template), *((f"by_modality.{k}", v) for k, v in self.by_modality.items())):
            _require(
                text.count("{question}") == 1,
                f"prompt.{key} must hold {{question}} exactly once, where question and options go; it is {text!r}",
            )


@dataclass(frozen=True)
class AlgoConfig:
    """The policy-gradient algorithm as settings; docs/papers.md gives the source of each.

    The keys of the loss are checked where they are used, by `learner.losses.PolicyLossConfig`, before anything is loaded.
    """

    group_size: int = 4
    groups_per_step: int = 4
    advantage: str = "grpo"
    ratio_level: str = "token"
    clip: str = "ppo"
    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.2
    dual_clip: float = 3.0
    kl_coef: float = 0.04
    kl_estimator: str = "k3"
    aggregation: str = "sequence_mean"
    old_logprobs: str = "learner"
    importance_cap: float | None = None
    dynamic_sampling: bool = False
    max_refills: int = 4
    mask_truncated: bool = False
    max_staleness: int = 0

    def __post_init__(self) -> None:
        _require_one_of("algo.advantage", self.advantage, ("grpo", "dr_grpo", "rloo"))
        _require_one_of("algo.old_logprobs", self.old_logprobs, ("learner", "rollout"))
        _require(
            self.group_size >= 2,
            f"algo.group_size={self.group_size} is not possible with the group-relative advantage {self.advantage!r}: "
            "a completion is compared with the others of its group, so set algo.group_size to 2 or more",
        )
        _require(self.groups_per_step >= 1, f"algo.groups_per_step={self.groups_per_step} must be at least 1")
        _require(self.max_staleness >= 0, f"algo.max_staleness={self.max_staleness} must not be negative")
        _require(self.max_refills >= 0, f"algo.max_refills={self.max_refills} must not be negative")


@dataclass(frozen=True)
class RewardConfig:
    """What a completion is rewarded for."""

    weights: Mapping[str, float] = field(default_factory=lambda: {"format": 1.0, "choice": 1.0})
    extra: tuple[str, ...] = ()
    timeout_s: float = 30.0

    def __post_init__(self) -> None:
        _require(
            any(self.weights.values()) or bool(self.extra),
            f"reward.weights={dict(self.weights)} rewards nothing: give at least one reward a weight other than 0",
        )
        _require(self.timeout_s > 0, f"reward.timeout_s={self.timeout_s} must be positive")


@dataclass(frozen=True)
class RolloutConfig:
    """How completions are sampled while training."""

    engine: str = "native"
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 512
    stop: tuple[str, ...] = ()
    max_completions: int = 64
    prefill_tokens: int = 8192
    on_push: str = "continue"
    max_mismatch_kl: float | None = None
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.8
    kv_cache_gib: float | None = None
    enforce_eager: bool | None = None

    def __post_init__(self) -> None:
        _require_one_of("rollout.engine", self.engine, ("native", "vllm", "fake"))
        _require(
            self.max_mismatch_kl is None or self.max_mismatch_kl > 0,
            f"rollout.max_mismatch_kl={self.max_mismatch_kl} must be positive or null",
        )
        _require_one_of("rollout.on_push", self.on_push, ("continue", "finish"))
        _require(
            self.tensor_parallel_size >= 1,
            f"rollout.tensor_parallel_size={self.tensor_parallel_size} must be at least 1",
        )
        _require(
            0 < self.gpu_memory_utilization <= 1,
            f"rollout.gpu_memory_utilization={self.gpu_memory_utilization} must be in (0, 1]",
        )
        _require(
            self.kv_cache_gib is None or self.kv_cache_gib > 0,
            f"rollout.kv_cache_gib={self.kv_cache_gib} must be positive or null",
        )
        _require(
            self.temperature > 0,
            f"rollout.temperature={self.temperature} is not possible in training: greedy completions of a group are all "
            "the same, and their advantages zero",
        )
        _require(0 < self.top_p <= 1, f"rollout.top_p={self.top_p} must be in (0, 1]")
        _require(self.top_k >= 0, f"rollout.top_k={self.top_k} must be 0 (off) or positive")
        _require(self.max_tokens >= 1, f"rollout.max_tokens={self.max_tokens} must be at least 1")
        _require(
            all(self.stop), f"rollout.stop={list(self.stop)} holds an empty text, which would end every completion"
        )
        _require(self.max_completions >= 1, f"rollout.max_completions={self.max_completions} must be at least 1")
        _require(self.prefill_tokens >= 1, f"rollout.prefill_tokens={self.prefill_tokens} must be at least 1")


@dataclass(frozen=True)
class LearnerConfig:
    """How the policy is updated."""

    lr: float = 1e-6
    lr_schedule: str = "linear"
    warmup_steps: int = 0
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    token_budget: int = 16384
    epochs: int = 1
    mini_batches: int = 1
    gradient_checkpointing: bool = False
    freeze: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _require_one_of("learner.lr_schedule", self.lr_schedule, ("constant", "linear", "cosine"))
        _require(self.lr > 0, f"learner.lr={self.lr} must be positive")
        _require(self.warmup_steps >= 0, f"learner.warmup_steps={self.warmup_steps} must not be negative")
        _require(
            all(0 <= beta < 1 for beta in self.betas),
            f"learner.betas={list(self.betas)} must be in [0, 1), as [0.9, 0.999]",
        )
        _require(self.weight_decay >= 0, f"learner.weight_decay={self.weight_decay} must not be negative")
        _require(self.max_grad_norm > 0, f"learner.max_grad_norm={self.max_grad_norm} must be positive")
        _require(self.token_budget >= 1, f"learner.token_budget={self.token_budget} must be at least 1")
        _require(self.epochs >= 1, f"learner.epochs={self.epochs} must be at least 1")
        _require(self.mini_batches >= 1, f"learner.mini_batches={self.mini_batches} must be at least 1")
        for part in self.freeze:
            _require_one_of("learner.freeze", part, ("vision", "merger", "language_model"))
        _require(len(set(self.freeze)) < 3, "learner.freeze names every part: nothing would be trained")


@dataclass(frozen=True)
class ClusterConfig:
    """Where the parts run."""

    kind: str = "local"
    threads: int | None = None
    address: str | None = None
    rollout_workers: int = 1
    learner_ranks: int = 1
    worker_gpus: float | None = None
    learner_gpus: float | None = None
    worker_resources: Mapping[str, float] = field(default_factory=dict)
    learner_resources: Mapping[str, float] = field(default_factory=dict)
    runtime_env: Mapping[str, Any] = field(default_factory=dict)
    silence_timeout_s: float = 60.0
    stall_timeout_s: float = 600.0
    start_timeout_s: float = 600.0
    push_timeout_s: float = 600.0
    learner_timeout_s: float = 3600.0
    max_worker_failures: int = 3
    worker_logs: bool = False

    def __post_init__(self) -> None:
        _require_one_of("cluster.kind", self.kind, ("local", "ray"))
        _require(self.threads is None or self.threads > 0, f"cluster.threads={self.threads} must be positive or null")
        _require(self.rollout_workers >= 1, f"cluster.rollout_workers={self.rollout_workers} must be at least 1")
        _require(self.learner_ranks >= 1, f"cluster.learner_ranks={self.learner_ranks} must be at least 1")
        for key in ("rollout_workers", "learner_ranks"):
            _require(
                self.kind == "ray" or getattr(self, key) == 1,
                f"cluster.{key}={getattr(self, key)} needs Ray: use cluster=ray, since cluster=local is one process",
            )
        for key in ("worker_gpus", "learner_gpus"):
            value = getattr(self, key)
            _require(value is None or value >= 0, f"cluster.{key}={value} must be 0 or more, or null")
        for key in ("worker_resources", "learner_resources"):
            for name, value in getattr(self, key).items():
                _require(
                    name not in ("CPU", "GPU", "memory"),
                    f"cluster.{key}.{name}: only Ray resources of your own go here; for GPUs set cluster.worker_gpus or "
                    "cluster.learner_gpus",
                )
                _require(value > 0, f"cluster.{key}.{name}={value} must be positive")
        for key in ("silence", "stall", "start", "push", "learner"):
            name, value = f"cluster.{key}_timeout_s", getattr(self, f"{key}_timeout_s")
            _require(value > 0, f"{name}={value} must be positive (seconds)")
        _require(
            self.max_worker_failures >= 0,
            f"cluster.max_worker_failures={self.max_worker_failures} must not be negative",
        )


@dataclass(frozen=True)
class EvalConfig:
    """When and how accuracy is measured."""

    every: int = 0
    at_start: bool = True
    at_end: bool = True
    limit: int | None = None
    max_tokens: int = 512
    controls: bool = True
    trust: bool = False
    samples: int = 8

    def __post_init__(self) -> None:
        _require(self.samples >= 1, f"eval.samples={self.samples} must be at least 1")
        _require(self.every >= 0, f"eval.every={self.every} must be 0 (never) or a number of steps")
        _require(self.limit is None or self.limit > 0, f"eval.limit={self.limit} must be positive or null")
        _require(self.max_tokens >= 1, f"eval.max_tokens={self.max_tokens} must be at least 1")


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved."""

    every: int = 50
    keep_last: int = 2

    def __post_init__(self) -> None:
        _require(self.every >= 0, f"checkpoint.every={self.every} must be 0 (only at the end) or a number of steps")
        _require(self.keep_last >= 1, f"checkpoint.keep_last={self.keep_last} must be at least 1")


@dataclass(frozen=True)
class PreflightConfig:
    """The check before step 1 that learning is possible."""

    enabled: bool = True
    groups: int = 8

    def __post_init__(self) -> None:
        _require(self.groups >= 1, f"preflight.groups={self.groups} must be at least 1")


@dataclass(frozen=True)
class SftConfig:
    """Supervised fine-tuning (`python -m rlmed.sft`)."""

    epochs: float = 2.0
    batch_size: int = 64
    target: str = "auto"

    def __post_init__(self) -> None:
        _require(self.epochs > 0, f"sft.epochs={self.epochs} must be positive")
        _require(self.batch_size >= 1, f"sft.batch_size={self.batch_size} must be at least 1")
        _require_one_of("sft.target", self.target, ("auto", "answer", "option"))


@dataclass(frozen=True)
class DebugConfig:
    """Half a run, to find out which half is at fault."""

    learn: bool = True
    record: bool = False
    recorded: str | None = None

    def __post_init__(self) -> None:
        _require(
            self.learn or self.recorded is None,
            f"debug.learn=false and debug.recorded={self.recorded} leave nothing to do: a run samples, or learns, or both",
        )


@dataclass(frozen=True)
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
    debug: DebugConfig = field(default_factory=DebugConfig)
    profile: str = "auto"
    resume: str | None = None
    before: str | None = None

    def __post_init__(self) -> None:
        _require(bool(self.name.strip()), f"name={self.name!r} must not be empty: the run's folder is called so")
        _require(self.steps >= 1, f"steps={self.steps} must be at least 1")
        _require(0 <= self.seed <= MAX_SEED, f"seed={self.seed} must be between 0 and {MAX_SEED}")
        _require_one_of("profile", self.profile, ("auto", "embedded", "paper"))
        _require(
            self.algo.group_size <= self.rollout.max_completions,
            f"algo.group_size={self.algo.group_size} exceeds rollout.max_completions={self.rollout.max_completions}: "
            "a group is sampled together, so raise rollout.max_completions",
        )
        _require(
            not self.eval.trust or self.eval.samples <= self.rollout.max_completions,
            f"eval.samples={self.eval.samples} exceeds rollout.max_completions={self.rollout.max_completions}: the samples of "
            "a question are drawn together, so raise rollout.max_completions",
        )
        _require(
            self.rollout.engine != "vllm" or self.cluster.kind == "ray",
            f"rollout.engine={self.rollout.engine} runs in a worker of its own: add cluster=ray",
        )
        _require(
            self.rollout.max_mismatch_kl is None
            or (self.algo.max_staleness == 0 and self.algo.old_logprobs == "learner"),
            f"rollout.max_mismatch_kl={self.rollout.max_mismatch_kl} compares engine and learner at the same weights: it needs "
            "algo.max_staleness=0 and algo.old_logprobs=learner",
        )
        _require(
            self.learner.mini_batches <= self.algo.groups_per_step,
            f"learner.mini_batches={self.learner.mini_batches} exceeds algo.groups_per_step={self.algo.groups_per_step}: "
            "a mini-batch needs a group at least",
        )
