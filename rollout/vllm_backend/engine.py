"""vLLM rollout engine: the core runs in this process on the learner's token ids and pixels.

Nothing that vLLM caches survives a push. While completions run, vLLM refuses its own cache resets
or becomes inconsistent, so each version of the weights gets its own cache keys (see
`rollout.vllm_backend.requests.engine_input`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig

from rlmed.core.prefill import joined
from rlmed.core.types import Prompt, RolloutGroup, RolloutRequest
from rlmed.core.weights import WeightError
from rlmed.models.families import family_of, unsampleable_token_ids
from rlmed.models.folder.end_tokens import find_end_tokens
from rlmed.models.policy import load_config
from rlmed.models.weights import Weights, check_weights, gpu_name
from rollout.native.scheduler import EngineLimits, Scheduler
from rollout.vllm_backend.environment import import_vllm, no_number_words, preload_kept, register_model_classes
from rollout.vllm_backend.requests import (
    ModelFacts,
    completion_of,
    cut_at_stop,
    engine_input,
    image_spans,
    sampling_params,
)
from rollout.vllm_backend.settings import VllmSettings
from rollout.vllm_backend.tiles import check_tiles, tile_facts

vllm = import_vllm()

if TYPE_CHECKING:
    from vllm import LLMEngine, RequestOutput


@dataclass(slots=True)
class _Running:
    """A group submitted to vLLM."""

    request: RolloutRequest
    min_version: int
    """Policy version at submission."""


class VllmEngine:
    """`rollout.engine.Engine` on vLLM.

    Differences from the native engine: logprobs of a greedy completion are those of temperature 1
    without top-k and top-p; its tokens are sampled, and counted, once per group; temperatures below
    0.01 and above 2 are refused.

    Example:
        >>> engine = VllmEngine(Path("models/Qwen2-VL-2B-Instruct"), VllmSettings())       # doctest: +SKIP
        >>> engine.submit(RolloutRequest(index=0, prompt=prompt, group_size=8, sampling=SamplingParams()))  # doctest: +SKIP
        >>> while engine.busy: groups += engine.step()                                      # doctest: +SKIP
    """

    def __init__(self, folder: Path, settings: VllmSettings) -> None:
        """Load the model in `folder`.

        Raises:
            ValueError: if `folder` is not a model folder, or vLLM cannot run the model.
        """
        config = load_config(folder)
        self.settings = settings
        self.policy_version = 0
        self.generated_tokens = 0
        self._facts = _model_facts(folder, config)
        self._shapes = _parameter_shapes(config)
        # True from a push's first weights, or sleep, until a push is complete
        self._damaged = False
        self._asleep: set[str] = set()
        self._epoch = 0
        self._scheduler = Scheduler(
            # vLLM decides how much of the admitted prompts a step computes
            EngineLimits(settings.max_completions, settings.max_prompt_tokens, prefill_tokens=sys.maxsize)
        )
        self._running: dict[str, _Running] = {}
        self._serial = 0
        self._ended_tokens = 0
        self._core = _start(folder, config, settings)
        self._core.set_weight_version("0")
        names = self._core.collective_rpc(lambda worker: gpu_name(worker.device))
        self.devices: tuple[str, ...] = tuple(filter(None, names))
        self._tokenizer = self._core.get_tokenizer()

    @property
    def busy(self) -> bool:
        """True while requests wait or run."""
        return bool(self._running) or len(self._scheduler) > 0

    def submit(self, request: RolloutRequest) -> None:
        """Queue a request; raises ValueError if it can never run."""
        if request.sampling.max_tokens > self.settings.max_tokens:
            raise ValueError(
                f"max_tokens={request.sampling.max_tokens} exceeds the engine's {self.settings.max_tokens}: "
                "raise rollout.max_tokens"
            )
        images = len(request.prompt.image_inputs.get("image_grid_thw", ()))
        if images > self.settings.max_images:
            raise ValueError(
                f"prompt {request.prompt.example.id!r} has {images} images, and the engine takes {self.settings.max_images}, "
                "the most in the run's rows: start the engine with all of them"
            )
        # else the scheduler reports the error
        if request.group_size >= 1 and request.sampling.max_tokens >= 1:
            sampling_params(request.sampling, request.group_size, self._facts)
            self._check_images(request.prompt)
        self._scheduler.submit(request)

    def step(self) -> list[RolloutGroup]:
        """Submit what fits, sample a token per running completion, return the finished groups."""
        if self._damaged:
            raise WeightError("the last push ended early and left a mixture of weights: push all of them again")
        # torch sets OpenMP's thread count when a thread first queries it, and vLLM's CPU build
        # plans by OpenMP's: in a Ray actor that is 1 until then, and vLLM's attention fails where
        # plan and run differ
        torch.get_num_threads()
        rows = self._core.get_num_unfinished_requests()
        for request in self._scheduler.admit(self.settings.max_completions - rows):
            self._start_group(request)
        if not self._running:
            return []
        groups = [self._finish_group(output) for output in self._core.step() if output.finished]
        self.generated_tokens = self._ended_tokens + self._running_tokens()
        return groups

    def abort(self) -> list[RolloutRequest]:
        """Drop all waiting and running work and return its requests."""
        self._ended_tokens += self._running_tokens()
        requests = [running.request for running in self._running.values()]
        self._core.abort_request(list(self._running))
        self._running = {}
        while len(self._scheduler):
            requests += self._scheduler.admit(self.settings.max_completions)
        return requests

    def sleep(self) -> None:
        """Release GPU memory, weights and key-value cache, until the next complete push.

        No-op while the engine has work or without `VllmSettings.sleep`.
        """
        if self.settings.sleep and not self.busy and "weights" not in self._asleep:
            # level 2 keeps no copy of the weights: the push brings new ones
            self._core.sleep(level=2)
            self._asleep = {"weights", "kv_cache"}
            self._damaged = True

    def update_weights(self, version: int, weights: Weights = ()) -> None:
        """See `rollout.engine.Engine.update_weights`.

        Wakes a sleeping engine. Running completions continue with their keys and values. If this
        fails after some weights were loaded, `step` raises until a complete push has arrived.
        """
        from rollout.vllm_backend.weight_transfer import begin_load, end_load, load

        check_weights(self._shapes, weights)
        self._wake("weights")
        self._damaged = True
        loaded: set[str] = set()
        expected = set().union(*self._core.collective_rpc(begin_load))
        try:
            for part in weights:
                loaded.update(*self._core.collective_rpc(load, args=(part,)))
        finally:  # or vLLM would run what it has half loaded
            self._core.collective_rpc(end_load)
        if kept := expected - loaded:
            raise WeightError(
                f"vLLM kept {len(kept)} old weights, the first is {min(kept)}: its names for this model are others than the "
                "learner's; use rollout=native"
            )
        self._damaged = False
        self._wake("kv_cache")
        self.policy_version = version
        self._core.set_weight_version(str(version))
        self._epoch += 1
        self._restart_groups_without_tokens()

    def close(self) -> None:
        """Release vLLM's memory.

        A process has one engine at a time: close it before creating the next.
        """
        self.abort()
        self._core.engine_core.shutdown()

    def _check_images(self, prompt: Prompt) -> None:
        """Raise ValueError if a prompt's placeholders do not match its images."""
        if self._facts.tiles is None:
            image_spans(prompt, self._facts)
        else:
            check_tiles(prompt, self._facts.tiles, self._core.renderer.get_mm_processor().info)

    def _wake(self, tag: str) -> None:
        """Reallocate one of vLLM's memory pools: "weights" or "kv_cache"."""
        if tag in self._asleep:
            self._core.wake_up(tags=[tag])
            self._asleep.remove(tag)

    def _start_group(self, request: RolloutRequest) -> None:
        """Submit a group to vLLM."""
        name = str(self._serial)
        self._serial += 1
        self._running[name] = _Running(request, self.policy_version)
        self._core.add_request(
            name,
            engine_input(request.prompt, self._facts, self._epoch),
            sampling_params(request.sampling, request.group_size, self._facts),
        )

    def _restart_groups_without_tokens(self) -> None:
        """Restart groups without tokens: vLLM's prompt state for them is of the old weights."""
        started = {
            state.external_req_id
            for state in self._core.output_processor.request_states.values()
            if state.detokenizer.num_output_tokens() > 0
        }
        # one of several completions may have ended already
        started |= {parent.external_req_id for parent in self._parents() if any(parent.output_aggregator)}
        for name in [name for name in self._running if name not in started]:
            self._core.abort_request([name])
            self._start_group(self._running.pop(name).request)

    def _finish_group(self, output: RequestOutput) -> RolloutGroup:
        """Return the group of a finished output."""
        running = self._running.pop(output.request_id)
        request, seen = running.request, output.prompt_token_ids
        if seen != request.prompt.token_ids.tolist():
            raise RuntimeError(
                f"vLLM sampled from a different prompt than {request.prompt.example.id!r}: it saw {len(seen or ())} tokens, "
                f"the learner's prompt has {len(request.prompt.token_ids)}"
            )
        stops = request.sampling.stop
        prefill = request.prompt.prefill
        completions = tuple(
            completion_of(
                completion,
                joined(prefill, cut_at_stop(self._decode(completion.token_ids), stops)),
                running.min_version,
            )
            for completion in output.outputs
        )
        self._ended_tokens += sum(len(completion.token_ids) for completion in completions)
        if request.sampling.greedy:
            completions *= request.group_size
        return RolloutGroup(request, completions)

    def _decode(self, token_ids: Iterable[int]) -> str:
        written = list(token_ids)
        # dropped even if the tokenizer treats it as text
        if written and written[-1] in self._facts.end_token_ids:
            written.pop()
        return str(self._tokenizer.decode(written, skip_special_tokens=True))

    def _running_tokens(self) -> int:
        """Count the tokens sampled so far for vLLM's running groups."""
        states = self._core.output_processor.request_states.values()
        ended = (output for parent in self._parents() for output in parent.output_aggregator if output is not None)
        running = sum(int(state.detokenizer.num_output_tokens()) for state in states)
        return running + sum(len(end.token_ids) for end in ended)

    def _parents(self) -> list[Any]:
        """Return vLLM's records of groups with more than one completion."""
        return list(self._core.output_processor.parent_requests.values())


def _model_facts(folder: Path, config: PreTrainedConfig) -> ModelFacts:
    family = family_of(config)
    return ModelFacts(
        end_token_ids=find_end_tokens(folder, config).ids,
        banned_token_ids=unsampleable_token_ids(config),
        image_token_id=config.image_token_id if family.vision else None,
        merge_size=config.vision_config.spatial_merge_size if family.grids else 1,
        tiles=tile_facts(config),
    )


def _parameter_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the learner's `named_parameters()`, computed without weights."""
    auto = AutoModelForImageTextToText if family_of(config).vision else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config)  # type: ignore[no-untyped-call]
    model.tie_weights()
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _start(folder: Path, config: PreTrainedConfig, settings: VllmSettings) -> LLMEngine:
    """Start vLLM's engine."""
    from vllm.platforms import current_platform

    on_cpu = current_platform.is_cpu()
    names = family_of(config).vllm_names
    if on_cpu:
        # compiling the sampler's one compiled function, a comparison, would cost the first step
        # twenty seconds
        current_platform.simple_compile_backend = "eager"
    if on_cpu or names:
        register_model_classes(list(config.architectures or ()), names)
    arguments = vllm.EngineArgs(
        **settings.engine_args(folder, config, on_cpu=on_cpu),
    )
    with preload_kept(), no_number_words():
        vllm_config = arguments.create_engine_config()
        if on_cpu:
            # vLLM splits a prompt before an image that exceeds its encoder budget, chunked prefill
            # or not
            scheduler = vllm_config.scheduler_config
            room = max(scheduler.max_num_encoder_input_tokens, settings.max_running_prompt_tokens)
            scheduler.max_num_encoder_input_tokens = scheduler.encoder_cache_size = room
        return vllm.LLMEngine.from_vllm_config(vllm_config, disable_log_stats=arguments.disable_log_stats)
