"""What keeps the libraries of a command from being loaded is one line."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from rlmed.core.process.starting import start_command
from tests.root import ROOT

ASK = f"ask '{ROOT}/docs/figures/report.png' q --options a b"


def start(
    folder: Path, line: str = "", *, torch: str = "", command: str = ASK, **environment: str
) -> tuple[int, list[str]]:
    """Exit status and stderr lines of `python -m rlmed.COMMAND` in `folder`, with this `torch`."""
    libraries = [str(ROOT)]
    if torch:
        (folder / "libraries").mkdir()
        (folder / "libraries" / "torch.py").write_text(torch)
        libraries.insert(0, str(folder / "libraries"))
    done = subprocess.run(
        ["bash", "-c", f'{line} exec "{sys.executable}" -m rlmed.{command}'],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(libraries)} | environment,
        capture_output=True,
        check=False,
        timeout=60,
        text=True,
    )
    return done.returncode, done.stderr.splitlines()


@pytest.mark.parametrize(
    ("torch", "status", "said"),
    [
        (
            "raise ImportError('libx.so: not there')",
            2,
            "error: libx.so: not there: python -m rlmed.doctor says what is miss",
        ),
        ("import nowhere", 2, "error: No module named 'nowhere': python -m rlmed.doctor says what is missing"),
        ("open('/proc/nowhere/x')", 2, "error: [Errno 2] No such file or directory: '/proc/nowhere/x'"),
        ("raise MemoryError", 2, "error: out of memory (in Python): close other programs"),
        (
            "raise ImportError('libx.so: failed to map segment')",
            2,
            "error: out of memory (libx.so: failed to map segment)",
        ),
        ("raise KeyboardInterrupt", 1, "interrupted"),
    ],
)
def test_what_a_library_raises(tmp_path: Path, torch: str, status: int, said: str) -> None:
    found, lines = start(tmp_path, torch=torch)
    assert found == status
    assert len(lines) == 1
    assert lines[0].startswith(said)
    assert lines[0].endswith("missing") == ("missing" in said or "says what is miss" in said)


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [("--help", 0, ""), ("steps=x", 2, "error: steps='x' "), ("debug=fake_engine", 2, "error: libx.so: not there: ")],
)
def test_training_needs_no_torch_for_its_help_and_for_errors_in_the_settings(
    tmp_path: Path, arguments: str, status: int, said: str
) -> None:
    found, lines = start(tmp_path, torch="raise ImportError('libx.so: not there')", command=f"launch {arguments}")
    assert found == status, lines
    assert len(lines) == (said != "")
    assert not said or lines[0].startswith(said)
    assert not list(tmp_path.glob("outputs/*/*"))


def test_faults_keep_their_traceback(tmp_path: Path) -> None:
    status, lines = start(tmp_path, torch="raise RuntimeError('a bug')")
    assert status == 1
    assert lines[0].startswith("Traceback")
    assert lines[-1] == "RuntimeError: a bug"


def test_where_it_came_from_is_shown_on_request(tmp_path: Path) -> None:
    status, lines = start(tmp_path, torch="raise OSError('x')", RLMED_TRACE="1")
    assert status == 1
    assert lines[0].startswith("Traceback")


def test_a_current_folder_that_is_gone(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    status, lines = start(tmp_path, "cd gone; rmdir ../gone;")
    assert (status, lines) == (2, ["error: the current folder has been removed: go to another (cd FOLDER)"])


def test_a_system_without_a_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/x']")

    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    with pytest.raises(FileNotFoundError, match=r"\['/x'\]: .*TMPDIR"):
        start_command()


@pytest.mark.parametrize(("kibibytes", "torch"), [(1_000_000, ""), (200_000, "raise AssertionError('was loaded')")])
def test_a_limit_under_which_nothing_loads_is_said_before_it_is_tried(
    tmp_path: Path, kibibytes: int, torch: str
) -> None:
    status, lines = start(tmp_path, f"ulimit -v {kibibytes};", torch=torch)
    assert status == 2
    assert lines == [
        f"error: out of memory (`ulimit -v` allows {kibibytes // 1024} MiB of address space, but the libraries need 1536 "
        "MiB): close other programs, raise the limit, or reduce memory use"
    ]
