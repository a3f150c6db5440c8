"""Whole runs on a random model: what they write, and how they answer bad input."""

from __future__ import annotations

import functools
import json
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForImageTextToText, AutoTokenizer

from rlmed import ask, evaluate, sft, sft_run
from rlmed.core.config.schema import RunConfig
from rlmed.core.files.atomic import RecordError
from rlmed.data import images
from rlmed.evaluation.preflight import PreflightError
from rlmed.recording.checkpoint import CheckpointError, list_checkpoints
from rlmed.recording.recorder import REFUSED_FILE
from rlmed.run import Run
from tests.configs import renderer_of
from tests.integration.forked import run_forked
from tests.root import ROOT
from tests.rounding import LOGPROBS, rounding

pytestmark = pytest.mark.slow

Config = Callable[..., RunConfig]

OWN_REWARD = '''
def first_token(example, completion):
    """Some spread for a model that knows nothing."""
    return float(completion.token_ids[0] % 7)

def raises(example, completion):
    raise KeyError("no such key")

def nan(example, completion):
    return float("nan")

def hangs(example, completion):
    import time
    time.sleep(600)
'''


@pytest.fixture
def own_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module in the working directory, as a user has it."""
    (tmp_path / "own_reward.py").write_text(OWN_REWARD)
    monkeypatch.chdir(tmp_path)
    return "own_reward"


def test_a_run_leaves_everything_behind(make_config: Config, tmp_path: Path, own_reward: str) -> None:
    config = make_config(
        f"reward.extra=[{own_reward}:first_token]", "eval.every=1", "learner.lr=1e-3", "checkpoint.keep_last=1"
    )
    folder = tmp_path / "run"
    folder.mkdir()
    Run(config, folder).execute()

    expected = {
        "config.yaml", "versions.json", "data.json", "metrics.jsonl", "rollouts.jsonl", "timeline.jsonl", "timeline.json",
        "tensorboard", "evaluations", "checkpoints", "report.html",
    }  # fmt: skip
    assert expected <= {path.name for path in folder.iterdir()}
    assert sorted(path.name for path in (folder / "evaluations").iterdir()) == [
        f"step-00000{step}" for step in range(3)
    ]
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [1, 2]
    assert metrics[0]["reward/first_token"] > 0
    assert metrics[0]["mismatch_kl"] < LOGPROBS**2
    groups = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
    assert len(groups) == 4
    assert Path(groups[0]["image"]).is_file()
    assert "base64" in (folder / "report.html").read_text()

    (checkpoint,) = list_checkpoints(folder / "checkpoints")
    trained = AutoModelForImageTextToText.from_pretrained(checkpoint).state_dict()
    before = AutoModelForImageTextToText.from_pretrained(config.model.path).state_dict()
    unmoved = [name for name, tensor in trained.items() if tensor.equal(before[name])]
    assert unmoved == []
    assert AutoTokenizer.from_pretrained(checkpoint).chat_template


def test_each_picture_is_decoded_once(
    make_config: Config, tmp_path: Path, own_reward: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading checks it; leakage, lengths, evaluation, preflight, training take it from memory."""
    decoded: list[str] = []
    decode = images._decode
    monkeypatch.setattr(images, "_decode", lambda stream, *rest: decoded.append(stream.name) or decode(stream, *rest))
    monkeypatch.setattr(images, "_KEPT", images._KeptPictures())
    # it decodes a few again, small
    monkeypatch.setattr("rlmed.report.terminal.write_report", lambda folder: folder)
    config = make_config(f"reward.extra=[{own_reward}:first_token]", "eval.controls=true", "preflight.enabled=true")
    run = Run(config, tmp_path)
    assert {example.image for file in run.data.files for example in file.examples} <= {*map(Path, decoded)}
    run.execute()
    assert len(decoded) == len(set(decoded)) == 10


def test_sft_evaluate_and_ask_work_together(
    make_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config("sft.epochs=3", "sft.batch_size=5", "learner.lr=3e-3", "learner.lr_schedule=constant")
    folder = tmp_path / "sft"
    folder.mkdir()
    sft.main(config, folder)
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    (checkpoint, *_) = reversed(list_checkpoints(folder / "checkpoints"))

    measured = tmp_path / "measured"
    measured.mkdir()
    before = folder / "evaluations" / "step-000000"
    evaluate.main(make_config(f"model.path={checkpoint}", f"compare_to={before}"), measured)
    rows = [json.loads(line) for line in (measured / "evaluations/step-000000/rows.jsonl").read_text().splitlines()]
    assert sorted({row["control"] for row in rows}) == ["blank", "none", "reordered", "shuffled"]
    assert len(rows) == 40
    assert (measured / "evaluations/step-000000/comparison.json").is_file()

    ask.main(
        [str(tmp_path / "0.png"), "Which?", "--options", "a", "b", "--model", str(checkpoint), "--max-tokens", "4"]
    )
    assert "answer" in capsys.readouterr().out


def test_a_model_asked_otherwise_than_in_training_is_warned_of(
    make_config: Config, random_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "trained"
    shutil.copytree(random_model, folder)
    renderer_of(make_config("prompt=answer_only")).save(folder)
    renderer_of(make_config(f"model.path={folder}", "prompt=answer_only"))
    assert caplog.messages == []
    renderer_of(make_config(f"model.path={folder}"))
    assert "another prompt" in caplog.text
    assert "prompt=NAME" in caplog.text


@pytest.mark.parametrize(
    ("reward", "parts", "varied"),
    [
        (
            "reasoning",
            {"format", "choice", "likelihood_gain", "reasoning_consistency", "brevity", "repetition"},
            "likelihood_gain",
        ),
        ("unlabelled", {"format", "self_consistency"}, "self_consistency"),
    ],
)
def test_rewards_without_a_written_reasoning(
    make_config: Config, tmp_path: Path, reward: str, parts: set[str], varied: str
) -> None:
    """On the embedded model, which has the format: parts are measured, add up, and can teach."""
    config = make_config(
        "model.path=embedded:tiny_base", f"reward={reward}", "rollout.max_tokens=64", "algo.group_size=4", "learner.lr=1e-4",
        "algo.groups_per_step=3", "eval.at_start=false", "eval.at_end=false",
    )  # fmt: skip
    Run(config, tmp_path / "run").execute()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [{name for name in line if name.startswith("reward/")} for line in lines] == [
        {f"reward/{part}" for part in (*parts, "mean")}
    ] * 2
    groups = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    completions = [completion for group in groups for completion in group["completions"]]
    assert len({round(completion["reward_parts"][varied], 6) for completion in completions}) > 1
    for completion in completions:
        weighted = sum(config.reward.weights[part] * value for part, value in completion["reward_parts"].items())
        assert completion["reward"] == pytest.approx(weighted, abs=rounding(12, 3))
    assert all(line["grad_norm"] > 0 for line in lines)


def test_sft_targets() -> None:
    from rlmed.core.types import Example

    example = Example("x", None, "?", ("a", "b"), 1, completion="<think>b</think><answer>B</answer>")
    assert sft_run.target_text(example, "auto") == example.completion
    assert sft_run.target_text(example, "answer") == "<answer>B</answer>"
    assert sft_run.target_text(example, "option") == "<think>b (B).</think>\n<answer>B</answer>"


def test_a_mix_of_modalities_holds_in_every_command(
    make_config: Config, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [
        {"question": "Which?", "options": ["a", "b"], "answer": "a", "modality": "MRI" if i < 8 else "CT"}
        for i in range(10)
    ]
    settings = (f"data.train={write_rows('mixed', rows)}", "data.mix={MRI:0.25,CT:0.75}", "sft.batch_size=4")
    with pytest.raises(ValueError, match=r"data\.mix .*'PET'.*'CT' \(2 rows\)"):
        Run(make_config(*settings[:1], "data.mix={PET:1}"), tmp_path / "refused")
    config = make_config(*settings, "preflight.enabled=false", "steps=4", "eval.at_start=false", "eval.at_end=false")
    run = Run(config, tmp_path / "run")
    run.execute()
    groups = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    assert sorted(group["modality"] for group in groups) == ["CT"] * 6 + ["MRI"] * 2
    batches = sft_run.Batches(run.data.train_examples, run.renderer, config)
    for step in range(batches.steps):
        asked = [item.prompt.example.modality for item in batches.batch(step)]
        assert sorted(asked) == ["CT", "CT", "CT", "MRI"]


def test_settings_by_modality_that_do_nothing_are_warned_of(
    make_config: Config, write_rows: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [
        {"question": "Which?", "options": ["a", "b"], "answer": "a", "modality": ("mri", "CT")[i % 2]} for i in range(4)
    ]
    one, two = write_rows("one", rows[::2]), write_rows("two", rows)

    def warnings(train: Path, *overrides: str) -> list[str]:
        caplog.clear()
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        Run(make_config(f"data.train={train}", "data.eval=[]", *overrides), folder).cluster.close()
        return [message for message in caplog.messages if "modality" in message]

    assert warnings(two, "prompt=by_modality", "algo.normalize_by=modality") == []
    assert warnings(one) == []
    assert warnings(one, "prompt=by_modality", f"data.eval=[{two}]", "data.leakage=off") == []
    assert warnings(one, "prompt=by_modality") == [
        "prompt.by_modality has templates for CT, MRI, X-ray, but no row is of these: they have 'mri'"
    ]
    (message,) = warnings(one, "algo.normalize_by=modality")
    assert message.startswith("algo.normalize_by=modality has no effect")


def test_settings_for_vision_are_told_of_a_model_that_reads_text(
    make_config: Config, tiny_folder: Callable[..., Path], random_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = ("model.max_pixels=5000", "learner.freeze=[vision]")
    renderer_of(make_config(f"model.path={tiny_folder('qwen2')}", *given))
    assert "these have no effect: model.max_pixels, learner.freeze=vision" in caplog.text
    caplog.clear()
    renderer_of(make_config(f"model.path={tiny_folder('qwen2')}"))
    renderer_of(make_config(f"model.path={random_model}", *given))
    assert "is text-only" not in caplog.text


def test_sft_says_that_nothing_is_evaluated(
    make_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "sft"
    folder.mkdir()
    sft.main(make_config("sft.epochs=1", "sft.batch_size=10", "data.eval=[]"), folder)
    assert "data.eval is empty: skipping evaluation" in capsys.readouterr().out


@pytest.mark.parametrize("target", ["auto", "answer"])
def test_sft_shuffles_options_where_no_written_text_names_a_letter(
    make_config: Config, target: str, caplog: pytest.LogCaptureFixture
) -> None:
    from rlmed.core.types import Example

    config = make_config("data.shuffle_options=true", "sft.epochs=8", "sft.batch_size=2", f"sft.target={target}")
    renderer = renderer_of(config)
    written = "<think>b is B.</think><answer>B</answer>"
    examples = [
        Example("free", None, "?", ("a", "b", "c", "d"), 1),
        Example("fixed", None, "?", ("a", "b", "c", "d"), 1, completion=written),
    ]
    batches = sft_run.Batches(examples, renderer, config)
    said = "data.shuffle_options: 1 of 2 training rows keep"
    assert (said in caplog.text) == (target == "auto")
    seen: dict[str, set[tuple[str, ...]]] = {"free": set(), "fixed": set()}
    items = [item for step in range(batches.steps) for item in batches.batch(step)]
    assert batches.longest == max(len(item.sequences[0].completion.token_ids) for item in items)
    for step in range(batches.steps):
        for item in batches.batch(step):
            example = item.prompt.example
            seen[example.id].add(example.options)
            assert example.options[example.answer] == "b"
            text = renderer.decode(item.sequences[0].completion.token_ids.tolist())
            imitated = target == "auto" and example.id == "fixed"
            assert text == (written if imitated else f"<answer>{example.letter}</answer>")
    assert len(seen["free"]) > 3
    assert (seen["fixed"] == {("a", "b", "c", "d")}) == (target == "auto")


@pytest.mark.parametrize(
    ("function", "message"),
    [("raises", "KeyError"), ("nan", "nan"), ("hangs", r"reward\.timeout_s")],
)
def test_a_bad_reward_function_stops_the_run_and_is_named(
    make_config: Config, tmp_path: Path, own_reward: str, function: str, message: str
) -> None:
    limit = 0.5 if function == "hangs" else 600
    run = Run(make_config(f"reward.extra=[{own_reward}:{function}]", f"reward.timeout_s={limit}"), tmp_path)
    with pytest.raises(Exception, match=f"{own_reward}:{function}.*{message}"):
        run.execute()


def test_preflight_stops_when_nothing_can_be_learnt(make_config: Config, tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match=r"rollout\.max_tokens=6.*raise rollout\.max_tokens"):
        Run(make_config(), tmp_path).execute()
    assert "raise rollout.max_tokens" in (tmp_path / REFUSED_FILE).read_text()
    Run(make_config(), tmp_path).close()  # begins anew
    assert not (tmp_path / REFUSED_FILE).exists()


@pytest.mark.parametrize("missing", ["tokenizer.json", "preprocessor_config.json", "config.json"])
def test_a_model_folder_with_a_part_missing(
    make_config: Config, random_model: Path, tmp_path: Path, missing: str
) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(random_model, folder)
    for path in folder.glob("tokenizer*" if missing == "tokenizer.json" else missing):
        path.unlink()
    with pytest.raises(ValueError, match="broken"):
        Run(make_config(f"model.path={folder}"), tmp_path)


def test_a_model_that_is_nowhere(make_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"some/model.*model\.path="):
        Run(make_config("model.path=some/model"), tmp_path)


def test_missing_data_says_what_to_download(
    make_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"train_mri\.jsonl does not exist.*foreverbeliever/OmniMedVQA"):
        Run(make_config("data=medvqa_600", "data.train=data/medvqa_600/train_mri.jsonl"), tmp_path)


def test_prompts_that_are_too_long_are_dropped_counted_and_listed(
    make_config: Config, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [
        {"question": "Why? " * 2000 if i == 3 else "Which?", "options": ["a", "b"], "answer": "a"} for i in range(5)
    ]
    run = Run(make_config(f"data.train={write_rows('long', rows)}"), tmp_path)
    assert len(run.data.train_examples) == 4
    (dropped,) = run.data.train.dropped  # type: ignore[union-attr]
    assert dropped.id == "long-4"
    assert "tokens" in dropped.reason
    listed = json.loads((tmp_path / "data.json").read_text())
    assert "long-4" in json.dumps(listed)


def test_a_full_disk_leaves_earlier_checkpoints_and_says_so(
    make_config: Config, tmp_path: Path, own_reward: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    resource = pytest.importorskip("resource")
    signal = pytest.importorskip("signal")
    folder = tmp_path / "run"
    folder.mkdir()
    run = Run(
        make_config(f"reward.extra=[{own_reward}:first_token]", "checkpoint.every=1", "eval.at_start=false"), folder
    )
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    original = run.renderer.save

    def fill_the_disk(target: Path) -> None:
        if "000002" in target.name:  # no file may grow beyond this: what the tokenizer's file needs
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        original(target)

    monkeypatch.setattr(run.renderer, "save", fill_the_disk)
    try:
        with pytest.raises((CheckpointError, RecordError), match="step-000002"):
            run.execute()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000001"]


def test_resume_needs_the_data_of_the_start(make_config: Config, tmp_path: Path, own_reward: str) -> None:
    settings = (f"reward.extra=[{own_reward}:first_token]", "eval.at_start=false", "eval.at_end=false")
    folder = tmp_path / "run"
    Run(make_config(*settings), folder).execute()
    listed = (folder / "data.json").read_text()
    config = make_config(*settings, "resume=auto")
    (tmp_path / "3.png").unlink()
    with pytest.raises(ValueError, match=r"train\.jsonl.*10 usable rows .* 9 now.*restore"):
        Run(config, folder)
    assert (folder / "data.json").read_text() == listed
    with pytest.raises(ValueError, match=r"already contains a run \(step-000002\)"):
        Run(make_config(*settings), folder)


def test_batches_without_a_trained_token_are_no_error_and_move_nothing(
    make_config: Config, tmp_path: Path, own_reward: str
) -> None:
    settings = (f"reward.extra=[{own_reward}:first_token]", "eval.at_start=false", "eval.at_end=false")
    cut = ("algo.loss.mask_truncated=true", "rollout.max_tokens=1", "preflight.enabled=false")
    config = make_config(*settings, *cut)
    Run(config, tmp_path / "run").execute()
    trained = AutoModelForImageTextToText.from_pretrained(tmp_path / "run" / "checkpoints" / "step-000002").state_dict()
    before = AutoModelForImageTextToText.from_pretrained(config.model.path).state_dict()
    assert all(tensor.equal(before[name]) for name, tensor in trained.items())


@pytest.mark.slow
@pytest.mark.parametrize("command", ["launch", "sft", "evaluate", "reliability"])
def test_an_output_folder_that_cannot_be_written(command: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    main = functools.partial(runpy.run_module, f"rlmed.{command}", run_name="__main__")
    done = run_forked(main, [f"hydra.run.dir={tmp_path}/file/run"], tmp_path)
    assert done.returncode == 2
    assert f"error: {tmp_path}/file/run cannot be written" in done.output
    assert "hydra.run.dir=FOLDER" in done.output
    assert "Traceback" not in done.output


@pytest.mark.slow
def test_a_command_works_in_the_folder_that_holds_a_checkout(
    tmp_path: Path, with_images: Callable[[Path], Path]
) -> None:
    (with_images(tmp_path) / "rlmed").symlink_to(ROOT)
    done = subprocess.run(
        [sys.executable, "-m", "rlmed.evaluate", "eval.limit=1"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "report.html" in done.stdout
