"""Build a vision-language model around a Llama text model: Qwen2-VL's layout, the tiny tower.

Qwen2-VL's decoder is Llama's with biases on queries, keys and values, so a Llama model's weights
fit in unchanged, with biases of zero. Its M-RoPE (arXiv 2409.12191) is Llama's rotary embedding
wherever the three positions are equal, which they are for text. So the new model writes what the
text model writes until it sees an image. The vision tower and the first layer of the merger come
from a trained Qwen2-VL (the shipped tiny one knows generated radiology images); the merger's last
layer, which leads into the text model, is new. Alignment (`rlmed.smol_base`) trains it.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from rlmed.models.tiny.build import TURNS

VISION_TOKENS = {
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "vision_token_id": "<|vision_pad|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
}
"""Qwen2-VL's tokens for images, by their name in its configuration."""
TURN_END = "<|im_end|>"
PREPROCESSOR = "preprocessor_config.json"


def build_vlm(text: Path, tower: Path, folder: Path, *, seed: int = 0) -> None:
    """Write a Qwen2-VL of a Llama model's weights and another Qwen2-VL's vision tower.

    Args:
        text: folder of a Llama model whose tokenizer has `<|im_start|>` and `<|im_end|>`.
        tower: folder of a Qwen2-VL model.
        folder: where to write; made if missing.
        seed: of the merger's last layer, the only random weights.

    Raises:
        ValueError: if `text` is no Llama model, or has layers that Qwen2-VL's decoder lacks.
    """
    llama = _llama(text)
    tokenizer = _tokenizer(text)
    donor = Qwen2VLForConditionalGeneration.from_pretrained(tower, dtype=torch.float32)
    config = _config(llama.config, donor.config, tokenizer)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = Qwen2VLForConditionalGeneration(config)
    _copy_text(llama, model)
    _copy_tower(donor, model)
    end, pad = (tokenizer.convert_tokens_to_ids(token) for token in (TURN_END, tokenizer.pad_token))
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=pad)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shutil.copyfile(tower / PREPROCESSOR, folder / PREPROCESSOR)


def _llama(folder: Path) -> LlamaForCausalLM:
    config = AutoConfig.from_pretrained(folder)
    if config.model_type != "llama" or config.attention_bias or config.mlp_bias:
        raise ValueError(
            f"text model {str(folder)!r} is no Llama model without biases (model_type {config.model_type}): "
            "give one, such as SmolLM2"
        )
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Return the text model's tokenizer with the tokens for images and Qwen2-VL's template."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    if TURN_END not in tokenizer.get_vocab():
        raise ValueError(
            f"the tokenizer of {str(folder)!r} has no {TURN_END}: give a chat model in ChatML, such as SmolLM2"
        )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in VISION_TOKENS.values()], True)
    tokenizer.chat_template = TURNS  # SmolLM2 without its system turn
    tokenizer.eos_token = TURN_END
    return tokenizer


def _config(llama: Any, donor: Any, tokenizer: PreTrainedTokenizerBase) -> Qwen2VLConfig:
    rotation = dict(llama.rope_parameters)
    vision: PreTrainedConfig = donor.vision_config
    ids: dict[str, Any] = {name: tokenizer.convert_tokens_to_ids(token) for name, token in VISION_TOKENS.items()}
    return Qwen2VLConfig(
        text_config={
            "hidden_size": llama.hidden_size,
            "num_hidden_layers": llama.num_hidden_layers,
            "num_attention_heads": llama.num_attention_heads,
            "num_key_value_heads": llama.num_key_value_heads,
            "intermediate_size": llama.intermediate_size,
            "rms_norm_eps": llama.rms_norm_eps,
            "max_position_embeddings": llama.max_position_embeddings,
            "rope_parameters": rotation | {"mrope_section": mrope_section(llama.head_dim)},
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.convert_tokens_to_ids(TURN_END),
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={**vision.to_dict(), "hidden_size": llama.hidden_size, "dtype": None},
        **ids,
        tie_word_embeddings=bool(llama.tie_word_embeddings),
    )


def mrope_section(head_dim: int) -> list[int]:
    """Return how many rotations tell time, row and column: one, one, and all others.

    Rotations are ordered from fast to slow. So a row of visual tokens reads like a line of text,
    in which all but one rotation tell the place.
    """
    return [1, 1, head_dim // 2 - 2]


def _copy_text(llama: LlamaForCausalLM, model: Qwen2VLForConditionalGeneration) -> None:
    """Copy the decoder; new tokens get the mean embedding, queries, keys and values no bias."""
    state = llama.state_dict()
    words = state.pop("model.embed_tokens.weight")
    head = state.pop("lm_head.weight", None)
    target = model.model.language_model.state_dict()
    with torch.no_grad():
        for name, tensor in state.items():
            target.pop(name.removeprefix("model.")).copy_(tensor)
        _copy_rows(words, target.pop("embed_tokens.weight"))
        if head is not None and not model.config.tie_word_embeddings:
            _copy_rows(head, model.lm_head.weight)
        for name, tensor in target.items():
            if not name.endswith("_proj.bias"):
                raise ValueError(f"Qwen2-VL's decoder has {name}, which the text model lacks")
            tensor.zero_()


def _copy_rows(source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy a row for each known token, [V, H] → [V' >= V, H], and their mean for new ones."""
    known = min(len(source), len(target))
    target[:known] = source[:known]
    target[known:] = source.mean(0)


def _copy_tower(donor: Qwen2VLForConditionalGeneration, model: Qwen2VLForConditionalGeneration) -> None:
    """Copy the vision tower and the merger but for its last layer, whose outputs start small."""
    own, given = model.model.visual.state_dict(), donor.model.visual.state_dict()
    with torch.no_grad():
        for name, tensor in own.items():
            if tensor.shape == given[name].shape:
                tensor.copy_(given[name])
            elif not name.startswith("merger.mlp.2."):
                raise ValueError(f"the vision tower's {name} is {list(given[name].shape)}, not {list(tensor.shape)}")
