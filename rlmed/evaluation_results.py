"""What an evaluation found: its records, its folder on disk, the comparison of two of them, and the table for a terminal."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from rlmed.core.files import partial_folder, refusal, rename_into_place, replace_text
from rlmed.core.jsonlines import parse_line, read_json
from rlmed.core.ownership import remove
from rlmed.core.statistics import BoolArray, mcnemar, wilson_interval
from rlmed.core.types import LETTERS, Example, FinishReason
from rlmed.data.option_order import kept_order_text

Control = Literal["none", "blank", "shuffled", "reordered"]
"""What was shown: the row as it is, a grey picture, another row's picture, or the row with its options in another order."""

Answers = Mapping[tuple[str, str], bool]
"""Right or not by id and question, options included."""

SUMMARY_FILE = "summary.json"
ROWS_FILE = "rows.jsonl"
COMPARISON_FILE = "comparison.json"


@dataclass(frozen=True, slots=True)
class EvalRow:
    """One answered question: a line of `rows.jsonl`.

    Example:
        EvalRow(file="ct", id="ct-7", control="none", image="/data/images/7.png", kind="anatomy", question="Which organ?",
                options=("liver", "lung"), answer="B", completion="<think>…</think><answer>B</answer>", parsed="B",
                right=True, format=True, tokens=31, finish_reason="stop")
    """

    file: str
    id: str
    control: Control
    image: str | None
    """The picture shown; under "blank" the one whose size the grey picture had."""
    kind: str
    question: str
    options: tuple[str, ...]
    answer: str
    """The right letter."""
    completion: str
    """With what the chat template has written of it."""
    parsed: str | None
    """The letter found in the completion."""
    right: bool
    format: bool
    """In the form that the prompt asks for: with a reasoning in its tags, or an answer in its tags alone."""
    tokens: int
    """Length of the completion."""
    finish_reason: FinishReason

    @property
    def not_offered(self) -> bool:
        """Whether the letter found is that of none of the options."""
        return self.parsed is not None and self.parsed not in LETTERS[: len(self.options)]


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Right answers among rows, with the Wilson 95 % interval of their share.

    Example:
        >>> Accuracy.of(6, 8)
        Accuracy(right=6, rows=8, value=0.75, low=0.4092754550439833, high=0.9285207872560886)
    """

    right: int
    rows: int
    value: float
    low: float
    high: float

    @classmethod
    def of(cls, right: int, rows: int) -> Accuracy:
        """Raises ValueError without rows."""
        low, high = wilson_interval(right, rows)
        return cls(right, rows, right / rows, low, high)


@dataclass(frozen=True, slots=True)
class FileSummary:
    """One file's figures; rates, shares and accuracies are fractions in [0, 1].

    Example:
        A file of 300 rows may have accuracy.value 0.70 with low 0.65 and high 0.75, chance 0.25, blank.value 0.27.
    """

    name: str
    rows: int
    accuracy: Accuracy
    format_rate: float
    mean_tokens: float
    """Mean length of the completions, in tokens."""
    cut_by_length: float
    """Share of completions that ran into `max_tokens`."""
    chance: float
    majority_letter: float
    """Of the letter that is most often right in the training rows, or in these rows where there are none."""
    image_free_prior: float | None
    """Of the option texts most often right in the training rows; None where there are none."""
    image_free_prior_by_rate: float | None
    """The same, scored by right / shown."""
    leave_one_out_prior: float
    """The same prior, each row scored by the other rows of its file."""
    leave_one_out_prior_by_rate: float
    blank: Accuracy | None
    """Over a grey picture of the same size; None without controls, or where no row has a picture."""
    shuffled: Accuracy | None
    """Over another row's picture, for the rows that can be given one."""
    by_kind: dict[str, tuple[int, int]]
    """Right answers and rows by kind of question, for rows that name a kind."""
    reordered: Accuracy | None = None
    """With the options in another order; None without controls, or where no row has another."""
    kept_order: int = 0
    """Rows that are left out of `reordered`, since an option refers to others, as `all of the above` does."""
    kept_order_by: str = ""
    """The first of these options; "" without any."""
    not_offered: float = 0.0
    """Share of completions that answer with a letter which none of the options has. They may be in the format: the paper's
    format reward asks for the tags alone."""


@dataclass(frozen=True, slots=True)
class EvalSummary:
    """One evaluation of one model: what `summary.json` holds.

    Example:
        EvalSummary(model="outputs/x", step=300, seconds=41.5, max_tokens=512, train_rows=600, files=(mri, ct, xray))
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
    def mean_accuracy(self) -> float:
        """Mean of the files' accuracies, each file counted alike (the paper's mean over modalities)."""
        return float(np.mean([file.accuracy.value for file in self.files]))

    @classmethod
    def read(cls, step_folder: Path) -> EvalSummary:
        """Load `summary.json` from the folder of one step."""
        content = read_json(step_folder / SUMMARY_FILE)
        return cls(**{**content, "files": tuple(_file_summary(file) for file in content["files"])})


def _file_summary(content: Mapping[str, Any]) -> FileSummary:
    keys = ("accuracy", "blank", "shuffled", "reordered")
    accuracies = {key: Accuracy(**content[key]) if content.get(key) else None for key in keys}
    by_kind = {kind: (right, rows) for kind, (right, rows) in content["by_kind"].items()}
    return FileSummary(**{**content, **accuracies, "by_kind": by_kind})


def step_folder(folder: Path, step: int) -> Path:
    """Where the evaluation of a step lies: `folder/step-000123`."""
    return folder / f"step-{step:06d}"


def last_evaluation(run_folder: Path) -> Path:
    """The folder of a run's evaluation after the most steps.

    Raises:
        ValueError: when it has none.
    """
    folders = [path.parent for path in (run_folder / "evaluations").glob(f"step-*/{SUMMARY_FILE}")]
    if not folders:
        raise ValueError(
            f"{run_folder} holds no evaluation: name a run that evaluated, with data.eval and eval.at_end=true"
        )
    return max(folders, key=lambda path: int(path.name.removeprefix("step-")))


def write_evaluation(folder: Path, summary: EvalSummary, rows: Iterable[EvalRow]) -> Path:
    """Write the folder of a step aside and rename it, so that it is whole or not there; an earlier one goes.

    Raises:
        OSError: when the disk refuses; an earlier evaluation of the step is untouched.
    """
    target = step_folder(folder, summary.step)
    try:
        aside = partial_folder(target)
        try:
            # names of files that are no UTF-8 hold surrogates, which are as JSON escapes them then
            with (aside / ROWS_FILE).open("w", encoding="utf-8", errors="backslashreplace") as lines:
                for row in rows:
                    lines.write(json.dumps(dataclasses.asdict(row), ensure_ascii=False) + "\n")
            _write_json(aside / SUMMARY_FILE, dataclasses.asdict(summary))
            rename_into_place(aside, target, may_replace=lambda: True)
        finally:
            remove(aside)  # after an error
    except OSError as error:
        raise refusal(target / ROWS_FILE, error) from error
    return target


def read_rows(step_folder: Path) -> list[EvalRow]:
    """All rows of an evaluation, in the order of the files, controls after the rows as they are."""
    path = step_folder / ROWS_FILE
    with path.open("rb") as lines:
        contents = [parse_line(line, path, number) for number, line in enumerate(lines, 1)]
    return [EvalRow(**{**content, "options": tuple(content["options"])}) for content in contents]


def compare(before: Path, after: Path) -> dict[str, Any]:
    """Test for each file in both evaluations whether accuracy changed, and write `comparison.json` into `after`.

    Args:
        before: folder of one step's evaluation, as written by `write_evaluation`.
        after: the same of another step or model.

    Returns:
        `{"before": {"model", "step"}, "after": {…}, "files": {name: {"rows", "right_before", "right_after", "gained",
        "lost", "p_value"}}}`; the p-value is McNemar's, exact and two-sided.

    Raises:
        ValueError: when they have no file in common, or a common file has other rows.
    """
    first, second = read_answers(before), read_answers(after)
    files: dict[str, dict[str, Any]] = {}
    for name in second:
        if name not in first:
            continue
        _check_same_rows(name, before, first[name], second[name])
        answers = pair_answers(first[name], second[name])
        files[name] = {
            "rows": len(answers[0]),
            "right_before": int(answers[0].sum()),
            "right_after": int(answers[1].sum()),
            **dataclasses.asdict(mcnemar(*answers)),
        }
    if not files:
        raise ValueError(f"{before} (files {', '.join(first)}) and {after} (files {', '.join(second)}) share no file")
    sides = {side: EvalSummary.read(path) for side, path in (("before", before), ("after", after))}
    comparison: dict[str, Any] = {side: {"model": one.model, "step": one.step} for side, one in sides.items()}
    comparison["files"] = files
    _write_json(after / COMPARISON_FILE, comparison)
    return comparison


def check_comparable(before: Path, files: Mapping[str, Sequence[Example]]) -> None:
    """Make sure, before anything is answered, that `compare` will be able to pair the answers with those of `before`.

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
            f"file {name} has other rows than in {before} (for example id {odd[0]!r}): compare two evaluations of the same "
            "data with the same eval.limit"
        )


def pair_answers(before: Answers, after: Answers) -> tuple[BoolArray, BoolArray]:
    """bool [N] each, of the same rows in the same order; both must have the same rows."""
    assert before.keys() == after.keys()
    old, new = (np.array([rows[key] for key in after], dtype=bool) for rows in (before, after))
    return old, new


def _key(row: EvalRow | Example) -> tuple[str, str]:
    """Id and question: an id that stands for another question must not be paired."""
    return row.id, json.dumps([row.question, sorted(row.options)])


def read_answers(folder: Path) -> Mapping[str, Answers]:
    """Right or not by file, of the rows with their own picture in the evaluation of one step."""
    answers: dict[str, dict[tuple[str, str], bool]] = {}
    for row in read_rows(folder):
        if row.control == "none":
            answers.setdefault(row.file, {})[_key(row)] = row.right
    return answers


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    replace_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def summary_table(before: EvalSummary | None, after: EvalSummary, comparison: Mapping[str, Any] | None) -> Table:
    """Two lines a file: accuracy and format before and after, the p-value, and what is scored without the picture.

    All in per cent; intervals are Wilson's at 95 %. Controls and prior are those of `after`; the prior stands below chance.
    Where there were no training rows to fit it on, it is the leave-one-out one, marked "loo".
    """
    if before is None:
        span = f"step {after.step}" if after.step else after.model
    elif before.step == after.step:  # two evaluations by themselves
        span = f"{before.model} → {after.model}"
    else:
        span = f"step {before.step} → {after.step}"
    table = Table(
        title=Text(f"Held-out accuracy in %, {span}"),
        caption=Text("\n".join([*_legend(after, tested=comparison is not None), *_remarks(after)]), justify="left"),
        box=box.SIMPLE_HEAD,  # lines between the columns would not leave room for the figures in 80 characters
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("file", overflow="fold")
    for heading in ("accuracy", "p", "format", "blank", "shuffled", "other\norder", "chance\nprior"):
        table.add_column(heading, justify="right", no_wrap=True)
    earlier = {file.name: file for file in before.files} if before is not None else {}
    tests = comparison["files"] if comparison is not None else {}
    for file in after.files:
        old = earlier.get(file.name)
        table.add_row(
            f"{file.name}\n{file.rows} rows",
            _change([_percent(one.accuracy.value) + "\n" + _interval(one.accuracy) for one in (old, file) if one]),
            p_value_text(tests[file.name]["p_value"]) if file.name in tests else "–",
            _change([_percent(one.format_rate) for one in (old, file) if one]),
            *(
                "–" if one is None else _percent(one.value) + "\n" + _interval(one)
                for one in (file.blank, file.shuffled, file.reordered)
            ),
            f"{_percent(file.chance)}\n{_prior(file)}",
        )
    return table


def _legend(summary: EvalSummary, *, tested: bool) -> list[str]:
    """What the columns are."""
    lines = ["small figures: Wilson 95 % intervals" + ("; p: McNemar, exact, paired" if tested else "")]
    if any(file.blank or file.shuffled for file in summary.files):
        lines.append("blank, shuffled: over a grey picture, over another row's")
    if any(file.reordered for file in summary.files):
        lines.append("other order: with the options in another order")
    if any(file.image_free_prior is None for file in summary.files):
        where = "in the other rows of the file (loo, leave one out), as there are no training rows"
        lines.append(f"prior: the option text most often right {where}")
    else:
        lines.append("prior: the option text most often right in the training rows")
    return lines


def _remarks(summary: EvalSummary) -> list[str]:
    """What is to be known of single files: letters that were not offered, rows without another order of their options."""
    letters = [
        f"{file.name}: {_percent(file.not_offered)} % answer a letter that was not offered: never right, whatever the format"
        for file in summary.files
        if file.not_offered
    ]
    orders = [
        f"{file.name}: {kept_order_text(file.kept_order, file.rows, file.kept_order_by)}"
        for file in summary.files
        if file.kept_order
    ]
    return letters + orders


def _prior(file: FileSummary) -> str:
    if file.image_free_prior is None:
        return _percent(file.leave_one_out_prior) + "\nloo"
    return _percent(file.image_free_prior)


def _change(cells: Sequence[str]) -> str:
    """Cells side by side, line by line, an arrow between them."""
    return "\n".join(" → ".join(lines) for lines in zip(*(cell.split("\n") for cell in cells), strict=True))


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _interval(accuracy: Accuracy) -> str:
    return f"{100 * accuracy.low:.0f}–{100 * accuracy.high:.0f}"


def p_value_text(p_value: float) -> str:
    """To three digits."""
    return "<0.001" if p_value < 0.001 else f"{p_value:.3f}"
