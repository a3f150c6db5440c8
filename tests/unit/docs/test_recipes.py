"""Each figure of docs/recipes.md is what rlmed computes."""

from __future__ import annotations

import functools
import re

import pytest

from benchmarks.gpu.setting import GEOMETRIES
from rlmed.cluster.capacity import engine_estimate, local_estimate, rank_estimate
from rlmed.cluster.memory import GIB, PROCESS_BYTES, MemoryEstimate
from rlmed.core.config.composing import compose_config
from rlmed.core.config.schema import RunConfig
from rlmed.models.size import ModelSize, meta_model
from tests.root import ROOT

ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8").splitlines()
    if re.match(r"\| (\d+ GB|\d+B) \|", line)
]
USABLE = 0.93
"""GiB that programs can use of a card's GB: 24 GB are 22.4 GiB, less what the driver keeps."""


@functools.cache
def size_of(model: str) -> ModelSize:
    return ModelSize.of(meta_model(GEOMETRIES[model.lower()].config({"image_token_id": 5})))


def settings_of(cell: str) -> RunConfig:
    # a model that is here, for its configuration: packed weights, none on a GPU, are counted by it
    given = [] if cell == "none" else cell.strip("`").split()
    return compose_config("train", ["+profile=paper", "model.dtype=bfloat16", "model.path=embedded:tiny_base", *given])


def gib(estimate: MemoryEstimate) -> str:
    return f"{(estimate.peak + PROCESS_BYTES) / GIB:.1f}"


def test_there_are_rows_for_each_card() -> None:
    assert {row[0] for row in ROWS} == {"24 GB", "48 GB", "80 GB", "2B", "7B"}


@pytest.mark.parametrize("row", [row for row in ROWS if row[0].endswith("GB")], ids=" ".join)
def test_one_gpu(row: list[str]) -> None:
    card, model, settings, figure = row
    estimate = local_estimate(size_of(model), engines=1, pictures=0, on_cpu=False)(settings_of(settings))
    assert gib(estimate) == figure
    assert float(figure) < USABLE * int(card.split()[0])


@pytest.mark.parametrize("row", [row for row in ROWS if not row[0].endswith("GB")], ids=" ".join)
def test_eight_gpus(row: list[str]) -> None:
    model, settings, rank, engine = row
    config = settings_of(settings)
    assert config.cluster.learner_ranks == config.cluster.rollout_workers == 4
    assert gib(rank_estimate(size_of(model), on_cpu=False)(config)) == rank
    assert gib(engine_estimate(size_of(model))(config)) == engine
    assert max(float(rank), float(engine)) < USABLE * 80
