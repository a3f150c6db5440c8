"""What the script of the page Ask calls: uploads, previews, answers; and who may not."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("starlette", reason="needs rlmed's extra 'studio'")

from starlette.testclient import TestClient

from rlmed.studio.server import build
from rlmed.studio.state import Studio
from tests.root import ROOT
from tests.unit.rlmed.data.pictures import marked
from tests.unit.rlmed.studio.test_asking import OPTIONS, QUESTION, text_of

ORIGIN = {"Origin": "http://localhost"}


@pytest.fixture(scope="module")
def studio(tmp_path_factory) -> Studio:
    folder = tmp_path_factory.mktemp("runs")
    checkpoint = folder / "run" / "checkpoints" / "step-000007"
    checkpoint.mkdir(parents=True)
    (folder / "run" / "metrics.jsonl").write_text('{"step": 7}\n')
    (checkpoint / "config.json").write_text("{}")
    return Studio([folder], token=None, cache=folder / "cache", models=["given/model"])


@pytest.fixture(scope="module")
def client(studio):
    with TestClient(build(studio), base_url="http://localhost", headers=ORIGIN) as client:
        yield client
    assert not studio.asker.uploads.folder.exists()


def png(size: tuple[int, int] = (60, 40)) -> bytes:
    content = io.BytesIO()
    marked(size=size).save(content, "PNG")
    return content.getvalue()


def uploaded(client: TestClient, *contents: bytes) -> dict:
    ids = [client.post("/ask/files", content=content).json()["id"] for content in contents]
    return client.post("/ask/sources", json={"files": ids}).json()


def models(client: TestClient) -> dict[str, str]:
    return {
        label: key
        for key, label in re.findall(r'<option value="(\w{16})" title="[^"]*">([^<]*)', client.get("/ask").text)
    }


def test_the_page_names_its_fields_and_lists_models(client):
    html = client.get("/ask").text
    assert list(models(client)) == ["given/model", "run, step 7", "embedded model (knows generated images only)"]
    fields = re.findall(r'<(?:input|select|textarea) id="(\w+)"', html)
    assert len(fields) > 9
    for field in fields:
        assert f'for="{field}"' in html or re.search(rf'<label[^>]*><input id="{field}"', html), field
    assert "not for clinical use" in html
    assert 'aria-live="polite"' in html
    assert "<script>" not in html


def test_the_server_starts_without_torch():
    """It takes seconds, and who reads runs needs none."""
    program = "import rlmed.studio.server, sys; print({'torch', 'transformers'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "set()\n", done.stderr


def test_a_preview_is_a_png_and_a_mistake_a_sentence(client):
    opened = uploaded(client, png(), b"hello" * 200)
    assert [one["file"] for one in opened["problems"]] == [1]
    (source,) = opened["sources"]
    answer = client.get("/ask/picture", params={"source": source["id"]})
    assert Image.open(io.BytesIO(answer.content)).size == (60, 40)
    for wrong in (
        {"source": "../x"},
        {"source": source["id"], "center": "x"},
        {"source": source["id"], "index": "1e99"},
    ):
        answer = client.get("/ask/picture", params=wrong)
        assert answer.status_code == 400
        assert list(answer.json()) == ["error"]


def test_a_question_is_answered_line_by_line(client):
    (source,) = uploaded(client, png())["sources"]
    asked = {
        "model": models(client)["embedded model (knows generated images only)"],
        "question": QUESTION,
        "task": "choice",
        "options": list(OPTIONS),
        "views": [{"source": source["id"]}],
        "max_tokens": 40,
    }
    answer = client.post("/ask/answer", json=asked)
    assert answer.headers["content-type"].startswith("application/x-ndjson")
    events = [json.loads(line) for line in answer.text.splitlines()]
    assert events[-1] == {"done": True}
    assert text_of(events, "image")[1] > 5
    assert {event.get("side") for event in events if "options" in event} == {"image", "blank"}


def test_half_a_character_in_a_question_is_no_error(client):
    (source,) = uploaded(client, png())["sources"]
    asked = {
        "model": models(client)["embedded model (knows generated images only)"],
        "question": f"{QUESTION} \ud83d",
        "task": "choice",
        "options": [*OPTIONS[:-1], "\ude00"],
        "views": [{"source": source["id"]}],
        "max_tokens": 4,
        "blank": False,
    }
    events = [json.loads(line) for line in client.post("/ask/answer", content=json.dumps(asked)).text.splitlines()]
    assert events[-1] == {"done": True}
    wrong = client.post("/ask/answer", content=json.dumps(asked | {"task": "\ud83d"}))
    assert "error" in json.loads(wrong.text.splitlines()[-1])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "embedded:tiny_base"}, "this model is gone"),
        ({"model": "/etc"}, "this model is gone"),
        ({"model": []}, "this model is gone"),
        ({"model": {}}, "this model is gone"),
        ({"question": "  "}, "the question is empty"),
        ({"question": "x" * 30_000}, "more than 20000 characters"),
        ({"question": 3}, "must be texts"),
        ({"options": "ab"}, "options must be a list"),
        ({"views": [3]}, "views must be a list"),
        ({"views": [{"source": "x", "index": True}]}, "the slice is no number"),
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"max_tokens": 10**9}, "1 to 8192"),
    ],
)
def test_a_question_that_is_none_is_refused(client, changes, said):
    asked = {"model": models(client)["given/model"], "question": "Which?", "task": "choice", "options": ["a", "b"]}
    asked |= {"max_tokens": 4}
    answer = client.post("/ask/answer", content=json.dumps(asked | changes))
    assert answer.status_code == 400
    assert said in answer.json()["error"]


def test_a_model_that_cannot_be_loaded_is_named(client):
    asked = {"model": models(client)["given/model"], "question": "Which?", "task": "choice", "options": ["a", "b"]}
    asked |= {"max_tokens": 4}
    (event,) = [json.loads(line) for line in client.post("/ask/answer", json=asked).text.splitlines()][-1:]
    assert "given/model" in event["error"]


def test_what_is_no_object_and_other_origins_are_refused(client):
    assert client.post("/ask/sources", content="[1]").status_code == 400
    assert client.post("/ask/sources", content="[" * 100_000).status_code == 400
    assert client.post("/ask/sources", json={"files": [1]}).status_code == 400
    assert client.post("/ask/sources", json={"files": ["../../x"]}).status_code == 400
    for path in ("/ask/files", "/ask/sources", "/ask/answer"):
        assert client.post(path, content=b"x", headers={"Origin": "http://evil.example"}).status_code == 403


def test_a_file_announced_beyond_the_limit_is_refused_before_it_is_read(client, studio):
    answer = client.post("/ask/files", content=b"x", headers={"Content-Length": str(1 << 40)})
    assert answer.status_code == 413
    assert "512 MiB" in answer.json()["error"]


def test_a_name_in_a_header_is_neither_shown_nor_logged(client, caplog, tmp_path: Path):
    pytest.importorskip("pydicom", reason="needs rlmed's extra 'readers'")
    from tests.unit.rlmed.data.readers.dicom_files import write_dicom

    values = np.random.default_rng(0).integers(0, 900, (16, 16)).astype(np.int16)
    path = write_dicom(tmp_path / "DOE", values, PatientName="DOE^JANE", Modality="MR", BurnedInAnnotation="YES")
    opened = uploaded(client, path.read_bytes(), path.read_bytes()[:400])
    assert len(opened["sources"]) == len(opened["problems"]) == 1
    assert "burnt" in opened["sources"][0]["notes"][0]
    assert "DOE" not in json.dumps(opened) + caplog.text
