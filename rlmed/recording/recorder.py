"""Record what a run does: metrics, every rollout, batches with a non-finite loss or gradient."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rlmed.core.files.atomic import RecordError, refusal, replace_text
from rlmed.core.files.jsonlines import JsonLinesWriter
from rlmed.core.metrics import find_metric
from rlmed.core.tracing import TIMELINE_LINES
from rlmed.core.types import ScoredGroup, TrainGroup
from rlmed.recording.batches import write_batch
from rlmed.recording.loggers.build import Loggers
from rlmed.recording.loggers.guard import GuardedLogger
from rlmed.recording.loggers.tensorboard import TensorBoardLogger
from rlmed.tasks.registry import task_of

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
ROLLOUTS_FILE = "rollouts.jsonl"
BAD_STEPS_FOLDER = "bad_steps"
BATCHES_FOLDER = "batches"
REFUSED_FILE = "refused.txt"
"""Why the preflight refused to start the run."""

NOTE_CHARACTERS = 2000
"""Most characters of what a reward wrote about a completion."""
BAD_STEPS_KEPT = 5
"""Most batches to dump: one with images takes tens of megabytes; the first ones show the fault."""


class RunRecorder:
    """Append to the files of a run folder, creating it if missing.

    Example:
        >>> with RunRecorder(Path("run")) as recorder:
        ...     recorder.record_step(1, {"policy_version": 1.0, "reward/mean": 1.4})
        ...     recorder.record_groups(1, [], [])
        ...     offsets = recorder.offsets()  # goes into the checkpoint; `truncate(offsets)` on resume
        >>> offsets["metrics.jsonl"]
        53
    """

    def __init__(self, folder: Path, loggers: Loggers | None = None) -> None:
        """Set the paths; call `truncate` first if the folder may hold an earlier run.

        Args:
            folder: the run's folder.
            loggers: show the same numbers elsewhere; None is TensorBoard.
        """
        self._folder = folder
        self._loggers = loggers or Loggers(folder, [GuardedLogger(TensorBoardLogger())])
        self._metrics = JsonLinesWriter(folder / METRICS_FILE)
        self._rollouts = JsonLinesWriter(folder / ROLLOUTS_FILE)
        # written by the tracer; here only synced, measured and truncated with the others
        self._timeline = JsonLinesWriter(folder / TIMELINE_LINES)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=error is not None)

    def record_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append a step's metrics to metrics.jsonl and to the loggers.

        Args:
            step: number of steps done, 1 after the first.
            metrics: by their name in `rlmed.core.metrics.METRICS`; NaN and infinities are written
                as null, "policy_version" as an integer.

        Raises:
            RecordError: if the write fails.
            KeyError: for any other metric.
        """
        for name in metrics:
            find_metric(name)
        line: dict[str, Any] = {"step": step, **{name: float(value) for name, value in metrics.items()}}
        if "policy_version" in metrics:
            line["policy_version"] = int(metrics["policy_version"])
        self._metrics.append(line)
        self._loggers.scalars(step, metrics)

    def record_evaluation(self, step: int, accuracy: Mapping[str, float]) -> None:
        """Log accuracies by file, or `file/task`, after `step` steps."""
        self._loggers.scalars(step, {f"accuracy/{name}": value for name, value in accuracy.items()})

    def record_groups(self, step: int, groups: Sequence[TrainGroup], discarded: Sequence[ScoredGroup]) -> None:
        """Append a step's groups to rollouts.jsonl, one line each.

        A reward that is missing is null; so is the sum of a group that lacks all that count.

        Args:
            step: number of steps done.
            groups: groups that the learner trained on.
            discarded: groups sampled and scored but not trained on; their advantages are null.

        Raises:
            RecordError: if the write fails.
        """
        for group in groups:
            advantages = [float(value) for value in group.advantages]
            self._rollouts.append(_group_line(step, group.scored, advantages))
        for scored in discarded:
            self._rollouts.append(_group_line(step, scored, [None] * len(scored.rewards)))
        self._loggers.rollouts(step, [group.scored for group in groups])

    def record_refusal(self, reason: str) -> None:
        """Write why the run is not started; a write that fails is logged."""
        try:
            replace_text(self._folder / REFUSED_FILE, reason + "\n")
        except RecordError as error:
            log.warning("%s", error)

    def dump_bad_step(self, groups: Sequence[TrainGroup], reason: str) -> None:
        """Save a batch whose loss or gradient was not finite, for replay; only the first few.

        Args:
            groups: the batch.
            reason: what was not finite.

        Raises:
            OSError: if the write fails.
        """
        folder = self._folder / BAD_STEPS_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        number = len(list(folder.glob("*.npz")))
        if number < BAD_STEPS_KEPT:
            write_batch(folder / f"{number + 1:03d}.npz", groups, reason)

    def record_batch(self, step: int, groups: Sequence[TrainGroup]) -> None:
        """Save a batch that another run can learn from (`+debug=recorded`).

        Raises:
            RecordError: if the write fails.
        """
        folder = self._folder / BATCHES_FOLDER
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_batch(folder / f"{step:06d}.npz", groups, "recorded")
        except OSError as error:
            raise refusal(folder, error, advice="start again, or leave debug.record out") from error

    def offsets(self) -> dict[str, int]:
        """Sync each file and return its length in bytes, for a checkpoint's later `truncate`."""
        return {writer.path.name: writer.offset() for writer in self._writers}

    def truncate(self, offsets: Mapping[str, int]) -> None:
        """Truncate the files to a checkpoint, so a killed and resumed run has each step just once.

        Args:
            offsets: from `offsets()`; a file not listed is emptied, so `{}` starts anew.

        Raises:
            RecordError: if a file is shorter than its offset; no file is truncated then.
        """
        for writer in self._writers:
            writer.check(offsets.get(writer.path.name, 0))
        for writer in self._writers:
            writer.truncate(offsets.get(writer.path.name, 0))
        self._loggers.resumed = bool(offsets)

    def close(self, *, failed: bool = False) -> None:
        """Close the files and the loggers, which are told whether the run failed."""
        for writer in self._writers:
            writer.close()
        self._loggers.finish(failed=failed)

    @property
    def _writers(self) -> tuple[JsonLinesWriter, ...]:
        return (self._metrics, self._rollouts, self._timeline)


def _notes(scored: ScoredGroup, index: int) -> dict[str, Any]:
    """Return the entry of what rewards wrote about a completion; empty if nothing."""
    notes = {name: texts[index] for name, texts in scored.notes.items() if texts[index]}
    short = {
        name: text if len(text) <= NOTE_CHARACTERS else f"{text[:NOTE_CHARACTERS]}…" for name, text in notes.items()
    }
    return {"notes": short} if short else {}


def _group_line(step: int, scored: ScoredGroup, advantages: Sequence[float | None]) -> dict[str, Any]:
    request, example = scored.rollout.request, scored.rollout.prompt.example
    completions = [
        {
            "text": completion.text,
            "reward": float(scored.rewards[index]) if scored.rewarded else None,
            "reward_parts": {name: float(values[index]) for name, values in scored.reward_parts.items()},
            "advantage": advantages[index],
            "tokens": len(completion.token_ids),
            "finish_reason": completion.finish_reason,
            "min_version": completion.min_version,
            "max_version": completion.max_version,
            **_notes(scored, index),
        }
        for index, completion in enumerate(scored.rollout.completions)
    ]
    # absent, as in earlier versions, for a question about one image
    more = {"more_images": [str(image) for image in example.more_images]} if example.more_images else {}
    return {
        "step": step,
        "index": request.index,
        "example_id": example.id,
        "image": None if example.image is None else str(example.image),
        **more,
        "question": example.question,
        "options": list(example.options),
        "answer": task_of(example).right_answer(example),
        **({} if example.is_choice else {"task": example.task, "truth": example.truth}),
        "modality": example.modality,
        "question_type": example.kind,
        "completions": completions,
    }
