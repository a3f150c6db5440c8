"""Record where a run spends its time: one JSON line per span, and a timeline for Perfetto."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlmed.core.files.atomic import replace_text
from rlmed.core.files.jsonlines import JsonLinesWriter, read_json_lines

TIMELINE_LINES = "timeline.jsonl"
CHROME_TRACE = "timeline.json"


class Tracer:
    """Record how long each stage takes, in one thread.

    A resumed run continues where the recorded timeline ends, so the time between kill and resume is
    not counted.

    Example:
        >>> tracer = Tracer()
        >>> with tracer.span("rollout", step=3):
        ...     pass
        >>> list(tracer.step_seconds(3))
        ['rollout']
    """

    def __init__(self, path: Path | None = None) -> None:
        """Set up an empty tracer.

        Args:
            path: file to append each finished span to, as {"name", "start", "duration", "step",
                "depth"}: seconds since the start of the run, seconds, the step or null, and the
                number of enclosing spans. None keeps only the sums. The file is opened with the
                first span, so it can be truncated until then.
        """
        self._writer = None if path is None else JsonLinesWriter(path)
        self._depth = 0
        self._seconds: dict[int | None, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self._zero: float | None = None

    @contextmanager
    def span(self, name: str, step: int | None = None) -> Iterator[None]:
        """Time the body, even if it raises.

        Args:
            name: stage.
            step: training step that it belongs to, if any.

        Raises:
            RecordError: if the span cannot be written.
        """
        if self._zero is None:
            self._zero = time.perf_counter() - self._recorded_end()
        start = time.perf_counter()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            duration = time.perf_counter() - start
            self._seconds[step][name] += duration
            if self._writer is not None:
                span = {"name": name, "start": round(start - self._zero, 6), "duration": round(duration, 6)}
                self._writer.append({**span, "step": step, "depth": self._depth})

    def totals(self) -> dict[str, float]:
        """Return seconds by stage since the tracer was made; nested spans count for both stages."""
        totals: dict[str, float] = defaultdict(float)
        for seconds in self._seconds.values():
            for name, duration in seconds.items():
                totals[name] += duration
        return dict(totals)

    def step_seconds(self, step: int) -> dict[str, float]:
        """Return seconds by stage of one step; empty for a step without spans."""
        return dict(self._seconds.get(step, {}))

    def close(self) -> None:
        """Close the file and write `timeline.json` beside it."""
        if self._writer is not None:
            self._writer.close()
            write_chrome_trace(self._writer.path, self._writer.path.with_name(CHROME_TRACE))

    def _recorded_end(self) -> float:
        if self._writer is None:
            return 0.0
        return max((span["start"] + span["duration"] for span in read_json_lines(self._writer.path)), default=0.0)


def write_chrome_trace(timeline: Path, target: Path) -> None:
    """Convert spans to Chrome's trace event format, for https://ui.perfetto.dev.

    Args:
        timeline: file of spans written by `Tracer`.
        target: JSON file to write; times in microseconds since the start of the run.
    """
    events = [
        {
            "name": span["name"],
            "ph": "X",  # a complete event: start and duration in one
            "ts": round(span["start"] * 1e6),
            "dur": round(span["duration"] * 1e6),
            "pid": 1,
            "tid": 1,
            "args": {} if span["step"] is None else {"step": span["step"]},
        }
        for span in read_json_lines(timeline)
    ]
    events.sort(key=lambda event: (event["ts"], -event["dur"]))
    replace_text(target, json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
