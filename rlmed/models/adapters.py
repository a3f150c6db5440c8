"""Low-rank adapters on a policy's linear layers (LoRA, Hu et al. 2021, arXiv 2106.09685), by peft.

A layer with an adapter computes W x + s B A x with s = alpha / rank. W stays as it was loaded, to
the bit; A and B are trained. Without adapters (`Adapters.off`) the same modules are the reference
of the KL penalty, so there is no second model.

| who | computes with |
| --- | --- |
| learner | peft's layers (each one function, see `rlmed.models.lowrank`), on the loaded weights |
| native engine in the same process | merged copies of the adapted weights, all others shared (`Adapters.give_to`) |
| engines in other processes | merged weights, which a push brings (`Policy.weights`) |
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlmed.core.config.schema import LearnerConfig, LoraConfig
from rlmed.models.folder.adapter import FACTORS, PREFIX, WEIGHTS_FILE
from rlmed.models.lowrank import use_one_function
from rlmed.models.merging import Weight, merge
from rlmed.models.policy import Policy

NAME = "default"
"""The adapter's name in peft."""
INSTALL = "pip install -c requirements.lock -e '.[lora]' in rlmed's checkout"


def check_peft() -> None:
    """Raise ValueError if peft is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise ValueError(f"learner.lora needs peft: {INSTALL}")


def add_adapters(policy: Policy, settings: LoraConfig, *, base: str, seed: int) -> Policy:
    """Return a policy with adapters on the weights of `policy`, which itself computes as before.

    Both share all parameters, which are frozen. (With `quantize`, `policy` is used up.)

    Args:
        policy: loaded, without adapters.
        settings: `learner.lora`, with a rank.
        base: name of the loaded model, for those who load the adapters elsewhere.
        seed: of A; B starts at zero.

    Raises:
        ValueError: if peft is not installed, or no layer is to be adapted.
    """
    check_peft()
    import peft

    model = policy.model if settings.quantize else _same_modules(policy.model)
    names = _adapted_layers(policy, model, settings.target)
    if not names:
        raise ValueError(
            f"learner.lora.target={list(settings.target)}: model {base} has no linear layers in these parts; set "
            "learner.lora.target=[language_model]"
        )
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=names,
        base_model_name_or_path=base,
    )
    with torch.random.fork_rng(devices=[]):  # peft draws A on the CPU
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, model, adapter_name=NAME)
    adapters = Adapters(model, config)
    for parameter in adapters.parameters().values():  # above weights of 4 bits peft leaves them in float32
        parameter.data = parameter.data.to(policy.dtype)
    return Policy(model, adapters=adapters)


class Adapters:
    """The adapters of one policy.

    Example:
        >>> policy = add_adapters(sampling, config.learner.lora, base="models/Qwen2-VL-2B-Instruct", seed=0) # doctest: +SKIP
        >>> policy.adapters.give_to(sampling)                                               # doctest: +SKIP
        >>> with policy.adapters.off(): reference = logprobs_no_grad(policy, batch, 1.0)    # doctest: +SKIP
    """

    def __init__(self, model: PreTrainedModel, config: Any) -> None:
        """Find the adapted layers of `model`; `config` is peft's."""
        from peft.tuners.lora import LoraLayer

        self._model, self.config = model, config
        self._layers: dict[str, Any] = {
            name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)
        }
        self._given: dict[str, Tensor] = {}
        for layer in self._layers.values():
            use_one_function(layer, NAME)

    @property
    def dropout(self) -> bool:
        """Whether a forward pass in training mode draws at random."""
        return bool(self.config.lora_dropout)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return A and B of every layer by their names in the model."""
        return {
            f"{name}.{factor}.{NAME}.weight": getattr(layer, factor)[NAME].weight
            for name, layer in self._layers.items()
            for factor in FACTORS
        }

    @contextmanager
    def off(self) -> Iterator[None]:
        """Compute without adapters, as the loaded model does."""
        try:
            self._switch(off=True)
            yield
        finally:
            self._switch(off=False)

    def _switch(self, *, off: bool) -> None:
        for layer in self._layers.values():
            # peft's own switch also stops gradients, which FSDP would remember from the first pass
            layer._disable_adapters = off

    def weights(self) -> Iterator[Weight]:
        """Yield the model's weights as they are without adapters, with what adapts them."""
        own = self.parameters().keys()
        for name, parameter in self._model.named_parameters():
            if name in own:
                continue
            before, adapted, after = name.partition(".base_layer.")
            if not adapted or after != "weight":
                yield Weight(f"{before}.{after}" if adapted else name, parameter)
                continue
            yield self._weight(before)

    def _weight(self, layer: str) -> Weight:
        """Return the adapted weight of a layer."""
        module = self._layers[layer]
        value = module.base_layer.weight
        if module.base_layer.__class__ is not nn.Linear:
            from peft.utils.integrations import dequantize_module_weight

            value = dequantize_module_weight(module.base_layer)
        factors = (module.lora_B[NAME].weight, module.lora_A[NAME].weight)
        return Weight(f"{layer}.weight", value, factors, module.scaling[NAME])

    def give_to(self, policy: Policy) -> None:
        """Let `policy`, on the same weights, compute with the merged ones from now on.

        It gets copies of the adapted weights, which `publish` renews; all others stay shared.
        """
        for layer in self._layers:
            linear = policy.model.get_submodule(layer)
            assert isinstance(linear, nn.Linear)
            linear.weight = nn.Parameter(torch.empty_like(linear.weight), requires_grad=False)
            self._given[layer] = linear.weight
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Merge the present adapters into the copies of `give_to`, if there are any."""
        for layer, target in self._given.items():
            weight = self._weight(layer)
            assert weight.factors is not None
            target.copy_(merge(weight.name, weight.value, weight.factors, weight.scale))

    def save_settings(self, folder: Path) -> dict[str, str]:
        """Write settings as peft and transformers do; return the names of A and B in files."""
        self.config.save_pretrained(folder)
        self._model.config.save_pretrained(folder)
        self._model.generation_config.save_pretrained(folder)
        return {name: f"{PREFIX}{name.replace(f'.{NAME}.', '.')}" for name in self.parameters()}

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Read A and B that training with the same settings has written into `folder`."""
        stored = load_file(folder / WEIGHTS_FILE)
        for name, parameter in self.parameters().items():
            parameter.copy_(stored[f"{PREFIX}{name.replace(f'.{NAME}.', '.')}"])


@contextmanager
def training(policy: Policy, config: LearnerConfig, version: int, rank: int) -> Iterator[None]:
    """Put the policy into training mode while an update's gradient is computed, if that is needed.

    Gradient checkpointing needs it, and dropout, which no supported model has but adapters may:
    what it drops is a function of policy version and learner rank, so that a resumed run repeats
    it.
    """
    draws = policy.adapters is not None and policy.adapters.dropout
    policy.model.train(bool(config.gradient_checkpointing) or draws)
    try:
        if draws:
            with torch.random.fork_rng(devices=[policy.device] if policy.device.type == "cuda" else []):
                torch.manual_seed(zlib.crc32(f"{version} {rank}".encode()))
                yield
        else:
            yield
    finally:
        policy.model.eval()


def _same_modules(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of the modules that shares all parameters and buffers."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    copied: PreTrainedModel = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    # `rlmed.models.decoder` reads the weights of the model that it was made for
    vars(copied.get_decoder()).pop("forward", None)
    return copied


def _adapted_layers(policy: Policy, model: PreTrainedModel, target: tuple[str, ...]) -> list[str]:
    """Return the names of all linear layers in these parts, but for the vocabulary projection."""
    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and policy.family.part_of(f"{name}.weight") in target
    ]
