"""Predictions for VLMEvalKit: `MODEL_FILE_TASK.tsv`, and the set itself, `LMUData/FILE_TASK.tsv`.

Columns: `index`, `question`, `answer`, `prediction`, of choices `A`, `B`, …, and `category` and
`image_path`. The kit reads them with pandas and takes a missing letter for an option that is not
there; predictions hold the answer alone, since it looks for letters everywhere in them. A set that
it doesn't know it reads from the folder in the environment variable LMUData, and `index` and
`question` must be the set's. Read in open-compass/VLMEvalKit: image_mcq.py (commit 01424f9),
image_vqa.py (00b1c8d), image_base.py (0507265), __init__.py (0044c57), utils/multiple_choice.py
(028a6e7) of vlmeval/dataset, and vlmeval/smp/file.py (00fff54).
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlmed.core.files.atomic import replace_text
from rlmed.core.types import LETTERS
from rlmed.evaluation.kits.base import Kit
from rlmed.evaluation.records import EvalRow
from rlmed.tasks.metrics.published import said, vlmevalkit_choice

MISSING = re.compile(r"#N/A(?: N/A)?|#NA|-?1\.#(?:IND|QNAN)|-?(?:NaN|nan)|<NA>|N/A|n/a|NA|NULL|null|None")
"""Texts that pandas reads as a missing value; an option "None" would be gone."""


class VlmEvalKit(Kit):
    """Writes the table of predictions and the set; `hit` is by the kit's rule without a judge."""

    name = "vlmevalkit"
    title = "VLMEvalKit"
    tasks = ("choice", "open")

    def write(self, folder: Path, file: str, model: str, rows: Sequence[EvalRow]) -> list[Path]:
        """Write both tables per task; row ids are the index if all are integers, else places."""
        paths = []
        for task, part in self.by_task(rows).items():
            ids = [row.id for _, row in part]
            numbered = all(re.fullmatch(r"[0-9]{1,15}", one) for one in ids) and len({*map(int, ids)}) == len(ids)
            lines = [_line(int(row.id) if numbered else place, row) for place, row in part]
            columns = list(dict.fromkeys(column for line in lines for column in line))
            answers = ("prediction", "hit")
            questions = [column for column in columns if column not in answers]
            replace_text(folder / "LMUData" / f"{file}_{task}.tsv", _table(questions, lines))
            paths.append(replace_text(folder / f"{model}_{file}_{task}.tsv", _table([*questions, *answers], lines)))
        return paths


def hit(row: EvalRow) -> bool:
    """Return whether the answer to a choice is right by the kit's rule without a judge.

    Of an open question: whether it is the reference but for capitals, its method "accuracy"
    (vlmeval/dataset/utils/vqa_eval.py, commit 0a04a1d).
    """
    answer = said(row.completion)
    if row.task == "choice":
        return vlmevalkit_choice(answer, row.options, row.answer)
    return answer.lower() == row.answer.strip().lower()


def _line(index: int, row: EvalRow) -> dict[str, str]:
    options = {letter: _kept(option) for letter, option in zip(LETTERS, row.options, strict=False)}
    images = [_kept(image) for image in row.images]
    return {
        "index": str(index),
        "question": _kept(row.question),
        **options,
        "answer": _kept(row.answer),
        "category": _kept(row.question_type or row.task),
        "image_path": images[0] if len(images) == 1 else str(images),
        "prediction": _kept(said(row.completion)),
        "hit": str(int(hit(row))),
    }


def _kept(text: str) -> str:
    """Return the text with a space behind it if pandas would take it for a missing value."""
    return f"{text} " if MISSING.fullmatch(text) else text.replace("\0", "")


def _table(columns: Sequence[str], lines: Sequence[Mapping[str, str]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([line.get(column, "") for column in columns] for line in lines)
    return text.getvalue()
