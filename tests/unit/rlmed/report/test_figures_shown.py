"""Figures by task in the report: mixed files, faithfulness, published rules, missing rewards."""

import dataclasses
import json

import pytest
from PIL import Image

from rlmed.core.types import Example
from rlmed.data.loading import EvalFile
from rlmed.evaluation.faithfulness import measure_faithfulness, write_faithfulness
from rlmed.evaluation.kits.predictions import write_predictions
from rlmed.evaluation.results import EvalSummary, write_evaluation
from rlmed.evaluation.summary import summarise
from rlmed.report.page import write_report
from rlmed.report.rollouts import Pictures, show_groups
from tests.unit.rlmed.report.test_page import EVIL, Page, line, row, write_lines
from tests.unit.rlmed.report.test_tasks_shown import cells_of, example, judged


def evaluate(folder, step=0, rows=None):
    """Write an evaluation of five choices and three open questions, with controls."""
    choices = [Example(f"c{i}", None, "Which?", ("head", "knee"), 1, kind="anatomy") for i in range(5)]
    opened = [example("open", "liver", number=i) for i in range(3)]
    plain = [row(i, i > 0, id=f"c{i}", file="mixed", question="Which?") for i in range(5)]
    plain += [judged(one, "The liver.") for one in opened]
    controls = [dataclasses.replace(one, control=name) for one in plain for name in ("blank", "shuffled")]
    controls += [dataclasses.replace(one, control="reordered") for one in plain[:4]]
    file = summarise(EvalFile("mixed", (*choices, *opened)), [*plain, *controls], [])
    summary = EvalSummary("base", step, 1.0, 64, 0, (file,))
    evaluation = write_evaluation(folder / "evaluations", summary, [*plain, *controls])
    write_faithfulness(evaluation, measure_faithfulness([*plain, *controls]))
    return evaluation


def lines_of(html):
    """Return the accuracy table's lines by the text of their first cell."""
    cells = cells_of(html.replace("<h2>Held-out accuracy</h2>", "<h3>Held-out accuracy</h3>"), "Held-out accuracy")
    return {line["file"]: line for line in cells}


def test_a_mixed_file_has_a_line_for_each_task(tmp_path):
    evaluate(tmp_path)
    lines = lines_of(write_report(tmp_path).read_text())
    assert list(lines) == ["mixed", "choice", "open"]
    assert [line["rows"] for line in lines.values()] == ["8", "5", "3"]
    assert [line["other order"].split()[0] for line in lines.values()] == ["–", "75.0", "–"]
    assert lines["choice"]["other order"].endswith("n=4")
    assert "n=" not in lines["open"]["blank"]
    assert [line["majority letter"] for line in lines.values()] == ["–", "100.0", "–"]


def test_p_values_are_of_each_tasks_rows(tmp_path):
    evaluate(tmp_path)
    evaluate(tmp_path, step=30)
    assert {line["p"] for line in lines_of(write_report(tmp_path).read_text()).values()} == {"1.000"}


def test_faithfulness_is_shown_by_task_with_intervals_and_what_it_means(tmp_path):
    evaluate(tmp_path)
    lines = {
        line["figure"]: line for line in cells_of(write_report(tmp_path).read_text(), "Faithfulness to the picture")
    }
    (sensitivity,) = (line for name, line in lines.items() if name.startswith("image sensitivity"))
    assert sensitivity["mixed choice 5 rows"] == "0.0 0.0 to 43.4"
    assert sensitivity["mixed open 3 rows"] == "0.0 0.0 to 56.1"
    assert "image sensitivity answers that change with another question&#39;s picture" in lines
    (lost,) = (line for name, line in lines.items() if name.startswith("right answers lost"))
    assert lost["mixed choice 5 rows"].endswith("n=4")


def test_published_rules_are_shown_where_they_differ(tmp_path):
    assert "By published rules" not in write_report_of(tmp_path)
    write_predictions(tmp_path / "evaluations/step-000000", ["medevalkit", "lmms_eval"], "model")
    html = write_report_of(tmp_path)
    lines = {line["rule"]: line for line in cells_of(html, "By published rules")}
    # "The liver." is not "liver" there
    assert set(lines) == {"MedEvalKit, open, exact", "lmms-eval, SLAKE"}
    assert (
        lines["lmms-eval, SLAKE"] | {"file, task": "mixed open", "by the rule": "0.0 0.0–56.1"}
        == lines["lmms-eval, SLAKE"]
    )
    assert lines["lmms-eval, SLAKE"]["by the task"] == "100.0 43.9–100.0"
    assert lines["lmms-eval, SLAKE"]["difference"] == "-100.0"
    assert "MedEvalKit, choice (mixed, 5 rows, 80.0)" in html


def write_report_of(folder):
    if not (folder / "evaluations").exists():
        evaluate(folder)
    return write_report(folder).read_text()


def test_a_name_of_a_file_is_no_markup(tmp_path):
    evaluation = evaluate(tmp_path)
    for path in (evaluation / "faithfulness.json", evaluation / "summary.json"):
        path.write_text(path.read_text().replace('"mixed"', json.dumps(EVIL)))
    html = write_report(tmp_path).read_text()
    assert html.count("<script>") == 1
    assert "&lt;script&gt;" in html


@pytest.mark.parametrize("last", [{}, {"reward/mean": None}, {"reward/judge_missing": 8.0}])
def test_a_step_without_rewards_is_one_of_a_run_that_learns_by_them(tmp_path, last):
    (tmp_path / "config.yaml").write_text("name: run\nsteps: 9\n")
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1, "reward/mean": 0.5}, {"step": 2, **last}])
    html = write_report(tmp_path).read_text()
    assert "2 of 9 steps" in html
    assert "This run stopped early" in html


def test_fine_tuning_has_no_planned_steps(tmp_path):
    (tmp_path / "config.yaml").write_text("name: run\nsteps: 9\n")
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1, "loss": 0.5}])
    assert "This run stopped early" not in write_report(tmp_path).read_text()


def test_missing_rewards_are_called_missing_and_are_neither_best_nor_worst(tmp_path):
    groups = [line(i, i, rewards=(float(i), float(i))) for i in range(6)]
    lacking = line(9, 9, rewards=(None, None))
    for entry in lacking["completions"]:
        entry["reward_parts"] = {"judge": None}
    write_lines(tmp_path / "rollouts.jsonl", [*groups, lacking])
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1}])
    shown = {group["index"]: group for group in show_groups(tmp_path / "rollouts.jsonl", Pictures())}
    assert (shown[9]["reward"], shown[9]["pick"]) == (None, "run")
    assert [shown[i]["pick"] for i in (0, 5)] == ["worst", "best"]
    html = write_report(tmp_path).read_text()
    assert "mean reward missing" in html
    assert "reward <b>missing</b>" in html
    assert "judge missing" in html
    assert 'data-reward=""' in html


def items_of(folder, groups):
    write_lines(folder / "rollouts.jsonl", groups)
    write_lines(folder / "metrics.jsonl", [{"step": 1}])
    return write_report(folder).read_text()


@pytest.mark.parametrize(
    ("size", "shown", "attributes"),
    [
        ((4000, 300), (896, 67), ("wide", "")),
        ((300, 4000), (67, 896), ("", "max-width:48px")),  # 640 pixels high
        ((600, 300), (224, 112), ("", "")),
    ],
)
def test_a_strip_is_shown_large_enough_to_be_seen(tmp_path, size, shown, attributes):
    path = tmp_path / "strip.png"
    Image.new("RGB", size).save(path)
    picture = Pictures().add(str(path))
    assert (picture["width"], picture["height"]) == shown
    page = Page(items_of(tmp_path, [line(image=str(path))]))
    (found,) = (one for _, one in page.tags if "picture" in one.get("class", "").split())
    (item,) = (one for _, one in page.tags if "item" in one.get("class", "").split())
    wide, style = attributes
    assert ("wide" in found["class"].split()) == ("several" in item["class"].split()) == bool(wide)
    assert found["style"].partition(";")[2] == style


@pytest.mark.parametrize("answer", ["", "[[1200, 1300, 1900, 1800]]"])
def test_an_empty_answer_and_boxes_beside_the_picture_are_told(tmp_path, answer):
    truth = {"answers": ["liver"]} if not answer else {"boxes": [[0.1, 0.1, 0.5, 0.5]], "frame": [1000, 1000]}
    task = "grounding" if answer else "open"
    text = f"<think>I look.</think><answer>{answer}</answer>"
    html = items_of(tmp_path, [line(task=task, truth=truth, options=[], answer="?", texts=(text, text))])
    assert ("(empty)" in html, "no box within the picture" in html) == (not answer, bool(answer))


def test_many_boxes_have_thin_lines_and_a_larger_copy(tmp_path):
    path = tmp_path / "scan.png"
    Image.new("RGB", (300, 300)).save(path)
    boxes = [[i / 60, i / 60, i / 60 + 0.1, i / 60 + 0.1] for i in range(50)]
    truth = {"boxes": boxes, "frame": [1000, 1000]}
    text = f"<think>I look.</think><answer>{[[round(1000 * edge) for edge in box] for box in boxes]}</answer>"
    html = items_of(
        tmp_path, [line(image=str(path), task="grounding", truth=truth, options=[], answer="?", texts=(text, ""))]
    )
    page = Page(html)
    assert [one["class"] for tag, one in page.tags if tag == "svg"] == ["boxes many"] * 2
    assert "copy crowded" in html
    assert sum(one["class"] == "answer" for tag, one in page.tags if tag == "rect") == 50
