"""Build models without download: a real Qwen2-VL of a few million parameters, smaller for tests.

`build_tiny` writes a Hugging Face folder that transformers and vLLM load like the
2-billion-parameter original: same architecture, special tokens, chat template and image processor,
with a byte-level BPE trained on the spot. Its weights are random; alignment
(`rlmed.data.phantom.corpus`, `rlmed.sft`) turns it into a base model. `build_tiny_text` and
`build_tiny_vl` write even smaller random models of the supported families in well under two
seconds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from rlmed.models.tiny.init import initialise_for_lookup

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
"""Qwen2-VL's control tokens, in its order of ids."""

SYSTEM_MESSAGE = "You are a helpful assistant."

TURNS = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['content'] is string %}{{- message['content'] }}"
    "{%- else %}"
    "{%- for part in message['content'] %}"
    "{%- if part['type'] == 'image' %}{{- '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- elif part['type'] == 'video' %}{{- '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{%- elif part['type'] == 'text' %}{{- part['text'] }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- endif %}"
    "{{- '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
"""A template of turns in ChatML, each image as one placeholder between vision marks."""
CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' %}"
    f"{{{{- '<|im_start|>system\\n{SYSTEM_MESSAGE}<|im_end|>\\n' }}}}"
    "{%- endif %}"
) + TURNS
"""Qwen2-VL's: a default system turn before the others."""

# A tag is one word, so that no letter merges with the ">" before it; digits and hyphens stay inside
# a word, so that "T2-weighted" is one word too; standalone digits are separate words.
_WORDS = (
    r" ?</?[a-z]+>"
    r"|\b[A-J]\)| \([A-J]\)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}[\p{L}\p{N}]*(?:-[\p{L}\p{N}]+)*"
    r"|\p{N}"
    r"| ?(?:(?!</?[a-z]+>)[^\s\p{L}\p{N}])+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)

PATCH = 14
MERGE = 2
MIN_PIXELS = 56 * 56
MAX_PIXELS = 112 * 112
VOCABULARY = 2000
"""Largest vocabulary of `build_tiny`, special tokens included."""

WINDOWED: dict[str, Any] = {
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 9,  # fewer tokens than prompts have
    "query_pre_attn_scalar": 12,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    },
}
"""Gemma 3's kinds of layers, one of each, for test models."""

_TEST_SENTENCES = (
    "Which body part is shown? A) head B) chest C) abdomen D) knee",
    "<think>This is a scan of the knee, option D.</think><answer>D</answer>",
)


def build_tiny(folder: Path, *, corpus: Iterable[str], phrases: Sequence[str] = (), seed: int = 0) -> None:
    """Write a Qwen2-VL of about four million random weights, with its tokenizer and processors.

    Args:
        folder: output folder; created if missing.
        corpus: training texts of the byte-level BPE, which can encode any text but these in few
            tokens.
        phrases: texts that recur verbatim (an instruction), each learnt as one token.
        seed: of the weights.

    Raises:
        ValueError: if the corpus is empty.
    """
    tokenizer = train_tokenizer(corpus, vocabulary=VOCABULARY, phrases=(*phrases, SYSTEM_MESSAGE))
    config = Qwen2VLConfig(
        text_config={
            **_decoder_shape(hidden=256, layers=4, heads=4, kv_heads=2, intermediate=640),
            "max_position_embeddings": 4096,
            # the original's 16:24:24 leaves only slow rotations for columns, too slow for an image
            # of 4 columns
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 4, 24]},
            "vocab_size": len(tokenizer),
            **_end_tokens(tokenizer),
        },
        vision_config={
            "depth": 3,
            "embed_dim": 128,
            "num_heads": 4,
            "mlp_ratio": 4,
            "hidden_size": 256,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
        },
        **_vision_tokens(tokenizer),
        tie_word_embeddings=True,
    )
    _write(folder, Qwen2VLForConditionalGeneration, config, tokenizer, seed, initialise_for_lookup)


def build_tiny_text(folder: Path, family: str = "qwen2", *, seed: int = 0) -> None:
    """Write a random text-only model (2 layers x 64) for tests.

    Args:
        folder: where to write; made if missing.
        family: "qwen2", "llama", "qwen3" or "gemma3_text".
        seed: of the weights.

    Raises:
        ValueError: for another family.
    """
    classes = {
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        "gemma3_text": (Gemma3TextConfig, Gemma3ForCausalLM),
    }
    if family not in classes:
        raise ValueError(f"family={family!r} is not a text family; use one of {', '.join(classes)}")
    config_class, model_class = classes[family]
    tokenizer = train_tokenizer(_TEST_SENTENCES, vocabulary=400)
    rotation: dict[str, Any] = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    config = config_class(
        **_decoder_shape(hidden=64, layers=2, heads=4, kv_heads=2, intermediate=96),
        head_dim=16,
        max_position_embeddings=2048,
        **(WINDOWED if family == "gemma3_text" else rotation),
        vocab_size=len(tokenizer),
        # one family has an untied projection, so that tests cover both cases
        tie_word_embeddings=family != "llama",
        **_end_tokens(tokenizer),
    )
    _write(folder, model_class, config, tokenizer, seed)


def build_tiny_vl(folder: Path, family: str = "qwen2_vl", *, seed: int = 0) -> None:
    """Write a random vision-language model (2 layers x 64) for tests.

    Args:
        folder: where to write; made if missing.
        family: "qwen2_vl", "qwen2_5_vl" or "qwen3_vl".
        seed: of the weights.

    Raises:
        ValueError: for another family.
    """
    tokenizer = train_tokenizer(_TEST_SENTENCES, vocabulary=400)
    text_config: dict[str, Any] = {
        **_decoder_shape(hidden=64, layers=2, heads=4, kv_heads=2, intermediate=96),
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        "vocab_size": len(tokenizer),
        **_end_tokens(tokenizer),
    }
    vision_config: dict[str, Any] = {
        "depth": 2,
        "num_heads": 2,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
    }
    config: PreTrainedConfig
    shared: dict[str, Any] = {**_vision_tokens(tokenizer), "tie_word_embeddings": True}
    if family == "qwen2_vl":
        vision_config |= {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
        config = Qwen2VLConfig(text_config=text_config, vision_config=vision_config, **shared)
        _write(folder, Qwen2VLForConditionalGeneration, config, tokenizer, seed)
    elif family == "qwen2_5_vl":
        vision_config |= {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 64}
        # one windowed and one full layer, as in the original; a window of 56 pixels divides a
        # 112-pixel image
        vision_config |= {"window_size": 56, "fullatt_block_indexes": [1]}
        config = Qwen2_5_VLConfig(text_config=text_config, vision_config=vision_config, **shared)
        _write(folder, Qwen2_5_VLForConditionalGeneration, config, tokenizer, seed)
    elif family == "qwen3_vl":
        text_config["head_dim"] = 16
        text_config["rope_parameters"]["mrope_interleaved"] = True  # vLLM reads it, transformers takes it for granted
        vision_config |= {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 64, "patch_size": 16}
        # the first block's features join the decoder after its first layer; 4 x 4 learnt positions
        # are resampled to each picture's grid
        vision_config |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
        shared.pop("vision_token_id")
        config = Qwen3VLConfig(text_config=text_config, vision_config=vision_config, **shared)
        _write(folder, Qwen3VLForConditionalGeneration, config, tokenizer, seed)
    else:
        raise ValueError(f"family={family!r} is not a vision-language family; use qwen2_vl, qwen2_5_vl or qwen3_vl")


def train_tokenizer(corpus: Iterable[str], *, vocabulary: int, phrases: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with Qwen2-VL's special tokens and chat template; see `build_tiny`."""
    texts = [*corpus]
    if not texts:
        raise ValueError("corpus is empty: the tokenizer needs texts to train on")
    longest_first = sorted(phrases, key=len, reverse=True)
    pattern = "|".join([*(re.escape(phrase) for phrase in longest_first), _WORDS])
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), behavior="isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(SPECIAL_TOKENS),
        min_frequency=2,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    # system message and role names recur in every prompt
    recurring = [SYSTEM_MESSAGE, "system\n", "user\n", "assistant\n", *phrases]
    backend.train_from_iterator([*texts, *recurring, *recurring], trainer)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )


def _decoder_shape(*, hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate,
        "rms_norm_eps": 1e-6,
    }


def _end_tokens(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    end, pad = _ids(tokenizer, "<|im_end|>", "<|endoftext|>")
    return {"bos_token_id": pad, "eos_token_id": end, "pad_token_id": pad}


def _vision_tokens(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    names = ("image_token_id", "video_token_id", "vision_token_id", "vision_start_token_id", "vision_end_token_id")
    tokens = ("<|image_pad|>", "<|video_pad|>", "<|vision_pad|>", "<|vision_start|>", "<|vision_end|>")
    return dict(zip(names, _ids(tokenizer, *tokens), strict=True))


def _ids(tokenizer: PreTrainedTokenizerFast, *tokens: str) -> list[int]:
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[token] for token in tokens]


def _write(
    folder: Path,
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    initialise: Callable[[Any], None] | None = None,
) -> None:
    """Save weights from `seed`, tokenizer, generation settings and a vision model's processor."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = model_class(config)
        if initialise is not None:
            initialise(model)
    end, pad = _ids(tokenizer, "<|im_end|>", "<|endoftext|>")
    model.generation_config = GenerationConfig(bos_token_id=pad, pad_token_id=pad, eos_token_id=[end, pad])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    vision, names = config.to_dict().get("vision_config"), {"qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}
    if vision is not None:
        image_processor = {
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": f"{names.get(config.model_type, 'Qwen2VL')}Processor",
            "min_pixels": MIN_PIXELS,
            "max_pixels": MAX_PIXELS,
            "patch_size": vision["patch_size"],
            "temporal_patch_size": 2,
            "merge_size": MERGE,
            "do_convert_rgb": True,
            "do_resize": True,
            "do_rescale": True,
            "do_normalize": True,
            "rescale_factor": 1 / 255,
            "resample": 3,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
        }
        text = json.dumps(image_processor, indent=2) + "\n"
        (Path(folder) / "preprocessor_config.json").write_text(text, encoding="utf-8")
