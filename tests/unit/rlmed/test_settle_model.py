"""What CPU probes decide is decided once for all processes of a run, and kept on resuming."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rlmed.cluster import build as cluster
from rlmed.cluster import engines
from rlmed.cluster.engines import build_policy, settle_model
from rlmed.core.config.composing import compose_config
from rlmed.core.config.schema import RunConfig
from rlmed.models.loading import model_folder
from rlmed.recording.inputs import VERSIONS_FILE, write_versions

BFLOAT16 = "model.dtype=bfloat16"


def make_config(*overrides: str) -> RunConfig:
    return compose_config("train", ["model.onednn=[few_rows]", "model.compiled_decode=false", *overrides])


@pytest.fixture
def speeds(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the next probes of bfloat16 will say; one that is not expected fails."""
    answers: list[float] = []
    monkeypatch.setattr(engines, "bfloat16_speed", lambda: answers.pop(0))
    return answers


@pytest.mark.parametrize(
    ("speed", "dtype"), [(0.004, "float32"), (0.49, "float32"), (0.51, "bfloat16"), (3.0, "bfloat16")]
)
def test_a_slow_bfloat16_becomes_float32_and_it_is_said(
    speeds: list[float], speed: float, dtype: str, caplog: pytest.LogCaptureFixture
) -> None:
    speeds.append(speed)
    with caplog.at_level(logging.WARNING):
        assert settle_model(make_config(BFLOAT16).model, engines=1).dtype == dtype
    assert (f"at {speed} of float32's speed" in caplog.text) == (dtype == "float32")


@pytest.mark.parametrize("asked", ["auto", "float32"])
def test_nothing_is_measured_where_bfloat16_was_not_asked_for(speeds: list[float], asked: str) -> None:
    assert settle_model(make_config(f"model.dtype={asked}").model, engines=1).dtype == "float32"


@pytest.mark.parametrize("speed", [0.1, 2.0])
def test_no_process_decides_again(speeds: list[float], speed: float) -> None:
    speeds.append(speed)
    settled = settle_model(make_config(BFLOAT16).model, engines=1)
    # as in a worker or a rank
    policy = build_policy(settled, model_folder(settled.path), threads=None)
    assert policy.dtype == (torch.float32 if speed < 1 else torch.bfloat16)
    assert speeds == []


@pytest.mark.parametrize(("before", "now"), [(0.1, 2.0), (2.0, 0.1), (0.49, 0.51), (0.51, 0.49)])
def test_a_resumed_run_keeps_its_dtype(
    tmp_path: Path, speeds: list[float], before: float, now: float, caplog: pytest.LogCaptureFixture
) -> None:
    speeds += [before, now, now, now]
    settled = settle_model(make_config(BFLOAT16).model, engines=1)
    path = write_versions(tmp_path, settled)
    caplog.clear()
    assert settle_model(make_config(BFLOAT16).model, engines=1, resumed=tmp_path) == settled
    assert ("resumed run stays in bfloat16" in caplog.text) == (now < 0.5)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"cpu": "another"}))
    assert settle_model(make_config(BFLOAT16).model, engines=1, resumed=tmp_path).dtype == settled.dtype
    # what lies in a folder whose run begins anew does not count
    speeds[:] = [now]
    assert settle_model(make_config(BFLOAT16).model, engines=1).dtype == ("float32" if now < 0.5 else "bfloat16")


def test_a_run_of_an_earlier_version_is_measured_anew(tmp_path: Path, speeds: list[float]) -> None:
    speeds += [2.0, 2.0]
    (tmp_path / VERSIONS_FILE).write_text("{}")
    assert settle_model(make_config(BFLOAT16).model, engines=1, resumed=tmp_path).dtype == "bfloat16"
    assert settle_model(make_config(BFLOAT16).model, engines=1, resumed=tmp_path / "none").dtype == "bfloat16"


@pytest.mark.parametrize(("device", "gpus"), [("auto", False), ("auto", True), ("cpu", False), ("cuda", True)])
def test_actors_on_gpus_get_what_was_asked_for_and_actors_on_cpus_what_was_settled(
    monkeypatch: pytest.MonkeyPatch, speeds: list[float], device: str, gpus: bool
) -> None:
    ray_session = pytest.importorskip("rlmed.cluster.ray_session")
    given: list[RunConfig] = []

    def start(config: RunConfig, *_: object) -> SimpleNamespace:
        given.append(cluster._for_process(config, 2))
        return SimpleNamespace(close=lambda: None, channel=lambda: SimpleNamespace(close=lambda: None))

    speeds += [] if device == "cuda" else [0.1]
    monkeypatch.setattr(ray_session, "start_ray", lambda config: lambda: None)
    monkeypatch.setattr(ray_session, "on_gpus", lambda device: gpus)
    monkeypatch.setattr(ray_session, "place_actors", lambda *_, **__: ([{}], [{}]))
    monkeypatch.setattr(cluster, "_start_workers", start)
    monkeypatch.setattr(cluster, "_start_learner", start)
    config = make_config("cluster=ray", BFLOAT16, f"model.device={device}")
    built = cluster.build_cluster(config, None, Path(), checkpoint=None, on_bad_step=lambda *_: None)  # type: ignore[arg-type]
    expected = "bfloat16" if gpus else "float32"
    assert [each.model.dtype for each in given] == [expected] * 2
    assert built.model == (config.model if gpus else dataclasses.replace(config.model, dtype="float32", device="cpu"))
    assert speeds == []
