"""The command that builds a vision-language model around a text model works whole on a few rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from rlmed import smol_base
from rlmed.data.prompts import PromptRenderer, load_processor
from rlmed.data.templates import read_prompt_settings
from rlmed.models.policy import load_policy
from rlmed.recording.checkpoint import STATE_FILE
from tests.smol_text import write_llama


@pytest.mark.slow
def test_the_build_command_from_a_text_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = write_llama(tmp_path / "text")
    target, work = tmp_path / "base", tmp_path / "work"
    arguments = ["--vlm", "--out", str(target), "--text", str(text), "--work", str(work), "--dtype", "float32"]
    arguments += ["--word-steps", "2", "--careful", "20", "--readers", "16"]
    smol_base.main(arguments)
    model = AutoModelForImageTextToText.from_pretrained(target)
    assert model.dtype == torch.bfloat16
    words = AutoModelForImageTextToText.from_pretrained(work / "words", dtype=torch.bfloat16)
    trained = model.state_dict()
    # matrices only: three steps move a gain of 1 by less than bfloat16 can tell
    assert [
        name for name, tensor in words.state_dict().items() if tensor.ndim > 1 and tensor.equal(trained[name])
    ] == []
    settings = read_prompt_settings(target)
    assert settings is not None
    assert "<think>" in settings["template"]
    PromptRenderer(*load_processor(target), **settings)
    load_policy(target)
    assert not (target / STATE_FILE).exists()  # it is a model, not a checkpoint to resume from
    # a finished build is not repeated: its work is there
    before = {path: path.stat().st_mtime_ns for path in work.rglob("*.safetensors")}
    smol_base.main(arguments)
    assert {path: path.stat().st_mtime_ns for path in work.rglob("*.safetensors")} == before
    # nor taken for one of other settings
    with pytest.raises(SystemExit):
        smol_base.main([*arguments, "--careful", "21"])
    assert f"{work} was begun with --careful 20" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (("--text", "nowhere"), "--text nowhere is no model folder"),
        (("--careful", "0"), "--careful 0"),
        (("--dtype", "float9"), "model.dtype='float9'"),
    ],
)
def test_wrong_settings_show_before_the_work(
    wrong: tuple[str, str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "a, b=c"
    with pytest.raises(SystemExit):
        smol_base.main(["--vlm", "--out", str(tmp_path / "out"), "--work", str(work), *wrong])
    assert said in capsys.readouterr().err
    assert not (work / "settings.json").exists()


@pytest.mark.parametrize("vlm", [(), ("--vlm",)], ids=["text", "vlm"])
def test_a_missing_package_is_one_line_with_the_cure(
    vlm: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("rlmed.models.smol.text.PACKAGE", "no-such-package")
    with pytest.raises(SystemExit) as stopped:
        smol_base.main([*vlm, "--out", str(tmp_path / "text"), "--work", str(tmp_path / "work")])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no-such-package" in line
    assert "pip install" in line
    assert not (tmp_path / "text").exists()


@pytest.mark.parametrize("vlm", [(), ("--vlm",)], ids=["text", "vlm"])
def test_a_folder_with_other_content_stays(
    vlm: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("rlmed.models.smol.text.find_weights", lambda: tmp_path / "unread.gguf")
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(SystemExit):
        smol_base.main([*vlm, "--out", str(tmp_path), "--work", str(tmp_path.parent / f"{tmp_path.name}-work")])
    assert f"{tmp_path} exists and is no model folder" in capsys.readouterr().err
    assert (tmp_path / "notes.txt").read_text(encoding="utf-8") == "mine"
