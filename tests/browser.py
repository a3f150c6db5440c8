"""The browser of the studio's tests: Playwright's own (`make browser`), or one on PATH."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
REQUIRED = "RLMED_REQUIRE_BROWSER"
"""Environment variable: with 1, a test without a browser fails; else it is skipped."""


@contextmanager
def open_browser() -> Iterator[Any]:
    """Yield a headless Chromium (Playwright's synchronous interface); without one, skip or fail."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        without("playwright is not installed")
    with sync_playwright() as driver:
        own = driver.chromium.executable_path
        path = own if Path(own).is_file() else next(filter(None, map(shutil.which, NAMES)), None)
        if path is None:
            without(f"none of {', '.join(NAMES)} is on PATH; `make browser` installs Playwright's own")
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def without(reason: str) -> NoReturn:
    """Skip the running test, or fail it where a browser is required."""
    if os.environ.get(REQUIRED) == "1":
        pytest.fail(f"no browser: {reason}")
    pytest.skip(f"no browser: {reason}")
