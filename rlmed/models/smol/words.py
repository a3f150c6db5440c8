"""Teach a vision tower a language model's words, without running the language model.

A language model reads embeddings, and what it can read without any training are the embeddings of
its own words. So each visual token learns to be one: the picture's description, one word a token,
row by row. Only tower and merger run, at a thousandth of the language model's cost, and the frozen
language model then finds the description where the picture stands. Fine-tuning through the language
model (`rlmed.sft`) goes on from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

SHARPNESS = 8.0
"""Squared distance, in units of a word's mean squared length, that makes a word e times less likely
is one over this."""


def teach_words(
    model: Any,
    batch: Callable[[int], tuple[Tensor, Tensor, Tensor]],
    steps: int,
    *,
    words: Sequence[int],
    lr: float,
    on_step: Callable[[int, float, float], None],
) -> None:
    """Train tower and merger in place, so that visual tokens are the embeddings of words.

    Args:
        model: a Qwen2-VL; its language model is only read.
        batch: from the step (from 0), pixel values [P, D], grids [B, 3], and words [B, V], one for
            each of a picture's V visual tokens.
        steps: of AdamW, on a cosine schedule with warm-up.
        words: token ids of all words that occur.
        lr: peak learning rate.
        on_step: called with step, loss and share of visual tokens nearest to their word.
    """
    visual = model.model.visual
    names = torch.tensor(sorted(set(words)))
    table = model.get_input_embeddings().weight.detach()[names].float()
    length = table.square().sum(-1)
    parameters = [*visual.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = max(1, steps // 20)
    for step in range(steps):
        pixels, grids, spoken = batch(step)
        rate = min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = lr * rate
        written = visual(pixels, grid_thw=grids).pooler_output
        target = torch.searchsorted(names, spoken.reshape(-1))
        distance = written.square().sum(-1, keepdim=True) - 2 * written @ table.T + length
        logits = -SHARPNESS * distance / length.mean()
        missed = distance.gather(1, target[:, None]).mean() / length.mean()
        loss = F.cross_entropy(logits, target) + missed
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        on_step(step, loss.item(), float((logits.argmax(-1) == target).float().mean()))
