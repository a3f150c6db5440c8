"""Make the slow rewards of a run from its configuration."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewards.cache import RewardCache
from rewards.judge import Judge, LoadImage, without_answer
from rewards.slow import BatchCall, Limits, SlowReward, declared
from rlmed.core.config.rewarding import JudgeConfig, SlowConfig

JUDGE = "judge"
SLOW_NAMES = (JUDGE,)
"""Slow rewards of rlmed, by their name in `reward.weights`."""
FIELDS = ("concurrency", "retries", "wait_s", "max_calls", "max_seconds", "on_failure")


@dataclass(frozen=True, slots=True)
class SlowRewards:
    """Makes slow rewards; without arguments, none."""

    slow: SlowConfig | None = None
    judged_by: JudgeConfig | None = None
    cache: RewardCache | None = None
    load_image: LoadImage | None = None

    def check(self, weights: Mapping[str, float]) -> None:
        """Raise ValueError for a judge that `weights` does not name."""
        if self.judged_by is not None and self.judged_by.url is not None and JUDGE not in weights:
            raise ValueError(
                f"reward.judge.url={self.judged_by.url} is set, and reward.weights has no judge: set reward=judge, or "
                "+reward.weights.judge=1"
            )

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
        limits = Limits(
            batch_size=None,
            concurrency=slow.concurrency,
            timeout_s=timeout_s,
            retries=slow.retries,
            wait_s=slow.wait_s,
            max_calls=slow.max_calls,
            max_seconds=slow.max_seconds,
            on_failure=slow.on_failure,
        )
        cache = self._cache
        if given is None and name not in slow.names:
            return None
        limits = dataclasses.replace(limits, **(given or {}))
        call: BatchCall = function if limits.batch_size else _one_by_one(function)
        keys = {field: f"reward.slow.{field}" for field in FIELDS} | {"timeout_s": "reward.timeout_s"}
        settings = {"path": path, "source": _source_of(function)}
        return SlowReward(name, call, limits, cache, settings=settings, keys=keys)

    def judge(self) -> SlowReward:
        """Return the judge.

        Raises:
            ValueError: without a server, or the package openai.
        """
        config, slow = self.judged_by, self.slow
        if config is None or slow is None or config.url is None:
            raise ValueError("reward.weights.judge needs a judge: set reward.judge.url and reward.judge.model")
        judge = Judge(config, self.load_image)
        limits = Limits(
            batch_size=None,
            concurrency=config.concurrency,
            timeout_s=config.timeout_s,
            retries=config.retries,
            wait_s=slow.wait_s,
            max_calls=slow.max_calls,
            max_seconds=slow.max_seconds,
            on_failure=config.on_failure,
        )
        own = ("concurrency", "timeout_s", "retries", "on_failure")
        keys = {field: f"reward.{'judge' if field in own else 'slow'}.{field}" for field in (*FIELDS, "timeout_s")}
        return SlowReward(JUDGE, judge, limits, self._cache, settings=judge.settings, keys=keys, known=without_answer)

    @property
    def _cache(self) -> RewardCache | None:
        return self.cache if self.slow is not None and self.slow.cache else None


def _one_by_one(function: Callable[..., Any]) -> BatchCall:
    return lambda examples, completions: [function(*pair) for pair in zip(examples, completions, strict=True)]


def _source_of(function: Callable[..., Any]) -> str:
    """Return a digest of the file that defines a function: after a change it is called again."""
    path = vars(sys.modules[function.__module__]).get("__file__") if function.__module__ in sys.modules else None
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path and Path(path).is_file() else ""
