"""Size and precision of the vLLM engine, and the vLLM arguments that follow from them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from rlmed.models.families import family_of

CPU_BLOCK = 32
"""Tokens per key-value cache block on a CPU.

With vLLM's 128, a group would not share a shorter prompt.
"""
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class VllmSettings:
    """Sizes of the engine.

    Example:
        >>> VllmSettings(max_prompt_tokens=512, max_tokens=512).max_model_len
        1024
    """

    dtype: str = "bfloat16"
    """Dtype of weights and key-value cache: "float32" or "bfloat16"."""
    max_completions: int = 64
    """Completions sampled at the same time."""
    max_prompt_tokens: int = 1024
    """Longest prompt accepted, visual tokens included."""
    max_images: int = 1
    """Most images of a prompt."""
    max_tokens: int = 512
    """Longest completion a request may ask for."""
    gpu_memory_utilization: float = 0.8
    """Share of a GPU's memory that vLLM takes."""
    tensor_parallel_size: int = 1
    """GPUs over which each layer is split; vLLM starts a process for each beyond the first."""
    kv_cache_gib: float | None = None
    """Size of the key-value cache.

    None: what `gpu_memory_utilization` leaves; on a CPU, the most all completions need.
    """
    enforce_eager: bool = False
    """Skip compilation and CUDA graphs: starts in seconds, not most of a minute; samples slower."""
    sleep: bool = False
    """Allow releasing GPU memory between a batch and the next push; GPUs only."""
    seed: int = 0
    """Seed of vLLM's own random numbers; completions draw from their requests' seeds."""

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus longest completion, in tokens."""
        return self.max_prompt_tokens + self.max_tokens

    @property
    def max_running_prompt_tokens(self) -> int:
        """Most prompt tokens, and so visual tokens, that run at the same time."""
        return self.max_completions * self.max_prompt_tokens

    def kv_cache_bytes(self, config: PreTrainedConfig, *, on_cpu: bool) -> int | None:
        """Return the size of the key-value cache in bytes; None lets vLLM decide."""
        if self.kv_cache_gib is not None:
            return int(self.kv_cache_gib * 2**30)
        if not on_cpu:
            return None  # on a CPU vLLM would take `gpu_memory_utilization` of the machine's memory
        text = config.get_text_config()
        width = text.to_dict().get("head_dim") or text.hidden_size // text.num_attention_heads
        per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * width * DTYPE_BYTES[self.dtype]
        blocks = 2 + self.max_completions * (2 + self.max_model_len // CPU_BLOCK)
        return blocks * CPU_BLOCK * int(per_token)

    def engine_args(self, folder: Path, config: PreTrainedConfig, *, on_cpu: bool) -> dict[str, Any]:
        """Return the keyword arguments of `vllm.EngineArgs`.

        Raises:
            ValueError: for `sleep` on a CPU.
        """
        if self.sleep and on_cpu:
            raise ValueError("rollout.sleep=true releases GPU memory and needs a GPU: use rollout.sleep=null")
        arguments: dict[str, Any] = {
            "model": str(folder),
            "dtype": self.dtype,
            "seed": self.seed,
            "max_model_len": self.max_model_len,
            "max_num_seqs": self.max_completions,
            "tensor_parallel_size": self.tensor_parallel_size,
            # never Ray's: an engine in a Ray actor would otherwise request more actors
            "distributed_executor_backend": "uni" if self.tensor_parallel_size == 1 else "mp",
            "gpu_memory_utilization": self.gpu_memory_utilization,
            "kv_cache_memory_bytes": self.kv_cache_bytes(config, on_cpu=on_cpu),
            "block_size": CPU_BLOCK if on_cpu else None,
            "enforce_eager": self.enforce_eager,
            "enable_sleep_mode": self.sleep,
            # on a CPU vLLM raises when it rewinds a seeded stream after part of a prompt: compute
            # prompts whole
            "enable_chunked_prefill": not on_cpu,
            "enable_prefix_caching": True,  # completions of a group share their prompt
            "generation_config": "vllm",  # nothing comes from the model folder
            "logprobs_mode": "processed_logprobs",  # under the distribution the tokens are drawn from
            # a step is complete when it returns: its tokens belong to the weights before the next
            # push
            "async_scheduling": False,
            "disable_log_stats": True,
        }
        family = family_of(config)
        if family.grids:
            vision = config.to_dict()["vision_config"]
            token_pixels = (vision["patch_size"] * vision["spatial_merge_size"]) ** 2
            arguments |= {
                "limit_mm_per_prompt": {"image": self.max_images, "video": 0},
                # pixels arrive preprocessed; vLLM only needs the largest image that fits a prompt
                "mm_processor_kwargs": {
                    "min_pixels": token_pixels,
                    "max_pixels": self.max_prompt_tokens * token_pixels,
                },
                "mm_device_do_normalize": False,  # already normalised
                "mm_processor_cache_gb": 0,  # never hit: images arrive preprocessed
            }
        elif family.vision:
            arguments |= {
                "limit_mm_per_prompt": {"video": 0},
                # vLLM would look for a tied projection in the language model's own settings
                "hf_overrides": {"text_config": {"tie_word_embeddings": config.tie_word_embeddings}},
                "mm_device_do_normalize": False,  # as above
                "mm_processor_cache_gb": 0,
            }
        return arguments
