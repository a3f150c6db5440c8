"""Initial weights for the tiny model, with two attention heads that can already look something up.

The hard part for a small model trained from scratch is not the image but the letter of an option it
has just named: at "... is large" it must find " large" among the options and read the letter before
it. That takes two heads in sequence, and neither helps without the other, so gradient descent sits
on a plateau for tens of thousands of samples. With the initialisation below, about two thousand
short samples suffice.

* Layer 0, head 0 attends to the previous token. Rotary embedding turns constant query and key
  vectors into a score that depends only on the distance d, a * sum_j cos((d - 1) * theta_j),
  largest at d = 1. Its biases are those vectors.
* Layer 1, head 0 attends to earlier occurrences of the same token: query and key weights are the
  same random projection, on the slowly rotating dimensions, where distance matters little. Its
  biases give a score -a * sum_j cos(d * theta_j), which keeps it from attending to itself.

Initialising attention with structure instead of noise is mimetic initialisation (arXiv 2305.09828);
the two heads are those of induction circuits (arXiv 2209.11895). Everything stays trainable.
Residual branches start small, so that they don't drown a token's identity before these heads have
read it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import Qwen2VLForConditionalGeneration

PAIRS = 8
"""Fast rotating pairs of dimensions that encode distance."""
PREVIOUS_GAP = 4.0
"""Margin of the previous token's score over its neighbours'."""
SELF_PENALTY = 6.0
"""Margin of distant tokens' scores over the token's own."""
MATCH_SCALE = 1.5
"""Factor on the projections that compare tokens; an equal token's score grows by its square."""
EMBEDDING_STD = 1 / 16
"""With 256 dimensions, tied logits then have a standard deviation of about 1."""
BRANCH_GAIN = 0.1
"""Gain of the last projection in each decoder residual branch, and in the vision tower's merger."""
VISION_BRANCH_GAIN = 0.3
"""Gain of the last projection in each residual branch of the vision tower."""


def initialise_for_lookup(model: Qwen2VLForConditionalGeneration) -> None:
    """Redraw all weight matrices from torch's global random stream and set up the two heads."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=_std(name, parameter))
        config = model.config.get_text_config()
        width = config.hidden_size // config.num_attention_heads
        theta = float(config.rope_parameters["rope_theta"])
        frequencies = theta ** (-torch.arange(PAIRS, dtype=torch.float32) * 2 / width)
        layers = model.model.language_model.layers
        first, second = layers[0].self_attn, layers[1].self_attn
        _look_at_previous_token(first.q_proj, first.k_proj, width, frequencies)
        _look_at_same_token(second.q_proj, second.k_proj, width)


def _std(name: str, weight: Tensor) -> float:
    """Return the standard deviation that keeps activations at unit scale, times the gain."""
    if "embed_tokens" in name:
        return EMBEDDING_STD
    if name.endswith(("o_proj.weight", "down_proj.weight", "merger.mlp.2.weight")):
        gain = BRANCH_GAIN
    elif name.endswith(("attn.proj.weight", "mlp.fc2.weight")):
        gain = VISION_BRANCH_GAIN
    else:
        gain = 1.0
    return float(gain * weight.shape[1] ** -0.5)


def _look_at_previous_token(query: nn.Linear, key: nn.Linear, width: int, frequencies: Tensor) -> None:
    fast = torch.arange(PAIRS)
    # the score at distance d is scale * size**2 * sum_j cos((d - 1) * theta_j), with scale =
    # width**-0.5
    size = math.sqrt(PREVIOUS_GAP * math.sqrt(width) / float((1 - frequencies.cos()).sum()))
    query.weight[:width] = 0
    key.weight[:width] *= 0.5
    query.bias[fast] = size
    # rotary embedding turns dimension j together with dimension j + width / 2
    key.bias[fast] = size * frequencies.cos()
    key.bias[fast + width // 2] = size * frequencies.sin()


def _look_at_same_token(query: nn.Linear, key: nn.Linear, width: int) -> None:
    fast = torch.arange(PAIRS)
    slow = torch.arange(width // 4, width // 2)
    slow = torch.cat([slow, slow + width // 2])
    projection = torch.zeros_like(key.weight[:width])
    projection[slow] = MATCH_SCALE * key.weight[slow]
    query.weight[:width] = projection
    key.weight[:width] = projection
    size = math.sqrt(SELF_PENALTY * math.sqrt(width) / PAIRS)
    query.bias[fast] = -size
    key.bias[fast] = size
