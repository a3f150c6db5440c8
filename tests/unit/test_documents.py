"""What README and docs tell people to type, set and open is there: commands, keys, files."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest

from rlmed.commandline import compose_config, unused_overrides
from rlmed.core.config_building import check_key
from rlmed.core.config_rules import MODULES
from rlmed.core.config_use import schema_keys
from rlmed.data.readers.registry import find_reader
from rlmed.overrides import CONFIG_GROUPS, expand, group_options
from rlmed.reproduce import plan

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))
"""The lab log tells what was done at its time: only its links are looked at."""
GUIDES = tuple(page for page in PAGES if page != "docs/lab-log.md")
PROGRAMS = {module.rpartition(".")[2]: program for program, module in MODULES.items()}
SECTIONS = {key.partition(".")[0] for key in schema_keys() if "." in key}
FENCE = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def code(page: str) -> Iterator[str]:
    """Lines of its blocks, without comments and continued ones joined, and its code in running text."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for block in FENCE.findall(text):
        yield from re.sub(r"\\\n\s*", "", block).splitlines()
    for span in re.findall(r"`([^`]+)`", FENCE.sub("", text)):
        yield " ".join(span.replace("\\|", "|").split())


def commands(page: str) -> Iterator[tuple[str, list[str]]]:
    """Name and arguments of each `python -m rlmed.NAME`; what stands for more (`...`) is left out."""
    for line in code(page):
        found = re.search(r"python -m rlmed\.(\w+)(.*)", re.sub(r"\s+#.*", "", line))
        if found:
            words = shlex.split(found[2].partition(" -- ")[0])
            yield found[1], [word for word in words if word not in ("...", "…", "\\")]


CASES = [(page, name, arguments) for page in GUIDES for name, arguments in commands(page)]


class ParsedError(Exception):
    """The command line was taken."""


def stop_when_parsed(monkeypatch: pytest.MonkeyPatch) -> list[argparse.Namespace]:
    """From now on a command ends where it has parsed its command line; what it has parsed."""
    seen: list[argparse.Namespace] = []

    for name in ("parse_args", "parse_intermixed_args"):
        real = getattr(argparse.ArgumentParser, name)

        def parse(self: argparse.ArgumentParser, arguments: Any = None, *, real: Any = real) -> NoReturn:
            seen.append(real(self, arguments))
            raise ParsedError

        monkeypatch.setattr(argparse.ArgumentParser, name, parse)
    return seen


def test_there_are_commands_to_look_at() -> None:
    assert {name for _, name, _ in CASES} >= {
        "launch",
        "sft",
        "evaluate",
        "ask",
        "prepare",
        "reproduce",
        "report",
        "doctor",
    }
    assert len(CASES) > 40


@pytest.mark.parametrize(
    ("page", "name", "arguments"), CASES, ids=[f"{page}: {name} {' '.join(rest)}" for page, name, rest in CASES]
)
def test_a_command_is_taken(page: str, name: str, arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if name in PROGRAMS:
        check_overrides(PROGRAMS[name], [word for word in arguments if not word.startswith("-")])
        return
    module = importlib.import_module(f"rlmed.{name}")
    if not arguments and name not in ("doctor", "reproduce"):
        return  # the command's name alone
    seen = stop_when_parsed(monkeypatch)
    monkeypatch.setattr("sys.argv", [name, *arguments])
    if list(arguments) != ["READER", "--source", "PATH", "--out", "DIR"] and "READER" not in arguments:
        with pytest.raises(ParsedError):
            module.main()
        check_parsed(name, seen[0])


def check_parsed(name: str, given: argparse.Namespace) -> None:
    """What a command looks at right after its command line."""
    if name == "prepare":
        for option in find_reader(given.reader).options:
            option.check(vars(given))
    if name == "reproduce":
        plan(Path("out"), given.methods, given.seeds, given.overrides)


def check_overrides(program: str, overrides: Sequence[str]) -> None:
    """Each is read by the program, and together they are a configuration."""
    expanded = [word for word in expand(overrides, cuda=False) if not word.startswith("hydra.")]
    refusals = unused_overrides(program, expanded)
    assert [refusal.text for refusal in refusals] == []
    compose_config(program, expanded)


@pytest.mark.parametrize("page", GUIDES)
def test_keys_and_options_exist(page: str) -> None:
    for span in code(page):
        for word in re.findall(r"(?<![\w./:-])[+]?[a-z_]+(?:\.[a-z_*]+)*=?[\w.-]*", span):
            key, equals, value = word.lstrip("+").partition("=")
            if key in CONFIG_GROUPS and equals and re.fullmatch(r"[a-z]\w+", value):
                assert value in group_options(key) or key in ("model", "data"), f"{page}: {word}"
            elif (
                key.partition(".")[0] in SECTIONS
                and "." in key
                and not re.search(r"\.(json|jsonl|py|md|yaml|rubric)\b", word)
            ):
                check_key(key.rstrip(".*").removesuffix("_") if "*" in key else key)


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
        for name in re.findall(
            r"(?<![\w/.-])(?:rlmed|rollout|learner|rewards|conf|docs|tests|benchmarks|examples)/[\w/.-]*\w", span
        ):
            assert (ROOT / name).exists() or list((ROOT / name).parent.glob(f"{Path(name).name}*")), f"{page}: {name}"
