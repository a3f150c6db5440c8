"""Predictions for lmms-eval: `FILE.json`, which its model `from_log` answers with, and samples.

The log is `{"args": {"model", "model_args", "limit"}, "model_configs": {"task"}, "logs":
[{"doc_id", "resps": [[text]], …}]}`; `doc_id` is a question's place in the kit's set, and the task
must have the name that the kit is asked for. `FILE_samples.jsonl` has the keys of its option
`--log_samples`, for viewers. Read in EvolvingLMMs-Lab/lmms-eval:
lmms_eval/models/simple/from_log.py (commit 19085f3),
lmms_eval/evaluator.py (03cbb1f), lmms_eval/loggers/evaluation_tracker.py (0716c69).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlmed.core.files.atomic import replace_text
from rlmed.evaluation.kits.base import Kit, write_json
from rlmed.evaluation.records import EvalRow
from rlmed.tasks.metrics.published import said, slake_exact


class LmmsEval(Kit):
    """Writes a log per file; `slake_accuracy` of open questions is by the kit's rule for SLAKE."""

    name = "lmms_eval"
    title = "lmms-eval"
    tasks = ("choice", "open", "report")

    def write(self, folder: Path, file: str, model: str, rows: Sequence[EvalRow]) -> list[Path]:
        """Write one log for all tasks, since a set of the kit mixes closed and open questions."""
        samples = [_sample(place, row) for place, row in self.taken(rows)]
        if not samples:
            return []
        lines = [json.dumps(_logged(one), ensure_ascii=False) + "\n" for one in samples]
        replace_text(folder / f"{file}_samples.jsonl", "".join(lines))
        log = {
            "args": {"model": "rlmed", "model_args": f"pretrained={model}", "limit": None},
            "model_configs": {"task": file},
            "logs": samples,
        }
        return [write_json(folder / f"{file}.json", log)]


def _sample(place: int, row: EvalRow) -> dict[str, Any]:
    answer = said(row.completion)
    content = {
        "doc_id": place,
        "id": row.id,
        "input": row.question,
        "target": row.answer,
        "resps": [[answer]],
        "filtered_resps": [answer],
        "completion": row.completion,
    }
    return {**content, "slake_accuracy": correct(row)} if row.task == "open" else content


def correct(row: EvalRow) -> bool:
    """Return whether the answer to an open question is right by the kit's rule for SLAKE."""
    return slake_exact(said(row.completion), row.answer)


def _logged(sample: dict[str, Any]) -> dict[str, Any]:
    """Return a sample as the kit logs it: `resps` only where they differ from `filtered_resps`."""
    return {key: value for key, value in sample.items() if key != "resps"}
