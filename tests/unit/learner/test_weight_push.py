"""Which way weights take, and when learner and engines are connected anew."""

from __future__ import annotations

import pytest

from learner.weight_push import DirectPush, choose_transport
from rlmed.core.config.checks import ConfigError
from rlmed.core.protocols import ClusterError
from rlmed.core.weights import EngineHandle, PushReport, TransferError


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


class Ranks:
    """Stand in for the learner's; they note what they are asked for, and fail when told to."""

    def __init__(self):
        self.calls, self.errors = [], []

    def send(self, transport, engines):
        self.calls.append((transport, [entry.name for entry in engines]))
        if self.errors:
            raise self.errors.pop(0)


@pytest.fixture
def ranks():
    return Ranks()


@pytest.fixture
def direct(ranks):
    return DirectPush("auto", "gpu-0", ranks.send)


def workers(*numbers):
    return [EngineHandle(f"worker {number}", f"process {number}", (f"gpu-{number}",)) for number in numbers]


def test_weights_are_sent_to_whoever_is_there(ranks, direct, caplog):
    caplog.set_level("INFO", "learner.weight_push")
    for numbers in [(1, 2), (1, 2), (1, 3), (0,)]:
        report = direct.start(workers(*numbers)).result(timeout=60)
        assert isinstance(report, PushReport)
        assert report.fetch_s == 0.0
    two, three = ("nccl", ["worker 1", "worker 2"]), ("nccl", ["worker 1", "worker 3"])
    assert ranks.calls == [two, two, three, ("ipc", ["worker 0"])]
    assert [record.message.split(" by ")[1] for record in caplog.records] == ["nccl", "nccl", "ipc"]


def test_after_a_failure_engines_fetch_the_weights_until_one_has_changed(ranks, direct, caplog):
    ranks.errors = [TransferError("Traceback: many lines\nno connection by nccl: worker 2 is gone.")]
    assert direct.start(workers(1, 2)).result(timeout=60) is None
    assert caplog.messages[-1].startswith("no connection by nccl: worker 2 is gone. Sending weights through")
    assert direct.start(workers(1, 2)) is None
    assert len(ranks.calls) == 1
    # of the same name, but another process
    direct.start([workers(1)[0], EngineHandle("worker 2", "process 9", ("gpu-2",))]).result(timeout=60)
    assert len(ranks.calls) == 2


def test_an_error_of_the_learner_is_the_callers(ranks, direct):
    ranks.errors = [ClusterError("lost learner rank 1")]
    with pytest.raises(ClusterError, match="lost learner rank 1"):
        direct.start(workers(1)).result(timeout=60)


def test_without_a_direct_way_nothing_is_started(ranks, direct):
    assert direct.start([EngineHandle("worker 1", "process 1", ())]) is None
    assert ranks.calls == []
