"""The questions of an evaluation: as they are and, as controls, with other pictures or options."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from rlmed.core.types import Example, Prompt
from rlmed.data.images import load_image
from rlmed.data.loading import EvalFile
from rlmed.data.prompts import PromptRenderer
from rlmed.data.sampler import reorder_options
from rlmed.evaluation.records import SHOWN, Control

GREY = (128, 128, 128)
SHUFFLE_SEED = 0


@dataclass(frozen=True, slots=True)
class Query:
    """One question to ask."""

    file: str
    control: Control
    shown: Example
    """With the pictures and the order of options to use."""
    blank: frozenset[int] = frozenset()
    """Indices of pictures to show as grey ones of their size."""

    def render(self, renderer: PromptRenderer) -> Prompt:
        """Return the prompt."""
        if not self.blank:
            return renderer.render(self.shown)
        pictures = [load_image(path) for path in self.shown.images]
        return renderer.render(
            self.shown,
            [
                Image.new("RGB", picture.size, GREY) if index in self.blank else picture
                for index, picture in enumerate(pictures)
            ],
        )


def queries_of(file: EvalFile, *, controls: bool) -> Iterator[Query]:
    """Yield the questions of a file, then those of each control if asked for."""
    for example in file.examples:
        yield Query(file.name, "none", example)
    if not controls:
        return
    for example in file.examples:
        if example.images:
            yield Query(file.name, "blank", example, frozenset(range(len(example.images))))
    for example in shuffled_images(file.examples):
        yield Query(file.name, "shuffled", example)
    for example in file.examples:
        if len(example.images) > 1:
            chosen = _random(example, SHUFFLE_SEED).integers(len(example.images))
            yield Query(file.name, "blank_one", example, frozenset({int(chosen)}))
    for example in file.examples:
        turned = reorder_images(example, SHUFFLE_SEED)
        if turned is not None:
            yield Query(file.name, "image_order", turned)
    for example in file.examples:
        reordered = reorder_options(example, SHUFFLE_SEED)
        if reordered is not None:
            yield Query(file.name, "reordered", reordered)


def shuffled_images(examples: Sequence[Example], seed: int = SHUFFLE_SEED) -> list[Example]:
    """Permute the pictures so that each example gets another's.

    Rows with the same number of pictures are sorted by them, in an order drawn from `seed`, and
    each takes the pictures m rows further on, where m is the number of rows of the most frequent
    ones. So no row keeps its own, unless the same pictures belong to more than half of these rows:
    rows that would keep theirs, or any of them (rows of one series), are left out, as are rows
    without a picture, and a row that alone has so many.
    """
    rows: dict[int, dict[tuple[Path, ...], list[int]]] = defaultdict(lambda: defaultdict(list))
    for index, example in enumerate(examples):
        if example.images:
            # the same pictures in another order are not another's
            rows[len(example.images)][tuple(sorted(example.images))].append(index)
    given: dict[int, tuple[Path, ...]] = {}
    for alike in rows.values():
        images = sorted(alike)
        order = np.random.default_rng(seed).permutation(len(images))
        line = [index for i in order for index in alike[images[i]]]
        shift = max(map(len, alike.values()))
        given |= {index: examples[line[(i + shift) % len(line)]].images for i, index in enumerate(line)}
    return [
        _with_images(example, given[index])
        for index, example in enumerate(examples)
        if index in given and set(given[index]).isdisjoint(example.images)
    ]


def reorder_images(example: Example, seed: int) -> Example | None:
    """Return the example with its pictures in another order, drawn from (seed, id).

    Return None if it has none: one picture, or the same one several times.
    """
    images = example.images
    if len(set(images)) < 2:
        return None
    random = _random(example, seed)
    orders = (tuple(images[i] for i in random.permutation(len(images))) for _ in itertools.count())
    return _with_images(example, next(order for order in orders if order != images))


def _with_images(example: Example, images: tuple[Path, ...]) -> Example:
    return dataclasses.replace(example, image=images[0], more_images=images[1:])


def _random(example: Example, seed: int) -> np.random.Generator:
    # a digest, since Python's own string hash differs between processes
    digest = hashlib.sha256(example.id.encode()).digest()
    return np.random.default_rng([seed, int.from_bytes(digest[:8], "little")])


def plan_line(queries: Sequence[Query]) -> str:
    """Say how many answers an evaluation needs, by control."""
    counts = Counter(query.control for query in queries)
    parts = [f"{counts[control]} {what}" for control, what in SHOWN.items() if counts[control]]
    return f"evaluation needs {len(queries)} answers: {', '.join(parts)}"
