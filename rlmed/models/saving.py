"""Write a model as a Hugging Face folder, one tensor at a time and in one file per writer.

transformers' `save_pretrained` wants all tensors at once. Here it decides the names and writes the
settings; weights are written in the format of safetensors as they come.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from rlmed.models.folder.weight_files import INDEX, WHOLE

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""Names of dtypes in safetensors."""
ALIGNMENT = 8
"""Bytes to a multiple of which the header is padded."""


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """A parameter and its place in the weight files.

    Example:
        StoredWeight("model.visual.merger.ln_q.weight", "visual.merger.ln_q.weight", (1280,), dtype)
    """

    parameter: str
    """Name in the model."""
    name: str
    """Name in the files."""
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def save_settings(model: PreTrainedModel, folder: Path) -> dict[str, str]:
    """Write the model's settings into `folder`; return each parameter's name in weight files.

    Names differ where transformers has renamed modules since the family was published. It is asked
    by having it save a number for each parameter.
    """
    parameters = [name for name, _ in model.named_parameters()]
    model.save_pretrained(folder, state_dict={name: torch.tensor(i) for i, name in enumerate(parameters)})
    stored = load_file(folder / WHOLE)
    (folder / WHOLE).unlink()
    names = {parameters[int(number)]: name for name, number in stored.items()}
    assert names.keys() == set(parameters), "transformers combines parameters of this model in its files"
    return names


def share_weights(
    parameters: Iterable[tuple[str, Tensor]], names: Mapping[str, str], files: int
) -> list[list[StoredWeight]]:
    """Divide the parameters among `files` of about the same size; see `save_settings` for `names`.

    Within a file, wider dtypes come first, so that every tensor is aligned.
    """
    weights = [
        StoredWeight(name, names[name], tuple(parameter.shape), parameter.dtype) for name, parameter in parameters
    ]
    shares: list[list[StoredWeight]] = [[] for _ in range(files)]
    sizes = [0] * files
    for weight in sorted(weights, key=lambda weight: -weight.nbytes):
        smallest = sizes.index(min(sizes))
        shares[smallest].append(weight)
        sizes[smallest] += weight.nbytes
    order = {weight: i for i, weight in enumerate(weights)}
    return [sorted(share, key=lambda weight: (-weight.dtype.itemsize, order[weight])) for share in shares]


def file_name(number: int, files: int) -> str:
    """Return the name of the weight file `number` (from 0) of `files`."""
    return WHOLE if files == 1 else f"model-{number + 1:05d}-of-{files:05d}.safetensors"


def write_weights(path: Path, weights: Sequence[StoredWeight], tensors: Iterable[Tensor]) -> None:
    """Write the tensors of `weights`, which come in that order on any device, and sync the file."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for weight in weights:
        start, end = end, end + weight.nbytes
        header[weight.name] = {"dtype": DTYPES[weight.dtype], "shape": weight.shape, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for weight, tensor in zip(weights, tensors, strict=True):
            assert (tensor.shape, tensor.dtype) == (weight.shape, weight.dtype), weight
            # numpy's bytes are written without a copy, and without the interpreter's lock
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def write_index(folder: Path, shares: Sequence[Sequence[StoredWeight]]) -> None:
    """Write which of several files holds which tensor."""
    files = {weight.name: file_name(i, len(shares)) for i, share in enumerate(shares) for weight in share}
    size = sum(weight.nbytes for share in shares for weight in share)
    index = {"metadata": {"total_size": size}, "weight_map": files}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
