"""Uploads to a server of this machine that speaks as much of the hub's protocol as they need."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.root import ROOT

PROGRAM = """
import sys
from pathlib import Path
from rlmed.export.hub import check_access, push
name = check_access(sys.argv[2])
print(push(Path(sys.argv[1]), name, public="--public" in sys.argv))
"""


@dataclass
class Hub:
    """What the server was told."""

    address: str = ""
    status: int = 200
    created: list[dict[str, Any]] = field(default_factory=list)
    stored: tuple[str, ...] = ()
    committed: dict[str, str] = field(default_factory=dict)
    deleted: list[str] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)


@pytest.fixture
def hub() -> Iterator[Hub]:
    told = Hub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

        def answer(self, content: object) -> None:
            body = json.dumps(content).encode()
            self.send_response(told.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            told.tokens.add(self.headers.get("Authorization"))
            if self.path == "/api/whoami-v2":
                return self.answer({"name": "lab", "type": "user"})
            if "/tree/" in self.path:
                return self.answer([{"type": "file", "path": name, "size": 1, "oid": "2" * 40} for name in told.stored])
            siblings = [{"rfilename": name} for name in told.stored]
            return self.answer({"id": "lab/model", "sha": "0" * 40, "siblings": siblings})

        def do_POST(self) -> None:
            told.tokens.add(self.headers.get("Authorization"))
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.path == "/api/repos/create":
                told.created.append(json.loads(body))
                return self.answer({"url": f"{told.address}/lab/model"})
            if "/preupload/" in self.path:
                files = json.loads(body)["files"]
                return self.answer(
                    {
                        "files": [
                            {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files
                        ]
                    }
                )
            if "/commit/" in self.path:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        told.committed[line["value"]["path"]] = line["value"]["content"]
                    elif line["key"] == "deletedFile":
                        told.deleted.append(line["value"]["path"])
                return self.answer({"commitUrl": f"{told.address}/lab/model/commit/1", "commitOid": "1" * 40})
            return self.answer({})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    told.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield told
    server.shutdown()
    thread.join()
    server.server_close()


def upload(folder: Path, home: Path, address: str, name: str, *more: str, token: str | None) -> Any:
    """In a process of its own: huggingface_hub reads its address and token when it is imported."""
    settings = {
        "HF_ENDPOINT": address,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    clean = {key: value for key, value in os.environ.items() if key not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), name, *more],
        env=clean | settings | ({"HF_TOKEN": token} if token else {}),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "export"
    made.mkdir()
    (made / "README.md").write_text("# A model\n")
    (made / "config.json").write_text("{}")
    return made


@pytest.mark.parametrize("public", [False, True])
def test_a_folder_is_uploaded_whole_and_private_unless_told(
    hub: Hub, folder: Path, tmp_path: Path, public: bool
) -> None:
    done = upload(folder, tmp_path / "home", hub.address, "model", *["--public"] * public, token="hf_secret")
    assert done.returncode == 0, done.stderr
    assert "lab/model" in done.stdout
    (created,) = hub.created
    assert (created["name"], created.get("organization", "lab")) == ("model", "lab")
    assert created["visibility"] == ("public" if public else "private")
    assert hub.committed.keys() == {"README.md", "config.json"}
    assert hub.deleted == []
    assert hub.tokens == {"Bearer hf_secret"}


def test_weights_of_an_earlier_upload_are_removed(hub: Hub, folder: Path, tmp_path: Path) -> None:
    """transformers would read a whole file rather than new shards beside it."""
    hub.stored = ("model.safetensors", "adapter_config.json", "config.json", "figure.png")
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"shard")
    done = upload(folder, tmp_path / "home", hub.address, "model", token="hf_secret")
    assert done.returncode == 0, done.stderr
    assert sorted(hub.deleted) == ["adapter_config.json", "model.safetensors"]
    assert "model-00001-of-00002.safetensors" in hub.committed


@pytest.mark.parametrize(
    ("status", "token", "name", "message"),
    [
        (200, None, "model", "--push-to-hub model: no token .*hf auth login"),
        (401, "hf_bad", "model", "refuses: .*hf auth login.* may write"),
        (503, "hf_ok", "model", "refuses: .*try again"),
        (200, "hf_ok", "a/b/c", "--push-to-hub a/b/c: "),
    ],
)
def test_a_refusal_says_what_to_do(
    hub: Hub, folder: Path, tmp_path: Path, status: int, token: str | None, name: str, message: str
) -> None:
    hub.status = status
    done = upload(folder, tmp_path / "home", hub.address, name, token=token)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ValueError: ")
    assert re.search(message, last), done.stderr
    assert hub.committed == {}


def test_without_a_network_the_hub_is_named(folder: Path, tmp_path: Path) -> None:
    done = upload(folder, tmp_path / "home", "http://127.0.0.1:9", "model", token="hf_ok")
    assert "http://127.0.0.1:9 cannot be reached" in done.stderr.splitlines()[-1]
