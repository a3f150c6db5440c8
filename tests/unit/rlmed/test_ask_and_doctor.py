"""The two small commands."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rlmed import ask, doctor
from rlmed.core.types import Example, Prompt
from rlmed.data.images import MAX_IMAGES
from rlmed.data.prompts import PromptRenderer, load_processor
from rlmed.models.cpu.compiler import missing_library
from rlmed.models.policy import load_config
from rlmed.tasks import registry
from rlmed.tasks.registry import settle_tasks
from rollout.native.engine import NativeEngine
from tests.root import ROOT
from tests.unit.rlmed.data.pictures import marked

QUESTION = f"Which {'very ' * 60}large organ?"
"""Longer than a file's name may be."""


@pytest.mark.parametrize(
    ("options", "image", "message"),
    [
        (["only"], "good.png", "2 to 10 different texts"),
        (["a", "a"], "good.png", "2 to 10 different texts"),
        (["a,b c, d"], "good.png", "--options a 'b c' d"),
        (["a", " A"], "good.png", "2 to 10 different texts"),
        (["a", " "], "good.png", "one is blank"),
        (["a", "b"], "absent.png", r"absent\.png does not exist"),
        (["a", "b"], "scan.dcm", r"scan\.dcm is a DICOM file: .*rlmed\.studio"),
        (["a", "b"], "black.png", r"black\.png .*one colour \(0 of 255\)"),
        (["a", "b"], "transparent.png", r"transparent\.png .*: it is transparent"),
        (["a", "b"], "same.tif", r"same\.tif .*: all its values are 4000"),
        (["a", "b", "--temperature", "-1"], "good.png", r"Invalid temperature=-1\.0"),
        (["a", "b", "--temperature", "nan"], "good.png", "Invalid temperature=nan"),
        (["a", "b", "--seed", "5"], "good.png", "--seed 5 has .*without sampling: add --temperature"),
        (["a", "b", "--seed", "0"], "good.png", "--seed 0 has no effect without sampling"),
        (["a", "b", "--modality", "CT"], "good.png", "--modality CT has no effect: .* one prompt"),
    ],
)
def test_ask_refuses_in_one_line(
    options: list[str],
    image: str,
    message: str,
    tmp_path: Path,
    tiny_folder: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    marked(size=(56, 56)).save(tmp_path / "good.png")
    Image.new("L", (56, 56)).save(tmp_path / "black.png")
    Image.new("RGBA", (56, 56), (90, 20, 5, 0)).save(tmp_path / "transparent.png")
    Image.fromarray(np.full((56, 56), 4000, dtype=np.uint16)).save(tmp_path / "same.tif")
    (tmp_path / "scan.dcm").write_bytes(bytes(128) + b"DICM")
    arguments = [str(tmp_path / image), "What?", "--options", *options, "--model", str(tiny_folder("qwen2_vl"))]
    capsys.readouterr()  # what building the model printed
    with pytest.raises(SystemExit) as stopped:
        ask.main(arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert re.search(message, error)


def test_ask_asks_as_the_model_was_asked_in_training(
    tmp_path: Path, tiny_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    marked(size=(336, 336)).save(tmp_path / "good.png")
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder("qwen2_vl"), folder)
    renderer = PromptRenderer(
        *load_processor(folder),
        max_prompt_tokens=100,
        max_pixels=336 * 336,  # 144 visual tokens
        template="Say: {question}",
        by_modality={"CT": "CT: {question}"},
    )
    prompts: list[Prompt] = []
    render = PromptRenderer.render

    def watched(self: PromptRenderer, example: Example) -> Prompt:
        prompts.append(render(self, example))
        return prompts[-1]

    monkeypatch.setattr(PromptRenderer, "render", watched)
    arguments = [
        str(tmp_path / "good.png"),
        "What?",
        "--options",
        "a",
        "b",
        "--model",
        str(folder),
        "--max-tokens",
        "1",
    ]
    ask.main(arguments)
    renderer.save(folder)
    ask.main(arguments)
    ask.main([*arguments, "--modality", "CT"])
    assert "no prompt of its own" not in caplog.text
    ask.main([*arguments, "--modality", "MR"])
    assert re.search(r"--modality MR has no prompt .*available: CT", caplog.text)
    texts = [prompt.text for prompt in prompts]
    assert "Say: What?" in texts[1]
    assert "CT: What?" in texts[2]
    assert "Say: What?" in texts[3]
    assert "Your task: 1. Think through" in texts[0]
    assert "Your task" not in texts[1] + texts[2]
    # a picture shrinks as it did then
    assert 64 < len(prompts[1].token_ids) <= 100
    np.testing.assert_array_equal(prompts[1].token_ids, render(renderer, prompts[1].example).token_ids)


@pytest.mark.parametrize(
    ("images", "question", "message"),
    [
        (["good.png", "absent.png"], "What?", r"absent\.png does not exist"),
        (["good.png", "black.png", "good.png"], "What?", r"black\.png .*one colour \(0 of 255\)"),
        (["good.png", "GOOD.png"], "What?", r"GOOD\.png does not exist: .*good\.png"),
        (["good.png"] * (MAX_IMAGES + 1), "What?", f"{MAX_IMAGES + 1} images are more than {MAX_IMAGES}"),
        (["good.png"], "good.png", r"question 'good\.png' is a file"),
    ],
)
def test_ask_checks_each_of_several_images(
    images: list[str],
    question: str,
    message: str,
    tmp_path: Path,
    tiny_folder: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = str(tiny_folder("qwen2_vl"))
    monkeypatch.chdir(tmp_path)
    marked(size=(56, 56)).save("good.png")
    Image.new("L", (56, 56)).save("black.png")
    capsys.readouterr()  # what building the model printed
    with pytest.raises(SystemExit) as stopped:
        ask.main([*images, question, "--options", "a", "b", "--model", model])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert re.search(message, error)


@pytest.mark.parametrize("names", [["a.png"], ["c.png", "a.png", "b.png"]])
def test_ask_shows_all_images_in_the_order_of_the_command_line(
    names: list[str], tmp_path: Path, tiny_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / name for name in names]
    for level, path in enumerate(paths):
        marked(20 * level, (56, 56)).save(path)
    shown: list[Example] = []
    render = PromptRenderer.render

    def watched(self: PromptRenderer, example: Example) -> Prompt:
        shown.append(example)
        return render(self, example)

    monkeypatch.setattr(PromptRenderer, "render", watched)
    model = ["--model", str(tiny_folder("qwen2_vl")), "--max-tokens", "1"]
    for arguments in (["--options", "a", "b"], ["--options", "a", "b", "--seed", "1", "--temperature", "1"]):
        ask.main([*map(str, paths), QUESTION, *arguments, *model])
    assert [list(example.images) for example in shown] == [paths] * 2
    assert [example.question for example in shown] == [QUESTION] * 2


@pytest.mark.parametrize("options", [["A. liver", "B. spleen"], ["(b) spleen", "(a) liver"], ["1) liver", "2) spleen"]])
def test_ask_shows_options_with_one_letter(
    options: list[str],
    tmp_path: Path,
    tiny_folder: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    marked(size=(56, 56)).save(tmp_path / "good.png")
    shown: list[Example] = []
    render = PromptRenderer.render

    def watched(self: PromptRenderer, example: Example) -> Prompt:
        shown.append(example)
        return render(self, example)

    monkeypatch.setattr(PromptRenderer, "render", watched)
    monkeypatch.setattr(PromptRenderer, "decode", lambda *_: "<think>x</think><answer>B</answer>")
    model = ["--model", str(tiny_folder("qwen2_vl")), "--max-tokens", "1"]
    ask.main([str(tmp_path / "good.png"), "Which?", "--options", *options, *model])
    assert shown[0].options == ("liver", "spleen")
    said = capsys.readouterr().out
    assert "B) spleen" in said
    assert "embedded toy" not in said


def test_ask_asks_a_task_of_the_user_and_says_what_synonyms_mean(
    tmp_path: Path,
    tiny_folder: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "my_sides.py").write_text(
        "from rlmed.tasks.open import Open\n\n\nclass Side(Open):\n    name = 'side'\n    template = 'Side: {question}'\n"
    )
    (tmp_path / "spellings.csv").write_text("oedema,edema\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.setattr(registry, "_TASKS", dict(registry._TASKS))
    prompts: list[Prompt] = []
    render = PromptRenderer.render

    def watched(self: PromptRenderer, example: Example) -> Prompt:
        prompts.append(render(self, example))
        return prompts[-1]

    monkeypatch.setattr(PromptRenderer, "render", watched)
    monkeypatch.setattr(PromptRenderer, "decode", lambda *_: "<think>x</think><answer>Oedema and mass</answer>")
    model = ["--model", str(tiny_folder("llama")), "--max-tokens", "1"]
    synonyms = ["--synonyms", str(tmp_path / "spellings.csv")]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        ask.main(["Which?", "--task", "side", *model])
    unknown = capsys.readouterr().err
    assert re.search(r"'side' is unknown.* your own with --extra-tasks$", unknown.strip())
    assert "data.extra_tasks" not in unknown
    try:
        ask.main(["Which?", "--task", "side", "--extra-tasks", "my_sides:Side", *synonyms, *model])
    finally:
        settle_tasks([], None)
    assert "Side: Which?" in prompts[0].text
    said = capsys.readouterr().out
    assert re.search(r"answer +Oedema and mass\nmeans +edema, mass\n", said)
    with pytest.raises(SystemExit):
        ask.main(["Which?", "--options", "a", "b", *synonyms, *model])
    assert "has no effect on --task choice" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        ask.main(["Which?", "--task", "side", "--extra-tasks", "my_sides", *model])
    assert re.search(r"--extra-tasks has 'my_sides', .*: write module:Class", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("family", "task", "written", "said"),
    [
        ("qwen2_vl", "grounding", "[[100, 200, 500, 1000]]", r"answer +\[\[100, 200, 500, 1000\]\]\nthat is +in thousandths of"
         r" .*; in pixels of the file, 300x200: \[\[30, 40, 150, 200\]\]"),
        ("qwen2_5_vl", "grounding", "[[56, 56, 84, 84]]", r"that is +in pixels of the image as the model saw it, 112x84; .*"
         r"300x200: \[\[150, 133, 225, 200\]\]"),
        ("qwen2_vl", "grounding", "[]", r"answer +\[\]\nthat is .*200: \[\]\n"),
        ("qwen2_vl", "grounding", "on the left", r"answer +\(unreadable for the task grounding: 'on the left'\)\n[^t]"),
        ("qwen2_vl", "labels", " ", r"answer +\(none; the model wrote"),
        ("qwen2_vl", "report", "A cyst.", r"answer +A cyst\.\n[^t]"),
    ],
)  # fmt: skip
def test_ask_says_the_units_of_boxes_and_what_cannot_be_read(
    family: str, task: str, written: str, said: str, tmp_path: Path, tiny_folder: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    marked(size=(300, 200)).save(tmp_path / "good.png")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(PromptRenderer, "decode", lambda *_: f"<think>x</think><answer>{written}</answer>")
    model = ["--model", str(tiny_folder(family)), "--max-tokens", "1"]
    ask.main([str(tmp_path / "good.png"), "Where?", "--task", task, *model])
    assert re.search(said, capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["Where?", "--task", "ground"], r"error: --task 'ground' is unknown: did you mean grounding\?"),
        (
            ["Where?", "--task", "grounding"],
            "error: --task grounding: the task grounding needs an image: name it before",
        ),
        (["Report.", "--task", "report"], "error: the task report needs an image: name it before"),
        (
            ["What?", "--task", "open", "--synonyms", "none.csv"],
            r"error: --synonyms: none\.csv cannot be read: No such",
        ),
    ],
)
def test_ask_says_what_is_wrong_with_a_task(
    arguments: list[str], said: str, tiny_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    with pytest.raises(SystemExit):
        ask.main([*arguments, "--model", str(tiny_folder("qwen2_vl"))])
    assert re.search(said, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("cyst, haze, fog", "that is +partly outside of the options: haze, fog\n"),
        ("haze", "that is +outside of the options: haze\n"),
        ("cyst, Mass", r"answer +cyst, Mass\n[^t]"),
        ("none", r"answer +none\n[^t]"),
    ],
)
def test_ask_says_which_labels_are_outside_of_the_options(
    written: str, said: str, tiny_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(PromptRenderer, "decode", lambda *_: f"<think>x</think><answer>{written}</answer>")
    options = ["--task", "labels", "--options", "cyst", "mass", "--model", str(tiny_folder("llama"))]
    ask.main(["Which?", *options, "--max-tokens", "1"])
    assert re.search(said, capsys.readouterr().out)


def test_ask_asks_a_text_model_without_an_image(
    tiny_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    ask.main(["Which?", "--options", "liver", "spleen", "--model", str(tiny_folder("llama")), "--max-tokens", "1"])
    assert "answer " in capsys.readouterr().out


def test_ask_says_of_the_embedded_model_and_its_copies_that_they_are_a_toy(
    tmp_path: Path, base_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    marked(size=(56, 56)).save(tmp_path / "good.png")
    for model in ([], ["--model", str(base_copy)]):
        ask.main([str(tmp_path / "good.png"), "Which?", "--options", "liver", "spleen", "--max-tokens", "1", *model])
        said = capsys.readouterr().out
        assert (
            said.count("This model is the embedded toy, or was trained from it: it knows only generated images.") == 1
        )


def test_ask_warns_where_prompt_and_completion_pass_the_models_positions(
    tmp_path: Path,
    tiny_folder: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    marked(size=(56, 56)).save(tmp_path / "good.png")
    folder = tiny_folder("qwen2_vl")
    limit = load_config(folder).get_text_config().max_position_embeddings
    lengths: list[int] = []
    monkeypatch.setattr(NativeEngine, "submit", lambda _, request: lengths.append(len(request.prompt.token_ids)))
    monkeypatch.setattr(NativeEngine, "busy", False)
    arguments = [str(tmp_path / "good.png"), "Which?", "--options", "a", "b", "--model", str(folder), "--max-tokens"]

    def warned(max_tokens: int) -> str:
        caplog.clear()
        with pytest.raises(IndexError):  # the engine gives no completion
            ask.ask(ask.parse_arguments([*arguments, str(max_tokens)]))
        return caplog.text

    assert "positions" not in warned(1)
    assert "positions" not in warned(limit - lengths[0])
    said = rf"\b{lengths[0]} tokens .*--max-tokens {limit - lengths[0] + 1} .* {limit} positions"
    assert re.search(said, warned(limit - lengths[0] + 1))


def test_doctor_finds_what_is_installed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    findings = {finding.what: finding for finding in doctor.examine()}
    assert findings["torch"].status == "ok"
    assert findings["python"].status == "ok"
    if not torch.cuda.is_available():
        assert findings["attention"].detail == "padded (faster without CUDA)"
        path = missing_library() or "compiled kernels"
        assert path in findings["decode"].detail
    monkeypatch.setattr(doctor, "REQUIRED", ("torch", "a-package-that-nobody-has"))
    with pytest.raises(SystemExit) as stopped:
        doctor.main([])
    assert stopped.value.code == 1
    assert "pip install a-package-that-nobody-has" in capsys.readouterr().out


def test_doctor_takes_no_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    for given in ("rollout=vllm", "--model=x"):
        with pytest.raises(SystemExit) as stopped:
            doctor.main([given])
        assert stopped.value.code == 2
        assert f"unrecognized arguments: {given}" in capsys.readouterr().err


def test_doctor_looks_for_what_the_project_needs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert sorted(doctor.REQUIRED) == sorted(re.split(r"[<>=]", entry)[0] for entry in project["dependencies"])


def test_doctor_says_what_is_missing_where_nothing_is_installed() -> None:
    command = [sys.executable, "-S", "-m", "rlmed.doctor"]  # without site-packages
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "pip install transformers" in done.stdout


def test_an_interrupted_examination_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> list[doctor.Finding]:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "examine", interrupted)
    with pytest.raises(SystemExit, match="interrupted"):
        doctor.main([])
