import base64
import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from markupsafe import Markup
from PIL import Image

from rlmed.core.tracing import Tracer
from rlmed.evaluation.records import Accuracy, EvalRow
from rlmed.evaluation.results import EvalSummary, FileSummary, compare, write_evaluation
from rlmed.report import plots as report_plots
from rlmed.report.answers import CHARACTERS, take_apart
from rlmed.report.page import write_report
from rlmed.report.plots import MAX_POINTS, draw_accuracy, draw_metrics, running_mean
from rlmed.report.rollouts import GROUPS, Pictures, show_groups, show_rows
from tests.unit.rlmed.evaluation.test_old_names import TRUST
from tests.unit.rlmed.report.test_pictures import numbered

EVIL = "<script>alert('owned')</script><img src=x onerror=alert(1)>"
GOOD = "<think>The bone is bright.</think>\n<answer>B</answer>"


class Page(HTMLParser):
    """Tags with their attributes, and all text, as a browser would see them."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def line(step=1, index=0, rewards=(2.0, 0.0), texts=(GOOD, "no tags"), image=None, **changes):
    completions = [
        {
            "text": text,
            "reward": reward,
            "reward_parts": {"format": 1.0, "choice": 0.5},
            "advantage": 0.7071,
            "tokens": 9,
            "finish_reason": "stop",
            "min_version": 3,
            "max_version": 4,
        }
        for text, reward in zip(texts, rewards, strict=True)
    ]
    group = {"step": step, "index": index, "example_id": f"ex-{index}", "image": image, "question": "Which part?"}
    group |= {
        "options": ["head", "knee"],
        "answer": "B",
        "modality": "MRI",
        "question_type": "anatomy",
        "completions": completions,
    }
    return group | changes


def write_lines(path, lines):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in lines))


def row(number, right, **changes):
    text = GOOD if right else "<think>?</think><answer>A</answer>"
    plain = EvalRow(
        file="ct",
        id=f"r{number}",
        control="none",
        image=None,
        question_type="anatomy",
        question=f"Question {number}?",
        options=("head", "knee"),
        answer="B",
        completion=text,
        predicted_letter="B" if right else "A",
        correct=right,
        format=True,
        tokens=7,
        finish_reason="stop",
    )
    return dataclasses.replace(plain, **changes)


def summary(step, rows, controls=True, **changes):
    right = sum(entry.correct for entry in rows)
    accuracy = Accuracy.of(right, len(rows))
    blank = Accuracy.of(2, 8) if controls else None
    file = FileSummary("ct", len(rows), accuracy, 0.9, 20.0, 0.0, 0.25, 0.3, 0.41, 0.42, 0.43, 0.44, blank, None, {})
    return EvalSummary("base", step, 1.0, 64, 600, (dataclasses.replace(file, **changes),))


@pytest.fixture
def run(tmp_path):
    """A small but whole run folder."""
    folder = tmp_path / "run"
    folder.mkdir()
    image = tmp_path / "scan.png"
    Image.fromarray(np.arange(300 * 400, dtype=np.uint32).astype(np.uint8).reshape(300, 400)).save(image)
    (folder / "config.yaml").write_text("name: my_run\nsteps: 3\nmodel:\n  path: tiny & small\n")
    (folder / "versions.json").write_text(
        '{"python": "3.11.1", "cuda_device": null, "cpu": "Some CPU", "packages": {"torch": "2.1"}}'
    )
    skipped = [{"line": 4, "id": "x4", "reason": "image <gone>.png does not exist"}]
    data = {"files": [{"name": "train", "path": "d/train.jsonl", "sha256": "ab" * 32, "rows": 9, "skipped": skipped}]}
    (folder / "data.json").write_text(json.dumps(data))
    metrics = [{"step": i, "reward/mean": i / 2, "reward/format": 0.5, "kl": 0.1 if i > 1 else None} for i in (1, 2, 3)]
    write_lines(folder / "metrics.jsonl", metrics)
    write_lines(
        folder / "rollouts.jsonl",
        [
            line(1, 0, image=str(image)),
            line(
                2,
                1,
                texts=(EVIL, f"<think>{EVIL}</think><answer>{EVIL}</answer>"),
                image=str(image),
                question=EVIL,
                modality=f'"><b>{EVIL}',
            ),
        ],
    )
    tracer = Tracer(folder / "timeline.jsonl")
    with tracer.span("rollout", step=1), tracer.span("reward", step=1):
        pass
    before = [row(i, right=i < 3, image=str(image)) for i in range(10)]
    after = [row(i, right=i > 0, image=str(image), completion=EVIL if i == 5 else GOOD) for i in range(10)]
    write_evaluation(folder / "evaluations", summary(0, before), [*before, row(0, True, control="blank")])
    write_evaluation(folder / "evaluations", summary(3, after), after)
    return folder


def table_cells(html):
    body = re.search(r"<h2>Held-out accuracy.*?</table>", html, re.DOTALL)[0]
    return [
        [re.sub(r"<[^>]+>", " ", cell).split() for cell in re.findall(r"<t[dh].*?>(.*?)</t[dh]>", tr, re.DOTALL)]
        for tr in re.findall(r"<tr>(.*?)</tr>", body, re.DOTALL)
    ]


def test_the_table_has_before_and_after_with_controls(run):
    html = write_report(run).read_text()
    head, cells = table_cells(html)
    cells = dict(zip([" ".join(words) for words in head], [" ".join(words) for words in cells], strict=True))
    assert cells == {
        "file": "ct",
        "rows": "10",
        "before": "30.0 10.8–60.3",
        "after": "90.0 59.6–98.2",
        "change": "+60.0",
        "p": "0.070",  # 7 gained, 1 lost: 2 * (1 + 8) / 2**8
        "format": "90.0 was 90.0",
        "blank": "25.0 7.1–59.1 n=8",
        "shuffled": "–",
        "other order": "–",
        "image-free prior": "41.0 own file 43.0",
        "majority letter": "30.0",
        "chance": "25.0",
    }
    assert "my_run" in html
    assert "tiny &amp; small" in html
    assert "3 of 3 steps" in html
    assert "This run stopped" not in html


def test_questions_about_several_pictures_have_columns_of_their_own(run):
    assert "image order" not in write_report(run).read_text()
    (file,) = summary(3, rows := [row(i, right=i > 0) for i in range(10)]).files
    several = dataclasses.replace(file, blank_one=Accuracy.of(3, 6), image_order=Accuracy.of(5, 6))
    files = (several, dataclasses.replace(file, name="mri"))
    write_evaluation(run / "evaluations", dataclasses.replace(summary(3, rows), files=files), rows)
    head, *lines = table_cells(html := write_report(run).read_text())
    assert {len(line) for line in lines} == {len(head)}
    cells = [dict(zip([" ".join(words) for words in head], line, strict=True)) for line in lines]
    assert [line["one blank"][:1] for line in cells] == [["50.0"], ["–"], []]
    assert cells[0]["image order"] == ["83.3", "43.6–97.0", "6", "rows"]
    assert "One blank, image order:" in html


def test_nothing_that_a_model_wrote_becomes_markup(run):
    html = write_report(run).read_text()
    page = Page(html)
    assert EVIL in page.text
    scripts = [attributes for tag, attributes in page.tags if tag == "script"]
    assert len(scripts) == 1, "only our own script"
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert all(not name.startswith("on") for _, attributes in page.tags for name in attributes)


def test_only_our_script_may_run(run):
    html = write_report(run).read_text()
    script = re.search(r"<script>(.*?)</script>", html, re.DOTALL)[1]
    digest = hashlib.sha256(script.encode()).digest()
    assert f"script-src 'sha256-{base64.b64encode(digest).decode()}'" in html
    assert "default-src 'none'" in html


def test_the_file_stands_alone(run):
    html = write_report(run).read_text()
    assert "http://" not in html
    assert "https://" not in html
    page = Page(html)
    assert not [tag for tag, attributes in page.tags if tag == "link" or "src" in attributes]
    assert all(found.startswith("data:image/jpeg") for found in re.findall(r'url\("(.{20})', html))


def test_each_image_is_embedded_once_and_small(run):
    html = write_report(run).read_text()
    assert html.count("data:image/jpeg") == 1
    assert html.count('class="picture p0" style="aspect-ratio:224/168"') >= 3


def test_curves_follow_the_theme(run):
    html = write_report(run).read_text()
    svgs = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(svgs) == 3, "accuracy, reward, KL"
    for svg in svgs:
        assert "fill: var(--muted)" in svg
        assert "stroke: var(--series-1)" in svg
        assert not re.search(r"(?:fill|stroke): #(?!000000)", svg), "a fixed colour is unreadable in one of the themes"
    assert "total" in svgs[1]
    assert "format" in svgs[1]


def test_changed_answers_are_shown_with_what_was_written(run):
    html = write_report(run).read_text()
    items = re.findall(r'data-file="ct" data-outcome="([^"]*)"', html)
    assert items == ["wrong → right"] * 7 + ["right → wrong"]


@pytest.mark.parametrize(
    "missing",
    ["versions.json", "data.json", "metrics.jsonl", "rollouts.jsonl", "timeline.jsonl", "evaluations", "config.yaml"],
)
def test_each_part_may_be_missing(run, missing):
    path = run / missing
    path.rename(run.parent / "gone")
    assert Page(write_report(run).read_text()).text


@pytest.mark.parametrize("content", ["", "{", "[1]", "\udcff"])
@pytest.mark.parametrize("name", ["config.yaml", "versions.json", "data.json", "summary.json", "rows.jsonl"])
def test_half_a_copy_of_a_run_is_named(run, name, content):
    (damaged,) = list(run.rglob(name))[:1]
    damaged.write_bytes(content.encode("utf-8", "surrogateescape"))
    if (name, content) in (("config.yaml", ""), ("rows.jsonl", "")):
        write_report(run)  # a run without settings, an evaluation without rows
        return
    with pytest.raises(ValueError, match=re.escape(str(damaged))):
        write_report(run)


def test_nobody_takes_generated_images_for_a_patients(run):
    text = write_report(run).read_text()
    assert "not a medical device" in text
    assert "images are synthetic" not in text
    (run / "config.yaml").write_text("name: my_run\ndata:\n  source: phantom\n")
    assert "images are synthetic" in write_report(run).read_text()


def test_a_toys_answers_are_not_taken_for_more(run):
    versions = json.loads((run / "versions.json").read_text())
    assert "embedded toy" not in write_report(run).read_text()
    for toy in (True, False):
        (run / "versions.json").write_text(json.dumps({**versions, "toy_model": toy}))
        html = write_report(run).read_text()
        assert ('<p class="warning">This model is the embedded toy, or was trained from it' in html) == toy
    # a run of an earlier version, whose folder names the model
    (run / "versions.json").write_text(json.dumps(versions))
    (run / "config.yaml").write_text("name: my_run\nmodel:\n  path: embedded:tiny_base\n")
    assert "embedded toy" in write_report(run).read_text()
    (run / "config.yaml").write_text("name: r\nmodel:\n  path: embedded:tiny_base\ndata:\n  source: phantom\n")
    html = write_report(run).read_text()
    assert html.count("embedded toy") == 1
    assert '<p class="warning">This model' not in html  # nobody was asked about a real picture


def test_the_title_names_the_questions(run):
    assert "<title>my_run: train – report</title>" in write_report(run).read_text()
    content = json.loads((run / "data.json").read_text())
    content["files"] = [{**content["files"][0], "name": f"<{n}>"} for n in range(9)]
    (run / "data.json").write_text(json.dumps(content))
    assert "<title>my_run: &lt;0&gt;, &lt;1&gt;, &lt;2&gt;, &lt;3&gt;, &lt;4&gt;, &lt;5&gt;, … – report</title>" in (
        write_report(run).read_text()
    )
    (run / "data.json").unlink()
    assert "<title>my_run – report</title>" in write_report(run).read_text()


def test_a_legend_covers_no_curve(monkeypatch):
    figures = []
    monkeypatch.setattr(report_plots, "to_svg", lambda figure: figures.append(figure) or Markup(""))
    names = ("mean", "format", "choice", "brevity", "a_long_name_of_a_users_own", "agreement", "likelihood_gain")
    draw_metrics([{"step": i, **{f"reward/{name}": i % 2 for name in names}} for i in range(9)])
    files = ("test_mri", "test_ct", "test_xray", "another")
    summaries = [summary(step, [row(1, True)], False) for step in (0, 3)]
    draw_accuracy(
        [
            dataclasses.replace(one, files=tuple(dataclasses.replace(one.files[0], name=name) for name in files))
            for one in summaries
        ]
    )
    assert len(figures) == 2
    for figure in figures:
        figure.draw_without_rendering()
        legend, axes = figure.legends[0].get_window_extent(), figure.axes[0].get_window_extent()
        assert legend.y0 >= axes.y1
        assert axes.height > 60  # pixels of the page


def test_letters_that_were_not_offered_stand_beside_the_format(run):
    assert "not offered" not in write_report(run).read_text()
    for path in run.glob("evaluations/*/summary.json"):
        content = json.loads(path.read_text())
        content["files"][0]["not_offered"] = 0.125
        path.write_text(json.dumps(content))
    assert "<small>12.5 name a letter not offered</small>" in write_report(run).read_text()


def test_killed_run(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')
    (run / "config.yaml").write_text("name: my_run\nsteps: 300\n")
    (run / "evaluations" / "step-000003").rename(run / "evaluations" / ".step-000003.partial")
    html = write_report(run).read_text()
    assert "3 of 300 steps are recorded" in html
    assert "<th>accuracy</th>" in html
    assert "<th>before</th>" not in html


def test_supervised_baseline_gets_its_columns(run):
    rows = [row(i, right=i < 6) for i in range(10)]
    with pytest.raises(ValueError, match="no evaluation in"):
        write_report(run, sft=run / "nothing")
    write_evaluation(run / "sft" / "evaluations", summary(0, [row(i, right=False) for i in range(10)]), rows)
    write_evaluation(run / "sft" / "evaluations", summary(75, rows, format_rate=0.77), rows)
    head, cells = table_cells(write_report(run, sft=run / "sft").read_text())
    assert cells[head.index(["SFT"])][0] == "60.0"
    assert cells[head.index(["SFT", "format"])] == ["77.0"]


def test_a_baseline_that_the_table_cannot_show_is_refused(run):
    rows = [dataclasses.replace(row(i, right=True), file="other") for i in range(10)]
    other = dataclasses.replace(summary(0, rows), files=(dataclasses.replace(summary(0, rows).files[0], name="other"),))
    write_evaluation(run / "sft" / "evaluations", other, rows)
    with pytest.raises(ValueError, match=r"--sft .*sft .*\bon other, .* on .*: "):
        write_report(run, sft=run / "sft")
    shutil.rmtree(run / "evaluations")
    with pytest.raises(ValueError, match=r"--sft .*sft .*\bon other, .* on nothing"):
        write_report(run, sft=run / "sft")


def test_evaluation_compared_with_an_earlier_one_elsewhere(tmp_path, run):
    folder = tmp_path / "evaluate"
    rows = [row(i, right=i > 0) for i in range(10)]
    write_evaluation(folder / "evaluations", summary(0, rows), rows)
    compare(run / "evaluations" / "step-000000", folder / "evaluations" / "step-000000")
    head, cells = table_cells(write_report(folder).read_text())
    assert cells[head.index(["before"])][0] == "30.0"
    assert cells[head.index(["p"])] == ["0.070"]


def test_other_rows_give_no_p_value(run):
    after = [row(i, right=True) for i in range(1, 11)]
    write_evaluation(run / "evaluations", summary(3, after), after)
    head, cells = table_cells(write_report(run).read_text())
    assert cells[head.index(["p"])] == ["–"]


def test_skipped_rows_and_steps_are_told(run):
    write_lines(run / "metrics.jsonl", [{"step": 3, "reward/mean": None, "skipped_steps": 2.0}])
    html = write_report(run).read_text()
    assert "2 steps were skipped" in html
    assert "image &lt;gone&gt;.png does not exist" in html


def test_rows_that_keep_the_order_of_their_options_are_told(run):
    assert "keep the order of their options" not in write_report(run).read_text()
    for path in (run / "data.json", *run.glob("evaluations/step-*/summary.json")):
        content = json.loads(path.read_text())
        content["files"][0]["kept_order"] = 17
        path.write_text(json.dumps(content))
    html = write_report(run).read_text()
    assert "17 keep the order of their options</summary>" in html
    assert "<small>17 keep theirs</small>" in html


def test_a_folder_of_something_else_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="is not a run folder"):
        write_report(tmp_path)


def test_the_folder_of_a_names_runs_names_the_newest(tmp_path):
    for name in ("2026-01-01", "2026-01-02"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").touch()
    with pytest.raises(ValueError, match=r"2026-01-02 is one"):
        write_report(tmp_path)


@pytest.mark.slow
def test_command_line(run):
    command = [sys.executable, "-m", "rlmed.report"]
    done = subprocess.run([*command, str(run)], capture_output=True, text=True, check=True)
    assert done.stdout == f"report: {run / 'report.html'}\n"
    failed = subprocess.run([*command, str(run / "nowhere")], capture_output=True, text=True, check=False)
    assert failed.returncode != 0
    assert failed.stderr.startswith("error: ")


def test_groups_are_best_worst_and_from_all_over(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    rewards = np.random.default_rng(0).permutation(300) / 300
    write_lines(path, [line(i, i, rewards=(float(r), float(r))) for i, r in enumerate(rewards)])
    with path.open("a") as file:
        file.write('{"step": 300, "comp')
    shown = show_groups(path, Pictures())
    assert len(shown) == GROUPS
    assert len({group["index"] for group in shown}) == GROUPS
    by_pick = {pick: [g for g in shown if g["pick"] == pick] for pick in ("best", "worst", "run")}
    assert [g["reward"] for g in by_pick["best"]] == sorted(rewards)[:-21:-1]
    assert [g["reward"] for g in by_pick["worst"]] == sorted(rewards)[:20]
    steps = [g["step"] for g in by_pick["run"]]
    assert steps == sorted(steps)
    assert steps[0] < 30
    assert steps[-1] > 270


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_few_groups_are_all_shown(tmp_path, count):
    path = tmp_path / "rollouts.jsonl"
    write_lines(path, [line(1, i, rewards=(float(i), 0.0)) for i in range(count)])
    shown = show_groups(path, Pictures())
    assert sorted(group["index"] for group in shown) == list(range(count))
    if count == 5:
        assert [group["pick"] for group in shown] == ["best", "worst", "best", "worst", "run"]
    assert show_groups(tmp_path / "missing.jsonl", Pictures()) == []


def test_rollouts_of_an_earlier_version_are_shown(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    earlier = line()
    earlier["kind"] = earlier.pop("question_type")
    write_lines(path, [earlier])
    (group,) = show_groups(path, Pictures())
    assert group["question_type"] == "anatomy"


def test_alike_completions_are_shown_once_with_the_best_first(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    write_lines(path, [line(texts=("bad", GOOD, "bad", "nan"), rewards=(0.0, 2.0, 0.0, None))])
    (group,) = show_groups(path, Pictures())
    assert [(entry["reward"], entry["count"]) for entry in group["completions"]] == [(2.0, 1), (0.0, 2), (None, 1)]
    assert (group["correct"], group["total"], group["outcome"]) == (1, 4, "some right")


def test_a_group_without_rewards_is_neither_best_nor_worst(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    write_lines(path, [line(i, i, rewards=(r, r)) for i, r in enumerate((None, 1.0, 2.0, None))])
    shown = {group["index"]: (group["pick"], group["reward"]) for group in show_groups(path, Pictures())}
    assert shown == {2: ("best", 2.0), 1: ("best", 1.0), 0: ("run", None), 3: ("run", None)}


def test_the_worst_completion_stands_among_the_first(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    write_lines(path, [line(texts=[f"text {i}" for i in range(12)], rewards=[float(i) for i in range(12)])])
    (group,) = show_groups(path, Pictures())
    assert [entry["reward"] for entry in group["completions"]] == [11, 10, 0, 9, 8, 7, 6, 5]
    assert group["hidden"] == 4


def test_completions_are_taken_apart():
    found = take_apart(GOOD, "B")
    assert (found["reasoning"], found["answer"], found["raw"]) == ("The bone is bright.", "B", None)
    assert (found["letter"], found["correct"]) == ("B", True)
    found = take_apart("well <answer>A</answer>", "B")
    assert (found["reasoning"], found["raw"], found["letter"], found["correct"]) == (
        None,
        "well <answer>A</answer>",
        "A",
        False,
    )
    long = take_apart("x" * (CHARACTERS + 5), "B")
    assert (len(long["raw"]), long["cut"], long["letter"]) == (CHARACTERS, 5, None)


def test_with_one_evaluation_right_and_wrong_rows_are_shown():
    rows = [row(i, right=i % 2 == 0) for i in range(200)] + [row(0, True, control="shuffled")]
    shown = show_rows([], rows, Pictures())
    assert [entry["outcome"] for entry in shown] == ["right"] * 30 + ["wrong"] * 30
    assert all(len(entry["answers"]) == 1 for entry in shown)


def test_all_images_of_a_question_are_shown_in_order_with_their_number(tmp_path):
    first, *more = numbered(tmp_path, 4)
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1}])
    # the third one is gone
    write_lines(
        tmp_path / "rollouts.jsonl",
        [line(1, 0, image=first, more_images=[*more[:1], "/gone.png", *more[1:]]), line(1, 1, image=more[0])],
    )
    rows = [row(0, True, image=more[0], more_images=(first,)), row(1, True, image=first), row(2, True)]
    write_evaluation(tmp_path / "evaluations", summary(0, rows), rows)
    page = Page(write_report(tmp_path).read_text())
    shown = [(a["class"], a.get("aria-label")) for tag, a in page.tags if "picture" in a.get("class", "")]
    assert shown == [
        ("picture p0", "image 1 of 5 of the question"),
        ("picture p1", "image 2 of 5 of the question"),
        ("no-picture", None),
        ("picture p2", "image 4 of 5 of the question"),
        ("picture p3", "image 5 of 5 of the question"),
        ("picture p1", "image of the question"),
        ("picture p1", "image 1 of 2 of the question"),
        ("picture p0", "image 2 of 2 of the question"),
        ("picture p0", "image of the question"),
        ("no-picture", None),
    ]


def test_the_report_of_a_large_run_stays_small(tmp_path):
    rng = np.random.default_rng(0)
    images = [tmp_path / f"{i}.png" for i in range(60)]
    for path in images:  # noise: nothing is larger as JPEG
        Image.fromarray(rng.integers(0, 256, (224, 224, 3), dtype=np.uint8)).save(path)
    texts = [f"{i} " + "<long> " * 2000 for i in range(16)]
    groups = [line(i, i, texts=texts, rewards=[1.0] * 16, image=str(images[i % 60])) for i in range(100)]
    write_lines(tmp_path / "rollouts.jsonl", groups)
    write_lines(
        tmp_path / "metrics.jsonl", [{"step": i, "reward/mean": 0.1, "kl": 0.2, "entropy": 1.0} for i in range(5000)]
    )
    size = write_report(tmp_path).stat().st_size
    assert size < 8e6


def test_long_curves_are_averaged_down_and_gaps_left_out():
    lines = [{"step": i, "kl": None if i % 2 else 1.0, "lr": 0.0, "mystery": 3.0} for i in range(1, 4001)]
    (plot,) = draw_metrics(lines)
    assert plot.title == "KL to the reference"
    assert len(plot.svg) < 100 * MAX_POINTS
    assert draw_metrics([]) == []
    assert draw_metrics([{"step": 1, "kl": None}]) == []


def test_names_of_rewards_are_no_markup_and_no_mathematics():
    (plot,) = draw_metrics([{"step": i, "reward/mean": 1.0, "reward/$a_b$<b>": 0.5} for i in (1, 2, 3)])
    assert "$a_b$&lt;b&gt;" in plot.svg


def test_running_mean_by_hand():
    np.testing.assert_allclose(running_mean(np.array([1.0, 2.0, 6.0, 3.0]), 3), [1.5, 3.0, 11 / 3, 4.5])
    np.testing.assert_allclose(running_mean(np.array([1.0, 5.0]), 1), [1.0, 5.0])


@pytest.mark.parametrize("prefix", ["reward_std", "spread"], ids=["now", "rlmed 0.1"])
def test_what_a_curriculum_did_is_drawn(prefix):
    lines = [
        {"step": i, "prompts/too_easy": 0.25, "prompts/too_hard": 0.5, f"{prefix}/CT": 0.4, f"{prefix}/none": 0.2}
        for i in (1, 2, 3)
    ]
    aside, spread = draw_metrics(lines)
    assert (aside.title, spread.title) == ("Prompts set aside", "Standard deviation of rewards")
    assert all(name in aside.svg for name in ("too easy", "too hard"))
    assert all(name in spread.svg for name in ("CT", "none"))


def test_reliability_has_a_section_also_that_of_an_earlier_version(tmp_path):
    folder = write_evaluation(tmp_path / "evaluations", summary(0, [row(0, True)]), [row(0, True)])
    assert "Is it calibrated?" not in write_report(tmp_path).read_text()
    (folder / "trust.json").write_text(TRUST)
    page = write_report(tmp_path).read_text()
    assert "Is it calibrated?" in page
    assert "<b>0.500</b><small>0.400–0.600</small>" in page
