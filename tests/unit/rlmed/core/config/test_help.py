"""`--help` shows what a command takes, and nothing that it refuses."""

from __future__ import annotations

import dataclasses
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rlmed.core.config.composing import compose_config, unused_overrides
from rlmed.core.config.help import help_text, used_options
from rlmed.core.config.overrides import group_options
from rlmed.core.config.rules import MODULES, reads
from rlmed.core.config.use import plain_values
from tests.root import ROOT


@functools.cache
def settings(program: str) -> dict[str, object]:
    """What its help says after a heading that no other line begins with."""
    text = help_text(program, "What it does.", plain(program))
    block = text.partition("settings (key=value")[2].partition("\n\n")[2].partition("\n`hydra.run.dir")[0]
    found = yaml.safe_load(block)
    assert isinstance(found, dict)
    return found


@functools.cache
def plain(program: str) -> dict[str, object]:
    return dataclasses.asdict(compose_config(program, ()))


@pytest.mark.parametrize("program", MODULES)
def test_all_settings_that_a_command_reads_are_shown_and_no_other(program: str) -> None:
    values = plain_values(plain(program))
    assert plain_values(settings(program)).keys() == {key for key in values if reads(program, key)}
    assert ("algo" in settings(program)) == (program == "train")


@pytest.mark.slow
@pytest.mark.parametrize("group", ["cluster", "rollout", "learner"])
def test_an_option_is_shown_unless_the_command_refuses_it(group: str) -> None:
    for program in ("evaluate", "reliability"):
        options = group_options(group)
        taken = [option for option in options if not unused_overrides(program, [f"{group}={option}"])]
        shown = used_options(program, group)
        assert shown == (taken if len(taken) > 1 else [])  # one is the default


def test_a_file_that_options_share_is_no_option() -> None:
    assert "_extra" not in used_options("train", "reward")
    assert "_extra" not in help_text("train", "", plain("train"))


def test_groups_without_a_choice_are_left_out() -> None:
    assert used_options("evaluate", "algo") == used_options("evaluate", "learner") == []
    assert used_options("reliability", "cluster") == used_options("reliability", "rollout") == []
    assert used_options("evaluate", "rollout") == ["native", "vllm"]


def test_the_command_itself_prints_its_usage_and_the_values_of_its_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rlmed.evaluate", "data=mine.jsonl", "--help"],
        capture_output=True, text=True, check=False, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.match(r"usage: python -m rlmed\.evaluate .*key=value", done.stdout)
    assert "compare_to=" in done.stdout
    assert "- mine.jsonl\n" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tries", [True, False])
def test_a_command_that_can_be_tried_says_so(tries: bool) -> None:
    assert ("--dry-run" in help_text("train", "", plain("train"), tries=tries)) == tries
