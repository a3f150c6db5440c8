"""The studio's tests are skipped without a browser, and fail where one is required."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.browser import REQUIRED, open_browser

pytest.importorskip("playwright")


@pytest.mark.parametrize(("value", "outcome"), [("1", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_without_a_browser(
    value: str, outcome: type[Exception], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PLAYWRIGHT_BROWSERS_PATH", str(tmp_path))
    monkeypatch.setenv(REQUIRED, value)
    with pytest.raises(outcome, match="make browser"), open_browser():
        pass
