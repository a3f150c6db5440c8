"""`rlmed.init`: a configuration of your own that composes, fits its GPU and can be tried."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from PIL import Image
from transformers import Qwen2VLConfig

from rlmed import evaluate, init, launch, sft
from rlmed.cluster.fitting import fit
from rlmed.cluster.memory import GIB
from rlmed.commandline import run_command
from rlmed.core.config.schema import RunConfig
from rlmed.core.files.atomic import RecordError
from rlmed.core.plugins import FOLDER


def rows(folder: Path, count: int = 6, **more: object) -> Path:
    """Write a small data file with images."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        Image.linear_gradient("L").resize((40, 40)).rotate(20 * number).save(folder / "images" / f"{number}.png")
        row = {
            "image": f"images/{number}.png",
            "question": "Which organ?",
            "options": ["liver", "heart"],
            "answer": "A",
        }
        lines.append(json.dumps(row | more))
    (folder / "own.jsonl").write_text("\n".join(lines))
    return folder / "own.jsonl"


@pytest.fixture(scope="module")
def two_billion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The settings alone of Qwen2-VL-2B."""
    folder = tmp_path_factory.mktemp("two_billion")
    text = {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12}
    config = Qwen2VLConfig(
        text_config=text | {"num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
        vision_config={"hidden_size": 1536},
        architectures=["Qwen2VLForConditionalGeneration"],
    )
    config.save_pretrained(folder)
    return folder


@pytest.fixture
def composed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunConfig]:
    """`composed(module, *arguments)`: the configuration that a command gets."""
    monkeypatch.setenv(FOLDER, "")  # what a command sets goes with the test

    def compose(module: object, *arguments: str) -> RunConfig:
        got: list[RunConfig] = []
        monkeypatch.setattr("sys.argv", ["rlmed", "--dry-run", *arguments])
        program = {launch: "train", sft: "sft", evaluate: "evaluate"}[module]  # type: ignore[index]
        run_command(program, module.main, lambda config, *_: got.append(config))  # type: ignore[attr-defined]
        return got[0]

    return compose


@pytest.mark.parametrize("memory", ["24", "48", "80", "8x80"])
def test_what_is_written_composes_for_each_gpu(
    memory: str, two_billion: Path, composed: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = rows(tmp_path / "${oc.env:HOME} 'it, is: #mine")
    given = ["--data", str(data), "--model", str(two_billion), "--gpu-memory", memory, "--yes"]
    init.main(["mine", *given])
    arguments = ["--config-dir", "mine/conf", "+experiment=mine"]
    for module in (launch, sft, evaluate):
        config = composed(module, *arguments)
        assert config.data.train == str(data)
        assert config.model.path == str(two_billion)
    config = composed(launch, *arguments)
    assert config.cluster.kind == ("ray" if memory == "8x80" else "local")
    assert (config.learner.lora.rank is None) == (memory != "24")
    assert "rlmed.launch --config-dir conf +experiment=mine\n" in Path("mine/README.md").read_text()
    with pytest.raises(SystemExit) as ended:
        init.main(["mine", *given])
    assert ended.value.code == 2, "nothing is overwritten"


def test_more_memory_takes_more(two_billion: Path) -> None:
    found = [fit([f"model.path={two_billion}"], gpu_gib=gib) for gib in (16, 24, 80)]
    assert [fitting.bytes <= gib * GIB for fitting, gib in zip(found, (16, 24, 80), strict=True)] == [True] * 3
    assert [fitting.groups["learner"] for fitting in found] == ["lora", "lora", "adamw"]
    assert found[0].bytes <= found[1].bytes
    with pytest.raises(ValueError, match=r"the smallest need \d+\.\d\d GiB and there are 1\.82"):
        fit([f"model.path={two_billion}"], gpu_gib=2)


@pytest.mark.slow
def test_what_is_written_can_be_tried_with_an_own_reward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(FOLDER, "")
    data = str(rows(tmp_path / "data"))
    init.main(["mine", "--data", data, "--eval", data, "--gpu-memory", "none", "--yes"])
    shown = capsys.readouterr().out
    assert "rlmed.launch --dry-run --config-dir mine/conf +experiment=mine " in shown
    own = ["reward.extra=[my_rewards:few_words]", "preflight.enabled=false", "model.compiled_decode=false"]
    arguments = ["--config-dir", "mine/conf", "+experiment=mine", *own]
    monkeypatch.setattr("sys.argv", ["rlmed", "--dry-run", *arguments])
    run_command("train", launch.main, launch.dry_run)
    out = capsys.readouterr().out
    assert re.search(r"^time: about ", out, re.MULTILINE)
    assert "my_rewards:few_words" in out
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"--data": "gone.jsonl"}, "--data gone.jsonl: file not found"),
        ({"--data": "empty.jsonl"}, r"empty\.jsonl is empty: "),
        ({"--data": "data"}, r"--data data is a folder: .*own\.jsonl"),
        ({"--eval": "gone.jsonl"}, "--eval gone.jsonl: file not found"),
        ({"--data": "tables"}, r"--data tables is a folder .*prepare csv --source tables"),
        ({"--gpu-memory": "0"}, "--gpu-memory 0: "),
        ({"--gpu-memory": "80TB"}, "--gpu-memory 80TB: "),
        ({"--gpu-memory": "4x80"}, "--gpu-memory 4x80: .*8x80"),
        ({"--task": "report"}, "--task report: .*choice"),
        ({"--model": "gone/model/folder"}, "gone/model/folder"),
        ({"--data": None}, "--data is missing"),
    ],
)
def test_what_cannot_be_used_is_said_and_nothing_written(
    change: dict[str, str | None],
    match: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "q.csv").write_text("question,answer,image\n")
    given = {"--data": str(rows(tmp_path / "data")), "--gpu-memory": "24"} | change
    with pytest.raises(SystemExit) as ended:
        init.main(["mine", "--yes", *(part for flag, value in given.items() if value for part in (flag, value))])
    assert ended.value.code == 2
    assert re.search(match, capsys.readouterr().err)
    assert not (tmp_path / "mine").exists()


def test_rows_of_several_tasks_are_mixed(tmp_path: Path) -> None:
    choice = init.rows_of(rows(tmp_path / "choice"), "--data")
    opened = init.rows_of(rows(tmp_path / "open", task="open", options=[], answer="liver"), "--data")
    assert init.task_of_rows(choice, None) == "choice"
    assert init.task_of_rows(opened, "open") == "open"
    assert init.task_of_rows([*choice, *opened], None) == "mixed"


def test_files_to_evaluate_on_of_the_same_name_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    files = [str(rows(tmp_path / name)) for name in ("a", "b")]
    with pytest.raises(SystemExit):
        init.main(["mine", "--yes", "--data", files[0], "--eval", *files])
    assert re.search(r"--eval .*\(own, own\)", capsys.readouterr().err)
    assert not (tmp_path / "mine").exists()


def test_the_command_that_evaluates_names_rows_where_the_configuration_has_none(tmp_path: Path) -> None:
    assert init.next_commands(tmp_path, evaluates=False).endswith("step-NUMBER data=FILE.jsonl\n")
    assert init.next_commands(tmp_path, evaluates=True).endswith("step-NUMBER\n")


@pytest.fixture
def replies(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """`replies(*answers)`: what a terminal answers; those left are in the list returned."""

    def give(*answers: str) -> list[str]:
        left = list(answers)
        monkeypatch.setattr("sys.stdin", type("Terminal", (), {"isatty": lambda self: True})())
        monkeypatch.setattr("builtins.input", lambda question: left.pop(0))
        return left

    return give


def test_a_question_is_asked_again_after_a_wrong_answer(
    replies: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    data = rows(tmp_path / "data")
    (tmp_path / "q.csv").write_text("question,answer,image\n")
    left = replies("gone.jsonl", "q.csv", str(data), "gone.jsonl", "", "./gone", "", "large", "40")
    init.main(["mine"])
    assert left == []
    said = capsys.readouterr().err
    for part in ("--data gone.jsonl", "prepare csv --source q.csv", "--eval gone.jsonl", "--model ./gone", "large: "):
        assert part in said
    assert "GPUs of 40 GiB" in (tmp_path / "mine" / "conf" / "experiment" / "mine.yaml").read_text()


def test_the_end_of_input_is_told_of_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", type("Terminal", (), {"isatty": lambda self: True})())

    def ended(question: str) -> str:
        raise EOFError

    monkeypatch.setattr("builtins.input", ended)
    with pytest.raises(SystemExit) as status:
        init.main(["mine"])
    assert status.value.code == 2
    assert "--data" in capsys.readouterr().err


def test_a_readme_of_a_folder_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("theirs")
    init.main([".", "--data", str(rows(tmp_path / "data")), "--gpu-memory", "none", "--yes"])
    assert (tmp_path / "README.md").read_text() == "theirs"
    assert "kept as they are: README.md\n" in capsys.readouterr().out
    assert (tmp_path / ".gitignore").is_file()


@pytest.mark.parametrize(("folder", "named"), [("own.jsonl", "own.jsonl"), ("own.jsonl/x", "own.jsonl")])
def test_a_file_in_place_of_the_folder_is_named(
    folder: str, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data = rows(tmp_path)
    with pytest.raises(SystemExit):
        init.main([folder, "--data", str(data), "--yes"])
    assert f"{named} is a file: " in capsys.readouterr().err


def test_a_path_with_spaces_is_one_answer(
    replies: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = rows(tmp_path / "my data")
    replies(str(data), str(data), "", "none")
    init.main(["mine"])
    written = yaml.safe_load((tmp_path / "mine" / "conf" / "experiment" / "mine.yaml").read_text())
    assert written["data"]["eval"] == [str(data)]


def test_a_terminal_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = rows(tmp_path / "data")
    replies = iter([str(data), "", "", "24"])
    monkeypatch.setattr("sys.stdin", type("Terminal", (), {"isatty": lambda self: True})())
    monkeypatch.setattr("builtins.input", lambda question: next(replies))
    init.main(["mine"])
    written = yaml.safe_load((tmp_path / "mine" / "conf" / "experiment" / "mine.yaml").read_text())
    assert written["data"]["train"] == str(data)
    assert written["model"]["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("24", (1, 24)),
        (" NONE", (1, None)),
        ("80GB", (1, 80)),
        ("80 GiB ", (1, 80)),
        ("8X80", (8, 80)),
        ("16.5", (1, 16.5)),
    ],
)
def test_memory_is_read_as_people_write_it(text: str, found: tuple[int, float | None]) -> None:
    assert init.gpus_of(text) == found


def test_a_folder_that_could_not_be_written_whole_can_be_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = Path.write_text

    def full(path: Path, text: str, **more: str) -> int:
        if path.name == "my_rewards.py":
            written(path, text[:5])
            raise OSError(28, "No space left on device")
        return written(path, text, **more)

    files = {"conf/experiment/mine.yaml": "a", "README.md": "b", "my_rewards.py": "of mine", ".gitignore": ""}
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(RecordError, match=r"my_rewards\.py"):
        init.write_folder(tmp_path, files)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    monkeypatch.undo()
    assert init.write_folder(tmp_path, files) == list(files)
