"""Evaluation results: records, their folder on disk, and the comparison of two evaluations."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlmed.core.config.building import build_record
from rlmed.core.files.atomic import partial_folder, refusal, rename_into_place, replace_text
from rlmed.core.files.damage import read_json
from rlmed.core.files.jsonlines import parse_line
from rlmed.core.files.ownership import remove
from rlmed.core.statistics import BoolArray, mcnemar, sign_flip_test
from rlmed.core.types import Example
from rlmed.evaluation.old_names import current_names
from rlmed.evaluation.records import Accuracy, EvalRow
from rlmed.evaluation.scores import TaskSummary
from rlmed.tasks.registry import task_named

Answers = Mapping[tuple[str, str], bool]
"""Whether each answer is right, by id and question (with task and options)."""

SUMMARY_FILE = "summary.json"
ROWS_FILE = "rows.jsonl"
COMPARISON_FILE = "comparison.json"


@dataclass(frozen=True, slots=True)
class FileSummary:
    """Results on one file; rates, shares and accuracies are fractions in [0, 1].

    Example:
        A file of 300 rows may have accuracy.value 0.70 with low 0.65 and high 0.75, chance 0.25,
        blank.value 0.27.
    """

    name: str
    rows: int
    accuracy: Accuracy
    format_rate: float
    mean_tokens: float
    """Mean length of the completions, in tokens."""
    cut_by_length: float
    """Share of completions cut at `max_tokens`."""
    chance: float
    majority_letter: float | None
    """Accuracy of the letter most often right in the training rows; without any, in these rows.

    None if no row is multiple choice.
    """
    image_free_prior: float | None
    """Accuracy of option texts most often right in training rows; None without training rows.

    Of rows of other tasks, the share that their best constant answer gets right; `chance` and
    `leave_one_out_prior` likewise, see `rlmed.evaluation.scores.TaskSummary`.
    """
    image_free_prior_by_rate: float | None
    """The same prior, scored by correct / shown."""
    leave_one_out_prior: float
    """The same prior, each row scored by the other rows of its file."""
    leave_one_out_prior_by_rate: float
    blank: Accuracy | None
    """Accuracy on a same-size grey picture; None without controls, or if no row has a picture."""
    shuffled: Accuracy | None
    """Accuracy on another row's picture, for rows that can get one."""
    by_question_type: dict[str, tuple[int, int]]
    """Right answers and rows by type of question, for rows with a type."""
    reordered: Accuracy | None = None
    """Accuracy with the options reordered; None without controls, or if no row can be reordered."""
    kept_order: int = 0
    """Rows not in `reordered` because an option refers to others, as `all of the above` does."""
    kept_order_by: str = ""
    """The first of these options; "" without any."""
    not_offered: float = 0.0
    """Share of completions that answer with a letter not among the options.

    Their format may still be right: the paper's format reward checks only the tags.
    """
    blank_one: Accuracy | None = None
    """Accuracy with one picture grey, for rows with several; None without controls or such rows."""
    image_order: Accuracy | None = None
    """Accuracy with the pictures in another order, for rows with several."""
    tasks: tuple[TaskSummary, ...] = ()
    """Scores of the rows of each task other than multiple choice."""
    parts: tuple[FileSummary, ...] = ()
    """Of a file with several tasks: the same of each task's rows alone, by the task's name."""

    @property
    def other_order(self) -> Accuracy | None:
        """`reordered`, unless the file also has rows without options: then that of its part."""
        return None if self.parts else self.reordered


@dataclass(frozen=True, slots=True)
class EvalSummary:
    """One evaluation of one model: the content of `summary.json`.

    Example:
        EvalSummary(model="outputs/x", step=300, seconds=41.5, max_tokens=512, train_rows=600,
        files=(mri, ct, xray))
    """

    model: str
    step: int
    seconds: float
    max_tokens: int
    train_rows: int
    """Rows that the image-free prior was fitted on."""
    files: tuple[FileSummary, ...]

    @property
    def accuracies(self) -> dict[str, float]:
        """Accuracy by file."""
        return {file.name: file.accuracy.value for file in self.files}

    @property
    def accuracies_by_task(self) -> dict[str, float]:
        """Accuracy by file and task, as `file/task`, of files with several tasks."""
        return {f"{file.name}/{part.name}": part.accuracy.value for file in self.files for part in file.parts}

    @property
    def mean_accuracy(self) -> float:
        """Unweighted mean of the files' accuracies (the paper's mean over modalities)."""
        return float(np.mean([file.accuracy.value for file in self.files]))

    @classmethod
    def read(cls, step_folder: Path) -> EvalSummary:
        """Load `summary.json` from the folder of one step."""
        return build_record(cls, current_names(read_json(step_folder / SUMMARY_FILE)))


def step_folder(folder: Path, step: int) -> Path:
    """Return the folder of a step's evaluation: `folder/step-000123`."""
    return folder / f"step-{step:06d}"


def evaluated_in(folder: Path, step: int) -> EvalSummary | None:
    """Return the summary of a step's evaluation in `folder`; None without one that can be read."""
    try:
        return EvalSummary.read(step_folder(folder, step))
    except (OSError, ValueError):
        return None


def evaluation_folders(folder: Path) -> list[Path]:
    """Return the evaluations in a folder of step folders, which may be missing, by step."""
    found = [path.parent for path in folder.glob(f"step-*/{SUMMARY_FILE}") if path.is_file()]
    # not by name: a step of seven digits comes after one of six
    return sorted(found, key=lambda path: (len(path.name), path.name))


def last_evaluation(run_folder: Path) -> Path:
    """Return the folder of a run's last evaluation.

    Raises:
        ValueError: if it has none.
    """
    folders = evaluation_folders(run_folder / "evaluations")
    if not folders:
        raise ValueError(f"no evaluation in {run_folder}: give a run with data.eval and eval.at_end=true")
    return folders[-1]


def write_evaluation(folder: Path, summary: EvalSummary, rows: Iterable[EvalRow]) -> Path:
    """Write the folder of a step atomically, replacing an earlier one.

    Raises:
        OSError: if the write fails; an earlier evaluation of the step is untouched.
    """
    target = step_folder(folder, summary.step)
    try:
        aside = partial_folder(target)
        try:
            # file names that are not UTF-8 contain surrogates, written as JSON escapes
            with (aside / ROWS_FILE).open("w", encoding="utf-8", errors="backslashreplace") as lines:
                for row in rows:
                    lines.write(json.dumps(row.to_json(), ensure_ascii=False) + "\n")
            _write_json(aside / SUMMARY_FILE, dataclasses.asdict(summary))
            rename_into_place(aside, target, may_replace=lambda: True)
        finally:
            remove(aside)  # after an error
    except OSError as error:
        raise refusal(target / ROWS_FILE, error) from error
    return target


def read_rows(step_folder: Path) -> list[EvalRow]:
    """Read all rows of an evaluation, by file, controls after the unchanged rows."""
    path = step_folder / ROWS_FILE
    with path.open("rb") as lines:
        contents = [current_names(parse_line(line, path, number)) for number, line in enumerate(lines, 1)]
    return [EvalRow.from_json(content) for content in contents]


def compare(before: Path, after: Path) -> dict[str, Any]:
    """Test, per file of both evaluations, if accuracy changed; write `comparison.json` to `after`.

    Args:
        before: folder of an evaluation, as written by `write_evaluation`.
        after: folder of another step's or model's evaluation.

    Returns:
        `{"before": {"model", "step"}, "after": {…}, "files": {name: {"rows", "correct_before",
        "correct_after", "gained", "lost", "p_value"}}}`; the p-value is McNemar's, exact and
        two-sided. A file with several tasks also has the same by task, as `"tasks"`; one with other
        tasks than multiple choice `"scores": {task: {"before", "after", "p_value"}}`: means of the
        main score, and `sign_flip_test`.

    Raises:
        ValueError: if they share no file, or a shared file has different rows.
    """
    rows = read_rows(before), read_rows(after)
    first, second = map(_answers, rows)
    files: dict[str, dict[str, Any]] = {}
    for name in second:
        if name not in first:
            continue
        _check_same_rows(name, before, first[name], second[name])
        files[name] = _compare_answers(first[name], second[name])
        tasks = dict.fromkeys(row.task for row in rows[1] if row.file == name)
        if len(tasks) > 1:
            of_tasks = [
                [_answers(row for row in side if (row.file, row.task) == (name, task))[name] for side in rows]
                for task in tasks
            ]
            files[name]["tasks"] = {task: _compare_answers(*sides) for task, sides in zip(tasks, of_tasks, strict=True)}
        if scores := _compare_scores(*([row for row in side if row.file == name] for side in rows)):
            files[name]["scores"] = scores
    if not files:
        raise ValueError(f"{before} (files {', '.join(first)}) and {after} (files {', '.join(second)}) share no file")
    sides = {side: EvalSummary.read(path) for side, path in (("before", before), ("after", after))}
    comparison: dict[str, Any] = {side: {"model": one.model, "step": one.step} for side, one in sides.items()}
    comparison["files"] = files
    _write_json(after / COMPARISON_FILE, comparison)
    return comparison


def read_comparison(step_folder: Path) -> dict[str, Any] | None:
    """Read what `compare` wrote into the folder of an evaluation; None if it wrote nothing."""
    path = step_folder / COMPARISON_FILE
    return current_names(read_json(path)) if path.exists() else None


def check_comparable(before: Path, files: Mapping[str, Sequence[Example]]) -> None:
    """Check, before evaluating, that `compare` can pair the answers with those of `before`.

    Raises:
        ValueError: as `compare`.
    """
    EvalSummary.read(before)
    first = read_answers(before)
    if not first.keys() & files.keys():
        raise ValueError(f"{before} (files {', '.join(first)}) shares no file with data.eval ({', '.join(files)})")
    for name in first.keys() & files.keys():
        _check_same_rows(name, before, first[name], {_key(row): True for row in files[name]})


def _check_same_rows(name: str, before: Path, old: Mapping[Any, bool], new: Mapping[Any, bool]) -> None:
    if old.keys() != new.keys():
        odd = min(old.keys() ^ new.keys())
        raise ValueError(
            f"file {name} has other rows than in {before} (for example id {odd[0]!r}): compare evaluations of the same data "
            "with the same eval.limit"
        )


def pair_answers(before: Answers, after: Answers) -> tuple[BoolArray, BoolArray]:
    """Return both as bool [N] over the same rows, in the same order; the rows must be the same."""
    assert before.keys() == after.keys()
    old, new = (np.array([rows[key] for key in after], dtype=bool) for rows in (before, after))
    return old, new


def _key(row: EvalRow | Example) -> tuple[str, str]:
    """Return id and question: equal ids with different questions or tasks must not be paired."""
    return row.id, json.dumps([row.task, row.question, sorted(row.options)])


def read_answers(folder: Path) -> Mapping[str, Answers]:
    """Read whether each answer is right, by file, for the unchanged rows of an evaluation."""
    return _answers(read_rows(folder))


def _answers(rows: Iterable[EvalRow]) -> Mapping[str, Answers]:
    answers: dict[str, dict[tuple[str, str], bool]] = {}
    for row in rows:
        if row.control == "none":
            answers.setdefault(row.file, {})[_key(row)] = row.correct
    return answers


def _compare_answers(before: Answers, after: Answers) -> dict[str, Any]:
    first, second = pair_answers(before, after)
    return {
        "rows": len(first),
        "correct_before": int(first.sum()),
        "correct_after": int(second.sum()),
        **dataclasses.asdict(mcnemar(first, second)),
    }


def _compare_scores(before: Sequence[EvalRow], after: Sequence[EvalRow]) -> dict[str, dict[str, float]]:
    """Compare the main scores of the unchanged rows of one file, by task other than choice."""
    pairs: dict[str, list[tuple[float, float]]] = {}
    old = {_key(row): row for row in before if row.control == "none"}
    for row in after:
        if row.control == "none" and row.task != "choice":
            main = task_named(row.task).main
            pairs.setdefault(row.task, []).append((old[_key(row)].scores[main], row.scores[main]))
    found = {}
    for task, scores in pairs.items():
        first, second = np.array(scores).T
        found[task] = {
            "before": float(first.mean()),
            "after": float(second.mean()),
            "p_value": sign_flip_test(first, second),
        }
    return found


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    replace_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
