"""An exported folder under a real `vllm serve`, asked by the OpenAI client."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rlmed.export import server
from rlmed.export.command import main
from rlmed.export.server import serving
from tests.integration.processes import marked, new_mark, wait_until

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


def test_a_server_answers_as_the_checkpoint_and_the_cards_client_asks_it(
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
