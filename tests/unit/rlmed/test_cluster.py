"""What follows from a run's settings for its engines."""

from __future__ import annotations

import pytest

from rlmed.cluster import engines_sleep
from rlmed.commandline import compose_config
from rlmed.core.config import RunConfig
from rlmed.core.config_checks import ConfigError


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
    ],
)
def test_an_engine_sleeps_where_the_learner_needs_its_gpu(overrides: tuple[str, ...], cuda: bool, sleeps: bool) -> None:
    assert engines_sleep(make_config(*overrides), cuda=cuda) is sleeps


def test_what_cannot_sleep_says_so() -> None:
    with pytest.raises(ConfigError, match=r"rollout\.sleep=true needs a GPU"):
        engines_sleep(make_config(*SHARED, "rollout.sleep=true"), cuda=False)
    with pytest.raises(ConfigError, match=r"rollout\.sleep=true with rollout\.engine=native"):
        make_config("cluster=ray", "+rollout.sleep=true")
    with pytest.raises(ConfigError, match=r"max_staleness=2.*rollout\.sleep=null"):
        make_config(*SHARED, "rollout.sleep=true", "algo.max_staleness=2")


def test_a_way_for_weights_has_to_fit_the_engine() -> None:
    assert make_config(*SHARED).cluster.weight_transfer == "auto"
    assert make_config(*SHARED, "cluster.weight_transfer=ipc").cluster.weight_transfer == "ipc"
    with pytest.raises(ConfigError, match=r"cluster\.weight_transfer=nccl is a way to vLLM's engines"):
        make_config("cluster=ray", "cluster.weight_transfer=nccl")
    with pytest.raises(ConfigError, match=r"cluster\.weight_transfer='smoke'.*choose one of auto, object_store"):
        make_config("cluster=ray", "cluster.weight_transfer=smoke")
