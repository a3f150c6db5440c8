"""Read NIfTI volumes and questions on slices; docs/data.md lists columns and display rules."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Unpack

from rlmed.data.examples import BadRowError
from rlmed.data.readers.base import INSTALL, Option, Reader, Skipped, SourceRow
from rlmed.data.readers.volumes.picture_table import (
    Choose,
    FileKind,
    PictureChoice,
    TableOptions,
    cell_number,
    cell_window,
    read_picture_table,
    table_options,
)
from rlmed.data.readers.volumes.slices import cell_slices, given_slices

KIND = FileKind("a NIfTI volume", ("plane", "slice", "fraction", "slices", "volume", "window"))


def read(
    source: Path,
    *,
    window: Sequence[float] | None = None,
    slices: str | None = None,
    allow_unknown_orientation: bool = False,
    **table: Unpack[TableOptions],
) -> Iterator[SourceRow | Skipped]:
    """Yield the rows of the table, each with the slices that it asks about.

    Args:
        source: folder of the files, or the table in it.
        window: centre and width for rows that state none; None takes percentiles of the slice.
        slices: for rows that state none, as `parse_slices` takes them; None shows one.
        allow_unknown_orientation: read files that do not state their orientation.
        table: see `read_picture_table`; columns are file, plane, question, options and answer, and
            optionally slice (from 0) or fraction (0 to 1; blank both for the middle), slices in
            their place, volume (from 0) and window ("CENTER WIDTH").

    Raises:
        ValueError: for an unreadable source or table, an invalid window or invalid slices, or if
            nibabel is not installed.
    """
    choose = chooser(window, slices, allow_unknown_orientation=allow_unknown_orientation)
    yield from read_picture_table(source, choose, KIND.columns, **table)


def chooser(window: Sequence[float] | None, slices: str | None, *, allow_unknown_orientation: bool) -> Choose:
    """Return what finds the slices of a row in its NIfTI volume; arguments as in `read`.

    Raises:
        ValueError: for an invalid window or invalid slices, or if nibabel is not installed.
    """
    try:
        from rlmed.data.readers.volumes.nifti_slices import AXES, SliceChoice, render_slice, slice_count
    except ImportError as error:
        raise ValueError(f"the reader nifti needs nibabel: {INSTALL}") from error
    cell_window({}, window)  # fail before reading anything
    default = given_slices(slices)

    def choose(path: Path, cells: Mapping[str, str]) -> list[PictureChoice]:
        plane = cells.get("plane", "").lower()
        if plane not in AXES:
            raise BadRowError(f"its plane must be one of {', '.join(AXES)}")
        index, fraction = cell_number(cells, "slice"), _fraction(cells)
        if index is not None and fraction is not None:
            raise BadRowError("it has both a slice and a fraction: leave one blank")
        choice = SliceChoice(
            plane=plane,
            index=index,
            fraction=0.5 if fraction is None else fraction,
            volume=cell_number(cells, "volume") or 0,
            window=cell_window(cells, window),
        )
        wanted = cell_slices(cells, default, ("slice", "fraction"))
        load = partial(render_slice, path, allow_unknown_orientation=allow_unknown_orientation)
        if wanted is None:
            return [PictureChoice((choice,), partial(load, choice), kind=KIND)]
        count = slice_count(path, choice.plane, allow_unknown_orientation=allow_unknown_orientation)
        chosen = [
            dataclasses.replace(choice, index=index)
            for index in wanted.indices(count, first=0, kind=f"{choice.plane} slice")
        ]
        return [
            PictureChoice((one,), partial(load, one), name=f"{one.plane} slice {one.index}", kind=KIND)
            for one in chosen
        ]

    return choose


def _fraction(cells: Mapping[str, str]) -> float | None:
    text = cells.get("fraction", "")
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise BadRowError("its fraction must be a number from 0 to 1, or blank")
    return value


ALLOW_UNKNOWN_ORIENTATION = Option(
    "--allow-unknown-orientation",
    {"action": "store_true", "help": "read NIfTI files that do not state which side is left"},
)
READER = Reader(
    name="nifti",
    title="NIfTI volumes and a table of questions about their slices",
    read=read,
    options=(*table_options(KIND.columns), ALLOW_UNKNOWN_ORIENTATION),
    private=True,
)
