"""Sizes of a model, known from its configuration alone: no weights are read or made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from rlmed.models.families import PARTS, family_of

SHARED_INPUT = ("k_proj", "v_proj", "up_proj")
"""Linear layers that read what the layer before them has read, so that autograd keeps it once."""


@dataclass(frozen=True, slots=True)
class BlockSize:
    """A stack of equal blocks: the decoder's layers, or the vision tower's."""

    depth: int
    hidden: int
    widest: int
    """Features inside the multi-layer perceptron."""
    linear_values: int
    """Inputs and outputs of a block's linear layers per token, each once, as autograd does."""
    key_values: int
    """Features of a token's keys and values in one block."""
    query_values: int
    """Features of a token's queries."""
    parameters: int
    """Of one block."""
    linears: int
    """Linear layers of a block."""
    inputs: int
    """Inputs of a block's linear layers per token, each layer's own."""

    @classmethod
    def of(cls, blocks: nn.ModuleList, hidden: int) -> BlockSize:
        """Measure equal blocks whose residual stream has `hidden` features."""
        linears = {name: module for name, module in blocks[0].named_modules() if isinstance(module, nn.Linear)}
        names = {name: name.rpartition(".")[2] for name in linears}
        kept = sum(
            layer.out_features + (0 if names[name] in SHARED_INPUT else layer.in_features)
            for name, layer in linears.items()
        )
        widths = {names[name]: layer.out_features for name, layer in linears.items()}
        if "qkv" in widths:
            query, key_values = widths["qkv"] // 3, 2 * widths["qkv"] // 3
        else:
            query, key_values = widths["q_proj"], widths["k_proj"] + widths["v_proj"]
        return cls(
            depth=len(blocks),
            hidden=hidden,
            widest=max(layer.in_features for layer in linears.values()),
            linear_values=kept,
            key_values=key_values,
            query_values=query,
            parameters=sum(parameter.numel() for parameter in blocks[0].parameters()),
            linears=len(linears),
            inputs=sum(layer.in_features for layer in linears.values()),
        )


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Sizes of a whole model.

    Example:
        >>> size = ModelSize.of(meta_model(load_config(Path("models/Qwen2-VL-2B-Instruct"))))   # doctest: +SKIP
        >>> size.parameters                                                                     # doctest: +SKIP
        2208985600
    """

    parts: Mapping[str, int]
    """Parameters by part (`rlmed.models.families.PARTS`)."""
    linear_weights: Mapping[str, int]
    """Those of linear layers that can have an adapter: all but the vocabulary projection."""
    linear_sides: Mapping[str, int]
    """Inputs plus outputs of these layers: the parameters of adapters of rank 1."""
    largest: int
    """Elements of the largest parameter."""
    vocabulary: int
    tied: bool
    """Whether the vocabulary projection is the token embedding."""
    decoder: BlockSize
    vision: BlockSize | None
    patches_per_token: int
    """Patches of the vision tower that become one visual token."""
    patch_values: int
    """Numbers of a patch, as the image processor returns it."""
    patch_pixels: int
    """Pixels of the picture that a patch covers."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> ModelSize:
        """Measure a model, which may be on the meta device."""
        family, parts = family_of(model.config), Counter[str](dict.fromkeys(PARTS, 0))
        linear_weights, linear_sides, head = Counter[str](), Counter[str](), model.get_output_embeddings()
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and module is not head:
                part = family.part_of(f"{name}.weight")
                linear_weights[part] += module.weight.numel()
                linear_sides[part] += module.in_features + module.out_features
        largest = 0
        for name, parameter in model.named_parameters():
            parts[family.part_of(name)] += parameter.numel()
            largest = max(largest, parameter.numel())
        text = model.config.get_text_config()
        vision, merged, patch_values, patch_pixels = None, 1, 0, 0
        if family.vision:
            tower = [module for name, module in model.named_modules() if family.part_of(f"{name}.") == "vision"]
            blocks = max((module for module in tower if isinstance(module, nn.ModuleList)), key=len)
            patch = next(module.weight for module in tower if isinstance(module, nn.Conv2d | nn.Conv3d))
            vision, merged = BlockSize.of(blocks, patch.shape[0]), family.patches_per_token(model.config)
            patch_values, patch_pixels = patch[0].numel(), patch.shape[-1] * patch.shape[-2]
        return cls(
            parts=dict(parts),
            linear_weights=dict(linear_weights),
            linear_sides=dict(linear_sides),
            largest=largest,
            vocabulary=text.vocab_size,
            tied=model.get_output_embeddings().weight is model.get_input_embeddings().weight,
            decoder=BlockSize.of(model.get_decoder().layers, text.hidden_size),
            vision=vision,
            patches_per_token=merged,
            patch_values=patch_values,
            patch_pixels=patch_pixels,
        )

    @property
    def parameters(self) -> int:
        """Number of parameters, each tied one once."""
        return sum(self.parts.values())

    @property
    def head(self) -> int:
        """Elements of the vocabulary projection."""
        return self.vocabulary * self.decoder.hidden

    def trained(self, freeze: Collection[str]) -> int:
        """Return the number of parameters outside the parts `freeze`."""
        return sum(count for part, count in self.parts.items() if part not in freeze)

    def adapted(self, target: Collection[str]) -> int:
        """Return the number of weights that adapters of the parts `target` are added to."""
        return sum(count for part, count in self.linear_weights.items() if part in target)

    def adapters(self, target: Collection[str], rank: int) -> int:
        """Return the number of parameters of these adapters."""
        return rank * sum(count for part, count in self.linear_sides.items() if part in target)


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Build a model of this configuration without memory for its parameters."""
    auto: Any = AutoModelForImageTextToText if family_of(config).vision else AutoModelForCausalLM
    with torch.device("meta"):
        model: PreTrainedModel = auto.from_config(config)
    return model
