"""Every shipped YAML composes and validates; mistakes are named with their remedy."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

import pytest
from hydra.errors import ConfigCompositionException

from rlmed.core.config.building import RENAMED, build_config, check_key
from rlmed.core.config.checks import ConfigError
from rlmed.core.config.composing import compose_config
from rlmed.core.config.overrides import group_options
from rlmed.core.config.schema import RunConfig
from rlmed.data.templates import PAPER_TEMPLATE

CONF = resources.files("conf")
GROUPS = ("model", "data", "prompt", "algo", "reward", "rollout", "learner", "cluster")


def composed(*overrides: str, program: str = "train") -> RunConfig:
    return compose_config(program, overrides)


@pytest.mark.parametrize("program", ["train", "sft", "evaluate", "reliability"])
def test_programs_compose(program: str) -> None:
    assert composed(program=program).model.path == "embedded:tiny_base"


@pytest.mark.parametrize("choice", [f"{group}={name}" for group in GROUPS for name in group_options(group)])
def test_every_group_option_composes(choice: str) -> None:
    composed(*(("cluster=ray",) if choice == "rollout=vllm" else ()), choice)


@pytest.mark.parametrize("name", group_options("debug"))
def test_every_debug_mode_composes(name: str) -> None:
    assert composed(f"+debug={name}", *(["debug.recorded=x"] if name == "recorded" else [])) != composed()


@pytest.mark.parametrize("name", group_options("experiment"))
@pytest.mark.parametrize("program", ["train", "sft"])
def test_every_experiment_composes(name: str, program: str) -> None:
    for profile in group_options("profile"):
        config = composed(f"+experiment={name}", f"profile={profile}", program=program)
        assert (config.name, config.profile) == (f"{name}_{profile}", profile)


def unexplained(path: Path) -> set[str]:
    """Keys of a YAML file without a comment above them."""
    lines = path.read_text().splitlines()
    keys = {number: line.partition(":")[0] for number, line in enumerate(lines) if re.match(r" *[a-z_]+:", line)}
    parents = {number for number in keys if number + 1 < len(lines) and re.match(r" +\S|- ", lines[number + 1])}
    return {key for number, key in keys.items() if number not in parents and "#" not in lines[number - 1]}


@pytest.mark.parametrize("group", GROUPS)
def test_a_comment_stands_above_each_key(group: str) -> None:
    """In at least one file of the group: the others overrule values and say why at their top."""
    files = [Path(str(entry)) for entry in CONF.joinpath(group).iterdir() if entry.name.endswith(".yaml")]
    assert all(path.read_text().startswith("#") for path in files)
    explained = [set(re.findall(r"^ *[a-z_]+(?=:)", path.read_text(), re.M)) - unexplained(path) for path in files]
    assert set().union(*(unexplained(path) for path in files)) - set().union(*explained) == set()


def test_a_comment_stands_above_each_key_of_a_whole_run() -> None:
    hydras = {"    dir", "    chdir", "    name"}
    assert unexplained(Path(str(CONF.joinpath("train.yaml")))) - hydras == set()


def test_the_papers_run() -> None:
    config = composed("+experiment=medvqa_600")
    assert config.model.path == "Qwen/Qwen2-VL-2B-Instruct"
    assert (config.algo.group_size, config.algo.groups_per_step, config.steps) == (4, 4, 300)
    assert (config.algo.loss.kl_coef, config.learner.lr, config.rollout.temperature) == (0.04, 1e-6, 1.0)
    assert (config.model.min_pixels, config.model.max_pixels) == (3136, 401408)


def test_unknown_key_is_refused_by_the_command_line() -> None:
    with pytest.raises(ConfigCompositionException, match="group_sise"):
        composed("algo.group_sise=8")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+algo.group_sise=8", r"unknown .*algo\.group_sise: .* algo\.group_size\?"),
        ("+eval.trust=true", r"unknown key eval\.trust: python -m rlmed\.reliability"),
        ("+eval.samples=4", r"eval\.samples: set reliability\.samples .*rlmed\.reliability"),
        ("reliability.samples=0", r"reliability\.samples=0 must be at least 1"),
        ("algo.group_size=1", r"algo\.group_size=1 must be at least 2"),
        ("algo.advantage=best", r"algo\.advantage='best'.* grpo, dr_grpo, rloo"),
        ("algo.normalize_by=organ", r"algo\.normalize_by='organ'.* modality or null"),
        ("algo.loss.clip=hard", r"algo\.loss\.clip='hard'.* ppo, dual, cispo, none"),
        ("+algo.kl_coef=1", r"algo\.kl_coef: renamed to algo\.loss\.kl_coef"),
        ("rollout.temperature=0", r"rollout\.temperature=0\.0 must be positive"),
        ("rollout.top_p=0", r"rollout\.top_p"),
        ("learner.lr=fast", r"learner\.lr='fast' .*expected a number"),
        ("learner.lr=-1", r"learner\.lr"),
        ("learner.freeze=[eyes]", r"learner\.freeze='eyes'"),
        ("learner.freeze=[vision,merger,language_model]", "nothing would be trained"),
        ("steps=0", "steps=0"),
        ("steps=1.5", r"steps=1\.5 .*expected an integer"),
        ("data.mix=MRI", r"data\.mix='MRI' .*expected a mapping .*\{KEY: VALUE\}"),
        ("data.selection=pass_rate", r"data\.selection='pass_rate' .*mapping .* cooldown_epochs, max_pass_rate, "),
        ("reward.iou.kind=threshold", r"reward\.weights lacks: set reward=task"),
        ("reward.iou.kind=max", r"reward\.iou\.kind='max'.*threshold"),
        ("reward.iou.start=0.9", r"reward\.iou\.start=0\.9 .*reward\.iou\.end=0\.5"),
        ("reward.iou.steps=0", r"reward\.iou\.steps=0"),
        ("data.box_frame=percent", r"data\.box_frame='percent'.*thousandths"),
        ("data.leakage=false", r"data\.leakage=False must be a string: .*quote"),
        ("eval.controls=maybe", r"eval\.controls='maybe' .*expected true or false"),
        ("reward.weights=null", r"reward\.weights"),
        ("cluster.kind=moon", r"cluster\.kind"),
        ("model.min_pixels=10000", None),
        ("name=''", "name=''"),
        ("rollout=vllm", "use cluster=ray"),
        ("seed=99999999999999999999", r"seed=9+ must be between 0 and"),
        ("data.task=boxes", r"data\.task='boxes'"),
        ("data.phantom_seed=-1", r"data\.phantom_seed=-1"),
        ("model.device=gpu", r"model\.device='gpu'.* auto, cpu, cuda"),
        ("model.max_pixels=-5", r"model\.max_pixels=-5 must be positive"),
        ("learner.betas=[2,3]", r"learner\.betas=\[2\.0, 3\.0\]"),
        ("learner.betas=[0.9]", r"learner\.betas=\[0\.9\] has 1 entries: expected 2"),
        ("learner.weight_decay=-1", r"learner\.weight_decay=-1"),
        ("learner.mini_batches=50", r"learner\.mini_batches=50 exceeds algo\.groups_per_step"),
        ("rollout.stop=['']", r"rollout\.stop\[0\]='' is empty"),
        ("rollout.stop=[' ']", None),
        ("data.mix={MRI:0.5,CT:0}", r"data\.mix\.CT=0\.0 .*positive number: omit"),
        ("data.mix={}", r"data\.mix=\{\} names no modality"),
        ("data.mix={MRI:0.7,CT:0.3}", None),
        ("data.selection.mode=sometimes", r"data\.selection\.mode='sometimes'.* all, pass_rate"),
        ("data.selection.min_pass_rate=1", r"min_pass_rate=1\.0 and data\.selection\.max_pass_rate=1\.0 .* min < max"),
        ("data.selection.window=0", r"data\.selection\.window=0"),
        ("data.selection.cooldown_epochs=0", r"data\.selection\.cooldown_epochs=0 .*mode=all"),
        ("reward.weights={format:0,choice:0}", r"reward\.weights=.* rewards nothing"),
    ],
)
def test_impossible_values(override: str, message: str | None) -> None:
    if message is None:
        composed(override)
        return
    with pytest.raises(ConfigError, match=message):
        composed(override)


def test_a_group_that_is_larger_than_what_is_sampled_at_once_is_for_training_alone() -> None:
    # which cannot be given a smaller group
    config = composed("rollout.max_completions=2", program="evaluate")
    with pytest.raises(
        ConfigError, match=r"algo\.group_size=4 exceeds .*max_completions=2: .*raise rollout\.max_completions"
    ):
        config.check_groups()


def test_more_samples_than_are_drawn_at_once_are_for_reliability_alone() -> None:
    with pytest.raises(
        ConfigError, match=r"reliability\.samples=8 exceeds rollout\.max_completions=2: .*raise rollout"
    ):
        composed("rollout.max_completions=2", program="reliability").check_samples()
    composed(program="reliability").check_samples()


def test_a_selection_by_pass_rate_needs_to_know_what_is_right() -> None:
    unlabelled = ("reward=unlabelled", "data.selection.mode=pass_rate")
    with pytest.raises(ConfigError, match=r"reward part choice.*\+reward\.weights\.choice=0"):
        composed(*unlabelled)
    composed(*unlabelled, "+reward.weights.choice=0")


def test_missing_key() -> None:
    with pytest.raises(ConfigError, match=r"model\.path is missing"):
        build_config({"name": "a", "seed": 0, "steps": 1, "model": {}})


def test_the_papers_prompt_is_the_default_and_each_other_one_asks_for_an_answer() -> None:
    assert composed().prompt.template == PAPER_TEMPLATE
    for name in group_options("prompt"):
        prompt = composed(f"prompt={name}").prompt
        assert all("<answer>" in text for text in (prompt.template, *prompt.by_modality.values()))


def test_a_template_without_a_place_for_the_question_names_its_key() -> None:
    with pytest.raises(ConfigError, match=r"prompt\.template='no slot' .*\{question\} exactly once"):
        composed("prompt.template='no slot'")
    with pytest.raises(ConfigError, match=r"prompt\.by_modality\.CT='no slot' .*\{question\} exactly once"):
        composed("+prompt.by_modality.CT='no slot'")


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_an_old_key_names_the_new_one(old: str, new: str) -> None:
    check_key(new)
    if not old.startswith("reward.weights."):  # a mapping takes any key; the rubric says it
        with pytest.raises(ConfigError, match=f"{re.escape(old)}: renamed to {re.escape(new)}"):
            check_key(old)
