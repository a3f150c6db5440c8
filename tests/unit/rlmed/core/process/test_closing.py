"""Parts of a run are closed in order, whatever fails."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from rlmed.core.process.closing import closing


def test_all_are_closed_and_the_first_error_is_raised(caplog: pytest.LogCaptureFixture) -> None:
    called: list[str] = []

    def part(name: str, error: BaseException | None = None) -> Callable[[], None]:
        def close() -> None:
            called.append(name)
            if error is not None:
                raise error

        return close

    with closing(part("rubric"), part("cluster"), failed=part("loggers")):
        called.append("body")
    assert called == ["body", "rubric", "cluster"]

    called.clear()
    with (
        pytest.raises(KeyboardInterrupt),
        closing(
            part("rubric", OSError("disk")), part("cluster", ValueError("ray")), failed=part("loggers", OSError("down"))
        ),
    ):
        raise KeyboardInterrupt
    assert called == ["rubric", "cluster", "loggers"]
    assert [message.rpartition(": ")[2] for message in caplog.messages] == ["disk", "ray", "down"]

    called.clear()
    with (
        pytest.raises(OSError, match="disk"),
        closing(part("rubric", OSError("disk")), part("cluster"), failed=part("loggers")),
    ):
        pass
    assert called == ["rubric", "cluster", "loggers"]
