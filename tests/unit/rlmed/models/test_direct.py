"""Weights sent from rank 0 to engines: the same bits by every transport; every wait ends."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch

from rlmed.core.weights import EngineHandle, TransferError, WeightError
from rlmed.models import direct
from rlmed.models.direct import DirectSender, DirectWeights
from rlmed.models.shared_memory import open_shared
from rlmed.models.weights import copy_weights

CPU = torch.device("cpu")
TRANSPORTS = ("gloo", "ipc")
"""By `ipc` this process's memory stands in for a GPU's: torch opens what it has shared itself."""


def weights(seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (3, 5), "b": (7,), "c": (2, 2), "d": (0,)}
    values = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return values | {"half": torch.randn(5, 3, generator=generator).bfloat16(), "turned": torch.randn(4, 3).T}


class Engine:
    """Called as Ray's actors are, in its own thread; what it has received is in `parameters`."""

    def __init__(self, number):
        self.handle = EngineHandle(f"worker {number}", number, ())
        self.parameters = {name: torch.zeros_like(value) for name, value in weights(0).items()}
        self.thread = ThreadPoolExecutor(1)
        self.answer = self.fails_after = None
        self.offers = []

    def update_weights(self, sent):
        if self.answer is not None:
            return self.answer
        self.offers.append(sent)
        return self.thread.submit(self.load, sent)

    def load(self, sent):
        if self.fails_after is None:
            copy_weights(self.parameters, [sent], CPU)
            return
        tensors = sent.tensors(CPU)
        for _ in range(self.fails_after):
            next(tensors)
        del tensors
        vars(direct._kept).clear()  # its connections end as when its process dies
        raise OSError("Traceback ...\nthe actor died")


@pytest.fixture
def engines():
    engines = [Engine(number) for number in range(2)]
    yield engines
    for engine in engines:
        engine.thread.shutdown()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(direct, "CAUSE_S", 0.5)


def failed(error):
    future = Future()
    future.set_exception(error)
    return future


class Rank:
    """Learner rank 0; it notes what it has gathered."""

    def __init__(self, values):
        self.values, self.gathered = values, []
        self.sender = DirectSender(values.items(), CPU, "127.0.0.1")

    def gather(self):
        for name, value in self.values.items():
            self.gathered.append(name)
            yield name, value

    def send(self, transport, engines, limit_s=20.0):
        self.gathered.clear()
        by_address = {engine.handle.address: engine for engine in engines}
        self.sender.send(
            transport,
            [engine.handle for engine in engines],
            lambda handle, sent: by_address[handle.address].update_weights(sent),
            self.gather(),
            limit_s,
        )


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("bucket_bytes", [1, 100, 10_000])
def test_the_bits_arrive_at_all_engines(engines, transport, bucket_bytes, monkeypatch):
    monkeypatch.setattr(direct, "BUCKET_BYTES", bucket_bytes)
    rank = Rank(weights(1))
    for _ in range(2):
        rank.send(transport, engines)
        for engine in engines:
            assert engine.parameters.keys() == rank.values.keys()
            assert all(torch.equal(engine.parameters[name], value) for name, value in rank.values.items())
        for value in rank.values.values():
            value.mul_(2)


def test_a_group_lasts_until_other_engines_come_and_shared_memory_for_one_push(engines):
    rank = Rank(weights(1))
    for used in (engines, engines, engines[:1], engines):
        rank.send("gloo", used)
    one, two = (([sent.address for sent in engine.offers]) for engine in engines)
    assert one[:2] == two[:2]
    assert (one[0] == one[1], len(set(one)), [sent.size for sent in engines[0].offers]) == (True, 3, [3, 3, 2, 3])
    rank.send("ipc", engines)
    assert rank.sender._group is None
    for engine in engines:
        assert engine.thread.submit(lambda: direct._kept.group).result() is None


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_engine_that_cannot_be_called_is_named_and_no_weight_changes(engines, transport):
    rank = Rank(weights(1))
    engines[0].answer = failed(OSError("Traceback ...\nthe actor died."))
    with pytest.raises(TransferError, match=rf"by {transport} did not reach .*worker 0: the actor died"):
        rank.send(transport, engines)
    assert rank.gathered == list(rank.values)  # the other ranks wait for each
    assert not any(tensor.any() for tensor in engines[1].parameters.values())
    engines[0].answer = None
    rank.send(transport, engines)
    assert torch.equal(engines[1].parameters["a"], rank.values["a"])


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_engine_that_says_nothing_is_named_after_the_limit(engines, transport):
    rank = Rank(weights(1))
    engines[1].answer = Future()
    with pytest.raises(TransferError, match=r"worker 1 did not answer"):
        rank.send(transport, engines, limit_s=1.0)
    assert rank.gathered == list(rank.values)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_engine_that_dies_in_a_transfer_ends_it_and_the_ranks_go_on_together(engines, transport, monkeypatch):
    monkeypatch.setattr(direct, "BUCKET_BYTES", 1)
    rank = Rank(weights(1))
    engines[1].fails_after = 2
    with pytest.raises(TransferError, match=r"worker 1: the actor died"):
        rank.send(transport, engines)
    assert rank.gathered == list(rank.values)
    engines[1].fails_after = None
    rank.send(transport, engines)
    assert all(torch.equal(engines[1].parameters[name], value) for name, value in rank.values.items())


def test_an_engine_that_hangs_in_a_transfer_is_named_after_the_limit(engines, monkeypatch):
    monkeypatch.setattr(direct, "BUCKET_BYTES", 1)
    rank, ever = Rank(weights(1)), threading.Event()
    rank.send("gloo", engines)  # to connect may take longer than the limit below

    def hang(sent):
        next(iter(sent.tensors(CPU)))
        ever.wait(60)
        direct._kept.leave()

    engines[1].load = hang
    with pytest.raises(TransferError, match=r"not done within 1 s .*worker 1 did not answer"):
        rank.send("gloo", engines, limit_s=1.0)
    ever.set()
    assert rank.gathered == list(rank.values)


def test_an_engine_that_fails_after_it_has_received_all_ends_the_push(engines):
    rank, load = Rank(weights(1)), engines[1].load

    def late(sent):
        load(sent)
        raise MemoryError("no room for the cache")

    engines[1].load = late
    with pytest.raises(TransferError, match=r"worker 1: no room for the cache"):
        rank.send("gloo", engines)


def test_weights_that_cannot_be_gathered_end_the_push_of_all(engines):
    rank = Rank(weights(1))

    def broken():
        yield from list(rank.values.items())[:2]
        raise RuntimeError("gloo: rank 1 was lost")

    rank.gather = broken
    with pytest.raises(TransferError, match=r"rank 1 was lost.*; worker 0: .*; worker 1: "):
        rank.send("gloo", engines)


def test_weights_of_another_model_are_refused_before_any_is_sent(engines):
    rank = Rank({"other": torch.ones(3)})
    with pytest.raises(TransferError, match=r"weights of other, .*not have"):
        rank.send("gloo", engines)
    part = DirectWeights("gloo", ("127.0.0.1", 1), 2, 1.0, {"a": (3, 5)}, (torch.float32,))
    with pytest.raises(WeightError, match="5 weights did not arrive"):
        copy_weights(engines[0].parameters, [part], CPU)


def test_a_gpu_is_numbered_as_its_process_numbers_it():
    opened = open_shared((lambda *arguments: arguments, tuple(range(15))), torch.device("cuda", 3))
    assert opened == (*range(6), 3, *range(7, 15))


def test_an_engine_of_several_gpus_has_a_member_for_each(engines):
    sender = Rank(weights(1)).sender
    handles = [EngineHandle("one", 1, ("gpu-1", "gpu-2")), EngineHandle("two", 2, ("gpu-3",))]
    sender._open("nccl", handles, 1.0)
    assert sender._weights.size == 4
