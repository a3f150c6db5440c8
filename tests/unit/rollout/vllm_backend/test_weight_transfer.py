"""Both sides of vLLM's weight transfer, its own code and messages; own memory for NCCL and IPC."""

from __future__ import annotations

import contextlib
import importlib.util
import queue
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from rlmed.core.protocols import ClusterError
from rlmed.core.weights import NotConnectedError, TransferError
from rollout.vllm_backend.environment import import_vllm

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]
SHAPES = {"a.weight": (3, 5), "b.weight": (64, 2), "c.bias": (7,), "d.weight": (1, 40)}
BUFFER = 512
"""Bytes of a chunk: these weights need two."""


class Group:
    """Stands in for NCCL's group of a rank: `broadcast` of the root reaches every other rank."""

    disabled = False

    def __init__(self, rank, network):
        self.rank, self.network, self.destroyed = rank, network, threading.Event()

    def broadcast(self, tensor, src, stream=None):
        if self.rank == src:
            for rank, mailbox in self.network.items():
                mailbox.put(tensor.clone())
                # as a rank that waits for a peer does, until its group is aborted
                if rank in self.network.stuck:
                    self.destroyed.wait(600)
                    raise RuntimeError("NCCL error: aborted")
        else:
            tensor.copy_(self.network[self.rank].get(timeout=60))

    def destroy(self):
        self.destroyed.set()


class Network(dict):
    """Mailboxes by rank."""

    def __init__(self):
        super().__init__()
        self.stuck = set()
        self.root = None


class Toy(torch.nn.Module):
    """A model as far as weights are loaded into it."""

    def __init__(self):
        super().__init__()
        self.loaded = {}

    def load_weights(self, weights):
        self.loaded |= {name: tensor.clone() for name, tensor in weights}


class Worker:
    """An engine in another process, its `EngineHandle`: vLLM's half, a toy, a thread per GPU."""

    answering: ClassVar[list[threading.Thread]] = []

    def __init__(self, name, gpus=1):
        from rollout.vllm_backend.weight_transfer import WeightTransfer

        self.name, self.devices = name, tuple(f"{name}-gpu-{gpu}" for gpu in range(gpus))
        self.models = [Toy() for _ in range(gpus)]
        self.halves = []
        for rank, model in enumerate(self.models):
            parallel = SimpleNamespace(data_parallel_index=0, world_size=gpus, rank=rank)
            config = SimpleNamespace(parallel_config=parallel, model_config=None)
            self.halves.append(WeightTransfer(None, config, torch.device("cpu"), model))
        self.calls, self.threads = [], ThreadPoolExecutor(gpus)
        self.answers = {}

    def connect(self, transport, info):
        return self._all(
            "connect",
            "init_transfer_engine",
            lambda half: half.parse_init_info({"transport": transport, "info": dict(info)}),
        )

    def begin_update(self):
        return self._all("begin", "start_weight_update")

    def receive(self, info):
        self.info = info
        return self._all("receive", "receive_weights", lambda half: half.parse_update_info({"direct": dict(info)}))

    def finish_update(self, version):
        self.version = version
        return self._all("finish", "finish_weight_update")

    def _all(self, call, method, argument=None):
        self.calls.append(call)
        if call in self.answers:
            return self.answers[call]

        def run():
            jobs = [
                self.threads.submit(getattr(half, method), *([argument(half)] if argument else []))
                for half in self.halves
            ]
            for job in jobs:
                job.result(timeout=60)

        done = Future()

        def answer():
            try:
                done.set_result(run())
            except Exception as error:
                done.set_exception(error)

        thread = threading.Thread(target=answer, daemon=True)
        self.answering.append(thread)
        thread.start()
        return done


def call(worker, stage, *arguments):
    return getattr(worker, stage)(*arguments)


@pytest.fixture
def network(monkeypatch):
    """NCCL, CUDA's streams and the layerwise reload replaced; the rest is vLLM's."""
    import_vllm()
    from vllm.distributed.weight_transfer import nccl_engine, packed_tensor

    from rollout.vllm_backend import weight_transfer

    network = Network()

    def join_worker(info, parallel):
        assert (info.master_address, info.master_port > 0, info.packed) == ("10.0.0.1", True, True)
        rank = info.rank_offset + parallel.rank
        assert rank not in network
        assert rank < info.world_size
        network[rank] = queue.Queue()
        return Group(rank, network)

    def join_learner(info):
        network.root = Group(0, network)
        network.size = info.world_size
        return network.root

    monkeypatch.setattr(nccl_engine, "worker_init_process_group", join_worker)
    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", join_learner)
    stream = SimpleNamespace(synchronize=lambda: None)
    monkeypatch.setattr(packed_tensor, "_get_streams", lambda index, count: (stream,) * count)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    reload = "vllm.model_executor.model_loader.reload"
    for name in ("initialize_layerwise_reload", "finalize_layerwise_reload"):
        monkeypatch.setattr(f"{reload}.{name}", lambda *_: None)
        monkeypatch.setattr(weight_transfer, name, lambda *_: None)
    monkeypatch.setattr(weight_transfer, "BUCKET_BYTES", BUFFER)
    yield network
    # an engine that still waits for a weight need not wait until its limit
    for arriving in network.values():
        arriving.put(None)
    while Worker.answering:  # before the next test has a network of its own
        Worker.answering.pop().join(timeout=30)


class Learner:
    """Weights that count how often, and how far, they were gathered."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.weights = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        self.gathered = []

    def gather(self):
        for name, tensor in self.weights.items():
            self.gathered.append(name)
            yield name, tensor

    def sender(self, limit_s=60.0):
        from rollout.vllm_backend.weight_transfer import WeightTransferSender

        shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in self.weights.items()}
        return WeightTransferSender(shapes, self.gather, torch.device("cpu"), limit_s)


@pytest.fixture
def learner():
    return Learner()


def has_the_weights_of(worker, learner):
    return all(
        model.loaded.keys() == learner.weights.keys()
        and all(tensor.equal(learner.weights[name]) for name, tensor in model.loaded.items())
        for model in worker.models
    )


def test_every_gpu_of_every_engine_receives_all_weights_by_nccl(network, learner):
    workers, sender = [Worker("one"), Worker("two", gpus=2), Worker("three")], learner.sender()
    sender.connect("nccl", workers, call, "10.0.0.1")
    assert (network.size, sorted(network)) == (5, [1, 2, 3, 4])
    for version in (3, 4):
        learner.weights = {name: tensor + version for name, tensor in learner.weights.items()}
        sender.send(version)
        for worker in workers:
            assert has_the_weights_of(worker, learner)
            assert worker.version == version
    assert workers[1].calls == ["connect"] + 2 * ["begin", "receive", "finish"]
    assert list(zip(workers[0].info["names"], workers[0].info["shapes"], strict=True)) == [
        (name, list(shape)) for name, shape in SHAPES.items()
    ]
    assert learner.gathered == 2 * list(SHAPES)


def test_a_new_connection_takes_the_place_of_the_old_one(network, learner):
    one, two, sender = Worker("one"), Worker("two"), learner.sender()
    sender.connect("nccl", [one, two], call, "10.0.0.1")
    old = network.root
    network.clear()
    sender.connect("nccl", [one], call, "10.0.0.1")
    assert old.destroyed.is_set()
    sender.send(1)
    assert has_the_weights_of(one, learner)
    assert not two.models[0].loaded


def test_weights_that_are_fetched_still_load_after_a_connection(network, learner):
    worker, sender = Worker("one"), learner.sender()
    sender.connect("nccl", [worker], call, "10.0.0.1")
    (half,) = worker.halves
    half.receive_weights(half.parse_update_info({"tensors": list(learner.weights.items())}))
    assert has_the_weights_of(worker, learner)


def test_chunks_are_handed_over_one_by_one_by_ipc(network, learner, monkeypatch):
    """The handles are made up: on a GPU they name memory of the learner's process."""
    from vllm.distributed.weight_transfer import ipc_engine
    from vllm.distributed.weight_transfer.packed_tensor import PackedIpcChunk

    def producer(iterator, gpu_uuid, post_iter_func, buffer_size_bytes):
        assert buffer_size_bytes == BUFFER
        for name, tensor in iterator:
            yield PackedIpcChunk([name], [list(tensor.shape)], ["float32"], [tensor.nbytes], {gpu_uuid: (tensor,)})

    def consumer(ipc_handle, names, shapes, dtype_names, tensor_sizes, device_index, importer):
        (tensor,) = ipc_handle["gpu-0"]
        assert (list(tensor.shape), tensor.nbytes) == (shapes[0], tensor_sizes[0])
        return [(names[0], tensor)]

    monkeypatch.setattr(ipc_engine, "packed_ipc_producer", producer)
    monkeypatch.setattr(ipc_engine, "packed_ipc_consumer", consumer)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="gpu-0"))
    monkeypatch.setattr(torch.cuda, "ipc_collect", lambda: None)
    worker, sender = Worker("one"), learner.sender()
    sender.connect("ipc", [worker], call, "10.0.0.1")
    sender.send(7)
    assert worker.calls == ["connect", "begin", *["receive"] * 4, "finish"]
    assert (has_the_weights_of(worker, learner), worker.version) == (True, 7)


def test_the_largest_weight_fits_into_the_shared_memory(network):
    from rollout.vllm_backend.weight_transfer import init_info

    assert init_info("ipc", [], "10.0.0.1", largest=3 * BUFFER).packed_buffer_size_bytes == 3 * BUFFER
    assert init_info("nccl", [], "10.0.0.1", largest=3 * BUFFER).packed_buffer_size_bytes == BUFFER


def failed(error):
    future = Future()
    future.set_exception(error)
    return future


def test_an_engine_that_dies_while_it_connects_ends_the_wait_for_it(network, learner, monkeypatch):
    """The learner's own thread would wait for it for ever."""
    from vllm.distributed.weight_transfer import nccl_engine

    ever = threading.Event()
    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", lambda info: ever.wait())
    one, two = Worker("one"), Worker("rollout worker 2 (there, process 7)")
    two.answers["connect"] = failed(OSError("Traceback ...\nthe actor died"))
    with pytest.raises(NotConnectedError, match=r"nccl.*worker 2 \(there, process 7\) .*: .*died"):
        learner.sender(limit_s=600).connect("nccl", [one, two], call, "10.0.0.1")
    ever.set()


def test_an_engine_that_does_not_connect_is_named_after_the_limit(network, learner):
    one, two = Worker("one"), Worker("two")
    one.answers["connect"] = done = Future()
    done.set_result(None)
    two.answers["connect"] = Future()
    with pytest.raises(NotConnectedError, match=r"two .*not connect within 2 s"):
        learner.sender(limit_s=2.0).connect("nccl", [one, two], call, "10.0.0.1")


def test_nccl_that_does_not_load_is_an_error(network, learner, monkeypatch):
    monkeypatch.setattr(Group, "disabled", True)
    with pytest.raises(NotConnectedError, match="NCCL does not load"):
        learner.sender().connect("nccl", [Worker("one")], call, "10.0.0.1")


def test_an_engine_that_dies_in_a_transfer_ends_it_and_the_ranks_go_on_together(network, learner):
    one, two, sender = Worker("one"), Worker("two"), learner.sender()
    sender.connect("nccl", [one, two], call, "10.0.0.1")
    network.stuck = {2}
    two.answers["receive"] = failed(OSError("the actor died"))
    with pytest.raises(TransferError, match=r"version 5 .*\btwo .*actor died"):
        sender.send(5)
    assert network.root.destroyed.is_set()
    # the other ranks gather every parameter, and would wait for this one
    assert learner.gathered == list(SHAPES)


def test_an_engine_that_refuses_an_update_leaves_no_rank_behind(network, learner):
    one, sender = Worker("one"), learner.sender()
    sender.connect("nccl", [one], call, "10.0.0.1")
    one.answers["begin"] = failed(RuntimeError("it was started meanwhile"))
    with pytest.raises(TransferError, match=r"one .*started meanwhile"):
        sender.send(5)
    assert learner.gathered == list(SHAPES)


def test_a_transfer_that_cannot_be_ended_ends_the_run(network, learner, monkeypatch):
    monkeypatch.setattr("rlmed.models.sender.ABORT_S", 0.1)
    monkeypatch.setattr(Group, "destroy", lambda self: None)
    one, sender = Worker("one"), learner.sender()
    sender.connect("nccl", [one], call, "10.0.0.1")
    sender._limit_s = 0.5
    network.stuck = {1}
    with pytest.raises(ClusterError, match=r"hangs in a weight transfer.*resume=auto"):
        sender.send(5)
    network.root.destroyed.set()


def test_a_transport_that_vllm_does_not_know_is_refused_by_the_engine(network):
    (half,) = Worker("one").halves
    with pytest.raises(ValueError, match="Invalid weight transfer backend: smoke"):
        half.init_transfer_engine(half.parse_init_info({"transport": "smoke", "info": {}}))
    with pytest.raises(ValueError, match="Invalid init_info"):
        half.init_transfer_engine(half.parse_init_info({"transport": "nccl", "info": {"colour": 1}}))
    with pytest.raises(RuntimeError, match="without connecting first"):
        half.receive_weights(half.parse_update_info({"direct": {"names": []}}))
