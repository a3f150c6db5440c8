"""Weights broadcast from rank 0 to engines: the same bits, and an end for every wait."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch

from rlmed.core.weights import EngineHandle, NotConnectedError, TransferError
from rlmed.models import direct
from rlmed.models.direct import GLOO, DirectReceiver, DirectSender

CPU = torch.device("cpu")
ENGINES = [EngineHandle(f"worker {number}", number, ()) for number in range(2)]


def weights(seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (3, 5), "b": (7,), "c": (2, 2), "d": (0,)}
    values = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return values | {"half": torch.randn(5, 3, generator=generator).bfloat16(), "turned": torch.randn(4, 3).T}


class Engines:
    """Two receivers in threads, called as Ray's actors are."""

    def __init__(self, *receivers):
        self.receivers = receivers
        self.threads = [ThreadPoolExecutor(1) for _ in receivers]
        self.fails = None

    def __call__(self, engine, stage, *arguments) -> Future[None]:
        if (engine.address, stage) == self.fails:
            failed = Future()
            failed.set_exception(RuntimeError("the actor died"))
            return failed
        if (engine.address, stage, "silent") == self.fails:
            return Future()
        arguments = () if stage == "finish_update" else arguments
        receiver = self.receivers[engine.address]
        return self.threads[engine.address].submit(getattr(receiver, stage), *arguments)


@pytest.fixture
def engines():
    return Engines(*(DirectReceiver({n: torch.zeros_like(v) for n, v in weights(0).items()}, CPU) for _ in ENGINES))


def sender_of(values, limit_s=10.0):
    return DirectSender(lambda: iter(values.items()), CPU, limit_s)


@pytest.mark.parametrize("bucket_bytes", [1, 100, 10_000])
def test_the_bits_arrive_at_all_engines(engines, bucket_bytes, monkeypatch):
    monkeypatch.setattr(direct, "BUCKET_BYTES", bucket_bytes)
    values = weights(1)
    sender = sender_of(values)
    sender.connect(GLOO, ENGINES, engines, "127.0.0.1")
    for version in (1, 2):
        sender.send(version)
        for receiver in engines.receivers:
            assert all(torch.equal(receiver._parameters[name], value) for name, value in values.items())
        for value in values.values():
            value.mul_(2)


@pytest.mark.parametrize("stage", ["begin_update", "receive", "finish_update"])
@pytest.mark.parametrize("how", [(), ("silent",)])
def test_an_engine_that_dies_or_says_nothing_ends_the_push(engines, stage, how):
    gathered = []

    def gather():
        for name, value in weights(1).items():
            gathered.append(name)
            yield name, value

    sender = DirectSender(gather, CPU, 2.0)
    sender.connect(GLOO, ENGINES, engines, "127.0.0.1")
    engines.fails = (1, stage, *how)
    with pytest.raises(TransferError, match=r"version 3 .*not reach .*worker 1 "):
        sender.send(3)
    assert gathered == list(weights(1))  # the other ranks wait for each
    engines.fails = None
    sender.connect(GLOO, ENGINES, engines, "127.0.0.1")
    sender.send(4)


def test_an_engine_that_cannot_connect_is_named(engines):
    engines.fails = (0, "connect")
    with pytest.raises(NotConnectedError, match=r"gloo: worker 0 .*connect: .*died"):
        sender_of(weights(1), limit_s=2.0).connect(GLOO, ENGINES, engines, "127.0.0.1")


def test_weights_of_another_model_end_the_push(engines):
    sender = sender_of({"other": torch.ones(3)}, limit_s=2.0)
    sender.connect(GLOO, ENGINES, engines, "127.0.0.1")
    with pytest.raises(TransferError, match=r"weights of other, .*not have"):
        sender.send(1)
    sender = sender_of({"a": torch.ones(3, 5)}, limit_s=2.0)
    sender.connect(GLOO, ENGINES, engines, "127.0.0.1")
    with pytest.raises(TransferError, match="5 weights did not arrive"):
        sender.send(1)
