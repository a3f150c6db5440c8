"""The page of one run: how it goes, its curves, accuracy, time, workers and configuration."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from rlmed.core.files.damage import read_json
from rlmed.core.files.jsonlines import read_json_lines
from rlmed.core.tracing import TIMELINE_LINES
from rlmed.evaluation.results import EvalSummary
from rlmed.models.tiny.toy import EMBEDDED, TOY_NOTE
from rlmed.recording.inputs import CONFIG_FILE, VERSIONS_FILE
from rlmed.recording.recorder import METRICS_FILE, ROLLOUTS_FILE
from rlmed.report.accuracy import accuracy_table, scores_by_task, show_faithfulness, show_rules
from rlmed.report.evaluations import Evaluations
from rlmed.report.headline import WINDOW, headline
from rlmed.report.page import read_config, time_by_stage
from rlmed.report.plots import Plot, draw_accuracy, draw_metrics
from rlmed.studio.curves import draw_plots
from rlmed.studio.evaluated import read_evaluations
from rlmed.studio.fragments import answer_if_changed, tag_of
from rlmed.studio.runs import DAMAGE, STATES, Glance, Run
from rlmed.studio.state import REST, Studio, studio_of

NEVER = Evaluations((), (), (), None, None, None, (), ())
RECENT = WINDOW
"""Steps over which the latest values of the workers are averaged."""
WORKERS = {
    "rollout/workers_ready": ("workers ready", "at the last step", "{:.0f}"),
    "rollout/idle_share": ("time without work", f"mean of the last {RECENT} steps", "{:.1%}"),
    "rollout/workers_lost": ("workers lost", "since the start", "{:.0f}"),
    "rollout/groups_sampled_again": ("groups sampled again", "that a lost worker held", "{:.0f}"),
    "rollout/groups_late": ("late answers dropped", "of lost workers", "{:.0f}"),
    "rollout/push_fetch_s": ("fetching the weights", f"slowest worker, last {RECENT} steps", "{:.2f} s"),
    "rollout/push_apply_s": ("applying the weights", f"slowest worker, last {RECENT} steps", "{:.2f} s"),
    "staleness": ("staleness", f"versions behind, most in the last {RECENT} steps", "{:.0f}"),
}
"""Label, note and format by metric; of totals the last value counts."""
_MEANS, _MOST = ("rollout/idle_share",), ("rollout/push_fetch_s", "rollout/push_apply_s", "staleness")


def show_run(request: Request) -> Response:
    """Return the page of the run `?name=`; 404 for any other name."""
    studio = studio_of(request)
    glance, values, tag = _lately(studio, studio.run(request, "name"))
    return studio.page("run.html.j2", request, glance=glance, states=STATES, tag=tag, **values)


def show_run_live(request: Request) -> Response:
    """Return what changes while the run goes on; 304 if nothing did."""
    studio = studio_of(request)
    run = studio.run(request, "name")
    glance, values, tag = _lately(studio, run)

    def answer() -> Response:
        return studio.page("run_live.html.j2", request, glance=glance, states=STATES, tag=tag, **values)

    return answer_if_changed(request, tag, answer)


def _lately(studio: Studio, run: Run) -> tuple[Glance, dict[str, Any], str]:
    """Return a glance at a run, what its page shows, and the tag of both."""
    glance = studio.runs.glance(run)
    stamp = studio.runs.stamp(run)
    rest = REST if glance.state == "running" else 0
    values, of = studio.lately_kept(("run", run.folder), stamp, lambda: _values(run, glance), rest=rest)
    return glance, values, tag_of(run.name, of, glance.state)


def _values(run: Run, glance: Glance) -> dict[str, Any]:
    problems: list[str] = []

    def attempt(read: Callable[[], Any], otherwise: Any) -> Any:
        try:
            return read()
        except DAMAGE as error:
            problems.append(str(error) or type(error).__name__)
            return otherwise

    metrics = attempt(lambda: list(read_json_lines(run.file(METRICS_FILE))), [])
    evaluations = attempt(lambda: read_evaluations(run), NEVER)
    config_text, config = attempt(lambda: read_config(run.file(CONFIG_FILE)), ("", {}))
    versions = attempt(lambda: read_json(file) if (file := run.file(VERSIONS_FILE)).exists() else {}, {})
    plots: list[Plot] = attempt(lambda: draw_plots(lambda: _draw(metrics, evaluations.summaries)), [])
    configured = attempt(lambda: (config.get("model") or {}).get("path"), None)
    model = str(configured or next((one.model for one in evaluations.summaries), ""))
    return {
        "run": run,
        "model": model,
        "device": versions.get("cuda_device") or versions.get("cpu"),
        # earlier versions did not record it
        "toy": TOY_NOTE if versions.get("toy_model") or model.startswith(EMBEDDED) else None,
        "skipped_steps": attempt(lambda: int((metrics[-1].get("skipped_steps") or 0) if metrics else 0), 0),
        "tiles": attempt(lambda: _tiles(metrics, evaluations.summaries, glance), []),
        "plots": plots,
        "table": attempt(lambda: accuracy_table(evaluations), None),
        "scores": attempt(lambda: scores_by_task(evaluations), None),
        "rules": attempt(lambda: show_rules(evaluations), None),
        "faithfulness": attempt(lambda: show_faithfulness(evaluations), None),
        "timeline": attempt(lambda: _time_by_stage(run), None),
        "workers": attempt(lambda: workers(metrics), []),
        "has_rollouts": run.file(ROLLOUTS_FILE).exists(),
        "config_text": config_text,
        "versions": versions,
        "problems": problems,
    }


def _time_by_stage(run: Run) -> dict[str, Any] | None:
    """Return the report's table; raises ValueError for times that are none."""
    spent = time_by_stage(run.file(TIMELINE_LINES))
    if spent and not all(0 <= stage["seconds"] < math.inf for stage in spent["stages"]):
        raise ValueError(f"{TIMELINE_LINES} is damaged: a stage took less than nothing, or for ever")
    return spent


def _draw(metrics: Sequence[Mapping[str, Any]], summaries: Sequence[EvalSummary]) -> list[Plot]:
    accuracy = draw_accuracy(summaries)
    return ([accuracy] if accuracy else []) + draw_metrics(metrics)


def _tiles(
    metrics: Sequence[Mapping[str, Any]], summaries: Sequence[EvalSummary], glance: Glance
) -> list[dict[str, Any]]:
    """Return headline figures: label, value, the value at the start (or None), note."""
    tiles = []
    if summaries:
        first, last = summaries[0], summaries[-1]
        was = None if first is last else f"{100 * first.mean_accuracy:.1f}"
        many = f"mean of {len(last.files)} files " if len(last.files) > 1 else ""
        note = f"{many}at step {last.step}" if was is None else f"{many}at steps {first.step} and {last.step}"
        tiles.append({"label": "accuracy, %", "value": f"{100 * last.mean_accuracy:.1f}", "was": was, "note": note})
    for name, label, form in (
        ("reward/mean", "reward", "{:.2f}"),
        *(() if glance.kind == "train" else (("loss", "loss", "{:.3f}"),)),
        ("completion/length", "length, tokens", "{:.0f}"),
        ("kl", "KL", "{:.3f}"),
        ("tokens_per_second", "tokens per second", "{:,.0f}"),
    ):
        if (ends := headline(metrics, name)) is not None:
            was = None if ends.start is None else form.format(ends.start)
            tiles.append({"label": label, "value": form.format(ends.end), "was": was, "note": ends.note})
    return tiles


def workers(metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return how the rollout workers are, a line a figure; empty for a run without workers.

    Args:
        metrics: lines of metrics.jsonl.
    """
    if not any(name.startswith("rollout/workers") for name in (metrics[-1] if metrics else ())):
        return []
    lines = []
    for name, (label, note, form) in WORKERS.items():
        values = [line[name] for line in metrics if line.get(name) is not None]
        if values:
            recent = values[-RECENT:]
            value = float(np.mean(recent)) if name in _MEANS else max(recent) if name in _MOST else values[-1]
            lines.append({"label": label, "note": note, "value": form.format(value)})
    return lines
