import json
import subprocess
import sys

import pytest

from rlmed.core import tracing
from rlmed.core.files.jsonlines import read_json_lines
from rlmed.core.tracing import Tracer, write_chrome_trace


class Clock:
    """A stand-in for the module `time`."""

    def __init__(self, now=100.0):
        self.now = now

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(tracing, "time", clock)
    return clock


def test_spans_are_written_and_summed(tmp_path, clock):
    tracer = Tracer(tmp_path / "timeline.jsonl")
    for step in (1, 2):
        with tracer.span("rollout", step=step):
            clock.now += 2.0 * step
        with tracer.span("learn", step=step):
            clock.now += 0.5
    with tracer.span("rollout", step=2):
        clock.now += 1.0
    assert tracer.step_seconds(2) == {"rollout": 5.0, "learn": 0.5}
    assert tracer.step_seconds(7) == {}
    assert tracer.totals() == {"rollout": 7.0, "learn": 1.0}
    spans = list(read_json_lines(tmp_path / "timeline.jsonl"))
    assert spans[0] == {"name": "rollout", "start": 0.0, "duration": 2.0, "step": 1, "depth": 0}
    assert [span["start"] for span in spans] == [0.0, 2.0, 2.5, 6.5, 7.0]


def test_a_span_that_raises_is_recorded_and_depth_recovers(tmp_path, clock):
    tracer = Tracer(tmp_path / "timeline.jsonl")

    def fail():
        with tracer.span("outer"), tracer.span("inner", step=3):
            clock.now += 1.0
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail()
    with tracer.span("after"):
        pass
    found = [(span["name"], span["step"], span["depth"]) for span in read_json_lines(tmp_path / "timeline.jsonl")]
    assert found == [("inner", 3, 1), ("outer", None, 0), ("after", None, 0)]


def test_a_resumed_run_goes_on_where_the_file_ends(tmp_path, clock):
    path = tmp_path / "timeline.jsonl"
    first = Tracer(path)
    with first.span("rollout", step=1):
        clock.now += 3.0
    clock.now = 5000.0  # another process, another zero
    second = Tracer(path)
    with second.span("rollout", step=2):
        clock.now += 1.0
    assert [span["start"] for span in read_json_lines(path)] == [0.0, 3.0]


def test_the_file_may_be_cut_back_before_the_first_span(tmp_path, clock):
    path = tmp_path / "timeline.jsonl"
    path.write_text('{"name": "old", "start": 50.0, "duration": 1.0, "step": 1, "depth": 0}\n')
    tracer = Tracer(path)
    path.write_text("")
    with tracer.span("new"):
        clock.now += 1.0
    assert [span["start"] for span in read_json_lines(path)] == [0.0]


def test_chrome_trace_has_complete_events_in_microseconds(tmp_path, clock):
    tracer = Tracer(tmp_path / "timeline.jsonl")
    with tracer.span("outer"):
        clock.now += 0.25
        with tracer.span("inner", step=4):
            clock.now += 0.5
    tracer.close()
    trace = json.loads((tmp_path / "timeline.json").read_text())
    assert [(e["name"], e["ph"], e["ts"], e["dur"], e["args"]) for e in trace["traceEvents"]] == [
        ("outer", "X", 0, 750_000, {}),
        ("inner", "X", 250_000, 500_000, {"step": 4}),
    ]


def test_chrome_trace_of_a_killed_run_leaves_the_half_line_out(tmp_path):
    path = tmp_path / "timeline.jsonl"
    path.write_text('{"name": "a", "start": 0.0, "duration": 1.0, "step": 1, "depth": 0}\n{"name": "b", "st')
    write_chrome_trace(path, tmp_path / "timeline.json")
    assert len(json.loads((tmp_path / "timeline.json").read_text())["traceEvents"]) == 1


def test_without_a_file_only_sums_are_kept(clock):
    tracer = Tracer()
    with tracer.span("evaluate"):
        clock.now += 4.0
    tracer.close()
    assert tracer.totals() == {"evaluate": 4.0}


def test_tracing_needs_no_torch():
    code = "import sys, rlmed.core.tracing; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
