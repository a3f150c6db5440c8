"""`rlmed COMMAND` is `python -m rlmed.COMMAND`."""

from __future__ import annotations

import runpy
import sys
from importlib.metadata import version

import pytest

from rlmed.__main__ import COMMANDS, main
from tests.root import ROOT


def test_every_command_that_users_run_is_listed() -> None:
    modules = {path.stem for path in (ROOT / "rlmed").glob("*.py") if '"__main__"' in path.read_text()}
    rooms = {path.parent.name for path in (ROOT / "rlmed").glob("*/__main__.py")}
    # the builders of models are for those who work on rlmed
    assert set(COMMANDS) == (modules | rooms) - {"__main__", "tiny_base", "smol_base"}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_gets_its_own_arguments(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(runpy, "run_module", lambda module, **_: called.append((module, list(sys.argv))))
    monkeypatch.setattr(sys, "argv", ["rlmed", name, "--help", "steps=2"])
    main()
    assert called == [(f"rlmed.{name}", [f"rlmed {name}", "--help", "steps=2"])]


def test_without_a_command_they_are_listed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["rlmed"])
    main()
    listed = capsys.readouterr().out
    assert all(f"\n  {name} " in listed for name in COMMANDS)


def test_a_command_that_does_not_exist(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["rlmed", "lunch"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "lunch: unknown command; did you mean launch?" in capsys.readouterr().err


def test_the_version_is_that_of_the_installed_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["rlmed", "--version"])
    main()
    assert capsys.readouterr().out == f"rlmed {version('rlmed')}\n"
