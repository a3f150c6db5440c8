"""Recognize files and folders that are not JSON Lines, and say how to convert them."""

from __future__ import annotations

import csv
import json
import shlex
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from rlmed.core.files.litter import walk_data

HEAD = 4096
"""Bytes read to recognize a file."""
MAX_FILES = 2000
"""Most files of a folder to inspect."""
_COLUMNS = frozenset(
    ("question", "answer", "options", "choices", "image", "option_a", "image_path", "frage", "pregunta")
)
"""Lower-case column names by which a header line is recognized."""
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
"""Kinds of folders by priority: a table beside volumes holds their questions."""


def to_prepare(path: Path) -> str:
    """Say what a path is and how to convert it to JSON Lines; "" for those and unknown formats.

    Example:
        >>> to_prepare(Path("questions.csv"))                                       # doctest: +SKIP
        'questions.csv is a table, not JSON Lines: `python -m rlmed.prepare csv
        --source questions.csv --out DIR` converts it (docs/data.md)'
    """
    if path.is_dir():
        return _folder(path)
    kind = _kind(path)
    return f"{path} is {_WHAT[kind]}, not JSON Lines: {_advice(kind, path)}" if kind else ""


def _folder(path: Path) -> str:
    below = (Path(folder, name) for folder, _, names in walk_data(path) for name in names)
    files = list(islice(below, MAX_FILES))
    rows = [file for file in files if file.suffix == ".jsonl"]
    if rows:
        return f"{path} is a folder: name the JSON Lines file in it, for example {rows[0]}"
    kinds = {kind: file for file in reversed(files) if (kind := _kind(file))}
    if len(kinds.keys() & {"dicom", "nifti", "picture"}) > 1:
        return f"{path} is a folder with files of several kinds, not JSON Lines: {_advice('files', path)}"
    for kind in _IN_FOLDERS:
        if kind in kinds:
            advice = _advice(kind, kinds[kind] if kind == "spreadsheet" else path)
            return f"{path} is a folder with {_WHAT[kind]} ({kinds[kind].relative_to(path)}), not JSON Lines: {advice}"
    return f"{path} is a folder: give a JSON Lines file; `python -m rlmed.prepare` makes one (docs/data.md)"


def _kind(path: Path) -> str:
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
    except OSError:  # the reader will report it
        head = b""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"{"):  # JSON Lines, whatever the file's name
        return ""
    for start, offset, kind in (
        (b"DICM", 128, "dicom"),
        (b"PAR1", 0, "huggingface"),
        (b"n+1\0", 344, "nifti"),
        (b"n+2\0", 4, "nifti"),
    ):
        if head[offset : offset + len(start)] == start:
            return kind
    ending = next((end for end in ("".join(path.suffixes[-2:]), path.suffix) if end.lower() in _BY_ENDING), "")
    if ending:
        return _BY_ENDING[ending.lower()]
    if text.startswith(b"[") and _is_array(path, text):
        return "array"
    return "csv" if _is_header(text) else ""


def _is_array(path: Path, text: bytes) -> bool:
    """Return True if the file is one JSON array, on one line or several."""
    first = text.partition(b"\n")[0]
    if first.strip() in (b"[", b"[{"):
        return True
    try:
        value = json.loads(first)
    except ValueError:  # it continues on another line, or beyond the head
        return b"{" in first
    return bool(value) and all(isinstance(entry, dict) for entry in value)


def _is_header(text: bytes) -> bool:
    """Return True if the first line holds column names."""
    try:
        line = text.partition(b"\n")[0].decode("utf-8").strip()
        cells = [next(csv.reader([line], delimiter=mark)) for mark in ",;\t|"]
    except (UnicodeDecodeError, csv.Error, StopIteration):
        return False
    return any(_are_columns(names) for names in cells)


def _are_columns(names: Sequence[str]) -> bool:
    return len(names) > 1 and bool({name.strip().lower() for name in names} & _COLUMNS)


def _advice(kind: str, path: Path) -> str:
    if kind == "picture":
        return "give the file with the questions about it"
    if kind == "archive":
        return "unpack it and pass its content to `python -m rlmed.prepare` (docs/data.md)"
    if kind == "array":
        lines = path.with_name(f"{path.stem}_lines.jsonl")
        return f"write one object per line, for example with `jq -c '.[]' {_shell(path)} > {_shell(lines)}`"
    if kind == "spreadsheet":
        table = path.with_suffix(".csv")
        return f"save it as CSV (UTF-8), then `python -m rlmed.prepare csv --source {_shell(table)} --out DIR` (docs/data.md)"
    if kind in ("dicom", "nifti", "files"):
        folder = path if path.is_dir() else path.parent
        command = f"`python -m rlmed.prepare {kind} --source {_shell(folder)} --out DIR`"
        return f"{command} converts the files in a folder and the questions.csv beside them (docs/data.md)"
    return f"`python -m rlmed.prepare {kind} --source {_shell(path)} --out DIR` converts it (docs/data.md)"


def _shell(path: Path) -> str:
    return shlex.quote(str(path))
