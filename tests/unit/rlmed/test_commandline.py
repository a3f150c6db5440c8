"""Shorthands of the command line."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from rlmed.commandline import check_same_run, compose_config, expand, newest_run, to_yaml
from rlmed.core.config import ConfigError, RunConfig


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


def test_expand_leaves_what_is_hydras_alone() -> None:
    arguments = ["hydra.run.dir=x", "+new.key=1", "~data", "reward.weights.mine=0.5", "--multirun", "seed=1,2"]
    assert expand(arguments, cuda=False) == arguments


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
    assert newest_run(tmp_path / "demo" / "old") == tmp_path / "demo" / "old"


def test_check_same_run(tmp_path: Path) -> None:
    before = config("learner.betas=[0.9,0.95]")
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(before))
    check_same_run(saved, before)
    check_same_run(saved, dataclasses.replace(before, resume="auto", eval=dataclasses.replace(before.eval, every=7)))
    with pytest.raises(ValueError, match=r"learner\.lr: 1e-06 then, 0\.5 now"):
        check_same_run(saved, config("learner.betas=[0.9,0.95]", "learner.lr=0.5"))
