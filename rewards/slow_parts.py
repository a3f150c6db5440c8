"""Make the slow rewards of a run from its configuration."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewards.cache import RewardCache
from rewards.embedding import Embedder
from rewards.judge import Judge, LoadImage
from rewards.processes import Processes
from rewards.radeval import ReportScores
from rewards.references import without_answer
from rewards.slow import BatchCall, Limits, declared, in_thread
from rewards.slow_reward import SlowReward
from rlmed.core.config.rewarding import EmbeddingConfig, JudgeConfig, RadEvalConfig, SlowConfig

JUDGE, EMBEDDING, RADEVAL = "judge", "embedding", "radeval"
SLOW_NAMES = (JUDGE, EMBEDDING, RADEVAL)
"""Slow rewards of rlmed, by their name in `reward.weights`."""
COMPARING = (EMBEDDING, RADEVAL)
"""Those that compare an answer with references: texts, of which every row needs one."""
FIELDS = ("concurrency", "retries", "wait_s", "max_calls", "max_seconds", "on_failure")


@dataclass(frozen=True, slots=True)
class SlowRewards:
    """Makes slow rewards; without arguments, none."""

    slow: SlowConfig | None = None
    judged_by: JudgeConfig | None = None
    cache: RewardCache | None = None
    load_image: LoadImage | None = None
    embedded_by: EmbeddingConfig | None = None
    scored_by: RadEvalConfig | None = None
    processes: Processes | None = None
    """Call functions of users in place of threads."""

    def check(self, weights: Mapping[str, float]) -> None:
        """Raise ValueError for a reward that is set up and that `weights` does not name."""
        for name, key, value in (
            (JUDGE, "judge.url", self.judged_by and self.judged_by.url),
            (EMBEDDING, "embedding.model", self.embedded_by and self.embedded_by.model),
            (RADEVAL, "radeval.metric", self.scored_by and self.scored_by.metric),
        ):
            if value is not None and name not in weights:
                raise ValueError(
                    f"reward.{key}={value} is set, and reward.weights has no {name}: set reward={name}, or "
                    f"+reward.weights.{name}=1"
                )

    def check_read(self, made: Collection[str], extra: Sequence[str]) -> None:
        """Check that something reads what is set for slow rewards.

        Args:
            made: names of the rewards that are slow.
            extra: paths of the user's functions.

        Raises:
            ValueError: for a setting that none of them reads.
        """
        if self.slow is None:
            return
        cure = "mark one with @rewards.slow.slow or by reward.slow.names=[NAME] (docs/rewards.md), or leave the setting out"
        if self.slow.workers and not {*made} - {*SLOW_NAMES}:
            raise ValueError(
                f"reward.slow.workers={self.slow.workers} call your functions that are slow, and none of "
                f"reward.extra={list(extra)} is: {cure}"
            )
        for key, value in (("max_calls", self.slow.max_calls), ("max_seconds", self.slow.max_seconds)):
            if value is not None and not made:
                raise ValueError(
                    f"reward.slow.{key}={value} bounds rewards that are slow, and none of reward.extra={list(extra)} is: {cure}"
                )

    def make(self, name: str) -> SlowReward:
        """Return one of `SLOW_NAMES`.

        Raises:
            ValueError: for settings, a folder or a package that it lacks.
        """
        return {JUDGE: self.judge, EMBEDDING: self.embedding, RADEVAL: self.radeval}[name]()

    def of_user(self, name: str, path: str, function: Callable[..., Any], timeout_s: float) -> SlowReward | None:
        """Return a user's function as a slow reward; None if it is not marked as one.

        Args:
            name: of the reward.
            path: "module:function".
            function: it.
            timeout_s: time limit of a call, unless its mark has one.
        """
        given, slow = declared(function), self.slow
        if slow is None:
            if given is not None:
                raise ValueError(f"reward.extra={path} is marked as slow: give the settings reward.slow")
            return None
        # read even where nothing is slow: these settings are of reward.extra as a whole
        limits, cache = self._limits(slow, slow, concurrency=slow.concurrency, timeout_s=timeout_s), self._cache
        if given is None and name not in slow.names:
            return None
        limits = dataclasses.replace(limits, **(given or {}))
        if self.processes is None:
            call = in_thread(function if limits.batch_size else _one_by_one(function))
        else:
            call = self.processes.caller(path, batched=limits.batch_size is not None)
            limits = dataclasses.replace(limits, concurrency=min(limits.concurrency, self.processes.count))
        keys = {field: f"reward.slow.{field}" for field in FIELDS} | {"timeout_s": "reward.timeout_s"}
        settings = {"path": path, "source": _source_of(function)}
        return SlowReward(name, call, limits, cache, settings=settings, keys=keys)

    def judge(self) -> SlowReward:
        """Return the judge.

        Raises:
            ValueError: without a server, or the package openai.
        """
        config = self.judged_by
        if config is None or config.url is None:
            raise ValueError("reward.weights.judge needs a judge: set reward.judge.url and reward.judge.model")
        judge = Judge(config, self.load_image)
        return self._own(JUDGE, judge, config, judge.settings, concurrency=config.concurrency)

    def embedding(self) -> SlowReward:
        """Return the comparison of texts by an encoder.

        Raises:
            ValueError: without its folder, or for one that is not understood.
        """
        if self.embedded_by is None or self.embedded_by.model is None:
            raise ValueError("reward.weights.embedding needs a text encoder: set reward.embedding.model to its folder")
        size = self.embedded_by.batch_size
        embedder = Embedder(self.embedded_by.model, batch_size=size, device=self.embedded_by.device)
        return self._own(EMBEDDING, embedder, self.embedded_by, embedder.settings, batch_size=size)

    def radeval(self) -> SlowReward:
        """Return the score of reports.

        Raises:
            ValueError: without a metric, or the package radeval.
        """
        if self.scored_by is None or self.scored_by.metric is None:
            raise ValueError("reward.weights.radeval needs a score: set reward.radeval.metric")
        scores, size = ReportScores(self.scored_by.metric), self.scored_by.batch_size
        return self._own(RADEVAL, scores, self.scored_by, scores.settings, batch_size=size)

    def _own(
        self,
        name: str,
        call: BatchCall,
        config: JudgeConfig | EmbeddingConfig | RadEvalConfig,
        settings: Mapping[str, Any],
        *,
        batch_size: int | None = None,
        concurrency: int = 1,
    ) -> SlowReward:
        """Return a reward of rlmed; what its own section does not set is in `reward.slow`."""
        assert self.slow is not None
        own = {field.name for field in dataclasses.fields(config)}
        keys = {field: f"reward.{name if field in own else 'slow'}.{field}" for field in (*FIELDS, "timeout_s")}
        limits = self._limits(
            config, self.slow, batch_size=batch_size, concurrency=concurrency, timeout_s=config.timeout_s
        )
        return SlowReward(
            name, in_thread(call), limits, self._cache, settings=settings, keys=keys, known=without_answer
        )

    @staticmethod
    def _limits(
        config: SlowConfig | JudgeConfig | EmbeddingConfig | RadEvalConfig,
        slow: SlowConfig,
        *,
        concurrency: int,
        timeout_s: float,
        batch_size: int | None = None,
    ) -> Limits:
        return Limits(
            batch_size=batch_size,
            concurrency=concurrency,
            timeout_s=timeout_s,
            retries=config.retries,
            wait_s=slow.wait_s,
            max_calls=slow.max_calls,
            max_seconds=slow.max_seconds,
            on_failure=config.on_failure,
        )

    @property
    def _cache(self) -> RewardCache | None:
        return self.cache if self.slow is not None and self.slow.cache else None


def _one_by_one(function: Callable[..., Any]) -> BatchCall:
    return lambda examples, completions: [function(*pair) for pair in zip(examples, completions, strict=True)]


def _source_of(function: Callable[..., Any]) -> str:
    """Return a digest of the file that defines a function: after a change it is called again."""
    path = vars(sys.modules[function.__module__]).get("__file__") if function.__module__ in sys.modules else None
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path and Path(path).is_file() else ""
