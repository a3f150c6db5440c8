"""Scores of radiology reports by the package radeval: RadGraph, CheXbert, GREEN, RaTEScore."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import threading
from collections.abc import Sequence
from typing import Any

from rewards.extra import RewardError
from rewards.references import answered, references_of
from rewards.slow import RewardUnavailableError
from rlmed.core.types import Completion, Example

METRICS = {
    "radgraph": ("radgraph", "radgraph_partial"),
    "radgraph_simple": ("radgraph", "radgraph_simple"),
    "radgraph_complete": ("radgraph", "radgraph_complete"),
    "chexbert": ("f1chexbert", "f1chexbert_sample_acc_all"),
    "chexbert_5": ("f1chexbert", "f1chexbert_sample_acc_5"),
    "green": ("green", "green"),
    "ratescore": ("ratescore", "ratescore"),
}
"""For each score of ours, the metric of radeval 2 and the key of its scores by sample."""
INSTALL = "pip install 'radeval>=2.2,<3'"


class ReportScores:
    """Scores answers beside their references; see `rewards.slow.BatchCall`."""

    def __init__(self, metric: str, key: str = "reward.radeval.metric=") -> None:
        """Load nothing yet.

        Args:
            metric: one of `METRICS`.
            key: what stands before the metric where a user set it, for errors.

        Raises:
            ValueError: without the package.
        """
        if importlib.util.find_spec("radeval") is None:
            raise ValueError(f"{key}{metric} needs the package radeval: {INSTALL}")
        self._metric, self._key = METRICS[metric]
        try:
            version = importlib.metadata.version("radeval")
        except importlib.metadata.PackageNotFoundError:  # a module that is not installed
            version = ""
        self.settings = {"metric": metric, "version": version}
        self._lock = threading.Lock()
        self._scorer: Any = None

    def __call__(self, examples: Sequence[Example], completions: Sequence[Completion]) -> list[float]:
        """Return each answer's score with its best reference, clipped to [0, 1].

        Raises:
            RewardUnavailableError: for a report without a score.
            RewardError: if the models cannot be loaded, or radeval returns something else.
        """
        answers = [answered(*pair) for pair in zip(examples, completions, strict=True)]
        scores = self.compare(answers, [references_of(example) for example in examples])
        for answer, score in zip(answers, scores, strict=True):
            if not math.isfinite(score):
                raise RewardUnavailableError(f"{self._key} is {score} for {answer[:80]!r}", again=False)
        return scores

    def compare(self, answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
        """Return each answer's score with its best reference, clipped to [0, 1]; NaN without one.

        Raises:
            RewardError: if the models cannot be loaded, or radeval returns something else.
        """
        pairs = [
            (number, reference, answer)
            for number, (answer, some) in enumerate(zip(answers, references, strict=True))
            for reference in some
        ]
        scorer = self._loaded()
        found = scorer(refs=[reference for _, reference, _ in pairs], hyps=[answer for *_, answer in pairs])
        scores = list(found.get(self._key, ()))
        if len(scores) != len(pairs):
            raise RewardError(
                f"radeval: {len(scores)} scores {self._key!r} for {len(pairs)} pairs, among {', '.join(found)}: "
                f"{INSTALL}"
            )
        best = [-math.inf] * len(answers)
        for (number, _, _), score in zip(pairs, scores, strict=True):
            known = score is not None and math.isfinite(float(score)) and not math.isnan(best[number])
            best[number] = max(best[number], float(score)) if known else math.nan
        return [score if math.isnan(score) else min(max(score, 0.0), 1.0) for score in best]

    def load(self) -> None:
        """Load the models now; raise RewardError if that fails."""
        self._loaded()

    def _loaded(self) -> Any:
        with self._lock:
            if self._scorer is None:
                try:
                    from radeval import RadEval

                    self._scorer = RadEval(metrics=[self._metric], per_sample=True, show_progress=False)
                except Exception as error:  # it loads models of several libraries
                    why, hub = " ".join(str(error).split()), "run once where the Hugging Face hub can be reached"
                    cure = INSTALL if isinstance(error, ImportError) else f"{hub}: radeval fetches its models there"
                    raise RewardError(
                        f"radeval: {self._metric} cannot be loaded: {type(error).__name__}: {why}. {cure}"
                    ) from error
            return self._scorer
