"""What README and docs tell people to type, set and open is there: commands, keys, files."""

from __future__ import annotations

import argparse
import importlib.util
import re
import runpy
import shlex
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest

from rlmed.core.config.building import check_key
from rlmed.core.config.composing import compose_config, unused_overrides
from rlmed.core.config.overrides import CONFIG_GROUPS, expand, group_options
from rlmed.core.config.rules import MODULES
from rlmed.core.config.use import schema_keys
from rlmed.data.readers.registry import find_reader
from rlmed.reproduce.runs import plan
from tests.root import ROOT

PAGES = ("README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))
"""The lab log tells what was done at its time: only its links are looked at."""
GUIDES = tuple(page for page in PAGES if page != "docs/lab-log.md")
PROGRAMS = {module.rpartition(".")[2]: program for program, module in MODULES.items()}
SECTIONS = {key.partition(".")[0] for key in schema_keys() if "." in key}
FENCE = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)
FILE_NAME = re.compile(r"\.(json|jsonl|py|md|yaml|rubric)\b")
FILE_PATH = re.compile(r"(?<![\w/.-])(?:rlmed|rollout|learner|rewards|conf|docs|tests|benchmarks|examples)/[\w/.-]*\w")
MORE = ("...", "…")
"""Stands for what else a command line holds."""


def code(page: str) -> Iterator[str]:
    """Lines of its blocks, continued ones joined, and its code in running text."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for block in FENCE.findall(text):
        yield from re.sub(r"\\\n\s*", "", block).splitlines()
    for span in re.findall(r"`([^`]+)`", FENCE.sub("", text)):
        yield " ".join(span.replace("\\|", "|").split())


def commands(page: str) -> Iterator[tuple[str, list[str]]]:
    """Name and arguments of each `python -m rlmed.NAME`, without the comment behind it."""
    for line in code(page):
        found = re.search(r"python -m rlmed\.(\w+)(.*)", re.sub(r"\s+#.*", "", line))
        if found:
            yield found[1], shlex.split(found[2].replace("READER", "csv"))


OWN = ("mine/conf", "+experiment=mine")
"""What `rlmed.init` writes: folder of `--config-dir`, and the experiment in it."""
CASES = [(page, name, arguments) for page in GUIDES for name, arguments in commands(page)]


class TakenError(Exception):
    """The command line was taken."""


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[argparse.Namespace]:
    """What a command, which ends there, has made of its command line."""
    seen: list[argparse.Namespace] = []

    def stopping(real: Callable[..., argparse.Namespace]) -> Callable[..., NoReturn]:
        def parse(*arguments: Any) -> NoReturn:
            seen.append(real(*arguments))
            raise TakenError

        return parse

    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, stopping(getattr(argparse.ArgumentParser, name)))
    return seen


def test_there_are_commands_to_look_at() -> None:
    named = {name for _, name, _ in CASES}
    assert named >= {*PROGRAMS, "ask", "prepare", "reproduce", "report", "leakage", "doctor"}
    assert len(CASES) > 40


@pytest.mark.parametrize(
    ("page", "name", "arguments"), CASES, ids=[" ".join((page, name, *rest)) for page, name, rest in CASES]
)
def test_a_command_is_taken(
    page: str,
    name: str,
    arguments: Sequence[str],
    monkeypatch: pytest.MonkeyPatch,
    parsed: list[argparse.Namespace],
) -> None:
    if name in PROGRAMS:
        check_overrides(PROGRAMS[name], arguments)
    elif arguments and "--help" not in arguments:
        monkeypatch.setattr("sys.argv", [name, *arguments])
        with warnings.catch_warnings():
            # it runs anew
            warnings.filterwarnings("ignore", "'rlmed.* found in sys.modules", RuntimeWarning)
            with pytest.raises(TakenError):
                runpy.run_module(f"rlmed.{name}", run_name="__main__")
        check_parsed(name, *parsed)
    else:
        assert importlib.util.find_spec(f"rlmed.{name}") is not None, page


def check_overrides(program: str, arguments: Sequence[str]) -> None:
    """Each is read by the program, and together they are a configuration."""
    own = OWN if "--config-dir" in arguments else ()
    overrides = [word for word in arguments if not word.startswith("-") and word not in MORE and word not in own]
    expanded = [word for word in expand(overrides, cuda=False) if not word.startswith("hydra.")]
    compose_config(program, expanded)
    if not set(MORE) & set(arguments):
        assert [refusal.text for refusal in unused_overrides(program, expanded)] == []


def check_parsed(name: str, given: argparse.Namespace) -> None:
    """What a command looks at right after its command line."""
    if name == "prepare":
        for option in find_reader(given.reader).options:
            option.check(vars(given))
    if name == "reproduce":
        plan(Path("out"), given.methods, given.seeds, given.overrides)


@pytest.mark.parametrize("page", GUIDES)
def test_keys_and_options_exist(page: str) -> None:
    for span in code(page):
        for word in re.findall(r"(?<![\w./:-])[+]?[a-z_]+(?:\.[a-z_*]+)*=?[\w.-]*", span):
            key, equals, value = word.lstrip("+").partition("=")
            if key in CONFIG_GROUPS and equals and re.fullmatch(r"[a-z]\w+", value):
                assert value in group_options(key) or key in ("model", "data") or word in OWN, f"{page}: {word}"
            elif (ROOT / f"{key.replace('.', '/')}.py").is_file():
                continue  # a program behind `python -m`
            elif key.partition(".")[0] in SECTIONS and "." in key and not FILE_NAME.search(word):
                check_key(key.rstrip(".*").removesuffix("_") if "*" in key else key)


def test_tests_that_troubleshooting_names_exist() -> None:
    named = set(re.findall(r"\btest_\w+", (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")))
    assert len(named) > 10
    assert named <= {path.stem for path in (ROOT / "tests").rglob("test_*.py")}


@pytest.mark.parametrize("page", [*PAGES, "benchmarks/README.md", "CHANGELOG.md"])
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", FENCE.sub("", text)):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), f"{page}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in headings}, target


@pytest.mark.parametrize("page", [*GUIDES, "benchmarks/README.md"])
def test_files_that_are_named_exist(page: str) -> None:
    for span in code(page):
        for name in FILE_PATH.findall(span):
            assert (ROOT / name).exists() or list((ROOT / name).parent.glob(f"{Path(name).name}*")), f"{page}: {name}"
