"""A run that does not fit is refused before anything is loaded, with settings that would fit."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.gpu.setting import GEOMETRIES
from rlmed.cluster import advice, build, capacity, commands
from rlmed.cluster.capacity import (
    MARGIN,
    Estimate,
    Machine,
    check_memory,
    engine_estimate,
    machine_estimate,
    model_size,
    rank_estimate,
    sampled_batch,
    settle_machines,
    settle_memory,
    vllm_settings,
)
from rlmed.cluster.memory import GIB, PROCESS_BYTES
from rlmed.core.config.composing import compose_config
from rlmed.core.config.schema import RunConfig
from rlmed.core.types import Example
from rlmed.data.examples import ReadResult
from rlmed.data.loading import DataFile, Dataset
from rlmed.models.loading import model_folder, resolve_dtype
from rlmed.models.policy import DTYPES, load_config
from rlmed.models.size import ModelSize, meta_model


def config(*overrides: str) -> RunConfig:
    return compose_config("train", overrides)


@pytest.fixture(scope="module")
def size_2b() -> ModelSize:
    return ModelSize.of(meta_model(GEOMETRIES["2b"].config({"image_token_id": 5})))


@pytest.fixture(autouse=True)
def eight_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where torchao is installed."""
    monkeypatch.setattr(advice, "has_eight_bits", lambda: True)


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
    text = refusal(settings, rank(size_2b), 42)
    assert "\n" not in text
    assert "GPU cuda:0 has 42.0" in text
    for term in ("optimizer 24.7", "gradients 12.3"):
        assert term in text
    for override in re.findall(r"(?:set|or) (\S+=\S+)", text):
        changed = config("model.dtype=bfloat16", override, "learner.gradient_checkpointing=true")
        assert settle_memory(changed, rank(size_2b), where="GPU", available=42 * GIB)


def test_several_settings_where_one_alone_does_not_suffice(size_2b: ModelSize) -> None:
    settings = config("model.dtype=bfloat16")
    text = refusal(settings, rank(size_2b), 26)
    together = re.search(r"set (\S+=\S+(?: [a-z]\S*=\S+)+)", text)
    assert together is not None, text
    changed = config("model.dtype=bfloat16", "learner.gradient_checkpointing=true", *together[1].split())
    assert settle_memory(changed, rank(size_2b), where="GPU", available=26 * GIB)


@pytest.mark.parametrize("available", [42, 26, 10])
def test_where_all_weights_do_not_fit_adapters_are_named_with_what_they_need(
    available: int, size_2b: ModelSize
) -> None:
    """Beside one setting that fits, beside several, and where nothing else does."""
    text = refusal(config("model.dtype=bfloat16"), rank(size_2b), available)
    adapted = config("model.dtype=bfloat16", "learner=lora", "learner.gradient_checkpointing=true")
    needed = (rank(size_2b)(adapted).peak + PROCESS_BYTES) / GIB
    assert f"learner=lora (needs {needed:.1f} GiB)" in text
    assert ("would need" in text) is (available == 10)
    assert "learner=lora" not in refusal(config("model.dtype=bfloat16"), rank(size_2b), needed - 0.1)


def test_what_fits_nowhere_is_said_to_fit_nowhere(size_2b: ModelSize) -> None:
    assert "use a smaller model" in refusal(config("model.dtype=bfloat16"), rank(size_2b), 8)


def test_advice_names_only_what_can_be_had_and_is_complete(size_2b: ModelSize, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config("model.dtype=bfloat16", "learner.freeze=[merger]")
    text = refusal(settings, rank(size_2b), 20)
    assert "learner.moments=8bit" in text
    assert "learner.freeze=[merger,vision]" in text
    monkeypatch.setattr(advice, "has_eight_bits", lambda: False)
    assert "8bit" not in refusal(settings, rank(size_2b), 20)
    monkeypatch.setattr(advice, "bfloat16_speed", lambda: 0.01)
    assert "bfloat16" not in refusal(config("model.dtype=float32", "learner.moments=bfloat16"), rank(size_2b), 20)


def machine(ranks: int, workers: int, available: int | None = None) -> Machine:
    return Machine("node 10.0.0.7", ranks, workers, available)


def test_processes_on_one_machine_are_added() -> None:
    settings = config("cluster=ray", "cluster.learner_ranks=2", "cluster.rollout_workers=3")
    size = model_size(settings)
    rank, engine = rank_estimate(size, on_cpu=True)(settings), engine_estimate(size)(settings)
    assert engine.weights > 0
    everything = machine_estimate(size, machine(2, 3), ranks=2)
    assert everything(settings).peak == 2 * rank.peak + 3 * engine.peak
    assert machine_estimate(size, machine(0, 3), ranks=2)(settings).peak == 3 * engine.peak
    # of more ranks it has as large a share
    four = config("cluster=ray", "cluster.learner_ranks=4")
    half = machine_estimate(size, machine(1, 0), ranks=2)(four)
    assert half.peak == 2 * rank_estimate(size, on_cpu=True)(four).peak
    enough = everything(settings).peak + 5 * PROCESS_BYTES
    check_memory(settings, everything, "here", enough, processes=5)
    with pytest.raises(ValueError, match="this run needs"):
        check_memory(settings, everything, "here", int(enough / MARGIN) - 1, processes=5)


def test_each_machine_of_a_cluster_is_compared_with_its_own_actors() -> None:
    settings = config("cluster=ray", "cluster.learner_ranks=2", "cluster.rollout_workers=2")
    size = model_size(settings)
    alone = machine_estimate(size, machine(0, 1), ranks=2)(settings).peak + PROCESS_BYTES
    plenty = 100 * GIB
    settled = settle_machines(settings, [machine(1, 1, plenty), machine(1, 0, plenty), machine(0, 1, alone)])
    assert settled.learner.gradient_checkpointing is False
    # it takes one with less to recompute on all
    (without,) = (
        machine_estimate(size, machine(1, 0), ranks=2)(entry).peak + PROCESS_BYTES
        for entry in [config("cluster=ray", "cluster.learner_ranks=2", "learner.gradient_checkpointing=false")]
    )
    settled = settle_machines(settings, [machine(1, 0, without - 1), machine(1, 0, plenty)])
    assert settled.learner.gradient_checkpointing is True
    with pytest.raises(ValueError, match=r"node 10\.0\.0\.7 has"):
        settle_machines(settings, [machine(2, 0, plenty), machine(0, 2, alone)])


@pytest.mark.parametrize("spare", [1.0, MARGIN])
def test_a_run_is_not_refused_by_a_hair(spare: float, size_2b: ModelSize, caplog: pytest.LogCaptureFixture) -> None:
    """Estimates are off by up to a tenth: so much too little is warned of."""
    settings = config("model.dtype=bfloat16", "learner.gradient_checkpointing=true")
    need = rank(size_2b)(settings).peak + PROCESS_BYTES
    check_memory(settings, rank(size_2b), "GPU cuda:0", int(need / spare) + 1)
    assert ("if it ends for lack of memory" in caplog.text) == (spare > 1)
    with pytest.raises(ValueError, match="this run needs"):
        check_memory(settings, rank(size_2b), "GPU cuda:0", int(need / MARGIN) - 1)


def test_who_knows_better_is_not_refused(size_2b: ModelSize, caplog: pytest.LogCaptureFixture) -> None:
    text = refusal(config("model.dtype=bfloat16"), rank(size_2b), 8)
    assert "cluster.check_memory=false starts it nevertheless" in text
    willing = config("model.dtype=bfloat16", "cluster.check_memory=false")
    settled = settle_memory(willing, rank(size_2b), "GPU cuda:0", 8 * GIB)
    assert settled.learner.gradient_checkpointing is True
    assert "GPU cuda:0 has 8.0" in caplog.text


def test_vllms_cache_on_a_cpu_counts_also_where_its_size_is_not_set() -> None:
    settings = config("cluster=ray", "rollout=vllm", "model.device=cpu")
    assert settings.rollout.kv_cache_gib is None
    size = model_size(settings)
    cache = engine_estimate(size)(settings).kv_cache
    each = settings.data.max_prompt_tokens + max(settings.rollout.max_tokens, settings.eval.max_tokens)
    tokens = settings.rollout.max_completions * each
    assert (
        cache >= size.decoder.depth * size.decoder.key_values * DTYPES[resolve_dtype(settings.model)].itemsize * tokens
    )
    assert cache == vllm_settings(settings, on_cpu=True).kv_cache_bytes(
        load_config(model_folder(settings.model.path)), on_cpu=True
    )
    assert engine_estimate(size)(config("cluster=ray", "rollout=vllm", "rollout.kv_cache_gib=3")).kv_cache == 3 * GIB


def test_visual_tokens_of_all_images_are_counted() -> None:
    one, three, many = (
        config("model.max_pixels=12544", "data.max_prompt_tokens=100", f"data.max_images={images}")
        for images in ("null", "3", "20")
    )
    size = model_size(one)
    # 112 x 112 pixels, 28 x 28 of them a token; never more than a prompt may have
    found = [sampled_batch(settings, size).visual_tokens for settings in (one, three, many)]
    assert found == [16, 48, 100]
    activations = [rank_estimate(size, on_cpu=True)(settings).activations for settings in (one, three, many)]
    assert activations == sorted(set(activations))
    without = config("model.max_pixels=null", "data.max_prompt_tokens=100")
    assert sampled_batch(without, size).visual_tokens == 100


def test_vllm_takes_as_many_images_as_the_rows_have() -> None:
    settings = config("cluster=ray", "rollout=vllm", "model.device=cpu")
    rows = [Example(str(i), Path("a"), "?", ("x", "y"), 0, more_images=(Path("b"),) * i) for i in range(3)]
    files = [
        DataFile(name, Path(name), ReadResult(Path(name), (), (), "", {}), tuple(examples), ())
        for name, examples in (("train", rows[:1]), ("test", rows[1:]), ("text", [replace(rows[0], image=None)]))
    ]
    folder = model_folder(settings.model.path)

    def limit(*read: DataFile) -> dict[str, int]:
        settled = replace(settings, data=Dataset(files[0], read).settle_images(settings.data))
        arguments = vllm_settings(settled, on_cpu=True).engine_args(folder, load_config(folder), on_cpu=True)
        return arguments["limit_mm_per_prompt"]

    assert limit(files[1]) == {"image": 3, "video": 0}
    assert limit(files[2]) == {"image": 1, "video": 0}
    assert Dataset(None, (files[2],)).settle_images(settings.data).max_images == 1


def test_evaluation_and_fine_tuning_need_no_reference_and_no_groups() -> None:
    settings = config("rollout.max_tokens=4096", "eval.max_tokens=64")
    size = model_size(settings)
    trained, tuned = (rank_estimate(size, on_cpu=True, written=written)(settings) for written in (None, 64))
    assert tuned.reference == 0 < trained.reference
    sampled, evaluated = (engine_estimate(size, sampled=sampled)(settings) for sampled in (True, False))
    assert evaluated.kv_cache < sampled.kv_cache


def test_fine_tuning_is_counted_with_the_longest_written_completion() -> None:
    settings = config("eval.max_tokens=64", "sft.batch_size=1")
    size = model_size(settings)
    short, long = (rank_estimate(size, on_cpu=True, written=written)(settings) for written in (8, 800))
    assert short.activations < long.activations
    others = config("eval.max_tokens=1024", "sft.batch_size=1")
    assert rank_estimate(size, on_cpu=True, written=800)(others).activations == long.activations


def test_an_engine_beside_the_learner_is_part_of_the_advice(size_2b: ModelSize) -> None:
    settings = config("model.dtype=bfloat16", "rollout.max_completions=64")
    estimate = rank_estimate(size_2b, on_cpu=False, beside=lambda run: run.rollout.max_completions * GIB)
    assert "rollout.max_completions=32" in refusal(settings, estimate, 90)


def start(settings: RunConfig, folder: Path) -> object:
    return build.build_cluster(settings, None, folder, checkpoint=None, on_bad_step=lambda *_: None)  # type: ignore[arg-type]


def fine_tune(settings: RunConfig, folder: Path) -> object:
    return commands.build_finetuning(settings, None, folder, checkpoint=None, steps=1, longest=8)  # type: ignore[arg-type]


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
