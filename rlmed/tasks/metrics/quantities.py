"""Read a number with its unit, and compare two of them across units.

A text is a quantity only as a whole, beside a few words such as "about": "grade 3 glioma" is none,
or it would be as right as "grade 3 astrocytoma". Left out: decimal commas, fractions, sizes in
several directions ("3 x 4 cm"), bounds ("<5 mm"), and rates ("5 mg/dl").

Everything here takes linear time in the length of the text.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from rlmed.tasks.metrics.text import NUMBER_WORDS, ascii_forms, without_latex

_KINDS: dict[str, dict[str, tuple[float, str]]] = {
    "length": {
        "µm": (1e-6, "μm um micrometre micrometer micron 微米"),
        "mm": (1e-3, "millimetre millimeter 毫米"),
        "cm": (1e-2, "centimetre centimeter 厘米"),
        "m": (1.0, "metre meter 米"),
    },
    "volume": {
        "mm3": (1e-6, "mm³ mm^3"),
        "ml": (1e-3, "cc millilitre milliliter cm3 cm³ cm^3 毫升"),
        "dl": (1e-1, "decilitre deciliter"),
        "l": (1.0, "litre liter 升"),
    },
    "mass": {
        "µg": (1e-6, "μg ug mcg microgram 微克"),
        "mg": (1e-3, "milligram 毫克"),
        "g": (1.0, "gram 克"),
        "kg": (1e3, "kilogram 千克 公斤"),
    },
    "time": {
        "ms": (1e-3, "msec millisecond 毫秒"),
        "s": (1.0, "sec second 秒"),
        "min": (60.0, "minute 分钟"),
        "h": (3600.0, "hr hour 小时"),
        "day": (86400.0, "d 天"),
        "week": (7 * 86400.0, "周"),
    },
    "age": {"month": (1.0, "个月"), "year": (12.0, "yr y 年 岁")},
    "radiodensity": {"HU": (1.0, "hounsfield")},
    "share": {"%": (1.0, "percent")},
    "angle": {"degree": (1.0, "° deg 度")},
    "field": {"T": (1.0, "tesla")},
    "pressure": {"mmHg": (1.0, "")},
    "rate": {"bpm": (1.0, "")},
}
"""By kind: each unit's name, its size in the kind's own unit, and its other spellings."""


def _spellings(name: str, others: str) -> list[str]:
    """Return a unit's spellings in lower case, plurals included."""
    spelled = [name.lower(), *others.split()]
    return spelled + [f"{word}s" for word in spelled if len(word) > 1 and word.isascii() and word.isalpha()]


_UNITS = {name: (kind, size) for kind, units in _KINDS.items() for name, (size, _) in units.items()}
_NAMES = {
    spelling: name for units in _KINDS.values() for name, (_, others) in units.items()
    for spelling in _spellings(name, others)
}  # fmt: skip
_NAMES |= {"mm hg": "mmHg", "hounsfield unit": "HU", "hounsfield units": "HU", "": ""}

_NUMBER = r"[+-]?(?:\d{1,3}(?:,\d{3})++|\d++)(?:\.\d++)?(?:e[+-]?\d++)?|[+-]?\.\d++"
_UNIT = r"[^\W\d_]*(?: hg| units?)?|[cm]m\^?3|[cm]m³|[%°]"
_SEPARATOR = r"[-–—~至到±]|\+/-"
_QUANTITY = re.compile(
    rf"(?P<low>{_NUMBER}) ?(?P<low_unit>{_UNIT}) ?(?:(?P<separator>{_SEPARATOR}) ?(?P<high>{_NUMBER}) ?(?P<unit>{_UNIT}))?"
)
_TAG = re.compile(r"<[a-z/|][^<>]*>|```[a-z]*")
_LATEX = {r"\pm": "±", r"\%": "%", r"^\circ": "°", r"\circ": "°", "{,}": ",", r"\,": " ", r"\;": " ", r"\ ": " "}
_LATEX_SIGN = re.compile("|".join(re.escape(sign) for sign in sorted(_LATEX, key=len, reverse=True)))
_AROUND = re.compile(r"[{}$*`'\"()\[\]]")
_FILLERS = re.compile(
    r"\b(?:about|approximately|approx|roughly|around|circa|ca|it|is|are|measures|measuring|answer|size|diameter|length"
    r"|the|of|in (?:diameter|length|size))\b[.:]?|大约|约|左右"
)
_BETWEEN = re.compile(rf"^between ((?:{_NUMBER}) ?(?:{_UNIT})) and ")


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number or a range, with its unit.

    Example:
        >>> parse_quantity("10-15 mm")
        Quantity(value=12.5, unit='mm', spread=2.5)
    """

    value: float
    """The number, or the middle of a range; finite."""
    unit: str
    """Name of a unit, for example "mm" or "HU"; "" without one."""
    spread: float = 0.0
    """Half the width of a range: 12 ± 2 mm and 10-14 mm are the same; 0 for a number."""


def parse_quantity(text: str) -> Quantity | None:
    """Return the one quantity that the text consists of; None if there is none or several.

    Number words from zero to ten are numbers. A range whose ends have units gets the second.

    Example:
        >>> parse_quantity("about 1.5 cm"), parse_quantity("1,200ml").value, parse_quantity("3 x 4 cm")
        (Quantity(value=1.5, unit='cm', spread=0.0), 1200.0, None)
    """
    found = _QUANTITY.fullmatch(_plain(text))
    if not found:
        return None
    low_unit, unit = _NAMES.get(found["low_unit"]), _NAMES.get(found["unit"] or "")
    if low_unit is None or unit is None:
        return None
    low = _number(found["low"])
    if found["separator"] is None:
        return Quantity(low, low_unit) if math.isfinite(low) else None
    unit = unit or low_unit
    low, high = low * _scale(low_unit or unit, unit), _number(found["high"])
    if found["separator"] in ("±", "+/-"):
        low, high = low - high, low + high
    value, spread = (low + high) / 2, abs(high - low) / 2
    return Quantity(value, unit, spread) if math.isfinite(value) and math.isfinite(spread) else None


def close(answer: str, reference: str, tolerance: float) -> float:
    """Return 1.0 if the answer is the reference's quantity within the tolerance, else 0.0.

    Units are converted; a unit and none are different. If the reference is a range, the tolerance
    begins at its ends; an answer that is a range must lie in there as a whole, so that a wide one
    gains nothing. Texts that are no quantity give 0.0.

    Args:
        tolerance: share of the reference's value, at least 0.

    Example:
        >>> close("15 mm", "1.6 cm", 0.1), close("15", "1.5 cm", 0.1), close("1-90 mm", "15 mm", 0.1)
        (1.0, 0.0, 0.0)

    Raises:
        ValueError: for a negative tolerance or NaN.
    """
    if not tolerance >= 0:
        raise ValueError(f"tolerance={tolerance} must be at least 0, for example 0.05")
    given, right = parse_quantity(answer), parse_quantity(reference)
    if given is None or right is None:
        return 0.0
    scale = _scale(given.unit, right.unit)
    distance = abs(given.value * scale - right.value) + given.spread * scale - right.spread
    rounding = 1e-9 * (abs(right.value) + right.spread)
    return float(distance <= tolerance * abs(right.value) + rounding)


def _plain(text: str) -> str:
    """Return the text in lower case without markup and fillers, number words as digits."""
    text = _TAG.sub(" ", ascii_forms(text).lower())
    text = _LATEX_SIGN.sub(lambda found: _LATEX[found[0]], without_latex(text))
    text = " ".join(_FILLERS.sub(" ", _AROUND.sub(" ", text)).split()).lstrip(" ,;:~≈").rstrip(" .,;:。")
    text = _BETWEEN.sub(r"\1–", text).replace(" to ", "–", 1)
    first, space, rest = text.partition(" ")
    return f"{NUMBER_WORDS.get(first, first)}{space}{rest}"


def _number(text: str) -> float:
    return float(text.replace(",", ""))


def _scale(unit: str, other: str) -> float:
    """Return what one unit is in another; NaN for units of different kinds."""
    if unit == other:
        return 1.0
    (kind, size), (other_kind, other_size) = _UNITS.get(unit, ("", 1.0)), _UNITS.get(other, ("", 1.0))
    return size / other_size if kind == other_kind else math.nan
