"""The examples in docstrings are what the code does."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

from tests.root import ROOT

OPTIONAL = {"nibabel", "pyarrow", "pydicom", "ray", "vllm"}
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for room in ("rlmed", "rollout", "learner", "rewards")
    for path in sorted((ROOT / room).rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        if error.name not in OPTIONAL:
            raise
        pytest.skip(f"{error.name} is not installed")
    text = ""
    for test in doctest.DocTestFinder().find(module, name):
        seen: list[str] = []
        doctest.DocTestRunner().run(test, out=seen.append)
        text += "".join(seen)
    assert not text, text
