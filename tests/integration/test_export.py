"""`python -m rlmed.export`: the folder answers as the checkpoint does, and says what it is."""

from __future__ import annotations

import dataclasses
import json
import re
import resource
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from rlmed import ask
from rlmed.core.config.composing import compose_config
from rlmed.evaluation.results import EvalSummary
from rlmed.export import check, exporting
from rlmed.export.card_tasks import SHOWN
from rlmed.export.command import main
from rlmed.models.policy import load_policy
from rlmed.run import Run
from tests.root import ROOT

pytestmark = pytest.mark.slow

QUESTIONS = 3


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions about pictures, which are resized for the model."""
    folder = tmp_path_factory.mktemp("rows")
    generator = np.random.default_rng(0)
    for name in ("train", "test"):
        lines = []
        for i in range(6):
            Image.fromarray(generator.integers(0, 255, (60, 90, 3), dtype=np.uint8)).save(folder / f"{name}{i}.png")
            row = {"id": f"{name}-{i}", "image": f"{name}{i}.png", "question": f"Which of {i}?"}
            lines.append(json.dumps({**row, "options": ["liver", "lung", "knee"], "answer": "lung"}) + "\n")
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def make_run(
    tiny_folder: Callable[..., Path], rows: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Path]]:
    """`make_run("learner=lora")`: the folder of a run of two steps."""
    (rows / "parity.py").write_text("def parity(example, completion):\n    return float(completion.token_ids[0] % 2)\n")

    def make(*more: str) -> Path:
        settings = [
            "data=jsonl",
            f"data.train={rows / 'train.jsonl'}",
            f"data.eval=[{rows / 'test.jsonl'}]",
            f"model.path={tiny_folder('qwen2_vl')}",
            "steps=2",
            "algo.group_size=4",
            "algo.groups_per_step=2",
            "algo.dynamic_sampling=false",
            "rollout.max_tokens=8",
            "eval.max_tokens=8",
            "preflight.enabled=false",
            "cluster.threads=1",
            "learner.lr=1e-3",
            "reward.extra=[parity:parity]",
            "prompt.template='Look. {question} Answer.'",
        ]
        folder = tmp_path_factory.mktemp("run")
        Run(compose_config("train", [*settings, *more]), folder).execute()
        return folder

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(rows))
        yield make


@pytest.fixture(scope="module")
def run(make_run: Callable[..., Path]) -> Path:
    return make_run()


def export(run: Path, out: Path, *more: str, checked: int = QUESTIONS) -> None:
    main([str(run), "--out", str(out), "--check", str(checked), *more])


def test_an_export_answers_as_its_checkpoint_and_says_what_the_run_did(
    run: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mine"
    export(run, out)
    said = capsys.readouterr().out
    for who in ("rlmed.ask", "transformers"):
        assert re.search(rf"{who}: +3 of 3 answers are the checkpoint's", said), said
    card = (out / "README.md").read_text()
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["pipeline_tag"] == "image-text-to-text"
    summary = EvalSummary.read(run / "evaluations" / "step-000002")
    file, (trained, tested) = summary.files[0], json.loads((run / "data.json").read_text())["files"]
    accuracy = f"{100 * file.accuracy.value:.1f} ({100 * file.accuracy.low:.0f}–{100 * file.accuracy.high:.0f})"
    assert "| test | 6 | " in card
    assert f"**{accuracy}**" in card
    assert f"| training | train | 6 | `{trained['sha256']}` |" in card
    assert f"| evaluation | test | 6 | `{tested['sha256']}` |" in card
    assert "| rlmed.ask | 3 | 3 | 0 |" in card
    assert "Not a medical device" in card
    settings = json.loads((out / "generation_config.json").read_text())
    policy = load_policy(run / "checkpoints" / "step-000002")
    assert set(settings["eos_token_id"]) == policy.end_token_ids
    assert tuple(settings["suppress_tokens"]) == policy.banned_token_ids
    assert (settings["do_sample"], settings["max_new_tokens"]) == (False, 8)
    # nothing says where it was made
    small = [path for path in out.iterdir() if path.suffix in (".json", ".md", ".jinja")]
    assert len(small) > 5
    places = [str(place) for place in (tmp_path, run, rows, run.parent, ROOT)]
    assert [(path.name, place) for path in small for place in places if place in path.read_text()] == []


def test_weights_are_the_checkpoints_bit_for_bit(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "mine", checked=0)
    expected = load_policy(run / "checkpoints" / "step-000002").model.state_dict()
    found = AutoModelForImageTextToText.from_pretrained(tmp_path / "mine", dtype="auto").state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_are_merged(
    make_run: Callable[..., Path],
    tiny_folder: Callable[..., Path],
    tmp_path: Path,
    dtype: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("peft", reason="needs the extra lora")
    run = make_run("learner=lora", "learner.lora.rank=2", "eval.at_start=false", "eval.at_end=false")
    out = tmp_path / "mine"
    export(run, out, "--dtype", dtype)
    assert "3 of 3" in capsys.readouterr().out
    stored = load_file(out / "model.safetensors")
    base = load_file(tiny_folder("qwen2_vl") / "model.safetensors")
    assert stored.keys() == base.keys()
    assert {tensor.dtype for tensor in stored.values()} == {getattr(torch, dtype)}
    changed = {name for name in base if not torch.equal(stored[name], base[name].to(stored[name].dtype))}
    assert changed
    assert all("_proj." in name for name in changed)
    assert "rank 2, alpha 32" in (out / "README.md").read_text()


@pytest.mark.parametrize("family", ["qwen3_vl", "smolvlm", "gemma3", "internvl", "llava_onevision", "qwen3", "llama"])
def test_other_families_answer_the_same(
    family: str,
    tiny_folder: Callable[..., Path],
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(exporting, "MAX_TOKENS", 24)
    questions = rows / "test.jsonl"
    if family in ("qwen3", "llama"):
        questions = tmp_path / "text.jsonl"
        asked = [json.loads(line) for line in (rows / "test.jsonl").read_text().splitlines()]
        questions.write_text("".join(json.dumps({**row, "image": None}) + "\n" for row in asked))
    export(tiny_folder(family), tmp_path / "mine", "--questions", str(questions))
    said = capsys.readouterr().out
    for who in ("rlmed.ask", "transformers"):
        assert re.search(rf"{who}: +3 of 3 answers are the checkpoint's", said), said


def test_a_folder_that_answers_otherwise_is_an_error(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, answers = tmp_path / "mine", check.ask_answers

    def spoilt(folder: Path, *rest: object) -> object:
        weights = load_file(folder / "model.safetensors")
        name = next(name for name in weights if "embed_tokens" in name)
        weights[name] = weights[name].roll(1, 0)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        template = folder / "chat_template.jinja"
        template.write_text(template.read_text().replace("Look.", "See."))
        return answers(folder, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr("rlmed.export.exporting.ask_answers", spoilt)
    with pytest.raises(SystemExit) as stopped:
        export(run, out)
    assert stopped.value.code == 1
    said = capsys.readouterr().out
    assert re.search(r"rlmed.ask: +0 of 3 answers", said)
    assert re.search(r"test-0, rlmed.ask: log-probabilities [\d.e+-]+ apart", said)
    assert re.search(r"test-0, transformers: its prompt is another one, of \d+ tokens", said)
    assert "| rlmed.ask |" not in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda out: (out.mkdir(), (out / "x").write_text("")), "is not empty: choose a new folder"),
        (lambda out: out.write_text(""), "is a file: choose another name"),
        (lambda out: out.symlink_to("nowhere"), "is a broken link to nowhere"),
    ],
)
def test_a_target_that_is_taken_is_left_alone(
    run: Path, tmp_path: Path, make: Callable[[Path], object], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "out")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        export(run, tmp_path / "out")
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_disk_that_fills_leaves_nothing(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The limit of a file's size stands in for the disk's."""
    size = (run / "checkpoints" / "step-000002" / "model.safetensors").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, before[1]))
    try:
        with pytest.raises(SystemExit) as stopped:
            export(run, tmp_path / "mine", checked=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert stopped.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"^error: .*mine cannot be written: .*[Ff]ile too large.*ulimit -f", line)
    assert list(tmp_path.iterdir()) == []


def test_the_cards_examples_run(
    run: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By rlmed and transformers; the server's is run by test_export_vllm."""
    out = tmp_path / "mine"
    export(run, out, checked=0)
    shutil.copy(rows / "test0.png", out / "image.png")
    card = (out / "README.md").read_text()
    monkeypatch.chdir(out)
    (asked,) = re.findall(r"^python -m rlmed\.ask (.*)$", card, re.MULTILINE)
    capsys.readouterr()
    ask.main([*shlex.split(asked), "--max-tokens", "8"])
    assert "research only" in capsys.readouterr().out
    pytest.importorskip("torchvision", reason="transformers' processor of Qwen2-VL needs it, for videos")
    (snippet,) = re.findall(r"^```python\n(from PIL.*?)^```", card, re.MULTILINE | re.DOTALL)
    exec(compile(snippet, "README.md", "exec"), {})
    # a test model's end token may be a word, which it also prints
    (answer,) = check.ask_answers(out, [dataclasses.replace(SHOWN, image=out / "image.png")], 8)
    assert len(answer.text) > 3
    assert capsys.readouterr().out.startswith(answer.text)
