"""Short runs under adverse conditions: docs/troubleshooting.md has a table of what each does."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rlmed.models.tiny.build import build_tiny_vl
from rlmed.recording.checkpoint import list_checkpoints
from tests.integration.short_run import SHORT_RUN

RUN = (
    *SHORT_RUN,
    "steps=2",
    "checkpoint.every=1",
    "data.limit=8",
    "rollout.max_tokens=8",
    "name=run",
    "data.leakage=off",
)
DIE = Path(__file__).with_name("launch_and_die.py")
NOWHERE = "/proc/nowhere"
"""Where nobody can make a folder, root neither."""


def command(module: str, *arguments: str, shell: str = "exec", cwd: Path, **environment: str) -> subprocess.Popen[str]:
    """Start `python -m MODULE ARGUMENTS` in a shell, behind `shell`, on one core."""
    line = f'{shell} "$0" -m {module} "$@"'
    cores = sorted(os.sched_getaffinity(0))[:1]
    return subprocess.Popen(
        ["bash", "-c", line, sys.executable, *arguments],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit status, stdout and stderr."""
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, generated_images: Path) -> Path:
    """A folder as people call them."""
    folder = tmp_path_factory.mktemp("Röntgen bilder (1)")
    shutil.copytree(generated_images, folder / "outputs" / "phantom-0")
    build_tiny_vl(folder / "mein modell ü=1")
    return folder


@pytest.mark.slow
def test_two_runs_at_once_in_an_empty_folder_are_two_runs(tmp_path: Path) -> None:
    """They generate the same images, too, and both find all of them."""
    runs = [command("rlmed.launch", *RUN, cwd=tmp_path) for _ in range(2)]
    for status, _, err in map(ended, runs):
        assert status == 0, err
    folders = list((tmp_path / "outputs" / "run").iterdir())
    assert len(folders) == 2
    for folder in folders:
        assert [path.name for path in list_checkpoints(folder / "checkpoints")] == ["step-000001", "step-000002"]
        assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
        assert (folder / "report.html").is_file()
        data = json.loads((folder / "data.json").read_text())
        assert [file["skipped"] for file in data["files"]] == [[]] * len(data["files"])
    assert sorted(path.name for path in (tmp_path / "outputs").iterdir()) == ["phantom-0", "run"]


@pytest.mark.slow
def test_a_run_in_a_poor_place(place: Path) -> None:
    """Umlauts and spaces, no home, no caches, one core, a stdout that is closed, ASCII or full."""
    caches = ("HOME", "HF_HOME", "MPLCONFIGDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "TORCH_HOME")
    poor = dict.fromkeys(caches, NOWHERE) | {"PYTHONIOENCODING": "ascii", "TERM": "dumb", "COLUMNS": "7"}
    status, out, err = ended(
        command("rlmed.launch", *RUN, "name=lauf ä", "eval.at_end=true", "eval.limit=2", cwd=place, **poor)
    )
    assert status == 0, err
    assert "Traceback" not in err
    (folder,) = (place / "outputs" / "lauf ä").iterdir()
    assert (folder / "report.html").is_file()
    assert (folder / "evaluations" / "step-000002" / "summary.json").is_file()
    assert r"lauf \xe4" in out

    shutil.copytree(place / "outputs" / "phantom-0" / "images", place / "images")
    shutil.copy(place / "outputs" / "phantom-0" / "test_ct.jsonl", place / "测试 =1.jsonl")
    for name, shell in (("full", "exec 1>/dev/full; exec"), ("closed", "exec >&- ; exec")):
        settings = (
            "data=[测试 =1.jsonl]",
            "model=mein modell ü=1",
            "eval.limit=2",
            "eval.max_tokens=4",
            "eval.controls=false",
        )
        run = command("rlmed.evaluate", *settings, f"hydra.run.dir=aus gabe ä/{name}", shell=shell, cwd=place, **poor)
        status, _, err = ended(run)
        assert status == 0, err
        assert "Traceback" not in err
        assert ("stdout cannot be written (No" in err) == (name == "full")
        assert (place / "aus gabe ä" / name / "report.html").is_file()


@pytest.mark.slow
def test_no_more_room_while_images_are_generated(tmp_path: Path) -> None:
    """Files of more than 100 KiB are refused, as a full disk refuses them."""
    status, _, err = ended(command("rlmed.launch", *RUN, shell="ulimit -f 100; exec", cwd=tmp_path))
    assert status == 2
    assert err.startswith(f"error: {tmp_path}/outputs/phantom-0 cannot be written: File too large")
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "outputs").exists()


@pytest.mark.slow
def test_killed_while_images_are_generated(tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    arguments = [sys.executable, str(DIE), "images:2", *RUN]
    assert subprocess.run(arguments, cwd=tmp_path, check=False, timeout=300).returncode == -signal.SIGKILL
    assert not (outputs / "phantom-0").exists()
    status, _, err = ended(command("rlmed.launch", *RUN, "resume=auto", cwd=tmp_path))
    assert status == 0, err
    assert sorted(path.name for path in outputs.iterdir()) == ["phantom-0", "run"]
