"""Read questions from JSON Lines files: each row becomes an `Example` or a counted, listed skip."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlmed.core.files.near_paths import Folder, OutsideError, near_path
from rlmed.core.files.other_formats import to_prepare
from rlmed.core.types import Example
from rlmed.data.images import MAX_IMAGES, BadImageError, check_image, image_size
from rlmed.data.options.choices import Choice, choose
from rlmed.data.options.sources import is_nothing, plain_option, read_options, unique_keys
from rlmed.data.rows import BadRowError as BadRowError
from rlmed.data.rows import as_object, grouped
from rlmed.data.rows import shorten as shorten
from rlmed.tasks.registry import task_named

_SURROGATE = re.compile("[\ud800-\udfff]")
NEAR_ADVICE = "write the path relative to the folder, with the file's exact name"


@dataclass(frozen=True, slots=True)
class SkippedRow:
    """A skipped row.

    Example:
        SkippedRow(line=17, id="mri-17", reason="image images/17.png does not exist: copy it there
        or correct the path")
    """

    line: int
    """Line in the file, from 1."""
    id: str
    reason: str


@dataclass(frozen=True, slots=True)
class ReadResult:
    """A file as it was read."""

    path: Path
    examples: tuple[Example, ...]
    """The usable rows, in the order of the file."""
    skipped: tuple[SkippedRow, ...]
    """The skipped rows, in the order of the file."""
    sha256: str
    """SHA-256 of the file's bytes, in hexadecimal."""
    lines: Mapping[str, int]
    """Line number, from 1, of each usable row by its id."""


def read_examples(
    path: Path, *, on_bad_row: str = "skip", check: Callable[[Sequence[Example]], None] | None = None
) -> ReadResult:
    """Read rows `{image, question, options, answer[, task, modality, kind, id, completion]}`.

    `options` is a list, or a mapping from letters or numbers; `answer` is an option's text, its
    letter or number, or both: see `rlmed.data.options.choices`. What `answer` is to another `task`
    than choice says its `read`, see `rlmed.tasks`. `image` is a path relative to the
    file, inside its folder, or null; `images`, in its place, is a list of 1 to `MAX_IMAGES` paths,
    in the order in which the model sees them; `qtype` is another name for `kind`. Strips texts;
    ignores blank lines and a byte-order mark. Decodes every image once, so that a damaged one shows
    up here and not in the middle of a run.

    Args:
        path: the file.
        on_bad_row: "skip" lists bad rows in the result, "error" raises if there are any.
        check: called with the rows before their images are decoded, which may take minutes.

    Raises:
        ValueError: for a file that is missing, empty, not UTF-8, not JSON (with line and column),
            or has no usable row.
    """
    if on_bad_row not in ("skip", "error"):
        raise ValueError(f"on_bad_row={on_bad_row!r} must be 'skip' or 'error'")
    if other := to_prepare(path):
        raise ValueError(f"data file {other}")
    try:
        content = path.read_bytes()
    except OSError as error:
        near = near_path(path) or "give the path of a JSON Lines file"
        raise ValueError(f"data file {path} cannot be read: {error.strerror}; {near}") from error
    rows = _parse(path, content)
    if not rows:
        raise ValueError(f"{path} is empty: it needs one JSON object a line, with image, question, options and answer")
    # the folder of a symlinked file is the one that holds the link
    folder = Folder(path.parent)
    entries = [(line, *parse_row(row, f"{path.stem}-{line}", folder)) for line, row in rows]
    if check is not None:
        check([entry for _, _, entry in entries if isinstance(entry, Example)])
    broken = _broken_images({image for _, _, entry in entries if isinstance(entry, Example) for image in entry.images})
    examples: list[Example] = []
    skipped: list[SkippedRow] = []
    lines: dict[str, int] = {}
    for line, name, entry in entries:
        if isinstance(entry, str):
            skipped.append(SkippedRow(line, name, entry))
        elif (reason := _broken_image(entry.images, broken)) is not None:
            skipped.append(SkippedRow(line, name, reason))
        elif name in lines:
            skipped.append(SkippedRow(line, name, f"its id was used in line {lines[name]} already"))
        else:
            lines[name] = line
            examples.append(entry)
    if skipped and (on_bad_row == "error" or not examples):
        head = "; ".join(grouped([(f"line {row.line}", row.reason) for row in skipped])[:3])
        what = "a row cannot be used, and on_bad_row is error" if examples else "no row can be used"
        raise ValueError(f"{path}: {what} ({len(skipped)} of {len(rows)} are bad). {head}")
    return ReadResult(path, tuple(examples), tuple(skipped), hashlib.sha256(content).hexdigest(), lines)


def format_skips(result: ReadResult, examples: int = 3, *, record: str = "data.json") -> str:
    """Summarize skipped rows: how many, and the most common reasons; empty without any.

    `record` is the file that lists them all; "" for none.
    """
    if not result.skipped:
        return ""
    bad, rows = len(result.skipped), len(result.skipped) + len(result.examples)
    reasons = grouped([(f"line {row.line} ({row.id})", row.reason) for row in result.skipped])
    listed = f" (all are listed in {record})" if record else ""
    first = f"The {examples} most common of {len(reasons)} reasons: " if len(reasons) > examples else ""
    return f"{result.path}: {bad} of {rows} rows skipped{listed}. {first}{'; '.join(reasons[:examples])}"


def _parse(path: Path, content: bytes) -> list[tuple[int, Any]]:
    """Yield (line number, value or why it cannot be used) for each line that is not blank."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path} is not UTF-8 (line {number}): save it as UTF-8") from error
    rows = []
    # not splitlines(): JSON text may hold Unicode line separators
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append((number, json.loads(line, object_pairs_hook=unique_keys)))
        except BadRowError as error:
            rows.append((number, error))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {number}, column {error.colno}: not valid JSON ({error.msg}); each line must be one JSON object"
            ) from error
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets thousands deep
            raise ValueError(f"{path}, line {number}: JSON that cannot be read ({error}); remove the line") from error
    return rows


def parse_row(row: Any, default: str, folder: Folder) -> tuple[str, Example | str]:
    """Return (id, the row's example or the reason why there is none), without decoding its image.

    Args:
        row: what a line holds, or why it is unusable.
        default: the id of a row without one.
        folder: of the data file.
    """
    name = default
    try:
        row = as_object(row)
        name = _row_id(row, default)
        images = _image_paths(row, folder)
        return name, Example(
            id=name,
            image=images[0] if images else None,
            question=_text(row, "question").strip(),
            modality=_optional_text(row, "modality"),
            kind=_optional_text(row, "kind") or _optional_text(row, "qtype"),
            completion=None if row.get("completion") is None else _text(row, "completion"),
            more_images=images[1:],
            **_truth(row, images),
        )
    except BadRowError as error:
        return name, str(error)


def _truth(row: Mapping[str, Any], images: Sequence[Path]) -> dict[str, Any]:
    """Return the fields of an example that say what is right."""
    name = _optional_text(row, "task") or "choice"
    if name == "choice":
        choice = _choice(row)
        if row.get("completion") is not None and not choice.same_letters:
            raise BadRowError("the letters in its completion have a gap: name the options A, B, C and so on")
        return {"options": choice.options, "answer": choice.answer}
    if row.get("answer") is None:
        raise BadRowError("it has no answer")
    _check_texts(row["answer"])

    def size() -> tuple[int, int]:
        if not images:
            raise BadRowError(f"it has no image, and its task {name} needs one: name it in `image`")
        return image_size(images[0])

    options = () if row.get("options") is None else row["options"]
    if not isinstance(options, list | tuple):
        raise BadRowError(f"its options is {shorten(options)}, not a list of texts")
    try:
        task = task_named(name)
        if task.needs_image and not images and "image" not in row:
            raise BadRowError(
                f"it has no image, and its task {name} needs one: name it in `image`, or write null there if all that "
                "is asked about is in the question"
            )
        truth = task.read(row["answer"], [_option_text(option) for option in options], size)
    except ValueError as error:
        raise BadRowError(str(error)) from error
    return {"task": name, "truth": truth}


def _check_texts(value: Any) -> None:
    """Check the texts in an answer, however deep, for what no file or tokenizer can hold."""
    if isinstance(value, str):
        _checked_text(value, "answer")
    elif isinstance(value, list | Mapping):
        for entry in value if isinstance(value, list) else value.values():
            _check_texts(entry)


def _row_id(row: Mapping[str, Any], default: str) -> str:
    value = row.get("id")
    if value is None:
        return default
    # ids are often numbers; True is an int to Python
    return str(value) if type(value) is int else _text(row, "id").strip()


def _text(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise BadRowError(f"it has no {key}")
    return _checked_text(value, key)


def _optional_text(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    return "" if value is None else _checked_text(value, key).strip()


def _checked_text(value: object, key: str) -> str:
    if not isinstance(value, str):
        raise BadRowError(f"its {key} is {shorten(value)}, not a text")
    # half of a pair of \\uXXXX escapes is valid JSON but not valid text: it can be neither
    # tokenized nor hashed
    if _SURROGATE.search(value):
        raise BadRowError(f"its {key} {shorten(value)} contains a lone surrogate")
    return value


def _choice(row: Mapping[str, Any]) -> Choice:
    if row.get("options") is None:
        raise BadRowError("it has no options: give some, or a task that needs none, such as open")
    options = read_options(row["options"], _option_text)
    answer = row.get("answer")
    if type(answer) is int:  # True is an int to Python
        return choose(options, str(answer), number=True)
    return choose(options, _text(row, "answer"))


def _option_text(value: object) -> str:
    return "" if is_nothing(value) else plain_option(_checked_text(value, "option"))


def _image_paths(row: Mapping[str, Any], folder: Folder) -> tuple[Path, ...]:
    """Return the paths in a row's `image`, which may also be a list, or in its `images`."""
    one, several = row.get("image"), row.get("images")
    if one is not None and several is not None:
        raise BadRowError(
            f"it has both image {shorten(one)} and images {shorten(several)}: write one of them, all images in `images`"
        )
    if several is not None and not isinstance(several, list):
        raise BadRowError(f'its images is {shorten(several)}, not a list: write {{"images": [path, …]}}, or `image`')
    values = several if several is not None else one if isinstance(one, list) else [] if one is None else [one]
    if not values and (one, several) != (None, None):
        raise BadRowError("its list of images is empty: write null for a question without one")
    if values == [None]:
        return ()
    check_image_count(len(values))
    return tuple(
        _image_path(value, folder, image_name(number, len(values))) for number, value in enumerate(values, start=1)
    )


def check_image_count(count: int) -> None:
    """Check how many images a row has.

    Raises:
        BadRowError: for more than `MAX_IMAGES`.
    """
    if count > MAX_IMAGES:
        raise BadRowError(
            f"it has {count} images, more than {MAX_IMAGES}: choose among them (of a volume, prepare --slices takes some)"
        )


def image_name(number: int, count: int) -> str:
    """Return what messages call a row's image: `image`, or `image 2 of 3` if there are several."""
    return "image" if count == 1 else f"image {number} of {count}"


def _image_path(value: Any, folder: Folder, name: str) -> Path:
    text = _checked_text(value, name)
    path = path_inside(text, folder, name)
    # without a hint, the decoder reports the image as missing
    if not os.path.lexists(path) and (near := folder.near(text)):
        raise BadRowError(f"image {path} does not exist: {near}; {NEAR_ADVICE}")
    return path


def path_inside(text: str, folder: Folder, what: str = "image") -> Path:
    """Return the real path of a row's file, in `folder` but perhaps missing; see `Folder.locate`.

    Raises:
        BadRowError: for a value that is not a path, an absolute path, or one that leaves the folder
            by `..` or a link.
    """
    if not text.strip() or "\0" in text or _SURROGATE.search(text):
        raise BadRowError(f"its {what} is {shorten(text)}, not a path; write null for a question without one")
    try:
        return folder.locate(text)
    except OutsideError as error:
        near = folder.near(text)
        advice = f"{near} in it; {NEAR_ADVICE}" if near else "copy it there and give its relative path"
        raise BadRowError(f"its {what} {shorten(text)} leaves the folder of the data file: {advice}") from error


def _broken_images(paths: set[Path]) -> dict[Path, str]:
    """Return why an image cannot be used, for those that cannot; decodes each file once."""

    def check(path: Path) -> str | None:
        try:
            check_image(path, keep=True)
        except BadImageError as error:
            return str(error)
        return None

    ordered = sorted(paths)
    with ThreadPoolExecutor(max_workers=4) as pool:  # Pillow releases the GIL while it decodes
        return {path: reason for path, reason in zip(ordered, pool.map(check, ordered), strict=True) if reason}


def _broken_image(images: tuple[Path, ...], broken: Mapping[Path, str]) -> str | None:
    """Return why the first unusable image of a row cannot be used; None if all can."""
    for number, image in enumerate(images, start=1):
        if image in broken:
            return broken[image] if len(images) == 1 else f"its {image_name(number, len(images))}: {broken[image]}"
    return None
