"""A run that does not fit is refused before anything is loaded, with settings that would fit."""

from __future__ import annotations

import logging
import re

import pytest

from benchmarks.gpu.setting import GEOMETRIES
from rlmed.cluster import build
from rlmed.cluster.capacity import Estimate, local_estimate, model_size, rank_estimate, settle_memory
from rlmed.cluster.memory import GIB, PROCESS_BYTES
from rlmed.core.config.composing import compose_config
from rlmed.core.config.schema import RunConfig
from rlmed.models.size import ModelSize, meta_model


def config(*overrides: str) -> RunConfig:
    return compose_config("train", overrides)


@pytest.fixture(scope="module")
def size_2b() -> ModelSize:
    return ModelSize.of(meta_model(GEOMETRIES["2b"].config({"image_token_id": 5})))


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


def test_equal_processes_share_the_machine() -> None:
    settings = config("learner.gradient_checkpointing=false")
    size = model_size(settings)
    estimate = local_estimate(size, engines=1, pictures=0, on_cpu=True)
    one = estimate(settings).peak + PROCESS_BYTES
    assert settle_memory(settings, estimate, where="here", available=one, processes=1)
    with pytest.raises(ValueError, match="this run needs"):
        settle_memory(settings, estimate, where="here", available=one, processes=2)


def test_nothing_is_loaded_for_a_run_that_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    settings = config()
    monkeypatch.setattr(build, "free_memory", lambda _: 10 * 2**20)
    monkeypatch.setattr(build, "build_policy", lambda *_, **__: pytest.fail("the policy was loaded"))
    with pytest.raises(ValueError, match=r"this machine has 0\.0"):
        build.build_cluster(settings, None, tmp_path, checkpoint=None, on_bad_step=lambda *_: None)  # type: ignore[arg-type]
