"""The studio in a real browser, over a run that goes on and over the same when it has finished."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.processes import wait_until
from tests.integration.short_run import SHORT_RUN
from tests.unit.rlmed.report.test_page import EVIL
from tests.unit.rlmed.studio.run_folders import write_run

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("studio")]
LIVE = ["eval.limit=12", *(entry for entry in SHORT_RUN if not entry.startswith(("eval.at_end", "checkpoint.")))]
PAGES = (
    "/",
    "/run?name=run",
    "/compare?run=run&run=other",
    "/rollouts?run=run",
    "/rollouts?run=run&words=image&sort=best",
    "/evaluate",
    "/evaluate?run=run",
    "/ask",
)
LOOKS = [(1280, "light"), (1280, "dark"), (400, "light"), (400, "dark")]
CONTRAST = """
() => {
  const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => {
    const [r, g, b] = channels(colour).map((v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (; element; element = element.parentElement) {
      const colour = getComputedStyle(element).backgroundColor;
      if (colour.startsWith("rgb(")) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const poor = [];
  for (const element of document.querySelectorAll("main *, header *")) {
    const text = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!text || element.closest("svg, .unseen, option") || !element.getClientRects().length) continue;
    const [a, b] = [light(getComputedStyle(element).color), light(behind(element))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const shown = `${element.tagName} ${element.className} ${element.textContent.trim().slice(0, 30)}`;
    if (ratio < 4.5) poor.push(`${shown}: ${ratio.toFixed(2)}`);
  }
  return [...new Set(poor)];
}
"""
"""Texts whose contrast to what is behind them is below 4.5, what WCAG 2 (AA) asks."""


class Studio:
    """A running studio and a browser."""

    def __init__(self, browser: Any, address: str) -> None:
        self.browser, self.opening = browser, address
        self.base = address.partition("/?")[0]

    @contextlib.contextmanager
    def page(self, width: int = 1280, scheme: str = "light", **settings: Any) -> Iterator[Any]:
        """A page past the token; fails if the console shows anything or another host is asked."""
        context = self.browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, **settings)
        page, faults = context.new_page(), []
        page.on("console", lambda message: faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("dialog", lambda dialog: faults.append(dialog.message))
        page.on("request", lambda asked: faults.append(asked.url) if not asked.url.startswith(self.base) else None)
        try:
            page.goto(self.opening)
            yield page
        finally:
            context.close()
        assert faults == []


def check_looks(page: Any, path: str, width: int, scheme: str) -> None:
    """It fits the width, can be read, and is as light or dark as the system."""
    assert page.evaluate("document.documentElement.scrollWidth") <= width, path
    assert page.evaluate(CONTRAST) == [], path
    shade = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (max(shade) < 80) == (scheme == "dark"), path


@pytest.fixture(scope="module")
def top(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the runs: `run`, which `launched` starts, `other`, and one of hostile texts."""
    top = tmp_path_factory.mktemp("studio") / "runs"
    write_run(top / "other", planned=9, report=False)
    write_run(top / "hostile", texts=(EVIL, f"<think>{EVIL}</think><answer>{EVIL}</answer>"), question_type=EVIL)
    return top


@pytest.fixture(scope="module")
def launched(top: Path, with_images: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A real run, stopped by a signal as soon as it has recorded a step."""
    command = [sys.executable, "-m", "rlmed.launch", *LIVE, f"hydra.run.dir={top / 'run'}"]
    with (top.parent / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=with_images(top.parent), stdout=log, stderr=log)
    metrics = top / "run" / "metrics.jsonl"
    try:
        wait_until(
            lambda: process.poll() is not None or (metrics.exists() and metrics.stat().st_size > 0), 240, "a step"
        )
        assert process.poll() is None, (top.parent / "log").read_text()
        process.send_signal(signal.SIGSTOP)
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def studio(browser: Any, top: Path, generated_images: Path) -> Iterator[Studio]:
    command = [sys.executable, "-m", "rlmed.studio", str(top), "--port", "0", "--cache", str(top.parent / "cache")]
    command += ["--images", str(generated_images)]  # where the link in its place leads
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            address = re.search(r"http\S+", server.stdout.readline())
            assert address is not None
            yield Studio(browser, address[0])
        finally:
            server.terminate()


@pytest.fixture(scope="module")
def finished(studio: Studio, launched: subprocess.Popen[bytes]) -> Studio:
    """The studio when `run` has finished."""
    launched.send_signal(signal.SIGCONT)
    assert launched.wait(timeout=240) == 0
    return studio


@pytest.mark.parametrize(("width", "scheme"), [LOOKS[0], LOOKS[-1]])
def test_pages_of_a_run_that_goes_on(
    studio: Studio, launched: subprocess.Popen[bytes], width: int, scheme: str
) -> None:
    with studio.page(width, scheme) as page:
        for path in PAGES:
            if path != "/evaluate?run=run":  # it has no evaluation yet
                page.goto(f"{studio.base}{path}")
                check_looks(page, path, width, scheme)
        page.goto(f"{studio.base}/rollouts?run=run")
        assert int(page.locator(".count b").inner_text()) >= 16, "those of a step"
        assert page.locator(".completion").count() >= 16
        picture = page.locator(".framed img").first
        picture.scroll_into_view_if_needed()
        wait_until(lambda: picture.evaluate("image => image.naturalWidth") > 0, 30, "the picture")
        page.goto(f"{studio.base}/compare?run=run&run=other")
        assert page.locator(".key-of-runs li").all_inner_texts() == ["run", "other"]


def test_an_open_page_follows_a_run_to_its_end(studio: Studio, launched: subprocess.Popen[bytes]) -> None:
    with studio.page() as page:
        page.get_by_role("link", name="run", exact=True).click()
        assert page.locator(".state").inner_text() == "running"
        before = int(page.locator(".progress b").inner_text())
        page.evaluate("window.marked = true")
        launched.send_signal(signal.SIGCONT)
        steps = page.locator(".progress b")
        wait_until(lambda: int(steps.inner_text()) > before, 120, "a further step")
        page.locator(".state.is-finished").wait_for(timeout=240_000)
        assert page.locator("progress").get_attribute("value") == "6"
        assert "finished step 6 of 6" in " ".join(page.get_by_role("status").inner_text().split())
        assert page.get_by_role("heading", name="Held-out accuracy").count() == 1
        assert page.evaluate("window.marked"), "the page was loaded again"


@pytest.mark.parametrize(("width", "scheme"), LOOKS)
def test_pages_fit_are_readable_and_ask_no_other_host(finished: Studio, width: int, scheme: str) -> None:
    with finished.page(width, scheme) as page:
        for path in PAGES:
            page.goto(f"{finished.base}{path}")
            check_looks(page, path, width, scheme)


def test_rollouts_are_searched_with_the_keyboard_alone(finished: Studio) -> None:
    with finished.page() as page:
        page.goto(f"{finished.base}/rollouts?run=run")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
        assert page.evaluate("document.activeElement.getBoundingClientRect().top >= 0")
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "main"
        for _ in range(20):
            page.keyboard.press("Tab")
            outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            assert outline != "none"
            if page.evaluate("document.activeElement.name") == "words":
                break
        page.keyboard.type("image")
        page.keyboard.press("Enter")
        page.wait_for_url("**/rollouts?**words=image**")
        assert "found" in page.locator(".count").inner_text()
        assert page.locator(".completion").count() == 20
        picture = page.locator(".framed img").first
        picture.scroll_into_view_if_needed()
        wait_until(lambda: picture.evaluate("image => image.naturalWidth") > 0, 30, "the picture")
        page.get_by_role("link", name="next").first.click()
        assert "page 2" in page.get_by_role("navigation", name="top").inner_text()
        page.get_by_role("link", name="this prompt over training").first.click()
        assert page.get_by_role("heading", name="This prompt over training").count() == 1


def test_runs_are_chosen_and_compared(finished: Studio) -> None:
    with finished.page(400) as page:
        page.get_by_role("checkbox", name="compare run").check()
        page.get_by_role("checkbox", name="compare other").check()
        page.get_by_role("button", name="Compare the chosen runs").click()
        assert page.locator(".key-of-runs li").all_inner_texts() == ["run", "other"]
        assert page.get_by_role("row", name=re.compile("^steps")).inner_text().split() == ["steps", "6", "9"]
        curve = page.get_by_role("img", name="Reward: total")
        curve.scroll_into_view_if_needed()
        size = curve.bounding_box()
        assert size is not None
        page.mouse.move(size["x"] + 0.95 * size["width"], size["y"] + size["height"] / 2)
        assert "step 6 run" in " ".join(page.locator(".readout").inner_text().split())


def test_light_and_dark_are_switched_and_stay(finished: Studio) -> None:
    with finished.page() as page:
        page.get_by_role("button", name="Dark colours").click()
        assert page.locator("html[data-theme=dark]").count() == 1
        with page.expect_response("**/theme?to=light**"):
            page.get_by_role("button", name="Light colours").click()
        page.get_by_role("link", name="Compare").click()
        assert page.evaluate("document.documentElement.dataset.theme") == "light"


def test_pages_work_without_script(finished: Studio) -> None:
    with finished.page(java_script_enabled=False) as page:
        page.get_by_role("button", name="Dark colours").click()
        assert page.locator("html[data-theme=dark]").count() == 1
        page.get_by_role("link", name="run", exact=True).click()
        assert page.get_by_role("img", name="Reward").count() == 1
        page.get_by_role("link", name="Rollouts", exact=True).last.click()
        page.get_by_label("words in question or completion").fill("image")
        page.get_by_role("button", name="Search").click()
        assert "found" in page.locator(".count").inner_text()


def test_markup_of_a_model_is_shown_as_text(finished: Studio) -> None:
    with finished.page() as page:
        page.goto(f"{finished.base}/rollouts?run=hostile")
        assert EVIL in page.locator(".completion").first.inner_text() + page.locator(".completion").last.inner_text()
        time.sleep(0.2)  # for an image that failed to load to run its handler
