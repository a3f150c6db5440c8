"""The watch of a cluster's head, on a real socket."""

from __future__ import annotations

import importlib.util
import socket
import threading

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray")


def test_a_head_that_stops_listening_ends_the_process_with_the_command_that_goes_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from rlmed.ray_session import HeadWatch

    ended: list[int] = []
    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        watch = HeadWatch(address, limit_s=0.5, end=ended.append)
        watch.start()
        watch.join(timeout=1.0)
        assert watch.is_alive()
        assert ended == []
    watch.join(timeout=20)
    assert ended == [3]
    said = capsys.readouterr().err
    assert f"the head of the Ray cluster ({address}) has not answered" in said
    assert "the same command with resume=auto" in said


def test_a_run_that_has_ended_is_not_ended_again() -> None:
    from rlmed.ray_session import HeadWatch

    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        called = threading.Event()
        watch = HeadWatch(f"127.0.0.1:{nobody.getsockname()[1]}", limit_s=0.3, end=lambda _: called.set())
        watch.start()
        watch.stop()
        watch.join(timeout=10)
    assert not watch.is_alive()
    assert not called.is_set()
