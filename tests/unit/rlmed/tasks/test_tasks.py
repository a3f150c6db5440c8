"""Tasks: how rows are read, answers written and judged; the same for all, and what each adds."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rewards.rubric import REWARDS, Rubric
from rewards.task import task_reward
from rlmed.core.types import Completion, Example
from rlmed.data.examples import read_examples
from rlmed.data.sampler import reorder_options, shuffle_options
from rlmed.data.templates import Templates
from rlmed.tasks import registry
from rlmed.tasks.base import Task, columns
from rlmed.tasks.registry import OWN, settle_tasks, task_named, task_of

ROWS: dict[str, dict[str, Any]] = {
    "choice": {"question": "Which organ?", "options": ["liver", "spleen"], "answer": "spleen"},
    "open": {"question": "Which organ?", "answer": ["the spleen", "spleen tissue"]},
    "grounding": {"question": "Where is the cyst?", "answer": [[10, 20, 50, 40]]},
    "labels": {"question": "What is there?", "options": ["cyst", "mass", "edema"], "answer": ["cyst", "edema"]},
    "report": {"question": "Report.", "answer": ["There is a cyst.", "A cyst is seen."]},
}
NOTHING = {"grounding": {"answer": []}, "labels": {"answer": []}}
WRONG = {"choice": "A", "open": "liver", "grounding": "[[900, 900, 950, 950]]", "labels": "mass", "report": "normal"}


def read(tmp_path: Path, *rows: dict[str, Any]) -> tuple[Example, ...]:
    Image.fromarray(np.arange(100 * 200, dtype=np.uint8).reshape(100, 200)).save(tmp_path / "a.png")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"image": "a.png", **row}) + "\n" for row in rows))
    return read_examples(tmp_path / "rows.jsonl", on_bad_row="error").examples


def refused(tmp_path: Path, row: dict[str, Any]) -> str:
    with pytest.raises(ValueError, match="no row can be used") as caught:
        read(tmp_path, row)
    return str(caught.value)


def row_of(name: str) -> dict[str, Any]:
    return {**ROWS[name], **({} if name == "choice" else {"task": name})}


def completion(answer: str) -> Completion:
    text = f"<think>I look.</think><answer>{answer}</answer>"
    return Completion(np.arange(3), np.zeros(3, np.float32), text, "stop")


@pytest.mark.parametrize("name", ROWS)
def test_the_right_answer_of_each_task_earns_all_and_a_wrong_one_less(tmp_path: Path, name: str) -> None:
    (example,) = read(tmp_path, row_of(name))
    task = task_of(example)
    assert (example.task, task.name) == (name, name)
    json.dumps(example.truth)  # it travels between processes
    right = completion(task.right_answer(example))
    judged = task.judge(example, right.text)
    assert judged.correct
    assert list(judged.scores) == list(task.score_names)
    assert judged.scores[task.main] == pytest.approx(1.0, abs=0.02)  # boxes are rounded to thousandths
    assert task_reward(example, right) == judged.scores[task.main]
    wrong = task.judge(example, completion(WRONG[name]).text)
    assert not wrong.correct
    assert wrong.scores[task.main] < 0.5
    for text in ("", "no tags", "<answer></answer>", "<answer>" + "[" * 5000):
        nothing = task.judge(example, text)
        assert not nothing.correct
        assert set(nothing.scores) == set(task.score_names)
        assert all(score == 0 for score in nothing.scores.values())


@pytest.mark.parametrize("task", OWN, ids=lambda task: task.name)
def test_each_task_has_a_whole_prompt_and_names(task: Any) -> None:
    assert task.template.count("{question}") == 1
    assert "<think>...</think>" in task.template
    assert "<answer>...</answer>" in task.template
    assert task.main in task.score_names
    assert task_named(task.name) is task


def test_boxes_are_fractions_of_the_picture_and_written_in_thousandths(tmp_path: Path) -> None:
    (example,) = read(tmp_path, row_of("grounding"))
    assert example.truth == {"boxes": [[0.05, 0.2, 0.25, 0.4]], "frame": [1000, 1000]}
    assert task_of(example).right_answer(example) == "[[50, 200, 250, 400]]"
    half = task_of(example).judge(example, completion("[[50, 200, 150, 400]]").text)
    assert half.scores["iou"] == pytest.approx(0.5)
    assert half.correct
    (nothing,) = read(tmp_path, {**row_of("grounding"), "answer": []})
    assert task_of(nothing).judge(nothing, completion("[]").text).correct
    assert not task_of(nothing).judge(nothing, completion("[[0, 0, 10, 10]]").text).correct


@pytest.mark.parametrize(
    "boxes",
    [
        [[100, 100, 101, 104]],
        [[3999, 0, 4000, 4000]],
        [[0, 0, 2, 2]],
        [[0, 0, 2, 4]],
        [[0, 0, 4, 4], [1, 2, 3, 4]],
        [[0, 0, 4, 4]],
        [[0, 0, 1, 4], [2000, 7, 2079, 3001]],
        [[17, 1234, 18.5, 1235.25]],
    ],
    ids=str,
)
@pytest.mark.parametrize("scale", [1, 25])
def test_the_right_answer_is_right_for_small_boxes_in_large_pictures(boxes: list[list[float]], scale: int) -> None:
    task = task_named("grounding")
    truth = task.read(boxes, (), lambda: (4000 * scale, 4000 * scale))
    example = Example("1", None, "Where?", task="grounding", truth=truth)
    written = task.right_answer(example)
    # a corner is off by half of the last digit, 2.5 % of a side; a side by 5 %, the IoU by 10 %
    assert task.judge(example, completion(written).text).scores["iou"] > 0.9
    if boxes == [[100, 100, 101, 104]] and scale == 1:
        assert written == "[[25.0, 25.0, 25.25, 26.0]]"


def test_boxes_in_fractions_are_read_as_fractions(tmp_path: Path) -> None:
    (example,) = read(tmp_path, row_of("grounding"))  # 0.05, 0.2, 0.25, 0.4

    def score(answer: str) -> float:
        return task_of(example).judge(example, completion(answer).text).scores["iou"]

    assert score("[[0.05, 0.2, 0.25, 0.4]]") == pytest.approx(1)
    assert score('{"bbox_2d": [0.05, 0.2, 0.15, 0.4]}') == pytest.approx(0.5)
    assert score("[[0.05, 0.2, 0.25, 0.4], [0, 0, 1, 1]]") == pytest.approx(0.5)
    assert score("[[0.05, 0.2, 0.25, 1.5]]") == 0  # thousandths, since one is above 1
    assert score("[[0, 0, 1, 1]]") == pytest.approx(0, abs=1e-9)  # a speck: no fraction among them
    whole = task_named("grounding").read([[0, 0, 200, 100]], (), lambda: (200, 100))
    assert task_named("grounding").score("[[0, 0, 1, 1]]", whole) == {"iou": pytest.approx(1e-6)}


def test_boxes_of_a_picture_that_its_exif_data_turn_are_read_as_it_is_shown(tmp_path: Path) -> None:
    turned = Image.fromarray(np.arange(100 * 200, dtype=np.uint8).reshape(100, 200))
    exif = turned.getexif()
    exif[274] = 6  # shown with width 100 and height 200
    turned.save(tmp_path / "turned.jpg", exif=exif)
    row = {**row_of("grounding"), "image": "turned.jpg", "answer": [[10, 20, 50, 40]]}
    assert read(tmp_path, row)[0].truth["boxes"] == [[0.1, 0.1, 0.5, 0.2]]


def test_labels_are_shown_with_the_question_and_an_empty_list_is_none(tmp_path: Path) -> None:
    one, none = read(tmp_path, row_of("labels"), {**row_of("labels"), "id": "2", "answer": []})
    task = task_of(one)
    assert Templates("{question}").content(one).startswith("What is there?\ncyst, mass, edema\n")
    assert task.judge(one, completion("cyst").text).scores["f1"] == pytest.approx(2 / 3)
    assert task.judge(one, completion("edema, cyst").text).correct
    assert task.right_answer(none) == "none"
    assert task.judge(none, completion("none").text).correct
    assert not task.judge(none, completion("cyst").text).correct
    assert not task.judge(none, completion(" ").text).correct


def test_an_open_answer_is_right_in_any_accepted_wording_or_unit(tmp_path: Path) -> None:
    organ, size = read(tmp_path, row_of("open"), {**row_of("open"), "id": "2", "answer": "1.5 cm"})
    judge = task_of(organ).judge
    assert [judge(organ, completion(text).text).correct for text in ("Spleen tissue.", "spleen", "liver")] == [
        True, True, False,
    ]  # fmt: skip
    assert [judge(size, completion(text).text).correct for text in ("15 mm", "15.5 mm", "15 cm", "1.5")] == [
        True, True, False, False,
    ]  # fmt: skip


def test_a_file_of_synonyms_gives_answers_and_labels_other_spellings(tmp_path: Path) -> None:
    organ, labels = read(
        tmp_path, {"task": "open", "question": "Which?", "answer": "hemorrhage"}, {**row_of("labels"), "id": "2"}
    )
    (tmp_path / "synonyms.csv").write_text("bleeding,hemorrhage\nHaemorrhage,hemorrhage\noedema,edema\ncysts,cyst\n")

    def right() -> list[bool]:
        answers = [
            (organ, "The bleeding."),
            (organ, "haemorrhage"),
            (organ, "hemorrhage"),
            (labels, "Oedema and cysts"),
        ]
        return [task_of(row).judge(row, completion(text).text).correct for row, text in answers]

    assert right() == [False, False, True, False]
    try:
        settle_tasks([], str(tmp_path / "synonyms.csv"))
        assert right() == [True, True, True, True]
        assert not task_of(organ).judge(organ, completion("edema").text).correct
    finally:
        settle_tasks([], None)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.csv", None, r"none\.csv cannot be read: No such file or directory; "),
        ("Terms.csv", None, r"Terms\.csv cannot be read: .*terms\.csv"),
        ("folder", None, r"folder cannot be read: Is a directory; "),
        ("latin.csv", "\u00f6dem,edema\n".encode("latin-1"), r"latin\.csv is not UTF-8 \(byte 0\): "),
        ("three.csv", b"a,b\na,b,c\n", r"three\.csv, line 2: 3 columns: write spelling,label"),
        ("bad.json", b'{"a": "b",}', r"bad\.json is not valid JSON \("),
        ("list.json", b"[]", r"list\.json holds no JSON object: write"),
        ("two.json", b'{"a": "b", "a": "c"}', r"two\.json: 'a' is 'c' and 'b': keep one"),
    ],
)
@pytest.mark.parametrize(("key", "named"), [("data.extra_tasks", "data.synonyms"), ("--extra-tasks", "--synonyms")])
def test_a_file_of_synonyms_that_cannot_be_used_is_one_line_with_its_key(
    tmp_path: Path, name: str, content: bytes | None, said: str, key: str, named: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "terms.csv").write_text("a,b\n")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said) as caught:
        settle_tasks([], str(tmp_path / name), key=key)
    assert str(caught.value).startswith(f"{named}: {tmp_path / name}")
    assert "Errno" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_report_may_do_without_an_image_if_its_row_says_so(tmp_path: Path) -> None:
    row = {"task": "report", "question": "Findings: no cyst. Impression?", "answer": "Clear."}
    rows = [{**row, "image": None}, row, {**row, "task": "open"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_examples(tmp_path / "rows.jsonl")
    assert [(example.task, example.images) for example in found.examples] == [("report", ()), ("open", ())]
    (skipped,) = found.skipped
    assert (skipped.line, skipped.reason.partition(": ")[2][:16]) == (2, "name it in `imag")


def test_labels_over_a_file_are_scored_by_row_and_by_label(tmp_path: Path) -> None:
    (example,) = read(tmp_path, row_of("labels"))
    truth = example.truth  # cyst and edema of cyst, mass, edema
    figures = task_of(example).over_file([("cyst, edema", truth), ("cyst, mass", truth), (None, truth)])
    # 3 of 6 right labels named, and one that is wrong; cyst 4/5, edema 2/4, mass 0
    assert figures["micro_f1"] == pytest.approx(2 * 3 / (4 + 6))
    assert figures["macro_f1"] == pytest.approx((0.8 + 0.5 + 0) / 3)


ANSWERS: dict[str, list[str | None]] = {
    "grounding": ["[[50, 200, 250, 400]]", "[[60, 220, 250, 400], [0, 0, 9, 9]]", "[[500, 500, 700, 700]]", None, "[]"],
    "labels": ["cyst, edema", "mass", "cyst, haze", None, "none"],
    "report": ["There is a cyst.", "A cyst is there, one.", "", None, "There is no cyst or mass to be seen."],
}


@pytest.mark.parametrize("name", ANSWERS)
def test_figures_of_resamples_are_those_of_the_drawn_rows(tmp_path: Path, name: str) -> None:
    found, nothing = read(tmp_path, {**row_of(name), "id": "1"}, {**row_of(name), "id": "2", **NOTHING.get(name, {})})
    answers = [(answer, truth) for truth in (found.truth, nothing.truth) for answer in ANSWERS[name]]
    draws = np.sort(np.random.default_rng(0).integers(len(answers), size=(300, len(answers))), axis=1)
    draws[7] = 9  # a row without anything to find, alone
    slow = columns(task_of(found).over_file([answers[i] for i in rows]) for rows in draws)
    assert task_of(found).over_resamples(answers, draws) == slow
    assert len({*next(iter(slow.values()))}) > 20
    if name == "grounding":  # and the default, which leaves out most of them
        default = Task.over_resamples(task_of(found), answers, draws)
        assert default == {figure: values[: len(default[figure])] for figure, values in slow.items()}
        some = draws.min(axis=1) < 5  # with anything to find
        assert len(default["mAP"]) == some[:200].sum() < 200
        assert len(slow["mAP"]) == some.sum()


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"task": "opne", "answer": "x"}, "its task 'opne' is unknown: did you mean open? Else choose from choice"),
        ({"task": "Boxes", "answer": "x"}, "its task 'Boxes' is unknown: choose from choice, open, grounding, labels"),
        ({"task": "open"}, "it has no answer"),
        ({"task": "open", "answer": []}, "its answer is"),
        ({"task": "open", "answer": ["a", " "]}, "its answer is"),
        ({"task": "open", "answer": 3}, "its answer is 3"),
        ({"task": "open", "answer": "x", "options": ["x", "y"]}, "it has options"),
        ({"task": "open", "answer": "\ud800"}, "lone surrogate"),
        ({"task": "grounding", "answer": [[0, 0, 300, 10]]}, "x1 <= 200 and 0 <= y0 < y1 <= 100"),
        ({"task": "grounding", "answer": [[10, 0, 5, 10]]}, r"its box [10, 0, 5, 10]"),
        ({"task": "grounding", "answer": [[0, 0, 1]]}, "its box [0, 0, 1]"),
        ({"task": "grounding", "answer": [[0, 0, True, 5]]}, "its box [0, 0, True, 5]"),
        ({"task": "grounding", "answer": [[0, 0, 10**400, 5]]}, "its box [0, 0, 1000"),
        ({"task": "grounding", "answer": [[0, 0, float("nan"), 5]]}, "its box [0, 0, nan, 5]"),
        ({"task": "grounding", "answer": [[0, float("-inf"), 5, 5]]}, "its box [0, -inf, 5, 5]"),
        (
            {"task": "grounding", "answer": [[0.1, 0.2, 0.3, 0.4]]},
            "first image, of 200x100: write pixels; multiply fractions",
        ),
        ({"task": "grounding", "answer": [[10, 20, 30, 40], [0, 0, 1, 1.0]]}, "its box [0, 0, 1, 1.0] lies within"),
        (
            {"task": "grounding", "answer": [31, 40, 58, 66]},
            "is a box, and belongs into a list of boxes: write [[31, 40, 58, 66]]",
        ),
        ({"task": "grounding", "answer": "left"}, "its answer is 'left'"),
        ({"task": "grounding", "answer": [], "image": None}, "it has no image, and its task grounding needs"),
        ({"task": "labels", "answer": "cyst"}, "its answer is 'cyst'"),
        ({"task": "labels", "answer": ["Cyst", "cyst"]}, "names a label twice"),
        ({"task": "labels", "answer": ["cyst"], "options": ["mass", "edema"]}, "'cyst', which is none of its options"),
        ({"task": "labels", "answer": [], "options": ["None", "cyst"]}, "'none', which means that no label applies"),
        ({"task": "labels", "answer": [], "options": ["cyst", "Cyst"]}, "name a label twice"),
        ({"answer": "liver"}, "such as open"),
        ({"task": "report", "answer": "", "image": None}, "its answer is ''"),
    ],
)
def test_a_row_that_its_task_cannot_use_says_why(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    assert said in refused(tmp_path, {"question": "Which?", **row})


def test_options_of_other_tasks_are_never_reordered(tmp_path: Path) -> None:
    (example,) = read(tmp_path, row_of("labels"))
    assert shuffle_options(example, 1) is example
    assert reorder_options(example, 1) is None


def test_an_example_has_options_if_and_only_if_it_is_choice() -> None:
    with pytest.raises(ValueError, match="task='open' and options="):
        Example("1", None, "Which?", ("a", "b"), 0, task="open")
    with pytest.raises(ValueError, match=r"task='choice' and options=\(\)"):
        Example("1", None, "Which?")
    with pytest.raises(ValueError, match="task=open"):
        _ = Example("1", None, "Which?", task="open", truth={"answers": ["a"]}).letter


def test_a_template_is_chosen_by_task_and_that_of_a_modality_is_for_choice_alone(tmp_path: Path) -> None:
    templates = Templates("all {question}", {"CT": "CT {question}"}, {"open": "open {question}"})
    choice, other, report = read(
        tmp_path,
        {**row_of("choice"), "id": "1", "modality": "CT"},
        {**row_of("open"), "id": "2", "modality": "CT"},
        {**row_of("report"), "id": "3", "modality": "CT"},
    )
    assert templates.of(choice) == "CT {question}"
    assert templates.of(other) == "open {question}"
    assert templates.of(report) == task_named("report").template
    assert templates.content(other) == "open Which organ?"
    with pytest.raises(ValueError, match="exactly once"):
        Templates("{question}", by_task={"open": "none"})


def test_a_reward_of_choice_is_refused_for_other_tasks(tmp_path: Path) -> None:
    examples = read(tmp_path, {**row_of("choice"), "id": "1"}, {**row_of("open"), "id": "2"})
    assert "task" in REWARDS
    with pytest.raises(ValueError, match=r"choice.*1 open.*reward=task"):
        Rubric.from_config({"format": 1.0, "choice": 1.0}).check_tasks(examples)
    Rubric.from_config({"format": 1.0, "task": 1.0}).check_tasks(examples)
    Rubric.from_config({"format": 1.0, "choice": 1.0}).check_tasks(examples[:1])


STAGING = """
import numpy as np

from rlmed.tasks.base import Task


class Staging(Task):
    name = "staging"
    template = "{question} A stage inside <answer>...</answer>."
    main = "near"
    score_names = ("near",)

    def read(self, answer, options, size):
        if answer not in (1, 2, 3, 4):
            raise ValueError(f"its answer is {answer}: a stage is 1 to 4")
        return {"stage": answer}

    def write(self, truth):
        return str(truth["stage"])

    def score(self, answer, truth):
        return {"near": 1 - abs(int(answer) - truth["stage"]) / 3} if answer in ("1", "2", "3", "4") else None


class Choice(Staging):
    name = "choice"


class Unfinished(Staging):
    template = "no slot"


class Broken(Staging):
    name = "broken"
    score_names = ("near", "exact")

    def score(self, answer, truth):
        return eval(answer)


NOT = 3
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_stages.py").write_text(STAGING)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.setattr(registry, "_TASKS", dict(registry._TASKS))
    monkeypatch.delitem(sys.modules, "my_stages", raising=False)
    return "my_stages"


def test_a_task_of_the_user_is_read_prompted_and_judged(tmp_path: Path, own_module: str) -> None:
    settle_tasks([f"{own_module}:Staging"], None)
    (example,) = read(tmp_path, {"task": "staging", "question": "Which stage?", "answer": 2})
    assert Templates("{question}").content(example) == "Which stage? A stage inside <answer>...</answer>."
    assert task_reward(example, completion("2")) == 1
    assert task_reward(example, completion("3")) == pytest.approx(2 / 3)
    assert task_reward(example, completion("five")) == 0
    assert "a stage is 1 to 4" in refused(tmp_path, {"task": "staging", "question": "Which stage?", "answer": 9})


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ("1 / 0", "raised ZeroDivisionError: division by zero"),
        ("{'near': float('nan'), 'exact': 1}", "near=nan"),
        ("{'near': 1, 'exact': 5.0}", r"exact=5\.0: .* \[0, 1\]"),
        ("{'near': -0.1, 'exact': 1}", r"near=-0\.1"),
        ("{'near': 10 ** 400, 'exact': 1}", "near=1000"),
        ("{'near': '1', 'exact': 1}", "near='1'"),
        ("{'near': None, 'exact': 1}", "near=None"),
        ("{'near': 1}", "near, exact"),
        ("{'near': 1, 'exact': 1, 'far': 0}", "'far': 0"),
        ("0.5", r"returned 0\.5: .* near, exact"),
    ],
)
def test_a_task_of_the_user_that_misbehaves_is_named_with_example_and_answer(
    tmp_path: Path, own_module: str, returned: str, said: str
) -> None:
    settle_tasks([f"{own_module}:Broken"], None)
    (example,) = read(tmp_path, {"task": "broken", "id": "ct-7", "question": "Which stage?", "answer": 2})
    with pytest.raises(ValueError, match=said) as caught:
        task_reward(example, completion(returned))
    assert f"task broken, example ct-7: the score of answer {returned!r}" in str(caught.value)
    assert isinstance(caught.value.__cause__, ZeroDivisionError) == ("/" in returned)
    with pytest.raises(ValueError, match="…") as caught:  # a long answer is shortened
        task_of(example).judge(example, completion(returned + " " * 9 + "#" * 5000).text)
    assert len(str(caught.value)) < 450
    right = task_of(example).judge(example, completion("{'exact': True, 'near': np.float32(1)}").text)
    assert json.dumps(right.scores) == '{"near": 1.0, "exact": 1.0}'


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("my_stages", "write module:Class"),
        ("my_stages.py:Staging", "write module:Class"),
        ("my_stages:Stagin", r"'Stagin' does not exist in .*my_stages\.py: did you mean Staging\?"),
        ("my_stages:Xyz", r"'Xyz' does not exist in .*my_stages\.py: define it there"),
        ("no_such_module:Task", r"'no_such_module' cannot be imported from HERE or the .*: ModuleNotFoundError"),
        ("my_stages:NOT", "TypeError"),
        ("my_stages:Choice", "'choice' is a task of rlmed"),
        ("my_stages:Unfinished", "its template needs"),
    ],
)
def test_a_task_that_cannot_be_added_says_why(own_module: str, path: str, said: str) -> None:
    for key in ("data.extra_tasks", "--extra-tasks"):
        with pytest.raises(ValueError, match=said.replace("HERE", re.escape(str(Path.cwd())))) as caught:
            settle_tasks([path], None, key=key)
        assert str(caught.value).startswith(key)


def test_a_frozen_example_of_any_task_can_be_changed_for_a_control(tmp_path: Path) -> None:
    (example,) = read(tmp_path, row_of("grounding"))
    other = dataclasses.replace(example, image=Path("/b.png"))
    assert (other.truth, other.task) == (example.truth, "grounding")
