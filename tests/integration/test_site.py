"""`make docs` builds: every link and reference of the site leads somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rlmed.core.config.use import schema_keys
from rlmed.core.metrics import METRICS
from tests.root import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("material", reason="the extra docs is not installed: make test installs it")
    pytest.importorskip("mkdocstrings", reason="the extra docs is not installed: make test installs it")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_the_reference_names_every_key_and_metric(site: Path) -> None:
    keys = (site / "reference" / "configuration.html").read_text()
    anchors = set(re.findall(r'<code id="([\w.]+)"', keys))
    assert set(schema_keys()) - {"reward.weights"} <= anchors
    metrics = (site / "reference" / "metrics.html").read_text()
    assert [name for name in METRICS if f"<code>{name}</code>" not in metrics] == []


def test_apis_come_from_docstrings(site: Path) -> None:
    page = (site / "reference" / "learner.html").read_text()
    assert 'id="learner.losses.policy_loss"' in page
    assert "Examples:" in page
    assert "&gt;&gt;&gt;" in page


def test_lists_are_those_that_github_shows(site: Path) -> None:
    for path in (ROOT / "docs").glob("*.md"):
        text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
        items = re.findall(r"^ *(?:-|\d+\.) ", text, re.MULTILINE)
        assert (site / f"{path.stem}.html").read_text().count("<li>") == len(items), path.name


def test_pages_ask_nobody_for_scripts_or_fonts(site: Path) -> None:
    for page in site.rglob("*.html"):
        loaded = re.findall(r'<(?:script|link|img|iframe)[^>]+(?:src|href)="([^"]+)"', page.read_text())
        assert [address for address in loaded if "//" in address] == [], page
