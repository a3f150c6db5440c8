"""Several runs as one table: what is run again and what is not, and which figures stand where."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from rlmed.core.config.composing import unused_overrides
from rlmed.core.statistics import mcnemar
from rlmed.evaluation.records import Accuracy, EvalRow
from rlmed.evaluation.results import EvalSummary, FileSummary, write_evaluation
from rlmed.reproduce.runs import DONE_FILE, RunCommand, default_folder, main, plan, reproduce
from rlmed.reproduce.table import Cell, collect, write_reproduction

ROWS = 20


def write_run(folder: Path, step: int, right: set[int], *, ids: int = ROWS, blank: int | None = 5) -> None:
    """An evaluation on one file of 20 rows, of which those in `right` are answered right."""
    rows = [
        EvalRow(
            "mri",
            str(i),
            "none",
            None,
            "",
            "Which?",
            ("a", "b"),
            "A",
            "",
            "A",
            i in right,
            True,
            3,
            finish_reason="stop",
        )
        for i in range(ids)
    ]
    file = FileSummary(
        name="mri",
        rows=ROWS,
        accuracy=Accuracy.of(len(right), ROWS),
        format_rate=1.0,
        mean_tokens=3.0,
        cut_by_length=0.0,
        chance=0.5,
        majority_letter=0.5,
        image_free_prior=0.45,
        image_free_prior_by_rate=0.45,
        leave_one_out_prior=0.4,
        leave_one_out_prior_by_rate=0.4,
        blank=None if blank is None else Accuracy.of(blank, ROWS),
        shuffled=None,
        by_question_type={},
        reordered=Accuracy.of(7, ROWS),
    )
    summary = EvalSummary(model="m", step=step, seconds=1.0, max_tokens=64, train_rows=600, files=(file,))
    write_evaluation(folder / "evaluations", summary, rows)


@pytest.fixture
def runs(tmp_path: Path) -> list[tuple[str, int, Path]]:
    found = [("base", 0, tmp_path / "base")]
    write_run(tmp_path / "base", 0, set(range(8)))
    for seed in (0, 1):
        for method, right in (("sft", set(range(10))), ("rl", set(range(4, 18 + seed)))):
            folder = tmp_path / f"{method}-seed{seed}"
            write_run(folder, 100, right)
            found.append((method, seed, folder))
    # an earlier evaluation counts for nothing, whatever the order of the names as text
    write_run(tmp_path / "rl-seed0", 99, set())
    write_run(tmp_path / "rl-seed1", 1_000_000, set(range(4, 19)))
    return found


def test_each_figure_is_that_of_the_last_evaluations(runs):
    found = collect(runs)
    assert (found.seeds, found.methods) == ((0, 1), ("base", "sft", "rl"))
    (line,) = found.lines
    assert {method: cell.values for method, cell in line.accuracy.items()} == {
        "base": (0.4,),
        "sft": (0.5, 0.5),
        "rl": (0.7, 0.75),
    }
    # Wilson for 14 of 20: 14.5 is rounded to even
    assert line.accuracy["rl"].text() == "72.5 ± 3.5 [48–85]"
    assert line.accuracy["base"].text() == "40.0 [22–61]"
    assert line.reordered["rl"].values == (0.35, 0.35)
    assert (line.chance, line.prior, line.blank["rl"].values, line.shuffled) == (0.5, 0.45, (0.25, 0.25), {})


def test_the_p_value_is_the_largest_over_the_seeds(runs):
    def bools(right):
        return np.array([i in right for i in range(ROWS)])

    (line,) = collect(runs).lines
    expected = [mcnemar(bools(range(8)), bools(range(4, stop))).p_value for stop in (18, 19)]
    assert expected[0] > expected[1]
    assert line.p_values["base"] == expected[0]


def test_the_mean_counts_each_file_alike_and_is_spread_over_seeds(runs):
    found = collect(runs)
    other = dataclasses.replace(
        found.lines[0], name="ct", accuracy={name: Cell((0.1, 0.3), 5) for name in found.lines[0].accuracy}
    )
    both = dataclasses.replace(found, lines=(found.lines[0], other))
    assert both.mean("rl").values == pytest.approx((0.4, 0.525))


def test_every_form_holds_every_figure(runs, tmp_path):
    found = collect(runs)
    (tmp_path / "base" / "report.html").write_text("")
    markdown, latex, content, page = (path.read_text() for path in write_reproduction(tmp_path, found))
    assert "| mri | 20 | 50.0 | 45.0 | 40.0 [22–61] | 50.0 ± 0.0 [30–70] | 72.5 ± 3.5 [48–85] |" in markdown
    assert r"72.5 $\pm$ 3.5 [48--85]" in latex
    assert latex.count(r"\\") == 3  # headings, a file, the mean
    assert json.loads(content)["lines"][0]["accuracy"]["rl"]["values"] == [0.7, 0.75]
    assert "72.5 ± 3.5 [48–85]" in page
    assert 'href="base/report.html"' in page
    console = Console(width=80, record=True, file=(tmp_path / "shown").open("w"))
    console.print(found.table())
    shown = console.export_text()
    assert all(text in shown for text in ("72.5", "[48–85]", "blank", "order", "35.0", "mri"))
    assert max(map(len, shown.splitlines())) <= 80


def test_runs_on_other_rows_are_no_table(runs, tmp_path):
    write_run(tmp_path / "sft-seed1", 100, {1}, ids=ROWS - 1)
    with pytest.raises(ValueError, match="different rows of mri"):
        collect(runs)


def test_a_run_without_evaluation_names_its_folder(tmp_path):
    with pytest.raises(ValueError, match=r"no evaluation in .*rl-seed0"):
        collect([("rl", 0, tmp_path / "rl-seed0")])


def test_the_plan_is_the_base_then_seed_by_seed(tmp_path):
    runs = plan(tmp_path, ["sft", "rl"], [3, 4], ["+experiment=medvqa_600", "steps=5"])
    assert [run.folder.name for run in runs] == ["base", "sft-seed3", "rl-seed3", "sft-seed4", "rl-seed4"]
    assert runs[2].arguments[:5] == ["-m", "rlmed.launch", "+experiment=medvqa_600", "steps=5", "seed=3"]
    assert default_folder(["steps=5", "+experiment=medvqa_600"]) == Path("outputs/reproduce/medvqa_600")


def test_each_command_is_given_what_it_reads(tmp_path):
    # with a seed of its own, and lengths for rollouts alone
    experiment = "+experiment=medvqa_600_released"
    shared = ("cluster.threads=1", "eval.max_tokens=9")
    given = [experiment, "algo=dapo", "sft.epochs=3", "cluster=ray", *shared, "data.mix={MRI:1}"]
    base, sft, rl = plan(tmp_path, ["sft", "rl"], [3], given)
    assert base.overrides == (experiment, "cluster=ray", *shared)
    assert sft.overrides == (experiment, "sft.epochs=3", "cluster=ray", *shared, "data.mix={MRI:1}")
    assert rl.overrides == (experiment, "algo=dapo", "cluster=ray", *shared, "data.mix={MRI:1}")
    for run, program in ((base, "evaluate"), (sft, "sft"), (rl, "train")):
        assert unused_overrides(program, run.arguments[2:]) == []


@pytest.mark.parametrize("profile", ["profile=tiny", "profile=paper"])
def test_all_runs_have_the_profile(profile, tmp_path):
    given = ("+experiment=medvqa_600_dapo", profile)
    assert {run.overrides for run in plan(tmp_path, ["sft", "rl"], [0], given)} == {given}


@pytest.mark.parametrize("models", [["model=qwen2_vl_2b"], ["model=some/folder", "data=mine.jsonl", "data.train=x"]])
def test_shorthands_are_shared_as_they_were_given(models, tmp_path):
    assert {run.overrides for run in plan(tmp_path, ["sft", "rl"], [0], models)} == {tuple(models)}


@pytest.mark.parametrize(
    ("methods", "override", "said"),
    [
        (
            ["sft", "rl"],
            "algo.loss.dual_clip=2",
            r"dual_clip=2: rlmed\.launch .* Set algo\.loss\.clip=dual",
        ),
        (["sft", "rl"], "reliability.samples=3", r"reliability\.samples=3: rlmed\.launch .*read reliability\.samples"),
        (["sft"], "algo.group_size=3", r"algo\.group_size=3: rlmed\.sft .*read algo\.group_size\."),
        (["rl"], "algo=grpoo", r"algo=grpoo: .*not found; .*mean grpo\?"),
        (["rl"], "+experiment=medvqa", r"experiment=medvqa: .*not found; .*mean medvqa_600\?"),
        (["rl"], "data.mix={MRI:0.5", "data.mix={MRI:0.5: not a mapping"),
        (["rl"], "algo.kl_coeff=0", r"unknown .*algo\.kl_coeff: .*algo\.loss\.kl_coef\?"),
    ],
)
def test_what_none_of_the_runs_reads_is_refused(methods, override, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        plan(tmp_path, methods, [0], [override])


@pytest.mark.parametrize(
    ("seeds", "overrides", "said"),
    [
        ([1, 1], [], "a repeated seed"),
        ([1], ["seed=4"], "seed=4 is set for each run"),
        ([1], ["hydra.run.dir=x"], "is set for each run"),
        ([1], ["eval.trust=true"], "unknown key eval.trust: python -m rlmed.reliability"),
        ([1], ["medvqa_600"], "medvqa_600 is not of the form key=value"),
    ],
)
def test_what_cannot_be_shared_by_all_runs_is_refused(seeds, overrides, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        plan(tmp_path, ["rl"], seeds, overrides)


def test_a_method_given_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--methods rl rl: "):
        plan(tmp_path, ["rl", "rl"], [0], [])


class Commands:
    """Stands for the commands: each writes an evaluation and ends with the next status."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *statuses: int) -> None:
        self.given: list[list[str]] = []
        self._statuses = list(statuses)
        monkeypatch.setattr("rlmed.reproduce.runs.subprocess.run", self)

    def __call__(self, command: list[str], **_: object) -> SimpleNamespace:
        self.given.append(command)
        status = self._statuses.pop(0) if self._statuses else 0
        if status == 0:
            where = next(entry for entry in command if entry.startswith("hydra.run.dir="))
            write_run(Path(where.partition("=")[2].strip("'")), 100, {1, 2})
        return SimpleNamespace(returncode=status)


def test_what_is_done_is_not_run_again_and_a_failure_is_taken_up(tmp_path, monkeypatch):
    commands = Commands(monkeypatch, 0, 2)
    runs = plan(tmp_path / "all of it", ["rl"], [0, 1], ["steps=5"])
    with pytest.raises(RuntimeError, match="rl-seed0 failed with status 2"):
        reproduce(runs, Console(quiet=True))
    assert [run.done for run in runs] == [True, False, False]
    found = reproduce(runs, Console(quiet=True))
    assert [command[2] for command in commands.given] == ["rlmed.evaluate", *["rlmed.launch"] * 3]
    assert ["resume=auto" in command for command in commands.given] == [False, True, True, True]
    assert found.lines[0].accuracy["rl"].values == (0.1, 0.1)


def test_a_run_that_lost_a_process_goes_on_but_not_for_ever(tmp_path, monkeypatch):
    commands = Commands(monkeypatch, 3, 3, 0, 3, 3, 3)
    run, other = RunCommand("rl", 0, tmp_path, ()), RunCommand("rl", 1, tmp_path, ())
    run.execute()
    assert len(commands.given) == 3
    with pytest.raises(RuntimeError, match="status 3"):
        other.execute()
    assert run.done
    assert not other.done


def test_a_finished_run_counts_only_for_its_own_settings(tmp_path, monkeypatch, capsys):
    commands = Commands(monkeypatch)
    run = RunCommand("base", 0, tmp_path, ("steps=6",))
    run.folder.mkdir()
    (run.folder / DONE_FILE).write_text(json.dumps({"arguments": run.arguments, "seconds": 1.0}))
    with pytest.raises(SystemExit) as ended:
        main(["steps=5", "--out", str(tmp_path), "--seeds", "0"])
    assert ended.value.code == 2
    assert ": choose another folder with --out" in capsys.readouterr().err
    assert commands.given == []  # known before anything is run
