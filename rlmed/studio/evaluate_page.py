"""The page of a run's evaluations: accuracy with its controls, reliability, each evaluated row."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlencode

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from rlmed.evaluation.records import SHOWN
from rlmed.evaluation.reliability.results import ReliabilitySummary
from rlmed.report.accuracy import accuracy_table, scores_by_task, show_faithfulness, show_rules
from rlmed.report.plots import Plot, draw_accuracy
from rlmed.report.reliability import show_reliability
from rlmed.studio.curves import draw_plots
from rlmed.studio.evaluated import OUTCOMES, PAGE, EvaluatedRows, RowFilters, read_evaluations, steps_of
from rlmed.studio.pictures import Pictures
from rlmed.studio.runs import DAMAGE, Run
from rlmed.studio.state import Studio, studio_of

_T = TypeVar("_T")


def show_evaluations(request: Request) -> Response:
    """Return the evaluations of `?run=`, with the rows that fit; without a run, those to choose."""
    studio = studio_of(request)
    if not request.query_params.get("run"):
        evaluated = [one for one in studio.runs.glances() if steps_of(one.run)]
        return studio.page("evaluate_of.html.j2", request, glances=evaluated)
    run = studio.run(request)
    steps = steps_of(run)
    if not steps:
        raise HTTPException(404, f"{run.name} has no evaluation: data.eval and eval.at_end make one.")
    stamp = studio.runs.stamp(run)
    tables = studio.kept(("evaluate", run.folder), stamp, lambda: _tables(run))
    step = _step(request, steps)
    problems = list(tables["problems"])
    rows = _attempt(lambda: _rows(studio, run, step), None, problems)
    browsed = {} if rows is None else _browsed(rows, RowFilters.read(request.query_params), studio.pictures)
    here = urlencode({"run": run.name, "step": step})
    values = {"run": run, "steps": sorted(steps), "step": step, "here": here, "rows": rows, **tables, **browsed}
    return studio.page("evaluate.html.j2", request, **values | {"problems": problems})


def send_row_image(request: Request) -> Response:
    """Return picture `?number=` of row `?row=` of `?step=` of run `?run=`, as JPEG; 404 for others.

    So it is where `?key=` is not the row's, because the evaluation was done again.
    """
    studio = studio_of(request)
    run = studio.run(request)
    try:
        row, number = (int(request.query_params.get(name, "")) for name in ("row", "number"))
        if min(row, number) < 0:
            raise LookupError
        rows = _rows(studio, run, _step(request, steps_of(run)))
        if rows.key(row) != request.query_params.get("key"):
            raise LookupError
        return studio.pictures.send(request, rows.rows[row].images[number])
    except DAMAGE:
        raise HTTPException(404, "There is no such picture.") from None


def _step(request: Request, steps: dict[int, Path]) -> int:
    """Return the step asked for, by default the last one; 404 for one without an evaluation."""
    asked = request.query_params.get("step", "")
    if not asked:
        return max(steps, default=0)
    if not (asked.isascii() and asked.isdigit() and len(asked) < 16 and int(asked) in steps):
        raise HTTPException(404, f"There is no evaluation at step {asked[:20]}.")
    return int(asked)


def _rows(studio: Studio, run: Run, step: int) -> EvaluatedRows:
    # of each run only one step's, which may be large
    stamp = f"{studio.runs.stamp(run)} {step}"
    rows: EvaluatedRows = studio.kept(("rows", run.folder), stamp, lambda: EvaluatedRows.read(run, step))
    return rows


def _tables(run: Run) -> dict[str, Any]:
    """Return what the page shows above the rows; what is damaged is named in "problems"."""
    problems: list[str] = []
    found = _attempt(lambda: read_evaluations(run), None, problems)
    reliability = None
    if found is not None and (measured := found.reliability) is not None:
        reliability = _attempt(lambda: _reliability(measured), None, problems)
    curve: list[Plot] = []
    if found is not None:
        summaries = found.summaries
        curve = _attempt(
            lambda: draw_plots(lambda: [plot] if (plot := draw_accuracy(summaries)) else []), curve, problems
        )
    return {
        "table": found and _attempt(lambda: accuracy_table(found), None, problems),
        "scores": found and _attempt(lambda: scores_by_task(found), None, problems),
        "rules": found and _attempt(lambda: show_rules(found), None, problems),
        "faithfulness": found and _attempt(lambda: show_faithfulness(found), None, problems),
        "curve": curve,
        "reliability": reliability,
        "problems": problems,
    }


def _reliability(measured: ReliabilitySummary) -> dict[str, Any]:
    shown: dict[str, Any] = {}

    def draw() -> list[Plot]:
        shown.update(show_reliability(measured))
        return list(shown["plots"])

    plots = draw_plots(draw)
    return {**shown, "plots": plots}


def _browsed(rows: EvaluatedRows, filters: RowFilters, pictures: Pictures) -> dict[str, Any]:
    places = rows.find(filters)
    pages = max(1, -(-len(places) // PAGE))
    page = min(filters.page, pages)
    return {
        **rows.kinds(),
        "filters": filters,
        "outcomes": {key: label for key, label in OUTCOMES.items() if rows.before or key not in ("gained", "lost")},
        "shown": SHOWN,
        "total": len(places),
        "page": page,
        "pages": pages,
        "cards": [rows.show(place, pictures) for place in places[(page - 1) * PAGE : page * PAGE]],
    }


def _attempt(read: Callable[[], _T], otherwise: _T, problems: list[str]) -> _T:
    try:
        return read()
    except DAMAGE as error:
        problems.append(str(error) or type(error).__name__)
        return otherwise
