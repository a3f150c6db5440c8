"""Files and folders given for JSON Lines that are something else: what they are, and what makes rows of them."""

from __future__ import annotations

import csv
import json
import shlex
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from rlmed.core.litter import walk_data

HEAD = 4096
"""Bytes that a file is known by."""
MAX_FILES = 2000
"""Files of a folder that are looked at."""
_COLUMNS = frozenset(
    ("question", "answer", "options", "choices", "image", "option_a", "image_path", "frage", "pregunta")
)
"""Names of columns, in lower case, by which the first line of a text is known for a table's."""
_BY_ENDING = {
    **dict.fromkeys((".csv", ".tsv", ".tab"), "csv"),
    **dict.fromkeys((".xlsx", ".xls", ".xlsm", ".xlsb", ".ods", ".numbers"), "spreadsheet"),
    **dict.fromkeys((".parquet", ".pq"), "huggingface"),
    **dict.fromkeys((".dcm", ".dicom", ".ima"), "dicom"),
    **dict.fromkeys((".nii", ".nii.gz"), "nifti"),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".gz", ".7z", ".rar", ".bz2", ".xz"), "archive"),
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".jp2"), "picture"),
}
_WHAT = {
    "csv": "a table",
    "spreadsheet": "a spreadsheet",
    "huggingface": "a parquet file",
    "dicom": "a DICOM file",
    "nifti": "a NIfTI volume",
    "archive": "an archive",
    "picture": "a picture",
    "array": "a JSON array",
}
_IN_FOLDERS = ("dicom", "nifti", "huggingface", "csv", "spreadsheet")
"""What a folder is taken for, the first of which it holds a file: beside volumes, a table is that of their questions."""


def to_prepare(path: Path) -> str:
    """What a path is that is not JSON Lines, and how its rows are made; "" for JSON Lines and what is not known.

    Example:
        >>> to_prepare(Path("questions.csv"))                                       # doctest: +SKIP
        'questions.csv is a table, not JSON Lines: `python -m rlmed.prepare csv --source questions.csv --out DIR` makes that
        of it (docs/data.md)'
    """
    if path.is_dir():
        return _folder(path)
    kind = _kind(path)
    return f"{path} is {_WHAT[kind]}, not JSON Lines: {_cure(kind, path)}" if kind else ""


def _folder(path: Path) -> str:
    below = (Path(folder, name) for folder, _, names in walk_data(path) for name in names)
    files = list(islice(below, MAX_FILES))
    rows = [file for file in files if file.suffix == ".jsonl"]
    if rows:
        return f"{path} is a folder: name the JSON Lines file in it, for example {rows[0]}"
    kinds = {kind: file for file in reversed(files) if (kind := _kind(file))}
    for kind in _IN_FOLDERS:
        if kind in kinds:
            cure = _cure(kind, kinds[kind] if kind == "spreadsheet" else path)
            return f"{path} is a folder with {_WHAT[kind]} ({kinds[kind].relative_to(path)}), not JSON Lines: {cure}"
    return f"{path} is a folder: give a JSON Lines file, which `python -m rlmed.prepare` makes (docs/data.md)"


def _kind(path: Path) -> str:
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
    except OSError:  # whoever reads it says what is wrong
        head = b""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"{"):  # rows, whatever the file is called
        return ""
    for start, place, kind in (
        (b"DICM", 128, "dicom"),
        (b"PAR1", 0, "huggingface"),
        (b"n+1\0", 344, "nifti"),
        (b"n+2\0", 4, "nifti"),
    ):
        if head[place : place + len(start)] == start:
            return kind
    ending = next((end for end in ("".join(path.suffixes[-2:]), path.suffix) if end.lower() in _BY_ENDING), "")
    if ending:
        return _BY_ENDING[ending.lower()]
    if text.startswith(b"[") and _is_array(path, text):
        return "array"
    return "csv" if _is_header(text) else ""


def _is_array(path: Path, text: bytes) -> bool:
    """Whether a whole file is one array, of one line or of many: a line of JSON Lines is an object."""
    first = text.partition(b"\n")[0]
    if first.strip() in (b"[", b"[{"):
        return True
    try:
        value = json.loads(first)
    except ValueError:  # it goes on in another line, or behind the head
        return b"{" in first
    return bool(value) and all(isinstance(entry, dict) for entry in value)


def _is_header(text: bytes) -> bool:
    """Whether a text begins with names of columns."""
    try:
        line = text.partition(b"\n")[0].decode("utf-8").strip()
        cells = [next(csv.reader([line], delimiter=mark)) for mark in ",;\t|"]
    except (UnicodeDecodeError, csv.Error, StopIteration):
        return False
    return any(_are_columns(names) for names in cells)


def _are_columns(names: Sequence[str]) -> bool:
    return len(names) > 1 and bool({name.strip().lower() for name in names} & _COLUMNS)


def _cure(kind: str, path: Path) -> str:
    if kind == "picture":
        return "give the file of the questions about it"
    if kind == "archive":
        return "unpack it, and give `python -m rlmed.prepare` what is in it (docs/data.md)"
    if kind == "array":
        lines = path.with_name(f"{path.stem}_lines.jsonl")
        return f"write each of its objects on a line of its own, for example by `jq -c '.[]' {_shell(path)} > {_shell(lines)}`"
    if kind == "spreadsheet":
        table = path.with_suffix(".csv")
        return f"save it as CSV (UTF-8), then `python -m rlmed.prepare csv --source {_shell(table)} --out DIR` (docs/data.md)"
    if kind in ("dicom", "nifti"):
        folder = path if path.is_dir() else path.parent
        command = f"`python -m rlmed.prepare {kind} --source {_shell(folder)} --out DIR`"
        return f"{command} makes that of the files in a folder and of questions.csv beside them (docs/data.md)"
    return f"`python -m rlmed.prepare {kind} --source {_shell(path)} --out DIR` makes that of it (docs/data.md)"


def _shell(path: Path) -> str:
    return shlex.quote(str(path))
