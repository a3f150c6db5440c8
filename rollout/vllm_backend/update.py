"""Check that a push delivers all the weights it must."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from rlmed.core.weights import WeightError
from rlmed.models.families import family_of
from rlmed.models.policy import load_config

Shape = tuple[int, ...]


class ExpectedParameters:
    """State of a push.

    vLLM fuses parameters of the learner (queries, keys and values) into one tensor, which would be half garbage after
    receiving only some of them. So a push delivers all parameters of a part of the model (see
    `rlmed.models.families.PARTS`) or none: it may omit a frozen part.

    Example:
        >>> update = ExpectedParameters({"model.visual.a": (2,)}, {"model.visual.a": "vision"})
        >>> update.begin()
        >>> update.accept({"model.visual.a": (2,)})
        >>> update.finish()
        >>> update.damaged
        False
    """

    def __init__(self, shapes: dict[str, Shape], parts: dict[str, str]) -> None:
        """Start without a push.

        Args:
            shapes: shapes of the learner's `named_parameters()`.
            parts: part of the model each belongs to, by the same names.
        """
        self._shapes, self._parts = shapes, parts
        self._received: set[str] = set()
        self._touched: set[str] = set()
        self.active = False
        """True between `begin` and its end."""

    @property
    def damaged(self) -> bool:
        """True if a push ended early, after loading some of its weights."""
        return bool(self._touched) and not self.active

    def lose_all(self) -> None:
        """Mark all weights as lost: the engine is unusable until a complete push."""
        self._touched = set(self._parts.values())
        self.active = False

    def begin(self) -> None:
        """Start a push; it must include parts that an earlier one left half loaded."""
        self._received = set()
        self.active = True

    def accept(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Check some of the weights and count them as loaded; an error ends the push.

        Raises:
            WeightError: for an unknown name or another shape.
        """
        for name, shape in shapes.items():
            expected, actual = self._shapes.get(name), tuple(shape)
            if expected is None:
                self.active = False
                raise WeightError(
                    f"received weights of {name}, which this model does not have: both sides need the same model"
                )
            if actual != expected:
                self.active = False
                raise WeightError(
                    f"received {name} with shape {actual}, expected {expected}: both sides need the same model"
                )
        self._received.update(shapes)
        self._touched.update(self._parts[name] for name in shapes)

    def finish(self) -> None:
        """End the push.

        Raises:
            WeightError: if a part of the model received only some of its weights.
        """
        self.active = False
        missing = [name for name, part in self._parts.items() if part in self._touched and name not in self._received]
        if missing:
            raise WeightError(
                f"weights of {missing[0]} and {len(missing) - 1} more did not arrive, while others of the same part of the "
                "model did: push all of them"
            )
        self._touched = set()


def expected_weights(folder: Path) -> ExpectedParameters:
    """Return the push that a learner with this model folder makes; reads only the folder's configuration."""
    config = load_config(folder)
    family = family_of(config)
    auto = AutoModelForImageTextToText if family.vision else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config)
    model.tie_weights()
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return ExpectedParameters(shapes, {name: family.part_of(name) for name in shapes})
