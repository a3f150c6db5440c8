"""Rewards and tasks of installed packages by name; modules beside the configuration's folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from rewards.extra import load_reward
from rlmed.core.plugins import beside
from rlmed.tasks import registry
from rlmed.tasks.registry import settle_tasks, task_named

CODE = """
from rlmed.tasks.open import Open

def few_words(example, completion):
    return float(len(completion.text.split()) <= 40)

class Staging(Open):
    name = "staging"
    template = "{question} Stage?"

number = 3
"""
ENTRY_POINTS = """
[rlmed.rewards]
few_words = plugin_of_test:few_words
number = plugin_of_test:number
gone = plugin_of_test:gone

[rlmed.tasks]
staging = plugin_of_test:Staging
"""


@pytest.fixture
def separate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget afterwards what was imported and found."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    monkeypatch.setattr(registry, "_TASKS", dict(registry._TASKS))
    monkeypatch.setenv("RLMED_CODE", "")


@pytest.fixture
def distribution(tmp_path: Path, separate: None) -> Path:
    """An installed package that registers rewards and a task."""
    (tmp_path / "plugin_of_test.py").write_text(CODE)
    info = tmp_path / "plugin_of_test-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin_of_test\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    sys.path.append(str(tmp_path))
    return tmp_path


def test_entry_points_are_found_by_name(distribution: Path) -> None:
    assert load_reward("few_words").__name__ == "few_words"
    settle_tasks(["staging"], None)
    assert task_named("staging").template == "{question} Stage?"


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("few_word", r"reward\.extra has 'few_word', .*rlmed\.rewards.*did you mean few_words\?.*module:function"),
        ("number", r"reward\.extra=number: .*not a function"),
        ("gone", r"'gone': .*plugin_of_test:gone.*AttributeError"),
    ],
)
def test_an_entry_point_that_cannot_be_used_is_an_error(name: str, match: str, distribution: Path) -> None:
    with pytest.raises(ValueError, match=match):
        load_reward(name)


def test_a_name_that_two_packages_register_is_an_error(distribution: Path) -> None:
    info = distribution / "other-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[rlmed.rewards]\nfew_words = elsewhere:few_words\n")
    with pytest.raises(ValueError, match=r"elsewhere:few_words, plugin_of_test:few_words"):
        load_reward("few_words")


def test_an_unknown_task_names_the_entry_point_that_was_meant(distribution: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.extra_tasks has 'stagin', .*did you mean staging\?.*module:Class"):
        settle_tasks(["stagin"], None)


def test_modules_beside_the_configuration_are_found(
    tmp_path: Path, separate: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("mine/conf", "work"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "mine" / "beside_of_test.py").write_text(CODE)
    monkeypatch.chdir(tmp_path / "work")
    with pytest.raises(ValueError, match=r"beside_of_test.*work"):
        load_reward("beside_of_test:few_words")
    beside("../mine/conf")
    assert load_reward("beside_of_test:few_words").__name__ == "few_words"
    with pytest.raises(ValueError, match=r"few_word.*did you mean few_words"):
        load_reward("beside_of_test:few_word")
