"""What loggers write, read back by their own readers; and that none can end or slow a run."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlmed.core.config.checks import ConfigError
from rlmed.core.config.running import LoggingConfig
from rlmed.core.files.jsonlines import read_json_lines
from rlmed.core.types import (
    Completion,
    Example,
    Prompt,
    RolloutGroup,
    RolloutRequest,
    SamplingParams,
    ScoredGroup,
    TrainGroup,
)
from rlmed.recording.loggers import build
from rlmed.recording.loggers.base import Beginning, show
from rlmed.recording.loggers.build import Loggers, build_loggers, check_loggers
from rlmed.recording.loggers.guard import GuardedLogger
from rlmed.recording.loggers.mlflow_runs import MlflowLogger
from rlmed.recording.loggers.weights_and_biases import WandbLogger
from rlmed.recording.recorder import RunRecorder
from tests.integration.processes import wait_until

Curves = dict[str, dict[int, float]]

WANDB = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs wandb")
MLFLOW = pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="needs mlflow")
TRACKIO = pytest.mark.skipif(importlib.util.find_spec("trackio") is None, reason="needs trackio")


def settings(**changed: Any) -> LoggingConfig:
    values: dict[str, Any] = {
        "project": "p",
        "run_name": None,
        "offline": False,
        "tracking_uri": None,
        "rollouts_every": 2,
        "rollouts": 1,
    }
    return LoggingConfig(**(values | changed))


def make_group(image: Path) -> TrainGroup:
    example = Example("1", image, "Which <b>part</b>?", ("head", "knee"), answer=1, modality="MRI", kind="anatomy")
    prompt = Prompt(example, "text", np.arange(4), {})
    completions = tuple(
        Completion(np.arange(3), np.zeros(3, dtype=np.float32), text, "stop", 0, 0) for text in ("right", "wrong")
    )
    rollout = RolloutGroup(RolloutRequest(0, prompt, 2, SamplingParams()), completions)
    scored = ScoredGroup(rollout, np.array([2, 0.5], dtype=np.float32), {})
    return TrainGroup(scored, np.array([1, -1], dtype=np.float32))


def record(folder: Path, name: str, config: LoggingConfig) -> Curves:
    """Record three steps, resume after the first; return the curves of metrics.jsonl.

    The interrupted run's loggers are closed, as by Ctrl-C.
    """
    run = folder / "run"
    run.mkdir()
    picture = folder / "picture.png"
    Image.new("RGB", (64, 64), (10, 200, 30)).save(picture)
    numbers = np.random.default_rng(0).normal(size=(2, 5))
    offsets: dict[str, int] = {}
    for turn, steps in enumerate(((1, 2, 3), (2, 3, 4))):
        loggers = build_loggers(run, [name], config, {"seed": 3, "data": {"mix": None}}, samples=True)
        recorder = RunRecorder(run, loggers)
        recorder.truncate(offsets)
        for step in steps:
            recorder.record_step(step, {"reward/mean": numbers[turn, step], "kl": np.nan, "seconds/learn": step / 3})
            recorder.record_groups(step, [make_group(picture)], [])
            if (turn, step) == (0, 1):
                offsets = json.loads(json.dumps(recorder.offsets()))
        recorder.record_evaluation(steps[-1], {"mri": 0.1 + 0.2 * turn})
        recorder.close(failed=turn == 0)
    curves: Curves = {}
    for line in read_json_lines(run / "metrics.jsonl"):
        for key in ("reward/mean", "seconds/learn"):
            curves.setdefault(key, {})[line["step"]] = line[key]
    return curves | {"accuracy/mri": {3: 0.1, 4: 0.1 + 0.2}}


def inspect_wandb(folder: Path) -> list[dict[str, Any]]:
    """The records of an offline run's files, by W&B's own reader."""
    lines: list[dict[str, Any]] = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        lines += map(json.loads, done.stdout.splitlines())
    return lines


@WANDB
def test_wandb_offline_has_the_numbers_of_metrics_jsonl(tmp_path: Path) -> None:
    expected = record(tmp_path, "wandb", settings(offline=True))
    found: Curves = {}
    rows: list[int] = []
    records = inspect_wandb(tmp_path / "run")
    for entry in records:
        if entry.get("type") != "history":
            continue
        items = entry["history"]["item"]
        rows.append(items["_step"])
        for key, value in items.items():
            if key in expected:
                found.setdefault(key, {})[items["step"]] = value
        assert "kl" not in items
    assert found == expected, "of two rows of a step the later one counts"
    assert rows == sorted(set(rows)), "W&B would drop a row whose number does not grow"
    assert len({entry["run"]["run_id"] for entry in records if entry.get("type") == "run"}) == 1, "one run, continued"
    pictures = [*(tmp_path / "run").glob("wandb/offline-run-*/files/media/images/**/*.png")]
    assert len(pictures) == 3  # of steps 2, 2 again and 4
    assert not any("metadata" in path.name for path in (tmp_path / "run").rglob("*"))


KILLED = """
import os, signal, time
from pathlib import Path
from rlmed.recording.loggers.build import build_loggers
from rlmed.recording.recorder import RunRecorder
from tests.unit.rlmed.recording.test_loggers import settings
folder = Path({folder!r})
recorder = RunRecorder(folder, build_loggers(folder, ["wandb"], settings(offline=True), {{}}, samples=True))
recorder.record_evaluation(0, {{"mri": 0.1}})
for step in (1, 2, 3):
    recorder.record_step(step, {{"loss": step / 3, "kl": float("nan")}})
    if step == 2:
        print(recorder.offsets()["metrics.jsonl"], flush=True)
state = folder / "loggers" / "wandb.json"
while not (state.exists() and '"rows": 4' in state.read_text()):
    time.sleep(0.01)
os.kill(os.getpid(), signal.SIGKILL)
"""


@WANDB
def test_wandb_offline_has_all_rows_of_a_killed_run(tmp_path: Path) -> None:
    program = KILLED.format(folder=str(tmp_path))
    # not this process's service of W&B, which would outlive the killed one
    clean = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    killed = subprocess.run([sys.executable, "-c", program], env=clean, capture_output=True, text=True, check=False)
    assert killed.returncode == -9, killed.stderr
    recorder = RunRecorder(tmp_path, build_loggers(tmp_path, ["wandb"], settings(offline=True), {}, samples=True))
    recorder.truncate({"metrics.jsonl": int(killed.stdout.split()[-1])})
    recorder.record_step(3, {"loss": 7.0, "kl": 0.5})
    recorder.close()
    rows = [entry["history"]["item"] for entry in inspect_wandb(tmp_path) if entry.get("type") == "history"]
    lines = [*read_json_lines(tmp_path / "metrics.jsonl")]
    assert {row["step"]: row["loss"] for row in rows if "loss" in row} == {line["step"]: line["loss"] for line in lines}
    assert {row["step"]: row["accuracy/mri"] for row in rows if "accuracy/mri" in row} == {0: 0.1}
    assert [row["kl"] for row in rows if row["step"] < 3 and "kl" in row] == []


@MLFLOW
@pytest.mark.parametrize("store", ["sqlite:///{}/mlflow.db", "file://{}/mlruns"])
def test_mlflow_has_the_numbers_of_metrics_jsonl(tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow.tracking import MlflowClient

    monkeypatch.chdir(tmp_path)  # MLflow puts the artifacts of a database into the current folder
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = store.format(tmp_path)
    expected = record(tmp_path, "mlflow", settings(tracking_uri=uri))
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("p")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.params == {"seed": "3", "data.mix": "None"}
    assert (run.info.status, run.info.run_name) == ("FINISHED", f"{tmp_path.name}/run")
    found = {}
    for key in expected:
        points = sorted(client.get_metric_history(run.info.run_id, key), key=lambda point: point.timestamp)
        found[key] = {point.step: point.value for point in points}
    assert found == expected, "of two points of a step the later one counts"
    assert "kl" not in run.data.metrics
    shown = {Path(entry.path).name for entry in client.list_artifacts(run.info.run_id, "rollouts")}
    assert shown == {f"{step:06d}-0.{kind}" for step in (2, 4) for kind in ("png", "txt")}


def test_tensorboard_has_the_numbers_of_metrics_jsonl(tmp_path: Path) -> None:
    expected = record(tmp_path, "tensorboard", settings())
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    for key in ("reward/mean", "seconds/learn"):
        found = {event.step: event.value for event in events.Scalars(key)}
        assert found == {step: float(np.float32(value)) for step, value in expected[key].items()}, key
    assert [event.step for event in events.Scalars("accuracy/mri")] == [4], "hidden after a resume from step 1"
    assert [event.step for event in events.Images("rollouts/0")] == [2, 4]


@pytest.mark.parametrize(
    "name", ["tensorboard", pytest.param("mlflow", marks=MLFLOW), pytest.param("wandb", marks=WANDB)]
)
def test_a_picture_that_is_gone_costs_no_logger(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = settings(offline=name == "wandb", tracking_uri=f"sqlite:///{tmp_path}/m.db" if name == "mlflow" else None)
    monkeypatch.chdir(tmp_path)
    loggers = build_loggers(tmp_path, [name], config, {}, samples=True)
    with RunRecorder(tmp_path, loggers) as recorder:
        for step in (1, 2, 3):
            recorder.record_step(step, {"reward/mean": 1.0})
            recorder.record_groups(step, [make_group(tmp_path / "gone.png")], [])
    (warning,) = [entry.getMessage() for entry in caplog.records if entry.name.startswith("rlmed")]
    assert "without its picture" in warning
    assert f"{tmp_path}/gone.png" in warning


def test_rollouts_that_fail_are_dropped_and_the_curves_go_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Blind(Failing):
        def rollouts(self, step: int, shown: Any) -> None:
            raise RuntimeError("no pictures")

    logger = Blind(failures=0)
    loggers = Loggers(tmp_path, [GuardedLogger(logger, waits_s=(3600.0,))], rollouts_every=1, rollouts=1)
    for step in (1, 2):
        loggers.scalars(step, {})
        loggers.rollouts(step, [make_group(tmp_path / "gone.png").scored])
    wait_until(lambda: 2 in logger.seen, 60, "the values of step 2")
    loggers.finish()
    assert logger.seen == ["start", 1, 2, "finish"]
    (warning,) = [entry.getMessage() for entry in caplog.records]
    assert "the logger failing does not take rollouts (RuntimeError: no pictures)" in warning


def test_loggers_finish_at_the_same_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    together = threading.Barrier(2, timeout=60)

    class Meeting(Failing):
        def finish(self, *, failed: bool) -> None:
            together.wait()

    loggers = Loggers(tmp_path, [GuardedLogger(Meeting(failures=0), finish_s=60.0) for _ in range(2)])
    loggers.scalars(1, {})
    loggers.finish()
    assert not together.broken
    assert not caplog.records


@TRACKIO
def test_trackio_has_the_numbers_of_metrics_jsonl(tmp_path: Path) -> None:
    """In its own process: trackio reads TRACKIO_DIR when it is imported."""
    program = (
        "import json, os, sys\n"
        f"os.environ['TRACKIO_DIR'] = {str(tmp_path / 'trackio')!r}\n"
        "from pathlib import Path\n"
        "from tests.unit.rlmed.recording.test_loggers import record, settings\n"
        "import trackio\n"
        f"expected = record(Path({str(tmp_path)!r}), 'trackio', settings())\n"
        "from trackio.sqlite_storage import SQLiteStorage\n"
        "(run,) = SQLiteStorage.get_run_records('p')\n"
        "found = {}\n"
        "for row in SQLiteStorage.get_logs('p', run['name']):\n"
        "    for key in expected:\n"
        "        if key in row: found.setdefault(key, {})[row['step']] = row[key]\n"
        "assert found == expected, (found, expected)\n"
        "print('same')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == ["same"], done.stderr


def failing_once(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    """Let a function of a logger's package raise after its first call, as if the reply was lost."""
    call, calls = getattr(owner, name), list[int]()

    def lost(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        result = call(*arguments, **named)
        if len(calls) == 1:
            raise ConnectionError("lost")
        return result

    monkeypatch.setattr(owner, name, lost)


@MLFLOW
def test_a_start_that_fails_and_is_tried_again_makes_one_run_of_mlflow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a database takes seconds to set up
    config = settings(tracking_uri=f"file://{tmp_path}/mlruns")
    failing_once(monkeypatch, MlflowClient, "log_batch")  # of the parameters
    loggers = Loggers(tmp_path, [GuardedLogger(MlflowLogger(config), waits_s=(0, 0))], settings={"seed": 3})
    loggers.scalars(1, {"loss": 0.5})
    loggers.finish()
    assert "mlflow failed and is tried again: ConnectionError: lost" in caplog.text
    client = MlflowClient(tracking_uri=config.tracking_uri)
    (run,) = client.search_runs([client.get_experiment_by_name("p").experiment_id])
    assert (run.info.status, run.data.params, run.data.metrics) == ("FINISHED", {"seed": "3"}, {"loss": 0.5})
    assert json.loads((tmp_path / "loggers" / "mlflow.json").read_text()) == {"run_id": run.info.run_id}


@WANDB
def test_a_start_that_fails_and_is_tried_again_makes_one_run_of_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import wandb

    failing_once(monkeypatch, wandb, "init")
    loggers = guarded(tmp_path, WandbLogger(settings(offline=True)), waits_s=(0, 0), finish_s=60.0)
    loggers.scalars(1, {"loss": 0.5})
    loggers.finish()
    assert "wandb failed and is tried again: ConnectionError: lost" in caplog.text
    # each start has its folder (offline-run-TIME-ID), and a sync puts those of one id into one run
    (made,) = {path.name.split("-")[3] for path in (tmp_path / "wandb").glob("offline-run-*")}
    kept = json.loads((tmp_path / "loggers" / "wandb.json").read_text())
    assert (kept["id"], kept["rows"]) == (made, 1)


class Failing:
    """A logger that raises as often as it is told, and notes what reaches it."""

    name = "failing"

    def __init__(self, failures: int) -> None:
        self.failures, self.seen = failures, list[Any]()

    def start(self, beginning: Beginning) -> None:
        self._fail()
        self.seen.append("start")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._fail()
        self.seen.append(step)

    def rollouts(self, step: int, shown: Any) -> None:
        raise NotImplementedError

    def finish(self, *, failed: bool) -> None:
        self.seen.append("finish")

    def _fail(self) -> None:
        if self.failures:
            self.failures -= 1
            raise RuntimeError("server down\nand more")


def guarded(folder: Path, logger: Any, **limits: Any) -> Loggers:
    return Loggers(folder, [GuardedLogger(logger, **{"waits_s": (0, 0), **limits})])


def test_a_logger_that_fails_for_a_while_misses_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = Failing(failures=2)
    loggers = guarded(tmp_path, logger)
    for step in (1, 2):
        loggers.scalars(step, {})
    loggers.finish()
    assert logger.seen == ["start", 1, 2, "finish"]
    assert [entry.getMessage() for entry in caplog.records] == [
        "the logger failing failed and is tried again: RuntimeError: server down"
    ]


def test_a_logger_that_goes_on_failing_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = Failing(failures=1000)
    with RunRecorder(tmp_path, guarded(tmp_path, logger)) as recorder:
        for step in range(1, 50):
            recorder.record_step(step, {"loss": 1.0})
    assert logger.seen == []
    assert [entry.levelno for entry in caplog.records] == [logging.WARNING] * 2
    assert "left out" in caplog.text
    assert len([*read_json_lines(tmp_path / "metrics.jsonl")]) == 49


def test_a_logger_that_hangs_blocks_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    free, begun = threading.Event(), threading.Event()

    class Hanging(Failing):
        def scalars(self, step: int, values: Mapping[str, float]) -> None:
            begun.set()
            free.wait()
            super().scalars(step, values)

    logger = Hanging(failures=0)
    loggers = guarded(tmp_path, logger, most_waiting=3, finish_s=0.01)
    loggers.scalars(1, {})
    assert begun.wait(timeout=60)
    for step in range(2, 9):
        loggers.scalars(step, {})
    thread = next(found for found in threading.enumerate() if found.name == "logger-failing")
    loggers.finish()
    assert [word in caplog.text for word in ("its oldest values are dropped", "has not finished")] == [True, True]
    assert len(caplog.records) == 2
    free.set()
    thread.join(timeout=60)
    assert logger.seen == ["start", 1, 7, 8, "finish"]


def test_a_missing_package_is_refused_with_its_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None if name == "trackio" else object())
    with pytest.raises(ConfigError, match=r"loggers=\[trackio\] .* '\.\[trackio\]'"):
        check_loggers(["tensorboard", "trackio"], settings())


def test_a_folder_that_mlflow_would_refuse_is_refused_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: object())
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    with pytest.raises(ConfigError, match=r"tracking_uri=mlruns .*MLFLOW_ALLOW_FILE_STORE"):
        check_loggers(["mlflow"], settings(tracking_uri="mlruns"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:///data/runs")
    with pytest.raises(ConfigError, match=r"file:///data/runs"):
        check_loggers(["mlflow"], settings(tracking_uri=None))
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    check_loggers(["mlflow"], settings(tracking_uri="mlruns"))


def test_offline_is_refused_where_nothing_obeys_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ConfigError, match=r"logging\.offline=true .*wandb.*mlflow"):
        check_loggers(["mlflow", "tensorboard"], settings(offline=True))
    check_loggers(["mlflow", "wandb"], settings(offline=True))


def test_a_tracking_uri_is_refused_where_nothing_reads_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ConfigError, match=r"logging\.tracking_uri=http://x:5 .*\['wandb', 'trackio'\]"):
        check_loggers(["wandb", "trackio"], settings(tracking_uri="http://me:secret@x:5"))
    check_loggers(["wandb", "trackio"], settings(tracking_uri=None))
    check_loggers(["wandb", "mlflow"], settings(tracking_uri="http://x:5"))


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("http://me:secret@host:5000", ["http://host:5000"]),
        ("postgresql://host/db", ["postgresql://host/db"]),
        ("databricks", ["databricks"]),
        ("sqlite:///mlflow.db", []),
        (None, []),
    ],
)
def test_what_offline_does_not_keep_here_is_said(
    uri: str | None, said: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: object())
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    check_loggers(["wandb", "mlflow"], settings(offline=True, tracking_uri=uri))
    assert [message.rpartition(" ")[2] for message in caplog.messages] == said
    caplog.clear()
    check_loggers(["wandb", "mlflow"], settings(tracking_uri=uri))
    assert caplog.messages == []


def test_rollouts_are_shown_only_if_asked_for(tmp_path: Path) -> None:
    record(tmp_path, "tensorboard", settings(rollouts_every=0))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert events.Tags()["images"] == []
    assert not [tag for tag in events.Tags()["tensors"] if tag.startswith("rollouts")]


def test_best_and_worst_of_the_first_groups_are_shown(tmp_path: Path) -> None:
    groups = [make_group(tmp_path / f"{index}.png").scored for index in range(3)]
    shown = show(groups, 2)
    assert [entry.image for entry in shown] == [tmp_path / "0.png", tmp_path / "1.png"]
    assert shown[0].caption() == "Which <b>part</b>?\n\nbest (2): right\n\nworst (0.5): wrong"
