"""What a model folder contradicts or cannot use: an error or warning with both values, advice."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlmed.cluster.engines import open_model
from rlmed.data.prompts import PromptRenderer
from rlmed.models.folder.agreement import position_doubt
from rlmed.models.policy import load_config, load_policy
from tests.folder_changes import (
    Change,
    both,
    cut,
    edit,
    edit_text_config,
    edit_vision_config,
    edit_weights,
    only_pickled,
    pickled,
    shard,
    write,
)

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 8185360\n"
WEIGHT = "model.layers.0.mlp.up_proj.weight"
LORA = {"peft_type": "LORA", "base_model_name_or_path": "Qwen/Qwen2-VL-2B-Instruct"}

REFUSED: dict[str, tuple[Change, str]] = {
    # adapters
    "adapter beside weights": (
        edit("adapter_config.json", **LORA),
        r"/adapter_config\.json .* Qwen/Qwen2-VL-2B-Instruct\b.*merge_and_unload\(",
    ),
    "adapter instead of weights": (
        both(
            edit("adapter_config.json", **LORA),
            lambda folder: (folder / "model.safetensors").rename(folder / "adapter_model.safetensors"),
            lambda folder: (folder / "config.json").unlink(),
        ),
        r"is an adapter of Qwen/Qwen2-VL-2B-Instruct without config\.json: copy that model's small files",
    ),
    "adapter without its settings": (
        write("adapter_model.bin", b"x"),
        r"/adapter_model\.bin .*merge_and_unload\(",
    ),
    "adapter of MLX": (write("adapters.safetensors", b"x"), r"/adapters\.safetensors .*merge_and_unload\("),
    "adapter of Diffusers": (
        write("pytorch_lora_weights.safetensors", b"x"),
        r"/pytorch_lora_weights\.safetensors .*merge_and_unload\(",
    ),
    "adapter within the weights": (
        edit_weights(lambda weights: weights.update({f"{WEIGHT[:-7]}.lora_A.default.weight": torch.zeros(2, 2)})),
        r"\blayers\.0\.mlp\.up_proj\.lora_A\.default\.weight\b.*merge_and_unload\(",
    ),
    # quantization
    "bitsandbytes": (
        edit("config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        r"/config\.json \(quantization_config\) .*\(bitsandbytes\).* bfloat16 .* float32\b",
    ),
    "GPTQ": (
        edit("config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
        r"/config\.json \(quantization_config\) .*\(gptq\)",
    ),
    "AWQ": (
        edit("config.json", quantization_config={"quant_method": "awq"}),
        r"/config\.json \(quantization_config\) .*\(awq\)",
    ),
    "a quantizer that nobody knows": (
        edit("config.json", quantization_config={"quant_method": "new"}),
        r"/config\.json \(quantization_config\) .*\(new\)",
    ),
    "quantized text model": (
        edit_text_config(quantization_config={"quant_method": "fp8"}),
        r"/config\.json \(text_config\.quantization_config\) .*\(fp8\)",
    ),
    "AutoGPTQ's own file": (
        edit("quantize_config.json", bits=4),
        r'/quantize_config\.json .*\{"bits": 4\}',
    ),
    "ModelOpt's own file": (
        edit("hf_quant_config.json", quantization={"quant_algo": "FP8"}),
        r'/hf_quant_config\.json .*"quant_algo": "FP8"',
    ),
    "weights of one byte": (
        edit_weights(lambda weights: weights.update({WEIGHT: weights[WEIGHT].to(torch.float8_e4m3fn)})),
        rf"/model\.safetensors .* {WEIGHT} .*\bF8_E4M3\b",
    ),
    "weights as integers": (
        edit_weights(lambda weights: weights.update({WEIGHT: weights[WEIGHT].to(torch.int8)})),
        rf"/model\.safetensors .* {WEIGHT} .*\bI8\b",
    ),
    "pickled weights as integers": (
        both(edit_weights(lambda weights: weights.update({WEIGHT: weights[WEIGHT].to(torch.int8)})), only_pickled),
        rf"/pytorch_model\.bin .* {WEIGHT} .*\bint8\b",
    ),
    # own code
    "a model's own code": (
        edit("config.json", auto_map={"AutoModel": "modeling_x.XModel"}),
        r"/config\.json .*\bauto_map\b.*\bmodeling_x\.XModel\b",
    ),
    "a tokenizer's own code": (
        edit("tokenizer_config.json", auto_map={"AutoTokenizer": ["x.T", None]}),
        r"/tokenizer_config\.json .*\bauto_map\b.*\bx\.T\b",
    ),
    "an image processor's own code": (
        edit("preprocessor_config.json", auto_map={"AutoImageProcessor": "x.P"}),
        r"/preprocessor_config\.json .*\bauto_map\b.*\bx\.P\b",
    ),
    # damage
    **{
        f"{name} cut": (cut(name, 20), rf"/{re.escape(name)} .*\bline 2 column \d+ ")
        for name in ("config.json", "generation_config.json", "tokenizer_config.json", "preprocessor_config.json")
    },
    "tokenizer.json cut": (
        cut("tokenizer.json", 3000),
        r"\bline 142 column \d+ .* tokenizer\.json .* tokenizer_config\.json\b",
    ),
    "tokenizer.json of something else": (
        write("tokenizer.json", "{}"),
        r" tokenizer\.json .* tokenizer_config\.json\b",
    ),
    "tokenizer.json of an unknown model": (
        write(
            "tokenizer.json", json.dumps({"version": "1.0", "added_tokens": [], "model": {"type": "New", "vocab": {}}})
        ),
        r" tokenizer\.json .* tokenizer_config\.json\b",
    ),
    "tokenizer.json as Git's pointer": (write("tokenizer.json", POINTER), r"/tokenizer\.json .*`git lfs pull`"),
    "a list": (write("generation_config.json", "[]"), r"/generation_config\.json .* list\b"),
    "no UTF-8": (
        write("special_tokens_map.json", '{"eos_token": "ß"}'.encode("latin-1")),
        r"/special_tokens_map\.json .*\b0xdf in position 15\b",
    ),
    "empty": (write("config.json", b""), r"/config\.json .* empty\b"),
    "an unknown kind": (edit("config.json", model_type=None), r"/config\.json .*\bmodel_type\b"),
    "a number that is a text": (edit_text_config(hidden_size="wide"), r"/config\.json .*'hidden_size'.*'wide'"),
    "a part that is no mapping": (edit("config.json", text_config="abc"), r"/config\.json .*'text_config'.*'abc'"),
    "heads that do not divide": (
        edit_text_config(num_attention_heads=7),
        r"config\.json .*mrope_section=\[4, 4, 24\], .* 64 .* 36\b",
    ),
    "weights cut": (
        cut("model.safetensors", 1_000_000),
        r"/model\.safetensors .* 8185360 .* 1000000\b",
    ),
    "weights cut within the header": (cut("model.safetensors", 100), r"/copy/model\.safetensors .* safetensors file\b"),
    "weights with something after them": (
        lambda folder: (folder / "model.safetensors").open("ab").write(b"more"),
        r"/model\.safetensors .* 8185360 .* 8185364\b",
    ),
    "weights empty": (write("model.safetensors", b""), r"/model\.safetensors .* empty\b"),
    "weights as Git's pointer": (write("model.safetensors", POINTER), r"/model\.safetensors .*`git lfs pull`"),
    "weights of zeros": (write("model.safetensors", bytes(5000)), r"/copy/model\.safetensors .* header\b"),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        r" model\.safetensors .* model\.safetensors\.index\.json .* \*\.safetensors\b",
    ),
    "GGUF alone": (
        lambda folder: (folder / "model.safetensors").rename(folder / "model-q4.gguf"),
        r" model\.safetensors .* model\.safetensors\.index\.json .* model-q4\.gguf\b",
    ),
    # the template's file
    "a template in another encoding": (
        write("chat_template.jinja", "{# ü #}".encode("latin-1")),
        r"/chat_template\.jinja .*\b0xfc in position 3\b.* UTF-8\b",
    ),
    "a template as Git's pointer": (write("chat_template.jinja", POINTER), r"/chat_template\.jinja .*`git lfs pull`"),
    # index and shards
    "a shard is missing": (
        shard(lambda folder, index: (folder / "model-00002-of-00002.safetensors").unlink()),
        r"/model\.safetensors\.index\.json .* 2 .*\b1 .* model-00002-of-00002\.safetensors\b",
    ),
    "the index lacks a tensor": (
        shard(lambda folder, index: index["weight_map"].pop(WEIGHT)),
        rf": (model-0000[12]-of-00002\.safetensors) .* {WEIGHT} .* \1\b.* model\.safetensors\.index\.json .*\(1 ",
    ),
    "a shard lacks a tensor": (
        shard(lambda folder, index: index["weight_map"].update(x="model-00001-of-00002.safetensors")),
        r": model\.safetensors\.index\.json .* x .* (model-00001-of-00002\.safetensors)\b.* \1 .*\(1 ",
    ),
    "an index of another kind": (
        shard(lambda folder, index: index.pop("weight_map")),
        r"/model\.safetensors\.index\.json .* weight_map\b",
    ),
    "shards without an index": (
        both(shard(), lambda folder: (folder / "model.safetensors.index.json").unlink()),
        r" model-00001-of-00002\.safetensors, .* model\.safetensors .* model\.safetensors\.index\.json\b",
    ),
    "weights twice": (
        lambda folder: [
            data := (folder / "model.safetensors").read_bytes(),
            shard()(folder),
            write("model.safetensors", data)(folder),
        ],
        r"/copy .* model\.safetensors .* model\.safetensors\.index\.json\b",
    ),
    # weights against config.json
    "a layer more": (
        edit_text_config(num_hidden_layers=5, layer_types=["full_attention"] * 5),
        r" 12 .* config\.json\b.*\blayers\.4\.input_layernorm\.weight\b",
    ),
    "a layer less": (
        edit_text_config(num_hidden_layers=3, layer_types=["full_attention"] * 3),
        r" 12 .* config\.json\b.*\blayers\.3\.input_layernorm\.weight\b",
    ),
    "a tensor more": (
        edit_weights(lambda weights: weights.update(x=torch.zeros(2))),
        r" 1 .* config\.json\b.* x:",
    ),
    "a tensor less": (
        edit_weights(lambda weights: weights.pop(WEIGHT)),
        r" 1 .* config\.json\b.*\blayers\.0\.mlp\.up_proj\.weight:",
    ),
    "another width": (
        edit_weights(lambda weights: weights.update({WEIGHT: torch.zeros(640, 128)})),
        r"\.up_proj\.weight .*\[640, 128\] .*\[640, 256\] .*\bconfig\.json\b",
    ),
    "another vocabulary": (
        edit_text_config(vocab_size=760),
        r"\.embed_tokens\.weight .*\[748, 256\] .*\[760, 256\] .*\bconfig\.json\b",
    ),
    "a head of its own that config.json ties": (
        edit_weights(lambda weights: weights.update({"lm_head.weight": weights["model.embed_tokens.weight"] + 1})),
        r"\bconfig\.json .* tie_word_embeddings=true\b.* lm_head\.weight\b",
    ),
    "a head of its own that text_config ties": (
        both(
            edit("config.json", tie_word_embeddings=False),
            edit_text_config(tie_word_embeddings=True),
            edit_weights(lambda weights: weights.update({"lm_head.weight": weights["model.embed_tokens.weight"] + 1})),
        ),
        r"\bconfig\.json .* text_config\.tie_word_embeddings=true\b.* lm_head\.weight\b",
    ),
    "a pickled head of its own that config.json ties": (
        both(
            edit_weights(lambda weights: weights.update({"lm_head.weight": weights["model.embed_tokens.weight"] + 1})),
            only_pickled,
        ),
        r"\bconfig\.json .* tie_word_embeddings=true\b.* lm_head\.weight\b",
    ),
    "a head that is not there": (
        edit("config.json", tie_word_embeddings=False),
        r" 1 .* config\.json\b.* lm_head\.weight:.* tie_word_embeddings .*\btrue\b",
    ),
    # the tokenizer against config.json
    "another tokenizer": (
        edit_text_config(vocab_size=700),
        r"'<\|video_pad\|>' .*\b747\b.* vocab_size\b.*\b700\b",
    ),
    "image token": (
        edit("config.json", image_token_id=3),
        r"\bconfig\.json .*\bimage_token_id=3\b.*<\|image_pad\|> .*\b746\b",
    ),
    "vision start": (
        edit("config.json", vision_start_token_id=744),
        r"\bconfig\.json .*\bvision_start_token_id=744\b.*<\|vision_start\|> .*\b743\b",
    ),
    "an end token that is none": (
        edit("generation_config.json", eos_token_id=[736, 151645]),
        r"/generation_config\.json\b.* 151645 .*\(0 .* 747\)",
    ),
    "an end token as text": (
        edit("generation_config.json", eos_token_id="<|im_end|>"),
        r"/generation_config\.json\b.* '<\|im_end\|>' .*\(0 .* 747\)",
    ),
    "a negative end token": (
        edit("generation_config.json", eos_token_id=-1),
        r"/generation_config\.json\b.* -1 .*\(0 .* 747\)",
    ),
    # the image processor against config.json
    "patches": (
        edit("preprocessor_config.json", patch_size=16),
        r" preprocessor_config\.json .* patch_size=16\b.* config\.json .*\bvision_config\.patch_size=14\b",
    ),
    "merging": (
        edit("preprocessor_config.json", merge_size=1),
        r" preprocessor_config\.json .* merge_size=1\b.* config\.json .*\bvision_config\.spatial_merge_size=2\b",
    ),
    "frames": (
        edit_vision_config(temporal_patch_size=1),
        r" preprocessor_config\.json .* temporal_patch_size=2\b.*\bvision_config\.temporal_patch_size=1\b",
    ),
    "another image processor": (
        edit("preprocessor_config.json", image_processor_type="CLIPImageProcessor"),
        r"/preprocessor_config\.json .*\bCLIPImageProcessor.*\bQwen2VLImageProcessor\b",
    ),
    "an unknown image processor": (
        edit("preprocessor_config.json", image_processor_type="Nobodys"),
        r"\bimage_processor_type\b.* preprocessor_config\.json .*\bprocessor_config\.json\b",
    ),
    "another kind of size": (
        edit("preprocessor_config.json", size={"height": 56, "width": 56}),
        r"/preprocessor_config\.json .*\{'height': 56, 'width': 56\}.*\bQwen2VLImageProcessor\b",
    ),
    "pixels as a text": (
        edit("preprocessor_config.json", size=None, min_pixels="a", max_pixels="b"),
        r"/preprocessor_config\.json .*'b'.*'a'.*\bQwen2VLImageProcessor\b",
    ),
    "sections of the rotation": (
        edit_text_config(
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [16, 24, 24]}
        ),
        r"\bconfig\.json .*\bmrope_section=\[16, 24, 24\].*\b128 .*\b64\b",
    ),
    "no sections of the rotation": (
        edit_text_config(rope_parameters={"rope_type": "default", "rope_theta": 10000.0}),
        r"\bconfig\.json .*\bmrope_section=\[16, 24, 24\].*\b128 .*\b64\b",
    ),
    "pickled weights cut": (
        lambda folder: [
            pickled(folder),
            cut("pytorch_model.bin", 100_000)(folder),
            (folder / "model.safetensors").unlink(),
        ],
        r"/copy' .*\bpytorch_model\.bin\b",
    ),
    "a length that is no number": (
        edit("tokenizer_config.json", model_max_length="long"),
        r" tokenizer\.json .* tokenizer_config\.json\b",
    ),
    # architecture
    "no language model": (
        edit("config.json", architectures=["Qwen2VLForSequenceClassification"]),
        r"\bconfig\.json .*\bQwen2VLForSequenceClassification .*\bqwen2_vl\b.*\bQwen2VLForConditionalGeneration\b",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(base_copy, name):
    change, message = REFUSED[name]
    change(base_copy)

    def open_and_load() -> None:
        PromptRenderer(*open_model(base_copy), max_prompt_tokens=512)
        load_policy(base_copy)

    with pytest.raises(ValueError, match=message) as raised:
        open_and_load()
    assert len(str(raised.value).splitlines()) == 1
    assert base_copy.name in str(raised.value)


SETTLED: dict[str, tuple[Change, str]] = {
    "pickled weights beside": (pickled, r"/copy'.* model\.safetensors\b.* pytorch_model\.bin\b"),
    "weights of another name beside": (
        lambda folder: save_file({"x": torch.zeros(1)}, folder / "extra.safetensors"),
        r"/copy'.* model\.safetensors\b.* extra\.safetensors\b",
    ),
    "an index of files that are not there": (
        lambda folder: edit("model.safetensors.index.json", weight_map={"x": "model-00001-of-00002.safetensors"})(
            folder
        ),
        r"/model\.safetensors\.index\.json .* model\.safetensors$",
    ),
    "total size": (
        shard(lambda folder, index: index["metadata"].update(total_size=7)),
        r"/model\.safetensors\.index\.json\b.*\btotal_size\b.* 7 .* 8175872\b",
    ),
    "two templates": (
        edit("tokenizer_config.json", chat_template="another"),
        r" tokenizer_config\.json .*( chat_template\.jinja\b.*){2}",
    ),
    "the older processors' templates, which cannot be read": (
        edit("chat_template.json", chat_template=["another"]),
        r" chat_template\.json .*( chat_template\.jinja\b.*){2}",
    ),
    "the older processors' template": (
        edit("chat_template.json", chat_template="another"),
        r" chat_template\.json .*( chat_template\.jinja\b.*){2}",
    ),
    "two templates for processors": (
        edit("processor_config.json", chat_template="another"),
        r" processor_config\.json .*( chat_template\.jinja\b.*){2}",
    ),
    "pixels": (
        edit("preprocessor_config.json", min_pixels=784),
        r"/preprocessor_config\.json .* min_pixels=784 .*\bsize\.shortest_edge=3136\b.* (784|3136) .*\bmodel\.min_pixels\b",
    ),
    "pixels as older versions wrote them": (
        edit(
            "preprocessor_config.json", max_pixels=6272, min_pixels=3136, size={"max_pixels": 12544, "min_pixels": 3136}
        ),
        r"/preprocessor_config\.json .* max_pixels=6272 .*\bsize\.max_pixels=12544\b.* 6272 .*\bmodel\.max_pixels\b",
    ),
    "two image processors": (
        lambda folder: edit(
            "processor_config.json",
            image_processor={**json.loads((folder / "preprocessor_config.json").read_text()), "do_normalize": False},
        )(folder),
        r" processor_config\.json .*=False .* preprocessor_config\.json .*normalize=True\b.* processor_config\.json\b",
    ),
    "added tokens": (
        edit("added_tokens.json", **{"<|im_end|>": 5}),
        r"/added_tokens\.json .*'<\|im_end\|>' .* 5\b.* 736 \(1 ",
    ),
    "words of another tokenizer": (
        edit("vocab.json", **{"A": 3}),
        r"/vocab\.json .*'A' .* 3\b.* 32 \(1 ",
    ),
    "added tokens by id": (
        edit("tokenizer_config.json", added_tokens_decoder={"5": {"content": "<|im_end|>"}}),
        r"/tokenizer_config\.json .*'<\|im_end\|>' .* 5\b.* 736 \(1 ",
    ),
    "rotation": (
        edit("config.json", rms_norm_eps=1e-5),
        r"/config\.json .* rms_norm_eps=1e-05 .*\btext_config\.rms_norm_eps=1e-06\b.* 1e-06\b",
    ),
    "the base of the rotation": (
        edit("config.json", rope_theta=1000000.0),
        r"/config\.json .* rope_theta=1000000\.0 .*\btext_config\.rope_parameters\.rope_theta=10000\.0\b.* 10000\.0\b",
    ),
    "an adapter in a folder within": (
        lambda folder: [(folder / "checkpoint-5").mkdir(), edit("checkpoint-5/adapter_config.json", **LORA)(folder)],
        r"/copy'.* checkpoint-5\b",
    ),
    "a turn that is not opened": (
        lambda folder: (path := folder / "chat_template.jinja").write_text(
            path.read_text().partition("{%- if add_generation_prompt %}")[0]
        ),
        r"/copy' .*'<\|im_start\|>assistant\\n'.* add_generation_prompt\b",
    ),
    "an end that is a word": (
        edit("generation_config.json", eos_token_id=[736, 65]),
        r"/copy'.* generation_config\.json .* b \(65\)",
    ),
    "the date": (
        lambda folder: (folder / "chat_template.jinja").write_text(
            "{{ strftime_now('%d %b %Y') }}" + (folder / "chat_template.jinja").read_text()
        ),
        r"/copy' .* date\b",
    ),
}


@pytest.mark.parametrize("name", SETTLED)
def test_what_is_settled_and_said(base_copy, caplog, name):
    change, message = SETTLED[name]
    change(base_copy)
    open_model(base_copy)
    assert re.search(message, caplog.text)
    assert len(caplog.records) == 1
    load_policy(base_copy)


HARMLESS: dict[str, Change] = {
    "as it ships": lambda folder: None,
    "shards": shard(),
    "an index of the whole file": lambda folder: edit(
        "model.safetensors.index.json",
        metadata={},
        weight_map=dict.fromkeys(load_file(folder / "model.safetensors"), "model.safetensors"),
    )(folder),
    "the name of a wrapped model": edit("config.json", architectures=["FSDPQwen2VLForConditionalGeneration"]),
    "buffers that are computed": edit_weights(
        lambda weights: weights.update({"visual.rotary_pos_emb.inv_freq": torch.zeros(16)})
    ),
    "weights without metadata": lambda folder: save_file(
        load_file(folder / "model.safetensors"), folder / "model.safetensors"
    ),
    "a head that repeats the embeddings": edit_weights(
        lambda weights: weights.update({"lm_head.weight": weights["model.embed_tokens.weight"].clone()})
    ),
    "a head of its own": both(
        edit("config.json", tie_word_embeddings=False),
        edit_weights(lambda weights: weights.update({"lm_head.weight": weights["model.embed_tokens.weight"] + 1})),
    ),
    "pixels alone": edit("preprocessor_config.json", size=None, min_pixels=3136, max_pixels=12544),
    "a template with a byte order mark": lambda folder: (folder / "chat_template.jinja").write_bytes(
        b"\xef\xbb\xbf" + (folder / "chat_template.jinja").read_bytes()
    ),
    "the same template twice": lambda folder: edit(
        "tokenizer_config.json", chat_template=(folder / "chat_template.jinja").read_text() + "\n"
    )(folder),
    "templates in a folder": lambda folder: [
        (folder / "additional_chat_templates").mkdir(),
        write("additional_chat_templates/tool_use.jinja", "tools")(folder),
    ],
    "templates by name": lambda folder: [
        edit(
            "tokenizer_config.json",
            chat_template=[{"name": "default", "template": (path := folder / "chat_template.jinja").read_text()}],
        )(folder),
        path.unlink(),
    ],
    "no generation settings": lambda folder: (folder / "generation_config.json").unlink(),
    "an empty entry": edit("config.json", auto_map={}, quantization_config={}),
    "a token to pad with, without a row": lambda folder: edit(
        "tokenizer.json",
        added_tokens=[
            *(entries := json.loads((folder / "tokenizer.json").read_text())["added_tokens"]),
            {**entries[0], "id": 748, "content": "<pad>"},
        ],
    )(folder),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_needs_no_word(base_copy, caplog, name):
    HARMLESS[name](base_copy)
    open_model(base_copy)
    assert caplog.text == ""
    assert load_policy(base_copy).end_token_ids == ({736} if name == "no generation settings" else {734, 736})


def test_a_head_of_its_own_is_the_one_that_is_used(base_copy):
    HARMLESS["a head of its own"](base_copy)
    policy = load_policy(base_copy)
    assert not torch.equal(policy.projection.weight, policy.model.get_input_embeddings().weight)


@pytest.mark.parametrize(("tokens", "said"), [(4096, False), (4097, True), (200, False)])
def test_more_tokens_than_positions_are_said(base_copy, tokens, said):
    doubt = position_doubt(load_config(base_copy), tokens=tokens, what=f"limit={tokens}", advice="limit")
    assert (doubt is not None) is said
    assert not said or re.match(r"limit=4097 .*\b4096 .*\bmax_position_embeddings\b.* limit$", doubt)


@pytest.mark.parametrize(
    "within",
    ["2026-01-01/checkpoints/step-000300", "checkpoints/step-000300", "snapshots/895c3a49", "Qwen2-VL-2B-Instruct"],
)
def test_the_folder_within_is_named(base_copy, tmp_path, within):
    folder = tmp_path / "given" / within
    folder.parent.mkdir(parents=True)
    base_copy.rename(folder)
    with pytest.raises(ValueError, match=rf"/given .*config\.json .*{re.escape(str(folder))}\b"):
        load_config(tmp_path / "given")


def test_a_file_is_no_folder(base_copy):
    with pytest.raises(ValueError, match=r"/copy/model\.safetensors' .*\bfile\b"):
        load_config(base_copy / "model.safetensors")


def test_settings_that_transformers_would_not_save_do_not_stop_a_checkpoint(base_copy, tmp_path):
    edit("generation_config.json", do_sample=False, temperature=0.01, top_p=0.5)(base_copy)
    load_policy(base_copy).model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [734, 736]
    assert "temperature" not in saved
