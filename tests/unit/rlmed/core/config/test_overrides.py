"""Command lines as people write them: any file name passes; an error is one line with advice."""

from __future__ import annotations

import re
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from rlmed.commandline import run_command
from rlmed.core.config.composing import compose_config
from rlmed.core.config.overrides import expand
from rlmed.core.config.schema import RunConfig

NAMES = [
    "测试", "fold=2", "my fold", "it's", 'q"q', "fold(2)", "a(1)b", "range(3)", "glob(*)", "[x]", "{x}", "a]b", "[a", "a}",
    "$x", "$", "a\\b", "\\a", "a\\\\b", "a\\'b", "'x", "x'", "'x'y", "Röntgen ä", "🦴", "~x", "x#", "a;b&c", "a!b", "2024",
    "1e5", "1_0", "nan", "true", "-x", "--x", "a:b", "*?", "%", "@x", "<x>", "^`", "x\ty", "+x", "=x", "x=", "null ",
    "x\udcfcy", '"', "'a''b'", "str(5)x", "..", "a\u00a0b", "e\u0301",
]  # fmt: skip
"""Names that mean something to Hydra, OmegaConf, YAML or a shell."""


def composed(*arguments: str) -> RunConfig:
    return compose_config("train", expand(arguments, cuda=False))


@pytest.mark.parametrize("name", NAMES)
def test_any_name_is_taken_as_it_is(name: str) -> None:
    file = f"{name}.jsonl"
    config = composed(f"data=[{file},b.jsonl]", f"data.train={file}", f"model=m/{name}", f"name=n{name}")
    assert config.data.eval == (file, "b.jsonl")
    assert config.data.train == file
    assert config.model.path == f"m/{name}"
    assert config.name == f"n{name}".rstrip()  # Hydra has no spaces at the end of a value
    assert composed(f"data={file}").data.eval == (file,)
    assert composed(f"data.eval=[b.jsonl, {file} ]").data.eval == ("b.jsonl", file)


@pytest.mark.parametrize(
    ("argument", "files"),
    [
        ("data=a.jsonl,b.jsonl", ("a.jsonl", "b.jsonl")),
        ("data.eval=a.jsonl,测.jsonl", ("a.jsonl", "测.jsonl")),
        ("data=a,b.jsonl", ("a,b.jsonl",)),
        ("data.eval=a,b.jsonl", ("a,b.jsonl",)),
        ("data=['a,b.jsonl',\"c]d.jsonl\"]", ("a,b.jsonl", "c]d.jsonl")),
        ("data='a b.jsonl'", ("a b.jsonl",)),
        ("data.eval=[]", ()),
        ("data.eval=[2024,true]", ("2024", "true")),
        ("data.eval=x(1,2).jsonl", ("x(1,2).jsonl",)),
    ],
)
def test_files_and_commas(argument: str, files: tuple[str, ...]) -> None:
    assert composed("data=jsonl", argument).data.eval == files


def test_what_hydra_reads_itself_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE", "/x")
    assert composed("data.train='a b'").data.train == "a b"
    assert composed("data.train=null").data.train is None
    assert composed("data.train=${oc.env:PLACE}/测.jsonl").data.train == "/x/测.jsonl"
    assert composed(r"data.train='a\${b}.jsonl'").data.train == "a${b}.jsonl"
    assert composed("eval={limit:4,every:2}").eval.limit == 4
    assert composed("steps= 5").steps == composed("steps = 5").steps == 5
    assert composed("reward.extra=m:f,m:g").reward.extra == ("m:f", "m:g")
    assert composed("rollout.stop=[</answer>,a b]").rollout.stop == ("</answer>", "a b")
    assert expand(["model=a,b", "seed=1,2"], cuda=False, sweeps=True) == ["model.path=a,b", "seed=1,2"]


def test_a_home_that_the_shell_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ä b")
    assert composed("model=~/m").model.path == "/home/ä b/m"
    assert composed("data=~/a.jsonl").data.eval == ("/home/ä b/a.jsonl",)
    assert expand(["hydra.run.dir=~/x"], cuda=False) == ["hydra.run.dir='/home/ä b/x'"]
    assert composed("model='~/m'").model.path == "~/m"


def test_keys_in_braces_for_a_group() -> None:
    assert composed("data={mix:{MRI:0.5,CT:1}}").data.mix == {"MRI": 0.5, "CT": 1}


def test_an_experiment_with_or_without_plus() -> None:
    for written in ("experiment", "+experiment", "++experiment"):
        assert expand([f"{written}=medvqa_600"], cuda=False) == ["+experiment=medvqa_600", "profile=tiny"]
        assert expand([f"{written}=medvqa_600"], cuda=True) == ["+experiment=medvqa_600"]
    both = expand(["experiment=medvqa_600,medvqa_600_dapo"], cuda=False, sweeps=True)
    assert both == ["+experiment=medvqa_600,medvqa_600_dapo", "profile=tiny"]
    assert expand(["debug=rollouts_only", "+algo=dapo"], cuda=False) == ["+debug=rollouts_only", "algo=dapo"]


@pytest.fixture
def own_yaml(tmp_path: Path) -> Path:
    """A folder for `--config-dir` with files as people write them."""
    folder = tmp_path / "own" / "experiment"
    folder.mkdir(parents=True)
    head = b"# @package _global_\n"
    contents = {
        "good": head + b"steps: 7\n",
        "interpolation": head + b"data:\n  train: ${data.nope}\n",
        "environment": head + b"name: ${oc.env:NO_SUCH_VARIABLE}\n",
        "brackets": head + b"data: [1,\nsteps: 3\n",
        "twice": head + b"steps: 1\nsteps: 2\n",
        "tab": head + b"\tsteps: 1\n",
        "latin": head + b"name: R\xf6ntgen\n",
        "plain": b"steps: 1\n",
        "list": b"- a\n",
        "empty": b"",
        "unknown": head + b"stepz: 1\n",
        "option": head + b"defaults:\n  - override /algo: foo\n",
    }
    for name, content in contents.items():
        (folder / f"{name}.yaml").write_bytes(content)
    return folder.parent


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["seed="], "seed='' is empty: give"),
        (["steps=", "5"], r"steps= 5: no spaces .* steps=5\?"),
        (["seed=5=5"], "seed='5=5' .*expected an integer"),
        (["learner.lrr=1"], r"unknown .* learner\.lrr: .* learner\.lr\?"),
        (["++learner.lrr=1"], r"unknown .* learner\.lrr: .* learner\.lr\?"),
        (["eval.trust=true"], r"unknown .*eval\.trust: .* rlmed\.reliability "),
        (["ä=1"], "unknown key ä"),
        (["=1"], "=1: the key before = is missing"),
        (["1=2"], "1=2: invalid key '1'"),
        (["algo=grop"], r"algo=grop: .*not found; .* grpo\? .* cispo, dapo"),
        (["learner=5"], "learner=5: option not found; .* adamw"),
        (["experiment=nonsense"], "experiment=nonsense: option not found; .* medvqa_600,"),
        (["hydra/launcher=foo"], "hydra/launcher=foo: option not found"),
        (["~data.trian"], r"delete from .*'data\.trian' does not exist"),
        (["seed=1,2"], "seed=1,2: several values need --multirun"),
        (["data.limit=range(3)"], r"data\.limit=range\(3\): several values need --multirun"),
        (["data.mix={Röntgen:0.5}"], r"data\.mix=\{Röntgen:0\.5\}: .*invalid character.* Keys .*--config-dir"),
        (["data.mix={MRI:0.5"], r"data\.mix=\{MRI:0\.5: not a mapping"),
        (["data.eval=[a,,b]"], r"data\.eval=\[a,,b\]: not a list .*, as data\.eval=\['a,b','c'\]"),
        (["data.train=${foo}"], r"data\.train: .* 'foo' not found: correct .*\$\{…\}"),
        (["data.train=${oc.env:NO_SUCH_VARIABLE}"], "'NO_SUCH_VARIABLE' not found"),
        (["hydra.run.dir="], r"hydra\.run\.dir= is empty"),
        (["hydra.sweep.dir=x"], r"hydra\.sweep\.dir=x is for --multirun: set hydra\.run\.dir=FOLDER"),
        (["-m", "seed=1,2", "hydra.run.dir=x"], r"hydra\.run\.dir=x .*--multirun .* set hydra\.sweep\.dir="),
        (["algo=null"], r"algo=null: .*\balgo: .* cispo, dapo"),
        (["algo=[grpo,dapo]"], r"algo=\[grpo,dapo\]: .*\balgo: .* cispo, dapo\b"),
        (["experiment=[medvqa_600]"], r"experiment=\[medvqa_600\]: .*\bexperiment: .* medvqa_600,"),
        (["profile=null"], r"profile=null: .*\bprofile: .* paper, tiny"),
        (["profile=moon"], "profile=moon: .*not found; .* paper, tiny"),
        (["+experiment=medvqa_600", "profile=moon"], "profile=moon: .*not found; .* paper, tiny"),
        (["--config-dir", "own", "experiment=good", "profile=tiny"], r"'profile'.*No match in .*\+profile=tiny"),
        (["debug=null"], r"debug=null: .*\bdebug: .* fake_engine"),
        (
            ["+experiment=medvqa_600", "+experiment=medvqa_600_dapo"],
            "experiment is given twice",
        ),
        (["data=x.csv"], r"data=x\.csv: x\.csv is a table, .*rlmed\.prepare csv --source x\.csv"),
        (["data=x.rows"], r"data=x\.rows: .*from JSON Lines files \(\.jsonl\)"),
        (["data=rows.JSONL"], r"data=rows\.JSONL: .*from JSON Lines files"),
        (["data=folder/"], "data=folder/: .*from JSON Lines files"),
        (["model="], r"model\.path='' is empty"),
        (["data.train="], r"data\.train='' is empty: give"),
        (["data.eval="], r"data\.eval='' is empty"),
        (["data.eval=[a.jsonl,'']"], r"data\.eval\[1\]='' is empty"),
        (["resume="], "resume='' is empty"),
        (["learner.lr=inf"], r"learner\.lr=inf is not finite: "),
        (["learner.betas=[nan,0.9]"], r"learner\.betas\[0\]=nan is not finite"),
        (["data.mix={MRI:nan}"], r"data\.mix\.MRI=nan is not finite"),
        (["--config-name", "nonsense"], "nonsense: YAML .*not found in .*--config-dir"),
        (["--config-dir", "nowhere"], "--config-dir nowhere: folder not found"),
        (["--config-path", "x"], "--config-path is not supported: --config-dir DIR adds"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--cfg", "nonsense"], "argument --cfg/-c: invalid choice: 'nonsense'"),
        (["--multirun", "seed=1,2", "steps=x"], "steps='x' has the wrong type"),
        (["-m", "seed=1,2", "algo=foo"], "algo=foo: option not found"),
        (["-m", "seed=1,2", "resume=auto"], "resume=auto"),
        (["--config-dir", "own", "experiment=interpolation"], r"data\.train: Interpolation key 'data\.nope' not found"),
        (["--config-dir", "own", "experiment=environment"], "'NO_SUCH_VARIABLE' not found"),
        (["--config-dir", "own", "experiment=brackets"], r"own/experiment/brackets\.yaml, line 4 is not valid YAML"),
        (["--config-dir", "own", "experiment=twice"], r"twice\.yaml, line 3 .*YAML \(.*duplicate key steps"),
        (["--config-dir", "own", "experiment=tab"], r"tab\.yaml, line 2 is not valid YAML"),
        (["--config-dir", "own", "experiment=latin"], r"not UTF-8, see b'name: R\\xf6ntgen'"),
        (["--config-dir", "own", "experiment=plain"], "must begin with .*`# @package _global_`"),
        (["--config-dir", "own", "experiment=list"], "must begin with .*`# @package _global_`"),
        (["--config-dir", "own", "experiment=empty"], "must begin with .*`# @package _global_`"),
        (["--config-dir", "own", "experiment=unknown"], r"unknown .* stepz: .* steps\?"),
        (["--config-dir", "own", "experiment=option"], "algo=foo: option not found; choose"),
    ],
)
@pytest.mark.parametrize("program", ["train", "sft", "evaluate", "reliability"])
def test_an_error_is_one_line(
    arguments: list[str],
    said: str,
    program: str,
    own_yaml: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(own_yaml.parent)
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    with pytest.raises(SystemExit) as ended:
        run_command(program, lambda config, folder: pytest.fail("it ran"))
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert re.search(said, line)


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"], ["--info", "searchpath"], ["--hydra-help"]])
def test_what_shows_something_makes_no_folder(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    with suppress(SystemExit):
        run_command("train", lambda config, folder: pytest.fail("it ran"))
    assert capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_ones_own_yaml(own_yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(own_yaml.parent)
    monkeypatch.setattr(sys, "argv", ["train", "--config-dir", "own", "experiment=good", "hydra.run.dir=my run=1"])
    seen = []
    run_command("train", lambda config, folder: seen.append((config.steps, folder)))
    assert seen == [(7, own_yaml.parent / "my run=1")]
