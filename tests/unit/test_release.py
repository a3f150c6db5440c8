"""What a release holds and says: one version, a dated changelog, every file packages read."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from datetime import date
from pathlib import Path

import pytest

from tests.root import ROOT

PACKAGES = ("rlmed", "rollout", "learner", "rewards", "conf")
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
RELEASE = re.compile(r"^## (\d+\.\d+\.\d+) - (\d{4}-\d\d-\d\d)$", re.MULTILINE)


def test_the_changelog_begins_with_this_version_and_goes_back_in_time() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    releases = RELEASE.findall(text)
    assert len(releases) == len(re.findall(r"^## \d", text, re.MULTILINE)) > 0
    assert releases[0][0] == VERSION
    days = [date.fromisoformat(day) for _, day in releases]
    assert days == sorted(days, reverse=True)


def test_documents_and_examples_name_this_version() -> None:
    pages = [*(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("*.*")]
    named = [found for page in pages for found in re.findall(r"rlmed[-:](\d+\.\d+\.\d+)", page.read_text("utf-8"))]
    assert named
    assert set(named) == {VERSION}


def package_files(root: Path) -> set[str]:
    """Every file of the packages, as a path relative to `root`."""
    paths = (path for package in PACKAGES for path in (root / package).rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix() for path in paths if "__pycache__" not in path.parts}


def run_setuptools(call: str, folder: Path) -> None:
    code = f"from setuptools import build_meta; build_meta.{call}"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_wheel_holds_every_file_of_the_packages(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    checkout = tmp_path / "checkout"
    for package in PACKAGES:
        shutil.copytree(ROOT / package, checkout / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    # by way of the source archive, as `python -m build` does
    run_setuptools(f"build_sdist({str(tmp_path)!r})", checkout)
    shutil.unpack_archive(tmp_path / f"rlmed-{VERSION}.tar.gz", tmp_path, filter="data")
    run_setuptools(f"build_wheel({str(tmp_path)!r})", tmp_path / f"rlmed-{VERSION}")
    with zipfile.ZipFile(tmp_path / f"rlmed-{VERSION}-py3-none-any.whl") as wheel:
        held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert held == package_files(ROOT)
