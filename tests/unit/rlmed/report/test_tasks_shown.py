"""Tasks other than multiple choice in the report: boxes, differences, labels, notes, scores."""

import dataclasses
import importlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from rlmed.core.statistics import sign_flip_test
from rlmed.core.types import (
    Completion,
    Example,
    Prompt,
    RolloutGroup,
    RolloutRequest,
    SamplingParams,
    ScoredGroup,
    TrainGroup,
)
from rlmed.evaluation.records import Accuracy, EvalRow
from rlmed.evaluation.results import EvalSummary, FileSummary, compare, write_evaluation
from rlmed.evaluation.scores import Baselines, summarise_task
from rlmed.recording.recorder import RunRecorder
from rlmed.report.command import main
from rlmed.report.page import write_report
from rlmed.report.rollouts import GROUPS, Pictures, show_groups
from rlmed.tasks import registry
from rlmed.tasks.registry import settle_tasks, task_named
from tests.unit.rlmed.report.test_page import EVIL, Page, line, run, write_lines  # noqa: F401
from tests.unit.rlmed.report.test_pictures import numbered

SIZE = (400, 200)
"""Of the pictures of `numbered`."""


def example(task, answer, options=(), number=1, image=None):
    truth = task_named(task).read(answer, options, lambda: SIZE)
    return Example(f"{task}-{number}", image, "What is there?", task=task, truth=truth, kind="finding")


def said(answer):
    return f"<think>I look.</think><answer>{answer}</answer>"


def record(folder, groups):
    """Write rollouts.jsonl as training does: examples with their completions' answers."""
    with RunRecorder(folder) as recorder:
        recorder.record_step(1, {"reward/mean": 0.5})
        for index, (shown, answers) in enumerate(groups):
            completions = tuple(
                Completion(np.arange(3), np.zeros(3, np.float32), said(answer), "stop") for answer in answers
            )
            request = RolloutRequest(index, Prompt(shown, "text", np.arange(4)), len(answers), SamplingParams())
            rewards = np.arange(len(answers), 0, -1, dtype=np.float32)
            scored = ScoredGroup(RolloutGroup(request, completions), rewards, {"task": rewards})
            recorder.record_groups(1, [TrainGroup(scored, rewards)], [])


def shown_groups(folder, groups):
    record(folder, groups)
    return {group["example_id"]: group for group in show_groups(folder / "rollouts.jsonl", Pictures())}


def judged(shown, answer):
    text = said(answer)
    task = task_named(shown.task)
    found = task.judge(shown, text)
    return EvalRow(
        file="mixed",
        id=shown.id,
        control="none",
        image=None if shown.image is None else str(shown.image),
        question_type=shown.kind,
        question=shown.question,
        options=(),
        answer=task.right_answer(shown),
        completion=text,
        predicted_letter=None,
        correct=found.correct,
        format=True,
        tokens=7,
        finish_reason="stop",
        task=shown.task,
        truth=shown.truth,
        predicted=found.answer,
        scores=found.scores,
    )


def evaluate(folder, step, answered):
    """Write an evaluation of examples with their answers."""
    rows = [judged(shown, answer) for shown, answer in answered]
    examples = [shown for shown, _ in answered]
    tasks = tuple(
        summarise_task(rows, Baselines.of(name, [one for one in examples if one.task == name], []))
        for name in dict.fromkeys(one.task for one in examples)
    )
    share = Accuracy.of(sum(row.correct for row in rows), len(rows))
    summary = FileSummary(
        "mixed", len(rows), share, 1.0, 7.0, 0.0, 0.1, None, None, None, 0.2, 0.2, None, None, {}, tasks=tasks
    )
    return write_evaluation(folder / "evaluations", EvalSummary("base", step, 1.0, 64, 0, (summary,)), rows)


def cells_of(html, heading):
    table = re.search(rf"<h3>{heading}</h3>.*?</table>", html, re.DOTALL)[0]
    rows = [
        re.findall(r"<t[dh].*?>(.*?)</t[dh]>", row, re.DOTALL) for row in re.findall(r"<tr.*?</tr>", table, re.DOTALL)
    ]
    head, *lines = [[" ".join(re.sub(r"<[^>]+>", " ", cell).split()) for cell in row] for row in rows]
    return [dict(zip(head, cells, strict=True)) for cells in lines]


def test_multiple_choice_is_shown_as_before(run):  # noqa: F811
    html = write_report(run).read_text()
    headings = ("Held-out accuracy", "Rollouts", "Evaluated questions")
    sections = [re.search(rf"<section[^>]*>\n<h2>{name}</h2>.*?</section>\n", html, re.DOTALL)[0] for name in headings]
    # written by rlmed before it knew other tasks; n, a live count and the policy version came since
    assert "".join(sections) == (Path(__file__).parent / "choice.html").read_text(encoding="utf-8")


def test_the_table_of_accuracy_has_no_column_without_figures(tmp_path):
    evaluate(tmp_path, 4, [(example("open", ["liver"], number=i), "liver") for i in range(3)])
    section = re.search(r"<h2>Held-out accuracy</h2>.*?</section>", write_report(tmp_path).read_text(), re.DOTALL)[0]
    table = section[: section.index("</table>")]
    head = [re.sub("<[^>]+>", " ", cell) for cell in re.findall(r"<th>(.*?)</th>", table)]
    assert head == ["file", "rows", "accuracy", "format", "image-free prior", "chance"]
    rows = re.findall(r"<tr>(.*?)</tr>", table.partition("<tbody>")[2], re.DOTALL)
    assert [row.count("<td>") for row in rows] == [len(head)]
    assert "lank" not in section.partition("Scores by task")[0]


def test_answers_are_judged_by_their_task(tmp_path):
    groups = shown_groups(
        tmp_path,
        [
            (example("open", ["liver", "hepar"]), ("The liver.", "spleen", "Hepar")),
            (example("grounding", [[40, 20, 200, 100]]), ("[[100, 100, 500, 500]]", "on the left")),
            (example("labels", ["cyst"], ("cyst", "mass")), ("mass", "cyst, mass")),
            (example("report", "a cyst"), ("a cyst",)),
        ],
    )
    assert {name: (group["outcome"], group["correct"]) for name, group in groups.items()} == {
        "open-1": ("some right", 2),
        "grounding-1": ("some right", 1),
        "labels-1": ("none right", 0),
        "report-1": ("all right", 1),
    }
    (good, bad) = groups["grounding-1"]["completions"]
    assert (good["judged"]["scores"], bad["judged"]["scores"]) == ({"iou": pytest.approx(1.0)}, {"iou": 0.0})
    assert bad["judged"]["found"] is None
    assert groups["open-1"]["right"] == ["liver", "hepar"]


def test_a_task_that_is_not_known_here_is_shown_without_judging(tmp_path):
    write_lines(tmp_path / "rollouts.jsonl", [line(task=f"staging{EVIL}", truth={"stage": 2}, answer="2", options=[])])
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1}])
    html = write_report(tmp_path).read_text()
    assert "not judged" in html
    assert "is-correct" not in html.split("<main>")[1]
    assert "&lt;script&gt;" in html


@pytest.mark.parametrize(
    ("task", "truth"),
    [
        ("grounding", None),
        ("grounding", {"boxes": [[0, 0, EVIL, 1]], "frame": [1000, 1000]}),
        ("grounding", {"boxes": [[0, 0, 10**400, 1]], "frame": [1000, 1000]}),
        ("grounding", {"boxes": [[0.1, 0.1, 0.5, 0.5]], "frame": [0, float("nan")]}),
        ("labels", {"labels": "cyst", "known": None}),
        ("open", {"answers": [None]}),
        ("report", {"references": []}),
        (["open"], {"answers": ["liver"]}),
    ],
)
def test_a_truth_of_another_form_leaves_the_page_whole(tmp_path, task, truth):
    text = said("[[100, 100, 500, 500]]")
    write_lines(tmp_path / "rollouts.jsonl", [line(task=task, truth=truth, options=[], texts=(text, EVIL))])
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1}])
    page = Page(write_report(tmp_path).read_text())
    assert not [tag for tag, _ in page.tags if tag in ("rect", "img")]
    assert len([tag for tag, _ in page.tags if tag == "script"]) == 1


@pytest.mark.parametrize(
    ("frame", "answer"), [(None, "[[500, 600, 250, 1200]]"), ((392, 196), "[[196, 117.6, 98, 400]]")]
)
def test_boxes_lie_where_they_are_said_to(tmp_path, frame, answer):
    (image,) = numbered(tmp_path, 1)
    shown = example("grounding", [[40, 20, 200, 100]], image=Path(image))
    if frame is not None:  # pixels of the picture as the model was given it
        shown = dataclasses.replace(shown, truth=task_named("grounding").framed(shown.truth, frame))
    evaluate(tmp_path, 0, [(shown, answer)])
    page = Page(write_report(tmp_path).read_text())
    boxes = [attributes for tag, attributes in page.tags if tag == "rect"]
    found = [(box["class"], box["x"], box["y"], box["width"], box["height"]) for box in boxes if box["class"] != "halo"]
    truth = ("truth", "10.00%", "10.00%", "40.00%", "40.00%")  # pixels 40, 20 to 200, 100 of 400 x 200
    # corners in order and within the picture; over the question's picture, then over the answer's
    assert found == [truth, truth, ("answer", "25.00%", "60.00%", "25.00%", "40.00%")]
    named = [attributes["aria-label"] for _, attributes in page.tags if attributes.get("role") == "img"]
    assert named[-1] == "right boxes: 1, boxes of this answer: 1"


def test_without_a_picture_nothing_is_drawn(tmp_path):
    evaluate(tmp_path, 0, [(example("grounding", [[40, 20, 200, 100]]), "[[0, 0, 500, 500]]")])
    page = Page(write_report(tmp_path).read_text())
    assert not [tag for tag, _ in page.tags if tag == "rect"]
    assert "[[0, 0, 500, 500]]" in page.text


def test_words_that_differ_are_marked(tmp_path):
    record(
        tmp_path,
        [(example("report", ["Normal study.", "A cyst in the left lung."]), (f"cyst in the right lung {EVIL}",))],
    )
    html = write_report(tmp_path).read_text()
    marked = re.search(r'<p class="answer">(.*?)</p>', html)[1]
    assert marked.startswith("cyst in <del>the left</del> <ins>the right</ins> lung")
    assert "<ins>&lt;script&gt;" in marked
    assert "<script>" not in marked


def test_labels_are_told_apart(tmp_path):
    known = ("cyst", "mass", "edema")
    record(tmp_path, [(example("labels", ["cyst", "mass"], known), (f"mass, edema, {EVIL}",))])
    html = write_report(tmp_path).read_text()
    labels = re.findall(r'<li class="(\w+)">\w+: <b>(\w+)', html)
    assert labels[:3] == [("right", "mass"), ("missing", "cyst"), ("superfluous", "edema")]
    assert re.findall(r'<li class="correct">(\w+)</li>', html) == ["cyst", "mass"]


def test_the_runs_own_synonyms_judge_its_rollouts_and_compare_its_labels(tmp_path, caplog):
    record(tmp_path, [(example("labels", ["cyst", "edema"], ("cyst", "mass", "edema")), ("Oedema and cysts",))])
    spellings = tmp_path / "spellings.csv"
    (tmp_path / "config.yaml").write_text(f"data:\n  synonyms: {spellings}\n")

    def labels(*arguments):
        try:
            main([str(tmp_path), *arguments])
        finally:
            settle_tasks([], None)
        html = (tmp_path / "report.html").read_text()
        return re.findall(r'<li class="(\w+)">\w+: <b>(\w+)', html), "f1 1.00" in html

    apart = [("missing", "cyst"), ("missing", "edema"), ("superfluous", "oedema"), ("superfluous", "cysts")]
    together = [("right", "edema"), ("right", "cyst")]
    assert labels() == (apart, False)  # the file is gone
    assert f"data.synonyms={spellings}" in caplog.text
    spellings.write_text("oedema,edema\ncysts,cyst\n")
    assert labels() == (together, True)
    other = tmp_path / "other.csv"
    other.write_text("cysts,cyst\n")
    assert labels("--synonyms", str(other))[0] == [("right", "cyst"), ("missing", "edema"), ("superfluous", "oedema")]


def test_the_runs_own_tasks_judge_its_rollouts_and_no_report_without_them_replaces_one(
    tmp_path, monkeypatch, capsys, caplog
):
    known = dict(registry._TASKS)
    monkeypatch.setattr(registry, "_TASKS", {**known, "side": task_named("open")})
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder, elsewhere = tmp_path / "run", tmp_path / "code"
    elsewhere.mkdir()
    record(folder, [(dataclasses.replace(example("open", "left"), task="side"), ("left", "right"))])
    (folder / "config.yaml").write_text("data:\n  extra_tasks: ['shown_side:Side']\n")
    monkeypatch.setattr(registry, "_TASKS", dict(known))
    module = "from rlmed.tasks.open import Open\n\n\nclass Side(Open):\n    name = 'side'\n"
    report = folder / "report.html"

    def refused(*arguments):
        with pytest.raises(SystemExit) as stopped:
            main([str(folder), *arguments])
        assert stopped.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    main([str(folder)])
    assert "not judged" in report.read_text()
    assert "data.extra_tasks=shown_side:Side" in caplog.text
    before = report.read_bytes()
    assert "add --extra-tasks shown_side:Side" in refused()
    (folder / "shown_side.py").write_text(module)
    monkeypatch.chdir(folder)
    sys.path.append(str(folder))
    assert "lies in the run's folder" in refused()
    assert report.read_bytes() == before
    sys.path.remove(str(folder))
    (folder / "shown_side.py").rename(elsewhere / "shown_side.py")
    sys.path.append(str(elsewhere))
    importlib.invalidate_caches()
    main([str(folder)])
    assert "not judged" not in report.read_text()
    assert "1 of 2 right" in report.read_text()
    assert "--extra-tasks has 'side'" in refused("--extra-tasks", "side")


@pytest.mark.parametrize(
    ("notes", "expected"),
    [
        ({"judge": f"wrong side {EVIL}", "blank": " "}, ["what judge says"]),
        ({EVIL: "good"}, [f"what {EVIL} says"]),
        ({"judge": {"points": 3}}, ["what judge says"]),
        (None, []),
        ("text", []),
    ],
)
def test_what_a_judge_wrote_is_folded_under_the_completion(tmp_path, notes, expected):
    entry = line(texts=("a", "b"))
    entry["completions"][0]["notes"] = notes
    write_lines(tmp_path / "rollouts.jsonl", [entry])
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1}])
    html = write_report(tmp_path).read_text()
    page = Page(html)
    assert [summary for summary in expected if summary not in page.text] == []
    assert html.count('<details class="said">') == len(expected)
    assert len([tag for tag, _ in page.tags if tag == "script"]) == 1


def test_each_task_has_its_share_and_can_be_chosen(tmp_path):
    # rewards of open questions are never among the best or the worst
    write_lines(
        tmp_path / "rollouts.jsonl",
        [line(i, i, rewards=(float(i % 2), float(i % 2))) for i in range(200)]
        + [
            line(200 + i, i, rewards=(0.5, 0.5), task="open", truth={"answers": ["a"]}, options=[], answer="a")
            for i in range(40)
        ],
    )
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1}])
    groups = show_groups(tmp_path / "rollouts.jsonl", Pictures())
    tasks = [group["task"] for group in groups]
    assert len(groups) == GROUPS
    assert (tasks.count("choice"), tasks.count("open")) == (GROUPS // 2, GROUPS // 2)
    html = write_report(tmp_path).read_text()
    assert re.findall(r'data-key="(task)"', html) == ["task"]
    assert html.count('data-task="open"') == GROUPS // 2


def test_scores_stand_beside_controls_and_baselines(tmp_path):
    shown = [example("grounding", [[0, 0, 100 + 20 * i, 100]], number=i) for i in range(8)]
    answers = [[(one, "[[0, 0, 250, 500]]" if i < good else "[]") for i, one in enumerate(shown)] for good in (2, 8)]
    evaluate(tmp_path, 0, answers[0])
    evaluate(tmp_path, 30, answers[1])
    (iou, *over_file) = cells_of(write_report(tmp_path).read_text(), "Scores by task")
    first, last = ([judged(*one).scores["iou"] for one in side] for side in answers)
    assert iou["file, task"] == "mixed grounding"
    assert iou["score"] == "iou*"
    assert iou["before"].split()[0] == f"{100 * np.mean(first):.1f}"
    assert iou["after"].split()[0] == f"{100 * np.mean(last):.1f}"
    assert iou["change"] == f"+{100 * (np.mean(last) - np.mean(first)):.1f}"
    assert iou["p"] == f"{sign_flip_test(np.array(first), np.array(last)):.3f}"
    assert iou["blank"] == "–"
    assert iou["prior"].endswith("own")
    assert [(line["score"], line["p"], line["chance"]) for line in over_file] == [
        (name, "–", "–") for name in ("mAP", "AP50", "recall50")
    ]


def test_a_file_whose_task_changed_is_not_compared(tmp_path):
    def one(task):
        truth = task_named(task).read("liver", (), lambda: SIZE)
        return Example("1", None, "What is there?", task=task, truth=truth, kind="finding")

    first = evaluate(tmp_path / "a", 0, [(one("open"), "liver")])
    second = evaluate(tmp_path / "b", 0, [(one("report"), "liver")])
    with pytest.raises(ValueError, match="mixed has other rows"):
        compare(first, second)


def test_scores_compared_with_another_run(tmp_path):
    shown = [example("open", "liver", number=i) for i in range(6)]
    first = evaluate(tmp_path / "a", 0, [(one, "spleen") for one in shown])
    second = evaluate(tmp_path / "b", 0, [(one, "liver") for one in shown])
    compare(first, second)
    exact, *rest = cells_of(write_report(tmp_path / "b").read_text(), "Scores by task")
    p_value = json.loads((second / "comparison.json").read_text())["files"]["mixed"]["scores"]["open"]["p_value"]
    assert (exact["before"], exact["change"], exact["p"]) == ("0.0", "+100.0", f"{p_value:.3f}")
    assert [line["before"] for line in rest] == ["–", "–"]
