"""Loading, positions, parts, and the errors of folders that cannot be a policy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from rlmed.core.types import Example, Prompt
from rlmed.models import policy as policy_module
from rlmed.models.attention import PackedLayout
from rlmed.models.families import FAMILIES, PARTS, unsampleable_token_ids
from rlmed.models.policy import Policy, load_config, load_policy, merge_image_inputs
from rlmed.models.varlen import AttentionChoice, VarlenLayout
from rlmed.models.varlen_backends import Reference
from tests.conftest import FIVE, GRID_FAMILIES
from tests.rounding import LOGPROBS

BANNED = {"qwen2_vl": 5, "qwen2_5_vl": 5, "qwen3_vl": 4, "gemma3": 3, "llava_onevision": 2}
BANNED |= {"idefics3": 1, "smolvlm": 1, "internvl": 1}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_loads_and_knows_its_geometry(family, tiny_policy):
    policy = tiny_policy(family)
    assert policy.kv_shape == (2, 2, 16)
    assert policy.dtype == torch.float32
    assert not policy.model.training
    config = policy.model.config
    vision = FAMILIES[family].vision
    assert (config.model_type, vision) == (family, "vision_config" in config.to_dict())
    banned = unsampleable_token_ids(config)
    assert policy.banned_token_ids == banned
    # Qwen2-VL's: <|vision_start|>, <|vision_end|>, <|vision_pad|>, <|image_pad|>, <|video_pad|>
    assert len(banned) == BANNED.get(family, 0)
    assert (config.image_token_id in banned) if vision else True
    hidden = torch.randn(3, 64)
    logits = policy.logits(hidden)
    assert logits.isinf().sum() == 3 * len(banned)
    assert policy.windows == ((9,) if "gemma3" in family else ())


@pytest.mark.parametrize("family", GRID_FAMILIES)
def test_mrope_positions_of_two_images_are_those_worked_by_hand(family, tiny_policy, make_prompt):
    # two words, mark, 2 x 3 visual tokens, mark, mark, 1 x 2 visual tokens, mark, two words
    prompt = make_prompt(family, 0, length=4, grid=((4, 6), (2, 4)))
    positions = tiny_policy(family).prompt_positions(prompt)
    # an image counts as many positions as its longer side has tokens
    assert positions.tolist() == [
        [0, 1, 2, 3, 3, 3, 3, 3, 3, 6, 7, 8, 8, 10, 11, 12],
        [0, 1, 2, 3, 3, 3, 4, 4, 4, 6, 7, 8, 8, 10, 11, 12],
        [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12],
    ]


@pytest.mark.parametrize("grids", [((4, 8), (6, 4)), FIVE])
@pytest.mark.parametrize("family", GRID_FAMILIES)
def test_mrope_positions_of_several_images_are_those_of_transformers(
    family, grids, tiny_policy, transformers_model, make_prompt
):
    prompt = make_prompt(family, 1, length=7, grid=grids)
    positions = tiny_policy(family).prompt_positions(prompt)
    ids = torch.from_numpy(prompt.token_ids)[None]
    expected, _ = transformers_model(family).model.get_rope_index(
        ids,
        (ids == tiny_policy(family).model.config.image_token_id).int(),
        image_grid_thw=torch.from_numpy(prompt.image_inputs["image_grid_thw"]),
        attention_mask=torch.ones_like(ids),
    )
    assert torch.equal(positions, expected[:, 0])
    assert positions.max() < len(prompt.token_ids) - 1


def test_positions_without_image_count_up(tiny_policy):
    prompt = Prompt(Example("t", None, "?", ("a", "b"), 0), "", np.arange(20, 26))
    assert tiny_policy("llama").prompt_positions(prompt).tolist() == [list(range(6))]
    assert tiny_policy("qwen2_vl").prompt_positions(prompt).tolist() == [list(range(6))] * 3


def test_each_parameter_belongs_to_one_part(tiny_policy):
    policy = tiny_policy("qwen2_5_vl")
    parts = {name: policy.family.part_of(name) for name, _ in policy.model.named_parameters()}
    assert set(parts.values()) == set(PARTS)
    assert parts["model.visual.patch_embed.proj.weight"] == "vision"
    assert parts["model.visual.merger.mlp.0.weight"] == "merger"
    assert parts["model.language_model.embed_tokens.weight"] == "language_model"
    assert all(FAMILIES["llama"].part_of(name) == "language_model" for name in ("lm_head.weight", "model.norm.weight"))


def test_freezing_is_a_choice_that_can_be_taken_back(fresh_policy):
    policy = fresh_policy("qwen2_vl")
    for parts in (("vision",), ("merger", "language_model"), ()):
        policy.freeze(parts)
        for name, parameter in policy.model.named_parameters():
            assert parameter.requires_grad == (policy.family.part_of(name) not in parts)


def test_hidden_states_of_one_prompt_are_those_of_transformers(tiny_policy, transformers_model, make_prompt):
    prompt = make_prompt("llama", 3, length=9)
    policy = tiny_policy("llama")
    token_ids = torch.from_numpy(prompt.token_ids)
    with torch.no_grad():
        hidden = policy.hidden(token_ids, policy.prompt_positions(prompt), PackedLayout.build([(9, ())]))
        expected = transformers_model("llama").model(token_ids[None]).last_hidden_state[0]
    # a norm has brought them to about 1, and the logits that the bound is of are sums of them times
    # weights of about 0.1
    torch.testing.assert_close(hidden, expected, atol=LOGPROBS, rtol=0)


def test_weights_are_not_rounded_to_the_dtype_that_config_json_names(tiny_folder, tmp_path, monkeypatch):
    """On their way to another device they keep the dtype of their files."""
    folder = shutil.copytree(tiny_folder("qwen2"), tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"dtype": "bfloat16"}))
    moved = []
    monkeypatch.setattr(policy_module, "_move", lambda model, *_: moved.extend(model.parameters()))
    load_policy(folder, device="meta")
    expected = load_policy(tiny_folder("qwen2")).model.parameters()
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(moved, expected, strict=True))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_policy_beyond_the_cpu_keeps_cudnn_out_of_attention(device, tiny_folder, request, monkeypatch):
    # data of a parameter cannot move to the meta device
    monkeypatch.setattr(policy_module, "_move", lambda model, device, dtype: model.to(device, dtype))
    request.addfinalizer(lambda: torch.backends.cuda.enable_cudnn_sdp(True))
    torch.backends.cuda.enable_cudnn_sdp(True)
    load_policy(tiny_folder("qwen2"), device=device)
    assert torch.backends.cuda.cudnn_sdp_enabled() == (device == "cpu")


def test_a_policy_lays_rows_out_for_the_attention_that_was_chosen(tiny_policy, monkeypatch):
    policy, groups = tiny_policy("qwen2"), [(4, (2, 1)), (3, ())]
    assert isinstance(policy.packed_layout(groups), PackedLayout)
    asked, backend = [], Reference()
    monkeypatch.setattr(
        policy_module,
        "choose_attention",
        lambda *question: asked.append(question) or AttentionChoice(backend, "installed"),
    )
    layout = policy.packed_layout(groups)
    assert isinstance(layout, VarlenLayout)
    assert layout.backend is backend
    assert layout.segments.query_starts.tolist() == [0, 4, 6, 7, 10]
    assert asked == [(torch.device("cpu"), torch.float32, policy.kv_shape[2])]


def test_merge_image_inputs_skips_prompts_without_image():
    inputs = [{"a": torch.ones(2, 3), "b": torch.zeros(1)}, {}, {"a": torch.zeros(1, 3), "b": torch.ones(1)}]
    merged = merge_image_inputs(inputs)
    assert merged["a"].tolist() == [[1.0] * 3, [1.0] * 3, [0.0] * 3]
    assert merged["b"].tolist() == [0.0, 1.0]
    assert merge_image_inputs([{}, {}]) == {}


def test_an_unknown_family_is_refused_with_the_ones_that_work(tmp_path):
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=20))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'gpt2' .*llama, .*families\.py"):
        load_policy(tmp_path)


@pytest.mark.parametrize(
    ("model_type", "settings", "message"),
    [
        *(
            (kind, {}, rf"'{kind}' has layers of linear_attention.*keys and values")
            for kind in ("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_next")
        ),
        ("llama4", {}, "layers of chunked_attention"),
        ("gemma3n", {}, r"its last 15 layers .*none of their own.*num_kv_shared_layers=0"),
        ("gemma4", {"text_config": {"num_kv_shared_layers": 2}}, r"'gemma4': its last 2 layers"),
        *(
            (kind, {}, rf"'{kind}': its layers have heads of 256 and 512 features")
            for kind in ("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text")
        ),
        *((kind, {}, rf"'{kind}'") for kind in ("gemma4_assistant", "gemma4_unified_assistant")),
        ("gemma2", {}, r"soft caps .* \(30\)"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "later tokens"),
    ],
)
def test_decoders_that_cannot_run_say_why_when_they_are_loaded(model_type, settings, message, tmp_path):
    AutoConfig.for_model(model_type, **settings).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        load_policy(tmp_path)
    assert "\n" not in str(error.value)


def test_a_model_whose_completions_could_not_end_is_refused(tiny_folder):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder("qwen2"))
    model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="no eos_token_id"):
        Policy(model)


def test_one_end_token_and_several_are_both_understood(tiny_folder):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder("qwen2"))
    for ends, expected in ((7, {7}), ([7, 9], {7, 9})):
        model.generation_config.eos_token_id = ends
        assert Policy(model).end_token_ids == expected


def test_a_projection_with_bias_is_refused(tiny_folder):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder("llama"))
    model.lm_head = torch.nn.Linear(64, model.config.vocab_size)
    with pytest.raises(ValueError, match="without bias"):
        Policy(model)


@pytest.mark.parametrize("damage", ["missing", "reshaped"])
def test_weights_that_are_missing_are_never_replaced_by_random_ones(tiny_folder, tmp_path, damage):
    folder = shutil.copytree(tiny_folder("qwen2"), tmp_path / "damaged")
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    weight = weights.pop(name)
    if damage == "reshaped":
        weights[name] = weight[:, 1:].contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"damaged.*again"):
        load_policy(folder)


def test_a_folder_that_does_not_exist_is_not_looked_for_on_the_hub(tmp_path):
    with pytest.raises(ValueError, match=r"/nowhere' does not exist \(relative to /"):
        load_config(tmp_path / "nowhere")


def test_a_folder_whose_name_differs_is_told(tmp_path):
    (tmp_path / "Qwen2-VL").mkdir()
    with pytest.raises(ValueError, match=r"'.*/Qwen2-VL', .*case"):
        load_config(tmp_path / "qwen2-vl")


def test_a_folder_without_config_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        load_config(tmp_path)


def test_a_model_that_is_nowhere_is_named_with_advice(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"neither a folder .*model\.path=models/absent"):
        load_config(Path("owner/absent"))


@pytest.mark.parametrize(
    ("path", "said"),
    [
        (
            "models/Qwen2-VL-2B-Instruct",
            "`hf download Qwen/Qwen2-VL-2B-Instruct --local-dir models/Qwen2-VL-2B-Instruct`",
        ),
        ("./models/mine", "`hf download OWNER/mine --local-dir models/mine`, OWNER"),
        ("Weights/x", "`hf download OWNER/x --local-dir Weights/x`"),
        ("owner/absent", "`hf download owner/absent --local-dir models/absent`"),
        ("gpt2-absent", "`hf download gpt2-absent --local-dir models/gpt2-absent`"),
        ("here/absent", None),
    ],
)
def test_what_is_downloaded_is_a_name_that_the_hub_can_have(tmp_path, monkeypatch, path, said):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(ValueError, match=r"neither a folder in") as error:
        load_config(Path(path))
    assert ("hf download" in str(error.value)) == (said is not None)
    assert said is None or said in str(error.value)


def test_the_kv_geometry_follows_a_head_width_that_is_not_the_quotient(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder("qwen3"), tmp_path / "wide")
    config = json.loads((folder / "config.json").read_text())
    config["head_dim"] = 32
    (folder / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_config(load_config(folder), attn_implementation="eager")
    model.generation_config.eos_token_id = 1
    assert Policy(model).kv_shape == (2, 2, 32)


@pytest.mark.parametrize("answers", [True, False])
def test_a_hub_that_does_not_answer_is_asked_once(answers, monkeypatch):
    """Its library would try five times more, for half a minute; what is in its cache is found all
    the same.
    """
    asked = []

    class Session:
        def head(self, url, timeout):
            asked.append(url)
            if not answers:
                raise OSError("no network")

    monkeypatch.setattr(policy_module, "get_session", Session)
    monkeypatch.setattr(policy_module.AutoConfig, "from_pretrained", lambda name, local_files_only: local_files_only)
    assert load_config(Path("owner/name")) is not answers
    assert len(asked) == 1
