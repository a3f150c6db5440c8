"""Weights for the tiny model to start from: two attention heads that can already look something up.

What a small model trained from nothing finds hard is not the picture but which letter stands for an option that it
has just named: at "... is large" it must find " large" among the options and read the letter before it. That takes
two heads in a row, and neither is of use without the other, so gradient descent waits on a plateau for ten thousands
of samples. Started as below, about two thousand short samples are enough.

* Layer 0, head 0 looks at the previous token. Rotary embedding turns constant query and key vectors into a score that
  depends on the distance d alone, a * sum_j cos((d - 1) * theta_j), largest at d = 1. Its biases are those vectors.
* Layer 1, head 0 looks at earlier occurrences of the same token: query and key weights are the same random projection,
  on the slowly rotating dimensions, where distance matters little. Its biases give a score -a * sum_j cos(d * theta_j),
  which keeps it from looking at itself.

Starting attention from structure instead of noise is the idea of mimetic initialisation (arXiv 2305.09828); the two
heads are those of induction circuits (arXiv 2209.11895). Everything stays trainable. Residual branches start small, so
that what a token is isn't drowned before these heads have read it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import Qwen2VLForConditionalGeneration

PAIRS = 8
"""Fast rotating pairs of dimensions that carry distance."""
PREVIOUS_GAP = 4.0
"""How far the score of the previous token stands above its neighbours'."""
SELF_PENALTY = 6.0
"""How far the score of the token itself stands below that of distant ones."""
MATCH_SCALE = 1.5
"""Factor on the projections that compare tokens; the score of an equal token grows with its square."""
EMBEDDING_STD = 1 / 16
"""With 256 dimensions, tied logits then have a standard deviation of about 1."""
BRANCH_GAIN = 0.1
"""Of the last projection of each residual branch of the decoder, and of the vision tower's merger."""
VISION_BRANCH_GAIN = 0.3
"""Of the last projection of each residual branch of the vision tower."""


def initialise_for_lookup(model: Qwen2VLForConditionalGeneration) -> None:
    """Draw all weight matrices anew from torch's global random stream and set up the two heads."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=_std(name, parameter))
        config = model.config.get_text_config()
        width = config.hidden_size // config.num_attention_heads
        theta = float(config.rope_parameters["rope_theta"])
        frequencies = theta ** (-torch.arange(PAIRS, dtype=torch.float32) * 2 / width)
        layers = model.model.language_model.layers
        _look_at_previous_token(layers[0].self_attn, width, frequencies)
        _look_at_same_token(layers[1].self_attn, width)


def _std(name: str, weight: Tensor) -> float:
    """Standard deviation that keeps activations at unit scale, times the gain of the place."""
    if "embed_tokens" in name:
        return EMBEDDING_STD
    if name.endswith(("o_proj.weight", "down_proj.weight", "merger.mlp.2.weight")):
        gain = BRANCH_GAIN
    elif name.endswith(("attn.proj.weight", "mlp.fc2.weight")):
        gain = VISION_BRANCH_GAIN
    else:
        gain = 1.0
    return gain * weight.shape[1] ** -0.5


def _look_at_previous_token(attention: nn.Module, width: int, frequencies: Tensor) -> None:
    fast = torch.arange(PAIRS)
    # the score at distance d is scale * size**2 * sum_j cos((d - 1) * theta_j), with scale = width**-0.5
    size = math.sqrt(PREVIOUS_GAP * math.sqrt(width) / float((1 - frequencies.cos()).sum()))
    attention.q_proj.weight[:width] = 0
    attention.k_proj.weight[:width] *= 0.5
    attention.q_proj.bias[fast] = size
    # rotary embedding turns dimension j together with dimension j + width / 2
    attention.k_proj.bias[fast] = size * frequencies.cos()
    attention.k_proj.bias[fast + width // 2] = size * frequencies.sin()


def _look_at_same_token(attention: nn.Module, width: int) -> None:
    fast = torch.arange(PAIRS)
    slow = torch.arange(width // 4, width // 2)
    slow = torch.cat([slow, slow + width // 2])
    projection = torch.zeros_like(attention.k_proj.weight[:width])
    projection[slow] = MATCH_SCALE * attention.k_proj.weight[slow]
    attention.q_proj.weight[:width] = projection
    attention.k_proj.weight[:width] = projection
    size = math.sqrt(SELF_PENALTY * math.sqrt(width) / PAIRS)
    attention.q_proj.bias[fast] = -size
    attention.k_proj.bias[fast] = size
