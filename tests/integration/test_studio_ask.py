"""The page Ask in a browser: upload, slice and window, reasoning as it grows, probabilities."""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pydicom", reason="needs rlmed's extra 'readers'")
pytest.importorskip("starlette", reason="needs rlmed's extra 'studio'")

import uvicorn

from rlmed import ask
from rlmed.data.phantom.studies import write_split
from rlmed.data.prompts import PromptRenderer
from rlmed.studio.server import build
from rlmed.studio.state import Studio
from tests.unit.rlmed.data.readers.dicom_files import write_dicom

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A generated picture with its question, and a DICOM series of five slices, each brighter."""
    folder = tmp_path_factory.mktemp("files")
    write_split(folder, name="mri", modality="MRI", rows=1, seed=0)
    noise = np.random.default_rng(0).normal(0, 20, (32, 32))
    for place in range(5):
        values = (noise + 100 * place).astype(np.int16)
        write_dicom(
            folder / f"{place}.dcm", values, Modality="CT", SeriesInstanceUID="1.2.3", PatientName="DOE^JANE",
            ImagePositionPatient=[0, 0, place], ImageOrientationPatient=[1, 0, 0, 0, 1, 0], WindowCenter=200, WindowWidth=600,
        )  # fmt: skip
    (folder / "broken.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"x" * 300)
    return folder


@pytest.fixture(scope="module")
def address(tmp_path_factory, tiny_folder):
    folder = tmp_path_factory.mktemp("runs")
    studio = Studio([folder], token="secret", cache=folder / "cache", models=[str(tiny_folder("qwen2_vl"))])
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(build(studio), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/ask?token=secret"
        server.should_exit = True
        thread.join(20)
    assert not thread.is_alive()
    assert not studio.asker.uploads.folder.exists()


@pytest.fixture
def page(browser, address):
    context = browser.new_context(viewport={"width": 400, "height": 900})
    page = context.new_page()
    said: list[str] = []
    # what the server refuses, the browser writes to its console, too
    page.on("console", lambda message: "400 (Bad Request)" in message.text or said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(address)
    yield page
    assert said == []  # a breach of the policy would be there
    context.close()


def question_of(files: Path) -> dict:
    return json.loads(next(files.glob("*.jsonl")).read_text().splitlines()[0])


def share(cell: str) -> float:
    return float(cell.removesuffix("\u00a0%"))


def test_an_answer_grows_and_is_that_of_the_command_line(page, files):
    asked = question_of(files)
    picture = files / asked["image"]
    page.get_by_label("Files: pictures, DICOM or NIfTI").set_input_files([picture])
    page.locator("#views li img[src^=blob]").wait_for()
    page.get_by_label("Question", exact=True).fill(asked["question"])
    page.get_by_label("Options, one a line").fill("\n".join(asked["options"]))
    page.get_by_label("Model", exact=True).select_option("embedded model (knows generated images only)")
    # what is added to the log, piece by piece
    page.evaluate(
        "() => { window.added = []; const log = document.querySelector('#side-image .written');"
        " new MutationObserver((records) => { for (const record of records) for (const node of record.addedNodes)"
        " window.added.push(node.textContent); }).observe(log, { childList: true }); }"
    )
    page.get_by_role("button", name="Ask").press("Enter")
    page.locator("#state", has_text="done").wait_for(timeout=60_000)
    _, wanted = ask.ask(ask.parse_arguments([str(picture), asked["question"], "--options", *asked["options"]]))
    reasoning = wanted.partition("<think>")[2].partition("</think>")[0].strip()
    assert page.locator("#side-image .written").text_content() == reasoning
    pieces = page.evaluate("() => window.added")
    assert "".join(pieces) == reasoning
    assert len(pieces) > 5
    letter = wanted.partition("<answer>")[2][0]
    assert page.locator("#side-image .words").text_content().startswith(f"Answer: {letter}) ")
    for side in ("image", "blank"):
        rows = page.locator(f"#side-{side} tbody tr")
        cells = [rows.nth(place).locator("td").all_text_contents() for place in range(len(asked["options"]))]
        for column in (1, 2):
            assert sum(share(row[column]) for row in cells) == pytest.approx(100, abs=0.05 * len(cells))  # rounded each
        if side == "image":
            assert max(cells, key=lambda row: share(row[1]))[0].startswith(f"{letter}) ")
            assert rows.nth("ABCD".index(letter)).get_attribute("class") == "chosen"
    assert page.locator("#side-blank .words").text_content().startswith("Answer: ")
    assert page.locator("#notes").text_content().startswith("This model is the embedded toy")
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 400


def test_slices_and_windows_are_chosen_by_keyboard(page, files):
    names = ["3.dcm", "0.dcm", "4.dcm", "1.dcm", "broken.dcm", "2.dcm"]
    page.get_by_label("Files: pictures, DICOM or NIfTI").set_input_files([files / name for name in names])
    page.locator("#views li img[src^=blob]").wait_for()
    assert page.locator("#problems li").all_text_contents()[0].startswith("broken.dcm: it is not a DICOM file")
    assert "DOE" not in page.content()
    shade = (
        "() => { const image = document.querySelector('#views img'), canvas = document.createElement('canvas');"
        " canvas.width = canvas.height = 1; const drawing = canvas.getContext('2d'); drawing.drawImage(image, 0, 0, 1, 1);"
        " return drawing.getImageData(0, 0, 1, 1).data[0]; }"
    )

    def shown(alt: str, unlike: int = -1) -> int:
        """The shade of the picture of this name, once it is another than `unlike`."""
        page.locator(f"#views img[alt='{alt}']").wait_for()
        for _ in range(100):
            if page.evaluate("() => document.querySelector('#views img').complete") and page.evaluate(shade) != unlike:
                break
            page.wait_for_timeout(50)
        return page.evaluate(shade)

    middle = shown("slice 3 of 0.dcm and 4 more")
    slider = page.get_by_label("slice")
    slider.focus()
    slider.press("End")
    assert page.locator("#views output").text_content() == "5 of 5"
    last = shown("slice 5 of 0.dcm and 4 more", unlike=middle)
    assert last > middle + 30
    page.get_by_label("window", exact=True).select_option("bone")
    assert shown("slice 5 of 0.dcm and 4 more", unlike=last) < last - 30  # 400 is white no more, but grey
    for count in (2, 3, 4, 5):
        page.get_by_role("button", name="Another slice").last.click()
        assert page.locator("#views li").count() == count
    slices = page.locator("#views output")
    assert sorted(slices.all_text_contents()) == [f"{number} of 5" for number in range(1, 6)]
    assert page.get_by_role("button", name="Another slice").first.is_disabled()
    assert page.locator("#views .buttons").first.get_by_text("all slices are shown").is_visible()
    page.get_by_role("button", name="Remove").first.click()
    assert page.locator("#views li").count() == 4
    assert page.get_by_role("button", name="Another slice").first.is_enabled()


def test_a_window_that_is_refused_leaves_no_picture_that_seems_to_be_its_own(page, files):
    page.get_by_label("Files: pictures, DICOM or NIfTI").set_input_files([files / "0.dcm", files / "1.dcm"])
    page.locator("#views li img[src^=blob]").wait_for()
    page.get_by_label("window", exact=True).select_option("custom")
    width = page.get_by_label("window width")
    for given, problem in (("-5", "width -5.0"), ("", "the window's width")):
        width.fill(given)
        page.locator("#views .said", has_text=problem).wait_for()
        assert page.locator("#views img[src]").count() == 0
        width.fill("300")
        page.locator("#views li img[src^=blob]").wait_for()
        assert page.locator("#views .said").text_content() == ""


def test_each_upload_is_called_by_its_file(page, files):
    picture = files / question_of(files)["image"]
    other = files / "an eye ü.png"
    other.write_bytes(picture.read_bytes())
    page.get_by_label("Files: pictures, DICOM or NIfTI").set_input_files(
        [picture, files / "1.dcm", files / "0.dcm", other]
    )
    page.locator("#views li img[src^=blob]").nth(2).wait_for()
    names = [picture.name, "0.dcm and 1 more · CT", other.name]
    assert page.locator("#views .name").all_text_contents() == [f"{n}. {name}" for n, name in enumerate(names, 1)]
    assert page.get_by_role("button", name=f"Remove image {other.name}").is_visible()


def test_boxes_are_drawn_where_the_answer_has_them(page, files, monkeypatch):
    """By a model that is loaded here, and writes what it is made to."""
    written = "<think>x</think><answer>[[100, 200, 500, 1000], [0, 0, 250, 250]]</answer>"
    monkeypatch.setattr(PromptRenderer, "decode", lambda *_: written)
    page.get_by_label("Files: pictures, DICOM or NIfTI").set_input_files([files / question_of(files)["image"]])
    page.locator("#views li img[src^=blob]").wait_for()
    page.get_by_label("Question", exact=True).fill("Where?")
    page.get_by_label("Task").select_option("grounding")
    assert not page.get_by_label("Options, one a line").is_visible()
    page.get_by_label("Most tokens").fill("1")
    page.get_by_role("button", name="Ask").click()
    page.locator("#state", has_text="done").wait_for(timeout=60_000)
    boxes = page.locator("#side-image rect.answer")
    sides = ("x", "y", "width", "height")
    assert [[boxes.nth(i).get_attribute(side) for side in sides] for i in range(2)] == [
        ["10.00%", "20.00%", "40.00%", "80.00%"],
        ["0.00%", "0.00%", "25.00%", "25.00%"],
    ]
    frame, first = page.locator("#side-image figure img").bounding_box(), boxes.first.bounding_box()
    assert first["width"] == pytest.approx(0.4 * frame["width"], abs=3)  # with the line
    assert first["x"] - frame["x"] == pytest.approx(0.1 * frame["width"], abs=3)


def test_an_answer_is_stopped_and_a_mistake_is_told(page, files):
    page.get_by_label("Question", exact=True).fill("Which?")
    page.get_by_label("Options, one a line").fill("only")
    page.get_by_role("button", name="Ask").click()
    page.get_by_role("alert").filter(has_text="2 to 10 different texts").wait_for()
    page.locator("#state", has_text="failed").wait_for()
    page.get_by_label("Options, one a line").fill("a\nb")
    # at once: the answer may be short
    page.evaluate("() => { for (const name of ['submit', 'stop']) document.getElementById(name).click(); }")
    page.locator("#state", has_text="stopped").wait_for()
    page.get_by_role("button", name="Ask").and_(page.locator(":enabled")).wait_for()
