"""Predictions for evaluation kits, read back as the kits read them."""

from __future__ import annotations

import dataclasses
import json
import os
import string
from pathlib import Path

import pytest

from rlmed.core.config.running import PREDICTION_KITS
from rlmed.core.types import Example
from rlmed.data.loading import EvalFile
from rlmed.evaluation.kits.predictions import KITS, check_kits, predictions_table, write_predictions
from rlmed.evaluation.kits.rule_scores import read_scores
from rlmed.evaluation.records import Accuracy, EvalRow
from rlmed.evaluation.results import EvalSummary, write_evaluation
from rlmed.tasks.metrics.published import slake_exact

CHOICE = EvalRow(
    file="mixed", id="ct-7", control="none", image="/data/7.png", question_type="anatomy", question="Which\torgan?",
    options=("liver", "None", 'the "left" lung'), answer="C", predicted_letter="C", correct=True,
    completion="<think>A dark area.\nSo B?</think><answer>C</answer>", format=True, tokens=9, finish_reason="stop",
)  # fmt: skip
TWO_PICTURES = dataclasses.replace(CHOICE, id="ct-8", more_images=("/data/8.png",), answer="B", correct=False)
OPEN = dataclasses.replace(
    CHOICE, id="o-1", task="open", options=(), answer="liver", predicted="The liver.", predicted_letter=None,
    truth={"answers": ["liver"]}, scores={"exact": 1.0}, completion="<think>x</think><answer>The liver.</answer>",
    image=None,
)  # fmt: skip
CLOSED = dataclasses.replace(
    OPEN, id="o-2", answer="yes", predicted="Yes, it is", completion="<answer>Yes, it is</answer>",
    question="这是肝脏吗？",
)  # fmt: skip
REPORT = dataclasses.replace(
    OPEN, id="r-1", task="report", answer="Findings: A cyst. Impression: Benign.", correct=False, predicted="A cyst.",
    completion="<think>x</think><answer>A cyst.</answer>",
)  # fmt: skip
BOXES = dataclasses.replace(
    OPEN, id="g-1", task="grounding", answer="[]", predicted="[]", completion="<answer>[]</answer>"
)
ROWS = [CHOICE, BOXES, TWO_PICTURES, OPEN, CLOSED, REPORT, dataclasses.replace(CHOICE, control="blank")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    summary = EvalSummary(model="x", step=0, seconds=1.0, max_tokens=8, train_rows=0, files=())
    return write_evaluation(tmp_path, summary, ROWS)


def test_medevalkit_finds_what_its_sets_read(folder: Path) -> None:
    written = write_predictions(folder, ["medevalkit"], "runs/model")
    kit = folder / "predictions/medevalkit"
    assert written.paths == tuple(kit / f"mixed_{task}/results.json" for task in ("choice", "open", "report"))
    choices, opened, reports = (json.loads(path.read_text(encoding="utf-8")) for path in written.paths)
    # utils/PMC_VQA/PMC_VQA.py, cal_metrics (blackkiring/MedEvalKit 5d94614)
    assert [[one["response"], one["choices"], one["answer"]] for one in choices] == [
        [CHOICE.completion, ["liver", "None", 'the "left" lung'], "C"],
        [TWO_PICTURES.completion, ["liver", "None", 'the "left" lung'], "B"],
    ]
    assert [one["correct"] for one in choices] == [True, False]
    # utils/SLAKE/SLAKE.py, cal_metrics (alibaba-damo-academy/MedEvalKit 9b12e3b)
    read = [[one[key] for key in ("response", "answer", "question", "lang", "answer_type")] for one in opened]
    assert read == [
        [OPEN.completion, "liver", "Which\torgan?", "en", "OPEN"],
        [CLOSED.completion, "yes", "这是肝脏吗？", "zh", "CLOSED"],
    ]
    assert [one["correct"] for one in opened] == [False, True]  # "The liver." is not "liver" there
    # utils/Metrics_Compute/cal_report_metrics.py (blackkiring/MedEvalKit c65c345)
    golden = [f"Findings: {one['findings']} Impression: {one['impression']}." for one in reports]
    assert golden == ["Findings: A cyst. Impression: Benign.."]
    assert [one["response"] for one in reports] == ["A cyst."]


def test_vlmevalkit_reads_its_tables_with_pandas(folder: Path) -> None:
    pandas = pytest.importorskip("pandas")
    written = write_predictions(folder, ["vlmevalkit"], "runs/model")
    kit = folder / "predictions/vlmevalkit"
    assert written.paths == (kit / "model_mixed_choice.tsv", kit / "model_mixed_open.tsv")
    choices, opened = (pandas.read_csv(path, sep="\t") for path in written.paths)  # vlmeval/smp/file.py, load
    meta = pandas.read_csv(kit / "LMUData/mixed_choice.tsv", sep="\t")
    # vlmeval/dataset/image_mcq.py, evaluate (01424f9): the questions of the file are the set's
    assert dict(zip(choices["index"], choices["question"], strict=True)) == {0: "Which\torgan?", 2: "Which\torgan?"}
    assert list(meta["index"]) == list(choices["index"])
    assert list(meta["question"]) == list(choices["question"])
    # vlmeval/dataset/utils/multiple_choice.py, build_choices (028a6e7)
    item = meta.iloc[0]
    options = {one: item[one] for one in string.ascii_uppercase if one in item and not pandas.isna(item[one])}
    assert options == {"A": "liver", "B": "None ", "C": 'the "left" lung'}
    assert list(meta["answer"]) == ["C", "B"]
    assert list(choices["prediction"]) == ["C", "C"]
    assert list(choices["hit"]) == [1, 0]
    # toliststr of vlmeval/smp/misc.py: a text in brackets is a list
    assert list(meta["image_path"]) == ["/data/7.png", "['/data/7.png', '/data/8.png']"]
    assert "prediction" not in meta
    # vlmeval/dataset/image_vqa.py, evaluate (00b1c8d)
    assert [str(x) for x in opened["prediction"]] == ["The liver.", "Yes, it is"]
    assert [str(x) for x in opened["answer"]] == ["liver", "yes"]
    assert "A" not in opened


def test_rows_with_whole_numbers_as_ids_keep_them_as_index(tmp_path: Path) -> None:
    summary = EvalSummary(model="x", step=0, seconds=1.0, max_tokens=8, train_rows=0, files=())
    rows = [dataclasses.replace(CHOICE, id=name) for name in ("31", "4")]
    folder = write_evaluation(tmp_path, summary, rows)
    (path,) = write_predictions(folder, ["vlmevalkit"], "runs/m:1 b").paths
    assert path.name == "m_1_b_mixed_choice.tsv"
    assert [line.split("\t")[0] for line in path.read_text().splitlines()] == ['"index"', '"31"', '"4"']


def logged_answers(folder: Path, task: str) -> dict[int, str]:
    """Return answers by question, read as by lmms_eval/models/simple/from_log.py (19085f3)."""
    found: dict[str, dict[int, list[str]]] = {}
    for root, _, files in os.walk(folder):
        for name in files:
            if name.endswith(".json"):
                log = json.loads((Path(root) / name).read_text())
                assert log["args"]["limit"] is None
                assert isinstance(log["args"]["model"] + log["args"]["model_args"], str)
                found[log["model_configs"]["task"]] = {one["doc_id"]: one["resps"][0] for one in log["logs"]}
    return {doc_id: responses[0] for doc_id, responses in found[task].items()}


def test_lmms_eval_answers_from_the_log(folder: Path) -> None:
    written = write_predictions(folder, ["lmms_eval"], "runs/model")
    kit = folder / "predictions/lmms_eval"
    assert written.paths == (kit / "mixed.json",)
    # places in the file, those of boxes included
    assert logged_answers(kit, "mixed") == {0: "C", 2: "C", 3: "The liver.", 4: "Yes, it is", 5: "A cyst."}
    lines = [json.loads(line) for line in (kit / "mixed_samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [[one["doc_id"], one["target"], one["filtered_resps"]] for one in lines][2] == [3, "liver", ["The liver."]]
    # lmms_eval/loggers/evaluation_tracker.py (0716c69): equal resps are not written twice
    assert all("resps" not in one for one in lines)


def test_scores_by_the_kits_rules_stand_beside_ours(folder: Path) -> None:
    written = write_predictions(folder, list(KITS), "model")
    assert [(one.rule, one.rows, one.value, one.ours) for one in written.scores] == [
        ("MedEvalKit, choice", 2, 0.5, 0.5),
        ("MedEvalKit, yes or no", 1, 1, 1),
        ("MedEvalKit, open, exact", 1, 0, 1),
        ("VLMEvalKit, choice", 2, 0.5, 0.5),
        ("VLMEvalKit, open, exact", 2, 0, 1),
        ("lmms-eval, SLAKE", 2, 0, 1),
        ("LLaVA-Med, yes or no", 1, 1, 1),
        ("LLaVA-Med, open, recall", 1, 1, 1),
    ]
    saved = json.loads((folder / "predictions/scores.json").read_text())["scores"]
    assert saved == [dataclasses.asdict(one) for one in written.scores]
    assert read_scores(folder) == written.scores
    assert [one.task for one in written.scores] == ["choice", "open", "open", "choice"] + ["open"] * 4
    ours = Accuracy.of(1, 2)
    assert (written.scores[0].ours_low, written.scores[0].ours_high) == (ours.low, ours.high)
    # one row right: not certainly all
    assert written.scores[-1].low == pytest.approx(Accuracy.of(1, 1).low)
    assert set(written.left_out) == {
        "MedEvalKit takes no grounding: left out of mixed, rows: 1",
        "VLMEvalKit takes no grounding: left out of mixed, rows: 1",
        "VLMEvalKit takes no report: left out of mixed, rows: 1",
        "lmms-eval takes no grounding: left out of mixed, rows: 1",
    }
    table = predictions_table(written)
    assert table is not None
    assert table.row_count == 8


def test_a_kit_that_takes_no_row_is_refused_before_anything_is_asked() -> None:
    boxes = Example(id="1", question="?", options=(), answer=0, image=None, task="grounding", truth={})
    with pytest.raises(
        ValueError, match=r"eval\.predictions=vlmevalkit: VLMEvalKit takes choice, open, and data\.eval"
    ):
        check_kits(["vlmevalkit"], [EvalFile("a", (boxes,))])
    check_kits([], [EvalFile("a", (boxes,))])
    report = [EvalFile("a", (dataclasses.replace(boxes, task="report"),))]
    check_kits(["medevalkit", "lmms_eval"], report)
    with pytest.raises(ValueError, match=r"has report: write eval\.predictions=\[medevalkit,lmms_eval\]$"):
        check_kits(["medevalkit", "vlmevalkit", "lmms_eval"], report)
    with pytest.raises(ValueError, match=r"=\[\]; medevalkit, lmms_eval would take some$"):
        check_kits(["vlmevalkit"], report)


def test_reports_alone_have_no_table_of_rules(folder: Path) -> None:
    rows = (folder / "rows.jsonl").read_text().splitlines()
    (folder / "rows.jsonl").write_text("".join(f"{row}\n" for row in rows if json.loads(row).get("task") == "report"))
    written = write_predictions(folder, ["medevalkit"], "model")
    assert len(written.paths) == 1
    assert (written.scores, predictions_table(written)) == ((), None)


def test_the_settings_know_the_kits() -> None:
    assert tuple(KITS) == PREDICTION_KITS


@pytest.mark.parametrize(
    ("answer", "same"),
    [("(left (lower) lobe", "lobe"), ("（左（下）叶", "叶"), ("liver (a", "liver a"), ("a) liver (b) c", "a liver c")],
)
def test_brackets_end_where_lmms_evals_do(answer: str, same: str) -> None:
    # lmms_eval/tasks/slake/utils.py (65ef07d): from an opening one to the next closing one
    assert slake_exact(answer, same)
    assert slake_exact("(" * 100_000, "")  # in linear time
