"""Adapter folders as models: what is refused, and with what advice; 4 bits without a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlmed.cluster.engines import build_policies, open_model
from rlmed.core.config.composing import compose_config
from rlmed.models.adapters import add_adapters
from rlmed.models.loading import model_folder
from rlmed.models.policy import Policy, load_policy
from tests.configs import lora_config

pytest.importorskip("peft", reason="needs the extra lora")


@pytest.fixture
def adapter(base_copy: Path, tmp_path: Path) -> Path:
    """An adapter of the embedded model, with the small files of its base."""
    policy = add_adapters(load_policy(base_copy), lora_config(rank=2), base="embedded:tiny_base", seed=0)
    assert policy.adapters is not None
    names = policy.adapters.save_settings(base_copy)
    (base_copy / "model.safetensors").unlink()
    save_file(
        {names[name]: torch.full_like(value, 0.01).detach() for name, value in policy.adapters.parameters().items()},
        base_copy / "adapter_model.safetensors",
    )
    return base_copy


def edit(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_it_is_opened_and_loaded_like_a_model(adapter: Path) -> None:
    open_model(adapter)
    base = dict(load_policy(model_folder("embedded:tiny_base")).model.named_parameters())
    name = "model.language_model.layers.0.self_attn.q_proj.weight"
    change = dict(load_policy(adapter).model.named_parameters())[name] - base[name]
    # alpha 32 of rank 2, and two products of 0.01 each
    assert torch.allclose(change, torch.full_like(change, 16 * 2 * 1e-4), atol=1e-6)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3', and rlmed reads LORA only"),
        ({"use_dora": True}, "use_dora=True, which rlmed does not read"),
        ({"bias": "all"}, "bias='all'"),
        ({"base_model_name_or_path": None}, "names no base_model_name_or_path"),
        ({"base_model_name_or_path": "/nowhere/model"}, "adapter of /nowhere/model, which does not exist"),
    ],
)
def test_settings_that_are_refused(values: dict[str, Any], said: str, adapter: Path) -> None:
    edit(adapter, **values)
    with pytest.raises(ValueError, match=said):
        load_policy(adapter)


def test_an_adapter_of_another_model(adapter: Path, tiny_folder: Callable[..., Path]) -> None:
    edit(adapter, base_model_name_or_path=str(tiny_folder("qwen2_vl")))
    with pytest.raises(ValueError, match=r"adapts .* of its base model.*correct base_model_name_or_path"):
        load_policy(adapter)


def test_half_of_a_pair(adapter: Path) -> None:
    stored = load_file(adapter / "adapter_model.safetensors")
    gone = next(name for name in stored if ".lora_A." in name)
    save_file({name: value for name, value in stored.items() if name != gone}, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="no pair of lora_A and lora_B"):
        load_policy(adapter)


def test_four_bits_need_a_gpu() -> None:
    config = compose_config("train", ["learner=lora", "learner.lora.quantize=nf4", "model.device=cpu"])
    with pytest.raises(ValueError, match=r"learner\.lora\.quantize=nf4 needs a CUDA device"):
        build_policies(config.model, config.learner.lora, checkpoint=None, seed=0, threads=None, samples=True)


def test_only_adapters_are_trained(fresh_policy: Callable[..., Policy]) -> None:
    policy = add_adapters(fresh_policy("qwen2_vl"), lora_config(rank=2), base="x", seed=0)
    policy.freeze(("language_model",))  # has no say
    assert policy.adapters is not None
    trained = {name for name, parameter in policy.model.named_parameters() if parameter.requires_grad}
    assert trained == policy.adapters.parameters().keys()


@pytest.mark.parametrize("samples", [True, False])
def test_merged_copies_are_made_where_an_engine_samples(samples: bool) -> None:
    config = compose_config("train", ["learner=lora", "model.device=cpu"])
    trained, sampling = build_policies(
        config.model, config.learner.lora, checkpoint=None, seed=0, threads=None, samples=samples
    )
    assert trained.adapters is not None
    assert (trained is sampling) == (not samples)
    assert bool(trained.adapters._given) == samples
