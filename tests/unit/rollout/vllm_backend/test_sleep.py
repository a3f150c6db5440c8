"""In which order the engine sleeps, wakes and takes weights; vLLM's engine is a stand-in."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen2Config

from rlmed.core.weights import WeightError
from rlmed.models.weights import make_buckets

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]
WEIGHTS = {"model.a": torch.ones(2), "model.b": torch.ones(3)}


class Core:
    """Stands in for `vllm.LLMEngine`; loads what it is given under the same names."""

    def __init__(self):
        self.calls = []
        self.fails = None
        self.ignores = None

    def sleep(self, level):
        self.calls.append(f"sleep {level}")

    def wake_up(self, tags):
        self.calls.append(f"wake {' '.join(tags)}")

    def collective_rpc(self, method, args=()):
        self.calls.append(method.__name__)
        if self.fails == method.__name__:
            raise RuntimeError("they do not arrive")
        names = {name for part in args for name in part.shapes} if args else set(WEIGHTS)
        return [names - {self.ignores} if args else names]

    def set_weight_version(self, version):
        self.calls.append(f"version {version}")

    def get_num_unfinished_requests(self):
        return 0


@pytest.fixture
def make_engine():
    from rollout.vllm_backend.engine import VllmEngine
    from rollout.vllm_backend.settings import VllmSettings

    def make(*, sleep=True):
        engine = object.__new__(VllmEngine)
        engine.settings = VllmSettings(sleep=sleep)
        engine.policy_version = engine._epoch = 0
        engine._core, engine._running, engine._scheduler = Core(), {}, []
        engine._asleep = set()
        engine._shapes = {name: tuple(tensor.shape) for name, tensor in WEIGHTS.items()}
        engine._damaged = False
        engine._restart_groups_without_tokens = lambda: None
        return engine

    return make


def test_weights_wake_before_they_come_and_the_cache_after_that(make_engine):
    engine = make_engine()
    engine.sleep()
    engine.sleep()  # as told twice
    engine.update_weights(4, list(make_buckets(WEIGHTS.items())))
    received = ["begin_load", "load", "end_load"]
    assert engine._core.calls == ["sleep 2", "wake weights", *received, "wake kv_cache", "version 4"]
    engine._core.calls.clear()
    engine.update_weights(5, list(make_buckets(WEIGHTS.items())))
    assert engine._core.calls == [*received, "version 5"]  # awake already


def test_after_sleep_all_weights_have_to_come(make_engine):
    engine = make_engine()
    engine.sleep()
    with pytest.raises(WeightError, match="mixture"):
        engine.step()
    with pytest.raises(WeightError, match=r"1 weights .*\bmodel\.b\b"):
        engine.update_weights(1, list(make_buckets([("model.a", WEIGHTS["model.a"])])))
    with pytest.raises(WeightError, match="mixture"):
        engine.step()
    assert "wake kv_cache" not in engine._core.calls


def test_weights_that_do_not_arrive_leave_vllm_whole_and_the_engine_waiting_for_others(make_engine):
    engine, weights = make_engine(), list(make_buckets(WEIGHTS.items()))
    engine._core.fails = "load"
    with pytest.raises(RuntimeError, match="they do not arrive"):
        engine.update_weights(4, weights)
    assert engine._core.calls == ["begin_load", "load", "end_load"]
    with pytest.raises(WeightError, match="mixture"):
        engine.step()
    engine._core.fails = None
    engine.update_weights(4, weights)
    assert (engine.policy_version, engine._damaged) == (4, False)


def test_weights_that_vllm_drops_are_named_and_nothing_is_sampled(make_engine):
    engine, weights = make_engine(), list(make_buckets(WEIGHTS.items()))
    engine._core.ignores = "model.b"
    with pytest.raises(WeightError, match=r"kept 1 old .*\bmodel\.b\b"):
        engine.update_weights(4, weights)
    assert engine.policy_version == 0
    with pytest.raises(WeightError, match="mixture"):
        engine.step()
    engine._core.ignores = None
    engine.update_weights(4, weights)
    assert engine.policy_version == 4


def test_an_engine_with_work_or_made_without_sleep_stays_awake(make_engine):
    working, plain = make_engine(), make_engine(sleep=False)
    working._running = {"0": SimpleNamespace()}
    for engine in (working, plain):
        engine.sleep()
        assert engine._core.calls == []
        assert not engine._damaged


def test_vllm_is_asked_for_sleep_mode_and_not_on_a_cpu():
    from vllm import EngineArgs

    from rollout.vllm_backend.settings import VllmSettings

    config = Qwen2Config()
    for sleep in (True, False):
        arguments = VllmSettings(sleep=sleep).engine_args(Path("folder"), config, on_cpu=False)
        assert EngineArgs(**arguments).enable_sleep_mode is sleep
    with pytest.raises(ValueError, match=r"rollout\.sleep=true .*needs a GPU"):
        VllmSettings(sleep=True).engine_args(Path("folder"), config, on_cpu=True)
