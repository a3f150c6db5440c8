"""The section `reward` of the configuration; see `rlmed.core.config.schema`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from rlmed.core.config.checks import require, require_one_of

ON_FAILURE = ("stop", "missing")
"""What to do about a slow reward that cannot be had: end the run, or leave it out and count it."""
PLACEHOLDERS = ("{question}", "{truth}", "{answer}")
"""What a judge's template must contain; {low} and {high} stand for the ends of its scale."""

RADEVAL_METRICS = ("radgraph", "radgraph_simple", "radgraph_complete", "chexbert", "chexbert_5", "green", "ratescore")
"""Scores of one report that `reward.radeval.metric` may name; see `rewards.radeval`."""


@dataclass(frozen=True, kw_only=True)
class SlowConfig:
    """How rewards that take time are called; see `rewards.slow`."""

    names: tuple[str, ...]
    concurrency: int
    retries: int
    wait_s: float
    max_calls: int | None
    max_seconds: float | None
    on_failure: str
    cache: bool
    workers: int
    worker_cpus: float

    def __post_init__(self) -> None:
        require(self.concurrency >= 1, f"reward.slow.concurrency={self.concurrency} must be at least 1")
        require(self.retries >= 0, f"reward.slow.retries={self.retries} must not be negative")
        require(self.wait_s > 0, f"reward.slow.wait_s={self.wait_s} must be positive")
        for key, value in (("max_calls", self.max_calls), ("max_seconds", self.max_seconds)):
            require(value is None or value > 0, f"reward.slow.{key}={value} must be positive, or null for no limit")
        require_one_of("reward.slow.on_failure", self.on_failure, ON_FAILURE)
        require(self.workers >= 0, f"reward.slow.workers={self.workers} must be 0 (threads) or a number of processes")
        require(self.worker_cpus >= 0, f"reward.slow.worker_cpus={self.worker_cpus} must not be negative")


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """The LLM judge; see `rewards.judge`."""

    url: str | None
    model: str | None
    template: str
    scale: tuple[float, float]
    images: bool
    max_tokens: int
    timeout_s: float
    retries: int
    concurrency: int
    on_failure: str

    def __post_init__(self) -> None:
        if self.url is not None:
            parts = urlsplit(self.url)
            require(
                parts.scheme in ("http", "https") and bool(parts.hostname),
                f"Invalid reward.judge.url={self.url!r}; expected the base of an OpenAI-compatible server, such as "
                "http://127.0.0.1:8000/v1",
            )
            require(
                not (parts.username or parts.password or parts.query),
                "reward.judge.url holds a name, password or query, which the run's files would show: put the key into the "
                "environment variable RLMED_JUDGE_KEY",
            )
            require(self.model is not None, "reward.judge.url needs reward.judge.model: name the model that it serves")
        missing = [name for name in PLACEHOLDERS if name not in self.template]
        require(not missing, f"reward.judge.template lacks {', '.join(missing)}: put each where it belongs")
        require(
            self.scale[0] < self.scale[1],
            f"reward.judge.scale={list(self.scale)} must be the worst and the best mark, as [0, 10]",
        )
        require(self.max_tokens >= 1, f"reward.judge.max_tokens={self.max_tokens} must be at least 1")
        require(self.timeout_s > 0, f"reward.judge.timeout_s={self.timeout_s} must be positive")
        require(self.retries >= 0, f"reward.judge.retries={self.retries} must not be negative")
        require(self.concurrency >= 1, f"reward.judge.concurrency={self.concurrency} must be at least 1")
        require_one_of("reward.judge.on_failure", self.on_failure, ON_FAILURE)


@dataclass(frozen=True, kw_only=True)
class IouConfig:
    """How the reward `task` pays boxes; see `rewards.task`."""

    kind: str
    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        require_one_of("reward.iou.kind", self.kind, ("mean", "threshold"))
        require(
            0 < self.start <= self.end <= 1,
            f"reward.iou.start={self.start} and reward.iou.end={self.end} must satisfy 0 < start <= end <= 1",
        )
        require(self.steps >= 1, f"reward.iou.steps={self.steps} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class EmbeddingConfig:
    """The model that compares answers with references; see `rewards.embedding`."""

    model: str | None
    batch_size: int
    device: str
    timeout_s: float
    retries: int
    on_failure: str

    def __post_init__(self) -> None:
        _check_calls("embedding", self)


@dataclass(frozen=True, kw_only=True)
class RadEvalConfig:
    """The score of radiology reports; see `rewards.radeval`."""

    metric: str | None
    batch_size: int
    timeout_s: float
    retries: int
    on_failure: str

    def __post_init__(self) -> None:
        if self.metric is not None:
            require_one_of("reward.radeval.metric", self.metric, RADEVAL_METRICS)
        _check_calls("radeval", self)


def _check_calls(name: str, config: EmbeddingConfig | RadEvalConfig) -> None:
    require(config.batch_size >= 1, f"reward.{name}.batch_size={config.batch_size} must be at least 1")
    require(config.timeout_s > 0, f"reward.{name}.timeout_s={config.timeout_s} must be positive")
    require(config.retries >= 0, f"reward.{name}.retries={config.retries} must not be negative")
    require_one_of(f"reward.{name}.on_failure", config.on_failure, ON_FAILURE)


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Rewards and their weights."""

    weights: Mapping[str, float]
    extra: tuple[str, ...]
    timeout_s: float
    slow: SlowConfig
    judge: JudgeConfig
    iou: IouConfig
    embedding: EmbeddingConfig
    radeval: RadEvalConfig

    def __post_init__(self) -> None:
        require(
            self.iou.kind == "mean" or "task" in self.weights,
            f"reward.iou.kind={self.iou.kind} is for the reward task, which reward.weights lacks: set reward=task",
        )
        require(
            any(self.weights.values()) or bool(self.extra),
            f"reward.weights={dict(self.weights)} rewards nothing: give at least one reward a non-zero weight",
        )
        require(self.timeout_s > 0, f"reward.timeout_s={self.timeout_s} must be positive")
        own = [path.rpartition(":")[2] for path in self.extra]
        for name in self.slow.names:
            require(
                name in own,
                f"reward.slow.names has {name!r}, which is no function of reward.extra={list(self.extra)}: give it there",
            )
