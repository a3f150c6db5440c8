"""Predictions for MedEvalKit: `FILE_TASK/results.json`.

A list of samples, one a question. The kit's sets read of each: `response` and `answer`, `question`
(VQA-RAD, SLAKE), `answer_type` and `lang` (SLAKE), `choices` (PMC-VQA), `findings` and `impression`
(reports, which cal_report_metrics.py scores). They take the answer out of its tags themselves, but
for reports. Read in alibaba-damo-academy/MedEvalKit: utils/base_dataset.py (commit 991bb12),
utils/VQA_RAD/VQA_RAD.py (564d279), utils/SLAKE/SLAKE.py (9b12e3b); and in the fork
blackkiring/MedEvalKit: utils/PMC_VQA/PMC_VQA.py (5d94614), utils/Metrics_Compute/
cal_report_metrics.py (c65c345), utils/utils.py (f60b5be). In the last, `calculate_f1` returns F1,
precision and recall, which its caller names precision, recall and F1.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlmed.evaluation.kits.base import Kit, write_json
from rlmed.evaluation.records import EvalRow
from rlmed.tasks.metrics.published import medevalkit_choice, medevalkit_closed, medevalkit_open, said

CHINESE = re.compile("[\u4e00-\u9fff]")


class MedEvalKit(Kit):
    """Writes `results.json`; `correct` is by the kit's rule, which writes it anew."""

    name = "medevalkit"
    title = "MedEvalKit"
    tasks = ("choice", "open", "report")

    def write(self, folder: Path, file: str, model: str, rows: Sequence[EvalRow]) -> list[Path]:
        """Write a folder per task, as the kit has one per set."""
        return [
            write_json(folder / f"{file}_{task}" / "results.json", [sample(row) for _, row in part])
            for task, part in self.by_task(rows).items()
        ]


def sample(row: EvalRow) -> dict[str, Any]:
    """Return a row as the kit's sample."""
    content: dict[str, Any] = {"id": row.id, "question": row.question, "answer": row.answer}
    if row.task == "report":
        return {**content, **_sections(row.answer), "response": said(row.completion)}
    content["response"] = row.completion
    if row.task == "choice":
        return {**content, "choices": list(row.options), "correct": correct(row)}
    return {
        **content,
        "answer_type": "CLOSED" if is_closed(row) else "OPEN",
        "lang": "zh" if CHINESE.search(row.question) else "en",
        "correct": correct(row),
    }


def correct(row: EvalRow) -> bool:
    """Return whether an answer to a choice or an open question is right by the kit's rule."""
    if row.task == "choice":
        return medevalkit_choice(row.completion, row.options, row.answer)
    return (medevalkit_closed if is_closed(row) else medevalkit_open)(row.completion, row.answer)


def is_closed(row: EvalRow) -> bool:
    """Return whether the right answer is yes or no."""
    return row.answer.strip().lower() in ("yes", "no")


def _sections(report: str) -> dict[str, str]:
    """Return findings and impression; a report without both headings is all findings."""
    found = re.fullmatch(r"\s*findings:(.*?)impression:(.*)", report, re.IGNORECASE | re.DOTALL)
    return (
        {"findings": found[1].strip(), "impression": found[2].strip()}
        if found
        else {"findings": report, "impression": ""}
    )
