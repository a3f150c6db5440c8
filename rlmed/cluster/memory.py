"""Estimate the memory of a run from its configuration alone, and tune the C library's allocator."""

from __future__ import annotations

import ctypes
import dataclasses
import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, fields

from transformers import PreTrainedConfig

from rlmed.core.config.running import ClusterConfig
from rlmed.core.config.schema import LearnerConfig, ModelConfig
from rlmed.models.cpu.products import linear_shapes, packed_bytes
from rlmed.models.families import PARTS
from rlmed.models.logprobs import CPU_BLOCK_BYTES, CPU_BYTES, CUDA_BYTES
from rlmed.models.policy import DTYPES
from rlmed.models.size import BlockSize, ModelSize

GIB = 2**30
PROCESS_BYTES = 200 * 2**20
"""What a process takes besides: buffers of libraries, and freed memory that the C library keeps."""
MOMENT_BYTES = {"float32": 8, "bfloat16": 4, "8bit": 2}
"""Both AdamW moments of a parameter by `learner.moments`; 8bit adds a scale per block, 1.6 %."""
LOGITS_AT_ONCE = 2
"""Tensors [M, V] that the head makes of few rows (`rlmed.models.logprobs`): two softmaxes."""
LOGITS_IN_BLOCKS = 3
"""Tensors as large as a block that it makes of many: logits, exponentials, converted weights."""
SAMPLED = 3
"""Float32 tensors [R, V] of a decoding step: logits, those of the temperature, probabilities."""
SORTED = 9
"""The same with top-k or top-p: those, sorted ones, int64 order, sums, differences, a mask."""
STEPPED = 4
"""Float32 copies of one parameter while rounded moments are updated: both, noise, its sum."""
NF4_BYTES = 0.52
"""Of a weight in 4 bits with its share of scales, which are quantized, too (arXiv 2305.14314)."""
WORKSPACE = 4
"""Tensors as wide as a block's widest layer alive at once, beside those kept for backward."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Largest optimizer step that the settings allow, as one process computes it.

    Example:
        >>> Batch(groups=4, group_size=4, prompt_tokens=1024, visual_tokens=512, max_tokens=512,
        ...       token_budget=16384).row()
        (4, 16)
    """

    groups: int
    group_size: int
    prompt_tokens: int
    visual_tokens: int
    """Of a prompt, each made of several patches."""
    max_tokens: int
    token_budget: int

    def row(self) -> tuple[int, int]:
        """Return (prompts, completions) of the largest micro-batch of `split_by_tokens`."""
        whole = self.prompt_tokens + self.group_size * self.fed
        if whole <= self.token_budget:
            prompts = min(self.groups, self.token_budget // whole)
            return prompts, prompts * self.group_size
        completions = self.group_size
        while completions > 1 and self.prompt_tokens + completions * self.fed > self.token_budget:
            completions = math.ceil(completions / 2)
        return 1, completions

    @property
    def fed(self) -> int:
        """Tokens of a completion that the model sees: not the last one."""
        return self.max_tokens - 1

    @property
    def tokens(self) -> int:
        """Tokens of the largest micro-batch."""
        prompts, completions = self.row()
        return prompts * self.prompt_tokens + completions * self.fed

    @property
    def several(self) -> bool:
        """Whether gradients of several micro-batches are added."""
        return self.row()[1] < self.groups * self.group_size


@dataclass(frozen=True, slots=True)
class Sampling:
    """Most that an engine samples at a time."""

    rows: int
    """Completions."""
    tokens: int
    """Their tokens and those of their prompts."""
    prefill_tokens: int
    """Prompt tokens computed at once."""
    filtered: bool
    """Whether top-k or top-p cut the distributions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """Bytes of one process at most."""

    weights: int = 0
    reference: int = 0
    optimizer: int = 0
    """AdamW moments, and float32 master weights if the policy has lower precision."""
    gradients: int = 0
    """Float32 gradients, and those in the policy's dtype before they are added up."""
    activations: int = 0
    """What a micro-batch keeps for its backward pass, its pixels included."""
    logits: int = 0
    """Logits computed at once, see `rlmed.models.logprobs`."""
    kv_cache: int = 0
    """Upper bound: every slot filled with the longest prompt and completion."""
    pictures: int = 0
    """Decoded images in memory, see `rlmed.data.images.kept_bytes`."""
    merged: int = 0
    """Weights of the engine in the learner's process that adapters are merged into."""
    packed: int = 0
    """Copies of weights for decoding on a CPU, see `rlmed.models.cpu.linear.PackedWeights`."""
    engine: int = 0
    """Bytes of the same device that belong to an engine in another process."""
    passing: int = 0
    """Largest sum of what comes and goes in a step: never all activations and all gradients."""

    @property
    def held(self) -> int:
        """Bytes between two steps."""
        passing = self.gradients + self.activations + self.logits
        return sum(self.parts().values()) - passing

    @property
    def peak(self) -> int:
        """Bytes at the fullest moment."""
        return self.held + self.passing

    def parts(self) -> dict[str, int]:
        """Return the terms by name, but for their largest sum."""
        names = {"kv_cache": "key-value cache", "pictures": "images", "packed": "packed weights"}
        names["merged"] = "merged weights"
        return {names.get(entry.name, entry.name): getattr(self, entry.name) for entry in fields(self)[:-1]}

    def line(self) -> str:
        """Return the figures on one line."""
        listed = ", ".join(f"{name} {size / GIB:.2f}" for name, size in self.parts().items() if size)
        return f"memory in GiB: about {self.peak / GIB:.2f} at most, {self.held / GIB:.2f} between steps ({listed})"


def engines_that_pack(cluster: ClusterConfig, *, max_staleness: int) -> int:
    """Return how many engines hold packed weights on a machine: one per worker, or the learner's.

    In the latter case, with max_staleness above 0, evaluation adds an engine beside the one that
    keeps sampling.
    """
    if cluster.kind == "ray":
        return cluster.rollout_workers
    return 2 if max_staleness else 1


def learner_memory(
    size: ModelSize,
    learner: LearnerConfig,
    batch: Batch,
    *,
    dtype: str,
    on_cpu: bool,
    reference: bool,
    checkpointing: bool,
    ranks: int = 1,
) -> MemoryEstimate:
    """Estimate the bytes of one learner rank.

    Per trained parameter: 4 of a float32 master (none where the policy is float32), 8 or fewer of
    moments, 4 of a float32 gradient, and the policy's own bytes of a micro-batch's gradient. FSDP2
    divides them by the ranks and adds the root unit and two layers in full. With 2.2e9 parameters
    in bfloat16 and a reference that is 35 GB between steps, and 49 GB when all gradients are there.

    Args:
        size: of the model.
        learner: frozen parts and dtype of the moments.
        batch: of this rank.
        dtype: of the policy, a key of `rlmed.models.policy.DTYPES`.
        on_cpu: float32 layers are fused and attention is dense there.
        reference: whether there is a frozen copy of the policy.
        checkpointing: whether activations are computed again in the backward pass.
        ranks: processes that shard the policy.
    """
    width, lora, decoder = DTYPES[dtype].itemsize, learner.lora, size.decoder
    trained = size.trained(learner.freeze) if lora.rank is None else size.adapters(lora.target, lora.rank)
    own = 4 + width if width < 4 else 4
    gradients, gathered = own * trained // ranks, 0
    if ranks > 1:
        root = size.parameters - decoder.depth * decoder.parameters
        gathered = width * (root + 2 * decoder.parameters)
        # in full, once more in float32 to be summed over the ranks
        gradients += (width + 4) * min(root, trained)
    logits = _logits(size, batch, width, on_cpu=on_cpu)
    # the vocabulary projection's gradient comes first; a tied embedding's is added to it at the end
    head = 0 if "language_model" in _frozen(learner) or lora.rank is not None else width * size.head
    activations = _activations(size, learner, batch, width, on_cpu=on_cpu, checkpointing=checkpointing)
    # as a backward pass goes on, activations leave and gradients come: the sum is largest at an end
    begin = activations + logits + head + (4 * trained // ranks if batch.several else 0)
    end = gradients + (head if size.tied else 0) + WORKSPACE * batch.tokens * decoder.widest * width
    largest = min(size.largest, trained)
    update = 4 * trained // ranks + (0 if learner.moments == "float32" else STEPPED * 4 * largest // ranks)
    return MemoryEstimate(
        weights=learner_weights(size, learner, width) // ranks + gathered,
        # adapters that are switched off leave the reference
        reference=width * size.parameters // ranks if reference and lora.rank is None else 0,
        optimizer=trained * (MOMENT_BYTES[learner.moments] + (4 if width < 4 else 0)) // ranks,
        gradients=gradients,
        activations=activations,
        logits=logits,
        passing=max(begin, end, update),
    )


def learner_weights(size: ModelSize, learner: LearnerConfig, width: int) -> int:
    """Return the bytes of the policy's weights and adapters, of `width` each."""
    lora = learner.lora
    if lora.rank is None:
        return width * size.parameters
    small = size.adapted(lora.target) if lora.quantize else 0
    return int(width * (size.parameters - small + size.adapters(lora.target, lora.rank)) + NF4_BYTES * small)


def merged_weights(size: ModelSize, learner: LearnerConfig, *, dtype: str) -> int:
    """Return the bytes of the weights that an engine in the learner's process has of its own."""
    lora = learner.lora
    return 0 if lora.rank is None or lora.quantize else DTYPES[dtype].itemsize * size.adapted(lora.target)


def _frozen(learner: LearnerConfig) -> Collection[str]:
    """Return the parts in which nothing is trained."""
    lora = learner.lora
    return learner.freeze if lora.rank is None else [part for part in PARTS if part not in lora.target]


def _of_adapters(block: BlockSize, learner: LearnerConfig, part: str, width: int) -> int:
    """Return the bytes per token that a block's adapters keep: A x, and what dropout has left."""
    lora = learner.lora
    if lora.rank is None or part not in lora.target:
        return 0
    return width * lora.rank * block.linears + ((width + 1) * block.inputs if lora.dropout else 0)


def _logits(size: ModelSize, batch: Batch, width: int, *, on_cpu: bool) -> int:
    """Return the bytes of the logits that are there at once, see `rlmed.models.logprobs`."""
    needed = 4 * size.vocabulary * batch.row()[1] * batch.max_tokens
    most, block = (CPU_BYTES, CPU_BLOCK_BYTES) if on_cpu else (CUDA_BYTES, CUDA_BYTES)
    at_once = needed <= most and not (on_cpu and width < 4)
    return LOGITS_AT_ONCE * needed if at_once else LOGITS_IN_BLOCKS * min(block, needed)


def _activations(
    size: ModelSize, learner: LearnerConfig, batch: Batch, width: int, *, on_cpu: bool, checkpointing: bool
) -> int:
    """Return the bytes that the forward pass of the largest micro-batch keeps.

    Autograd keeps inputs and outputs of linear layers, each once (`BlockSize.linear_values`). Fused
    layers (`rlmed.models.cpu.fused`) keep nothing else; others keep a float32 copy of what a norm
    reads and the activation of the gate. Dense attention keeps gathered keys and values, its output
    and its mask.
    """
    decoder, tokens = size.decoder, batch.tokens
    prompts, completions = batch.row()
    fused = on_cpu and width == 4
    layer = tokens * (width * decoder.linear_values + (0 if fused else 8 * decoder.hidden + width * decoder.widest))
    layer += tokens * _of_adapters(decoder, learner, "language_model", width)
    if on_cpu:
        visible = batch.prompt_tokens + batch.fed
        gathered = prompts * batch.prompt_tokens + completions * visible - (tokens if width == 4 else 0)
        queries = tokens * decoder.query_values * (1 if width == 4 else 2)
        layer += 4 * (gathered * decoder.key_values + queries + completions * batch.fed * visible)
    ends = tokens * decoder.hidden * (4 * width + (0 if fused else 4))
    kept = decoder.depth * tokens * decoder.hidden * width + layer if checkpointing else decoder.depth * layer
    return (
        kept
        + ends
        + _vision_activations(size, learner, prompts * batch.visual_tokens, width, checkpointing=checkpointing)
    )


def _vision_activations(
    size: ModelSize, learner: LearnerConfig, visual_tokens: int, width: int, *, checkpointing: bool
) -> int:
    """Return the bytes that the vision tower keeps: pixels, a block's values if it is trained."""
    if size.vision is None:
        return 0
    tower, patches = size.vision, visual_tokens * size.patches_per_token
    pixels = patches * size.patch_values * (4 if width == 4 else 4 + width)
    # beside the linear layers: rotated queries and keys, the attention's output, the activation
    block = patches * width * (tower.linear_values + 3 * tower.hidden + tower.widest)
    block += patches * _of_adapters(tower, learner, "vision", width)
    if "vision" in _frozen(learner):
        return pixels + WORKSPACE * patches * tower.widest * width
    if checkpointing:
        return pixels + tower.depth * patches * tower.hidden * width + block
    return pixels + tower.depth * block


def engine_memory(size: ModelSize, sampling: Sampling, *, dtype: str, packed: int = 0) -> MemoryEstimate:
    """Estimate what a native engine adds to the weights that it samples with.

    Args:
        size: of the model.
        sampling: the most that it does.
        dtype: of the policy.
        packed: bytes of packed weights.
    """
    width = DTYPES[dtype].itemsize
    patch_bytes = 4 * size.patches_per_token * size.patch_values if size.vision else 0
    prefill = sampling.prefill_tokens * (WORKSPACE * size.decoder.widest * width + patch_bytes)
    logits = 4 * sampling.rows * size.vocabulary
    return MemoryEstimate(
        kv_cache=size.decoder.depth * size.decoder.key_values * width * sampling.tokens,
        packed=packed,
        passing=max(prefill, logits * (SORTED if sampling.filtered else SAMPLED)),
    )


def together(learner: MemoryEstimate, engine: MemoryEstimate, pictures: int) -> MemoryEstimate:
    """Return the sum in a process that learns and samples in turn; `pictures`: decoded images."""
    return dataclasses.replace(
        learner,
        kv_cache=engine.kv_cache,
        packed=engine.packed,
        pictures=pictures,
        passing=max(learner.passing, engine.passing),
    )


def added(estimates: Iterable[MemoryEstimate]) -> MemoryEstimate:
    """Return the sum over processes on one machine, which may all be at their fullest at once."""
    listed = list(estimates)
    return MemoryEstimate(
        **{entry.name: sum(getattr(one, entry.name) for one in listed) for entry in fields(MemoryEstimate)}
    )


def packed_weights(config: PreTrainedConfig, model: ModelConfig, *, dtype: str, engines: int) -> int:
    """Return the bytes of the packed weights of `engines`, of a settled `model`."""
    packed = model.compiled_decode or "packed_weights" in (model.onednn or ())
    packs = engines if dtype == "float32" and packed else 0
    return packs * packed_bytes(linear_shapes(config))


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
