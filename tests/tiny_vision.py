"""Small random models of the families that cut pictures into tiles or have one fixed size.

Each has its family's configuration, image processor and special tokens; only sizes are smaller, and
the tokenizer is the one of the other test models with the family's tokens added.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from rlmed.core.types import Prompt
from rlmed.models.tiny.build import _TEST_SENTENCES, WINDOWED, train_tokenizer

TILE, PATCH = 28, 7
SIGLIP = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
SIGLIP |= {"image_size": TILE, "patch_size": PATCH}
TEXT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
TEXT |= {"intermediate_size": 96, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "head_dim": 16}
PINPOINTS = [[TILE * rows, TILE * columns] for rows in (1, 2) for columns in (1, 2)]
IDEFICS_TOKENS = ("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", "<video>")
IDEFICS_TOKENS += tuple(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5))
IDEFICS = {
    "picture": "<image>",
    "tokens": IDEFICS_TOKENS,
    "image_token": "<image>",
    "text": "llama",
    "vision": SIGLIP,
    "config": {"scale_factor": 2, "tie_word_embeddings": False},
    # 3 x 3 tiles at most, and the whole picture as a tile
    "image_processor": {"size": {"longest_edge": 3 * TILE}, "max_image_size": {"longest_edge": TILE}},
    "processor": {"image_seq_len": 4},
}
FAMILIES: dict[str, dict[str, Any]] = {
    "idefics3": {**IDEFICS, "class": "Idefics3"},
    "smolvlm": {**IDEFICS, "class": "SmolVLM", "config": {"scale_factor": 2, "tie_word_embeddings": True}},
    "gemma3": {
        "class": "Gemma3",
        "picture": "<start_of_image>",
        "tokens": ("<start_of_image>", "<end_of_image>", "<image_soft_token>"),
        "named_tokens": {
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
        "image_token": "<image_soft_token>",
        "config_tokens": {"boi_token_index": "<start_of_image>", "eoi_token_index": "<end_of_image>"},
        "image_key": "image_token_index",
        "text": "gemma3_text",
        "text_config": WINDOWED,
        "vision": {**SIGLIP, "vision_use_head": False},
        "config": {"mm_tokens_per_image": 4, "tie_word_embeddings": True},
        "image_processor": {"size": {"height": TILE, "width": TILE}},
        "processor": {"image_seq_length": 4},
    },
    "internvl": {
        "class": "InternVL",
        "image_class": "GotOcr2",
        "picture": "<IMG_CONTEXT>",
        "tokens": ("<img>", "</img>", "<IMG_CONTEXT>", "<video>"),
        "named_tokens": {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        "image_token": "<IMG_CONTEXT>",
        "text": "qwen3",  # of version 3.5; version 3 is `internvl_qwen2`
        "vision": {**SIGLIP, "image_size": [TILE, TILE], "patch_size": [PATCH, PATCH]},
        "config": {"downsample_ratio": 0.5, "image_seq_length": 4, "tie_word_embeddings": False},
        "image_processor": {"size": {"height": TILE, "width": TILE}, "max_patches": 4},
        "processor": {"image_seq_length": 4},
    },
    "llava_onevision": {
        "class": "LlavaOnevision",
        "picture": "<image>",
        "tokens": ("<image>", "<video>"),
        "image_token": "<image>",
        "config_tokens": {"video_token_index": "<video>"},
        "image_key": "image_token_index",
        "text": "qwen2",
        "vision": {**SIGLIP, "model_type": "siglip_vision_model", "vision_use_head": False},
        "config": {
            "image_grid_pinpoints": PINPOINTS,
            "vision_aspect_ratio": "anyres_max_9",
            "tie_word_embeddings": True,
        },
        "image_processor": {"size": {"height": TILE, "width": TILE}, "image_grid_pinpoints": PINPOINTS},
        "processor": {"num_image_tokens": 16, "vision_feature_select_strategy": "full"},
    },
}
FAMILIES["internvl_qwen2"] = {**FAMILIES["internvl"], "model_type": "internvl", "text": "qwen2"}
TILE_FAMILIES = tuple(FAMILIES)


def build_tiny_tiles(folder: Path, family: str, *, seed: int = 0) -> None:
    """Write a random model (2 layers x 64) of a family with its tokenizer and processors."""
    rules = FAMILIES[family]
    tokenizer = _tokenizer(rules)
    config = _config(family, rules, tokenizer)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config)
        for parameter in model.parameters():
            if parameter.ndim > 1 and not parameter.any():  # what training would begin with shows nothing
                torch.nn.init.normal_(parameter, std=0.02)
    end, pad = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    model.generation_config = GenerationConfig(bos_token_id=pad, pad_token_id=pad, eos_token_id=[end, pad])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    kind = f"{rules['class']}Processor"
    images = {
        "image_processor_type": f"{rules.get('image_class', rules['class'])}ImageProcessor",
        "processor_class": kind,
    }
    _write(folder / "preprocessor_config.json", images | rules["image_processor"])
    _write(folder / "processor_config.json", {"processor_class": kind, **rules["processor"]})


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _tokenizer(rules: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    trained = train_tokenizer(_TEST_SENTENCES, vocabulary=400)
    template = trained.chat_template.replace("<|vision_start|><|image_pad|><|vision_end|>", rules["picture"])
    return PreTrainedTokenizerFast(
        tokenizer_object=_with_tokens(trained, rules["tokens"]),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=rules.get("named_tokens", {}),
        chat_template=template,
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )


def _with_tokens(trained: PreTrainedTokenizerFast, tokens: Sequence[str]) -> Any:
    trained.add_special_tokens({"additional_special_tokens": list(tokens)}, replace_extra_special_tokens=False)
    return trained.backend_tokenizer


def _config(family: str, rules: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    end, pad, image = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>", rules["image_token"]])
    text = {**TEXT, "model_type": rules["text"], "vocab_size": len(tokenizer)}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    text |= {"bos_token_id": pad, "eos_token_id": end, "pad_token_id": pad, **rules.get("text_config", {})}
    named = {key: tokenizer.convert_tokens_to_ids(token) for key, token in rules.get("config_tokens", {}).items()}
    ids = {"pad_token_id": pad, rules.get("image_key", "image_token_id"): image, **named}
    kind = rules.get("model_type", family)
    return AutoConfig.for_model(kind, text_config=text, vision_config=dict(rules["vision"]), **ids, **rules["config"])


def padded_images(family: str, prompts: Sequence[Prompt], token_ids: Tensor, image_token_id: int) -> dict[str, Tensor]:
    """Forward arguments of transformers for the pictures of a padded batch, one row a prompt."""
    shown = [prompt.image_inputs for prompt in prompts if prompt.image_inputs]
    if not shown:
        return {}
    names = sorted(shown[0])
    inputs = {name: torch.from_numpy(np.concatenate([own[name] for own in shown])) for name in names}
    if family in ("idefics3", "smolvlm"):  # tiles by row, the missing ones zeros
        tiles = [
            torch.from_numpy(prompt.image_inputs["pixel_values"]) if prompt.image_inputs else None for prompt in prompts
        ]
        most = max(len(own) for own in tiles if own is not None)
        inputs["pixel_values"] = torch.zeros(len(prompts), most, 3, TILE, TILE)
        for row, own in enumerate(tiles):
            if own is not None:
                inputs["pixel_values"][row, : len(own)] = own
    if family == "gemma3":
        inputs["token_type_ids"] = (token_ids == image_token_id).long()
    return inputs
