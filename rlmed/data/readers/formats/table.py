"""Map the columns of a table to fields, and its records to rows."""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlmed.core.spelling import closest
from rlmed.core.types import LETTERS
from rlmed.data.examples import BadRowError, image_name, shorten
from rlmed.data.images import BadImageError
from rlmed.data.options.choices import choose, written_answer
from rlmed.data.options.sources import Options, is_nothing, parse_options, plain_option, read_options
from rlmed.data.readers.base import Option, Skipped, SourceImage, SourceRow
from rlmed.data.readers.formats.image_files import Images

FIELDS: Mapping[str, tuple[str, ...]] = {
    "id": ("id",),
    "image": ("image", "image_path", "file"),
    "images": ("images", "image_paths", "files"),
    "question": ("question",),
    "options": ("options", "choices"),
    "answer": ("answer",),
    "modality": ("modality",),
    "kind": ("kind", "question_type", "qtype"),
    "split": ("split",),
}
"""Column names of each field without --column; the first present one counts, in any case."""
BETWEEN_IMAGES = "|"
"""Parts the paths in a cell of several images: neither Windows' names nor tables' delimiters."""
OPTION_FIELDS = tuple(f"option_{letter.lower()}" for letter in LETTERS)
OPTION_NAMES = (OPTION_FIELDS, tuple(LETTERS.lower()), tuple(f"choice {letter}" for letter in LETTERS.lower()))
"""Names of columns with one option each, in the usual spellings."""


def column_option(fields: str) -> Option:
    """Return the option --column of a reader whose tables have these fields."""
    text = f"the column that holds a field; fields: {fields}. May be repeated"
    return Option("--column", {"action": "append", "metavar": "FIELD=NAME", "help": text})


ALL_FIELDS = f"{', '.join(FIELDS)}, option_a to option_j"
COLUMN = column_option(ALL_FIELDS)
ANSWER_INDEX = Option(
    "--answer-index",
    {
        "type": int,
        "choices": (0, 1),
        "help": "the answer is the index of the correct option, counted from 0 or from 1 (default: its text or letter)",
    },
)
SPLIT = Option("--split", {"metavar": "NAME", "help": "split of rows whose table has no split column"})
IMAGES = Option(
    "--images",
    {"type": Path, "metavar": "PATH", "help": "folder (or .zip) that image paths are relative to"},
    beside="--without-images",
)
WITHOUT_IMAGES = Option(
    "--without-images", {"action": "store_true", "help": "read questions only: no images, every row is text-only"}
)

Record = Mapping[str, Any]
ImagesOf = Callable[[Record], Sequence[SourceImage]]
"""Returns a record's images: none, one or several. Raises BadRowError or BadImageError."""


def parse_columns(given: Sequence[str], fields: Sequence[str] = (*FIELDS, *OPTION_FIELDS)) -> dict[str, str]:
    """Parse `["question=Frage"]` to `{"question": "Frage"}`.

    Raises:
        ValueError: for a malformed entry, an unknown field, or one given twice.
    """
    columns: dict[str, str] = {}
    for entry in given:
        field, equals, name = entry.partition("=")
        if not equals or not name or field not in fields:
            raise ValueError(_unknown_field(entry, field, name, fields))
        if field in columns:
            raise ValueError(f"--column {entry}: {field} is given twice")
        columns[field] = name
    return columns


def _unknown_field(entry: str, field: str, name: str, fields: Sequence[str]) -> str:
    """Say what is wrong with `--column field=name`, and what it may name."""
    listed = ", ".join(field for field in fields if field not in OPTION_FIELDS)
    listed += " or option_a to option_j" if OPTION_FIELDS[0] in fields else ""
    if not name:
        return f"--column {entry}: write FIELD=NAME, for example question=Frage, with a field of {listed}"
    near = f"{name}={field}" if name in fields else f"{found}={name}" if (found := closest(field, fields)) else ""
    advice = f"did you mean --column {shlex.quote(near)}? Fields" if near else "the fields"
    return f"--column {entry}: {shorten(field)} is no field: {advice} are {listed}"


@dataclass(frozen=True)
class Columns:
    """Maps fields to the columns of a table.

    Example:
        >>> Columns.find("a.csv", ["Image", "Question", "A", "B", "Answer"], {}).options
        ('A', 'B')
    """

    names: Mapping[str, str]
    """Column by field, except for options in columns of their own."""
    options: tuple[str, ...]
    """Columns with one option each; empty if one column holds them all."""
    letters: tuple[str, ...] = ()
    """Name of each of these options; letters may have gaps."""
    answer_index: int | None = None

    @classmethod
    def find(
        cls,
        table: str,
        header: Sequence[str],
        given: Mapping[str, str],
        *,
        required: Sequence[str] = ("image", "question", "answer"),
        answer_index: int | None = None,
        options_required: bool = True,
    ) -> Columns:
        """Find the columns of `header`.

        Args:
            table: its name, for messages.
            header: names of all columns.
            given: column by field, as the user says; matched exactly.
            required: fields that must exist; `images` will do for `image`.
            answer_index: the first option's index, if the answer is an index.
            options_required: False for tables that may have only answers.

        Raises:
            ValueError: for a column that is missing or occurs twice.
        """
        repeated = sorted(name for name, count in Counter(header).items() if name and count > 1)
        if repeated:
            raise ValueError(f"{table} has more than one column {shorten(repeated[0])}: rename one")
        absent = [f"{field}={name}" for field, name in given.items() if name not in header]
        if absent:
            raise ValueError(f"{table} has no column for --column {', '.join(absent)}; its columns: {_listed(header)}")
        lowered = {name.strip().lower(): name for name in reversed(header)}
        found = {field: lowered[name] for field, names in FIELDS.items() for name in reversed(names) if name in lowered}
        for field in found.keys() - given.keys():
            alike = [name for name in header if name.strip().lower() == found[field].strip().lower()]
            if len(alike) > 1:
                raise ValueError(
                    f"{table} has more than one column of {field}, {shorten(alike)}: name it with --column"
                )
        for field, other in (("image", "images"), ("images", "image")):
            if field in given and other not in given:
                found.pop(other, None)  # a table may have both, and the user has chosen
        names = {**found, **{field: name for field, name in given.items() if field in FIELDS}}
        named = {letter: given[field] for letter, field in zip(LETTERS, OPTION_FIELDS, strict=True) if field in given}
        if not named and "options" not in names:
            named = _option_columns(table, header)
        options, letters = tuple(named.values()), tuple(named)
        missing = [field for field in required if field not in names and not (field == "image" and "images" in names)]
        if options_required and not options and "options" not in names:
            missing.append("options")
        if missing:
            arguments = " ".join(f"--column {field}=NAME" for field in missing)
            advice = _parting(header) or f"name {'it' if len(missing) == 1 else 'them'} with {arguments}"
            raise ValueError(
                f"{table} has no column for {', '.join(missing)}: {advice}. Its columns: {_listed(header)}"
            )
        return cls(names, options, letters, answer_index)

    @property
    def has_options(self) -> bool:
        """Return whether the table has options; False for one with answers only."""
        return bool(self.options) or "options" in self.names

    def used(self, *, images: bool) -> list[str]:
        """Return the columns that rows need, with or without those of images."""
        names = (name for field, name in self.names.items() if images or field not in ("image", "images"))
        return [*names, *self.options]

    def row(
        self, record: Record, *, where: str, default_id: str, default_split: str, images: ImagesOf
    ) -> SourceRow | Skipped:
        """Convert a record to a row to write, or a skip that says why not."""
        row_id = default_id
        try:
            row_id = self.text(record, "id") or default_id
            options, answer = self._choice(record)
            shown = tuple(images(record))
            return SourceRow(
                where=where,
                split=self.text(record, "split") or default_split,
                id=row_id,
                question=self.text(record, "question"),
                options=options,
                answer=answer,
                image=shown[0] if shown else None,
                modality=self.text(record, "modality"),
                kind=self.text(record, "kind"),
                more_images=shown[1:],
            )
        except (BadRowError, BadImageError) as error:
            return Skipped(where, row_id, str(error))

    def text(self, record: Record, field: str) -> str:
        """Return a field of the record, stripped; "" if missing.

        Raises:
            BadRowError: for a value that is neither text nor number.
        """
        name = self.names.get(field)
        return "" if name is None else as_text(record.get(name), field)

    def image_values(self, record: Record) -> list[Any]:
        """Return what the record holds as its images, in order; empty for none.

        That is the value of `image`, which may be a list, or those of `images`: a list, also as
        JSON, or texts parted by `BETWEEN_IMAGES`.

        Raises:
            BadRowError: for a record with both.
        """
        one, several = (record.get(self.names[field]) if field in self.names else None for field in ("image", "images"))
        if not (_is_blank(one) or _is_blank(several)):
            raise BadRowError(
                "it has both an image and images: leave one blank, or name the column to read with --column image=NAME or "
                "--column images=NAME"
            )
        if isinstance(several, str) and not _is_blank(several):
            return _listed_paths(several)
        value = one if _is_blank(several) else several
        return value if isinstance(value, list) else [] if _is_blank(value) else [value]

    def _choice(self, record: Record) -> tuple[tuple[str, ...], str]:
        """Return options and answer as written."""
        answer = self.text(record, "answer")
        if not self.has_options:
            return (), answer
        value = record.get(self.names["answer"])
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        choice = choose(self._options(record), answer, first=self.answer_index, number=number)
        return choice.options, written_answer(choice.options, choice.answer)

    def _options(self, record: Record) -> Options:
        if self.options:
            values = [record.get(name) for name in self.options]
            texts = [
                option_text(value, f"option in column {name}") for name, value in zip(self.options, values, strict=True)
            ]
            return Options(
                tuple(texts), self.letters, "column", numbers=not any(isinstance(value, str) for value in values)
            )
        value = record.get(self.names["options"])
        return read_options(parse_options(value) if isinstance(value, str) else value, option_text)


def as_text(value: Any, what: str) -> str:
    """Return a cell as stripped text: numbers as Python writes them, null as "".

    Raises:
        BadRowError: for another type.
    """
    if is_nothing(value):
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, (bool, int, float)):
        return str(value)
    if not isinstance(value, str):
        raise BadRowError(f"its {what} is {shorten(value)}, not a text")
    return value.strip()


def option_text(value: Any, what: str = "option") -> str:
    """Apply `as_text`, then `plain_option`.

    Raises:
        BadRowError: for another type.
    """
    return plain_option(as_text(value, what))


NO_IMAGE = "it has no image: add it, or read all questions as text with --without-images"


def named_images(columns: Columns, images: Images) -> ImagesOf:
    """Return an `ImagesOf` for columns of image paths."""

    def find(record: Record) -> list[SourceImage]:
        values = columns.image_values(record)
        if not values:
            raise BadRowError(NO_IMAGE)
        names = [image_name(number, len(values)) for number in range(1, len(values) + 1)]
        return [images.find(_path(value, name)) for value, name in zip(values, names, strict=True)]

    def _path(value: Any, name: str) -> str:
        if _is_blank(value):
            raise BadRowError(f"its {name} is missing: give its path, or take it out of the list")
        return as_text(value, name)

    return find


def no_images(record: Record) -> tuple[()]:
    """Return no image: the `ImagesOf` of questions without one."""
    return ()


def _is_blank(value: Any) -> bool:
    return is_nothing(value) or value == [] or (isinstance(value, str) and not value.strip())


def _listed_paths(text: str) -> list[Any]:
    """Return the paths in a cell of several: a JSON list, or texts parted by `BETWEEN_IMAGES`."""
    if text.lstrip().startswith("["):
        with suppress(ValueError, RecursionError):
            values = json.loads(text)
            assert isinstance(values, list)
            return values
    paths = text.split(BETWEEN_IMAGES)
    if not all(path.strip() for path in paths):
        raise BadRowError(
            f"of its {len(paths)} images, parted by {BETWEEN_IMAGES}, one is blank: take out the {BETWEEN_IMAGES} beside it"
        )
    return paths


def file_split(path: Path) -> str:
    """Return the split of a file's rows, from its name: `my test.csv` is `my_test`."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", path.stem).strip("_-") or "data"


def _option_columns(table: str, header: Sequence[str]) -> dict[str, str]:
    """Return option columns by letter, in the first spelling of which two or more columns exist.

    Raises:
        ValueError: for two columns with one letter.
    """
    for names in OPTION_NAMES:
        letters = dict(zip(names, LETTERS, strict=True))
        found = [(letters[key], name) for name in header if (key := name.strip().lower()) in letters]
        if len({letter for letter, _ in found}) < 2:
            continue
        for letter, count in Counter(letter for letter, _ in found).items():
            if count > 1:
                columns = [shorten(name) for other, name in found if other == letter]
                raise ValueError(
                    f"{table} has more than one column of option {letter}, {' and '.join(columns)}: rename one"
                )
        return dict(sorted(found))
    return {}


def _parting(header: Sequence[str]) -> str:
    """Return what to do about a header split by the wrong delimiter; "" for any other."""
    if header[0].strip().lower().startswith("sep="):
        return "remove the first line, which is for Excel"
    marks = ["tab" if mark == "\t" else mark for mark in ",;|\t" if len(header) == 1 and mark in header[0]]
    return f"name its delimiter with --delimiter {marks[0]!r}" if marks else ""


def _listed(header: Sequence[str]) -> str:
    shown = ", ".join(header[:30])
    return f"{shown}, …" if len(header) > 30 else shown or "none"
