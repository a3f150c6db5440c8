"""The rules of `rlmed.core.config.rules` against the keys that each command's run reads."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import shutil
import sys
import typing
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlmed import evaluate, launch, reliability, sft
from rlmed.core.config.rules import RULES
from rlmed.core.config.schema import RunConfig
from rlmed.core.config.use import plain_values, rule_of, schema_keys
from tests.unit.rewards.test_embedding import bert  # noqa: F401

pytestmark = pytest.mark.slow

Config = Callable[..., RunConfig]

MAIN = {"train": launch.main, "sft": sft.main, "evaluate": evaluate.main, "reliability": reliability.main}
NOT_USES = ("dataclasses.py", "core/config.py", "core/config_running.py")
"""Ends of the files that read keys to check or to copy them."""
ELSEWHERE = {
    "name": "the run's folder, by interpolation",
    "profile": "the name, by interpolation",
    "data.download": "an error's text",
    "cluster.check_memory": "a run that lacks memory",
}
"""Keys that do something without being read in a run that goes well."""
PASSED_ON = {"rollout.on_push"}
"""Keys that every pool is given, though nothing is pushed to it but by rlmed.launch."""
SPREAD = """
def first_token(example, completion):
    return float(completion.token_ids[0] % 7)
"""
ADAPTERS = [("learner=lora",)] if importlib.util.find_spec("peft") else []
NEEDS = {"reward.judge.": ("openai",), "logging.": ("wandb", "mlflow")}
"""Packages that runs with these keys need; without one, they are not tried."""
UNTRIED = tuple(where for where, names in NEEDS.items() if not all(map(importlib.util.find_spec, names)))
BOXES = {"task": "grounding", "image": "0.png", "question": "Where?", "answer": [[31, 10, 58, 36]]}
REPORTS = {"task": "report", "image": "0.png", "question": "Report?", "answer": "a cyst"}
RADEVAL = """
class RadEval:
    def __init__(self, metrics, per_sample, show_progress):
        pass
"""
REWARDED = [
    ("reward=task", "reward.iou.kind=threshold", "data.train=boxes.jsonl"),
    ("+reward.weights.embedding=1", "reward.embedding.model=encoder"),
    ("+reward.weights.radeval=1", "reward.radeval.metric=ratescore"),
    ("+reward.weights.judge=1", "reward.judge.url=http://127.0.0.1:9/v1", "reward.judge.model=m"),
    (
        "loggers=[wandb,mlflow]",
        "logging.offline=true",
        "logging.tracking_uri=sqlite:///mlflow.db",
        "logging.rollouts_every=1",
    ),
]
"""Random completions have no answer, so judge and models are not asked."""
RUNS = {
    "train": (
        ("reward.extra=[spread:first_token]", "eval.every=1"),
        (
            "reward.extra=[spread:first_token]",
            "data.selection.mode=pass_rate",
            "algo.loss.clip=dual",
            "learner.mini_batches=2",
            "algo.dynamic_sampling=true",
            "algo.max_staleness=1",
            "eval.at_start=false",
            "eval.at_end=false",
            "eval.every=1",
        ),
        *(("reward.extra=[spread:first_token]", *run) for run in ADAPTERS),
        *(
            ("reward.extra=[spread:first_token]", *run)
            for run in REWARDED
            if not any(entry.startswith(UNTRIED) for entry in run)
        ),
    ),
    "sft": (("sft.epochs=1", "sft.batch_size=5"), *(("sft.epochs=1", "sft.batch_size=5", *run) for run in ADAPTERS)),
    "evaluate": (
        (),
        ("data.eval=[reports.jsonl]", "eval.report_metrics=[radeval:ratescore,embedding:encoder]"),
    ),
    "reliability": (("reliability.samples=2",),),
}
"""Overrides of runs that together make every key do something that needs neither Ray nor vLLM."""


@pytest.fixture
def keys_read(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The keys that are read from now on, as attributes of the configuration's records."""
    read: set[str] = set()

    def watch(cls: type[Any], where: str, names: Collection[str]) -> None:
        def get(self: Any, name: str) -> Any:
            reader = sys._getframe(1).f_code
            if name in names and reader.co_name != "__post_init__" and not reader.co_filename.endswith(NOT_USES):
                read.add(f"{where}{name}")
            return object.__getattribute__(self, name)

        monkeypatch.setattr(cls, "__getattribute__", get)

    for cls, where in sections(RunConfig):
        watch(cls, where, {entry.name for entry in dataclasses.fields(cls)})
    return read


def sections(cls: type[Any], where: str = "") -> Iterator[tuple[type[Any], str]]:
    """Every record of the configuration, with what stands before its keys."""
    yield cls, where
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            yield from sections(typing.cast(type[Any], hint), f"{where}{name}.")


def active(program: str, config: RunConfig) -> set[str]:
    """The keys that `program` reads according to the rules."""
    values = plain_values(dataclasses.asdict(config))
    return {key for key in schema_keys() if rule_of(program, key, values) is None}


@pytest.mark.parametrize("program", MAIN)
def test_a_command_reads_what_the_rules_say_and_nothing_else(
    program: str,
    make_config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    keys_read: set[str],
    bert: Path,  # noqa: F811
) -> None:
    """A new key that nobody reads fails until a rule refuses it; so does a rule on a read key."""
    (tmp_path / "spread.py").write_text(SPREAD)
    (tmp_path / "radeval.py").write_text(RADEVAL)
    (tmp_path / "boxes.jsonl").write_text(json.dumps(BOXES))
    (tmp_path / "reports.jsonl").write_text(json.dumps(REPORTS))
    shutil.copytree(bert, tmp_path / "encoder")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for number, overrides in enumerate(RUNS[program]):
        config = make_config(*overrides)
        folder = tmp_path / f"run{number}"
        folder.mkdir()
        keys_read.clear()
        MAIN[program](config, folder)
        read = set(keys_read)
        assert active(program, config) - read - ELSEWHERE.keys() == set(), overrides
        never = {
            key
            for key in schema_keys()
            for rule in RULES
            if program in rule.programs and rule.covers(key, None) and not rule.conditional and not rule.values
        }
        assert read & never <= PASSED_ON, overrides


NAMED_IN = (
    "cluster/build",
    "cluster/capacity",
    "cluster/ray_session",
    "cluster/reward_processes",
    "models/loading",
    "data/loading",
)


def test_what_these_runs_leave_idle_is_read_where_processes_and_engines_are_built(make_config: Config) -> None:
    """Ray's and vLLM's keys, and those of generated data: by their names in the source."""
    tried = set().union(*(active(program, make_config(*run)) for program, runs in RUNS.items() for run in runs))
    root = Path(launch.__file__).parent
    trees = [ast.parse((root / f"{name}.py").read_text()) for name in NAMED_IN]
    named = {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    idle = {key for key in schema_keys() if key not in tried and not key.startswith(UNTRIED)}
    assert {key.rpartition(".")[2] for key in idle} - named == set()
    assert {key.partition(".")[0] for key in idle - {"reward.slow.workers", "reward.slow.worker_cpus"}} == {
        "cluster",
        "rollout",
        "data",
    }
