"""Estimate a run's memory before it starts, and tune the C library's allocator."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from rlmed.core.config.running import ClusterConfig, RolloutConfig
from rlmed.core.config.schema import AlgoConfig
from rlmed.models.cpu.products import linear_shapes, packed_bytes
from rlmed.models.policy import Policy

GIB = 2**30


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Long-lived memory in bytes; activations, bounded by `learner.token_budget`, come on top."""

    weights: int
    reference: int
    optimizer: int
    """Both AdamW moments, gradients, and float32 master weights if the policy is less precise."""
    kv_cache: int
    """Upper bound: every slot filled with the longest prompt and completion."""
    pictures: int
    """Decoded images in memory, see `rlmed.data.images.kept_bytes`."""
    packed: int
    """Copies of weights for decoding on a CPU, see `rlmed.models.cpu.linear.PackedWeights`."""

    @property
    def total(self) -> int:
        """Sum of all fields."""
        return self.weights + self.reference + self.optimizer + self.kv_cache + self.pictures + self.packed

    def line(self) -> str:
        """Return the figures on one line."""
        parts = {
            "weights": self.weights,
            "reference": self.reference,
            "optimizer and gradients": self.optimizer,
            "key-value cache at most": self.kv_cache,
            "images": self.pictures,
            "packed weights": self.packed,
        }
        listed = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
        return f"memory in GiB: {self.total / GIB:.2f} ({listed}), and activations"


def engines_that_pack(cluster: ClusterConfig, *, max_staleness: int) -> int:
    """Return how many engines hold packed weights on a machine: one per worker, or the learner's.

    In the latter case, with max_staleness above 0, evaluation adds an engine beside the one that
    keeps sampling.
    """
    if cluster.kind == "ray":
        return cluster.rollout_workers
    return 2 if max_staleness else 1


def estimate(
    policy: Policy,
    rollout: RolloutConfig,
    algo: AlgoConfig,
    *,
    prompt_tokens: int,
    eval_tokens: int,
    packing_engines: int,
    pictures: int,
) -> MemoryEstimate:
    """Estimate the bytes of a run in one process.

    Args:
        policy: the one to train.
        rollout: sampling of training completions.
        algo: size of a group, staleness, and whether there is a reference.
        prompt_tokens: longest prompt.
        eval_tokens: longest completion in evaluation.
        packing_engines: engines that hold packed weights, if the policy is float32.
        pictures: bytes of decoded images.
    """
    width = policy.dtype.itemsize
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in policy.model.parameters()]
    weights = width * sum(count for count, _ in counts)
    trained = sum(count for count, is_trained in counts if is_trained)
    layers, heads, head_width = policy.kv_shape
    rows = rollout.max_completions
    training = rows * rollout.max_tokens + max(1, rows // algo.group_size) * prompt_tokens
    evaluation = rows * (eval_tokens + prompt_tokens)  # each completion has its own prompt
    # on-policy, nothing is in flight during evaluation
    tokens = training + evaluation if algo.max_staleness else max(training, evaluation)
    packs = packing_engines if policy.dtype == torch.float32 else 0
    return MemoryEstimate(
        weights=weights,
        reference=weights if algo.loss.kl_coef > 0 else 0,
        optimizer=trained * (8 + 4 + (4 if width < 4 else 0)),
        kv_cache=layers * 2 * heads * head_width * width * tokens,
        pictures=pictures,
        packed=packs * packed_bytes(linear_shapes(policy.model.config)),
    )


def keep_freed_memory() -> bool:
    """Make glibc keep the memory of freed tensors for reuse instead of returning it to the system.

    Each learner step on a CPU allocates and frees the same tensors; by default their pages are
    returned, then mapped and zeroed again, which took 4 to 7 % of a step (docs/lab-log.md). Tensors
    above 32 MiB, glibc's limit, still are.

    Returns:
        False if the C library lacks the setting (macOS, musl).
    """
    trim_threshold, mmap_threshold = -1, -3  # names of malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(trim_threshold, 2**31 - 1) and mallopt(mmap_threshold, 32 * 2**20))
