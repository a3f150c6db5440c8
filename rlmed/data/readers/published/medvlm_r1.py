"""Read the data of MedVLM-R1 (arXiv 2502.19634): its 900 test questions and its training rows.

The test file is a JSON array of `{image: [path], problem, solution, question, options, answer,
dataset, subset}`: `problem` is the question with its lettered options, as the model is asked it,
and `solution` the right letter. The training rows are those of
`FreedomIntelligence/Medical_Multimodal_Evaluation_Data`, split `test`, with the MRI subset: the
paper says 600, the released code takes the first 500. The test file was read; the layout of the
training file is known from its description alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlmed.core.files.litter import litter_clause, sift
from rlmed.core.types import Example
from rlmed.data.examples import BadRowError, shorten
from rlmed.data.images import BadImageError
from rlmed.data.options.choices import Choice, choose, written_answer
from rlmed.data.options.sources import read_options
from rlmed.data.readers.base import Option, Reader, Skipped, SourceRow
from rlmed.data.readers.formats.image_files import Images, images_of
from rlmed.data.readers.formats.json_rows import read_json_rows
from rlmed.data.readers.formats.parquet_rows import ParquetTable
from rlmed.data.readers.formats.table import IMAGES, WITHOUT_IMAGES, as_text, option_text
from rlmed.data.readers.published.modalities import modality_name
from rlmed.data.rows import as_object

TEST_SPLITS = {"MRI": "test_mri", "CT": "test_ct", "X-ray": "test_xray"}
TRAIN_SPLIT, TRAIN_MODALITY = "train_mri", "MRI"
TRAIN_ROWS = 600
DATA_ENDINGS = (".parquet", ".json", ".jsonl")

_Key = tuple[str, ...]
"""Image file names and question, which identify a training row with a test row."""


def read(
    source: Path,
    *,
    train: Path | None = None,
    train_rows: int = TRAIN_ROWS,
    images: Path | None = None,
    without_images: bool = False,
) -> Iterator[SourceRow | Skipped]:
    """Yield test rows in file order, then the first `train_rows` MRI rows of `train`, none twice.

    Raises:
        ValueError: for missing or malformed files.
    """
    if train_rows < 1:
        raise ValueError(f"--train-rows {train_rows} must be positive")
    test = test_file(source)
    root = None if without_images else images_of(images, test.parent)
    tested: set[_Key] = set()
    for number, row in read_json_rows(test):
        where, row_id = f"row {number} of {test.name}", f"test-{number:03d}"
        entry = _question(row, where, row_id, root, TEST_SPLITS)
        if isinstance(row, Mapping):
            tested.add(_key(row))
        yield entry
    if train is None:
        return
    taken: set[_Key] = set()
    for path in data_files(train):
        others = seen = 0
        for number, row in _rows(path) if len(taken) < train_rows else ():
            seen = number + 1
            where, row_id = f"row {number} of {path.name}", f"train-{number:05d}"
            if isinstance(row, BadRowError):
                yield Skipped(where, row_id, str(row))
                continue
            if not isinstance(row, Mapping) or modality_name(str(row.get("subset"))) != TRAIN_MODALITY:
                others += 1  # tens of thousands of rows from other data sets: count, don't list
                continue
            key = _key(row)
            if key in tested or key in taken:
                reason = "it is a test row too" if key in tested else "a training row before it asks the same"
                yield Skipped(where, row_id, f"{reason}: left out of the training rows", chosen=True)
                continue
            entry = _question(row, where, row_id, root, {TRAIN_MODALITY: TRAIN_SPLIT})
            yield entry
            if isinstance(entry, SourceRow):
                taken.add(key)
            if len(taken) == train_rows:
                break
        if others:
            yield Skipped(path.name, "", f"its subset is not {TRAIN_MODALITY}", chosen=True, rows=others)
        if len(taken) == train_rows and (behind := _count(path) - seen):
            yield Skipped(path.name, "", f"it comes after the {train_rows} training rows", chosen=True, rows=behind)


def test_file(source: Path) -> Path:
    """Return the JSON file of test rows: the source itself, or the only one in the folder.

    Raises:
        ValueError: if there is none, or more than one.
    """
    if not source.is_dir():
        return source
    found, litter = sift(source.glob("*.json"), source)
    if len(found) != 1:
        raise ValueError(
            f"folder {source} holds {len(found)} JSON files{litter_clause(litter)}, and one with the test rows is "
            "needed: name it with --source"
        )
    return found[0]


def data_files(path: Path) -> list[Path]:
    """Return a file, or the parquet, JSON and JSON Lines files of a folder in name order.

    Raises:
        ValueError: if there are none.
    """
    if not path.is_dir():
        return [path]
    found, litter = sift((entry for entry in path.rglob("*") if entry.suffix in DATA_ENDINGS), path)
    if not found:
        raise ValueError(
            f"folder {path} holds no parquet, JSON or JSON Lines file{litter_clause(litter)}: name the one with the rows"
        )
    return found


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    return ParquetTable(path).rows() if path.suffix == ".parquet" else read_json_rows(path)


def _count(path: Path) -> int:
    return ParquetTable(path).count if path.suffix == ".parquet" else sum(1 for _ in read_json_rows(path))


def _key(row: Mapping[str, Any]) -> _Key:
    image = row.get("image")
    paths = image if isinstance(image, list) and image else [image]
    return (*(Path(str(path)).name for path in paths), str(row.get("question")).strip())


def _question(row: Any, where: str, row_id: str, root: Images | None, splits: Mapping[str, str]) -> SourceRow | Skipped:
    """Return the row to write after checking that its parts agree."""
    try:
        row = as_object(row)
        modality = modality_name(as_text(row.get("subset"), "subset"))
        if modality not in splits:
            raise BadRowError(f"its subset {shorten(row.get('subset'))} is none of {', '.join(splits)}")
        question, choice = as_text(row.get("question"), "question"), _choice(row)
        written = tuple(option_text(option) for option in row["options"])
        _check_problem(row, Example(row_id, None, question, choice.options, choice.answer), written)
        images = () if root is None else tuple(map(root.find, _images(row)))
        return SourceRow(
            where=where,
            split=splits[modality],
            id=row_id,
            question=question,
            options=choice.options,
            answer=written_answer(choice.options, choice.answer),
            image=images[0] if images else None,
            modality=modality,
            more_images=images[1:],
        )
    except (BadRowError, BadImageError) as error:
        return Skipped(where, row_id, str(error))


def _choice(row: Mapping[str, Any]) -> Choice:
    """Return the options and the correct one: by its text, which the letter, if any, must match."""
    options = read_options(row.get("options"), option_text)
    answer, letter = as_text(row.get("answer"), "answer"), as_text(row.get("solution"), "solution")
    choice = choose(options, answer, form="text")
    if letter and choose(options, letter, form="name").answer != choice.answer:
        raise BadRowError(f"its answer {shorten(answer)} is not its solution {shorten(letter)}")
    return choice


def _check_problem(row: Mapping[str, Any], example: Example, written: tuple[str, ...]) -> None:
    """Check that the prompt is the paper's, but for the number of blanks and doubled letters."""
    problem = row.get("problem")
    if problem is None:
        return
    texts = [dataclasses.replace(example, options=options).question_text for options in (example.options, written)]
    if as_text(problem, "problem").split() not in [text.split() for text in texts]:
        raise BadRowError(f"its problem {shorten(problem)} is not its question and options")


def _images(row: Mapping[str, Any]) -> list[str]:
    """Return the paths of a row's images, in order."""
    image = row.get("image")
    texts = [as_text(path, "image") for path in (image if isinstance(image, list) else [image])]
    if not texts or not all(texts):
        raise BadRowError("it has no image" if len(texts) < 2 else f"one of its {len(texts)} images is blank")
    return texts


READER = Reader(
    name="medvlm_r1",
    title="MedVLM-R1's 900 test questions on MRI, CT and X-ray, and its MRI training rows",
    read=read,
    options=(
        Option(
            "--train",
            {
                "type": Path,
                "metavar": "PATH",
                "help": "Medical_Multimodal_Evaluation_Data: its JSON or parquet file, or a folder of them",
            },
        ),
        Option(
            "--train-rows",
            {
                "type": int,
                "metavar": "N",
                "help": f"training rows (default: {TRAIN_ROWS}; the released code takes 500)",
            },
            needs="--train",
        ),
        IMAGES,
        WITHOUT_IMAGES,
    ),
    licence="Apache-2.0 for the questions; OmniMedVQA's images keep the licences of the data sets they come from",
    citation="Pan et al., MedVLM-R1, arXiv 2502.19634; Hu et al., OmniMedVQA, arXiv 2402.09181; "
    "Chen et al., HuatuoGPT-Vision, arXiv 2406.19280",
    url="https://github.com/JZPeterPan/MedVLM-R1 and "
    "https://huggingface.co/datasets/FreedomIntelligence/Medical_Multimodal_Evaluation_Data",
    unseen="the training file",
)
