"""Questions from JSON Lines files: every row becomes an `Example` or a counted, listed skip."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlmed.core.types import LETTERS, Example
from rlmed.data.images import BadImageError, load_image


class _BadRowError(ValueError):
    """Why a row cannot be used."""


@dataclass(frozen=True, slots=True)
class SkippedRow:
    """A row that is left out.

    Example:
        SkippedRow(line=17, id="mri-17", reason="image images/17.png does not exist")
    """

    line: int
    id: str
    reason: str


@dataclass(frozen=True, slots=True)
class ReadResult:
    """A file as it was read."""

    path: Path
    examples: tuple[Example, ...]
    skipped: tuple[SkippedRow, ...]
    sha256: str
    """Of the file's bytes, in hexadecimal."""


def read_examples(path: Path, *, on_bad_row: str = "skip") -> ReadResult:
    """Read rows `{image, question, options, answer[, modality, kind, id, completion]}`.

    `answer` is the text of an option, or its letter; `image` is a path relative to the file, inside its folder, or null;
    `kind` may be called `qtype`. Blank lines and a byte-order mark are ignored.

    Args:
        path: the file.
        on_bad_row: "skip" lists bad rows in the result, "error" raises at the first.

    Raises:
        ValueError: for a file that is empty, not UTF-8, not JSON (with line and column), or without one usable row.
    """
    content = path.read_bytes()
    rows = _parse(path, content)
    if not rows:
        raise ValueError(f"{path} is empty: it needs one JSON object a line, with image, question, options and answer")
    examples: list[tuple[int, Example]] = []
    skipped: list[SkippedRow] = []
    seen: dict[str, int] = {}
    for line, row in rows:
        name = str(row.get("id", f"{path.stem}-{line}")) if isinstance(row, dict) else f"{path.stem}-{line}"
        try:
            if name in seen:
                raise _BadRowError(f"its id {name!r} was used in line {seen[name]} already")
            examples.append((line, _example(row, name, path.resolve().parent)))
            seen[name] = line
        except _BadRowError as error:
            skipped.append(SkippedRow(line, name, str(error)))
    broken = _broken_images({example.image for _, example in examples if example.image is not None})
    skipped += [SkippedRow(line, entry.id, broken[entry.image]) for line, entry in examples if entry.image in broken]
    good = tuple(example for _, example in examples if example.image not in broken)
    skipped.sort(key=lambda entry: entry.line)
    if skipped and (on_bad_row == "error" or not good):
        head = "; ".join(f"line {entry.line}: {entry.reason}" for entry in skipped[:3])
        what = "no row can be used" if not good else "a row cannot be used, and data.on_bad_row is error"
        raise ValueError(f"{path}: {what} ({len(skipped)} of {len(rows)} are bad). {head}")
    return ReadResult(path, good, tuple(skipped), hashlib.sha256(content).hexdigest())


def format_skips(result: ReadResult, examples: int = 3) -> str:
    """A short account of the skipped rows: how many, and the first few with their reasons."""
    head = "; ".join(f"line {entry.line} ({entry.id}): {entry.reason}" for entry in result.skipped[:examples])
    more = f"; and {len(result.skipped) - examples} more, listed in data.json" if len(result.skipped) > examples else ""
    return f"{result.path}: {len(result.skipped)} of {len(result.skipped) + len(result.examples)} rows skipped. {head}{more}"


def _parse(path: Path, content: bytes) -> list[tuple[int, Any]]:
    """(line number, value) of each line that is not blank."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path} is not UTF-8 (line {line}): save it as UTF-8") from error
    rows = []
    # not splitlines(): a JSON text may hold line separators of Unicode
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append((number, json.loads(line)))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {number}, column {error.colno}: not valid JSON ({error.msg}); each line must be one JSON object"
            ) from error
    return rows


def _example(row: Any, name: str, folder: Path) -> Example:
    if not isinstance(row, dict):
        raise _BadRowError(f"it is no JSON object but {type(row).__name__}")
    options = _options(row)
    completion = row.get("completion")
    return Example(
        id=name,
        image=_image_path(row.get("image"), folder),
        question=_text(row, "question"),
        options=options,
        answer=_answer(row, options),
        modality=_optional_text(row, "modality"),
        kind=_optional_text(row, "kind") or _optional_text(row, "qtype"),
        completion=None if completion is None else _text(row, "completion"),
    )


def _text(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise _BadRowError(f"it has no {key}" if value in (None, "") else f"its {key} is {value!r}, not a text")
    return value


def _optional_text(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    return "" if value is None else str(value)


def _options(row: Mapping[str, Any]) -> tuple[str, ...]:
    options = row.get("options")
    if not isinstance(options, list) or not all(isinstance(entry, str) and entry.strip() for entry in options):
        raise _BadRowError(f"its options are {options!r}, not a list of texts")
    if not 2 <= len(options) <= len(LETTERS):
        raise _BadRowError(f"it has {len(options)} options; 2 to {len(LETTERS)} are possible")
    repeated = [text for text, count in Counter(entry.strip().casefold() for entry in options).items() if count > 1]
    if repeated:
        raise _BadRowError(f"its option {repeated[0]!r} occurs more than once")
    return tuple(options)


def _answer(row: Mapping[str, Any], options: tuple[str, ...]) -> int:
    answer = _text(row, "answer").strip()
    texts = [option.strip() for option in options]
    if answer in texts:
        return texts.index(answer)
    letters = LETTERS[: len(options)]
    if len(answer) == 1 and answer.upper() in letters:
        return letters.index(answer.upper())
    raise _BadRowError(f"its answer {answer!r} is not among its options {list(options)}")


def _image_path(value: Any, folder: Path) -> Path | None:
    if isinstance(value, list):
        if len(value) != 1:
            raise _BadRowError(f"it has {len(value)} images; one is possible")
        (value,) = value
    if value is None:
        return None
    if not isinstance(value, str) or not value or "\0" in value:
        raise _BadRowError(f"its image is {value!r}, not a path")
    path = (folder / value).resolve()
    if not path.is_relative_to(folder):
        raise _BadRowError(f"its image {value!r} leaves the folder of the data file")
    return path


def _broken_images(paths: set[Path]) -> dict[Path | None, str]:
    """Why an image cannot be used, for those that cannot; each file is decoded once."""

    def check(path: Path) -> str | None:
        try:
            load_image(path)
        except BadImageError as error:
            return str(error)
        return None

    ordered = sorted(paths)
    with ThreadPoolExecutor(max_workers=4) as pool:
        return {path: reason for path, reason in zip(ordered, pool.map(check, ordered), strict=True) if reason}
