"""Say what a command would do, try a few steps of it in a temporary folder, estimate its time."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

from rlmed.cluster.commands import build_sampling
from rlmed.core.config.composing import compose_config, differences
from rlmed.core.config.schema import RunConfig
from rlmed.core.process.display import output
from rlmed.evaluation.run import Evaluator
from rlmed.evaluation_run import open_evaluation
from rlmed.recording.progress import Progress, duration
from rlmed.run import Run
from rlmed.sft_run import load_state, open_finetuning

STEPS = 3
"""Steps that are tried."""
ANSWERS = 128
"""Evaluation answers that are tried: as many as are in flight at a time."""
MORE_ANSWERS = 3
"""Times as many are tried next, if the first took less than `LONG_S`: no caches fill then, and the
places that short answers leave are taken again.
"""
LONG_S = 10.0
SPREAD = 1.5
"""Factor by which the range goes beyond the fastest and slowest step: completions change length,
and other programs come and go.
"""
UNCOUNTED = "checkpoints, loggers, report"


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds of a run, from the steps and answers that were tried."""

    start_s: float
    """Loading of libraries, model and data, and the check of the first rollouts."""
    steps: int
    """Still to do."""
    step_s: Sequence[float]
    """Of each step tried; the first one is slower where something is compiled, or caches fill."""
    answers: int
    """In all evaluations."""
    answer_s: float

    def _seconds(self, step_s: float) -> float:
        return self.start_s + self.steps * step_s + self.answers * self.answer_s

    @property
    def seconds(self) -> float:
        """Most likely seconds."""
        usual = self.step_s[1:] or self.step_s
        extra = self.step_s[0] - usual[0] if self.step_s else 0.0
        return self._seconds(sum(usual) / len(usual) if usual else 0.0) + max(0.0, extra)

    @property
    def range(self) -> tuple[float, float]:
        """Least and most seconds, as far as a few steps can tell."""
        least, most = (self._seconds(end(self.step_s, default=0.0)) for end in (min, max))
        return min(least, self.seconds) / SPREAD, max(most, self.seconds) * SPREAD

    def line(self) -> str:
        """Return the estimate in words."""
        low, high = map(duration, self.range)
        parts = [f"start {duration(self.start_s)}"]
        if self.steps:
            usual = self.step_s[1:] or self.step_s
            parts.append(f"{self.steps} steps of {sum(usual) / len(usual):.2f} s")
        if self.answers:
            parts.append(f"{self.answers:,} evaluation answers of {1000 * self.answer_s:.1f} ms")
        return f"time: about {duration(self.seconds)}, between {low} and {high} ({', '.join(parts)}; not counted: {UNCOUNTED})"


def try_training(config: RunConfig, checkpoint: Path | None = None, began: float | None = None) -> None:
    """Print what `rlmed.launch` would do, and about how long it takes.

    Args:
        config: of the run.
        checkpoint: of a run to resume, whose folder is only read.
        began: `time.perf_counter` when the command began; None is now.
    """
    began = time.perf_counter() if began is None else began
    with _trying("train", config) as (quiet, folder):
        run = Run(quiet, folder)
        try:
            if checkpoint:
                run.load_state(checkpoint)
            loaded = time.perf_counter() - began
            algo, rows, steps = config.algo, len(run.data.train_examples), max(0, config.steps - run.done)
            groups = steps * algo.groups_per_step
            evaluations = run.evaluations()
            if config.eval.at_start and run.data.evals and not run.done:
                evaluations[0] = run.evaluator.count(controls=config.eval.controls)
            more = f", and up to {algo.max_refills} times as many in place of groups without signal"
            _say(
                f"plan: {_steps(steps, config.steps, checkpoint)} on {rows:,} questions, {groups / rows:.2f} epochs; "
                f"{groups:,} groups of {algo.group_size}, {groups * algo.group_size:,} completions"
                + (more if algo.dynamic_sampling and algo.max_refills else "")
            )
            _say_evaluations(evaluations)
            begin = time.perf_counter()
            step_s, length = run.probe(min(STEPS, steps))
            checked = time.perf_counter() - begin - sum(step_s)
            if step_s:
                _say(
                    f"tried: {len(step_s)} steps of {', '.join(f'{s:.2f}' for s in step_s)} s; completions of "
                    f"{length:.0f} tokens, at most {config.rollout.max_tokens}: longer ones take longer"
                )
            answer_s = _answer_seconds(run.evaluator) if evaluations else 0.0
        finally:
            run.close()
        _say(Estimate(loaded + checked, steps, step_s, sum(evaluations.values()), answer_s).line())


def try_finetuning(config: RunConfig, checkpoint: Path | None = None, began: float | None = None) -> None:
    """Print what `rlmed.sft` would do, and its time; arguments as `try_training`."""
    began = time.perf_counter() if began is None else began
    with _trying("sft", config) as (quiet, folder):
        opened = open_finetuning(quiet, folder)
        with opened.parts.resources:
            done = int(load_state(checkpoint, config, opened.data, opened.parts)["step"]) if checkpoint else 0
            loaded, step_s = time.perf_counter() - began, []
            batches, rows = opened.batches, len(opened.data.train_examples)
            steps = max(0, batches.steps - done)
            _say(f"plan: {_steps(steps, batches.steps, checkpoint)} on {rows:,} rows, {config.sft.epochs:g} epochs")
            evaluator = opened.evaluator(folder, None)
            answers = evaluator.count(controls=config.eval.controls)
            ends = {0: config.eval.at_start and not done, batches.steps: config.eval.at_end}
            evaluations = {step: answers for step, wanted in ends.items() if wanted and answers}
            _say_evaluations(evaluations)
            answer_s = _answer_seconds(evaluator) if evaluations else 0.0
            for step in range(done, done + min(STEPS, steps)):
                begin = time.perf_counter()
                opened.parts.learner.step(batches.batch(step))
                step_s.append(time.perf_counter() - begin)
        if step_s:
            _say(f"tried: {len(step_s)} steps of {', '.join(f'{s:.2f}' for s in step_s)} s")
        _say(Estimate(loaded, steps, step_s, sum(evaluations.values()), answer_s).line())


def try_evaluation(config: RunConfig, began: float | None = None) -> None:
    """Print what `rlmed.evaluate`, begun at `began`, would do, and about how long it takes."""
    began = time.perf_counter() if began is None else began
    with _trying("evaluate", config) as (quiet, folder):
        evaluator, sampling = open_evaluation(quiet, folder, Progress(), build_sampling)
        with sampling.resources:
            loaded, answers = time.perf_counter() - began, evaluator.count(controls=config.eval.controls)
            _say_evaluations({0: answers})
            answer_s = _answer_seconds(evaluator)
        _say(Estimate(loaded, 0, (), answers, answer_s).line())


@contextmanager
def _trying(program: str, config: RunConfig) -> Iterator[tuple[RunConfig, Path]]:
    """Say settings and, of what follows, the memory; give settings and folder to try them in."""
    changed = differences(config, compose_config(program, []))
    _say("settings that differ from the defaults (--cfg job shows all):" if changed else "settings: the defaults")
    for key, (value, default) in changed.items():
        _say(f"  {key}: {_written(value)} (default {_written(default)})")
    handler, logger = _Said(), logging.getLogger("rlmed.cluster.capacity")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    quiet = dataclasses.replace(config, loggers=())
    try:
        with TemporaryDirectory(prefix="rlmed-dry-run-") as folder:
            yield quiet, Path(folder)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class _Said(logging.Handler):
    """Prints the estimate of memory."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno == logging.INFO:
            _say(record.getMessage())


def _answer_seconds(evaluator: Evaluator) -> float:
    """Return the seconds per answer of a small evaluation, without controls."""
    seconds = 0.0
    for first, last in ((0, ANSWERS), (ANSWERS, (1 + MORE_ANSWERS) * ANSWERS)):
        begin, end = (math.ceil(place / len(evaluator.files)) for place in (first, last))
        files = [dataclasses.replace(file, examples=file.examples[begin:end]) for file in evaluator.files]
        small = dataclasses.replace(evaluator, files=[file for file in files if file.examples])
        if small.files:
            took = small.evaluate(0, controls=False).seconds
            seconds = took / small.count(controls=False)
            if took > LONG_S:
                break
    return seconds


def _steps(left: int, steps: int, checkpoint: Path | None) -> str:
    """Return how many steps are left to do, from which checkpoint on."""
    return f"{left} of {steps} steps, resumed from {checkpoint}," if checkpoint else f"{steps} steps"


def _say_evaluations(evaluations: dict[int, int]) -> None:
    listed = ", ".join(f"after step {step} {answers:,}" for step, answers in sorted(evaluations.items()))
    _say(f"evaluation answers: {sum(evaluations.values()):,}" + (f" ({listed})" if listed else ""))


def _written(value: object) -> str:
    return (
        str(yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6))
        .removesuffix("...\n")
        .strip()
    )


def _say(text: str) -> None:
    output().print(text, soft_wrap=True, markup=False)
