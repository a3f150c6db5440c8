"""The page that shows several runs side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from rlmed.core.files.jsonlines import read_json_lines
from rlmed.evaluation.results import EvalSummary
from rlmed.recording.inputs import CONFIG_FILE
from rlmed.recording.recorder import METRICS_FILE
from rlmed.report.page import read_config
from rlmed.report.plots import SERIES, Plot, draw_comparison
from rlmed.studio.curves import draw_plots
from rlmed.studio.runs import DAMAGE, Run
from rlmed.studio.state import studio_of

MOST = len(SERIES)
"""As many runs as there are colours."""
ABSENT = "–"


def show_comparison(request: Request) -> Response:
    """Return the curves, accuracies and differing settings of the runs `?run=a&run=b`."""
    studio = studio_of(request)
    chosen = [studio.found(name) for name in dict.fromkeys(request.query_params.getlist("run"))][:MOST]
    names = {run.name for run in chosen}
    values: dict[str, Any] = {"plots": [], "differences": [], "accuracies": None, "problems": []}
    if len(chosen) > 1:
        stamp = "/".join(studio.runs.stamp(run) for run in chosen)
        key = ("comparison", *(run.folder for run in chosen))
        values = studio.kept(key, stamp, lambda: _values(chosen))
    others = [glance for glance in studio.runs.glances() if glance.run.name not in names]
    return studio.page("compare.html.j2", request, runs=chosen, others=others, most=MOST, **values)


def _values(runs: Sequence[Run]) -> dict[str, Any]:
    lines: dict[str, list[dict[str, Any]]] = {}
    configs: list[dict[str, Any]] = []
    summaries: list[EvalSummary | None] = []
    problems: list[str] = []
    for run in runs:
        lines[run.name] = []
        config: dict[str, Any] = {}
        summary = None
        try:
            lines[run.name] = list(read_json_lines(run.file(METRICS_FILE)))
            config = flat(read_config(run.file(CONFIG_FILE))[1])
            summary = _last_summary(run)
        except DAMAGE as error:
            problems.append(str(error) or type(error).__name__)
        configs.append(config)
        summaries.append(summary)
    plots: list[Plot] = []
    try:
        plots = draw_plots(lambda: draw_comparison(lines))
    except DAMAGE as error:
        problems.append(f"the curves cannot be drawn ({error})")
    return {
        "plots": plots,
        "differences": differences(configs),
        "accuracies": _accuracies(summaries),
        "problems": problems,
    }


def _last_summary(run: Run) -> EvalSummary | None:
    found = run.evaluations()
    return EvalSummary.read(found[-1]) if found else None


def _accuracies(summaries: Sequence[EvalSummary | None]) -> dict[str, Any] | None:
    """Return the last accuracies: the runs' steps, and a line a file with an entry a run."""
    if not any(summaries):
        return None
    by_file = [{file.name: file.accuracy for file in one.files} if one else {} for one in summaries]
    names = dict.fromkeys(name for files in by_file for name in files)
    return {
        "steps": [one.step if one else None for one in summaries],
        "lines": [{"name": name, "of_runs": [files.get(name) for files in by_file]} for name in names],
    }


def flat(config: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested configuration by dotted keys; an empty mapping stays a value.

    Example:
        >>> flat({"algo": {"group_size": 8, "loss": {}}, "seed": 0})
        {'algo.group_size': 8, 'algo.loss': {}, 'seed': 0}
    """
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def differences(configs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the keys whose values differ, each with its value in every configuration.

    Example:
        >>> differences([{"seed": 0, "steps": 9}, {"seed": 1, "steps": 9}])
        [{'key': 'seed', 'values': ['0', '1']}]
    """
    keys = dict.fromkeys(key for config in configs for key in config)
    lines = [{"key": key, "values": [_text(config.get(key, ABSENT)) for config in configs]} for key in keys]
    return [line for line in lines if len(set(line["values"])) > 1]


def _text(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
