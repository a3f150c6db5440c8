"""Which weights a push must bring, and which it has brought."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from rlmed.core.weights import WeightError
from rlmed.models.families import family_of
from rlmed.models.policy import load_config

Shape = tuple[int, ...]


class WeightUpdate:
    """The state of a push.

    vLLM fuses parameters of the learner (queries, keys and values) into one, and keeps none of them apart: a fused one that
    gets only some of its parts would be half garbage. So a push brings every parameter of a part of the model (see
    `rlmed.models.families.PARTS`), or none: a frozen part may be left out.

    Example:
        >>> update = WeightUpdate({"model.visual.a": (2,)}, {"model.visual.a": "vision"})
        >>> update.begin()
        >>> update.accept({"model.visual.a": (2,)})
        >>> update.finish()
        >>> update.damaged
        False
    """

    def __init__(self, shapes: dict[str, Shape], parts: dict[str, str]) -> None:
        """Start without a push.

        Args:
            shapes: of the learner's `named_parameters()`.
            parts: part of the model by the same names.
        """
        self._shapes, self._parts = shapes, parts
        self._received: set[str] = set()
        self._touched: set[str] = set()
        self.active = False
        """True between `begin` and its end."""

    @property
    def damaged(self) -> bool:
        """True when a push has ended early, after some of its weights were loaded."""
        return bool(self._touched) and not self.active

    def lose_all(self) -> None:
        """The engine's weights are gone: nothing goes before all of them have come."""
        self._touched = set(self._parts.values())
        self.active = False

    def begin(self) -> None:
        """A push starts; parts that an earlier one has left half loaded have to be in it."""
        self._received = set()
        self.active = True

    def accept(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Check some of the weights and count them as loaded; ends the push with the error when they are refused.

        Raises:
            WeightError: for an unknown name or another shape.
        """
        for name, shape in shapes.items():
            expected, actual = self._shapes.get(name), tuple(shape)
            if expected is None:
                self.active = False
                raise WeightError(
                    f"weights of {name} arrived, which this model does not have: both sides need one model"
                )
            if actual != expected:
                self.active = False
                raise WeightError(
                    f"weights of {name} arrived with shape {actual}, here it is {expected}: both sides need one model"
                )
        self._received.update(shapes)
        self._touched.update(self._parts[name] for name in shapes)

    def finish(self) -> None:
        """The push ends.

        Raises:
            WeightError: when a part of the model got some of its weights and not all.
        """
        self.active = False
        missing = [name for name, part in self._parts.items() if part in self._touched and name not in self._received]
        if missing:
            raise WeightError(
                f"weights of {missing[0]} and {len(missing) - 1} more did not arrive, while others of the same part of the "
                "model did: push all of them"
            )
        self._touched = set()


def expected_weights(folder: Path) -> WeightUpdate:
    """The push that a learner with this model folder makes; reads the folder's configuration only."""
    config = load_config(folder)
    family = family_of(config)
    auto = AutoModelForImageTextToText if family.vision else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config)
    model.tie_weights()
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return WeightUpdate(shapes, {name: family.part_of(name) for name in shapes})
