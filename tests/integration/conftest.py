"""A small run on disk: a random vision model, ten image questions, and their configuration."""

from __future__ import annotations

import functools
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rlmed.core.config.composing import compose_config
from rlmed.core.config.schema import RunConfig
from rlmed.data.phantom.studies import write_dataset
from rlmed.models.tiny.build import build_tiny_text, build_tiny_vl
from rollout.pool.pool import WorkerPool
from rollout.pool.state import PoolSettings
from tests.browser import open_browser
from tests.integration.processes import marked, new_mark, wait_until

Rows = list[dict[str, object]]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium; without one, tests are skipped, or fail where it is required."""
    with open_browser() as browser:
        yield browser


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


@pytest.fixture(scope="session")
def ray_session() -> Iterator[dict[str, str]]:
    """The mark of our own Ray in a short-named folder (its sockets' names are long).

    Nothing of it remains.
    """
    import ray

    from rlmed.cluster.ray_session import worker_environment

    mark = new_mark()
    with tempfile.TemporaryDirectory(prefix="r") as folder, pytest.MonkeyPatch.context() as patch:
        for name, value in {
            **mark,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_prestart_worker_first_driver": "false",
        }.items():
            patch.setenv(name, value)
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            _temp_dir=folder,
            log_to_driver=False,
            object_store_memory=128 * 2**20,
            resources={"scanner": 2},
            runtime_env=worker_environment({}, here=True),
        )
        for name in mark:  # what later tests start in this process is not Ray's
            patch.delenv(name)
        yield mark
        ray.shutdown()
        wait_until(lambda: not marked(mark), 120, "Ray's processes end")


@pytest.fixture(scope="session")
def ray_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text model's folder, for the workers of `ray_pool`."""
    folder = tmp_path_factory.mktemp("text")
    build_tiny_text(folder)
    return folder


@pytest.fixture(scope="session")
def ray_pool(ray_session: dict[str, str], ray_model: Path) -> Iterator[WorkerPool]:
    """Two workers, which tests may kill: they are replaced."""
    from rollout.pool.actor import RayWorker
    from tests.integration.test_ray_workers import build_engine

    build = functools.partial(build_engine, ray_model)
    settings = PoolSettings(capacity=16, heartbeat_s=0.5)
    pool = WorkerPool(lambda i: RayWorker(f"worker {i}", build), 2, settings)
    yield pool
    pool.close()
