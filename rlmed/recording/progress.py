"""Show a run's progress: a live display in a terminal, plain lines elsewhere, with the same facts.

It goes to stdout like the final table, so that `| tee run.log` keeps both in order; stderr is for
warnings and errors.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rlmed.core.process.display import output
from rlmed.recording.time_left import TimeLeft

REWARD = "reward/"
METRICS = {
    "kl": ("kl", "{:.4f}"),
    "completion/length": ("length", "{:.0f}"),
    "prompts/set_aside": ("set aside", "{:.0%}"),
    "tokens_per_second": ("tokens/s", "{:.0f}"),
}
"""Metrics shown after the rewards, in this order, each with label and format."""
LABEL, BAR, LEAST = 24, 32, 8
"""Most characters of a bar's label and of the bar, and fewest of each in a narrow terminal."""


class Progress:
    """Show steps, stages and messages; as a context manager, keep a live display.

    Outside of the context everything appears as plain lines.

    Example:
        >>> with Progress() as progress:                                             # doctest: +SKIP
        ...     progress.start(total=200, done=0)
        ...     progress.step(12, {"reward/mean": 1.42, "kl": 0.003})
        step 12/200 reward 1.42 kl 0.0030 left 3m10s
    """

    def __init__(self, console: Console | None = None, *, line_every_s: float = 10.0) -> None:
        """Show progress.

        Args:
            console: output; None is stdout, in a notebook its plain text.
            line_every_s: seconds between plain lines, for steps and for stages.
        """
        self._console = console or output()
        self._line_every_s = line_every_s
        self._live: Live | None = None
        self._moved_handlers: list[tuple[logging.StreamHandler, object]] = []  # type: ignore[type-arg]
        self._total = self._done = 0
        self._facts: dict[str, str] = {}
        self._accuracy: dict[str, str] = {}
        self._stage: tuple[str, int, int, str] | None = None
        self._left = TimeLeft()
        self._answering: tuple[int, float, int] | None = None
        self._answered = 0
        self._last_line = {"step": float("-inf"), "stage": float("-inf")}

    def __enter__(self) -> Self:
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(get_renderable=self._render, console=self._console, refresh_per_second=4)
            self._live.start()
            self._move_log_handlers()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._stage = None
            for handler, stream in self._moved_handlers:
                handler.setStream(stream)
            self._moved_handlers.clear()
            self._live.stop()
            self._live = None

    def start(self, total: int, done: int, evaluations: Mapping[int, int] | None = None) -> None:
        """Begin counting steps; a resumed run has already done `done` of `total`.

        Args:
            total: steps of the run.
            done: those done already.
            evaluations: number of answers of each evaluation to come, by its step; they count in
                the time left.
        """
        self._total, self._done, self._stage = total, done, None
        self._left.start(total, done, time.monotonic(), evaluations or {})

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show a finished step.

        Args:
            step: number of steps done.
            metrics: the step's metrics by name; rewards (without any, the loss) and those in
                `METRICS` are shown.
        """
        self._done, self._stage = step, None
        self._left.step(step, time.monotonic())
        self._facts = _facts(metrics)
        self._plain("step", self._step_line(), always=step >= self._total)

    def evaluated(self, accuracy: Mapping[str, float], step: int, *, seconds: float = 0.0, answers: int = 0) -> None:
        """Show the accuracies, fractions by file, of an evaluation after `step` steps, once.

        The live display keeps showing their mean with its step; lines of later steps don't repeat
        it. `seconds` and number of `answers` of the evaluation tell how long the next ones take.
        """
        self._left.evaluated(seconds, answers, step)
        self._answering, self._answered = None, 0
        mean = f"{sum(accuracy.values()) / len(accuracy):.1%}"
        self._accuracy = {f"accuracy after {step} steps": mean}
        shown = [f"{name} {value:.1%}" for name, value in accuracy.items()] + [f"mean {mean}"] * (len(accuracy) > 1)
        self.message(f"accuracy after {step} steps: {', '.join(shown)}")

    def stage(self, text: str, done: int, total: int, what: str = "") -> None:
        """Show that `done` of `total` parts of a stage are finished; `what` names them, plural."""
        count = f"{done}/{total} {what}".rstrip()
        self._stage = (text, done, total, count) if done < total else None
        self._plain("stage", f"{text} {count}", always=done >= total)

    def answers(self, file: str, done: int, total: int) -> None:
        """Show that `done` of `total` evaluation answers are finished, the latest for `file`."""
        now = time.monotonic()
        if self._answering is None or self._answering[2] != total or done <= self._answering[0]:
            self._answering = (done, now, total)
        self._answered = done
        first, begin, _ = self._answering
        # the first answers tell little: they come together, after a pause
        left = (now - begin) / (done - first) * (total - done) if done > first else self._left.answering(total - done)
        said = f"answers, left {duration(left)}" if left is not None and done < total else "answers"
        self.stage(f"evaluate {file}", done, total, said)

    def earlier(self, seconds: float, answers: int) -> None:
        """Learn from an evaluation of an earlier part of the run how long an answer takes."""
        self._left.evaluated(seconds, answers)

    def resuming(self, done: int, steps: int, checkpoint: Path, *, evaluates: bool, longer: str = "steps") -> None:
        """Say where a resumed run goes on, and what is left if all its steps were done.

        Raising the setting `longer` makes a run longer.
        """
        self.message(f"resuming after step {done} of {steps} from {checkpoint}")
        if done >= steps:
            left = "only the evaluation at the end is repeated" if evaluates else "nothing is left to do"
            self.message(f"all {steps} steps were done already: {left}; for more of them, raise {longer}")

    def message(self, text: str) -> None:
        """Print a permanent message."""
        self._console.print(Text(text), soft_wrap=True)

    def _plain(self, what: str, line: str, *, always: bool) -> None:
        """Print a plain line, unless one was just printed or the live display shows it."""
        if self._live is not None:
            return
        now = time.monotonic()
        if always or now - self._last_line[what] >= self._line_every_s:
            self._last_line[what] = now
            self.message(line)

    def _step_line(self) -> str:
        facts = dict(self._facts)
        left = self._time_left()
        if left is not None:
            facts["left"] = left
        return " ".join([f"step {self._done}/{self._total}", *(f"{name} {value}" for name, value in facts.items())])

    def _time_left(self) -> str | None:
        """Return the time left in words, evaluations included; None before the first step."""
        seconds = self._left.seconds()
        if seconds is None:
            return None
        seconds = max(0.0, seconds - (self._left.answering(self._answered) or 0.0))
        return duration(seconds) + ("" if self._left.is_whole else f" and {self._left.answers} evaluation answers")

    def _render(self) -> Group:
        lines: list[_BarLine | _Facts] = []
        if self._total:
            left = self._time_left()
            note = f"{self._done}/{self._total}" + ("" if left is None else f", left {left}")
            lines.append(_BarLine("training", self._done, self._total, note))
            if facts := self._facts | self._accuracy:
                lines.append(_Facts(facts))
        if self._stage is not None:
            lines.append(_BarLine(*self._stage))
        return Group(*lines)

    def _move_log_handlers(self) -> None:
        """Route log lines through the live display: handlers still hold the earlier stream."""
        plain = {sys.__stdout__: sys.stdout, sys.__stderr__: sys.stderr}
        for handler in logging.getLogger().handlers:
            if type(handler) is logging.StreamHandler and handler.stream in plain:
                self._moved_handlers.append((handler, handler.stream))
                handler.setStream(plain[handler.stream])


def _facts(metrics: Mapping[str, float]) -> dict[str, str]:
    # with rewards, the loss is uninformative: that of a policy gradient hovers around zero
    rewards = [name for name in metrics if name.startswith(REWARD)]
    shown = {name: (name.removeprefix(REWARD), "{:.2f}") for name in rewards} or {"loss": ("loss", "{:.3f}")}
    shown = {name: ("reward" if label == "mean" else label, form) for name, (label, form) in shown.items()} | METRICS
    return {label: form.format(metrics[name]) for name, (label, form) in shown.items() if name in metrics}


class _BarLine:
    """A label, a bar and a note on one line of any width; the note is the last to be cut."""

    def __init__(self, text: str, done: int, total: int, note: str) -> None:
        self._text, self._done, self._total, self._note = text, done, total, note

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        free = options.max_width - len(self._note) - 2  # beside two spaces
        bar = min(BAR, free - LABEL)
        if bar < LEAST:
            bar = LEAST if free >= 2 * LEAST else 0
        label = max(0, min(LABEL, free - bar))
        grid = Table.grid(padding=(0, 1))
        for width in (label, bar):
            grid.add_column(width=width, no_wrap=True, overflow="ellipsis")
        grid.add_column(no_wrap=True, overflow="ellipsis")
        shown = ProgressBar(total=self._total, completed=self._done, width=bar) if bar else Text()
        grid.add_row(Text(self._text), shown, Text(self._note))
        yield grid


class _Facts:
    """Names with values, on as many lines as the width needs; none is parted."""

    def __init__(self, facts: Mapping[str, str]) -> None:
        self._facts = facts

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        line = Text()
        for name, value in self._facts.items():
            fact = Text("  ").append(f"{name} ", style="dim").append(value)
            if line and len(line) + len(fact) > options.max_width:
                yield line
                line = Text()
            line.append_text(fact)
        line.overflow, line.no_wrap = "ellipsis", True
        yield line


def duration(seconds: float) -> str:
    """Format seconds for humans.

    Example:
        >>> duration(190), duration(7), duration(7380)
        ('3m10s', '7s', '2h03m')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
