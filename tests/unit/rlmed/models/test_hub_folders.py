"""Folders as the hub or other trainers leave them: loaded without a word, as the same model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlmed.cluster.engines import open_model
from rlmed.data.prompts import PromptRenderer
from rlmed.models.policy import load_policy
from rlmed.models.tiny.build import CHAT_TEMPLATE

PADDED = 20
"""Rows of the embeddings above the tokenizer's last token."""
TEXT_ALONE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '<|im_start|>user\n' + message['content'] + '<|im_end|>\n<|im_start|>assistant\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)
"""As language-model tools write it into tokenizer_config.json: it can't take lists with images."""


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def edit(path: Path, **values: Any) -> None:
    """Set keys; `...` removes one."""
    content = {**(read(path) if path.exists() else {}), **values}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def old_name(name: str) -> str:
    """As weights were called before transformers 4.52."""
    return name.removeprefix("model.") if name.startswith("model.visual.") else name.replace(".language_model.", ".")


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """config.json as on the hub for Qwen2-VL and Qwen2.5-VL: the text model's keys at the top."""
    text, vision = config.pop("text_config"), config.pop("vision_config")
    rope = text.pop("rope_parameters")
    for key in ("layer_types", "dtype", "model_type"):
        text.pop(key, None)
    kept = ("depth", "embed_dim", "hidden_size", "intermediate_size", "mlp_ratio", "num_heads", "out_hidden_size")
    kept += ("patch_size", "spatial_merge_size", "temporal_patch_size", "window_size", "fullatt_block_indexes")
    return {
        **{key: value for key, value in config.items() if key != "dtype"},
        **text,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.41.2",
        "sliding_window": 32768,
        "max_window_layers": 1,
        "use_sliding_window": False,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
        "vision_config": {
            **{key: vision[key] for key in kept if key in vision},
            "in_chans": 3,
            "spatial_patch_size": 14,
        },
    }


@pytest.fixture(params=["qwen2_vl", "qwen2_5_vl"])
def hub_folder(request: pytest.FixtureRequest, tiny_folder: Callable[..., Path], tmp_path: Path) -> Path:
    """A tiny model with the files, keys and names of the hub's."""
    folder = shutil.copytree(tiny_folder(request.param), tmp_path / "Qwen2-VL-2B-Instruct")
    config = flat(read(folder / "config.json"))
    rows = config["vocab_size"]
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": rows + PADDED}))
    weights = {old_name(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    embeddings = weights["model.embed_tokens.weight"]
    weights["model.embed_tokens.weight"] = torch.cat([embeddings, torch.zeros(PADDED, embeddings.shape[1])])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "chat_template.jinja").unlink()
    edit(folder / "chat_template.json", chat_template=CHAT_TEMPLATE)
    tokens = read(folder / "tokenizer.json")
    added = {str(token["id"]): {**token, "id": ...} for token in tokens["added_tokens"]}
    for token in added.values():
        del token["id"]
    edit(
        folder / "tokenizer_config.json",
        chat_template=CHAT_TEMPLATE,
        added_tokens_decoder=added,
        tokenizer_class="PreTrainedTokenizerFast",
        model_max_length=32768,
    )
    (folder / "vocab.json").write_text(json.dumps(tokens["model"]["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    ends = read(folder / "generation_config.json")
    sampling = {"do_sample": True, "repetition_penalty": 1.05, "temperature": 0.000001, "top_k": 1, "top_p": 0.001}
    edit(folder / "generation_config.json", **ends, **sampling)
    for name in (".gitattributes", "README.md", "LICENSE"):
        (folder / name).write_text("\n")
    return folder


def lean(folder: Path) -> None:
    """As it is."""


def older_pixels(folder: Path) -> None:
    limits = {"min_pixels": 3136, "max_pixels": 12544}
    edit(folder / "preprocessor_config.json", size=limits, do_resize=True)


def leftovers_of_training(folder: Path) -> None:
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        torch.save({}, folder / name)
    for name in ("trainer_state.json", "all_results.json", "latest", "zero_to_fp32.py", "args.json"):
        (folder / name).write_text("{}")
    (folder / "global_step5").mkdir()
    torch.save({}, folder / "global_step5" / "mp_rank_00_model_states.pt")
    added = read(folder / "tokenizer_config.json")["added_tokens_decoder"]
    edit(folder / "added_tokens.json", **{token["content"]: int(place) for place, token in added.items()})


def head_as_well(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def nested_and_flat(folder: Path) -> None:
    """As transformers 4.52 to 4.57 save a model that was loaded from the hub."""
    config = read(folder / "config.json")
    rope = {**config["rope_scaling"], "type": "default", "rope_type": "default"}
    inner = {key: value for key, value in config.items() if key != "vision_config"}
    inner |= {"model_type": f"{config['model_type']}_text", "rope_scaling": rope, "sliding_window": None}
    inner |= {"image_token_id": None, "video_token_id": None, "layer_types": ["full_attention"] * 2}
    edit(folder / "config.json", text_config=inner, rope_scaling=rope)


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def is_same_model(one: Path, other: Path) -> bool:
    """Whether two folders hold the same parameters, but for the rows that pad the vocabulary."""
    mine, theirs = load_policy(one), load_policy(other)
    rows = len(theirs.projection.weight)
    parameters = dict(theirs.model.named_parameters())
    return torch.equal(mine.projection.weight[:rows], theirs.projection.weight) and all(
        torch.equal(parameter, parameters[name])
        for name, parameter in mine.model.named_parameters()
        if "embed_tokens" not in name and "lm_head" not in name
    )


SILENT = [lean, older_pixels, leftovers_of_training, head_as_well, nested_and_flat, pickled]


@pytest.mark.parametrize("change", SILENT)
def test_a_folder_of_the_hub_is_loaded_without_a_word(hub_folder, tiny_folder, caplog, change):
    change(hub_folder)
    renderer = PromptRenderer(*open_model(hub_folder), max_prompt_tokens=512)
    words = [
        record for record in caplog.records if "not a control token" not in record.message
    ]  # the test models' own ends
    assert not words
    assert renderer.turn_end == "<|im_end|>"
    family = read(hub_folder / "config.json")["model_type"]
    assert is_same_model(hub_folder, tiny_folder(family))


def test_weights_beside_pickled_ones_are_passed_over(hub_folder, tiny_folder, caplog):
    pickled(hub_folder)
    save_file({"v_head.summary.weight": torch.zeros(1, 64)}, hub_folder / "value_head.safetensors")
    open_model(hub_folder)
    assert "reading weights from pytorch_model.bin; ignoring value_head.safetensors" in caplog.text
    assert is_same_model(hub_folder, tiny_folder(read(hub_folder / "config.json")["model_type"]))


@pytest.mark.parametrize("place", ["chat_template.json", "processor_config.json"])
def test_pictures_are_asked_with_the_processors_template(hub_folder, caplog, place):
    edit(hub_folder / "tokenizer_config.json", chat_template=TEXT_ALONE)
    (hub_folder / "chat_template.json").unlink()
    edit(hub_folder / place, chat_template=CHAT_TEMPLATE)
    renderer = PromptRenderer(*open_model(hub_folder), max_prompt_tokens=512)
    assert f"in tokenizer_config.json than in {place}: {place} is used" in caplog.text
    assert renderer.tokenizer.chat_template == CHAT_TEMPLATE


def test_a_text_model_is_asked_with_its_tokenizers_template(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder("qwen2"), tmp_path / "text")
    (folder / "chat_template.jinja").unlink()
    edit(folder / "tokenizer_config.json", chat_template=TEXT_ALONE)
    edit(folder / "chat_template.json", chat_template=CHAT_TEMPLATE)
    assert PromptRenderer(*open_model(folder), max_prompt_tokens=512).tokenizer.chat_template == TEXT_ALONE


@pytest.mark.parametrize("template", [7, ["{{ messages }}"], [{"nam": "default"}], {"default": "x"}])
@pytest.mark.parametrize("place", ["chat_template.json", "tokenizer_config.json"])
def test_a_template_that_is_no_text_is_one_line(hub_folder, place, template):
    edit(hub_folder / "chat_template.json", chat_template=None)
    edit(hub_folder / "tokenizer_config.json", chat_template=None)
    edit(hub_folder / place, chat_template=template)
    with pytest.raises(ValueError, match=r"chat template|chat_template|tokenizer of model") as raised:
        PromptRenderer(*open_model(hub_folder), max_prompt_tokens=512)
    assert len(str(raised.value).splitlines()) == 1
    assert hub_folder.name in str(raised.value)
