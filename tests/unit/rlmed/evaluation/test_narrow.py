"""Tables in terminals of 20 to 120 columns: names stay whole, figures too."""

import io
import re
from collections import Counter

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
    """Two files of 300 rows, no figure of which is that of another column or row."""
    files = []
    for at, name in enumerate(NAMES):
        share, blank, shuffled, other = (Accuracy.of(right - at + more, 300) for more in (0, -90, -60, -30))
        shown = {"blank": {"exact": estimate(blank)}, "shuffled": {"exact": estimate(shuffled)}} if controls else {}
        priors = {"exact": 0.142 + at / 10}, {"exact": 0.333 + at / 10}
        task = TaskSummary("open", 300, "exact", {"exact": estimate(share)}, {}, shown, *priors, None)
        summary = FileSummary(
            *(name, 300, share, 0.95 - at / 10, 7.0, 0.0, 0.07 + at / 10, None, None, None, 0.112 + at / 10, 0.2),
            *((blank, shuffled, {}, other) if controls else (None, None, {}, None)),
            tasks=(task,),
        )
        files.append(summary)
    return EvalSummary("base", step, 1.0, 64, 0, tuple(files))


def estimate(share: Accuracy) -> Estimate:
    return Estimate(share.value, share.low, share.high)


def figures(*shares: Accuracy | Estimate | float) -> list[str]:
    """Figures as the tables have them."""
    found = []
    for share in shares:
        if isinstance(share, float):
            found.append(f"{100 * share:.1f}")
        else:
            found += [f"{100 * share.value:.1f}", f"{100 * share.low:.0f}–{100 * share.high:.0f}"]
    return found


def figures_of(before: FileSummary | None, after: FileSummary, *, scores: bool) -> Counter[str]:
    """Each figure of a file's row, in its row of scores or of accuracies."""
    files = [after, *([before] if before else [])]
    if scores:
        scored = [control["exact"] for control in after.tasks[0].controls.values()]
        expected = figures(*(file.tasks[0].scores["exact"] for file in files), *scored)
        expected += figures(after.tasks[0].chance["exact"], after.tasks[0].own_prior["exact"])  # type: ignore[index]
        return Counter([*expected, "exact*", "own", *(["0.012"] if before else [])])
    controls = [control for control in (after.blank, after.shuffled, after.other_order) if control]
    expected = figures(*(file.accuracy for file in files), *(file.format_rate for file in files), *controls)
    expected += figures(after.chance, after.leave_one_out_prior)
    return Counter([*expected, "loo", *(["<0.001"] if before else [])])


@pytest.mark.parametrize("controls", [True, False], ids=["with controls", "without"])
@pytest.mark.parametrize("width", [20, 30, 40, 60, 80, 120])
@pytest.mark.parametrize("table", ["accuracies", "of one evaluation", "scores"])
def test_tables_keep_names_and_figures_whole(table: str, width: int, controls: bool) -> None:
    before, after = (evaluation(step, right, controls=controls) for step, right in ((0, 103), (4, 298)))
    earlier = None if table == "of one evaluation" else before
    build = score_table if table == "scores" else summary_table
    built = build(earlier, after, {"files": COMPARED} if earlier else None)
    assert built is not None
    screen = io.StringIO()
    Console(width=width, file=screen).print(built)
    text = screen.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert "– " not in text
    assert ("shuffled" in text) == controls
    body = re.sub(r"que\w*…\w*_", "questions_", text[: text.index("small")])  # may have no room for nine letters
    first, second = re.split(r"\n(?=test(?:,|\s))", body)
    first = first[first.index("vindr") :]
    for at, row in enumerate((first, second)):
        found = Counter(re.split(r"[\s,]+", row))
        expected = figures_of(earlier.files[at] if earlier else None, after.files[at], scores=table == "scores")
        assert expected <= found, expected - found
        for word in {*re.split("[_-]", NAMES[at]), *(["open"] if table == "scores" else [])}:
            assert re.search(rf"(?<![a-z0-9]){word}(?![a-z0-9])", row), word
        assert "…" not in row


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
