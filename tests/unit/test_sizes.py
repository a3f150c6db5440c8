"""Files and functions stay short enough to be read in one sitting."""

from __future__ import annotations

import ast
import re

import pytest

from tests.root import ROOT

FOLDERS = ("rlmed", "rollout", "learner", "rewards", "conf", "benchmarks", "tests")
PATHS = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
MOST_LINES, MOST_LINES_OF_TESTS, MOST_LINES_OF_A_FUNCTION = 399, 599, 59


WIDTH_OF_PROSE = 100


def wide_prose(source: str) -> list[str]:
    """Lines of docstrings and comments above the limit that are no example, table or formula."""
    lines, found = source.split("\n"), []
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        for entry in body if isinstance(body, list) else ():
            if isinstance(entry, ast.Expr) and isinstance(entry.value, ast.Constant):
                found += lines[entry.lineno - 1 : entry.end_lineno]
    found += [line for line in lines if line.lstrip().startswith("# ") and "noqa" not in line]
    prose = (line for line in found if not re.match(r"\s*(>>>|\.\.\.|\||#:? *-{3})|.*\S   ", line))
    return [line for line in prose if len(line) > WIDTH_OF_PROSE]


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


def test_a_wide_line_of_prose_is_found() -> None:
    wide = "word " * 20
    assert wide_prose(f'"""{wide}"""\n# {wide}\nx = "{wide}"\n') == [f'"""{wide}"""', f"# {wide}"]
    assert wide_prose(f'"""Short.\n\n    >>> {wide}\n    | {wide} |\n"""') == []


@pytest.mark.parametrize("folder", FOLDERS)
def test_prose_is_wrapped(folder: str) -> None:
    sources = {path: path.read_text(encoding="utf-8") for path in PATHS if path.relative_to(ROOT).parts[0] == folder}
    assert {str(path): found for path, text in sources.items() if (found := wide_prose(text))} == {}
