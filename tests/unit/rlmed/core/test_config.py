"""Every shipped YAML composes and validates; mistakes are named with their cure."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest
from hydra.errors import ConfigCompositionException

from learner.learner import loss_config
from rlmed.commandline import compose_config
from rlmed.core.config import ConfigError, RunConfig, build_config

CONF = resources.files("conf")
GROUPS = ("model", "data", "algo", "reward", "rollout", "learner", "cluster")


def composed(*overrides: str, program: str = "train") -> RunConfig:
    return compose_config(program, overrides)


def options(group: str) -> list[str]:
    return sorted(entry.name.removesuffix(".yaml") for entry in CONF.joinpath(group).iterdir() if ".yaml" in entry.name)


@pytest.mark.parametrize("program", ["train", "sft", "evaluate"])
def test_programs_compose(program: str) -> None:
    assert composed(program=program).model.path == "embedded:tiny_base"


@pytest.mark.parametrize("choice", [f"{group}={name}" for group in GROUPS for name in options(group)])
def test_every_group_option_composes(choice: str) -> None:
    config = composed(choice)
    assert loss_config(config.algo).kl_coef == config.algo.kl_coef  # the loss accepts it too


@pytest.mark.parametrize("name", options("experiment"))
@pytest.mark.parametrize("program", ["train", "sft"])
def test_every_experiment_composes(name: str, program: str) -> None:
    assert composed(f"+experiment={name}", program=program).name == name


def test_a_comment_stands_above_each_key_or_group_of_keys() -> None:
    for path in sorted(str(entry) for group in GROUPS for entry in CONF.joinpath(group).iterdir()):
        if path.endswith(".yaml"):
            assert Path(path).read_text().startswith("#"), f"{path} does not say what it is"


def test_the_papers_run() -> None:
    config = composed("+experiment=medvqa_600")
    assert config.model.path == "Qwen/Qwen2-VL-2B-Instruct"
    assert (config.algo.group_size, config.algo.groups_per_step, config.steps) == (4, 4, 300)
    assert (config.algo.kl_coef, config.learner.lr, config.rollout.temperature) == (0.04, 1e-6, 1.0)
    assert (config.model.min_pixels, config.model.max_pixels) == (3136, 401408)


def test_unknown_key_is_refused_by_the_command_line() -> None:
    with pytest.raises(ConfigCompositionException, match="group_sise"):
        composed("algo.group_sise=8")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+algo.group_sise=8", r"unknown key algo\.group_sise: did you mean algo\.group_size\?"),
        ("algo.group_size=1", r"algo\.group_size=1 .* set algo\.group_size to 2 or more"),
        ("algo.group_size=100", r"raise rollout\.max_completions"),
        ("algo.advantage=best", r"algo\.advantage='best' .* grpo, dr_grpo, rloo"),
        ("rollout.temperature=0", r"rollout\.temperature=0\.0 .* all the same"),
        ("rollout.top_p=0", r"rollout\.top_p"),
        ("learner.lr=fast", r"learner\.lr='fast' has the wrong type: expected a number"),
        ("learner.lr=-1", r"learner\.lr"),
        ("learner.freeze=[eyes]", r"learner\.freeze='eyes'"),
        ("learner.freeze=[vision,merger,language_model]", "nothing would be trained"),
        ("steps=0", "steps=0"),
        ("steps=1.5", r"steps=1\.5 has the wrong type: expected an integer"),
        ("eval.controls=maybe", r"eval\.controls='maybe' has the wrong type: expected true or false"),
        ("reward.weights=null", r"reward\.weights"),
        ("cluster.kind=moon", r"cluster\.kind"),
        ("model.min_pixels=10000", None),
        ("profile=hospital", "profile='hospital'"),
    ],
)
def test_impossible_values(override: str, message: str | None) -> None:
    if message is None:
        composed(override)
        return
    with pytest.raises(ConfigError, match=message):
        composed(override)


@pytest.mark.parametrize("override", ["algo.clip_ratio_low=0", "algo.clip=hard", "algo.kl_coef=-1", "algo.dual_clip=1"])
def test_impossible_losses_are_found_before_anything_is_loaded(override: str) -> None:
    with pytest.raises(ValueError, match=override.removeprefix("algo.").partition("=")[0]):
        loss_config(composed(override).algo)


def test_missing_key() -> None:
    with pytest.raises(ConfigError, match=r"model\.path is missing"):
        build_config({"name": "a", "seed": 0, "steps": 1, "model": {}})
