"""An exported folder under a real `vllm serve`, asked by the OpenAI client."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from rlmed import ask
from rlmed.export import server
from rlmed.export.command import main
from rlmed.export.server import serving
from tests.integration.processes import marked, new_mark, wait_until
from tests.root import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.skipif(
        not all(importlib.util.find_spec(name) for name in ("vllm", "openai")), reason="needs vllm and openai"
    ),
]


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Processes that a test starts; none of them is left."""
    mark = new_mark()
    for name, value in mark.items():
        monkeypatch.setenv(name, value)
    yield mark
    wait_until(lambda: not marked(mark), 30, "the server's processes end")


def printed_by(command: Callable[[list[str]], None], *arguments: str) -> tuple[int, str, str]:
    """Status of a command, and what it writes to stdout and stderr."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            command([*arguments])
        except SystemExit as end:
            status = int(end.code or 0)
    return status, out.getvalue(), err.getvalue()


def check_example_client(rows: list[str], images: Path, out: Path, url: str) -> None:
    """The example client prints what `rlmed.ask` prints, and an error as one line."""
    client = runpy.run_path(str(ROOT / "examples/serve/client.py"))["main"]
    told = []
    for row in map(json.loads, rows):
        asked = [str(images / row["image"]), row["question"], "--options", *row["options"], "--max-tokens", "64"]
        expected = printed_by(ask.main, *asked, "--model", str(out))[1].splitlines()
        status, found, _ = printed_by(client, *asked, "--folder", str(out), "--url", url)
        assert status == 0
        assert found.splitlines() == expected
        told.append(found.splitlines()[1])
    assert all(re.fullmatch(r"answer     [A-D]\) .+", line) for line in told)
    assert len({line[:12] for line in told}) > 1  # the server tells the pictures apart
    status, _, error = printed_by(client, *asked[:-1], "100000", "--url", url)
    assert status == 2
    assert re.fullmatch(r"error: .* refused the question \(400\): .*100000.*\n", error)


def test_a_server_answers_as_the_checkpoint_and_both_clients_ask_it(
    base_copy: Path,
    generated_images: Path,
    tmp_path: Path,
    mark: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, printed = tmp_path / "mine", []
    rows = (generated_images / "test_mri.jsonl").read_text().splitlines()

    @contextmanager
    def asked_too(folder: Path, *arguments: str, **more: Any) -> Iterator[Any]:
        """The server that the check has started is also asked as the card says."""
        with serving(folder, *arguments, **more) as client:
            yield client
            shutil.copy(generated_images / json.loads(rows[0])["image"], out / "image.png")
            (snippet,) = re.findall(r"^```python\n(import base64.*?)^```", (out / "README.md").read_text(), re.M | re.S)
            snippet = snippet.replace("http://127.0.0.1:8000/v1", str(client.base_url))
            done = subprocess.run(
                [sys.executable, "-c", snippet], cwd=out, capture_output=True, text=True, check=False, timeout=120
            )
            assert done.returncode == 0, done.stderr
            printed.append(done.stdout)
            check_example_client(rows[:4], generated_images, out, str(client.base_url))

    monkeypatch.setenv("COLUMNS", "10000")  # lines of `rlmed.ask` are not wrapped
    monkeypatch.setattr(server, "serving", asked_too)
    questions = str(generated_images / "test_mri.jsonl")
    main([str(base_copy), "--out", str(out), "--questions", questions, "--check", "0", "--check-vllm", "4"])
    assert re.search(r"vllm serve: +4 of 4 answers are the checkpoint's", capsys.readouterr().out)
    # with the prompt of training, which the client did not send, the model answers in its form
    assert re.fullmatch(r"<think>.*</think>\s*<answer>[A-D]</answer>\s*", printed[0], re.S)


def test_a_server_that_does_not_start_is_an_error_with_the_end_of_its_log(
    base_copy: Path, mark: dict[str, str]
) -> None:
    message = r"vllm serve ended with status 2; its log ends: \n"
    with pytest.raises(ValueError, match=message) as error, serving(base_copy, "--no-such-option"):
        pass
    assert "--no-such-option" in str(error.value).splitlines()[-1]
