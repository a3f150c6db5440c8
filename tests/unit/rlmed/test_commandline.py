"""Shorthands of the command line."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from rlmed.commandline import check_same_run, check_writable, compose_config, expand, newest_run, to_yaml
from rlmed.core.config import RunConfig
from rlmed.core.config_checks import ConfigError
from rlmed.core.files import RecordError


def config(*overrides: str) -> RunConfig:
    return compose_config("train", overrides)


@pytest.mark.parametrize(
    ("arguments", "cuda", "expanded"),
    [
        (["+experiment=medvqa_600"], False, ["+experiment=medvqa_600_embedded"]),
        (["+experiment=medvqa_600"], True, ["+experiment=medvqa_600"]),
        (["+experiment=medvqa_600", "profile=paper"], False, ["+experiment=medvqa_600", "profile=paper"]),
        (["+experiment=medvqa_600", "profile=embedded"], True, ["+experiment=medvqa_600_embedded", "profile=embedded"]),
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


def test_expand_resume_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no checkpoints"):
        expand([f"resume={tmp_path}"], cuda=False)
    (tmp_path / "checkpoints").mkdir()
    assert expand([f"resume={tmp_path}"], cuda=False) == [f"resume={tmp_path}", f"hydra.run.dir={tmp_path}"]


def test_expand_refuses_an_unknown_profile() -> None:
    with pytest.raises(ValueError, match="auto, embedded, paper"):
        expand(["profile=moon"], cuda=False)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("learner.lrr=1", r"unknown key learner\.lrr: did you mean learner\.lr\?"),
        ("rolout.max_tokens=64", r"unknown key rolout: did you mean rollout\?"),
        ("zzz=1", "unknown key zzz: known keys: .*steps"),
    ],
)
def test_expand_says_which_key_was_meant(argument: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        expand(["steps=3", argument], cuda=False)


def test_expand_says_what_a_table_is_read_with() -> None:
    with pytest.raises(ValueError, match=r"data=a/questions\.csv: .*python -m rlmed\.prepare"):
        expand(["data=a/questions.csv"], cuda=False)


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


def test_newest_run_needs_a_checkpoint(tmp_path: Path) -> None:
    fresh = tmp_path / "demo" / "fresh"
    assert newest_run(fresh) is None
    for age, name in enumerate(["fresh", "newer", "old"]):
        folder = tmp_path / "demo" / name
        (folder / "checkpoints").mkdir(parents=True)
        if name != "fresh":
            (folder / "checkpoints" / "step-000010").mkdir()
        os.utime(folder, (1000 - age, 1000 - age))
    assert newest_run(fresh) == tmp_path / "demo" / "newer"


def test_check_same_run(tmp_path: Path) -> None:
    before = config("learner.betas=[0.9,0.95]")
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(before))
    check_same_run(saved, before, unused=())
    later = dataclasses.replace(before, resume="auto", eval=dataclasses.replace(before.eval, every=7))
    check_same_run(saved, later, unused=())
    with pytest.raises(ValueError, match=r"learner\.lr: 1e-06 then, 0\.5 now"):
        check_same_run(saved, config("learner.betas=[0.9,0.95]", "learner.lr=0.5"), unused=())
    other_sft = config("learner.betas=[0.9,0.95]", "sft.epochs=4")
    check_same_run(saved, other_sft, unused=("sft",))
    with pytest.raises(ValueError, match=r"sft\.epochs: 2\.0 then, 4\.0 now"):
        check_same_run(saved, other_sft, unused=("steps",))


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
