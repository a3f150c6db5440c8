"""`--dry-run`: the plan of a command, tried without leaving anything behind."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from rlmed import dry_run, evaluate, launch, sft
from rlmed.commandline import run_command
from rlmed.core.config.schema import RunConfig
from rlmed.dry_run import Estimate

pytestmark = pytest.mark.slow

Config = Callable[..., RunConfig]
SMALL = ["algo.group_size=2", "algo.groups_per_step=2", "algo.dynamic_sampling=false", "rollout.max_tokens=6"]
SMALL += ["preflight.enabled=false"]


@pytest.fixture
def nothing_written(make_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A maker of configurations, in a working directory that must stay empty."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    return make_config


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (launch, r"plan: 7 steps on \d+ questions[^$]*tried: 3 steps of "),
        (sft, r"plan: \d+ steps on "),
        (evaluate, r"evaluation answers: "),
    ],
)
def test_a_command_is_tried_and_leaves_nothing(
    module: object, said: str, nothing_written: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = nothing_written("steps=7", "preflight.enabled=false", "loggers=[tensorboard]", "checkpoint.every=1")
    module.dry_run(config)  # type: ignore[attr-defined]
    out = capsys.readouterr().out
    assert re.search(said, out)
    assert re.search(r"^memory in GiB: about \d", out, re.MULTILINE)
    assert re.search(r"^time: about \w+, between \w+ and \w+ ", out, re.MULTILINE)
    assert "  steps: 7 (default 300)\n" in out
    assert f"not counted: {dry_run.UNCOUNTED})" in out
    assert list((tmp_path / "work").iterdir()) == []
    assert list((tmp_path / "temporary").iterdir()) == []


def test_the_answers_of_all_evaluations_are_counted(
    nothing_written: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    dry_run.try_training(nothing_written("steps=5", "preflight.enabled=false", "eval.every=2", "eval.controls=false"))
    out = capsys.readouterr().out
    total, listed = re.search(r"^evaluation answers: (\d+) \((.*)\)$", out, re.MULTILINE).groups()  # type: ignore[union-attr]
    after = dict(re.findall(r"after step (\d) (\d+)", listed))
    assert sorted(after) == ["0", "2", "4", "5"]
    assert len(set(after.values())) == 1
    assert int(total) == 4 * int(after["0"])


def test_an_estimate_has_steps_and_evaluations() -> None:
    estimate = Estimate(start_s=10.0, steps=100, step_s=(5.0, 2.0, 4.0), answers=50, answer_s=0.1)
    assert estimate.seconds == pytest.approx(10 + 100 * 3 + 5 + (5 - 2))
    assert estimate.range == pytest.approx(((10 + 200 + 5) / dry_run.SPREAD, (10 + 500 + 5) * dry_run.SPREAD))


@pytest.mark.parametrize(("module", "lasts"), [(launch, "steps"), (sft, "sft.epochs")])
def test_a_resumed_run_is_tried_from_its_checkpoint_on(
    module: ModuleType,
    lasts: str,
    random_model: Path,
    write_rows: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = [f"model.path={random_model}", "data=jsonl", f"data.train={write_rows('train')}", "name=again"]
    settings += [f"data.eval=[{write_rows('test')}]", "cluster.threads=1", "eval.max_tokens=6"]
    settings += ["sft.batch_size=5"] if module is sft else [*SMALL, "debug.record=true", "loggers=[tensorboard]"]

    def call(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["command", *settings, *arguments])
        run_command("train" if module is launch else "sft", module.main, module.dry_run)
        return capsys.readouterr().out

    def contents() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

    call(f"{lasts}=1", f"hydra.run.dir={tmp_path / 'run' / 'first'}")
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # Hydra's, which write the first run's log
    before, checkpoints = contents(), sorted((tmp_path / "run/first/checkpoints").iterdir())
    done = int(checkpoints[-1].name.removeprefix("step-"))
    for steps in (3, 1):
        out = call("--dry-run", f"{lasts}={steps}", f"resume={tmp_path / 'run/first'}")
        left = (steps - 1) * done
        assert f"plan: {left} of {steps * done} steps, resumed from {checkpoints[-1]}" in out
        assert ("tried: " in out) == (left > 0)
        assert re.search(rf"^evaluation answers: \d+ \(after step {steps * done} \d+\)$", out, re.MULTILINE)
        assert contents() == before
    out = call("--dry-run", f"{lasts}=1", "resume=auto")
    assert "resume=auto: nothing to resume in " in out
    assert contents() == before


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--multirun", "seed=0,1"], "--dry-run is for one run"),
        (["--cfg", "job"], "--dry-run is for one run"),
    ],
)
def test_what_cannot_be_tried_is_refused(
    arguments: list[str],
    match: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["launch", "--dry-run", *arguments])
    with pytest.raises(SystemExit) as ended:
        run_command("train", launch.main, launch.dry_run)
    assert ended.value.code == 2
    assert re.search(match, capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []
