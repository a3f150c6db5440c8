"""A run that does not fit is refused before anything is loaded, with settings that would fit."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.gpu.setting import GEOMETRIES
from rlmed.cluster import build, capacity, commands
from rlmed.cluster.capacity import (
    Estimate,
    check_memory,
    engine_estimate,
    machine_estimate,
    model_size,
    rank_estimate,
    settle_memory,
)
from rlmed.cluster.memory import GIB, PROCESS_BYTES
from rlmed.core.config.composing import compose_config
from rlmed.core.config.schema import RunConfig
from rlmed.models.size import ModelSize, meta_model


def config(*overrides: str) -> RunConfig:
    return compose_config("train", overrides)


@pytest.fixture(scope="module")
def size_2b() -> ModelSize:
    return ModelSize.of(meta_model(GEOMETRIES["2b"].config({"image_token_id": 5})))


@pytest.fixture(autouse=True)
def eight_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where torchao is installed."""
    monkeypatch.setattr(capacity, "has_eight_bits", lambda: True)


def rank(size: ModelSize) -> Estimate:
    return rank_estimate(size, on_cpu=False)


def refusal(settings: RunConfig, estimate: Estimate, gib: float) -> str:
    with pytest.raises(ValueError, match="this run needs") as caught:
        settle_memory(settings, estimate, where="GPU cuda:0", available=int(gib * GIB))
    return str(caught.value)


def test_a_run_that_fits_is_left_alone(size_2b: ModelSize) -> None:
    settings = config("model.dtype=bfloat16", "learner.gradient_checkpointing=false")
    assert settle_memory(settings, rank(size_2b), where="GPU", available=200 * GIB) == settings
    assert settle_memory(settings, rank(size_2b), where="GPU", available=None) == settings


@pytest.mark.parametrize(("spare", "recomputes"), [(0, False), (-1, True)])
def test_activations_are_recomputed_only_where_memory_would_not_suffice(
    spare: int, recomputes: bool, size_2b: ModelSize, caplog: pytest.LogCaptureFixture
) -> None:
    settings = config("model.dtype=bfloat16")
    assert settings.learner.gradient_checkpointing is None
    available = rank(size_2b)(settings).peak + PROCESS_BYTES + spare
    with caplog.at_level(logging.INFO):
        settled = settle_memory(settings, rank(size_2b), where="GPU cuda:0", available=available)
    assert settled.learner.gradient_checkpointing is recomputes
    assert ("learner.gradient_checkpointing: on" in caplog.text) is recomputes


def test_a_refusal_names_needs_terms_and_settings_that_fit(size_2b: ModelSize) -> None:
    settings = config("model.dtype=bfloat16")
    text = refusal(settings, rank(size_2b), 44)
    assert "\n" not in text
    assert "GPU cuda:0 has 44.0" in text
    for term in ("optimizer 24.7", "gradients 12.3"):
        assert term in text
    for override in re.findall(r"(?:set|or) (\S+=\S+)", text):
        changed = config("model.dtype=bfloat16", override, "learner.gradient_checkpointing=true")
        assert settle_memory(changed, rank(size_2b), where="GPU", available=44 * GIB)


def test_several_settings_where_one_alone_does_not_suffice(size_2b: ModelSize) -> None:
    settings = config("model.dtype=bfloat16")
    text = refusal(settings, rank(size_2b), 26)
    together = re.search(r"set (\S+=\S+(?: \S+=\S+)+)", text)
    assert together is not None, text
    changed = config("model.dtype=bfloat16", "learner.gradient_checkpointing=true", *together[1].split())
    assert settle_memory(changed, rank(size_2b), where="GPU", available=26 * GIB)


def test_what_fits_nowhere_is_said_to_fit_nowhere(size_2b: ModelSize) -> None:
    assert "use a smaller model" in refusal(config("model.dtype=bfloat16"), rank(size_2b), 8)


def test_advice_names_only_what_can_be_had_and_is_complete(size_2b: ModelSize, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config("model.dtype=bfloat16", "learner.freeze=[merger]")
    text = refusal(settings, rank(size_2b), 20)
    assert "learner.moments=8bit" in text
    assert "learner.freeze=[merger,vision]" in text
    monkeypatch.setattr(capacity, "has_eight_bits", lambda: False)
    assert "8bit" not in refusal(settings, rank(size_2b), 20)
    monkeypatch.setattr(capacity, "bfloat16_speed", lambda: 0.01)
    assert "bfloat16" not in refusal(config("model.dtype=float32", "learner.moments=bfloat16"), rank(size_2b), 20)


def test_processes_on_one_machine_are_added() -> None:
    settings = config("cluster=ray", "cluster.learner_ranks=2", "cluster.rollout_workers=3")
    size = model_size(settings)
    rank, engine = rank_estimate(size, on_cpu=True)(settings), engine_estimate(size)(settings)
    assert engine.weights > 0
    everything = machine_estimate(size, learns=True, sampled=True)
    assert everything(settings).peak == 2 * rank.peak + 3 * engine.peak
    assert machine_estimate(size, learns=False, sampled=True)(settings).peak == 3 * engine.peak
    enough = everything(settings).peak + 5 * PROCESS_BYTES
    check_memory(settings, everything, where="here", available=enough, processes=5)
    with pytest.raises(ValueError, match="this run needs"):
        check_memory(settings, everything, where="here", available=enough - 1, processes=5)


def test_evaluation_and_fine_tuning_need_no_reference_and_no_groups() -> None:
    settings = config("rollout.max_tokens=4096", "eval.max_tokens=64")
    size = model_size(settings)
    trained, tuned = (rank_estimate(size, on_cpu=True, sampled=sampled)(settings) for sampled in (True, False))
    assert tuned.reference == 0 < trained.reference
    sampled, evaluated = (engine_estimate(size, sampled=sampled)(settings) for sampled in (True, False))
    assert evaluated.kv_cache < sampled.kv_cache


def start(settings: RunConfig, folder: Path) -> object:
    return build.build_cluster(settings, None, folder, checkpoint=None, on_bad_step=lambda *_: None)  # type: ignore[arg-type]


def fine_tune(settings: RunConfig, folder: Path) -> object:
    return commands.build_finetuning(settings, None, folder, checkpoint=None, steps=1)  # type: ignore[arg-type]


def evaluate(settings: RunConfig, _: Path) -> object:
    return commands.build_sampling(settings, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("command", [start, fine_tune, evaluate])
def test_nothing_is_loaded_for_a_run_that_is_refused(
    command: Callable[[RunConfig, Path], object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(capacity, "free_memory", lambda _: 10 * 2**20)
    for module in (build, commands):
        monkeypatch.setattr(module, "build_policy", lambda *_, **__: pytest.fail("the policy was loaded"))
    with pytest.raises(ValueError, match=r"this machine has 0\.0"):
        command(config(), tmp_path)
