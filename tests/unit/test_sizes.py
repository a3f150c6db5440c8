"""Files and functions stay short enough to be read in one sitting."""

from __future__ import annotations

import ast

import pytest

from tests.root import ROOT

FOLDERS = ("rlmed", "rollout", "learner", "rewards", "conf", "benchmarks", "tests")
PATHS = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
MOST_LINES, MOST_LINES_OF_TESTS, MOST_LINES_OF_A_FUNCTION = 399, 599, 59


def too_long(source: str) -> list[str]:
    """Name and length of each function above the limit."""
    functions = (
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    lengths = ((node.name, (node.end_lineno or 0) - node.lineno + 1) for node in functions)
    return [f"{name}: {length}" for name, length in lengths if length > MOST_LINES_OF_A_FUNCTION]


@pytest.mark.parametrize("folder", FOLDERS)
def test_files_and_functions_are_short(folder: str) -> None:
    limit = MOST_LINES_OF_TESTS if folder == "tests" else MOST_LINES
    sources = {path: path.read_text(encoding="utf-8") for path in PATHS if path.relative_to(ROOT).parts[0] == folder}
    assert sources
    assert {str(path): lines for path, text in sources.items() if (lines := text.count("\n")) > limit} == {}
    assert {str(path): found for path, text in sources.items() if (found := too_long(text))} == {}


def test_a_long_function_is_found() -> None:
    assert too_long("def short():\n    pass\n\ndef long():\n" + "    pass\n" * 59) == ["long: 60"]
