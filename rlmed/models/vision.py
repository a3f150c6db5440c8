"""The vision tower: one product for all patches, one attention call a block for all images.

transformers calls an attention function once for every image, or once for every window, unless its
name says "flash": then it passes the boundaries. Given such a name, it would also look for its own
kernels while it loads a model, so ours is set later.
"""

from __future__ import annotations

import copy
import types
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from rlmed.models.cpu.linear import linear
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
    """Let a loaded model's vision tower use `vision_attention` where device and dtype allow."""
    for module in model.modules():
        # the attention modules of Qwen2-VL and Qwen2.5-VL; others keep their own attention
        attention: Any = module
        if hasattr(module, "qkv") and hasattr(module, "head_dim"):
            weight = attention.qkv.weight
            if choose_attention(weight.device, weight.dtype, attention.head_dim).backend is not None:
                attention.config._attn_implementation = VISION_ATTENTION_NAME


def use_linear_patches(model: nn.Module) -> None:
    """Let the patch embeddings compute one matrix product; parameters stay unchanged.

    Each patch is a row already, so a convolution whose stride is its kernel is such a product. As a
    convolution in bfloat16, it can take seconds on a GPU: cuDNN has no fast kernels for this one.
    """
    for module in model.modules():
        projection = getattr(module, "proj", None)
        if (
            isinstance(projection, nn.Conv3d)
            and projection.kernel_size == projection.stride
            and _embeds_patches_only(module)
        ):
            module.forward = types.MethodType(_embed_patches, module)


def _embed_patches(module: Any, patches: Tensor) -> Tensor:
    """Return [N, D] embeddings of [N, C T P P] patches by [D, C, T, P, P]; differentiable."""
    weight, bias = module.proj.weight, module.proj.bias
    return linear(patches.to(weight.dtype).flatten(1), weight.flatten(1), bias)


@torch.no_grad()
def _embeds_patches_only(module: nn.Module) -> bool:
    """Return whether `_embed_patches` gives a module's own numbers up to rounding."""
    probed: Any = copy.deepcopy(module).to("cpu", torch.float32)
    patches = torch.randn(2, probed.proj.weight[0].numel(), generator=torch.Generator().manual_seed(0))
    expected, actual = type(module).forward(probed, patches), _embed_patches(probed, patches)
    return expected.shape == actual.shape and torch.allclose(expected, actual, rtol=1e-4, atol=1e-5)
