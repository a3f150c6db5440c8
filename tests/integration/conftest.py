"""A small run on disk: a random vision model, ten image questions, and their configuration."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rlmed.core.config.composing import compose_config
from rlmed.core.config.schema import RunConfig
from rlmed.data.phantom.studies import write_dataset
from rlmed.models.tiny.build import build_tiny_vl

Rows = list[dict[str, object]]


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("random_model")
    build_tiny_vl(folder)
    return folder


@pytest.fixture(scope="session")
def generated_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All processes of the tests share them."""
    place = tmp_path_factory.getbasetemp()
    folder = (place.parent if "PYTEST_XDIST_WORKER" in os.environ else place) / "phantom"
    write_dataset(folder, 0)
    return folder


@pytest.fixture(scope="session")
def with_images(generated_images: Path) -> Callable[[Path], Path]:
    """`with_images(folder)`: the folder, where `data=phantom` runs find their generated images."""

    def link(folder: Path) -> Path:
        (folder / "outputs").mkdir()
        (folder / "outputs" / "phantom-0").symlink_to(generated_images)
        return folder

    return link


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """`write_rows("train", rows)`: a data file; `rows` defaults to ten good ones with images."""

    def write(name: str, rows: Rows | None = None) -> Path:
        generator = np.random.default_rng(0)
        for number in range(10):
            pixels = generator.integers(0, 255, (56, 84, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        good: Rows = [
            {"id": f"{name}-{i}", "image": f"{i}.png", "question": "Which?", "options": ["a", "b", "c"], "answer": "b"}
            for i in range(10)
        ]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in (good if rows is None else rows)))
        return path

    return write


@pytest.fixture
def make_config(random_model: Path, write_rows: Callable[..., Path]) -> Callable[..., RunConfig]:
    """`make_config("steps=2")`: a two-step run on the random model."""

    def make(*overrides: str) -> RunConfig:
        settings = [
            "data=jsonl",
            f"data.train={write_rows('train')}",
            f"data.eval=[{write_rows('test')}]",
            f"model.path={random_model}",
            "steps=2",
            "algo.group_size=2",
            "algo.groups_per_step=2",
            "algo.dynamic_sampling=false",
            "rollout.max_tokens=6",
            "eval.max_tokens=6",
            "preflight.groups=2",
            "cluster.threads=1",
            *overrides,
        ]
        return compose_config("train", settings)

    return make
