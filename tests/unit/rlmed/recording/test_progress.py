import io
import logging
import sys
from pathlib import Path

import pytest
from rich.console import Console

from rlmed.recording import progress as module
from rlmed.recording.progress import Progress, duration

METRICS = {
    "reward/mean": 1.42,
    "reward/format": 0.97,
    "reward/choice": 0.45,
    "kl": 0.003,
    "completion/length": 41.2,
    "tokens_per_second": 5120.4,
    "loss": 0.001,
    "lr": 1e-6,
}


class Clock:
    """A stand-in for the module `time`."""

    now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def plain(**options):
    out = io.StringIO()
    return out, Progress(Console(file=out, force_terminal=False, highlight=False), **options)


def test_plain_line_has_all_facts(clock):
    out, progress = plain()
    with progress:
        progress.start(200, 11)
        progress.evaluated({"mri": 0.6123, "ct": 0.5}, 0)
        clock.now += 2.0
        progress.step(12, METRICS)
    assert out.getvalue() == (
        "accuracy after 0 steps: mri 61.2%, ct 50.0%, mean 55.6%\n"
        "step 12/200 reward 1.42 format 0.97 choice 0.45 kl 0.0030 length 41 tokens/s 5120 left 6m16s\n"
    )


def test_plain_lines_come_every_n_seconds_and_at_the_end(clock):
    out, progress = plain(line_every_s=10.0)
    with progress:
        progress.start(20, 0)
        for step in range(1, 21):
            clock.now += 3.0
            progress.step(step, {"reward/mean": 1.0})
    steps = [int(line.split()[1].split("/")[0]) for line in out.getvalue().splitlines()]
    assert steps == [1, 5, 9, 13, 17, 20]
    assert out.getvalue().endswith("step 20/20 reward 1.00 left 0s\n")


def test_time_left_follows_the_latest_steps(clock):
    _, progress = plain()
    progress.start(1000, 0)
    for step in range(1, 101):
        clock.now += 100.0 if step <= 50 else 1.0
        progress.step(step, {})
    assert progress._seconds_left() == pytest.approx(900.0)


def test_a_resumed_run_is_judged_by_its_own_steps(clock):
    _, progress = plain()
    progress.start(200, 100)
    clock.now += 5.0
    progress.step(101, {})
    assert progress._seconds_left() == pytest.approx(99 * 5.0)


def test_fine_tuning_without_rewards_shows_the_loss(clock):
    out, progress = plain()
    progress.start(4, 0)
    clock.now += 1.0
    progress.step(1, {"loss": 2.34567, "tokens_per_second": 900.0})
    assert out.getvalue() == "step 1/4 loss 2.346 tokens/s 900 left 3s\n"


def test_missing_and_non_finite_metrics_are_no_trouble(clock):
    out, progress = plain()
    progress.start(2, 0)
    progress.step(1, {})
    progress.step(2, {"reward/mean": float("nan")})
    assert "step 2/2 reward nan" in out.getvalue()


def test_stages_are_throttled_but_their_end_is_said(clock):
    out, progress = plain(line_every_s=10.0)
    for done in range(1, 301):
        clock.now += 0.1
        progress.answers("mri", done, 300)
    lines = out.getvalue().splitlines()
    assert lines[0] == "evaluate mri 1/300 answers"
    assert lines[-1] == "evaluate mri 300/300 answers"
    assert len(lines) == 4


def test_messages_are_shown_as_they_are():
    out, progress = plain()
    text = "[bold]not markup[/bold] " + "long " * 60
    progress.message(text)
    assert out.getvalue() == text + "\n"


def test_a_terminal_gets_a_live_display_with_the_same_facts(clock):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120, color_system=None)
    progress = Progress(console)
    with progress:
        progress.start(200, 0)
        progress.evaluated({"mri": 0.5}, 25)
        clock.now += 1.0
        progress.step(50, METRICS)
        progress.answers("mri", 7, 30)
        with console.capture() as shown:
            console.print(progress._render())
    for fact in (
        "50/200",
        "3s left",
        "reward 1.42",
        "choice 0.45",
        "tokens/s 5120",
        "accuracy after 25 steps 50.0%",
        "evaluate mri",
        "7/30 answers",
    ):
        assert fact in shown.get(), fact
    assert "accuracy after 25 steps: mri 50.0%" in out.getvalue()
    assert "step 50/200" not in out.getvalue(), "no plain lines beside the live display"


def test_log_lines_go_through_the_live_display(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "__stdout__", screen)
    handler = logging.StreamHandler(screen)
    logging.getLogger().addHandler(handler)
    try:
        with Progress(Console(force_terminal=True, width=80)):
            assert handler.stream is sys.stdout
            assert handler.stream is not screen
            logging.getLogger("x").warning("row 7 skipped")
        assert handler.stream is screen
    finally:
        logging.getLogger().removeHandler(handler)
    assert "row 7 skipped" in screen.getvalue()


def test_the_display_ends_when_the_run_raises():
    out = io.StringIO()
    progress = Progress(Console(file=out, force_terminal=True))
    with pytest.raises(KeyboardInterrupt), progress:
        raise KeyboardInterrupt
    assert "\x1b[?25h" in out.getvalue(), "the cursor is shown again"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (190, "3m10s"), (3599.7, "1h00m"), (7380, "2h03m")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("done", "evaluates", "said"),
    [
        (4, True, None),
        (6, True, "6 steps were done already: only"),
        (6, False, "6 steps were done already: nothing"),
    ],
)
def test_a_run_resumed_after_its_last_step_says_what_is_left(done, evaluates, said, capsys):
    Progress().resuming(done, 6, Path("run/checkpoints/x"), evaluates=evaluates)
    out = " ".join(capsys.readouterr().out.split())
    assert f"resuming after step {done} of 6 from run/checkpoints/x" in out
    assert ("done already" in out) == (said is not None)
    assert said is None or (said in out and "raise steps" in out)
