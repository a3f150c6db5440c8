"""Are two runs the same training, but for rounding?

They may have computed in other processes, and in another order.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.rounding import GRADIENTS, LOGPROBS

SAME_TEXTS = 0.9
"""A draw on an edge goes either way.

It changes one completion, its step's update by a few percent, and so a few later ones.
"""
OF_THE_TEXT = ("format", "choice", "reasoning_consistency", "brevity", "repetition")
"""Rewards that are functions of a completion's text."""
MEASURED = ("seconds/", "rollout/")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_same_training(ours: Path, theirs: Path, *, last: int, before: int) -> None:
    """Two folders of runs hold the same training.

    Args:
        ours: of a run.
        theirs: of a run that is known to be right, with rewards in which the likelihood counts.
        last: the last step, of which both have a checkpoint.
        before: an earlier step with one in `theirs`: what was learnt since then is the measure of
            the weights.
    """
    groups = [{row["index"]: row for row in read_lines(folder / "rollouts.jsonl")} for folder in (ours, theirs)]
    assert groups[0].keys() == groups[1].keys()
    same, first_difference = [], last + 1
    for index, row in groups[0].items():
        assert (row["step"], row["example_id"]) == (groups[1][index]["step"], groups[1][index]["example_id"])
        for one, other in zip(row["completions"], groups[1][index]["completions"], strict=True):
            same.append(one["text"] == other["text"])
            if not same[-1]:
                first_difference = min(first_difference, row["step"])
                continue
            assert [one["reward_parts"][name] for name in OF_THE_TEXT] == [
                other["reward_parts"][name] for name in OF_THE_TEXT
            ]
    assert sum(same) >= SAME_TEXTS * len(same)
    # until then the weights differ by rounding alone, to which each update adds its share
    for one, other in list(zip(*(learnt(folder) for folder in (ours, theirs)), strict=True))[: first_difference - 1]:
        assert one == pytest.approx(other, rel=one["step"] * GRADIENTS, abs=one["step"] * LOGPROBS)
    # a step that is lost, or learnt from twice, moves them by half of what two steps do
    assert apart(ours, last, theirs, last) < 0.2 * apart(theirs, before, theirs, last)


def learnt(folder: Path) -> list[dict[str, float]]:
    """The metrics of each step that do not depend on time taken or on who computed them."""
    return [
        {name: value for name, value in line.items() if not name.startswith(MEASURED) and "per_second" not in name}
        for line in read_lines(folder / "metrics.jsonl")
    ]


def apart(one: Path, step: int, other: Path, other_step: int) -> float:
    """Distance of the weights of two checkpoints."""
    first, second = (
        stored_weights(folder / "checkpoints" / f"step-{number:06d}")
        for folder, number in ((one, step), (other, other_step))
    )
    assert first.keys() == second.keys()
    return float(torch.stack([(first[name] - second[name]).norm() for name in first]).norm())


def stored_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a model folder, of as many files as learner ranks have written it."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
