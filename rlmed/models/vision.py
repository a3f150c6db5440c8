"""Attention of the vision tower in one call a block, for all images and windows of a row at once.

transformers calls an attention function once for every image, or once for every window, unless its
name says "flash": then it passes the boundaries. Given such a name, it would also look for its own
kernels while it loads a model, so ours is set later.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from rlmed.models.varlen import VarlenLayout, choose_attention
from rlmed.models.varlen_backends import Spans

VISION_ATTENTION_NAME = "flash_without_padding"


def vision_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend within each image or window; registered with transformers.

    Input rows are [1, H, N, D], the result [1, N, H, D].

    Args:
        module: the attention's module.
        query: of all patches, rotary embedding applied.
        key: the same.
        value: the same.
        attention_mask: None.
        scaling: factor on the scores.
        cu_seq_lens_q: int32 [S + 1], where each image or window starts, and where the last ends.
        max_length_q: patches of the longest.
    """
    backend = choose_attention(query.device, query.dtype, query.shape[-1]).backend
    assert backend is not None, "use_varlen_vision selects this function only where there is a backend"
    windows = Spans(cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return VarlenLayout(backend, windows).attend(0, query, key, value, scaling).unsqueeze(0), None


AttentionInterface.register(VISION_ATTENTION_NAME, vision_attention)


def use_varlen_vision(model: PreTrainedModel) -> None:
    """Let the vision tower of a loaded model use `vision_attention` where its device and dtype have a backend."""
    for module in model.modules():
        # the attention modules of Qwen2-VL and Qwen2.5-VL; others keep their own attention
        attention: Any = module
        if hasattr(module, "qkv") and hasattr(module, "head_dim"):
            weight = attention.qkv.weight
            if choose_attention(weight.device, weight.dtype, attention.head_dim).backend is not None:
                attention.config._attn_implementation = VISION_ATTENTION_NAME
