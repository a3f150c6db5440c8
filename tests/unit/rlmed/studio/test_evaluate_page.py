"""The page of a run's evaluations: tables, reliability, rows and their pictures."""

from __future__ import annotations

import dataclasses
import io
import re
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("starlette", reason="needs rlmed's extra 'studio'")

from starlette.testclient import TestClient

from rlmed.evaluation.results import write_evaluation
from rlmed.studio.server import build
from rlmed.studio.state import Studio
from tests.unit.rlmed.evaluation.test_old_names import TRUST
from tests.unit.rlmed.report.test_page import EVIL, GOOD, row, summary
from tests.unit.rlmed.studio.run_folders import pictures_of

BAD = "<think>?</think><answer>A</answer>"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Ten rows evaluated at steps 0 and 3: one is lost, seven are gained, and one is hostile."""
    folder = tmp_path_factory.mktemp("runs") / "a run"
    folder.mkdir()
    image = folder.parent / "scan.png"
    Image.fromarray(np.arange(300 * 400, dtype=np.uint32).astype(np.uint8).reshape(300, 400)).save(image)
    (folder / "config.yaml").write_text("name: a run\n")
    (folder / "versions.json").write_text("{}")
    before = [row(i, right=i < 3, image=str(image)) for i in range(10)]
    after = [
        row(i, right=i > 0, image=str(image), completion=EVIL if i == 5 else GOOD if i else BAD) for i in range(10)
    ]
    after[7] = dataclasses.replace(after[7], image=str(folder / "gone.png"))
    after[8] = dataclasses.replace(after[8], image="/etc/passwd")
    after += [row(i, False, control="blank", image=str(image)) for i in range(2)]
    for step, rows in ((0, before), (3, after)):
        write_evaluation(folder / "evaluations", summary(step, rows), rows)
    (folder / "evaluations" / "step-000003" / "trust.json").write_text(TRUST)
    (folder / "evaluations" / "step-000009").mkdir()  # being written
    return folder


@pytest.fixture(scope="module")
def client(run) -> TestClient:
    studio = Studio([run.parent], token=None, cache=run.parent / "cache")
    return TestClient(build(studio), base_url="http://localhost")


def page(client: TestClient, **query: object) -> str:
    answer = client.get("/evaluate", params={"run": "a run", **query})
    assert answer.status_code == 200
    return answer.text


def ids(html: str) -> list[str]:
    return re.findall(r"<br>(r\d+)</div>", html)


def test_without_a_run_those_with_evaluations_are_listed(client):
    html = client.get("/evaluate").text
    assert 'href="/evaluate?run=a+run"' in html
    assert client.get("/evaluate", params={"run": "../a run"}).status_code == 404


def test_tables_of_accuracy_and_reliability_are_shown(client):
    html = page(client)
    assert "30.0" in html  # 3 of 10 before
    assert "Is it calibrated?" in html
    assert "pass@" in html
    # the policy of the studio's pages allows neither
    assert 'style="' not in html
    assert "<style" not in html


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({}, range(10)),
        ({"outcome": "lost"}, [0]),
        ({"outcome": "gained"}, range(3, 10)),
        ({"outcome": "wrong"}, [0]),
        ({"outcome": "right"}, range(1, 10)),
        ({"step": 0, "outcome": "right"}, [0, 1, 2]),
        ({"words": "question 4?"}, [4]),
        ({"words": "BONE bright", "outcome": "gained"}, [3, 4, 6, 7, 8, 9]),
        ({"file": "mri"}, []),
        ({"control": "blank"}, [0, 1]),
        ({"control": "none' or 1=1", "outcome": "<b>", "page": "-3"}, range(10)),
    ],
)
def test_rows_are_found_by_their_filters(client, query, expected):
    html = page(client, **query)
    assert ids(html) == [f"r{number}" for number in expected]
    assert f"<b>{len(expected)}</b> of {10 if query.get('step') == 0 else 12} answers" in html


def test_a_row_has_both_answers_and_text_stays_text(client):
    lost = page(client, outcome="lost")
    assert lost.index('aria-label="answer at step 0"') < lost.index('aria-label="answer at step 3"')
    assert "<script>alert" not in page(client, words="question 5?")
    assert EVIL in unescape(page(client, words="question 5?"))
    assert '<option value="gained"' not in page(client, step=0)


def test_a_picture_is_sent_as_a_new_one_and_nothing_else(client):
    query = pictures_of(client, "/evaluate?run=a run&step=3", "evaluate/image")[0]
    answer = client.get("/evaluate/image", params=query)
    assert answer.headers["content-type"] == "image/jpeg"
    assert Image.open(io.BytesIO(answer.content)).format == "JPEG"
    wrong = [
        {"row": 8},
        {"row": 7},
        {"row": 99},
        {"row": -1},
        {"number": 1},
        {"row": "x"},
        {"step": 4},
        {"size": "x"},
        {"key": ""},
    ]
    for changed in wrong:
        assert client.get("/evaluate/image", params=query | changed).status_code == 404, changed
    assert "no longer there" in page(client, words="question 7?")


def test_many_rows_are_shown_in_pages(tmp_path):
    folder = tmp_path / "many"
    rows = [row(number, right=True) for number in range(45)]
    write_evaluation(folder / "evaluations", summary(1, rows), rows)
    (folder / "config.yaml").write_text("name: many\n")
    client = TestClient(build(Studio([folder], token=None, cache=tmp_path / "cache")), base_url="http://localhost")
    shown = [ids(client.get("/evaluate", params={"run": "many", "page": number}).text) for number in (1, 2, 3, 4)]
    assert [len(one) for one in shown] == [20, 20, 5, 5]
    assert [entry for one in shown[:3] for entry in one] == [f"r{number}" for number in range(45)]
    assert 'rel="prev" href="/evaluate?run=many&amp;step=1&amp;page=1#rows"' in unescape(
        client.get("/evaluate", params={"run": "many", "page": 2}).text
    ).replace("&page", "&amp;page").replace("&step", "&amp;step")


def test_a_damaged_evaluation_costs_a_sentence(tmp_path):
    folder = tmp_path / "run"
    rows = [row(number, right=True) for number in range(3)]
    write_evaluation(folder / "evaluations", summary(1, rows), rows)
    (folder / "config.yaml").write_text("name: run\n")
    (folder / "evaluations" / "step-000001" / "rows.jsonl").write_text('{"file": "ct"\n')
    client = TestClient(build(Studio([folder], token=None, cache=tmp_path / "cache")), base_url="http://localhost")
    answer = client.get("/evaluate", params={"run": "run"})
    assert answer.status_code == 200
    assert "rows.jsonl" in answer.text
