"""Table of base, SFT and RL over several runs: terminal, Markdown, LaTeX, JSON and HTML."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from rlmed.core.files.atomic import replace_text
from rlmed.core.statistics import mcnemar, wilson_interval
from rlmed.evaluation.records import Accuracy, p_value_text
from rlmed.evaluation.results import Answers, EvalSummary, FileSummary, last_evaluation, pair_answers, read_answers
from rlmed.report.page import page_environment

LABELS = {"base": "base", "sft": "SFT", "rl": "RL"}
MEAN = "mean"
"""Name of the line with the unweighted mean over files, the paper's mean over modalities."""
NOTE = (
    "Greedy accuracy in %; ± is the sample standard deviation over seeds {seeds}; brackets: Wilson 95 % interval of the "
    "mean over seeds at the file's number of rows, for another draw of questions. prior: the option texts most often "
    "right in the training rows, without any image. blank, shuffled, order, format: of {last}; on a grey image, on "
    "another question's image, with reordered options, and the share of completions in the format. p: exact paired "
    "McNemar test, the largest over the seeds."
)
HEADINGS = ("file", "rows", "chance", "prior")


@dataclass(frozen=True, slots=True)
class Cell:
    """One method on one file over its seeds; fractions in [0, 1].

    Example:
        >>> Cell((0.80, 0.81, 0.82), rows=300).text()
        '81.0 ± 1.0 [76–85]'
    """

    values: tuple[float, ...]
    """Accuracy by seed."""
    rows: int | None
    """Number of rows for the interval; None for a mean over files."""

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float:
        """Sample standard deviation over seeds; 0 for one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0

    @property
    def interval(self) -> tuple[float, float] | None:
        """Wilson 95 % interval."""
        return None if self.rows is None else wilson_interval(round(self.mean * self.rows), self.rows)

    def text(self) -> str:
        """Format in per cent, plus standard deviation (several seeds) and interval (known rows)."""
        parts = [f"{100 * self.mean:.1f}"]
        if len(self.values) > 1:
            parts.append(f"± {100 * self.spread:.1f}")
        if self.interval:
            parts.append(f"[{100 * self.interval[0]:.0f}–{100 * self.interval[1]:.0f}]")
        return " ".join(parts)


@dataclass(frozen=True, slots=True)
class Line:
    """Results on one file: accuracy by method, with controls.

    Example:
        Line("test_ct", 300, 0.25, 0.253, {"base": …, "rl": …}, *[{"rl": …}] * 4, {"base": 1e-9,
        "sft": 1e-12})
    """

    name: str
    rows: int
    chance: float
    prior: float | None
    """Accuracy of the image-free prior fitted on the training rows."""
    accuracy: dict[str, Cell]
    """By method, like the next four fields."""
    format_rate: dict[str, Cell]
    blank: dict[str, Cell]
    shuffled: dict[str, Cell]
    reordered: dict[str, Cell]
    p_values: dict[str, float]
    """Of the last method against each of the others."""


@dataclass(frozen=True, slots=True)
class Reproduction:
    """Results of all runs.

    Example:
        Reproduction(seeds=(0, 1, 2), methods=("base", "sft", "rl"), lines=(mri, ct, xray))
    """

    seeds: tuple[int, ...]
    methods: tuple[str, ...]
    lines: tuple[Line, ...]

    @property
    def last(self) -> str:
        """The method that the others are compared with."""
        return self.methods[-1]

    @property
    def note(self) -> str:
        """What the columns mean."""
        return NOTE.format(seeds=", ".join(map(str, self.seeds)), last=LABELS[self.last])

    @property
    def headings(self) -> list[str]:
        """Headings of the columns."""
        against = [f"p {LABELS[self.last]} / {LABELS[method]}" for method in self.methods[:-1]]
        return [
            *HEADINGS,
            *(LABELS[method] for method in self.methods),
            "blank",
            "shuffled",
            "order",
            "format",
            *against,
        ]

    def body(self) -> list[list[str]]:
        """Return the cells by line, followed by the mean over files."""
        rows = []
        for line in self.lines:
            controls = [line.blank, line.shuffled, line.reordered, line.format_rate]
            rows.append(
                [
                    line.name,
                    str(line.rows),
                    _percent(line.chance),
                    _percent(line.prior),
                    *(line.accuracy[method].text() for method in self.methods),
                    *(_cell(control.get(self.last)) for control in controls),
                    *(p_value_text(line.p_values[method]) for method in self.methods[:-1]),
                ]
            )
        means = [self.mean(method).text() for method in self.methods]
        empty = [""] * (len(self.headings) - len(HEADINGS) - len(means))
        rows.append([MEAN, *[""] * (len(HEADINGS) - 1), *means, *empty])
        return rows

    def mean(self, method: str) -> Cell:
        """Return the method's mean over files, by seed."""
        by_seed = zip(*(line.accuracy[method].values for line in self.lines), strict=True)
        return Cell(tuple(statistics.fmean(values) for values in by_seed), None)

    def table(self) -> Table:
        """Build an 80-character table: figure, deviation, interval per line; no rows, no format."""
        table = Table(
            title="Held-out accuracy in %",
            caption=self.note,
            box=box.SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
            collapse_padding=True,
        )
        rows = [self.headings, *self.body()]
        # the prior stands below chance
        cells = [[_words(row[0]), [row[2], row[3]], *(_words(cell) for cell in row[len(HEADINGS) :])] for row in rows]
        shown = [column for column, heading in enumerate(cells[0]) if heading != ["format"]]
        for column in shown:
            table.add_column("\n".join(cells[0][column]), justify="left" if column == 0 else "right", no_wrap=True)
        for row in cells[1:]:
            table.add_row(*("\n".join(row[column]) for column in shown))
        return table

    def markdown(self) -> str:
        """Return the table and its note in Markdown."""
        lines = [self.headings, ["---"] * len(self.headings), *self.body()]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{self.note}\n"

    def latex(self) -> str:
        """Return a booktabs `tabular`, with the note as a comment above."""
        head, *body = [" & ".join(map(_escape, line)) + r" \\" for line in (self.headings, *self.body())]
        begin = r"\begin{tabular}{l" + "r" * (len(self.headings) - 1) + "}"
        body.insert(-1, r"\midrule")
        return "\n".join(
            [f"% {self.note}", begin, r"\toprule", head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}", ""]
        )

    def to_json(self) -> dict[str, Any]:
        """Return all figures as plain data."""
        return dataclasses.asdict(self)


def collect(runs: Sequence[tuple[str, int, Path]]) -> Reproduction:
    """Read the last evaluation of each run.

    Args:
        runs: method, seed and run folder; methods in column order.

    Raises:
        ValueError: if a run has no evaluation, or the runs were evaluated on different rows.
    """
    methods = tuple(dict.fromkeys(method for method, _, _ in runs))
    found = {method: [last_evaluation(path) for name, _, path in runs if name == method] for method in methods}
    summaries = {method: [EvalSummary.read(path) for path in folders] for method, folders in found.items()}
    answers = {method: [read_answers(path) for path in folders] for method, folders in found.items()}
    names = [file.name for file in summaries[methods[0]][0].files]
    seeds = tuple(dict.fromkeys(seed for method, seed, _ in runs if method != "base"))
    return Reproduction(seeds, methods, tuple(_line(name, methods, summaries, answers) for name in names))


def write_reproduction(root: Path, found: Reproduction) -> list[Path]:
    """Write the table in every format into `root`; return the paths, the HTML page with links last.

    Raises:
        RecordError: if a write fails.
    """
    reports = sorted(str(path.relative_to(root)) for path in root.glob("*/report.html"))
    page = page_environment().get_template("reproduce.html.j2").render(found=found, bars=_bars(found), reports=reports)
    texts = {
        "md": found.markdown(),
        "tex": found.latex(),
        "json": json.dumps(found.to_json(), indent=1, ensure_ascii=False) + "\n",
        "html": page,
    }
    return [replace_text(root / f"reproduce.{ending}", text) for ending, text in texts.items()]


def _line(
    name: str,
    methods: Sequence[str],
    summaries: dict[str, list[EvalSummary]],
    answers: dict[str, list[Mapping[str, Answers]]],
) -> Line:
    files = {method: [_file(name, summary) for summary in summaries[method]] for method in methods}
    one = files[methods[-1]][0]
    accuracies = {method: tuple(file.accuracy.value for file in files[method]) for method in methods}
    return Line(
        name=name,
        rows=one.rows,
        chance=one.chance,
        prior=one.image_free_prior,
        accuracy={method: Cell(accuracies[method], one.rows) for method in methods},
        format_rate={method: Cell(tuple(file.format_rate for file in files[method]), one.rows) for method in methods},
        blank=_control({method: [file.blank for file in entries] for method, entries in files.items()}),
        shuffled=_control({method: [file.shuffled for file in entries] for method, entries in files.items()}),
        reordered=_control({method: [file.reordered for file in entries] for method, entries in files.items()}),
        p_values={
            method: max(
                _p_of_change(name, answers[method][index % len(answers[method])][name], after[name])
                for index, after in enumerate(answers[methods[-1]])
            )
            for method in methods[:-1]
        },
    )


def _control(measured: Mapping[str, Sequence[Accuracy | None]]) -> dict[str, Cell]:
    """Return the control's accuracy by method, over seeds that measured it."""
    cells = {}
    for method, accuracies in measured.items():
        known = [accuracy for accuracy in accuracies if accuracy is not None]
        if known:
            cells[method] = Cell(tuple(accuracy.value for accuracy in known), known[0].rows)
    return cells


def _file(name: str, summary: EvalSummary) -> FileSummary:
    for file in summary.files:
        if file.name == name:
            return file
    raise ValueError(f"{summary.model}, step {summary.step}: not evaluated on {name}, unlike the base")


def _p_of_change(name: str, before: Answers, after: Answers) -> float:
    if before.keys() != after.keys():
        raise ValueError(f"the runs were evaluated on different rows of {name}: remove their folders and start again")
    return mcnemar(*pair_answers(before, after)).p_value


def _bars(found: Reproduction) -> list[dict[str, Any]]:
    """Return the page's bars: one per file and method, in per cent, with chance."""
    return [
        {
            "name": line.name,
            "chance": 100 * line.chance,
            "bars": [
                {
                    "label": LABELS[method],
                    "method": method,
                    "value": 100 * line.accuracy[method].mean,
                    "low": 100 * (line.accuracy[method].interval or (0, 0))[0],
                    "high": 100 * (line.accuracy[method].interval or (0, 0))[1],
                }
                for method in found.methods
            ],
        }
        for line in found.lines
    ]


def _words(text: str) -> list[str]:
    """Split a cell into parts that must not be broken."""
    return text.replace("± ", "±\N{NO-BREAK SPACE}").split(" ")


def _cell(cell: Cell | None) -> str:
    return "–" if cell is None else cell.text()


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


def _escape(text: str) -> str:
    for plain, written in (("_", r"\_"), ("%", r"\%"), ("±", r"$\pm$"), ("–", "--"), ("<", "$<$")):
        text = text.replace(plain, written)
    return text
