"""Save a batch, the learner's whole input, as one file for replay."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rlmed.core.files.litter import sift
from rlmed.core.types import (
    Completion,
    Example,
    Prompt,
    RolloutGroup,
    RolloutRequest,
    SamplingParams,
    ScoredGroup,
    TrainGroup,
)


def write_batch(path: Path, groups: Sequence[TrainGroup], reason: str) -> None:
    """Write a batch as an npz file: arrays by name, and the rest as JSON in the entry "facts".

    Args:
        path: ends in ".npz".
        groups: the batch.
        reason: why it was saved.

    Raises:
        OSError: if the write fails.
    """
    arrays: dict[str, npt.NDArray[Any]] = {}
    facts: dict[str, Any] = {
        "reason": reason,
        "groups": [_pack(group, f"{i}/", arrays) for i, group in enumerate(groups)],
    }
    aside = path.with_name(f".{path.name}")
    with aside.open("wb") as file:
        np.savez(file, allow_pickle=False, facts=np.array(json.dumps(facts)), **arrays)
    aside.replace(path)


def read_batch(path: Path) -> tuple[list[TrainGroup], str]:
    """Return the batch and the reason for which `write_batch` saved it.

    Raises:
        OSError: if the file is missing.
    """
    with np.load(path) as content:
        facts = json.loads(str(content["facts"]))
        groups = [_unpack(group, f"{i}/", content) for i, group in enumerate(facts["groups"])]
    return groups, facts["reason"]


def count_groups(path: Path) -> int:
    """Return the number of groups in a batch, without reading its arrays."""
    with np.load(path) as content:
        return len(json.loads(str(content["facts"]))["groups"])


def list_batches(folder: Path) -> list[Path]:
    """Return the batches in a folder in the order written.

    Raises:
        ValueError: if there are none.
    """
    paths, _ = sift(folder.glob("*.npz"), folder)
    if not paths:
        raise ValueError(f"no recorded batches (*.npz) in {folder}: record some with debug.record=true")
    return paths


def _pack(group: TrainGroup, prefix: str, arrays: dict[str, npt.NDArray[Any]]) -> dict[str, Any]:
    """Store a group's arrays in `arrays` under names with the prefix `prefix`; return the rest."""
    request, scored = group.rollout.request, group.scored
    arrays[f"{prefix}token_ids"] = request.prompt.token_ids
    arrays[f"{prefix}advantages"], arrays[f"{prefix}rewards"] = group.advantages, scored.rewards
    arrays |= {f"{prefix}image/{name}": values for name, values in request.prompt.image_inputs.items()}
    arrays |= {f"{prefix}part/{name}": values for name, values in scored.reward_parts.items()}
    completions = []
    for i, completion in enumerate(group.rollout.completions):
        arrays[f"{prefix}completion/{i}"] = completion.token_ids
        arrays[f"{prefix}logprobs/{i}"] = completion.rollout_logprobs
        scalars = ("text", "finish_reason", "min_version", "max_version")
        completions.append({name: value for name, value in _shallow(completion).items() if name in scalars})
    example = request.prompt.example
    return {
        "example": {
            **_shallow(example),
            "image": None if example.image is None else str(example.image),
            "more_images": [str(image) for image in example.more_images],
        },
        "text": request.prompt.text,
        "prefill": request.prompt.prefill,
        "index": request.index,
        "sampling": _shallow(request.sampling),
        "image_inputs": list(request.prompt.image_inputs),
        "reward_parts": list(scored.reward_parts),
        "missing": list(scored.missing),
        "rewarded": scored.rewarded,
        "notes": {name: list(texts) for name, texts in scored.notes.items()},
        "completions": completions,
    }


def _shallow(record: Any) -> dict[str, Any]:
    return {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}


def _unpack(facts: dict[str, Any], prefix: str, arrays: Any) -> TrainGroup:
    stored = facts["example"]
    image = None if stored["image"] is None else Path(stored["image"])
    # earlier versions knew one image a question
    more = tuple(Path(path) for path in stored.get("more_images", ()))
    example = Example(**{**stored, "image": image, "more_images": more, "options": tuple(stored["options"])})
    images = {name: arrays[f"{prefix}image/{name}"] for name in facts["image_inputs"]}
    # earlier versions did not write it
    prompt = Prompt(example, facts["text"], arrays[f"{prefix}token_ids"], images, facts.get("prefill", ""))
    sampling = SamplingParams(**{**facts["sampling"], "stop": tuple(facts["sampling"]["stop"])})
    completions = tuple(
        Completion(arrays[f"{prefix}completion/{i}"], arrays[f"{prefix}logprobs/{i}"], **scalars)
        for i, scalars in enumerate(facts["completions"])
    )
    rollout = RolloutGroup(RolloutRequest(facts["index"], prompt, len(completions), sampling), completions)
    parts = {name: arrays[f"{prefix}part/{name}"] for name in facts["reward_parts"]}
    # earlier versions wrote neither what is missing nor notes
    notes = {name: tuple(texts) for name, texts in facts.get("notes", {}).items()}
    missing, rewarded = tuple(facts.get("missing", ())), facts.get("rewarded", True)
    scored = ScoredGroup(rollout, arrays[f"{prefix}rewards"], parts, missing, notes, rewarded)
    return TrainGroup(scored, arrays[f"{prefix}advantages"])
