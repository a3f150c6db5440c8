"""`--config-dir` and `--dry-run`: what was meant, where something else is given."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlmed import launch
from rlmed.commandline import run_command
from rlmed.core.config.arguments import check_config_dir, check_spelling


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder as `rlmed.init` writes it is in the current one."""
    (tmp_path / "proj" / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "proj" / "conf" / "experiment" / "mine.yaml").write_text("steps: 2\n")
    monkeypatch.chdir(tmp_path)


def test_the_folder_above_the_yaml_files_is_corrected() -> None:
    with pytest.raises(ValueError, match=r"experiment=mine: .*did you mean --config-dir proj/conf[?]"):
        check_config_dir("proj", ["steps=2", "+experiment=mine"])


def test_a_missing_folder_is_said_with_the_current_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"--config-dir gone: folder not found in {tmp_path}"):
        check_config_dir("gone", ())


@pytest.mark.parametrize("entry", ["+experiment=mine", "+experiment=other", "algo=grpo", "steps=2"])
def test_other_settings_pass(entry: str) -> None:
    check_config_dir("proj/conf" if entry.endswith("mine") else "proj", [entry])


@pytest.mark.parametrize("flag", ["--dryrun", "--dry_run", "-dry-run"])
def test_another_spelling_of_dry_run_is_corrected(flag: str) -> None:
    check_spelling(["--dry-run", "steps=2"])
    with pytest.raises(ValueError, match=f"{flag}: .*--dry-run[?]"):
        check_spelling([flag, "steps=2"])


def test_a_command_checks_the_folder(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["rlmed", "--help", "--config-dir", "proj", "+experiment=mine"])
    with pytest.raises(SystemExit) as ended:
        run_command("train", launch.main)
    assert ended.value.code == 2
    assert "--config-dir proj/conf?" in capsys.readouterr().err
