"""Files of rlmed 0.1, as it wrote them, are read with the present names of their fields."""

import dataclasses
import json
from pathlib import Path

from rlmed.evaluation.records import Accuracy
from rlmed.evaluation.reliability.results import ReliabilitySummary, write_reliability
from rlmed.evaluation.results import EvalSummary, compare, read_comparison, read_rows

ROW = (
    '{"file": "right", "id": "0", "control": "none", "image": null, "kind": "parsed", "question": "Which?", "options": '
    '["head", "knee"], "answer": "B", "completion": "<think>x</think><answer>B</answer>", "parsed": "B", "right": true, '
    '"format": true, "tokens": 3, "finish_reason": "stop"}\n'
)
SUMMARY = """{
 "model": "tiny", "step": 0, "seconds": 1.5, "max_tokens": 64, "train_rows": 0,
 "files": [{
  "name": "right", "rows": 1, "accuracy": {"right": 1, "rows": 1, "value": 1.0, "low": 0.2, "high": 1.0},
  "format_rate": 1.0, "mean_tokens": 3.0, "cut_by_length": 0.0, "chance": 0.5, "majority_letter": 1.0,
  "image_free_prior": null, "image_free_prior_by_rate": null, "leave_one_out_prior": 0.0,
  "leave_one_out_prior_by_rate": 0.0, "blank": null,
  "shuffled": {"right": 0, "rows": 1, "value": 0.0, "low": 0.0, "high": 0.8},
  "by_kind": {"parsed": [1, 1], "right": [0, 0]}
 }]
}
"""
COMPARISON = (
    '{"before": {"model": "tiny", "step": 0}, "after": {"model": "tiny", "step": 4}, "files": {"right": {"rows": 1, '
    '"right_before": 0, "right_after": 1, "gained": 1, "lost": 0, "p_value": 1.0}}}\n'
)
SHARE = '{"right": 1, "rows": 1, "value": 1.0, "low": 0.2, "high": 1.0}'
ESTIMATE = '{"value": 0.5, "low": 0.4, "high": 0.6, "rows": 1}'
TRUST = f"""{{
 "model": "tiny", "seconds": 2.0, "domains": [], "files": [{{
  "name": "right", "rows": 1, "reasoned": null,
  "direct": {{
   "accuracy": {SHARE}, "confidence": {ESTIMATE}, "error": {ESTIMATE}, "error_bound": 0.1, "brier": {ESTIMATE},
   "bins": [{{"low": 0.4, "high": 0.5, "count": 3, "right": 2, "confidence": 0.45}}]
  }},
  "sampling": {{"samples": 1, "passes": [{{"k": 1, "share": {ESTIMATE}}}], "vote": {SHARE}}},
  "order": {{
   "stays": {SHARE}, "orders": [{SHARE}],
   "letters": [{{"letter": "A", "chosen": {ESTIMATE}, "right": 0.25, "accuracy": null}}]
  }},
  "reliance": [{{"kind": "organ", "real": {SHARE}, "blank": null, "shuffled": null}}],
  "agreement": {{"argued": {SHARE}, "agrees": {SHARE}, "right_if_agreeing": {SHARE}, "right_if_differing": null}},
  "kept_order": 0
 }}]
}}
"""


def write(folder: Path) -> Path:
    folder.mkdir()
    (folder / "rows.jsonl").write_text(ROW)
    (folder / "summary.json").write_text(SUMMARY)
    return folder


def test_an_old_row(tmp_path: Path) -> None:
    (row,) = read_rows(write(tmp_path / "old"))
    assert (row.correct, row.predicted_letter, row.question_type) == (True, "B", "parsed")
    assert (row.file, row.options, row.not_offered) == ("right", ("head", "knee"), False)


def test_an_old_summary_in_which_question_types_have_the_names_of_old_fields(tmp_path: Path) -> None:
    (file,) = EvalSummary.read(write(tmp_path / "old")).files
    assert file.by_question_type == {"parsed": (1, 1), "right": (0, 0)}
    assert file.accuracy == Accuracy(correct=1, rows=1, value=1.0, low=0.2, high=1.0)
    assert (file.blank, file.shuffled.correct, file.reordered) == (None, 0, None)


def test_an_old_comparison_of_a_file_with_the_name_of_an_old_field(tmp_path: Path) -> None:
    (tmp_path / "comparison.json").write_text(COMPARISON)
    found = read_comparison(tmp_path)
    assert found == json.loads(COMPARISON.replace("right_", "correct_"))
    assert read_comparison(tmp_path / "nowhere") is None


def test_an_old_evaluation_is_compared_with_a_new_one(tmp_path: Path) -> None:
    old, new = (write(tmp_path / name) for name in ("old", "new"))
    (new / "rows.jsonl").write_text(
        ROW.replace('"right": true', '"correct": false')
        .replace('"parsed": "B"', '"predicted_letter": "A"')
        .replace('"kind"', '"question_type"')
    )
    assert compare(old, new)["files"]["right"]["lost"] == 1


def test_an_old_trust_report(tmp_path: Path) -> None:
    assert ReliabilitySummary.read(tmp_path) is None
    (tmp_path / "trust.json").write_text(TRUST)
    found = ReliabilitySummary.read(tmp_path)
    (file,) = found.files
    assert file.direct.bins[0].correct == 2
    assert file.order.letters[0].correct == 0.25
    assert file.reliance[0].question_type == "organ"
    assert file.agreement.correct_if_agreeing == Accuracy(correct=1, rows=1, value=1.0, low=0.2, high=1.0)
    write_reliability(tmp_path, dataclasses.replace(found, model="new"), ())
    assert ReliabilitySummary.read(tmp_path).model == "new"
