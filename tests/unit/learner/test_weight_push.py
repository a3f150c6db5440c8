"""Which way weights take, and when learner and engines are connected anew."""

from __future__ import annotations

import pytest

from learner.weight_push import DirectPush, choose_transport
from rlmed.core.config.checks import ConfigError
from rlmed.core.weights import EngineHandle, NotConnectedError, PushReport, TransferError


@pytest.mark.parametrize(
    ("learner", "engines", "expected"),
    [
        ("gpu-0", [("gpu-0",)], "ipc"),
        ("gpu-0", [("gpu-0",), ("gpu-0",)], "ipc"),
        ("gpu-0", [("gpu-1",)], "nccl"),
        ("gpu-0", [("gpu-1", "gpu-2"), ("gpu-3", "gpu-4")], "nccl"),
        # NCCL takes each GPU once, and memory is shared on rank 0's only
        ("gpu-0", [("gpu-0",), ("gpu-1",)], "object_store"),
        ("gpu-0", [("gpu-1",), ("gpu-1",)], "object_store"),
        ("gpu-0", [("gpu-0", "gpu-1")], "object_store"),
        ("gpu-0", [("gpu-1",), ()], "object_store"),
        ("", [("gpu-1",)], "object_store"),
        ("", [()], "object_store"),
        ("gpu-0", [], "object_store"),
    ],
)
def test_the_transport_follows_from_who_has_which_gpu(learner, engines, expected):
    engines = [EngineHandle(f"worker {number}", number, devices) for number, devices in enumerate(engines)]
    assert choose_transport("auto", learner, engines) == expected
    assert choose_transport("object_store", learner, engines) == "object_store"
    for asked in ("ipc", "nccl"):
        if asked == expected:
            assert choose_transport(asked, learner, engines) == asked
        else:
            with pytest.raises(ConfigError, match=rf"cluster.weight_transfer={asked} needs .* (gpu|CPU).*Use auto"):
                choose_transport(asked, learner, engines)


class Rank:
    """Stands in for learner rank 0; it notes what it is asked for, and fails when told to."""

    def __init__(self):
        self.calls = []
        self.errors = []

    def connect(self, transport, engines):
        self.calls.append((transport, [entry.name for entry in engines]))
        self._fail(NotConnectedError)

    def send(self, version):
        self.calls.append(version)
        self._fail(TransferError)

    def _fail(self, kind):
        if self.errors and isinstance(self.errors[0], kind):
            raise self.errors.pop(0)


@pytest.fixture
def rank():
    return Rank()


@pytest.fixture
def direct(rank):
    return DirectPush("auto", "gpu-0", rank.connect, rank.send)


def workers(*numbers):
    return [EngineHandle(f"worker {number}", f"process {number}", (f"gpu-{number}",)) for number in numbers]


def test_engines_are_connected_once_and_again_when_others_are_there(rank, direct):
    for version, numbers in enumerate([(1, 2), (1, 2), (1,), (1, 3), (1, 3)]):
        report = direct.start(version, workers(*numbers)).result(timeout=60)
        assert isinstance(report, PushReport)
        assert report.fetch_s == 0.0
    one, two, three = ("nccl", ["worker 1"]), ("nccl", ["worker 1", "worker 2"]), ("nccl", ["worker 1", "worker 3"])
    assert rank.calls == [two, 0, 1, one, 2, three, 3, 4]


def test_a_successor_of_the_same_name_is_another_process(rank, direct):
    direct.start(0, workers(1)).result(timeout=60)
    direct.start(1, [EngineHandle("worker 1", "process 9", ("gpu-1",))]).result(timeout=60)
    assert len(rank.calls) == 4


def test_engines_that_could_not_be_connected_are_tried_again_when_one_has_changed(rank, direct):
    rank.errors = [NotConnectedError("Traceback: many lines\nno connection by nccl: worker 2 is gone.")]
    with pytest.raises(NotConnectedError, match=r"nccl: worker 2 is gone$"):
        direct.start(0, workers(1, 2)).result(timeout=60)
    assert direct.start(1, workers(1, 2)) is None
    assert len(rank.calls) == 1
    direct.start(2, workers(1, 3)).result(timeout=60)
    assert rank.calls[1:] == [("nccl", ["worker 1", "worker 3"]), 2]


def test_after_a_broken_transfer_engines_are_connected_anew(rank, direct):
    rank.errors = [TransferError("version 0 did not reach worker 1")]
    with pytest.raises(TransferError, match="did not reach worker 1"):
        direct.start(0, workers(1)).result(timeout=60)
    direct.start(1, workers(1)).result(timeout=60)
    assert rank.calls == [("nccl", ["worker 1"]), 0, ("nccl", ["worker 1"]), 1]


def test_without_a_direct_way_nothing_is_started(rank, direct):
    assert direct.start(0, [EngineHandle("worker 1", "process 1", ())]) is None
    assert rank.calls == []
