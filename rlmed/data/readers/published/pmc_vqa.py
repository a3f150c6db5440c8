"""Read PMC-VQA (arXiv 2305.10415): multiple-choice questions about figures of publications.

The published files are `train.csv` and `test.csv` with `images.zip`, and a second version
`train_2.csv`, `test_2.csv` with `images_2.zip`. Columns: `Figure_path, Question, Choice A … Choice
D, Answer`; in the first version `Answer` is a text and `Answer_label` its letter, in the second
`Answer` is the letter. A choice may start with its own letter (` A:Gray matter`). If a text matches
no choice verbatim, the letter decides.

This layout is known from publications alone; no published file was ever read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from rlmed.core.types import LETTERS
from rlmed.data.examples import BadRowError, shorten
from rlmed.data.images import BadImageError
from rlmed.data.options.choices import Choice, choose, written_answer
from rlmed.data.options.sources import Options
from rlmed.data.readers.base import Reader, Skipped, SourceRow
from rlmed.data.readers.formats.csv_table import table_files
from rlmed.data.readers.formats.image_files import Images, images_of
from rlmed.data.readers.formats.table import IMAGES, WITHOUT_IMAGES, file_split, option_text
from rlmed.data.readers.formats.text_table import read_table

COLUMNS = ("Figure_path", "Question", "Answer", "Choice A", "Choice B")


def read(source: Path, *, images: Path | None = None, without_images: bool = False) -> Iterator[SourceRow | Skipped]:
    """Yield the rows of a table, or of all tables of a folder; a split is named after its file.

    Searches for images in `images`, else in `images_2.zip` or `figures/` (for tables called
    `*_2.csv`) or `images.zip` or `images/` beside the table, else in its folder.

    Raises:
        ValueError: for a table without the published columns, or missing images.
    """
    for path in table_files(source):
        header, rows = read_table(path)
        repeated = [name for name in (*COLUMNS, "Answer_label") if header.count(name) > 1]
        if repeated:
            raise ValueError(f"{path.name} has more than one column {repeated[0]}: rename one")
        missing = [name for name in COLUMNS if name not in header]
        if missing:
            raise ValueError(f"{path.name} has no column {missing[0]}: it is not a PMC-VQA table, read it with csv")
        found = None if without_images else images_of(images, _beside(path))
        for row in rows:
            where, row_id = f"line {row.line} of {path.name}", f"{file_split(path)}-{row.line}"
            if row.reason:
                yield Skipped(where, row_id, row.reason, chosen=row.blank)
            else:
                yield _question(row.record, where, row_id, file_split(path), found)


def _beside(path: Path) -> Path:
    """Return the archive of the table's version, its unpacked folder, or the table's own folder."""
    names = ("images_2.zip", "figures") if path.stem.endswith("_2") else ("images.zip", "images")
    return next((path.with_name(name) for name in names if path.with_name(name).exists()), path.parent)


def _question(
    record: Mapping[str, str], where: str, row_id: str, split: str, images: Images | None
) -> SourceRow | Skipped:
    try:
        choice = _choice(record)
        figure = record["Figure_path"].strip()
        if not figure:
            raise BadRowError("it has no Figure_path")
        return SourceRow(
            where=where,
            split=split,
            id=row_id,
            question=record["Question"].strip(),
            options=choice.options,
            answer=written_answer(choice.options, choice.answer),
            image=None if images is None else images.find(figure),
        )
    except (BadRowError, BadImageError) as error:
        return Skipped(where, row_id, str(error))


def _choice(record: Mapping[str, str]) -> Choice:
    """Return the choices and the correct one; text and letter must agree if both are given."""
    letters = [letter for letter in LETTERS if f"Choice {letter}" in record]
    options = Options(tuple(option_text(record[f"Choice {letter}"]) for letter in letters), tuple(letters), "column")
    answer, label = record["Answer"].strip(), record.get("Answer_label", "").strip()
    if not label:
        return choose(options, answer)
    choice = choose(options, label, form="name")
    try:
        text = choose(options, answer, form="text")
    except BadRowError:
        return choice
    if text.answer != choice.answer:
        raise BadRowError(f"its Answer {shorten(answer)} is not its Answer_label {shorten(label)}")
    return choice


READER = Reader(
    name="pmc_vqa",
    title="PMC-VQA: multiple-choice questions about figures of publications",
    read=read,
    options=(IMAGES, WITHOUT_IMAGES),
    licence="none is stated on its card; figures keep the licences of the publications that they come from",
    citation="Zhang et al., PMC-VQA, arXiv 2305.10415",
    url="https://huggingface.co/datasets/RadGenome/PMC-VQA",
    unseen="the published files",
)
