"""Changes of a model folder, for the tests of what is refused and what is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Change = Callable[[Path], object]


def edit(name: str, **values: Any) -> Change:
    """Set keys of a JSON file, which is made if missing; None removes one."""

    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        content = {key: value for key, value in {**content, **values}.items() if value is not None}
        (folder / name).write_text(json.dumps(content))

    return change


def edit_text_config(**values: Any) -> Change:
    def change(folder: Path) -> None:
        inner = json.loads((folder / "config.json").read_text())["text_config"]
        edit("config.json", text_config={**inner, **values})(folder)

    return change


def edit_vision_config(**values: Any) -> Change:
    def change(folder: Path) -> None:
        inner = json.loads((folder / "config.json").read_text())["vision_config"]
        edit("config.json", vision_config={**inner, **values})(folder)

    return change


def write(name: str, text: str | bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def edit_weights(function: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def change(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        function(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def cut(name: str, length: int) -> Change:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:length])


def shard(spoil: Callable[[Path, dict[str, Any]], object] = lambda folder, index: None) -> Change:
    """Put the weights into two files with an index, and spoil one of these."""

    def change(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names = sorted(weights)
        places = {name: f"model-0000{1 + (i > 40)}-of-00002.safetensors" for i, name in enumerate(names)}
        for place in set(places.values()):
            part = {name: weights[name] for name in names if places[name] == place}
            save_file(part, folder / place, metadata={"format": "pt"})
        size = sum(tensor.nbytes for tensor in weights.values())
        index = {"metadata": {"total_size": size}, "weight_map": places}
        spoil(folder, index)
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return change


def both(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")


def only_pickled(folder: Path) -> None:
    pickled(folder)
    (folder / "model.safetensors").unlink()
