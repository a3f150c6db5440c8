"""Commands in README and docs are really run, on a small model and small data.

A command of the documents is here: in `RUN`, or in `NOT_RUN` with the reason.
"""

from __future__ import annotations

import functools
import json
import re
import runpy
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rlmed.models.loading import model_folder
from tests.integration.forked import run_forked
from tests.integration.processes import marked, new_mark
from tests.root import ROOT
from tests.unit.test_documents import CASES, FENCE

COMMANDS = sorted({shlex.join([name, *arguments]) for _, name, arguments in CASES if arguments or name == "doctor"})
SMALL = [
    *("algo.groups_per_step=1", "algo.group_size=2", "algo.dynamic_sampling=false", "rollout.max_tokens=8"),
    *("eval.max_tokens=8", "eval.limit=2", "eval.controls=false", "preflight.enabled=false", "cluster.threads=1"),
    "checkpoint.every=1",
]
TRAIN = [*SMALL, "steps=2", "hydra.run.dir=outputs/run/DATE"]
AGAIN = [*SMALL, "steps=1"]
EVALUATED = ["eval.limit=2", "eval.max_tokens=8", "eval.controls=false", "cluster.threads=1"]
BRIEF = ["--max-tokens", "8"]

RUN: dict[str, list[str]] = {
    "prepare csv --source questions.csv --out data/mine --column question=Frage": [],
    "prepare csv --source questions.csv --out data/mine": ["--overwrite"],
    "init mine --data data/mine/train.jsonl --eval data/mine/test.jsonl --yes": [],
    "launch --config-dir mine/conf +experiment=mine --dry-run": [*SMALL, "steps=1"],
    "launch --config-dir mine/conf +experiment=mine": AGAIN,
    "launch data=jsonl data.train=data/mine/train.jsonl 'data.eval=[data/mine/test.jsonl]'"
    " 'reward.extra=[my_rewards:few_words]' steps=20 checkpoint.every=5": TRAIN,
    "launch data=jsonl data.train=train.jsonl 'data.eval=[test.jsonl]' model=MODEL reward=task": AGAIN,
    "launch data=jsonl data.train=train.jsonl 'data.extra_tasks=[my_tasks:Staging]' reward=task": [
        *AGAIN, "data.train=stages.jsonl", "data.eval=[stages.jsonl]",
    ],
    "sft data=jsonl data.train=train.jsonl 'data.eval=[mri.jsonl,ct.jsonl]' model=models/Qwen2-VL-2B-Instruct sft.epochs=2": [
        *EVALUATED, "sft.batch_size=8", "hydra.run.dir=outputs/sft",
    ],
    "evaluate model=outputs/run/DATE/checkpoints/step-000300 'data=[mri.jsonl,ct.jsonl]'": EVALUATED,
    "evaluate model=outputs/run/DATE/checkpoints/step-000300 data=data/mine/test.jsonl": EVALUATED,
    "evaluate model=MODEL data=jsonl 'data.eval=[test.jsonl]' 'eval.predictions=[medevalkit,vlmevalkit,lmms_eval]'": EVALUATED,
    "reliability model=outputs/run/DATE/checkpoints/step-000300 data=mri.jsonl": ["eval.limit=2", "eval.max_tokens=8"],
    "ask image.png 'Which organ is shown?' --options liver spleen kidney"
    " --model outputs/run/DATE/checkpoints/step-000300": BRIEF,
    "ask pa.png lateral.png 'On which side is the effusion?' --options left right"
    " --model outputs/run/DATE/checkpoints/step-000300": BRIEF,
    "ask 8.png 'Where is the cyst?' --task grounding --model outputs/run/DATE/checkpoints/step-000300": BRIEF,
    "ask image.png 'Which findings?' --task labels --options cyst mass edema --synonyms spellings.csv"
    " --model outputs/run/DATE/checkpoints/step-000300": BRIEF,
    "ask 11.png 'Which stage?' --task staging --extra-tasks my_tasks:Staging --model MODEL": BRIEF,
    "launch data=jsonl data.train=train.jsonl 'data.eval=[test.jsonl]' model=MODEL steps=200": AGAIN,
    "launch data=jsonl data.train=train.jsonl 'data.eval=[test.jsonl]' model=MODEL reward=task steps=200": [
        *AGAIN, "data.train=tasks.jsonl", "data.eval=[tasks.jsonl]",
    ],
    "launch data=jsonl data.train=train.jsonl 'data.eval=[test.jsonl]' model=MODEL reward=task steps=200"
    " reward.iou.kind=threshold reward.iou.end=0.7": [*AGAIN, "data.train=tasks.jsonl", "data.eval=[tasks.jsonl]"],
    "evaluate model=outputs/run/DATE/checkpoints/step-000200 'data=[test.jsonl]'": EVALUATED,
    "ask image.png 'Which organ is shown?' --task open --model outputs/run/DATE/checkpoints/step-000200": BRIEF,
    "ask image.png 'Write the report.' --task report --model outputs/run/DATE/checkpoints/step-000200": BRIEF,
    "report RUN": [],
    "export outputs/run/DATE --out models/mine": ["--check", "2"],
    "leakage --train train.jsonl --test mri.jsonl ct.jsonl --json leaks.json": [],
    "doctor": [],
}  # fmt: skip
"""Documented commands in this order, and settings that make them short."""

NOT_RUN = {
    "needs a GPU, or the paper's model": r"profile=paper|-7B-|model=models/Qwen2-VL-2B-Instruct .*steps=300",
    "needs another server or model, or uploads": r"reward=judge|reward=embedding|--push-to-hub|--check-vllm|loggers=",
    "needs a published set; the readers' tests make small ones of each": r"^prepare (?!csv --source q)",
    "needs a package that carries weights, and takes minutes": r"smol|terms/|DATE/checkpoints/step-000020 prompt=short",
    "starts Ray: test_launch_ray.py and others": r"cluster=ray\b",
    "generates its data, or takes minutes: other tests run it shorter": (
        r"^reproduce \+exp|^sft \+experiment=medvqa_600_sft|^(launch|sft) profile=tiny data=phantom_tasks"
        r"|^reliability model=outputs/medvqa_600_tiny|^launch \+experiment=medvqa_600 profile=tiny steps=12"
    ),
    "is one of those that are run, with other values": (
        r"^prepare csv --source questions\.csv --out data/mine --column question=Frage --column image=Bild$"
        r"|^ask (scans/1\.png|image\.png '.*' (--task labels )?--options .* --model .*/step-0002)"
        r"|^ask image\.png 'Where is the cyst\?' --task grounding|^reliability model=DIR data=FILE"
        r"|^launch data=jsonl data\.train=(train\.jsonl model=MODEL|data/reports/train\.jsonl) .*reward=task"
        r"|^launch data=jsonl data\.train=train\.jsonl model=MODEL reward=task reward\.iou"
    ),
    "serves until it is ended, or asks for a model's settings: test_studio.py and test_init.py": r"^studio|^init mine ",
    "is part of a command, or prints help": r"--help$|^launch '?(…|\.\.\.)|--source PATH",
}
"""Why a command is not run here, and how to tell it."""


def why_not(command: str) -> list[str]:
    return [reason for reason, pattern in NOT_RUN.items() if re.search(pattern, command)]


def test_each_documented_command_is_run_or_has_a_reason() -> None:
    assert [command for command in COMMANDS if command not in RUN and not why_not(command)] == []
    # nor is anything here that no page says
    assert [command for command in RUN if command not in COMMANDS] == []
    assert [reason for reason in NOT_RUN if not any(reason in why_not(command) for command in COMMANDS)] == []


def source(page: str, name: str) -> str:
    """The file that a block of a page says to write."""
    (block,) = [text for text in FENCE.findall((ROOT / page).read_text(encoding="utf-8")) if f"# {name}" in text[:20]]
    return str(block)


def write_rows(folder: Path) -> None:
    """Pictures, the table of README's German questions, and data files of each kind."""
    (folder / "scans").mkdir()
    generator = np.random.default_rng(0)
    names = [f"scans/{number}.png" for number in range(1, 25)]
    for name in (*names, "image.png", "pa.png", "lateral.png", "8.png", "11.png"):
        Image.fromarray(generator.integers(0, 255, (56, 84, 3), dtype=np.uint8)).save(folder / name)
    options = ["liver", "spleen", "kidney"]
    rows = [
        {
            "image": name,
            "question": f"Which organ is shown ({number})?",
            "options": options,
            "answer": options[number % 3],
        }
        for number, name in enumerate(names)
    ]
    for name, part in (("train", rows[:8]), ("mri", rows[8:14]), ("ct", rows[14:20]), ("test", rows[20:])):
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in part))
    stages = [{"task": "staging", "image": name, "question": "Which stage?", "answer": 2} for name in names[:4]]
    (folder / "stages.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in stages))
    tasks = [
        {"task": "open", "question": "Which organ is shown?", "answer": ["liver", "the liver"]},
        {"task": "grounding", "question": "Where is the cyst?", "answer": [[31, 40, 58, 50]]},
        {"task": "labels", "question": "Which findings?", "options": ["cyst", "mass", "edema"], "answer": ["cyst"]},
        {"task": "report", "question": "Write the report.", "answer": "There is a cyst in the liver."},
    ]
    (folder / "tasks.jsonl").write_text("".join(f"{json.dumps({'image': '8.png', **row})}\n" for row in tasks))
    table = ["image,question,Frage,A,B,C,answer,split"]
    for number, row in enumerate(rows[:12]):
        questions = f"{row['question']},Welches Organ ({number})?"
        split = "train" if number < 8 else "test"
        table.append(f"{row['image']},{questions},liver,spleen,kidney,{row['answer']},{split}")
    (folder / "questions.csv").write_text("\n".join(table) + "\n")
    (folder / "spellings.csv").write_text("spelling,label\nswelling,edema\n")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("documents")
    write_rows(folder)
    (folder / "my_rewards.py").write_text(source("docs/tutorial.md", "my_rewards.py"))
    (folder / "my_tasks.py").write_text(source("docs/tasks.md", "my_tasks.py"))
    (folder / "models").mkdir()
    shutil.copytree(model_folder("embedded:tiny_base"), folder / "models" / "Qwen2-VL-2B-Instruct")
    return folder


def shortened(command: str, more: list[str]) -> tuple[str, list[str]]:
    """Module and arguments of a command, with names that are there and settings replaced."""
    command = re.sub(r"step-\d{6}", "step-000002", command)
    command = re.sub(r"\bMODEL\b", "models/Qwen2-VL-2B-Instruct", command)
    command = re.sub(r"\bRUN\b", "outputs/run/DATE", command)
    name, *arguments = shlex.split(command)
    replaced = {word.partition("=")[0] for word in more if "=" in word}
    return f"rlmed.{name}", [word for word in arguments if word.partition("=")[0] not in replaced] + more


@pytest.mark.slow
def test_the_commands_run_one_after_the_other(workplace: Path) -> None:
    mark = new_mark() | {"PYTHONPATH": f"{ROOT}:{workplace}"}
    failed = []
    for command, more in RUN.items():
        module, arguments = shortened(command, more)
        done = run_forked(functools.partial(runpy.run_module, module, run_name="__main__"), arguments, workplace, mark)
        if done.returncode:
            failed.append(f"{command}\n{done.output[-1500:]}")
    assert not failed, "\n\n".join(failed)
    assert not marked(mark)
    for made in ("data/mine/train.jsonl", "outputs/run/DATE/report.html", "models/mine/README.md", "leaks.json"):
        assert (workplace / made).is_file(), made
    steps = (workplace / "outputs/run/DATE/metrics.jsonl").read_text().splitlines()
    assert "reward/few_words" in json.loads(steps[0])
