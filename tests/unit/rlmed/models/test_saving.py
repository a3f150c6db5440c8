"""Weight files written tensor by tensor are those of `save_pretrained`."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from rlmed.models.folder.weight_files import check_weight_files
from rlmed.models.policy import load_policy
from rlmed.models.saving import StoredWeight, file_name, save_settings, share_weights, write_index, write_weights
from tests.tiny_vision import TILE_FAMILIES


def save(model, folder, files):
    """What the ranks of a learner do together."""
    folder.mkdir()
    parameters = dict(model.named_parameters())
    shares = share_weights(parameters.items(), save_settings(model, folder), files)
    for number, share in enumerate(shares):
        tensors = (parameters[weight.parameter] for weight in share)
        write_weights(folder / file_name(number, files), share, tensors)
    if files > 1:
        write_index(folder, shares)
    return shares


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", *TILE_FAMILIES, "qwen2", "llama"])
def test_one_file_is_transformers_own(family, dtype, tiny_folder, tmp_path):
    model = load_policy(tiny_folder(family), dtype=dtype).model
    save(model, tmp_path / "ours", 1)
    model.save_pretrained(tmp_path / "theirs", state_dict=dict(model.named_parameters()))
    assert check_weight_files(tmp_path / "ours") == []
    names = [sorted(path.name for path in (tmp_path / side).iterdir()) for side in ("ours", "theirs")]
    assert names[0] == names[1]
    for name in set(names[0]) - {"model.safetensors"}:
        assert (tmp_path / "ours" / name).read_text() == (tmp_path / "theirs" / name).read_text()
    ours, theirs = (load_file(tmp_path / side / "model.safetensors") for side in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor)


@pytest.mark.parametrize(
    ("family", "auto"), [("qwen2_vl", AutoModelForImageTextToText), ("llama", AutoModelForCausalLM)]
)
def test_several_files_load_in_transformers_and_are_of_one_size(family, auto, tiny_folder, tmp_path):
    model = load_policy(tiny_folder(family)).model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    shares = save(model, tmp_path / "model", 3)
    assert check_weight_files(tmp_path / "model") == []
    loaded = dict(auto.from_pretrained(tmp_path / "model", dtype=torch.float32).named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded[name], parameter), name
    sizes = [sum(weight.nbytes for weight in share) for share in shares]
    largest = max(parameter.nbytes for parameter in model.parameters())
    assert max(sizes) - min(sizes) <= largest
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes)


def test_wider_dtypes_come_first_so_that_all_are_aligned(tmp_path):
    tensors = {"a": torch.ones(3, dtype=torch.bfloat16), "b": torch.full((), 2.0), "c": torch.zeros(0, 4)}
    (share,) = share_weights(tensors.items(), {name: f"x.{name}" for name in tensors}, 1)
    assert [weight.parameter for weight in share] == ["b", "c", "a"]
    write_weights(tmp_path / "w", share, (tensors[weight.parameter] for weight in share))
    read = load_file(tmp_path / "w")
    assert {name: tensor.tolist() for name, tensor in read.items()} == {
        "x.a": [1.0, 1.0, 1.0], "x.b": 2.0, "x.c": []
    }  # fmt: skip
    assert read["x.c"].shape == (0, 4)


def test_a_weight_too_few_is_an_error(tmp_path):
    weight = StoredWeight("a", "a", (2,), torch.float32)
    with pytest.raises(ValueError, match="shorter"):
        write_weights(tmp_path / "w", [weight, weight], iter([torch.ones(2)]))
