import pytest

from rlmed.data.rows import grouped, shorten

LONG = ["a word"] * 99


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("its box [3, 2] has no area: write [x0, y0, x1, y1]", "its box [3, 2] is no list: write [x0, y0, x1, y1]"),
        ("its part {'a': 1} is not in {'b': 2}", "its part {'a': 1} is twice in {'b': 2}"),
        ("the row's stage 'x' is unknown", "the row's grade 'x' is unknown"),
        (f"its answer {shorten(LONG)} is long: write ['a']", f"its answer {shorten(LONG)} is twice there: write ['a']"),
    ],
    ids=lambda reason: reason[:20],
)
def test_two_faults_between_values_are_two_reasons(one: str, other: str) -> None:
    assert grouped([("line 1", one), ("line 2", other)]) == [f"line 1: {one}", f"line 2: {other}"]


@pytest.mark.parametrize(
    "reason",
    [
        "its box {} is not [x0, y0, x1, y1] with 0 <= x0 < x1 <= 640",
        "the row's answer {} isn't a text",
        "its answer is {}, not a list of texts",
    ],
)
def test_one_fault_with_other_values_is_one_reason(reason: str) -> None:
    values = [
        *(
            [[1, 2], [3, 4]],
            ["]", "it's a \"", "'"],
            {"a": [1], "b": {}},
            "it's",
            "an \"x\" or 'y'",
            7.5,
            "images/a.png",
        ),
        *(LONG, {"a": LONG}, "a word " * 99, [[["'"] * 99]]),
    ]
    rows = [(f"line {line}", reason.format(shorten(value))) for line, value in enumerate(values, 1)]
    assert grouped(rows) == [f"{len(values)} rows, such as line 1: {rows[0][1]}"]
