"""A part of the program is given its sections of the configuration; only wiring takes the whole."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.root import ROOT

WIRING = tuple(
    f"rlmed/cluster/{name}.py"
    for name in ("advice", "build", "capacity", "commands", "fitting", "requirements", "reward_processes")
)
"""Beside the files directly in `rlmed/`; `rlmed.core.config` makes the whole and checks it."""


def takers(source: str) -> Iterator[str]:
    """Yield the functions with a RunConfig parameter, alone or as part of another type."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            given = node.args
            for parameter in [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]:
                if parameter and parameter.annotation and "RunConfig" in ast.unparse(parameter.annotation):
                    yield node.name


def test_a_function_that_takes_the_whole_is_found() -> None:
    source = """
def one(config: RunConfig): ...
class A:
    def two(self, *, config: "schema.RunConfig | None" = None): ...
def three(config: ModelConfig) -> RunConfig: ...
"""
    assert list(takers(source)) == ["one", "two"]


def test_only_wiring_takes_the_whole_configuration() -> None:
    found = {
        name: sorted(takers(path.read_text(encoding="utf-8")))
        for package in ("rlmed", "rollout", "learner", "rewards")
        for path in sorted((ROOT / package).rglob("*.py"))
        for name in [path.relative_to(ROOT).as_posix()]
        if name.count("/") > 1 or package != "rlmed"
        if name not in WIRING and not name.startswith("rlmed/core/config/")
    }
    assert {name: functions for name, functions in found.items() if functions} == {}
