"""The text model from its package: a GGUF file becomes the folder of the same model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from rlmed.data.prompts import load_processor
from rlmed.models.policy import load_policy
from rlmed.models.smol.text import find_weights, write_folder
from tests.smol_text import CHATML, write_llama

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers": "blk",
}
"""Parts of tensor names in transformers and in GGUF."""


def write_gguf(model: LlamaForCausalLM, tokenizer_file: Path, path: Path) -> None:
    """Write a model in GGUF, in float32, as llama.cpp does: halves of rotated rows interleaved."""
    gguf = pytest.importorskip("gguf")
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    backend = json.loads(tokenizer_file.read_text(encoding="utf-8"))
    special = {token["content"] for token in backend["added_tokens"] if token["special"]}
    tokens = sorted(backend["model"]["vocab"], key=backend["model"]["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if name in special else gguf.TokenType.NORMAL for name in tokens])
    writer.add_token_merges([" ".join(pair) for pair in backend["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHATML)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        values = tensor.numpy()
        for heads, part in ((config.num_attention_heads, "q_proj"), (config.num_key_value_heads, "k_proj")):
            if part in name:
                halves = values.reshape(heads, 2, config.head_dim // 2, -1)
                values = halves.swapaxes(1, 2).reshape(values.shape)
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        writer.add_tensor(name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_becomes_a_folder_of_the_same_model(tmp_path: Path) -> None:
    source = write_llama(tmp_path / "source")
    model = LlamaForCausalLM.from_pretrained(source)
    write_gguf(model, source / "tokenizer.json", tmp_path / "tiny.gguf")
    folder = tmp_path / "folder"
    write_folder(tmp_path / "tiny.gguf", folder)

    written = LlamaForCausalLM.from_pretrained(folder)
    expected = model.state_dict()
    assert set(written.state_dict()) == set(expected)
    for name, tensor in written.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert written.dtype == torch.float32
    assert written.config.eos_token_id == written.generation_config.eos_token_id == 2
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "The image shows the knee.\n"
    assert tokenizer(text)["input_ids"] == AutoTokenizer.from_pretrained(source)(text)["input_ids"]
    turn = [{"role": "user", "content": "knee"}]
    assert tokenizer.apply_chat_template(turn, tokenize=False) == "<|im_start|>user\nknee<|im_end|>\n"
    # what every command opens
    assert load_processor(folder)[1] is None
    assert load_policy(folder).end_token_ids == {2}


@pytest.mark.slow
def test_the_package_has_a_model_that_speaks(tmp_path: Path) -> None:
    try:
        weights = find_weights()
    except ValueError as missing:
        pytest.skip(str(missing))
    write_folder(weights, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    written = model.generate(**inputs, do_sample=False, max_new_tokens=1)
    assert tokenizer.decode(written[0, -1]) == " Paris"
