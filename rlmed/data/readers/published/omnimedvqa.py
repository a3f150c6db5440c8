"""Read OmniMedVQA (arXiv 2402.09181): multiple-choice questions on images of public data sets.

The published folder holds `QA_information/Open-access/*.json` (and `Restricted-access`, whose
images are on request), each a JSON array of `{dataset, question_id, question_type, question,
gt_answer, image_path, option_A … option_D, modality_type}`, and `Images/`; `image_path` is relative
to the published folder.

This layout is known from publications alone; no published file was ever read.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rlmed.core.files.litter import litter_clause, sift
from rlmed.core.files.near_paths import near_path
from rlmed.core.types import LETTERS
from rlmed.data.examples import BadRowError
from rlmed.data.images import BadImageError
from rlmed.data.options.choices import choose, written_answer
from rlmed.data.options.sources import Options
from rlmed.data.readers.base import Option, Reader, Skipped, SourceRow
from rlmed.data.readers.formats.image_files import Images, images_of
from rlmed.data.readers.formats.json_rows import read_json_rows
from rlmed.data.readers.formats.table import IMAGES, WITHOUT_IMAGES, as_text, option_text
from rlmed.data.readers.published.modalities import modality_name
from rlmed.data.rows import as_object

QUESTIONS = "QA_information"
ACCESS = {"open": ("Open-access",), "restricted": ("Restricted-access",), "all": ("Open-access", "Restricted-access")}


def read(
    source: Path,
    *,
    access: str = "open",
    modality: Sequence[str] = (),
    test_share: float = 0.0,
    seed: int = 0,
    images: Path | None = None,
    without_images: bool = False,
) -> Iterator[SourceRow | Skipped]:
    """Yield rows file by file; a split is a modality or, with `test_share`, its train or test part.

    Raises:
        ValueError: for a folder without the published files, or an invalid share.
    """
    if not 0 <= test_share < 1:
        raise ValueError(f"--test-share {test_share} must be at least 0 and less than 1")
    root = question_folder(source)
    asked = (path for name in ACCESS[access] for path in (root / QUESTIONS / name).glob("*.json"))
    files, litter = sift(asked, root)
    if not files:
        raise ValueError(
            f"{root / QUESTIONS} holds no JSON files of {' or '.join(ACCESS[access])}{litter_clause(litter)}: unpack the "
            "whole archive"
        )
    wanted = {modality_name(name) for name in modality}
    found = None if without_images else images_of(images, root)
    for path in files:
        for number, row in read_json_rows(path):
            where, default_id = f"row {number} of {path.name}", f"{path.stem}-{number}"
            entry = _question(row, where, default_id, found)
            if isinstance(entry, SourceRow):
                if wanted and entry.modality not in wanted:
                    entry = Skipped(
                        where, entry.id, f"its modality is {entry.modality}, which is not asked for", chosen=True
                    )
                else:
                    entry = _placed(entry, str(row["image_path"]), test_share, seed)
            yield entry


def question_folder(source: Path) -> Path:
    """Return the folder that holds `QA_information`: the source, or one inside it.

    Raises:
        ValueError: if there is none.
    """
    for folder in (source, source / "OmniMedVQA"):
        if (folder / QUESTIONS).is_dir():
            return folder
    advice = near_path(source) or "give the folder that OmniMedVQA.zip unpacks to"
    raise ValueError(f"{source} holds no folder {QUESTIONS}: {advice}")


def _question(row: Any, where: str, row_id: str, images: Images | None) -> SourceRow | Skipped:
    try:
        row = as_object(row)
        row_id = as_text(row.get("question_id"), "question_id") or row_id
        texts = tuple(option_text(row.get(f"option_{letter}"), f"option_{letter}") for letter in LETTERS)
        choice = choose(Options(texts, tuple(LETTERS)), as_text(row.get("gt_answer"), "gt_answer"))
        image = as_text(row.get("image_path"), "image_path")
        # one published row says modality
        modality = modality_name(as_text(row.get("modality_type") or row.get("modality"), "modality_type"))
        if not image or not modality:
            raise BadRowError(f"it has no {'modality_type' if image else 'image_path'}")
        return SourceRow(
            where=where,
            split="",
            id=row_id,
            question=as_text(row.get("question"), "question"),
            options=choice.options,
            answer=written_answer(choice.options, choice.answer),
            image=None if images is None else images.find(image),
            modality=modality,
            kind=as_text(row.get("question_type"), "question_type"),
        )
    except (BadRowError, BadImageError) as error:
        return Skipped(where, row_id, str(error))


def _placed(row: SourceRow, image: str, test_share: float, seed: int) -> SourceRow:
    """Put the row in its split; all questions about one image go to the same side."""
    name = "".join(character if character.isalnum() else "_" for character in row.modality.lower()).strip("_")
    split = name.replace("x_ray", "xray")
    if test_share:
        digest = hashlib.sha256(f"{seed}:{image}".encode("utf-8", "replace")).digest()
        share = int.from_bytes(digest[:8], "big") / 2**64
        split = f"{'test' if share < test_share else 'train'}_{split}"
    return dataclasses.replace(row, split=split)


READER = Reader(
    name="omnimedvqa",
    title="OmniMedVQA: multiple-choice questions about images of many public data sets",
    read=read,
    options=(
        Option(
            "--access",
            {"choices": tuple(ACCESS), "help": "which questions (default: open, whose images are published)"},
        ),
        Option(
            "--modality",
            {"action": "append", "metavar": "NAME", "help": "only this one, for example MRI; may be repeated"},
        ),
        Option(
            "--test-share",
            {
                "type": float,
                "metavar": "SHARE",
                "help": "share of the images held out (default: 0, no training and test part)",
            },
        ),
        Option("--seed", {"type": int, "help": "of the images held out (default: 0)"}, needs="--test-share"),
        IMAGES,
        WITHOUT_IMAGES,
    ),
    licence="none is stated on its card; images keep the licences of the data sets that they come from",
    citation="Hu et al., OmniMedVQA, CVPR 2024, arXiv 2402.09181",
    url="https://huggingface.co/datasets/foreverbeliever/OmniMedVQA",
    unseen="the published files",
)
