"""Write any reader's rows as prepared data: JSON Lines, images beside them, and a manifest of both.

    DIR/train.jsonl       {"id", "image", "question", "options", "answer", "modality", "kind"}, one file a split;
                          "images", a list, in place of "image" for a question about several
    DIR/images/…          copies of the source's images, or PNG files of the reader's pictures
    DIR/manifest.json     source, contents, a SHA-256 of each file, and every skipped row with its reason

Everything is written into a folder beside DIR and renamed at the end, so a killed write never
passes for complete.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from rlmed.core.files.atomic import partial_folder, rename_into_place
from rlmed.core.files.ownership import writer_of
from rlmed.data.leakage.findings import LeakageReport
from rlmed.data.leakage.search import folder_leakage
from rlmed.data.prepare.summaries import SplitSummary
from rlmed.data.prepare.writer import PreparedDataWriter, writing
from rlmed.data.readers.base import Reader, Skipped, SourceRow

MANIFEST = "manifest.json"
LAYOUT_VERSION = 1


@dataclass(frozen=True, slots=True)
class PreparedData:
    """Prepared data on disk; `manifest.json` holds the same.

    Example:
        PreparedData(folder=Path("data/mine"), splits={"train": SplitSummary(…)},
        skipped=(Skipped("row 3 of a.csv", …),))
    """

    folder: Path
    splits: dict[str, SplitSummary]
    """By name, in the reader's order."""
    skipped: tuple[Skipped, ...]
    leakage: LeakageReport | None = None
    """What splits called `train…` share with others; None unless it has both, or if unsearched."""

    @property
    def written(self) -> int:
        """Return the number of rows in all splits."""
        return sum(split.rows for split in self.splits.values())

    @property
    def bad(self) -> int:
        """Return the number of rows skipped for a defect, not by choice."""
        return sum(row.rows for row in self.skipped if not row.chosen)

    @property
    def by_choice(self) -> int:
        """Return the number of sound rows left out by choice."""
        return sum(row.rows for row in self.skipped if row.chosen)

    @property
    def read(self) -> int:
        """Return the number of source rows: each is written or skipped."""
        return self.written + self.bad + self.by_choice


def write_prepared_data(
    rows: Iterable[SourceRow | Skipped],
    folder: Path,
    *,
    reader: Reader,
    source: Path,
    options: Mapping[str, Any],
    on_bad_row: Literal["skip", "error"] = "skip",
    overwrite: bool = False,
    leakage: bool = True,
    on_row: Callable[[int], None] | None = None,
) -> PreparedData:
    """Write the rows as they come.

    Args:
        rows: from the reader.
        folder: where the data goes; created if missing.
        reader: for the manifest.
        source: path or data set name; the manifest records only its last component.
        options: the reader's options, for the manifest.
        on_bad_row: "skip" lists defective rows in the manifest, "error" raises at the first.
        overwrite: replace earlier prepared data in `folder`.
        leakage: search the other splits for training pictures and rows.
        on_row: called with the number of rows seen so far.

    Raises:
        ValueError: if the folder is not empty, for a bad row with `on_bad_row="error"`, for more
            than `writer.MAX_SPLITS` splits, or without a usable row.
        RecordError: if writing fails. The folder is then as before, as after every error.
    """
    folder = folder.resolve()
    check_target(folder, source, overwrite=overwrite)
    with writing(folder):
        aside = partial_folder(folder)
    try:
        writer = PreparedDataWriter(aside, source)
        for count, row in enumerate(rows, start=1):
            writer.add(row)
            if writer.skipped and on_bad_row == "error" and not writer.skipped[-1].chosen:
                bad = writer.skipped[-1]
                raise ValueError(f"{bad.where} ({bad.id}): {bad.reason}; --on-bad-row skip leaves such rows out")
            if on_row is not None:
                on_row(count)
        splits = writer.finish()
        shared = folder_leakage(aside, list(splits)) if leakage else None
        prepared = PreparedData(folder, splits, tuple(writer.skipped), shared)
        _write_manifest(aside / MANIFEST, prepared, writer.images.hashes, reader, source, options)

        def may_replace() -> bool:
            # another process may have been first
            check_target(folder, source, overwrite=overwrite)
            return True

        with writing(folder):
            rename_into_place(aside, folder, may_replace=may_replace)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return prepared


def check_target(folder: Path, source: Path, *, overwrite: bool) -> None:
    """Check that `folder` can become prepared data without losing anything else.

    Raises:
        ValueError: names the folder and what to do.
    """
    writer = writer_of(folder)
    if writer is not None:
        raise ValueError(
            f"--out {folder} is being written by process {writer.pid}: wait until it has ended, or choose another folder"
        )
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"--out {folder} is a file: name a folder")
    if not any(folder.iterdir()):
        return
    if source.exists() and source.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"--out {folder} holds the source itself: choose another folder")
    if not overwrite:
        raise ValueError(
            f"--out {folder} already contains files: choose another folder, or replace it with --overwrite"
        )
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"--out {folder} holds files that are not prepared data: empty it or choose another folder")


def _write_manifest(
    path: Path,
    prepared: PreparedData,
    hashes: Mapping[str, str],
    reader: Reader,
    source: Path,
    options: Mapping[str, Any],
) -> None:
    content = {
        "layout": LAYOUT_VERSION,
        "reader": reader.name,
        "rlmed": version("rlmed"),
        "source": "" if reader.private else _source_name(source),
        "options": {key: _recorded(value, reader.private) for key, value in options.items()},
        "data": {"title": reader.title, "licence": reader.licence, "citation": reader.citation, "url": reader.url},
        "rows": {
            "read": prepared.read,
            "written": prepared.written,
            "bad": prepared.bad,
            "by_choice": prepared.by_choice,
        },
        "splits": {name: dataclasses.asdict(split) for name, split in prepared.splits.items()},
        "skipped": {
            "bad": prepared.bad,
            "by_choice": prepared.by_choice,
            "rows": [dataclasses.asdict(row) for row in prepared.skipped],
        },
        "leakage": None if prepared.leakage is None else prepared.leakage.to_json(),
        "images": dict(sorted(hashes.items())),
    }
    # file names may not be valid UTF-8
    with writing(path), path.open("w", encoding="utf-8", errors="replace") as file:
        json.dump(content, file, indent=1, ensure_ascii=False)


def _source_name(source: Path) -> str:
    """Return a path's last component, or all of a hub data set's name."""
    return source.resolve().name if source.exists() else source.as_posix()


def _recorded(value: Any, private: bool) -> Any:
    """Return an option as JSON: of a path the last part, nothing if it could name a patient."""
    if isinstance(value, Path):
        return "" if private else value.name
    if isinstance(value, Mapping):
        return {str(key): _recorded(entry, private) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_recorded(entry, private) for entry in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
