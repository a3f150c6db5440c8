"""The folder of a run: chosen, held, and removed when the command fails at once."""

from __future__ import annotations

import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rlmed.commandline import _removing, run_command
from rlmed.core.config.schema import RunConfig
from rlmed.core.files.exclusive import FolderInUseError, hold
from rlmed.recording.inputs import CONFIG_FILE
from rlmed.run_folders import new_folder


@pytest.mark.parametrize(("written", "kept"), [((".hydra", "rlmed.log"), False), ((".hydra", "metrics.jsonl"), True)])
def test_a_failed_command_leaves_no_folder_without_results(
    tmp_path: Path, written: tuple[str, ...], kept: bool
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for name in written:
        (folder / name).touch()
    with pytest.raises(ValueError, match="no model"), _removing([folder]):
        raise ValueError("no model")
    assert folder.exists() == kept
    (tmp_path / "earlier").mkdir()
    with pytest.raises(ValueError, match="no model"), _removing([]):
        raise ValueError("no model")
    assert (tmp_path / "earlier").exists()


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str, error: Exception | None = None) -> Path:
    """The folder that the command ran in; `error` is raised by it."""
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    folders: list[Path] = []

    def main(config: RunConfig, folder: Path) -> None:
        folders.append(folder)
        with pytest.raises(FolderInUseError), hold(folder):
            pass
        if error is not None:
            raise error

    run_command("train", main)
    return folders[0]


def failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str, **raised: Exception
) -> tuple[int, str]:
    """Exit status and the one line on stderr."""
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, *arguments, **raised)
    (line,) = capsys.readouterr().err.splitlines()
    return ended.value.code, line  # type: ignore[return-value]


def test_folders_wanted_at_once_are_different(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as threads:
        folders = list(threads.map(lambda _: new_folder(tmp_path / "runs" / "date"), range(24)))
    assert sorted(path.name for path in folders) == sorted(["date", *(f"date-{number}" for number in range(2, 25))])


def test_a_run_has_its_folder_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = run(monkeypatch, "hydra.run.dir=mine")
    assert folder == tmp_path / "mine"
    assert sorted(path.name for path in folder.iterdir()) == [".hydra", "rlmed.log"]
    with hold(folder):
        status, said = failed(monkeypatch, capsys, "hydra.run.dir=mine")
        assert status == 2
        assert said.startswith(f"error: {folder} is in use by process {os.getpid()} on ")
        assert said.endswith("wait until it has ended, or choose another folder with hydra.run.dir=FOLDER")


def test_resume_auto_makes_no_folder_beside_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    first = run(monkeypatch, "resume=auto", "name=mine")
    place = tmp_path / "outputs" / "mine"
    assert re.match(rf"resume=auto: nothing to resume in {re.escape(str(place))}, ", capsys.readouterr().out)
    run(monkeypatch, "resume=auto", "hydra.run.dir=named")
    assert f"nothing to resume in {tmp_path / 'named'}, " in capsys.readouterr().out
    (first / "checkpoints" / "step-000002").mkdir(parents=True)
    leftovers = [
        first / "checkpoints" / ".step-000004.partial",
        first / "evaluations" / ".step-000000.partial-00000000-1-1-0",
    ]
    for leftover in leftovers:
        leftover.mkdir(parents=True)
    assert run(monkeypatch, "resume=auto", "name=mine") == first
    assert "nothing to resume" not in capsys.readouterr().out
    assert not any(leftover.exists() for leftover in leftovers)
    assert run(monkeypatch, f"resume={first}", "name=mine") == first
    assert [path.name for path in (tmp_path / "outputs" / "mine").iterdir()] == [first.name]
    with hold(first):
        assert failed(monkeypatch, capsys, "resume=auto", "name=mine")[0] == 2
        (first / "checkpoints" / ".step-000006.partial").mkdir()
    assert (first / "checkpoints" / ".step-000006.partial").exists()


def test_resume_auto_passes_over_evaluations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    first = run(monkeypatch, "name=mine")
    (first / "checkpoints" / "step-000002").mkdir(parents=True)
    (alone := tmp_path / "outputs" / "mine" / "later" / "evaluations" / "step-000000").mkdir(parents=True)
    (alone / "summary.json").write_text("{}")
    (alone.parents[1] / CONFIG_FILE).write_text("")
    capsys.readouterr()
    assert run(monkeypatch, "resume=auto", "name=mine") == first
    assert "later" not in capsys.readouterr().out


@pytest.mark.parametrize("program", ["train", "evaluate"])
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("beside", [False, True])
def test_a_run_that_fails_at_once_leaves_no_folder(
    program: str, named: bool, beside: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if beside:
        (tmp_path / "outputs" / "mine" / "other").mkdir(parents=True)

    def main(config: RunConfig, folder: Path) -> None:
        raise ValueError("no such model")

    more = ["hydra.run.dir=outputs/mine/new"] if named else ["name=mine"]
    monkeypatch.setattr(sys, "argv", [program, *more])
    with pytest.raises(SystemExit):
        run_command(program, main)
    assert [path.name for path in tmp_path.rglob("*")] == (["outputs", "mine", "other"] if beside else [])


def test_a_refused_run_leaves_no_trace_in_the_folder_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Hydra writes its own files before it calls anybody."""
    monkeypatch.chdir(tmp_path)
    folder = run(monkeypatch, "hydra.run.dir=mine", "seed=1")
    (folder / "checkpoints" / "step-000002").mkdir(parents=True)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    status, said = failed(monkeypatch, capsys, "hydra.run.dir=mine", "seed=2")
    assert status == 2
    assert f"{folder} already contains a run (step-000002): choose" in said
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(("program", "status"), [("train", 2), ("sft", 2), ("evaluate", 0), ("reliability", 0)])
def test_no_training_replaces_an_evaluation(
    program: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (evaluation := tmp_path / "mine" / "evaluations" / "step-000000").mkdir(parents=True)
    (evaluation / "summary.json").write_text("{}")
    ended = 0
    for more in ([], ["resume=auto"] if status else []):
        monkeypatch.setattr(sys, "argv", [program, "hydra.run.dir=mine", *more])
        try:
            run_command(program, lambda config, folder: None)
        except SystemExit as error:
            ended = error.code  # type: ignore[assignment]
        assert ended == status
        assert ("mine already contains an evaluation" in capsys.readouterr().err) == bool(status)
        assert (tmp_path / "mine" / ".hydra").exists() == (not status)


@pytest.mark.parametrize("name", ["checkpoints", "evaluations"])
def test_a_file_where_results_go_is_found_before_the_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text("")
    status, said = failed(monkeypatch, capsys, "hydra.run.dir=mine")
    assert status == 2
    assert f"{tmp_path}/mine/{name} is a file where" in said
