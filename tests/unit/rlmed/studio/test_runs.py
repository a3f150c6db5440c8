import json
import os
import re
import shutil
import time
from pathlib import Path

import pytest

from rlmed.core.files.exclusive import OWNER_FILE, hold
from rlmed.core.files.ownership import Owner
from rlmed.recording.recorder import RunRecorder
from rlmed.report.page import write_report
from rlmed.studio.runs import DEPTH, Runs, labels
from tests.unit.rlmed.studio.run_folders import client_of, write_run

LONG_AGO = time.time() - 86400


def age(folder, moment=LONG_AGO):
    """Set the times of all files; the report is the youngest."""
    for path in folder.iterdir():
        os.utime(path, (moment, moment + (path.name == "report.html")))


@pytest.fixture
def run(tmp_path):
    folder = write_run(tmp_path / "top" / "run", steps=2, planned=5, report=False)
    age(folder)
    return folder


def state(run):
    return Runs([run.parent]).glances()[0].state


def test_runs_are_found_at_any_depth_but_not_beyond(tmp_path):
    deep = tmp_path.joinpath(*"abc")
    write_run(deep / "run")
    write_run(deep / "run" / "inner")
    write_run(deep / "run" / "checkpoints" / "none")
    write_run(deep / "x" / "y" / "too_deep")
    (tmp_path / "no_run").mkdir()
    assert DEPTH == 4
    assert [run.name for run in Runs([tmp_path]).all()] == ["a/b/c/run"]
    assert [run.name for run in Runs([deep]).all()] == ["run", "run/inner", "x/y/too_deep"]


def test_names_stay_unique_with_several_folders(tmp_path):
    for top in ("a", "b"):
        write_run(tmp_path / top / "outputs" / "run")
    own = write_run(tmp_path / "own")
    folders = [tmp_path / "a" / "outputs", tmp_path / "b" / "outputs", own]
    assert [run.name for run in Runs(folders).all()] == ["a/outputs/run", "b/outputs/run", "own"]
    assert Runs([own]).named("own").folder == own


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (["/outputs"], ["outputs"]),
        (["/"], ["run"]),
        (["/outputs", "/a/outputs"], ["outputs", "a/outputs"]),
        (["/x/1/outputs", "/y/1/outputs", "/y/2/outputs"], ["x/1/outputs", "y/1/outputs", "2/outputs"]),
        (["/p/x", "/q/x/outputs", "/r/outputs"], ["p/x", "q/x/outputs", "r/outputs"]),
    ],
)
def test_folders_are_named_by_what_tells_them_apart(folders, expected):
    assert labels([Path(folder) for folder in folders]) == expected


def test_links_of_runs_of_one_name_lead_to_their_own(tmp_path):
    for top, steps in (("a", 2), ("b", 3)):
        write_run(tmp_path / top / "outputs" / "run", steps=steps)
    client = client_of(tmp_path / "a" / "outputs", tmp_path / "b" / "outputs", cache=tmp_path / "cache")
    links = dict(re.findall(r'<th scope="row" class="left"><a href="([^"]*)"[^>]*>([^<]*)', client.get("/").text))
    assert sorted(links.values()) == ["a/outputs/run", "b/outputs/run"]
    for address, name in links.items():
        assert f"step <b>{2 if name.startswith('a') else 3}</b>" in client.get(address).text


def test_a_run_below_two_of_the_folders_is_listed_once(tmp_path):
    inner = write_run(tmp_path / "top" / "top")
    write_run(tmp_path / "top" / "top" / "top")
    above = tmp_path.name
    names = [run.name for run in Runs([tmp_path / "top", inner]).all()]
    assert names == [f"{above}/top/top", f"{above}/top/top/top"]
    assert [run.name for run in Runs([inner]).all()] == ["top", str(inner / "top")]


def test_a_glance_tells_kind_steps_and_last_figures(run):
    glance = Runs([run.parent]).glances()[0]
    assert (glance.kind, glance.steps, glance.planned) == ("train", 2, 5)
    assert (glance.reward, glance.accuracy) == (1.0, 0.75)
    (run / "rollouts.jsonl").unlink()
    (run / "metrics.jsonl").write_text('{"step": 7, "loss": 0.5}\n{"step": 8, "lo')
    glance = Runs([run.parent]).glances()[0]
    assert (glance.kind, glance.steps, glance.planned, glance.loss) == ("sft", 7, None, 0.5)
    (run / "metrics.jsonl").unlink()
    assert Runs([run.parent]).glances()[0].kind == "evaluate"


def test_a_run_that_wrote_its_report_last_is_finished(run):
    assert state(run) == "stopped"
    (run / "report.html").write_text("")
    assert state(run) == "finished"
    os.utime(run / "report.html", (LONG_AGO - 60, LONG_AGO - 60))  # of the run before it was resumed
    assert state(run) == "stopped"


def test_a_run_that_its_preflight_refused_says_so_and_why(tmp_path):
    run = tmp_path / "top" / "run"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("steps: 5\n")
    (run / "versions.json").write_text("{}")
    RunRecorder(run).record_refusal("all rewards are 0: raise <b>rollout.max_tokens</b>")
    glance = Runs([run.parent]).glances()[0]
    assert (glance.state, glance.kind, glance.planned) == ("refused", "train", 5)
    client = client_of(run.parent, cache=tmp_path / "cache")
    for address in ("/", "/run?name=run"):
        assert "all rewards are 0: raise &lt;b&gt;rollout.max_tokens" in client.get(address).text
    with hold(run):
        assert state(run) == "running"  # it is started again
        assert all("all rewards are 0" not in client.get(address).text for address in ("/", "/run?name=run"))


def test_a_run_runs_while_its_process_lives(run):
    with hold(run):
        assert state(run) == "running"
    assert state(run) == "stopped"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({"start": 1}, "killed"), ({"machine": "another"}, "silent"), ({"pid": "no number"}, "silent")],
)
def test_the_mark_of_a_process_that_cannot_be_asked(run, changes, expected):
    me = Owner.me()
    (run / OWNER_FILE).write_text(json.dumps({"machine": me.machine, "pid": me.pid, "start": me.start} | changes))
    os.utime(run / OWNER_FILE, (LONG_AGO, LONG_AGO))
    assert state(run) == expected
    os.utime(run / "metrics.jsonl")
    assert state(run) == ("killed" if expected == "killed" else "running")


def test_a_run_without_a_mark_runs_while_it_writes(run):
    os.utime(run / "metrics.jsonl")
    assert state(run) == "running"


def test_a_run_that_has_just_started_is_listed(tmp_path):
    folder = tmp_path / "run"
    (folder / ".hydra").mkdir(parents=True)
    assert Runs([tmp_path]).all() == []
    with hold(folder):
        glance = Runs([tmp_path]).glances()[0]
        assert (glance.kind, glance.state) == ("starting", "running")


def test_a_glance_is_renewed_when_the_run_writes(run):
    runs = Runs([run.parent])
    found, stamp = runs.all()[0], runs.stamp(runs.all()[0])
    assert runs.stamp(found) == stamp
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "reward/mean": 2.5}\n')
    assert runs.stamp(found) != stamp
    assert runs.glance(found).reward == 2.5


def test_damaged_files_leave_figures_out(run):
    (run / "metrics.jsonl").write_bytes(b'\xff\xfe\n{"step": "many"}\nnull\n[1]\n')
    (run / "config.yaml").write_text("steps: many\n")
    (run / "evaluations" / "step-000002" / "summary.json").write_text("{}")
    glance = Runs([run.parent]).glances()[0]
    assert (glance.steps, glance.planned, glance.reward, glance.accuracy) == (0, None, None, None)


def test_the_folder_of_a_run_is_not_changed(run):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    Runs([run.parent]).glances()
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_a_run_removed_meanwhile_is_no_error(run):
    runs = Runs([run.parent])
    found = runs.all()[0]
    shutil.rmtree(run)
    assert runs.glance(found).steps == 0


def test_pages_and_report_agree_on_the_headline_reward(tmp_path):
    """Of 25 steps, the figures are of the first and the last ten, wherever they are shown."""
    run = write_run(tmp_path / "top" / "run", steps=25, planned=25, report=False)
    write_report(run)
    assert Runs([run.parent]).glances()[0].reward == sum(range(16, 26)) / 2 / 10
    page = client_of(run.parent, cache=tmp_path / "cache").get("/run?name=run").text
    tile = r"<small>reward</small><b><span class=\"was\">2.75 →</span> +10.25</b><small>([^<]*)</small>"
    notes = {note for text in (page, (run / "report.html").read_text()) for note in re.findall(tile, text)}
    assert notes == {"means of the first and the last 10 steps"}
    assert len(re.findall(tile, page)) == len(re.findall(tile, (run / "report.html").read_text())) == 1
