from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.deadline import call_within
from rlmed.tasks.metrics.quantities import Quantity, close, parse_quantity
from tests.unit.rlmed.tasks.metrics.hostile import LONG, mixed, repeated

WRITTEN = {
    "15 mm": (15, "mm", 0),
    "15mm": (15, "mm", 0),
    "1.5 CM": (1.5, "cm", 0),
    "1,200 mL": (1200, "ml", 0),
    "1,234,567.5 g": (1234567.5, "g", 0),
    ".5 cm": (0.5, "cm", 0),
    "5e-1 cm": (0.5, "cm", 0),
    "１５ｍｍ": (15, "mm", 0),
    "٥ mm": (5, "mm", 0),
    "15 毫米": (15, "mm", 0),
    "5 millimetres": (5, "mm", 0),
    "5 micrometers": (5, "µm", 0),
    "5 um": (5, "µm", 0),
    "5 μg": (5, "µg", 0),
    "5 cc": (5, "ml", 0),
    "5 cm^3": (5, "ml", 0),
    "5 cm³": (5, "ml", 0),
    "-50 HU": (-50, "HU", 0),
    "−50 Hounsfield units": (-50, "HU", 0),
    "+5": (5, "", 0),
    "50%": (50, "%", 0),
    "50 percent": (50, "%", 0),
    "45°": (45, "degree", 0),
    "45 degrees": (45, "degree", 0),
    "3 T": (3, "T", 0),
    "120 mm Hg": (120, "mmHg", 0),
    "120mmHg": (120, "mmHg", 0),
    "64 years": (64, "year", 0),
    "64岁": (64, "year", 0),
    "18 months": (18, "month", 0),
    "200 ms": (200, "ms", 0),
    "three": (3, "", 0),
    "Two cm": (2, "cm", 0),
    "007": (7, "", 0),
    "10-15 mm": (12.5, "mm", 2.5),
    "15-10 mm": (12.5, "mm", 2.5),
    "10 – 15 mm": (12.5, "mm", 2.5),
    "10 to 15mm": (12.5, "mm", 2.5),
    "10 mm to 1.5 cm": (1.25, "cm", 0.25),
    "between 10 and 15 mm": (12.5, "mm", 2.5),
    "between 10mm and 15mm": (12.5, "mm", 2.5),
    "12 ± 2 mm": (12, "mm", 2),
    "12+/-2 mm": (12, "mm", 2),
    "-100--50 HU": (-75, "HU", 25),
    "−100 to −50 HU": (-75, "HU", 25),
    "10~15毫米": (12.5, "mm", 2.5),
}
AROUND = [
    "{}",
    "  {}\n",
    "{}.",
    "about {}",
    "It measures approximately {}.",
    "**{}**",
    '"{}"',
    "<answer>{}",
    "${}$",
    "({})",
]
LATEX = {
    r"$15\,\mathrm{mm}$": (15, "mm", 0),
    r"\boxed{15 \text{ mm}}": (15, "mm", 0),
    r"$45^\circ$": (45, "degree", 0),
    r"50\%": (50, "%", 0),
    r"1{,}200": (1200, "", 0),
    r"12 \pm 2": (12, "", 2),
    "```\n15 mm\n```": (15, "mm", 0),
    "```json\n15 mm```": (15, "mm", 0),
    "约15毫米。": (15, "mm", 0),
    "~15 mm": (15, "mm", 0),
    "15 mm in diameter": (15, "mm", 0),
    "<answer><answer>15 mm</answer>": (15, "mm", 0),
}
UNREADABLE = [
    "", " ", "mm", "none", "NaN", "nan mm", "Infinity", "-inf mm", "1e400", "-1e400 mm", "1-1e400", "9" * 5000, "9" * 10_000,
    "3 x 4 cm", "3x4 cm", "3×4 cm", r"3 \times 4 cm", "2, 3 cm", "2 and 3 cm", "15 mm (1.5 cm)", "15 mm, 20 mm", "1 2 3",
    "1,5 cm", "1,20", "12,34,567", "1,2,3", "1.5.2", "5. mm", "1..5", "1/2", "1½ cm", "½", "10²", "12/05/2020",
    "2020-05-06", "<5 mm", "> 5 mm", "≤5 mm", "≥ 5", "5 mg/dl", "5 mm/s", "5 kg/m²", "5 cm²", "5 cm2", "5 mm^2", "5 m²",
    "37 °C", "5 in", "5 inches", "5 lesions", "3个", "grade 3", "T2", "T2-weighted", "L4-5", "COVID-19", "stage 3 glioma", "5q",
    "3rd", "5px", "0x10", "1_000", "1e", "e5", "five-six", "twenty", "one lesion", "five six", "--5", "+-5", "- 5 -", "5 - mm",
    "5 to", "between 10 and", "between and 15", "between 5 mm", "12 ± mm", "12 ± 2 ± 3", "10-15-20 mm", "10 kg-15 lesions",
    '{"value": 15, "unit": "mm"}', '{"value": 15}', "[15, 20]", "size: NaN mm", "answer: none", "\x00", "5\x00mm", "十五毫米",
    "15 mm" * 2000, "15 " * 3000, "(" * 9000 + "a", "<a" * 5000, "1," * 5000, "between " * 1000, "-" * 10_000 + "5",
    "mm" * 5000, "肝" * 10_000, "1e" * 5000, "5 " + "m" * 10_000, "about " * 2000, r"\frac{1}{2}", "{1}{2}",
    "(15)(20)", "[1][5]", "1*5", "1'000", '"1" "5"', "$1$5", "1`5",
]  # fmt: skip
assert len(WRITTEN) * len(AROUND) + len(LATEX) + len(UNREADABLE) > 500


@pytest.mark.parametrize("around", AROUND)
def test_quantities_are_read_in_every_notation(around: str) -> None:
    read = {text: parse_quantity(around.replace("{}", text)) for text in WRITTEN}
    # the ends of a range are converted and halved: roundings of numbers around 1
    assert {text: found and (found.value, found.unit, found.spread) for text, found in read.items()} == {
        text: (pytest.approx(value, rel=1e-15), unit, pytest.approx(spread, rel=1e-14))
        for text, (value, unit, spread) in WRITTEN.items()
    }


@pytest.mark.parametrize(("text", "expected"), LATEX.items())
def test_quantities_are_read_in_markup(text: str, expected: tuple[float, str, float]) -> None:
    assert parse_quantity(text) == Quantity(*expected)


@pytest.mark.parametrize("text", UNREADABLE, ids=range(len(UNREADABLE)))
def test_what_is_no_quantity_is_not_guessed(text: str) -> None:
    assert parse_quantity(text) is None


def test_random_texts_give_finite_quantities_or_none() -> None:
    read = [parse_quantity(text) for text in [*mixed(2000, seed=3), *repeated(10_000)]]
    assert all(found is None or (math.isfinite(found.value) and found.spread >= 0) for found in read)
    assert None in read
    assert any(read)


def test_reading_takes_linear_time() -> None:
    texts = [*repeated(LONG), f"between {'5' * LONG} and 6", f"5 {'m' * LONG} and", f"5{' ' * LONG}mm"]
    for text in texts:
        call_within(60, lambda text=text: parse_quantity(text))  # something quadratic would take minutes


@given(st.floats(allow_nan=False, allow_infinity=False), st.sampled_from(["", "mm", "ml", "HU", "%"]))
def test_every_number_is_read_as_it_is(number: float, unit: str) -> None:
    assert parse_quantity(f"{number} {unit}") == Quantity(number, unit)


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("15 mm", "1.5 cm"),
        ("1.5 cm", "15mm"),
        ("0.015 m", "15 mm"),
        ("15000 µm", "15 mm"),
        ("1 l", "1,000 ml"),
        ("10 dl", "1000 cc"),
        ("1 cm3", "1000 mm3"),
        ("1 g", "1000 mg"),
        ("500 µg", "0.5 mg"),
        ("2 kg", "2000 g"),
        ("2 s", "2000 ms"),
        ("2 min", "120 s"),
        ("1 week", "7 days"),
        ("1 h", "60 minutes"),
        ("2 years", "24 months"),
        ("-50 HU", "−50 hounsfield units"),
        ("45 deg", "45°"),
        ("50%", "50 percent"),
        ("three", "3"),
        ("0", "0.0"),
        ("12 mm", "10-15 mm"),
        ("10 mm", "10-15 mm"),
        ("1.5 cm", "10-15 mm"),
        ("11-12 mm", "10-15 mm"),
        ("10 to 15 mm", "10-15 mm"),
    ],
)
def test_the_same_quantity_is_close_at_no_tolerance(answer: str, reference: str) -> None:
    assert close(answer, reference, 0.0) == 1.0


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("15", "15 mm"),
        ("15 mm", "15"),
        ("15 ml", "15 mm"),
        ("15 mg", "15 ms"),
        ("50%", "0.5"),
        ("1 month", "30 days"),
        ("-50 HU", "50 HU"),
        ("0.001 mm", "0 mm"),
        ("1-29 mm", "15 mm"),
        ("9-15 mm", "10-15 mm"),
        ("16 mm", "10-15 mm"),
        ("nothing", "15 mm"),
        ("15 mm", "nothing"),
        ("15 mm, 16 mm", "15 mm"),
        ("1e308 m", "1e-308 mm"),
    ],
)
def test_other_quantities_are_not_close(answer: str, reference: str) -> None:
    assert close(answer, reference, 0.01) == 0.0


@pytest.mark.parametrize(
    ("answer", "reference", "tolerance", "expected"),
    [
        ("105 mm", "10 cm", 0.05, 1.0),
        ("106 mm", "10 cm", 0.05, 0.0),
        ("95 mm", "10 cm", 0.05, 1.0),
        ("94 mm", "10 cm", 0.05, 0.0),
        ("-95 HU", "-100 HU", 0.05, 1.0),
        ("-94 HU", "-100 HU", 0.05, 0.0),
        ("16 mm", "10-15 mm", 0.08, 1.0),  # the middle is 12.5, so 1 mm beyond an end is allowed
        ("16.1 mm", "10-15 mm", 0.08, 0.0),
        ("99-101", "100", 0.01, 1.0),
        ("98-100", "100", 0.01, 0.0),
        ("5", "100", math.inf, 1.0),
    ],
)
def test_the_tolerance_is_a_share_of_the_reference(
    answer: str, reference: str, tolerance: float, expected: float
) -> None:
    assert close(answer, reference, tolerance) == expected


@pytest.mark.parametrize("tolerance", [-0.1, math.nan])
def test_a_tolerance_below_zero_is_refused(tolerance: float) -> None:
    with pytest.raises(ValueError, match="tolerance="):
        close("5", "5", tolerance)
