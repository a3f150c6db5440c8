"""Configuration sections for sampling, evaluation, checkpoints and the cluster; see `schema`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlmed.core.config.checks import require, require_one_of
from rlmed.core.config.rewarding import RADEVAL_METRICS


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """Sampling of completions during training."""

    engine: str
    temperature: float
    top_p: float
    top_k: int
    max_tokens: int
    stop: tuple[str, ...]
    max_completions: int
    prefill_tokens: int
    on_push: str
    max_mismatch_kl: float | None
    tensor_parallel_size: int
    gpu_memory_utilization: float | None
    kv_cache_gib: float | None
    enforce_eager: bool | None
    sleep: bool | None

    def __post_init__(self) -> None:
        require_one_of("rollout.engine", self.engine, ("native", "vllm", "fake"))
        require(
            self.max_mismatch_kl is None or self.max_mismatch_kl > 0,
            f"rollout.max_mismatch_kl={self.max_mismatch_kl} must be positive or null",
        )
        require_one_of("rollout.on_push", self.on_push, ("continue", "finish"))
        require(
            self.tensor_parallel_size >= 1,
            f"rollout.tensor_parallel_size={self.tensor_parallel_size} must be at least 1",
        )
        require(
            self.gpu_memory_utilization is None or 0 < self.gpu_memory_utilization <= 1,
            f"rollout.gpu_memory_utilization={self.gpu_memory_utilization} must be in (0, 1], or null",
        )
        require(
            self.kv_cache_gib is None or self.kv_cache_gib > 0,
            f"rollout.kv_cache_gib={self.kv_cache_gib} must be positive or null",
        )
        require(
            self.temperature > 0,
            f"rollout.temperature={self.temperature} must be positive in training: greedy completions of a group are "
            "identical, so their advantages are zero",
        )
        require(0 < self.top_p <= 1, f"rollout.top_p={self.top_p} must be in (0, 1]")
        require(self.top_k >= 0, f"rollout.top_k={self.top_k} must be 0 (off) or positive")
        require(self.max_tokens >= 1, f"rollout.max_tokens={self.max_tokens} must be at least 1")
        require(self.max_completions >= 1, f"rollout.max_completions={self.max_completions} must be at least 1")
        require(self.prefill_tokens >= 1, f"rollout.prefill_tokens={self.prefill_tokens} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Where workers and learner run."""

    kind: str
    threads: int | None
    check_memory: bool
    address: str | None
    rollout_workers: int
    learner_ranks: int
    gpus_per_worker: float | None
    gpus_per_rank: float | None
    worker_resources: Mapping[str, float]
    learner_resources: Mapping[str, float]
    runtime_env: Mapping[str, Any]
    weight_transfer: str
    silence_timeout_s: float
    stall_timeout_s: float
    start_timeout_s: float
    push_timeout_s: float
    learner_timeout_s: float
    max_worker_failures: int
    worker_logs: bool

    def __post_init__(self) -> None:
        require_one_of("cluster.kind", self.kind, ("local", "ray"))
        require_one_of("cluster.weight_transfer", self.weight_transfer, ("auto", "object_store", "nccl", "ipc"))
        require(self.threads is None or self.threads > 0, f"cluster.threads={self.threads} must be positive or null")
        require(self.rollout_workers >= 1, f"cluster.rollout_workers={self.rollout_workers} must be at least 1")
        require(self.learner_ranks >= 1, f"cluster.learner_ranks={self.learner_ranks} must be at least 1")
        for key in ("rollout_workers", "learner_ranks"):
            require(
                self.kind == "ray" or getattr(self, key) == 1,
                f"cluster.{key}={getattr(self, key)} needs Ray: use cluster=ray, since cluster=local is one process",
            )
        for key in ("gpus_per_worker", "gpus_per_rank"):
            value = getattr(self, key)
            require(value is None or value >= 0, f"cluster.{key}={value} must be 0 or more, or null")
        for key in ("worker_resources", "learner_resources"):
            for name, value in getattr(self, key).items():
                require(
                    name not in ("CPU", "GPU", "memory"),
                    f"cluster.{key}.{name}: only custom Ray resources go here; for GPUs set cluster.gpus_per_worker or "
                    "cluster.gpus_per_rank",
                )
                require(value > 0, f"cluster.{key}.{name}={value} must be positive")
        require(
            "worker_process_setup_hook" not in self.runtime_env,
            "cluster.runtime_env.worker_process_setup_hook is rlmed's own, which prepares each worker: remove it, and use "
            "cluster.runtime_env.env_vars for what your workers need",
        )
        for key in ("silence", "stall", "start", "push", "learner"):
            name, value = f"cluster.{key}_timeout_s", getattr(self, f"{key}_timeout_s")
            require(value > 0, f"{name}={value} must be positive (seconds)")
        require(
            self.max_worker_failures >= 0,
            f"cluster.max_worker_failures={self.max_worker_failures} must not be negative",
        )


PREDICTION_KITS = ("medevalkit", "vlmevalkit", "lmms_eval")
"""Evaluation kits that `rlmed.evaluation.kits` writes predictions for."""
RADEVAL, EMBEDDING = "radeval", "embedding"
"""Kinds of entries of `eval.report_metrics`; see `rlmed.evaluation.report_metrics`."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """When and how to evaluate accuracy."""

    every: int
    at_start: bool
    at_end: bool
    limit: int | None
    max_tokens: int
    controls: bool
    predictions: tuple[str, ...]
    report_metrics: tuple[str, ...]

    def __post_init__(self) -> None:
        self._check_report_metrics()
        for kit in self.predictions:
            require_one_of("eval.predictions", kit, PREDICTION_KITS)
        require(self.every >= 0, f"eval.every={self.every} must be 0 (never) or a number of steps")
        require(self.limit is None or self.limit > 0, f"eval.limit={self.limit} must be positive or null")
        require(self.max_tokens >= 1, f"eval.max_tokens={self.max_tokens} must be at least 1")

    def _check_report_metrics(self) -> None:
        names = []
        for entry in self.report_metrics:
            kind, _, given = entry.partition(":")
            require(
                kind in (RADEVAL, EMBEDDING) and bool(given),
                f"Invalid eval.report_metrics={entry!r}; expected radeval:NAME, such as radeval:radgraph, or "
                "embedding:FOLDER of a text encoder",
            )
            if kind == RADEVAL:
                require_one_of("eval.report_metrics=radeval", given, RADEVAL_METRICS)
            names.append(given if kind == RADEVAL else kind)
        for name in names:
            require(names.count(name) == 1, f"eval.report_metrics names {name} twice: leave one of them out")


@dataclass(frozen=True, kw_only=True)
class ReliabilityConfig:
    """How often to ask (`python -m rlmed.reliability`)."""

    samples: int

    def __post_init__(self) -> None:
        require(self.samples >= 1, f"reliability.samples={self.samples} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save checkpoints."""

    every: int
    keep_last: int

    def __post_init__(self) -> None:
        require(self.every >= 0, f"checkpoint.every={self.every} must be 0 (only at the end) or a number of steps")
        require(self.keep_last >= 1, f"checkpoint.keep_last={self.keep_last} must be at least 1")


LOGGERS = ("tensorboard", "wandb", "mlflow", "trackio")
"""Places besides the run's folder that show its curves; see `rlmed.recording.loggers`."""


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Settings of the loggers."""

    project: str | None
    run_name: str | None
    offline: bool
    tracking_uri: str | None
    rollouts_every: int
    rollouts: int

    def __post_init__(self) -> None:
        require(
            self.rollouts_every >= 0,
            f"logging.rollouts_every={self.rollouts_every} must be 0 (never) or a number of steps",
        )
        require(self.rollouts >= 1, f"logging.rollouts={self.rollouts} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class PreflightConfig:
    """The check, before step 1, that the policy can learn."""

    enabled: bool
    groups: int

    def __post_init__(self) -> None:
        require(self.groups >= 1, f"preflight.groups={self.groups} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class SftConfig:
    """Supervised fine-tuning (`python -m rlmed.sft`)."""

    epochs: float
    batch_size: int
    target: str

    def __post_init__(self) -> None:
        require(self.epochs > 0, f"sft.epochs={self.epochs} must be positive")
        require(self.batch_size >= 1, f"sft.batch_size={self.batch_size} must be at least 1")
        require_one_of("sft.target", self.target, ("auto", "answer", "option"))


@dataclass(frozen=True, kw_only=True)
class DebugConfig:
    """Run one half of the loop, to find out which half is at fault."""

    learn: bool
    record: bool
    recorded: str | None

    def __post_init__(self) -> None:
        require(
            self.learn or self.recorded is None,
            f"debug.learn=false and debug.recorded={self.recorded} leave nothing to do: a run must sample, learn or both",
        )
