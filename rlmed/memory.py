"""What a run will hold in memory, said before it starts; and how the C library shall treat it."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from rlmed.core.config import RunConfig
from rlmed.models.policy import Policy
from rlmed.models.products import linear_shapes, packed_bytes

GIB = 2**30


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes that are held for long; activations come on top, bounded by `learner.token_budget`."""

    weights: int
    reference: int
    optimizer: int
    """Both moments of AdamW, float32 master weights where the policy has fewer bits, and gradients."""
    kv_cache: int
    """Upper bound: every slot filled with the longest prompt and completion."""
    packed: int
    """Copies of weights while the native engine decodes on a CPU, see `rlmed.models.linear.PackedWeights`."""

    @property
    def total(self) -> int:
        """Everything above."""
        return self.weights + self.reference + self.optimizer + self.kv_cache + self.packed

    def line(self) -> str:
        """The figures in one line."""
        parts = {
            "weights": self.weights,
            "reference": self.reference,
            "optimizer and gradients": self.optimizer,
            "key-value cache at most": self.kv_cache,
            "packed weights": self.packed,
        }
        listed = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
        return f"memory in GiB: {self.total / GIB:.2f} ({listed}), and activations"


def engines_that_pack(config: RunConfig) -> int:
    """How many engines hold packed weights on one machine at a time: each worker's, or the one in the learner's process.

    There, evaluation has an engine of its own beside the one whose completions go on meanwhile (max_staleness above 0).
    """
    if config.cluster.kind == "ray":
        return config.cluster.rollout_workers
    return 2 if config.algo.max_staleness else 1


def estimate(policy: Policy, config: RunConfig) -> MemoryEstimate:
    """Count the bytes of a run in one process."""
    width = policy.dtype.itemsize
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in policy.model.parameters()]
    weights = width * sum(count for count, _ in counts)
    trained = sum(count for count, is_trained in counts if is_trained)
    layers, heads, head_width = policy.kv_shape
    rows, prompt = config.rollout.max_completions, config.data.max_prompt_tokens
    training = rows * config.rollout.max_tokens + max(1, rows // config.algo.group_size) * prompt
    evaluation = rows * (config.eval.max_tokens + prompt)  # each completion has a prompt of its own
    # on-policy, nothing is under way while it is evaluated
    tokens = training + evaluation if config.algo.max_staleness else max(training, evaluation)
    packs = policy.dtype == torch.float32 and "packed_weights" in (config.model.onednn or ())
    return MemoryEstimate(
        weights=weights,
        reference=weights if config.algo.kl_coef > 0 else 0,
        optimizer=trained * (8 + 4 + (4 if width < 4 else 0)),
        kv_cache=layers * 2 * heads * head_width * width * tokens,
        packed=packs * engines_that_pack(config) * packed_bytes(linear_shapes(policy.model.config)),
    )


def keep_freed_memory() -> bool:
    """Tell glibc to keep the memory of freed tensors for the next ones instead of giving it back to the system.

    Each step of a learner on a CPU allocates and frees the same tensors; by default their pages go back and have to be
    mapped and zeroed again, which took 4 to 7 % of a step (docs/lab-log.md). Tensors above 32 MiB, glibc's limit, still do.

    Returns:
        False where the C library has no such setting (macOS, musl).
    """
    trim_threshold, mmap_threshold = -1, -3  # names of malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(trim_threshold, 2**31 - 1) and mallopt(mmap_threshold, 32 * 2**20))
