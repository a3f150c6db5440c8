"""What stdout cannot show or take never ends a command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlmed.core.process import display
from tests.root import ROOT

COMMAND = """
import logging, sys
from pathlib import Path
from rich.console import Console
from rlmed.core.process.display import keep_display
keep_display()
keep_display()  # a command may call another
logging.basicConfig(stream=sys.stdout)
for number in range(2000):
    Console().print("Röntgen → 测试", number)
    logging.getLogger().warning("± %d", number)
print("printed", end="")
sys.stderr.write("é\\n")
Path(sys.argv[1]).write_text("done")
"""


def run(tmp_path: Path, redirection: str = "", **environment: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of the command in a shell; it must have reached its end."""
    (tmp_path / "command.py").write_text(COMMAND, encoding="utf-8")
    line = f'"{sys.executable}" command.py done {redirection}'
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert (tmp_path / "done").read_text() == "done"
    return done.returncode, done.stdout.decode("latin-1"), done.stderr.decode("latin-1")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "ascii:strict"])
def test_characters_that_stdout_lacks_are_written_otherwise(tmp_path: Path, encoding: str) -> None:
    status, out, err = run(tmp_path, PYTHONIOENCODING=encoding)
    assert status == 0
    assert out.count(r"\u6d4b\u8bd5") == 2000
    assert out.endswith("printed")
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "settings",
    [
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"LC_ALL": "POSIX"},
        {"COLUMNS": "1"},
        {"COLUMNS": "0"},
        {"COLUMNS": "x", "TERM": "dumb"},
        {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "ascii"},
        {"NO_COLOR": "1", "TERM": ""},
    ],
)
def test_other_terminals(tmp_path: Path, settings: dict[str, str]) -> None:
    status, out, err = run(tmp_path, **settings)
    assert status == 0
    assert "printed" in out
    assert out.count("R") == 4000  # one of rich, and one in WARNING
    assert "Traceback" not in err


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("redirection", "said"),
    [
        ("| head -1", ""),
        ("> /dev/full", "stdout cannot be written (No space left on device): continuing without it"),
        (">&-", ""),
        (">&- 2>&-", None),
        ("<&- >&- 2>&-", None),
        ("> /dev/full 2> /dev/full", None),
        ("2>&1 | head -1", None),
    ],
)
def test_a_stdout_that_takes_nothing(tmp_path: Path, redirection: str, said: str | None, unbuffered: str) -> None:
    status, _, err = run(tmp_path, redirection, PYTHONUNBUFFERED=unbuffered)
    assert status == 0
    if said is not None:
        assert err == (f"{said}\n" if said else "") + "Ã©\n"


def test_no_file_is_taken_for_a_closed_stdout(tmp_path: Path) -> None:
    """Code that writes to descriptor 1, as C does, must not write into a file of the run."""
    code = (
        "import os\n"
        "from rlmed.core.process.display import keep_display\n"
        "keep_display()\n"
        "file = open('metrics', 'w')\n"
        "os.write(1, b'noise')\n"
        "os.write(2, b'noise')\n"
        "print('shown')\n"
        "file.write('metrics')\n"
    )
    subprocess.run(
        ["bash", "-c", f'"{sys.executable}" -c "{code}" >&- 2>&-'],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=True,
        timeout=60,
    )
    assert (tmp_path / "metrics").read_text() == "metrics"


def test_a_full_pipe_that_another_program_made_non_blocking_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / "command.py").write_text(COMMAND, encoding="utf-8")
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    process = subprocess.Popen(
        [sys.executable, "command.py", "done"],
        cwd=tmp_path,
        stdout=writer,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"},
    )
    os.close(writer)
    with open(reader, "rb") as stream:
        out = stream.read().decode()
    assert process.wait(timeout=60) == 0
    assert out.count("测试") == 2000
    assert out.endswith("printed")


@pytest.mark.parametrize(("limit", "lacks"), [(None, False), (2**31, True)])
def test_what_onednn_says_means_a_lack_of_memory_where_addresses_are_limited(monkeypatch, limit, lacks):
    monkeypatch.setattr(display, "address_limit", lambda: limit)
    assert display.lacks_memory(RuntimeError("could not create a primitive")) is lacks
    assert display.lacks_memory(RuntimeError("can't start new thread"))
