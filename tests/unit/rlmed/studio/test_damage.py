"""Runs whose files are damaged or hostile: every page answers, and the other runs are shown."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("starlette", reason="needs rlmed's extra 'studio'")

from rlmed.core.files.exclusive import OWNER_FILE
from rlmed.studio.index import Index, prompt_key
from rlmed.studio.runs import Run, Runs
from tests.unit.rlmed.report.test_page import Page, line, write_lines
from tests.unit.rlmed.studio.run_folders import client_of, write_run

DEEP = "[" * 30_000
ALIASES = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{one}'] * 9)}]\n" for one, name in zip("abcdefghi", "bcdefghij", strict=True)
)
"""An array of 9^10 texts, in a few lines."""
HUGE = f"1{'0' * 400}"


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def write_metrics(text: str):
    return lambda run: (run / "metrics.jsonl").write_text(f"{text}\n")


def write_owner(**card: object):
    text = json.dumps({"machine": "m", "pid": 1, "start": 1} | card)
    return lambda run: (run / OWNER_FILE).write_text(text)


def change(name: str, text: str):
    return lambda run: (run / name).write_text(text)


def late(run: Path) -> None:
    os.utime(run / "metrics.jsonl", (1e12, 1e12))


DAMAGES = {
    "nested": write_metrics(DEEP),
    "large": write_metrics(f'{{"step": 1, "loss": {HUGE}, "reward/mean": {HUGE}}}'),
    "large_sft": lambda run: [(run / "rollouts.jsonl").unlink(), write_metrics(f'{{"step": 1, "loss": {HUGE}}}')(run)],
    "skipped": write_metrics('{"step": 1, "skipped_steps": "many", "kl": [1]}'),
    "pipe": lambda run: pipe(run / "metrics.jsonl"),
    "pipes": lambda run: [pipe(run / name) for name in ("rollouts.jsonl", "config.yaml", "timeline.jsonl")],
    "pipe_owner": lambda run: pipe(run / OWNER_FILE),
    "pid": write_owner(pid=float("inf")),
    "large_pid": write_owner(pid=2**40),
    "nested_owner": change(OWNER_FILE, DEEP),
    "summary": change("evaluations/step-000003/summary.json", DEEP),
    "list_summary": change("evaluations/step-000003/summary.json", '{"files": [[]], "step": 1}'),
    "pipe_summary": lambda run: pipe(run / "evaluations/step-000003/summary.json"),
    "pipe_rows": lambda run: pipe(run / "evaluations/step-000003/rows.jsonl"),
    "list": change("config.yaml", "[1, 2]"),
    "aliases": change("config.yaml", ALIASES),
    "large configuration": change("config.yaml", "a: " + "b" * 2**17),
    "model": change("config.yaml", "model: [a]"),
    "versions": change("versions.json", "[1]"),
    "negative": change("timeline.jsonl", '{"name": "a", "start": 9, "duration": -3, "depth": 0}\n'),
    "endless": change("timeline.jsonl", '{"name": "a", "start": 1, "duration": Infinity, "depth": 0}\n'),
    "late": late,
}


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """Folder of a good run and of a run for each damage."""
    top = tmp_path_factory.mktemp("damaged")
    write_run(top / "good")
    for name, damage in DAMAGES.items():
        # the picture may be the good one's
        shutil.copytree(top / "good", top / name)
        damage(top / name)
    return top


@pytest.fixture(scope="module")
def browser(damaged, tmp_path_factory):
    return client_of(damaged, cache=tmp_path_factory.mktemp("cache"))


def test_damaged_runs_are_listed_beside_a_good_one(damaged, browser):
    glances = {glance.run.name: glance for glance in Runs([damaged]).glances()}
    assert glances.keys() == {"good", *DAMAGES}
    assert (glances["good"].steps, glances["good"].reward) == (3, 1.5)
    assert (glances["large"].steps, glances["large"].reward) == (1, None)
    assert (glances["pipe"].kind, glances["pid"].state, glances["large_pid"].state) == ("train", "running", "running")
    for address in ("/", "/runs/live", "/rollouts", "/evaluate", "/ask"):
        answer = browser.get(address)
        assert (answer.status_code, ">good<" in answer.text) == (200, address != "/ask")


@pytest.mark.parametrize("name", DAMAGES)
def test_the_pages_of_a_damaged_run_answer(browser, name):
    for address in ("/run?name={}", "/run/live?name={}", "/compare?run=good&run={}"):
        assert browser.get(address.format(name)).status_code == 200, address
    rollouts = [browser.get(f"{page}?run={name}").status_code for page in ("/rollouts", "/rollouts/live")]
    assert rollouts == ([404, 404] if name in ("pipes", "large_sft") else [200, 200])
    assert browser.get(f"/evaluate?run={name}").status_code == 200


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nested", "metrics.jsonl, line 1 is not JSON"),
        ("list", "not a mapping"),
        ("negative", "timeline.jsonl is damaged"),
        ("pipe_rows", "rows.jsonl is no file of the run"),
    ],
)
def test_the_page_of_a_damaged_run_says_what_is_wrong(browser, name, said):
    assert said in browser.get(f"/run?name={name}").text


def test_only_files_and_folders_inside_of_a_run_are_its_files(tmp_path):
    run = Run("run", write_run(tmp_path / "run"))
    (run.folder / "out").symlink_to(tmp_path)
    (run.folder / "loop").symlink_to(run.folder / "loop")
    os.mkfifo(run.folder / "pipe")
    for name in ("out", "loop", "pipe"):
        assert run.file(name).name == ".elsewhere"
    for name in ("metrics.jsonl", "evaluations", "none"):
        assert run.file(name) == run.folder / name


def test_pictures_that_are_none_are_not_sent(tmp_path):
    run = write_run(tmp_path / "run")
    (tmp_path / "empty.png").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe.png")
    Image.new("1", (15_000, 15_000)).save(tmp_path / "large.png")
    secret = tmp_path / "secret"
    secret.write_text("no picture")
    paths = [tmp_path / "empty.png", tmp_path / "pipe.png", tmp_path / "large.png", secret, "/dev/zero"]
    paths += ["x" * 5000, "a\0b", "\ud800", f"{tmp_path}/secret/x", tmp_path]
    write_lines(run / "rollouts.jsonl", [line(image=str(path), step=1) for path in paths])
    client = client_of(tmp_path, cache=tmp_path / "cache")
    page = client.get("/rollouts?run=run&sort=oldest")
    assert page.status_code == 200
    assert page.text.count("Which part") == len(paths)
    groups = [json.loads(entry) for entry in (run / "rollouts.jsonl").read_text().splitlines()]
    addresses = [
        f"/image?run=run&rollout={2 * number + 1}&number=0&prompt={prompt_key(group)}"
        for number, group in enumerate(groups)
    ]
    assert [client.get(address).status_code for address in addresses] == [404] * len(paths)
    Image.new("1", (1500, 1500)).save(tmp_path / "large.png")
    assert client.get(addresses[2]).status_code == 200


def test_an_index_that_cannot_be_used_is_said_on_each_page(tmp_path):
    write_run(tmp_path / "runs" / "run")
    (tmp_path / "cache").write_text("no folder")
    client = client_of(tmp_path / "runs", cache=tmp_path / "cache")
    for page in ("/rollouts", "/rollouts/live"):
        answer = client.get(f"{page}?run=run")
        assert (answer.status_code, "see --cache" in answer.text) == (500, True)
    assert client.get("/image?run=run&rollout=1&number=0").status_code == 404


def test_nothing_is_searched_for_a_page_that_shows_the_same(tmp_path, monkeypatch):
    write_run(tmp_path / "runs" / "run")
    client = client_of(tmp_path / "runs", cache=tmp_path / "cache")
    tag = client.get("/rollouts/live?run=run").headers["etag"]
    monkeypatch.setattr("rlmed.studio.search.search", None)
    assert client.get("/rollouts/live?run=run", headers={"If-None-Match": tag}).status_code == 304


def test_pages_heal_a_damaged_index(tmp_path):
    write_run(tmp_path / "runs" / "run")
    client = client_of(tmp_path / "runs", cache=tmp_path / "cache")
    assert client.get("/rollouts?run=run").status_code == 200
    (path,) = (tmp_path / "cache").glob("*.sqlite3")
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(4 * 4096)  # the first pages are read when it is opened
        file.write(b"damage" * (size // 6))
    shown = ""
    for _ in range(50):  # each waits a little for the index, which a thread fills
        answers = [client.get(f"{page}?run=run&words=bright") for page in ("/rollouts", "/rollouts/live")]
        assert [answer.status_code for answer in answers] == [200, 200]
        shown = " ".join(Page(answers[0].text).text.split())
        if "6 rollouts found" in shown:
            break
    assert "6 rollouts found" in shown


def test_a_configuration_beyond_the_limit_is_not_read_whole(tmp_path):
    run = write_run(tmp_path / "run")
    with (run / "config.yaml").open("ab") as file:
        file.truncate(2**40)  # without data: more than the memory, if it was read
    assert "characters" in client_of(tmp_path, cache=tmp_path / "cache").get("/run?name=run").text


def test_an_index_that_cannot_be_filled_says_why(tmp_path, monkeypatch):
    write_run(tmp_path / "runs" / "run")

    def full(*_):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(Index, "update", full)
    client = client_of(tmp_path / "runs", cache=tmp_path / "cache")
    shown = client.get("/rollouts?run=run").text
    assert ["disk is full" in shown, "--cache" in shown, "<progress" in shown] == [True, True, False]
    monkeypatch.undo()
    assert "disk is full" not in client.get("/rollouts?run=run").text


def test_a_run_whose_clock_was_ahead_does_not_go_on_until_that_day(tmp_path):
    run = write_run(tmp_path / "run", report=False)
    for path in run.iterdir():
        os.utime(path, (4e9, 4e9))
    assert Runs([tmp_path]).glances()[0].state == "stopped"
