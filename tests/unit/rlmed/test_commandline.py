"""Shorthands of the command line, the run's folder, and exit codes."""

from __future__ import annotations

import dataclasses
import errno
import os
import re
import sys
from pathlib import Path

import hydra
import pytest
import yaml

from rlmed.cluster.advice import sparing_keys
from rlmed.commandline import _parse_flags, expand, run_command
from rlmed.core.config.arguments import profile_notice
from rlmed.core.config.checks import ConfigError
from rlmed.core.config.composing import check_same_run, compose_config, to_yaml
from rlmed.core.config.schema import RunConfig
from rlmed.core.files.atomic import RecordError
from rlmed.core.protocols import ClusterError
from rlmed.recording.checkpoint import CheckpointError
from rlmed.run_folders import check_writable, newest_run
from tests.unit.rlmed.test_run_folder import failed, run


def config(*overrides: str) -> RunConfig:
    return compose_config("train", overrides)


@pytest.mark.parametrize(
    ("arguments", "cuda", "expanded"),
    [
        (["+experiment=medvqa_600"], False, ["+experiment=medvqa_600", "profile=tiny"]),
        (["+experiment=medvqa_600"], True, ["+experiment=medvqa_600"]),
        (["+experiment=medvqa_600", "profile=paper"], False, ["+experiment=medvqa_600", "profile=paper"]),
        (["+experiment=medvqa_600", "profile=tiny"], True, ["+experiment=medvqa_600", "profile=tiny"]),
        (["profile=tiny"], True, ["+profile=tiny"]),
        (["+experiment=other"], False, ["+experiment=other"]),
        (["model=/models/mine"], False, ["model.path=/models/mine"]),
        (["model=tiny"], False, ["model=tiny"]),
        (["model=../my dir (v2)/m=x"], False, ["model.path='../my dir (v2)/m=x'"]),
        (["model='my dir/m'"], False, ["model.path='my dir/m'"]),
        (["data=a.jsonl,b.jsonl"], False, ["data=jsonl", "data.eval=[a.jsonl,b.jsonl]"]),
        (["data=it's.jsonl"], False, ["data=jsonl", r"data.eval=['it\'s.jsonl']"]),
        (["data=a.jsonl"], False, ["data=jsonl", "data.eval=[a.jsonl]"]),
        (["data=[a.jsonl,b.jsonl]"], False, ["data=jsonl", "data.eval=[a.jsonl,b.jsonl]"]),
        (["data=phantom", "steps=3", "--help"], False, ["data=phantom", "steps=3", "--help"]),
    ],
)
def test_expand(arguments: list[str], cuda: bool, expanded: list[str]) -> None:
    assert expand(arguments, cuda=cuda) == expanded


@pytest.mark.parametrize(
    ("arguments", "profile"),
    [
        ([], ["+profile=tiny"]),
        (["steps=3"], ["+profile=tiny"]),
        (["model=tiny"], ["+profile=tiny"]),
        (["model=embedded:tiny_base"], ["+profile=tiny"]),
        (["data.train=a.jsonl"], ["+profile=tiny"]),
        (["model=models/mine"], []),
        (["model.path=models/mine"], []),
        (["model=qwen2_vl_2b"], []),
        (["+experiment=mine"], []),
        # these may name a model
        (["--config-dir", "conf", "+site=ours"], []),
        (["--config-name=ours"], []),
        (["hydra.searchpath=[conf]", "+site=ours"], []),
    ],
)
@pytest.mark.parametrize("cuda", [False, True])
def test_the_embedded_model_is_trained_with_its_profile(arguments: list[str], profile: list[str], cuda: bool) -> None:
    assert [entry for entry in expand(arguments, cuda=cuda, trains=True) if "profile" in entry] == profile
    assert [entry for entry in expand(arguments, cuda=cuda) if "profile" in entry] == []


@pytest.mark.parametrize(
    ("arguments", "notice"),
    [
        (["+experiment=medvqa_600"], "no CUDA device"),
        (["+experiment=medvqa_600", "profile=tiny"], ""),
        (["+experiment=medvqa_600", "profile=paper"], ""),
        (["profile=tiny"], ""),
        (["steps=3"], "no experiment, profile or model"),
        (["model=models/mine"], ""),
    ],
)
def test_a_profile_that_was_not_given_is_said(arguments: list[str], notice: str) -> None:
    said = profile_notice(arguments, expand(arguments, cuda=False, trains=True))
    assert said.startswith(notice)
    assert bool(said) == bool(notice)


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [([], "run"), (["+experiment=medvqa_600_sft", "profile=tiny"], "medvqa_600_sft_tiny"), (["name=x"], "x")],
)
def test_fine_tuning_has_a_folder_beside_that_of_rl(arguments: list[str], folder: str) -> None:
    with hydra.initialize_config_module("conf", version_base="1.3"):
        composed = hydra.compose("sft", arguments, return_hydra_config=True)
        assert Path(composed.hydra.run.dir).parent == Path("outputs/sft") / folder


def test_expand_resume_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no checkpoints"):
        expand([f"resume={tmp_path}"], cuda=False)
    for name in ("2026-01-01", "2026-01-02"):  # a name's runs
        (tmp_path / "runs" / name / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match=re.escape(f"resume={tmp_path}/runs/2026-01-02?")):
        expand([f"resume={tmp_path}/runs"], cuda=False)
    (tmp_path / "checkpoints").mkdir()
    assert expand([f"resume={tmp_path}"], cuda=False) == [f"resume={tmp_path}", f"hydra.run.dir={tmp_path}"]

    with pytest.raises(ValueError, match=r"resume=.* hydra\.run\.dir=other .*hydra\.run\.dir"):
        expand([f"resume={tmp_path}", "hydra.run.dir=other"], cuda=False)
    assert expand(["resume=auto", "hydra.run.dir=other"], cuda=False) == ["resume=auto", "hydra.run.dir=other"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["data=a.jsonl", "data.eval=[b.jsonl]"],
            r"data=a\.jsonl and data\.eval=\[b\.jsonl\] both .*data\.eval: ",
        ),
        (
            ["data.eval=[b.jsonl]", "data=[a.jsonl]"],
            r"data=\[a\.jsonl\] and data\.eval=\[b\.jsonl\] both .*data\.eval: ",
        ),
        (
            ["model.path=x", "model=models/y"],
            r"model=models/y and model\.path=x both .*model\.path: ",
        ),
    ],
)
def test_a_shorthand_and_what_it_stands_for_are_not_taken_together(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expand(arguments, cuda=False)
    assert expand(["model=qwen2_vl_2b", "model=models/y"], cuda=False) == ["model=qwen2_vl_2b", "model.path=models/y"]
    assert expand(["data.limit=3", "data=a.jsonl"], cuda=False) == ["data.limit=3", "data=jsonl", "data.eval=[a.jsonl]"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["+experiment=medvqa_600_embedded"],
            "+experiment=medvqa_600_embedded: renamed to +experiment=medvqa_600 profile=tiny",
        ),
        (
            ["experiment=medvqa_600,medvqa_600_dapo_embedded", "profile=paper"],
            ": renamed to +experiment=medvqa_600,medvqa_600_dapo profile=tiny",
        ),
        (["+experiment=medvqa_600", "profile=embedded"], "profile=embedded: renamed to profile=tiny"),
        (["profile=auto"], "profile=auto: this is the default"),
    ],
)
@pytest.mark.parametrize("cuda", [True, False])
def test_an_old_option_names_the_new_one(arguments: list[str], message: str, cuda: bool) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        expand(arguments, cuda=cuda)


def test_an_experiment_of_ones_own_has_the_profile_that_it_names() -> None:
    assert expand(["+experiment=mine_embedded"], cuda=False) == ["+experiment=mine_embedded"]
    assert expand(["+experiment=mine", "profile=tiny"], cuda=False) == ["+experiment=mine", "profile=tiny"]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("learner.lrr=1", r"unknown .*learner\.lrr: .*learner\.lr\?"),
        ("rolout.max_tokens=64", r"unknown .*rolout: .*mean rollout\?"),
        ("epochs=2", r"unknown .*epochs: .*learner\.epochs or sft\.epochs\?"),
        ("max_tokens=64", r"unknown .*max_tokens: .*rollout\.max_tokens or eval\.max_tokens\?"),
        ("zzz=1", "unknown .*zzz: known .*steps"),
    ],
)
def test_expand_says_which_key_was_meant(argument: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        expand(["steps=3", argument], cuda=False)


def test_expand_says_what_a_table_is_read_with() -> None:
    with pytest.raises(ValueError, match=r"data=a/questions\.csv: .*python -m rlmed\.prepare"):
        expand(["data=a/questions.csv"], cuda=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "2"], "--steps: .*key=value: .*steps=2[?]"),
        (["--steps=2"], "--steps=2: .*key=value: .*steps=2[?]"),
        (["--cluster", "ray"], "did you mean cluster=ray[?]"),
        (["--learner.lr"], r"did you mean learner\.lr=VALUE[?]"),
        (["steps", "=", "2"], "steps = 2: no spaces .*steps=2[?]"),
        (["steps=", "2"], "steps= 2: no spaces .*steps=2[?]"),
        (["steps", "=2"], "steps =2: no spaces .*steps=2[?]"),
        (["steps", "2"], "steps 2: .*key=value: .*steps=2[?]"),
        (["seed=1", "learner.lr", "1e-5", "steps=2"], r"learner\.lr 1e-5: .*learner\.lr=1e-5[?]"),
        (["learner.lr", "steps=2"], r"learner\.lr: .*key=value"),
        (["steps"], "steps: .*key=value"),
    ],
)
def test_a_setting_in_another_spelling_is_corrected(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _parse_flags(arguments)


def test_hydras_flags_and_empty_values_are_left_alone() -> None:
    assert _parse_flags(["steps=2", "--multirun", "seed=1,2", "--config-dir", "here"]).config_dir == "here"
    assert _parse_flags(["name=x", "resume="]).overrides == ["name=x", "resume="]


def test_expand_leaves_what_is_hydras_alone() -> None:
    arguments = [
        "hydra.run.dir=x",
        "hydra/job_logging=none",
        "+new.key=1",
        "~data",
        "reward.weights.mine=0.5",
        "--multirun",
        "seed=1,2",
    ]
    assert expand(arguments, cuda=False) == arguments


def test_check_writable(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordError, match=r"file/run cannot be written.*hydra\.run\.dir=FOLDER"):
        check_writable(tmp_path / "file" / "run")


def test_newest_run_has_the_newest_checkpoint_and_later_ones_without_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "demo"
    assert newest_run(runs / "next") is None
    for age, name in enumerate(["killed", "newer", "old", "killed-long-ago"]):
        folder = runs / name
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "config.yaml").touch()
        os.utime(folder / "config.yaml", (1000 - age, 1000 - age))
        if not name.startswith("killed"):
            (folder / "checkpoints" / "step-000010").mkdir()
            os.utime(folder / "checkpoints" / "step-000010", (1000 - age, 1000 - age))
    (runs / "old" / "report.html").touch()  # a report written later makes no run newer
    assert newest_run(runs / "next") == runs / "newer"
    said = capsys.readouterr().out
    assert f"first checkpoint, so {runs / 'newer'} is resumed" in said
    assert f" {runs / 'killed'} ended" in said
    assert "killed-long-ago" not in said


def test_a_later_run_that_has_only_results_of_slow_rewards_is_the_newest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "demo"
    for age, name in enumerate(["judged", "saved", "judged-long-ago"]):
        (runs / name).mkdir(parents=True)
        for file in ("config.yaml", "rewards.jsonl"):
            (runs / name / file).touch()
            os.utime(runs / name / file, (1000 - age, 1000 - age))
    (runs / "saved" / "checkpoints" / "step-000010").mkdir(parents=True)
    os.utime(runs / "saved" / "checkpoints" / "step-000010", (999, 999))
    assert newest_run(runs / "next") == runs / "judged"
    said = capsys.readouterr().out
    assert f"{runs / 'judged'} ended before" in said
    assert f"resume={runs / 'saved'}" in said
    assert "judged-long-ago" not in said
    (runs / "judged" / "rewards.jsonl").unlink()
    assert newest_run(runs / "next") == runs / "saved"


def test_a_run_that_knew_keys_by_their_old_names_is_the_same_run(tmp_path: Path) -> None:
    now = config("data.selection.cooldown_epochs=3")
    text = to_yaml(now).replace("cooldown_epochs: 3", "retest_after: 3").replace("compare_to:", "before:")
    text = text.replace("  controls:", "  trust: false\n  samples: 8\n  controls:").replace(
        "reliability:\n  samples: 8\n", ""
    )
    assert "retest_after" in text
    assert "profile: null" in text
    text = text.replace("profile: null", "profile: auto").replace("name: run", "name: run_embedded")
    assert "trust" in text
    assert "reliability" not in text
    (tmp_path / "config.yaml").write_text(text)
    check_same_run(tmp_path / "config.yaml", now, unused=())
    with pytest.raises(ValueError, match=r"data\.selection\.cooldown_epochs: 3 then, 4 now"):
        check_same_run(tmp_path / "config.yaml", config("data.selection.cooldown_epochs=4"), unused=())


def test_a_run_from_before_a_key_existed_is_the_same_run(tmp_path: Path) -> None:
    now = config("learner.gradient_checkpointing=null")
    text = to_yaml(now).replace("  moments: float32\n", "")
    assert "moments" not in text
    (tmp_path / "config.yaml").write_text(text.replace("gradient_checkpointing: null", "gradient_checkpointing: false"))
    check_same_run(tmp_path / "config.yaml", now, unused=())
    with pytest.raises(ValueError, match=r"learner\.moments: 'float32' then, 'bfloat16' now"):
        check_same_run(tmp_path / "config.yaml", config("learner.moments=bfloat16"), unused=())


@pytest.mark.parametrize("prompt", ["paper", "answer_only", "short", "by_modality"])
def test_a_run_of_a_version_that_knew_multiple_choice_alone_resumes(tmp_path: Path, prompt: str) -> None:
    now = config(f"prompt={prompt}")
    old = yaml.safe_load(to_yaml(now))
    later = ["data.extra_tasks", "data.synonyms", "data.box_frame", "data.task", "prompt.by_task", "eval.predictions"]
    later += ["eval.report_metrics"]
    for key in [*later, "reward.slow", "reward.judge", "reward.iou", "reward.embedding", "reward.radeval"]:
        section, _, name = key.partition(".")
        del old[section][name]
    del old["loggers"], old["logging"]
    saved = tmp_path / "config.yaml"
    saved.write_text(yaml.safe_dump(old))
    check_same_run(saved, now, unused=())
    changed = config(f"prompt={prompt}", "reward=task", "reward.iou.kind=threshold")
    with pytest.raises(ValueError, match=r"reward\.iou\.kind: 'mean' then, 'threshold' now"):
        check_same_run(saved, changed, unused=("reward.weights",))
    with pytest.raises(ValueError, match=r"data\.synonyms: None then, 'x\.csv' now"):
        check_same_run(saved, config(f"prompt={prompt}", "data.synonyms=x.csv"), unused=())


def test_check_same_run(tmp_path: Path) -> None:
    before = config("learner.betas=[0.9,0.95]")
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(before))
    check_same_run(saved, before, unused=())
    later = dataclasses.replace(before, resume="auto", eval=dataclasses.replace(before.eval, every=7))
    check_same_run(saved, later, unused=())
    with pytest.raises(ValueError, match=r"learner\.lr: 1e-06 then, 0\.5 now"):
        check_same_run(saved, config("learner.betas=[0.9,0.95]", "learner.lr=0.5"), unused=())
    other_sft = config("learner.betas=[0.9,0.95]", "sft.target=answer")
    check_same_run(saved, other_sft, unused=("sft",))
    with pytest.raises(ValueError, match=r"sft\.target: 'auto' then, 'answer' now"):
        check_same_run(saved, other_sft, unused=("steps",))


@pytest.mark.parametrize(("key", "unused", "then"), [("steps", "sft", "30"), ("sft.epochs", "steps", "2")])
def test_a_run_may_get_longer_and_not_shorter(
    key: str, unused: str, then: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved = tmp_path / "config.yaml"
    constant = "learner.lr_schedule=constant"
    saved.write_text(to_yaml(config(f"{key}={then}", constant)))
    check_same_run(saved, config(f"{key}=99", constant), unused=(unused,))
    with pytest.raises(ValueError, match=rf"with {key}={then}, and {key}=1 .* {key}={then} or more"):
        check_same_run(saved, config(f"{key}=1", constant), unused=(unused,))
    check_same_run(saved, config(f"{key}=1", constant), unused=(key.split(".")[0], unused))
    assert caplog.messages == []
    saved.write_text(to_yaml(config(f"{key}={then}", "learner.lr_schedule=linear")))
    check_same_run(saved, config(f"{key}=99", "learner.lr_schedule=linear"), unused=(unused,))
    assert [message.partition(":")[0] for message in caplog.messages] == [f"{key}=99 instead of {then}"]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["data.mix={MRI:0.5,CT:0.5}"], r"data\.mix\.CT: 0\.5 then, None now"),
        (["+reward.weights.brevity=0.1"], r"reward\.weights\.brevity: 0\.1 then, None now"),
        (["prompt=by_modality"], r"prompt\.by_modality\.CT: '.*' then, None now"),
    ],
)
def test_what_a_run_is_resumed_without_is_a_difference(tmp_path: Path, entries: list[str], message: str) -> None:
    """Entries of a mapping, which may be there then and not now."""
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(config(*entries)))
    check_same_run(saved, config(*entries), unused=())
    with pytest.raises(ValueError, match=message):
        check_same_run(saved, config(), unused=())


@pytest.mark.parametrize(
    "path", ["models/a-1.0", "my dir (v2)/m=x", "it's", "odd [x], {name}", "测试.jsonl", "a:b#c", "old~1/m", "2024"]
)
def test_any_path_gets_through_hydras_grammar(path: str) -> None:
    assert config(*expand([f"model={path}", f"data={path}.jsonl"], cuda=False)).model.path == path
    assert config(*expand([f"data={path}.jsonl"], cuda=False)).data.eval == (f"{path}.jsonl",)


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ValueError("a\n  b"), 2, "error: a b"),
        (CheckpointError("checkpoint"), 2, "error: checkpoint"),
        (ClusterError("lost"), 3, "error: lost"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 2, "error: [Errno 28] No space left on device"),
        (MemoryError(), 2, "error: out of memory (in Python): close other programs"),
        (
            RuntimeError("[x] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            2,
            "error: out of memory",
        ),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), 2, "error: out of memory (CUDA out of memory"),
    ],
)
def test_exit_codes(
    error: Exception,
    status: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    found, line = failed(monkeypatch, capsys, error=error)
    assert found == status
    assert line.startswith(said)


@pytest.mark.parametrize(
    ("program", "resumed"), [("train", True), ("sft", True), ("evaluate", False), ("reliability", False)]
)
@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()])
def test_only_what_can_be_resumed_is_said_to_be(
    program: str,
    resumed: bool,
    error: BaseException,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def main(config: RunConfig, folder: Path) -> None:
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [program])
    with pytest.raises(SystemExit) as ended:
        run_command(program, main)
    said = f"{ended.value.code} {capsys.readouterr().err}"
    assert "interrupted" in said or f"or reduce memory use ({sparing_keys(program)})" in said
    assert ("resume=auto" in said) == resumed


def test_a_fault_of_ours_is_no_error_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuntimeError, match="a bug"):
        run(monkeypatch, error=RuntimeError("a bug"))
    monkeypatch.setenv("RLMED_TRACE", "1")
    with pytest.raises(ValueError, match="of the user"):
        run(monkeypatch, error=ValueError("of the user"))


def test_each_run_of_a_sweep_has_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train", "-m", "seed=1,2", "name=sweep"])
    seen = []
    run_command("train", lambda config, folder: seen.append((config.seed, folder)))
    assert [seed for seed, _ in seen] == [1, 2]
    assert [folder.name for _, folder in seen] == ["0", "1"]


def test_a_checkpoint_needs_a_folder_whose_name_is_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    status, said = failed(monkeypatch, capsys, "hydra.run.dir=R\udcf6ntgen")
    assert status == 2
    assert "set LC_ALL=C.UTF-8" in said
