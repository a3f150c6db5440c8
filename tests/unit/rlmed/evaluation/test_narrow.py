"""Tables in terminals of 60, 80 and 120 columns: names stay whole, figures too."""

import io
import re

import pytest
from rich.console import Console

from rlmed.evaluation.narrow import Label
from rlmed.evaluation.records import Accuracy
from rlmed.evaluation.results import EvalSummary, FileSummary
from rlmed.evaluation.score_table import score_table
from rlmed.evaluation.scores import Estimate, TaskSummary
from rlmed.evaluation.table import summary_table

NAMES = ("vindr_cxr_open_questions_test_2024-11-30_v2", "test")
COMPARED = {name: {"p_value": 0.0001, "scores": {"open": {"p_value": 0.0123}}} for name in NAMES}


def evaluation(step: int, right: int, *, controls: bool) -> EvalSummary:
    share, control = Accuracy.of(right, 300), Accuracy.of(100, 300) if controls else None
    figure = Estimate(share.value, share.low, share.high)
    shown = {"blank": {"exact": figure}, "shuffled": {"exact": figure}} if controls else {}
    task = TaskSummary("open", 300, "exact", {"exact": figure}, {}, shown, {"exact": 0.2}, {"exact": 0.31}, None)
    files = tuple(
        FileSummary(
            *(name, 300, share, 1.0, 7.0, 0.0, 0.25, None, None, None, 0.2, 0.2, control, control, {}, control),
            tasks=(task,),
        )
        for name in NAMES
    )
    return EvalSummary("base", step, 1.0, 64, 0, files)


@pytest.mark.parametrize("controls", [True, False], ids=["with controls", "without"])
@pytest.mark.parametrize("width", [60, 80, 120])
def test_tables_keep_names_and_figures_whole(width: int, controls: bool) -> None:
    before, after = (evaluation(step, right, controls=controls) for step, right in ((0, 100), (4, 300)))
    for table in (
        summary_table(before, after, {"files": COMPARED}),
        score_table(before, after, {"files": COMPARED}),
        summary_table(None, after, None),
    ):
        assert table is not None
        screen = io.StringIO()
        Console(width=width, file=screen).print(table)
        text = screen.getvalue()
        assert max(map(len, text.splitlines())) <= width
        words = {*re.split("[_-]", NAMES[0]), "test", "open"}
        if width == 60 and controls:  # eight columns: a word of nine letters has no room
            words.remove("questions")
            text = re.sub("ques?…n?s_", "", text)
        assert "…" not in text
        for word in words:
            assert re.search(rf"(?<![a-z0-9]){word}(?![a-z0-9])", text), word
        # the figures of the first column and of the last
        assert "100.0" in text
        assert ("31.0 own" if "Scores" in text else "loo") in " ".join(text.split())
        assert ("shuff" in text) == controls
        assert "– " not in text


@pytest.mark.parametrize(
    ("name", "width", "lines"),
    [
        ("vindr_cxr_open_test\n300 rows", 12, ["vindr_cxr_", "open_test", "300 rows"]),
        ("a/b.c-d, e", 10, ["a/b.c-d, e"]),
        ("9f86d081884c7d659a2feaa0c55ad015_ct", 12, ["9f86d0…d015_", "ct"]),
        ("", 5, [""]),
    ],
)
def test_a_name_is_broken_between_its_words(name: str, width: int, lines: list[str]) -> None:
    found = list(Label(name).lines(width))
    assert found == lines
    assert max(map(len, found)) <= width
