"""How far two right ways of computing a number may be apart.

A tolerance of a test comes from here, or says its own reason.

Processors differ in the order in which they add (width of the registers, fused multiply-add, number
of threads), and so do MKL, oneDNN and torch's own kernels. None of them is wrong, and none is the
measure of the others.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from learner.optimizer import Optimizer
from learner.packing import PackItem, TrainSequence, pack
from rlmed.core.types import Completion, RolloutGroup
from rlmed.models.policy import Policy
from rollout.native.sampler import BatchSampling, completion_seeds, uniforms

LOGPROBS = 1e-4
"""Between two float32 log-probabilities at temperature 1; see `numerics/test_rounding.py`."""
GRADIENTS = 1e-4
"""The same between two gradients of a parameter, relative to its largest entry; derived there."""
NEARLY_CANCELLING = {"llava_onevision": 1.5e-3, "gemma3": 1.5e-3}
"""The same for families with a SigLIP tower, of whose gradients little is left in the sum.

That of LLaVA-OneVision is derived, too; in float64 transformers' padded rows of Gemma 3 are NaN.
"""
LARGEST_WEIGHT = 2.0
"""Of the test models; the largest are the norms', around 1."""
ADAM_EPS = 0.1
"""About the size of a clipped gradient; see `smooth_updates`."""


def rounding(operations: float, magnitude: float = 1.0, dtype: torch.dtype = torch.float32) -> float:
    """How far apart two results of so many roundings may be.

    Each is off by operations · eps/2 · magnitude at most.

    A sum of n products, in whatever order, takes n operations; its magnitude is the sum of the
    products' absolute values (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section
    3.1). A chain of elementary functions takes a few for each of them, and its magnitude is the
    largest value on the way.
    """
    return operations * torch.finfo(dtype).eps * magnitude


def gradient_bound(family: str) -> float:
    """How far apart two gradients of a parameter may be, relative to its largest entry."""
    return NEARLY_CANCELLING.get(family, GRADIENTS)


def smooth_updates(optimizer: Optimizer) -> None:
    """Let weights after an update be compared: call before the first step.

    AdamW's first steps are signs, so a gradient that is nothing but rounding moves its weight by
    lr. With a large eps the update is a smooth function of the gradient, and `updates_apart` bounds
    what rounding does to it.
    """
    for group in optimizer._adamw.param_groups:
        group["eps"] = ADAM_EPS


def updates_apart(lr: float, updates: int) -> float:
    """How far apart a weight may be after so many smooth updates.

    It is 0.2 % of what the weight can have moved, and what storing adds.

    An update is lr · m / (√v + eps), where m and √v are off by no more than the gradients that they
    are means of: by GRADIENTS · 1, as clipping leaves no entry above 1. So it is off by 2 · lr ·
    GRADIENTS / eps; and each new weight is rounded to float32. Gradients of later updates are also
    off because the weights are: `numerics/test_rounding.py` follows that through 8 updates, and all
    of it together is a small part of the bound.
    """
    return 2 * lr * updates * GRADIENTS / ADAM_EPS + rounding(updates, LARGEST_WEIGHT)


def worst_difference(
    expected: Sequence[RolloutGroup], actual: Sequence[RolloutGroup], policy: Policy | None = None
) -> float:
    """Largest log-probability difference of two rollouts whose tokens match but for rounding.

    A draw on the very edge between two tokens, or two tokens that are equally likely, may be
    decided either way. Such a completion is compared up to there. With a policy each of them must
    lie on such an edge; without one, two are a fault.

    Args:
        expected: groups of the native engine, where `policy` is given.
        actual: groups of the same requests.
        policy: with the weights that sampled; it is asked how near the edge was. None where nobody
            can tell (vLLM's draws).
    """
    worst, undecided = 0.0, 0
    for group, other_group in zip(expected, actual, strict=True):
        for number, (one, other) in enumerate(zip(group.completions, other_group.completions, strict=True)):
            same = first_difference(one, other)
            if same is not None:
                where = f"group {group.request.index}, completion {number}, token {same}"
                if policy is not None:
                    distance = distance_from_edge(policy, group, number, same, int(other.token_ids[same]))
                    assert distance < LOGPROBS, f"{where}: {distance} from an edge"
                undecided += policy is None
                assert undecided <= 1, f"{where}: a second completion that differs"
            else:
                assert (one.finish_reason, one.text) == (other.finish_reason, other.text)
            difference = np.abs(one.rollout_logprobs[:same] - other.rollout_logprobs[:same])
            worst = max(worst, float(difference.max(initial=0)))
    return worst


def first_difference(one: Completion, other: Completion) -> int | None:
    """Index of the first token that differs; None when all are the same."""
    pairs = zip(one.token_ids.tolist(), other.token_ids.tolist(), strict=False)
    index = next((index for index, (own, others) in enumerate(pairs) if own != others), None)
    assert index is not None or len(one.token_ids) == len(other.token_ids), (
        "one completion goes on where the other ends"
    )
    return index


@torch.no_grad()
def distance_from_edge(policy: Policy, group: RolloutGroup, number: int, step: int, other_token: int) -> float:
    """How far off the log-probabilities must be for the native engine to draw `other_token` here.

    A token is drawn where the cumulative sum passes a uniform number; log-probabilities that are
    off by d move no sum by more.
    """
    completion, sampling = group.completions[number], group.request.sampling
    cut = Completion(completion.token_ids[: step + 1], completion.rollout_logprobs[: step + 1], "", "length")
    batch = pack([PackItem(group.prompt, (TrainSequence(cut, 1.0),))], policy)
    hidden = policy.hidden(batch.token_ids, batch.positions, batch.layout, batch.image_inputs)
    logits = policy.logits(hidden[batch.predictors[-1:]])
    if sampling.greedy:
        logprobs = logits.log_softmax(1)[0]
        return float((logprobs[completion.token_ids[step]] - logprobs[other_token]).abs()) / 2
    seed = completion_seeds(sampling.seed, group.request.group_size)[number]
    rows = BatchSampling.build([sampling], logits.shape[1], logits.device)
    probabilities = rows._filter(logits / sampling.temperature).softmax(1)[0].double()
    upper = float(probabilities[: other_token + 1].sum())
    lower, uniform = upper - float(probabilities[other_token]), float(uniforms(seed, torch.tensor(step)))
    edges = [max(lower - uniform, uniform - upper, 0.0)]
    ranked = (logits / sampling.temperature).log_softmax(1)[0].sort(descending=True).values.double()
    if sampling.top_k:
        edges.append(float(ranked[sampling.top_k - 1] - ranked[sampling.top_k]) / 2)
        ranked = ranked[: sampling.top_k].log_softmax(0)
    if sampling.top_p < 1:
        edges.append(float((ranked.exp().cumsum(0) - sampling.top_p).abs().min()))
    return min(edges) * min(1.0, sampling.temperature)
