"""Whether decode steps run in kernels (Triton's on CUDA, compiled C++ on a CPU): only if they
compute what the model's modules do.

The layer is compared with transformers' modules on the loaded weights, the sampler with the
definition; each is used or not by itself.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rlmed.models.attention import PackedLayout
from rlmed.models.cpu.compiled_decoder import CompiledDecoder, CompiledProjection
from rlmed.models.cpu.compiled_decoder import sample as compiled_sample
from rlmed.models.cpu.compiler import missing_library
from rlmed.models.decoder import Decoder, LayersLayout, probe_copy

log = logging.getLogger(__name__)

Sample = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""See `rlmed.models.kernels.sampling.sample`."""

GROUPS = ((70, (3, 1, 9)), (5, (2,)))
"""Prompt and completion lengths of the probe: ragged, a first token, a group of one."""
KEY_LINE = 32
"""Tokens whose keys are transposed together for compiled kernels; `LINE` of `cpu/decode.cpp`."""
PAGE_TOKENS = 32
SCALES = (1e-3, 1.0, 30.0)
"""Of the probe's hidden states: with the smallest a norm's epsilon counts, if it is the usual
1e-6.
"""
FLOOR = 1e-5
"""Error, relative to a row's largest number, that float32 sums in another order may have."""
COMPILED = "compiled"
SAMPLER_ERROR = 1e-5
"""Of log-probabilities around 10: some ten float32 roundings."""


@dataclass(frozen=True, slots=True)
class StepPages:
    """Keys and values of a step's R rows, members of B groups; tables and lengths are int32."""

    prefix: tuple[Sequence[Tensor], Sequence[Tensor]]
    """Keys and values of prompts by layer, each [pages, H_kv, page size, D].

    Compiled kernels' keys are transposed, see `DecodeKernels.compiled`.
    """
    suffix: tuple[Sequence[Tensor], Sequence[Tensor]]
    """The same of completions."""
    prefix_pages: Tensor
    """[B, n]."""
    prefix_lengths: Tensor
    """[B], 0 for a free group."""
    members: Tensor
    """[B, M] rows; -1 where there are fewer."""
    suffix_pages: Tensor
    """[R, m]."""
    counts: Tensor
    """[R] tokens of the completions; the last is the step's input, and not in its page yet."""
    widths: tuple[int, int]
    """Most tokens of a prompt and of a completion."""


class StepDecoder(Protocol):
    """Computes what an accepted `Decoder` does, for decode steps; reads the same parameters."""

    def lay_out(self, pages: StepPages) -> Step:
        """Return the step of rows in these pages."""
        ...


class PromptDecoder(Protocol):
    """Computes prompts, too."""

    def lay_out_prompts(self, pages: StepPages) -> LayersLayout:
        """See `rlmed.models.cpu.compiled_decoder.CompiledDecoder.lay_out_prompts`."""
        ...


class Step(Protocol):
    """Forward pass over one token of each row."""

    def __call__(self, embeddings: Tensor, positions: Tensor) -> Tensor:
        """Append the rows' keys and values to their pages; return final hidden states [R, d].

        Args:
            embeddings: [R, d], contiguous; overwritten.
            positions: int64 [3, R] or [1, R].
        """
        ...


@dataclass(frozen=True, slots=True)
class DecodeKernels:
    """What decode steps use of kernels: Triton's on CUDA, compiled C++ on a CPU."""

    name: str = ""
    decoder: StepDecoder | None = None
    sample: Sample | None = None
    project: Callable[[Tensor], Tensor] | None = None
    """Logits of hidden states; None: `Policy.logits`."""
    prompts: PromptDecoder | None = None
    """Computes prompts; None: `Policy.hidden` by its modules."""
    reason: str = ""
    """Why not all of them."""

    @property
    def compiled(self) -> bool:
        """Whether the layers are compiled C++.

        They read keys as [pages, H_kv, page size / KEY_LINE, D, KEY_LINE], and what their `lay_out`
        returns stays right while the tables of its pages do; their `counts` may change.
        """
        return self.name == COMPILED and self.decoder is not None

    def __str__(self) -> str:
        """Name the path and, where it is not all kernels, why."""
        used = [name for name, part in (("layers", self.decoder), ("sampler", self.sample)) if part is not None]
        if len(used) == 2:
            return f"{self.name} kernels"
        return (
            f"{self.name} {used[0]}, else torch operators ({self.reason})"
            if used
            else f"torch operators ({self.reason})"
        )


@dataclass(frozen=True, slots=True)
class KernelKind:
    """One implementation of the kernels."""

    name: str
    decoder: Callable[[Decoder], StepDecoder]
    sample: Sample

    @property
    def compiled(self) -> bool:
        """See `DecodeKernels.compiled`."""
        return self.name == COMPILED


def choose_kernels(
    modules: Any,
    own: Decoder | None,
    projection: nn.Linear,
    banned: Tensor,
    *,
    position_rows: int,
    compiled: bool = True,
) -> DecodeKernels:
    """Return the kernels that a loaded model's decode steps can use.

    Args:
        modules: transformers' decoder.
        own: ours, see `accept_decoder`; without it no kernel computes the layers.
        projection: vocabulary projection [V, d].
        banned: int64, unsampleable tokens.
        position_rows: 3 for M-RoPE, else 1.
        compiled: on a CPU, whether compiled C++ may be used.
    """
    device, dtype = modules.norm.weight.device, modules.norm.weight.dtype
    try:
        on_cpu = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1"
        kind = _compiled(dtype, compiled) if on_cpu else _triton(device)
    except _NoKernelsError as error:
        return DecodeKernels(reason=str(error))
    decoder, reason = None, "the layers have other parts than the kernels compute"
    if own is not None:
        reason = _refusal(lambda: probe_layers(modules, position_rows, kind))
        decoder = None if reason else kind.decoder(own)
    no_sampler = _refusal(lambda: probe_sampler(kind.sample, projection.out_features, device))
    reasons = [text for text in (reason, no_sampler) if text]
    chosen = DecodeKernels(
        kind.name,
        decoder,
        None if no_sampler else kind.sample,
        CompiledProjection(projection, banned) if kind.compiled and not reason else None,
        decoder if isinstance(decoder, CompiledDecoder) else None,
        "; ".join(reasons),
    )
    log.info("decode steps run %s", chosen)
    return chosen


class _NoKernelsError(Exception):
    """There are none here; the message says why."""


def _compiled(dtype: torch.dtype, wanted: bool) -> KernelKind:
    if not wanted:
        raise _NoKernelsError("model.compiled_decode is false")
    if dtype != torch.float32:
        raise _NoKernelsError(f"compiled kernels compute float32, and the model is {str(dtype).removeprefix('torch.')}")
    if reason := missing_library():
        raise _NoKernelsError(reason)
    return KernelKind(COMPILED, CompiledDecoder, compiled_sample)


def _triton(device: torch.device) -> KernelKind:
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        # Triton launches there, whatever its arguments' device
        raise _NoKernelsError(f"the model is on {device}, which is not the current device")
    if importlib.util.find_spec("triton") is None:
        raise _NoKernelsError("triton is not installed")
    from rlmed.models.kernels.decoder import KernelDecoder
    from rlmed.models.kernels.sampling import sample

    return KernelKind("Triton", KernelDecoder, sample)


def _refusal(probe: Callable[[], str]) -> str:
    """Return why a probe refuses; a kernel that cannot be compiled or launched is a reason, too."""
    triton: Any = sys.modules.get("triton.errors")
    expected: list[type[Exception]] = [RuntimeError, ValueError, OSError, subprocess.CalledProcessError]
    try:
        return probe()
    except tuple(expected if triton is None else [*expected, triton.TritonError]) as error:
        return f"a kernel failed: {(str(error).splitlines() or [type(error).__name__])[0]}"


@torch.inference_mode()
def probe_layers(
    modules: Any,
    position_rows: int,
    kind: KernelKind,
    build: Callable[[Any], Decoder] = Decoder,
) -> str:
    """Compare first and last layer with transformers' modules; return what differs, "" if nothing.

    Both run on the model's own weights in its own dtype, and both round as often. So the kernels'
    error against the modules in float32 may be twice that of the modules, for the largest errors of
    two such runs differ by less; another epsilon or activation costs many times that.

    Args:
        modules: transformers' decoder.
        position_rows: 3 for M-RoPE, else 1.
        kind: of the kernels.
        build: makes our decoder of one of transformers'.
    """
    for layer in {id(layer): layer for layer in (modules.layers[0], modules.layers[-1])}.values():
        own, error = _layer_errors(modules, layer, position_rows, kind, build)
        # written so that a NaN refuses
        if not error <= 2 * own + FLOOR:
            return f"a probe of layer {layer.self_attn.layer_idx} is off by {error:.1g}, transformers by {own:.1g}"
    return ""


def _layer_errors(
    modules: Any, layer: nn.Module, position_rows: int, kind: KernelKind, build: Callable[[Any], Decoder]
) -> tuple[float, float]:
    """Return the errors of transformers' modules and of the kernels, both with one layer only."""
    weight = modules.norm.weight
    packed = PackedLayout.build(GROUPS, weight.device)
    tokens = len(packed.gather_back)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(tokens, len(weight), generator=generator)
    states *= torch.tensor(SCALES).repeat(tokens)[:tokens, None]
    states = states.to(weight.device, weight.dtype)
    positions = torch.randint(0, 50, (position_rows, tokens), generator=generator).to(weight.device)
    recorder = _Recorder(packed)
    probed = probe_copy(modules, [layer], modules.norm)
    found = _run_modules(probed, states, positions, recorder)
    last = _newest_tokens()
    pages = _pages(recorder, int(layer.self_attn.layer_idx), kind)  # type: ignore[union-attr, arg-type]
    actual = kind.decoder(build(probed)).lay_out(pages)(states[last].contiguous(), positions[:, last])
    exact_modules = probe_copy(modules, [copy.deepcopy(layer).float()], copy.deepcopy(modules.norm).float())
    exact = _run_modules(exact_modules, states.float(), positions, packed)[last]
    size = exact.abs().amax(dim=1, keepdim=True)
    own, error = (float(((x.float() - exact) / size).abs().max()) for x in (found[last], actual))
    return own, error


def _run_modules(modules: Any, states: Tensor, positions: Tensor, layout: Any) -> Tensor:
    """Return [N, d] of transformers' own forward pass, whatever `accept_decoder` put in place."""
    output = type(modules).forward(
        modules,
        inputs_embeds=states.unsqueeze(0),
        position_ids=positions.unsqueeze(1) if len(positions) > 1 else positions,
        use_cache=False,
        layout=layout,
    )
    result: Tensor = output.last_hidden_state[0]
    return result


class _Recorder:
    """A layout that keeps keys and values [N, H_kv, D] of the last layer that attended."""

    def __init__(self, packed: PackedLayout) -> None:
        self._packed = packed
        self.key, self.value = torch.empty(0), torch.empty(0)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None = None
    ) -> Tensor:
        self.key, self.value = key, value
        return self._packed.attend(layer, query, key, value, scale, window)


def _spans() -> tuple[list[slice], list[slice]]:
    """Return where the probe's prompts and completions are in its row."""
    prompts, completions, at = [], [], 0
    for prompt, lengths in GROUPS:
        prompts.append(slice(at, at + prompt))
        at += prompt
        for length in lengths:
            completions.append(slice(at, at + length))
            at += length
    return prompts, completions


def _newest_tokens() -> list[int]:
    return [span.stop - 1 for span in _spans()[1]]


def _pages(recorded: _Recorder, layer: int, kind: KernelKind) -> StepPages:
    """Lay the probe's keys and values out in pages, those of the newest tokens left out."""
    prompts, completions = _spans()
    device = recorded.key.device
    cached = [slice(span.start, span.stop - 1) for span in completions]
    prefix_keys, prefix_pages = _paged(recorded.key, prompts)
    suffix_keys, suffix_pages = _paged(recorded.key, cached)
    most = max(len(lengths) for _, lengths in GROUPS)
    members, row = [], 0
    for _, lengths in GROUPS:
        members.append([*range(row, row + len(lengths)), *[-1] * (most - len(lengths))])
        row += len(lengths)

    def table(values: list[Any]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    def of_layers(pages: Tensor) -> list[Tensor]:
        return [pages] * (layer + 1)  # the layer finds them at its own index

    def keys(pages: Tensor) -> list[Tensor]:
        return of_layers(pages.unflatten(2, (-1, KEY_LINE)).transpose(3, 4).contiguous() if kind.compiled else pages)

    return StepPages(
        prefix=(keys(prefix_keys), of_layers(_paged(recorded.value, prompts)[0])),
        suffix=(keys(suffix_keys), of_layers(_paged(recorded.value, cached)[0])),
        prefix_pages=prefix_pages,
        prefix_lengths=table([span.stop - span.start for span in prompts]),
        members=table(members),
        suffix_pages=suffix_pages,
        counts=table([span.stop - span.start for span in completions]),
        widths=(max(prompt for prompt, _ in GROUPS), max(max(lengths) for _, lengths in GROUPS)),
    )


def _paged(row: Tensor, spans: list[slice]) -> tuple[Tensor, Tensor]:
    """Cut [N, H_kv, D] into pages [pages, H_kv, page size, D], last first; also return their table.

    Every sequence has room for one token more.
    """
    most = max(span.stop - span.start for span in spans) // PAGE_TOKENS + 1
    padded = row.new_zeros(len(spans), most * PAGE_TOKENS, *row.shape[1:])
    for place, span in enumerate(spans):
        padded[place, : span.stop - span.start] = row[span]
    pages = padded.view(-1, PAGE_TOKENS, *row.shape[1:]).transpose(1, 2).flip(0).contiguous()
    table = torch.arange(len(pages) - 1, -1, -1, dtype=torch.int32, device=row.device)
    return pages, table.view(len(spans), most)


@torch.inference_mode()
def probe_sampler(sample: Sample, vocabulary: int, device: torch.device) -> str:
    """Compare the sampler with the definition in float64; return what differs, "" if nothing.

    Each row's random number is the middle of a likely token's interval, where no rounding can move
    it to a neighbour. Half of the rows are greedy.
    """
    rows = 8
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, vocabulary, generator=generator) * 4
    logits[:, 1] = float("-inf")
    temperature = torch.tensor([1.0, 0.7]).repeat(rows // 2)
    greedy = torch.arange(rows) >= rows // 2
    exact = (logits.double() / temperature.double().unsqueeze(1)).log_softmax(1)
    likely = exact.topk(min(rows, vocabulary - 1), dim=1).indices
    expected = likely.gather(1, (torch.arange(rows) % likely.shape[1]).unsqueeze(1))
    ends = exact.exp().cumsum(1).gather(1, expected)
    uniform = (ends - exact.gather(1, expected).exp() / 2).squeeze(1)
    expected = torch.where(greedy.unsqueeze(1), exact.argmax(1, keepdim=True), expected)
    tokens, logprobs = sample(*(tensor.to(device) for tensor in (logits, uniform, temperature, greedy)))
    if not torch.equal(tokens.cpu(), expected.squeeze(1)):
        return "a probe of the sampler draws other tokens"
    difference = float((logprobs.cpu() - exact.gather(1, expected).squeeze(1)).abs().max())
    return "" if difference <= SAMPLER_ERROR else f"a probe of the sampler differs by {difference:.1g}"
