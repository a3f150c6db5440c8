"""What follows from a run's settings for its engines."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlmed.cluster import build as cluster
from rlmed.cluster import capacity
from rlmed.cluster.build import engines_sleep, idle_processes
from rlmed.cluster.engines import memory_share
from rlmed.core.config.checks import ConfigError
from rlmed.core.config.composing import compose_config
from rlmed.core.config.schema import RunConfig
from tests.configs import renderer_of


def make_config(*overrides: str) -> RunConfig:
    return compose_config("train", overrides)


SHARED = ("cluster=ray_1gpu", "rollout=vllm")


@pytest.mark.parametrize(
    ("overrides", "cuda", "sleeps"),
    [
        (SHARED, True, True),
        (SHARED, False, False),
        ((*SHARED, "rollout.sleep=false"), True, False),
        ((*SHARED, "algo.max_staleness=1"), True, False),
        (("cluster=ray_1gpu", "rollout=native"), True, False),
        (("cluster=ray", "rollout=vllm"), True, False),
        (("cluster=ray", "rollout=vllm", "rollout.sleep=true"), True, True),
        # no learner wakes them with new weights
        ((*SHARED, "+debug=rollouts_only"), True, False),
        ((*SHARED, "+debug=rollouts_only", "rollout.sleep=true"), True, False),
    ],
)
def test_an_engine_sleeps_where_the_learner_needs_its_gpu(overrides: tuple[str, ...], cuda: bool, sleeps: bool) -> None:
    assert engines_sleep(make_config(*overrides), cuda=cuda) is sleeps


@pytest.mark.parametrize(
    ("overrides", "share"),
    [
        (("cluster=ray", "rollout=vllm"), 0.8),
        (("cluster=ray", "rollout=vllm", "cluster.gpus_per_worker=2"), 0.8),
        (SHARED, 0.4),
        ((*SHARED, "rollout.gpu_memory_utilization=0.7"), 0.7),
    ],
)
def test_an_engine_on_a_part_of_a_gpu_leaves_the_rest_to_the_learner(overrides: tuple[str, ...], share: float) -> None:
    config = make_config(*overrides)
    assert memory_share(config.rollout, config.cluster) == pytest.approx(share)


@pytest.mark.parametrize(
    ("preset", "expected"),
    [("ray", ["workers start", "learner"]), ("ray_1gpu", ["learner", "workers start", "workers are ready"])],
)
def test_on_one_gpu_learner_and_engine_do_not_allocate_at_the_same_time(
    preset: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM measures free memory at its start, and takes what is gone meanwhile for its own."""
    ray_session = pytest.importorskip("rlmed.cluster.ray_session")
    events: list[str] = []

    class Workers:
        def __init__(self, *_: object) -> None:
            events.append("workers start")

        def wait_until_ready(self) -> None:
            events.append("workers are ready")

        def channel(self) -> SimpleNamespace:
            return SimpleNamespace(close=lambda: None)

        def close(self) -> None:
            events.append("workers end")

    def learner(*_: object) -> SimpleNamespace:
        events.append("learner")
        return SimpleNamespace(close=lambda: events.append("learner ends"))

    monkeypatch.setattr(ray_session, "start_ray", lambda config: lambda: None)
    monkeypatch.setattr(ray_session, "on_gpus", lambda device: True)
    monkeypatch.setattr(ray_session, "place_actors", lambda *_, **__: ([{}], [{}]))
    monkeypatch.setattr(cluster, "_start_workers", Workers)
    monkeypatch.setattr(cluster, "_start_learner", learner)
    built = cluster.build_ray(make_config(f"cluster={preset}", "rollout=vllm"), None, None, lambda *_: None)
    assert events == expected
    events.clear()
    built.close()
    assert sorted(events) == ["learner ends", "workers end"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("+experiment=medvqa_600", "profile=paper", "cluster=ray_8gpu"), []),
        (("cluster=ray_8gpu",), []),
        (("cluster=ray", "cluster.rollout_workers=6"), [r"rollout_workers=6 exceeds the 4 groups .* 2 will be idle"]),
        (("cluster=ray", "cluster.rollout_workers=6", "algo.max_staleness=1"), []),
        (
            ("cluster=ray", "cluster.rollout_workers=12", "algo.max_staleness=1"),
            [r"exceeds the 8 groups .* 4 will be idle .*=8 or less, or algo\.groups_per_step=6"],
        ),
        (
            ("cluster=ray", "cluster.learner_ranks=20"),
            [r"learner_ranks=20 exceeds the 16 completions .* 4 will be idle: set cluster\.learner_ranks=16"],
        ),
        (("cluster=ray", "cluster.learner_ranks=20", "+debug=rollouts_only"), []),
    ],
)
def test_processes_without_work_are_named(overrides: tuple[str, ...], said: list[str]) -> None:
    lines = idle_processes(make_config(*overrides))
    assert len(lines) == len(said)
    for line, pattern in zip(lines, said, strict=True):
        assert re.search(pattern, line)


def test_an_engine_over_several_gpus_needs_all_of_them() -> None:
    for gpus in ("null", "2"):
        make_config("cluster=ray", "rollout=vllm", "rollout.tensor_parallel_size=2", f"cluster.gpus_per_worker={gpus}")
    with pytest.raises(
        ConfigError, match=r"cluster\.gpus_per_worker=0\.5 is less than rollout\.tensor_parallel_size=2"
    ):
        make_config(*SHARED, "rollout.tensor_parallel_size=2")


def test_what_cannot_sleep_says_so() -> None:
    with pytest.raises(ConfigError, match=r"rollout\.sleep=true needs a GPU"):
        engines_sleep(make_config(*SHARED, "rollout.sleep=true"), cuda=False)
    with pytest.raises(ConfigError, match=r"rollout\.sleep=true with rollout\.engine=native"):
        make_config("cluster=ray", "rollout.sleep=true")
    with pytest.raises(ConfigError, match=r"max_staleness=2.*rollout\.sleep=null"):
        make_config(*SHARED, "rollout.sleep=true", "algo.max_staleness=2")


def test_a_share_of_a_gpu_that_is_not_there_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pytest.importorskip("rlmed.cluster.ray_session"), "on_gpus", lambda device: False)
    with pytest.raises(ConfigError, match=r"gpu_memory_utilization=0\.3 needs a GPU.* set rollout\.kv_cache_gib"):
        cluster._start_workers(make_config(*SHARED, "rollout.gpu_memory_utilization=0.3"), [{}])


@pytest.mark.parametrize(("staleness", "shared"), [(0, True), (1, False)])
def test_on_policy_one_engine_trains_and_evaluates(staleness: int, shared: bool, tmp_path: Path) -> None:
    """Its pages and graphs are there once; nothing of training is in flight in an evaluation."""
    config = make_config(f"algo.max_staleness={staleness}", "model.dtype=float32", "model.onednn=[]")
    built = cluster.build_cluster(
        config, renderer_of(config), tmp_path, checkpoint=None, on_bad_step=lambda *_: pytest.fail("a bad step")
    )
    assert (built.evaluation_pool is built.pool) == shared
    built.close()


@pytest.mark.parametrize(
    ("resume", "checkpoint", "resumed"), [(None, None, False), ("auto", None, False), ("auto", Path("step-1"), True)]
)
def test_only_a_run_that_goes_on_is_kept_from_changing_its_settings(
    resume: str | None, checkpoint: Path | None, resumed: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(capacity, "free_memory", lambda _: 100 * 2**20)
    monkeypatch.setattr(cluster, "build_policy", lambda *_, **__: pytest.fail("the policy was loaded"))
    config = make_config(f"resume={resume or 'null'}", "model.dtype=float32", "model.onednn=[]")
    with pytest.raises(ValueError, match="this run needs") as caught:
        cluster.build_cluster(config, None, tmp_path, checkpoint=checkpoint, on_bad_step=lambda *_: None)  # type: ignore[arg-type]
    assert ("learner.token_budget=" not in str(caught.value)) == resumed


def test_a_way_for_weights_has_to_fit_the_engine() -> None:
    assert make_config(*SHARED).cluster.weight_transfer == "auto"
    assert make_config(*SHARED, "cluster.weight_transfer=ipc").cluster.weight_transfer == "ipc"
    assert make_config("cluster=ray", "cluster.weight_transfer=nccl").cluster.weight_transfer == "nccl"
    assert make_config("cluster=ray", "cluster.weight_transfer=ipc").cluster.weight_transfer == "ipc"
    with pytest.raises(ConfigError, match=r"cluster\.weight_transfer='smoke'.*auto, object_store"):
        make_config("cluster=ray", "cluster.weight_transfer=smoke")
