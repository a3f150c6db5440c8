"""Write an evaluation's predictions for other kits, and score them by those kits' rules."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from rlmed.core.calibration import Estimate
from rlmed.data.loading import EvalFile
from rlmed.evaluation.kits import lmms_eval, medevalkit, vlmevalkit
from rlmed.evaluation.kits.base import Kit, write_json
from rlmed.evaluation.kits.rule_scores import FOLDER, SCORES_FILE, RuleScore
from rlmed.evaluation.narrow import LEAST, Label
from rlmed.evaluation.records import Accuracy, EvalRow
from rlmed.evaluation.results import read_rows
from rlmed.tasks.metrics.published import llava_med_closed, llava_med_recall, said

KITS: dict[str, Kit] = {
    kit.name: kit for kit in (medevalkit.MedEvalKit(), vlmevalkit.VlmEvalKit(), lmms_eval.LmmsEval())
}


@dataclass(frozen=True, slots=True)
class Predictions:
    """What was written."""

    paths: tuple[Path, ...]
    scores: tuple[RuleScore, ...]
    left_out: tuple[str, ...]
    """A sentence for each kit and file that lacks rows."""


def check_kits(names: Sequence[str], files: Sequence[EvalFile]) -> None:
    """Check, before evaluating, that each kit takes some row.

    Raises:
        ValueError: if not, with the kit's tasks.
    """
    tasks = sorted({example.task for file in files for example in file.examples})
    fitting = [name for name, kit in KITS.items() if {*kit.tasks} & {*tasks}]
    for name in names:
        if tasks and name not in fitting:
            kept = ",".join(one for one in names if one in fitting)
            others = f"; {', '.join(fitting)} would take some" if fitting and not kept else ""
            raise ValueError(
                f"eval.predictions={name}: {KITS[name].title} takes {', '.join(KITS[name].tasks)}, and data.eval has "
                f"{', '.join(tasks)}: write eval.predictions=[{kept}]{others}"
            )


def write_predictions(step_folder: Path, names: Sequence[str], model: str) -> Predictions:
    """Write the unchanged rows of an evaluation for kits, below `step_folder/predictions/KIT/`.

    Args:
        step_folder: folder of the evaluation.
        names: of the kits.
        model: name or folder of the model; its last part names files, with "_" for odd characters.

    Raises:
        OSError: if a write fails.
    """
    name_of_model = re.sub(r"[^\w.-]", "_", Path(model).name) or "model"
    by_file: dict[str, list[EvalRow]] = {}
    for row in read_rows(step_folder):
        if row.control == "none":
            by_file.setdefault(row.file, []).append(row)
    paths: list[Path] = []
    left_out = []
    for name in names:
        kit = KITS[name]
        for file, rows in by_file.items():
            paths += kit.write(step_folder / FOLDER / name, file, name_of_model, rows)
            others = Counter(row.task for row in rows if row.task not in kit.tasks)
            left_out += [f"{kit.title} takes no {task}: left out of {file}, rows: {n}" for task, n in others.items()]
    scores = tuple(score for file, rows in by_file.items() for score in _scores(file, names, rows))
    write_json(step_folder / FOLDER / SCORES_FILE, {"scores": [dataclasses.asdict(one) for one in scores]})
    return Predictions(tuple(paths), scores, tuple(left_out))


def _scores(file: str, names: Sequence[str], rows: Sequence[EvalRow]) -> Iterator[RuleScore]:
    """Yield the scores by the kits' rules, then by LLaVA-Med's if there are open questions."""
    choices = [row for row in rows if row.task == "choice"]
    closed = [row for row in rows if row.task == "open" and medevalkit.is_closed(row)]
    others = [row for row in rows if row.task == "open" and not medevalkit.is_closed(row)]
    shares: list[tuple[str, Callable[[EvalRow], bool], list[EvalRow]]] = []
    if "medevalkit" in names:
        parts = (("choice", choices), ("yes or no", closed), ("open, exact", others))
        shares += [(f"MedEvalKit, {kind}", medevalkit.correct, part) for kind, part in parts]
    if "vlmevalkit" in names:
        parts = (("choice", choices), ("open, exact", [*closed, *others]), ("", []))
        shares += [(f"VLMEvalKit, {kind}", vlmevalkit.hit, part) for kind, part in parts]
    if "lmms_eval" in names:
        shares.append(("lmms-eval, SLAKE", lmms_eval.correct, [*closed, *others]))
    shares.append(("LLaVA-Med, yes or no", lambda row: llava_med_closed(said(row.completion), row.answer), closed))
    for rule, right, part in shares:
        if part:
            yield _rule_score(file, rule, Accuracy.of(sum(map(right, part)), len(part)), part)
    if others:
        recalls = [llava_med_recall(said(row.completion), row.answer) for row in others]
        yield _rule_score(file, "LLaVA-Med, open, recall", Estimate.mean(recalls), others)


def _rule_score(file: str, rule: str, score: Accuracy | Estimate, rows: Sequence[EvalRow]) -> RuleScore:
    ours = Accuracy.of(sum(row.correct for row in rows), len(rows))
    figures = score.value, score.low, score.high, ours.value, ours.low, ours.high
    return RuleScore(file, rule, len(rows), *figures, task=rows[0].task)


def predictions_table(written: Predictions) -> Table | None:
    """Build a table of scores by the kits' rules; None without scores."""
    if not written.scores:
        return None
    table = Table(
        title=Text("Scores by published rules in %"),
        caption=Text("\n".join(_legend(written)), justify="left", overflow="fold"),
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    for heading in ("file", "rule"):
        table.add_column(heading, min_width=LEAST)
    for heading in ("rows", "by the rule", "by the task"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in written.scores:
        shares = _share(one.value, one.low, one.high), _share(one.ours, one.ours_low, one.ours_high)
        table.add_row(Label(one.file), Label(one.rule), str(one.rows), *shares)
    return table


def _share(value: float, low: float | None, high: float | None) -> str:
    interval = "" if low is None or high is None else f" ({100 * low:.0f}–{100 * high:.0f})"
    return f"{100 * value:.1f}{interval}"


def _legend(written: Predictions) -> Iterable[str]:
    yield "in brackets: 95 % intervals, of recall by bootstrap, else Wilson's; rules: docs/tasks.md"
    yield from written.left_out
