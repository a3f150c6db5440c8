"""The example client's question, reading and errors; `test_export_vllm.py` asks a real server."""

from __future__ import annotations

import base64
import io
import json
import runpy
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.root import ROOT

CLIENT = runpy.run_path(str(ROOT / "examples/serve/client.py"))
TEXT = "<think> dark </think>\n<answer>B</answer>"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A picture of 16 bits, which only rlmed's own reading turns into the picture of training."""
    path = tmp_path / "scan.png"
    Image.fromarray(np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) + 1000).save(path)
    return path


def test_a_turn_has_the_pixels_and_the_words_of_training(image: Path) -> None:
    picture, text = CLIENT["message"]([image], "Which organ?", ["A) liver", "B) spleen"])["content"]
    assert text == {"type": "text", "text": "Which organ?\nA) liver\nB) spleen"}
    sent = Image.open(io.BytesIO(base64.b64decode(picture["image_url"]["url"].partition(",")[2])))
    assert sent.mode == "RGB"
    assert sent.getextrema()[0] == (0, 255)  # stretched from 1000..5095
    assert CLIENT["message"]([], "Which organ?", []) == {"role": "user", "content": "Which organ?"}


@pytest.mark.parametrize(
    ("written", "options", "expected"),
    [
        (TEXT, ["liver", "spleen"], ("dark", "B) spleen")),
        (TEXT.removeprefix("<think>"), ["liver", "spleen"], ("dark", "B) spleen")),  # the template wrote the tag
        ("<answer>C</answer>", ["liver", "spleen"], ("(none)", "(no option; the model wrote: '<answer>C</answer>')")),
        ("<think>dark</think><answer>a cyst</answer>", [], ("dark", "a cyst")),
        ("<think>dark", [], ("(none)", "(none; the model wrote: '<think>dark')")),
    ],
)
def test_a_completion_is_read_as_by_ask(written: str, options: list[str], expected: tuple[str, str]) -> None:
    assert CLIENT["read"](written, options) == expected


def test_errors_are_one_line(image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("openai")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"
        cases = {
            url: [str(image), "Which?", "--url", url],
            "--options liver: it has 1 option": [str(image), "Which?", "--options", "liver"],
            "missing.png": [str(tmp_path / "missing.png"), "Which?"],
            "generation_config.json": [str(image), "Which?", "--folder", str(tmp_path)],
            "is a file": [str(image)],
        }
        for said, arguments in cases.items():
            with pytest.raises(SystemExit) as end:
                CLIENT["main"](arguments)
            printed = capsys.readouterr()
            assert (end.value.code, printed.out) == (2, ""), said
            assert printed.err.startswith("error: "), said
            assert said in printed.err
            assert printed.err.count("\n") == 1, printed.err


@pytest.mark.parametrize(("status", "cure"), [(401, "give --key"), (404, "/v1")])
def test_a_refusal_names_its_cure(status: int, cure: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("openai")

    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(status)

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(SystemExit):
            CLIENT["main"](["Which?", "--url", f"http://127.0.0.1:{server.server_port}"])
        server.shutdown()
    printed = capsys.readouterr().err
    assert f"({status})" in printed
    assert cure in printed


@pytest.mark.parametrize(
    ("settings", "arguments", "expected"),
    [
        ({"max_new_tokens": 64, "suppress_tokens": [7]}, [], (64, {"7": -100})),
        ({"max_new_tokens": 64}, ["--max-tokens", "32"], (32, {})),
        ({}, [], (512, {})),
        (None, [], (512, {})),
    ],
)
def test_the_longest_answer_is_that_of_the_export(
    settings: dict[str, object] | None, arguments: list[str], expected: tuple[int, dict[str, int]], tmp_path: Path
) -> None:
    pytest.importorskip("openai")
    asked: list[dict[str, object]] = []

    class Answering(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": TEXT}}
            content = json.dumps({"id": "1", "object": "x", "created": 1, "model": "m", "choices": [choice]}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    if settings is not None:
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / "generation_config.json").write_text(json.dumps(settings))
        arguments = [*arguments, "--folder", str(tmp_path)]
    with HTTPServer(("127.0.0.1", 0), Answering) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        CLIENT["main"](["Which?", "--url", url, "--model", "m", *arguments])
        server.shutdown()
    assert [(one["max_tokens"], one["logit_bias"]) for one in asked] == [expected]
