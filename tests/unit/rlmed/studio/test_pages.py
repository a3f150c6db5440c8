import itertools
import json
import os
import re
import shutil

import pytest
import yaml
from markupsafe import Markup

from rlmed.report.plots import draw_comparison, draw_metrics
from rlmed.studio import detail, listing
from rlmed.studio.comparison import differences
from rlmed.studio.curves import draw_plots, plain_svg
from rlmed.studio.detail import workers
from rlmed.studio.pages import PAGES
from rlmed.studio.server import SERVED
from tests.unit.rlmed.report.test_page import Page, line, write_lines
from tests.unit.rlmed.studio.run_folders import client_of, write_run


def text_of(answer):
    assert answer.status_code == 200, answer.text
    return " ".join(Page(answer.text).text.split())


def cells(html, label):
    """Texts of the rows of the table in the region of this name."""
    table = re.search(rf'aria-label="{label}".*?<tbody>(.*?)</tbody>', html, re.DOTALL)[1]
    rows = re.findall(r"<tr.*?>(.*?)</tr>", table, re.DOTALL)
    return [
        [
            " ".join(re.sub(r"<[^>]+>", " ", cell).split())
            for cell in re.findall(r"<t[dh].*?>(.*?)</t[dh]>", row, re.DOTALL)
        ]
        for row in rows
    ]


def test_the_list_shows_state_steps_and_last_figures(client):
    rows = cells(client.get("/").text, "Runs")
    assert [row[1:7] for row in sorted(rows)] == [
        [f"day/{name}", "finished", "train", "3 / 3", "1.50", "75.0"] for name in ("a", "b")
    ]
    assert [row[1] for row in cells(client.get("/?words=DAY+b").text, "Runs")] == ["day/b"]
    assert "No run's name contains “zebra”" in text_of(client.get("/?words=zebra"))


def test_a_folder_without_runs_says_how_to_start_one(tmp_path):
    assert "No runs yet" in text_of(client_of(tmp_path, cache=tmp_path / "cache").get("/"))


def test_the_page_of_a_run_shows_curves_accuracy_time_and_configuration(client):
    answer = client.get("/run?name=day/a")
    text = text_of(answer)
    for shown in ("step 3 of 3", "Reward", "KL to the reference", "a processor", "group_size: 2", "torch2.13"):
        assert shown in text
    assert cells(answer.text, "Held-out accuracy")[0][:4] == ["ct", "4", "75.0 30.1–95.4", "75.0 30.1–95.4"]
    assert re.search(r"rollout\s*75\.0 %\s*3\.0 s", text)


def test_a_run_whose_files_are_damaged_says_so_and_shows_the_rest(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text("not JSON\n")
    (run / "config.yaml").write_text("[")
    (run / "timeline.jsonl").write_text('{"name": 1}\n')
    (run / "versions.json").write_text("{")
    text = text_of(client_of(tmp_path, cache=tmp_path / "cache").get("/run?name=run"))
    assert "metrics.jsonl, line 1 is not JSON" in text
    assert "config.yaml is damaged" in text
    assert "Held-out accuracy" in text


def test_a_live_part_is_sent_only_when_something_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(detail, "REST", 0.0)
    run = write_run(tmp_path / "run", report=False)
    client = client_of(tmp_path, cache=tmp_path / "cache")
    for page, address in (
        ("/run?name=run", "/run/live?name=run"),
        ("/", "/runs/live"),
        ("/rollouts?run=run", "/rollouts/live?run=run"),
    ):
        first = client.get(address)
        live = [attributes for _, attributes in Page(client.get(page).text).tags if "data-live" in attributes]
        assert [(part["data-live"], part["data-tag"]) for part in live] == [(address, first.headers["etag"])]
        again = {"If-None-Match": first.headers["etag"]}
        assert client.get(address, headers=again).status_code == 304
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"step": 4, "reward/mean": 9.25}\n')
        with (run / "rollouts.jsonl").open("a") as file:
            file.write(json.dumps(line(step=4)) + "\n")
        changed = client.get(address, headers=again)
        assert changed.status_code == 200
        assert changed.headers["etag"] != first.headers["etag"]


def test_a_comparison_shows_what_differs(client):
    answer = client.get("/compare?run=day/a&run=day/b&run=day/a")
    assert cells(answer.text, "Settings that differ") == [["seed", "0", "7"]]
    assert cells(answer.text, "Accuracy") == [["ct", "75.0 30.1–95.4", "75.0 30.1–95.4"]]
    assert answer.text.count("<figure") == 4  # total, format, KL, length
    assert "Choose two runs" in text_of(client.get("/compare?run=day/a"))
    assert "Choose two runs" in text_of(client.get("/compare"))


def test_differences_are_by_dotted_key_and_tell_absent_from_null():
    configs = [{"a.b": None, "c": True, "d": 1}, {"c": True, "d": 1.0}]
    assert differences(configs) == [{"key": "a.b", "values": ["null", "–"]}, {"key": "d", "values": ["1", "1.0"]}]


def test_the_rollouts_page_shows_picture_question_reasoning_answer_and_rewards(client):
    answer = client.get("/rollouts?run=day/a&step_from=2&step_to=2&sort=oldest")
    text = text_of(answer)
    assert text.count("Which part shows number") == 2
    assert "The bone is bright." in text
    assert "B) knee" in text
    assert re.search(r"B ✓\s*reward 2\.00\s*format 1\.00\s*choice 0\.50\s*advantage \+0\.71\s*9 tokens", text)
    assert "policy version 3–4" in text
    assert "Policy version: number of optimizer updates" in text
    assert re.search(r"no answer ✗\s*reward 0\.00.*not in the format", text)
    images = [
        attributes["src"]
        for tag, attributes in Page(answer.text).tags
        if tag == "img" and "/image" in attributes["src"]
    ]
    assert len(images) == 2
    assert client.get(images[0]).headers["content-type"] == "image/jpeg"


def test_a_page_that_took_long_is_not_drawn_anew_at_every_step(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", report=False)
    client = client_of(tmp_path, cache=tmp_path / "cache")
    for rest, drawn_anew in ((1e6, False), (0.0, True)):
        monkeypatch.setattr(detail, "REST", rest)
        before = client.get("/run/live?name=run")
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"step": 4, "reward/mean": 9.25}\n')
        after = client.get("/run/live?name=run", headers={"If-None-Match": before.headers["etag"]})
        assert (after.status_code == 200) == drawn_anew
    (run / "report.html").write_text("<p>done</p>")
    monkeypatch.setattr(detail, "REST", 1e6)
    assert "finished" in text_of(client.get("/run/live?name=run"))


def test_of_many_runs_the_latest_are_shown_and_the_others_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(listing, "MOST", 2)
    for number in range(3):
        write_run(tmp_path / f"run{number}", report=False)
        for path in (tmp_path / f"run{number}").rglob("*"):
            os.utime(path, (1e9 + number, 1e9 + number))
    client = client_of(tmp_path, cache=tmp_path / "cache")
    text = text_of(client.get("/"))
    assert "3 runs below" in text
    assert ["run2" in text, "run1" in text, "run0" in text, "and 1 that" in text] == [True, True, False, True]
    assert "run0" in text_of(client.get("/?words=run0"))


def test_a_prompt_over_training_is_a_link(client):
    answer = client.get("/rollouts?run=day/a")
    links = (attributes.get("href", "") for tag, attributes in Page(answer.text).tags if tag == "a")
    link = next(one for one in links if one.startswith("/rollouts?") and "prompt=" in one)
    text = text_of(client.get(link))
    assert "This prompt over training" in text
    assert "2 rollouts found" in text


def test_pages_of_results_keep_the_filters(tmp_path):
    run = write_run(tmp_path / "run")
    write_lines(run / "rollouts.jsonl", [line(step=step) for step in range(1, 31)])
    client = client_of(tmp_path, cache=tmp_path / "cache")
    answer = client.get("/rollouts?run=run&words=bright&reward_from=1&reward_to=2.1234567&sort=oldest&page=2")
    assert "page 2 of 2" in text_of(answer)
    previous = next(a["href"] for tag, a in Page(answer.text).tags if a.get("rel") == "prev")
    assert text_of(client.get(previous)).count("step 1 ·") == 1
    inputs = {a["name"]: a.get("value") for tag, a in Page(answer.text).tags if tag == "input" and "name" in a}
    assert [inputs[name] for name in ("words", "reward_from", "reward_to")] == ["bright", "1", "2.1234567"]


def test_a_missing_picture_is_named(tmp_path):
    write_run(tmp_path / "run")
    (tmp_path / "run.png").unlink()
    client = client_of(tmp_path, cache=tmp_path / "cache")
    text = text_of(client.get("/rollouts?run=run"))
    assert ["the picture is no longer there" in text, "--images" in text] == [True, False]
    records = tmp_path / "run" / "rollouts.jsonl"
    for path in ("/gone/for/ever/x.png", ""):
        write_lines(records, [{**json.loads(records.read_text().splitlines()[0]), "image": path}])
        assert "--images" not in text_of(client.get("/rollouts?run=run")), path


def test_boxes_and_several_pictures_are_drawn(tmp_path):
    run = write_run(tmp_path / "run")
    image = str(tmp_path / "run.png")
    truth = {"boxes": [[0.1, 0.2, 0.5, 0.6]], "frame": [40, 30]}
    texts = ("<think>.</think>\n<answer>[[4, 6, 20, 18]]</answer>", "none")
    boxed = line(
        texts=texts,
        image=image,
        more_images=[image],
        options=[],
        answer="[[4, 6, 20, 18]]",
        task="grounding",
        truth=truth,
    )
    write_lines(run / "rollouts.jsonl", [boxed])
    client = client_of(tmp_path, cache=tmp_path / "cache")
    html = " ".join(client.get("/rollouts?run=run").text.split())
    assert '<rect class="truth" x="10.00%" y="20.00%" width="40.00%" height="40.00%"/>' in html
    assert '<rect class="answer" x="10.00%" y="20.00%" width="40.00%" height="40.00%"/>' in html
    assert "image 2 of 2 of the question" in html


def test_the_health_of_workers():
    lines = [
        {"step": step, "rollout/workers_ready": 2.0, "rollout/idle_share": share, "rollout/workers_lost": step - 1}
        for step, share in ((1, 0.5), (2, 0.1))
    ]
    shown = {entry["label"]: entry["value"] for entry in workers(lines)}
    assert shown == {"workers ready": "2", "time without work": "30.0%", "workers lost": "1"}
    assert workers([{"step": 1, "rollout/push_apply_s": 1.0}]) == []
    assert workers([]) == []


def test_curves_keep_their_colours_without_styles():
    plots = draw_plots(lambda: draw_metrics([{"step": step, "kl": step / 2} for step in range(30)]))
    assert 'stroke="var(--series-1)"' in plots[0].svg
    assert "style" not in plots[0].svg
    assert plain_svg(Markup('<svg role="img">'), '"<b>') == '<svg role="img" aria-label="&quot;&lt;b&gt;">'


def test_a_run_keeps_its_colour_where_another_lacks_the_metric():
    lines = {"a": [{"step": 1, "kl": 1.0}], "b": [{"step": 1, "kl": 2.0, "entropy": 1.0}]}
    entropy = next(plot for plot in draw_comparison(lines) if plot.title == "Entropy")
    assert "--series-2" in entropy.svg
    assert "--series-1" not in entropy.svg


def test_the_chosen_colours_are_kept(folders, tmp_path):
    client = client_of(folders, cache=tmp_path)
    assert "data-theme" not in client.get("/").text
    answer = client.get("/theme?to=dark&back=/run%3Fname%3Dday/a")
    assert (answer.status_code, answer.headers["location"]) == (303, "/run?name=day/a")
    assert '<html lang="en" data-theme="dark">' in client.get("/").text
    client.get("/theme?to=<b>")
    assert 'data-theme="dark"' in client.get("/").text


@pytest.mark.parametrize(
    "address", ["/", "/run?name=day/a", "/compare?run=day/a&run=day/b", "/rollouts", "/rollouts?run=day/a"]
)
def test_pages_can_be_read_by_ear_and_walked_by_keyboard(client, address):
    html = client.get(address).text
    tags = Page(html).tags
    levels = [int(tag[1]) for tag, _ in tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert html.count("<table") == html.count("<caption") + html.count('<table class="faithfulness"')
    for field in re.findall(r"<(?:input|select)(?![^>]*type=\"hidden\")[^>]*>", html):
        labelled = "aria-label=" in field or re.search(
            r"<label[^>]*>(?:(?!</label>).)*" + re.escape(field), html, re.DOTALL
        )
        assert labelled, field
    assert all("alt" in attributes for tag, attributes in tags if tag == "img")
    first = next(attributes for tag, attributes in tags if tag == "a")
    assert first["href"] == "#main"
    assert any(attributes.get("id") == "main" for _, attributes in tags)


def test_each_page_has_its_own_path_and_all_assets_are_served(client):
    assert len({page.path for page in PAGES}) == len(PAGES)
    assert {"report.css", "studio.css", "studio.js", "icon.svg"} <= SERVED.keys()
    assert not [name for name in SERVED if name.endswith((".j2", ".py"))]


def test_the_run_folder_stays_as_it_is(folders, tmp_path):
    top = tmp_path / "top"
    shutil.copytree(folders / "day" / "a", top / "a")
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in top.rglob("*")}
    client = client_of(top, cache=tmp_path / "cache")
    for address in ("/", "/run?name=a", "/compare?run=a", "/rollouts?run=a&words=bright"):
        client.get(address)
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in top.rglob("*")} == before
    assert yaml.safe_load((top / "a" / "config.yaml").read_text())["steps"] == 3
    assert os.listdir(tmp_path / "cache")
