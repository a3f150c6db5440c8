import io
import logging
import sys
from pathlib import Path

import pytest
from rich.console import Console

from rlmed.recording import progress as module
from rlmed.recording.progress import Progress, duration
from rlmed.recording.time_left import TimeLeft

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


def test_time_left_follows_the_latest_steps():
    left = TimeLeft()
    left.start(1000, 0, 0.0, {})
    for step in range(1, 101):
        left.step(step, 100.0 * min(step, 50) + max(0, step - 50))
    assert left.seconds() == pytest.approx(900.0)


def test_a_resumed_run_is_judged_by_its_own_steps():
    left = TimeLeft()
    left.start(200, 100, 7.0, {})
    left.step(101, 12.0)
    assert left.seconds() == pytest.approx(99 * 5.0)


def test_evaluations_count_in_the_time_left_and_not_as_steps():
    left = TimeLeft()
    left.evaluated(seconds=60.0, answers=120)
    left.start(10, 0, 100.0, {4: 30, 8: 30, 10: 120})
    for step in range(1, 5):
        left.step(step, 100.0 + 2.0 * step)
    assert left.seconds() == pytest.approx(6 * 2.0 + (30 + 30 + 120) * 0.5)
    left.evaluated(seconds=15.0, answers=30, step=4)
    assert left.seconds() == pytest.approx(6 * 2.0 + (30 + 120) * 0.5)
    left.step(5, 108.0 + 15.0 + 2.0)
    assert left.seconds() == pytest.approx(5 * 2.0 + (30 + 120) * 0.5)


def test_the_last_step_leaves_the_evaluation_at_the_end(clock):
    out, progress = plain()
    with progress:
        progress.evaluated({"mri": 0.5}, 0, seconds=60.0, answers=120)
        progress.start(2, 0, {2: 120})
        for step in (1, 2):
            clock.now += 5.0
            progress.step(step, {})
        for done in range(1, 121):
            clock.now += 0.5
            progress.answers("mri", done, 120)
        progress.evaluated({"mri": 0.6}, 2, seconds=60.0, answers=120)
    lines = out.getvalue().splitlines()
    assert lines[1:3] == ["step 1/2 left 1m05s", "step 2/2 left 1m00s"]
    assert lines[3] == "evaluate mri 1/120 answers, left 1m00s"
    assert lines[4] == "evaluate mri 21/120 answers, left 50s"
    assert lines[-2:] == ["evaluate mri 120/120 answers", "accuracy after 2 steps: mri 60.0%"]


def test_an_evaluation_of_unknown_length_is_named(clock):
    out, progress = plain()
    progress.start(2, 0, {2: 3600})
    clock.now += 5.0
    progress.step(1, {})
    assert out.getvalue() == "step 1/2 left 5s and 3600 evaluation answers\n"


@pytest.mark.parametrize("width", [40, 60, 80, 120])
@pytest.mark.parametrize("known", [True, False])
def test_the_live_display_fits_the_terminal(clock, width, known):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=width, color_system=None)
    progress = Progress(console)
    with progress:
        if known:
            progress.evaluated({"mri": 0.5}, 0, seconds=600.0, answers=1000)
        progress.start(30000, 0, {30000: 12345})
        clock.now += 9.0
        progress.step(29000, METRICS)
        progress.answers("a_file_with_a_rather_long_name", 1000, 12345)
        clock.now += 9.0
        progress.answers("a_file_with_a_rather_long_name", 1234, 12345)
        screen = Console(file=io.StringIO(), width=width)
        with screen.capture() as shown:
            screen.print(progress._render())
    lines = shown.get().splitlines()
    assert max(map(len, lines)) <= width
    assert "29000/30000, left" in lines[0]
    assert "1234/12345 answers, left" in lines[-1]
    for fact in ("reward 1.42", "choice 0.45", "tokens/s 5120"):
        assert fact in shown.get(), "no fact is cut or parted"


@pytest.mark.parametrize("started_by", ["cell", "command of a cell"])
def test_a_notebook_gets_plain_lines_without_escape_codes_or_html(monkeypatch, capsys, started_by):
    class ZMQInteractiveShell:
        """Its name is what a notebook is known by."""

    monkeypatch.setenv("FORCE_COLOR", "1")
    if started_by == "cell":
        monkeypatch.setattr("builtins.get_ipython", ZMQInteractiveShell, raising=False)
        assert Console().is_jupyter
    else:
        monkeypatch.setenv("JPY_PARENT_PID", "1")
        assert Console().is_terminal
    with Progress() as progress:
        progress.start(2, 0)
        progress.step(2, METRICS)
        progress.message("done")
    out = capsys.readouterr().out
    assert out.startswith("step 2/2 reward 1.42")
    assert out.endswith("done\n")
    assert "\x1b" not in out
    assert "<" not in out


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
        "left 3s",
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
