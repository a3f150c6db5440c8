"""Check a folder's weight files against their index by their headers, without loading them."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import safe_open

from rlmed.core.files.damage import cause, read_json
from rlmed.core.process.foreign import foreign

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = "pytorch_model*.bin"
NOT_QUANTIZED = frozenset({"F64", "F32", "F16", "BF16", "I64", "BOOL"})
"""Dtypes of float weights and of buffers, in safetensors' names."""
UNQUANTIZED = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool})
"""The same dtypes in torch."""
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
HEAD = "lm_head.weight"
_MAX_HEADER = 100 * 2**20

Header = Mapping[str, Mapping[str, Any]]
"""By tensor: "dtype", "shape" and "data_offsets"."""


def check_weight_files(folder: Path) -> list[str]:
    """Compare the weight files of a folder with their index and their own headers.

    Returns:
        Harmless oddities, one line each.

    Raises:
        ValueError: if files are missing, damaged, from two models, or quantized.
    """
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    if pickled := _pickled_files(folder):
        return _check_pickled(folder, pickled, shards)
    if not shards:
        _complain_of_no_weights(folder)
    used: list[str] = [WHOLE]
    doubts: list[str] = []
    if (folder / INDEX).is_file():
        used = _files_by_index(folder, shards, doubts)
    elif WHOLE not in shards:
        raise ValueError(
            f"{folder} has {', '.join(shards)}, but neither {WHOLE} nor {INDEX}, which maps tensors to files: copy or download "
            "it again"
        )
    for name in used:
        for tensor, entry in read_header(folder / name).items():
            if entry["dtype"] not in NOT_QUANTIZED:
                _complain_of_quantization(folder / name, tensor, entry["dtype"])
    others = sorted({*shards, *(path.name for path in folder.glob(PICKLED))} - set(used))
    if others:
        read = used[0] if len(used) == 1 else f"the files that {INDEX} names"
        doubts.append(f"model {str(folder)!r}: reading weights from {read}; ignoring {', '.join(others)}")
    return doubts


def own_head_differs(folder: Path) -> bool:
    """Return whether the files hold a vocabulary projection that differs from the token embeddings.

    For a model whose config.json ties them: transformers silently keeps one and drops the other.
    """
    tensors: dict[str, torch.Tensor] = {}
    for path in _pickled_files(folder):
        tensors |= {name: tensor for name, tensor in _read_pickled(path).items() if _is_of_vocabulary(name)}
    if not tensors:
        for path in folder.glob("*.safetensors"):
            if names := [name for name in read_header(path) if _is_of_vocabulary(name)]:
                with safe_open(path, framework="pt") as file:
                    tensors |= {name: file.get_tensor(name) for name in names}
    if len(tensors) != 2 or HEAD not in tensors:
        return False
    return not torch.equal(*(tensor.float() for tensor in tensors.values()))


def _is_of_vocabulary(name: str) -> bool:
    return name == HEAD or name.endswith("embed_tokens.weight")


def stored_dtype(folder: Path) -> torch.dtype | None:
    """Return the dtype of the weights in safetensors files; None if they have several, or none."""
    named = {entry["dtype"] for path in folder.glob("*.safetensors") for entry in read_header(path).values()}
    found = [dtype for name, dtype in FLOATS.items() if name in named]
    return found[0] if len(found) == 1 else None


def read_header(path: Path) -> Header:
    """Read the header of a safetensors file.

    Raises:
        ValueError: if the file is damaged, or its size differs from its header's.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else _MAX_HEADER
        if length >= _MAX_HEADER or 8 + length > size:
            raise ValueError(f"{path} is damaged: {cause(path, 'it does not start like a safetensors file')}")
        try:
            header: dict[str, Any] = json.loads(file.read(length))
            header.pop("__metadata__", None)
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
            assert all(isinstance(entry["dtype"], str) for entry in header.values())
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, AssertionError, RecursionError) as error:
            raise ValueError(f"{path} is damaged: its header cannot be read; copy or download it again") from error
    if 8 + length + end != size:
        raise ValueError(
            f"{path} is damaged: it should have {8 + length + end} bytes and has {size}; copy or download it again"
        )
    return header


def _pickled_files(folder: Path) -> list[Path]:
    """Return the pickled PyTorch files if they hold the weights; safetensors come first."""
    if (folder / WHOLE).is_file() or (folder / INDEX).is_file():
        return []
    return sorted(folder.glob(PICKLED))


def _read_pickled(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a pickled PyTorch file, memory-mapped if its format allows."""
    with foreign(
        f"the weights of model {str(path.parent)!r} cannot be loaded: {path.name}", "Copy or download it again"
    ):
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        return {name: tensor for name, tensor in content.items() if isinstance(tensor, torch.Tensor)}


def _check_pickled(folder: Path, pickled: list[Path], shards: list[str]) -> list[str]:
    for path in pickled:
        for name, tensor in _read_pickled(path).items():
            if tensor.dtype not in UNQUANTIZED:
                _complain_of_quantization(path, name, str(tensor.dtype).removeprefix("torch."))
    if not shards:
        return []
    read = ", ".join(path.name for path in pickled)
    return [f"model {str(folder)!r}: reading weights from {read}; ignoring {', '.join(shards)}"]


def _complain_of_quantization(path: Path, tensor: str, dtype: str) -> NoReturn:
    raise ValueError(
        f"{path} holds {tensor} as {dtype}: the weights are quantized, but rlmed trains and evaluates only float weights; use "
        "the original bfloat16 or float32 model"
    )


def _complain_of_no_weights(folder: Path) -> NoReturn:
    others = sorted(
        path.name for pattern in ("*.gguf", "*.bin", "*.pt", "*.pth", "*.npz") for path in folder.glob(pattern)
    )
    seen = f"; {others[0]} cannot be read" if others else ""
    raise ValueError(
        f"the weights of model {str(folder)!r} cannot be loaded: {WHOLE} and {INDEX} not found{seen}. Copy or download its "
        "*.safetensors again"
    )


def _files_by_index(folder: Path, shards: list[str], doubts: list[str]) -> list[str]:
    """Return the files to read with an index present: transformers prefers the single file."""
    files = read_json(folder / INDEX).get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise ValueError(f"{folder / INDEX} is damaged: it has no weight_map; copy or download it again")
    named = set(files.values())
    if WHOLE in shards and named != {WHOLE}:
        if named & set(shards):
            raise ValueError(
                f"{folder} holds the weights twice, in {WHOLE} and in the files that {INDEX} names, and the two may differ: "
                "keep one and remove the other"
            )
        doubts.append(f"{folder / INDEX} names missing files: reading weights from {WHOLE}")
        return [WHOLE]
    return _check_index(folder, files, shards, doubts)


def _check_index(folder: Path, files: Mapping[str, str], shards: list[str], doubts: list[str]) -> list[str]:
    """Check that each shard contains exactly what the index says, and return the shards."""
    named = sorted(set(files.values()))
    absent = [name for name in named if name not in shards]
    if absent:
        raise ValueError(
            f"{folder / INDEX} names {len(named)} weight files, {len(absent)} of them missing, the first is {absent[0]}: "
            "copy or download the folder again"
        )
    size = 0
    for name in named:
        header = read_header(folder / name)
        size += sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in header.values())
        expected = {tensor for tensor, file in files.items() if file == name}
        if odd := sorted(expected ^ header.keys()):
            one, other = (INDEX, name) if odd[0] in expected else (name, INDEX)
            raise ValueError(
                f"{folder}: {one} has {odd[0]} in {name}, and {other} does not ({len(odd)} tensors differ): the files belong "
                "to two models; copy or download the folder again"
            )
    metadata = read_json(folder / INDEX).get("metadata")
    said = metadata.get("total_size") if isinstance(metadata, dict) else None
    if said is not None and said != size:
        doubts.append(f"{folder / INDEX}: total_size is {said} bytes, but its files hold {size}; no tensor is missing")
    return named
