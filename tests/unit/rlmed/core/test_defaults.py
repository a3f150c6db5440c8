"""Each default stands once, in a YAML file of `conf/`; algorithms are those of their papers."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

import conf
from rewards.rubric import Rubric
from rlmed import ask
from rlmed.cluster.engines import MEMORY_SHARE
from rlmed.core.config.building import build_config
from rlmed.core.config.composing import compose_config
from rlmed.core.config.overrides import group_options
from rlmed.core.config.schema import AlgoConfig, RunConfig
from rlmed.core.config.use import plain_values, schema_keys
from rlmed.core.types import SamplingParams
from rlmed.data.prompts import PromptRenderer
from rollout.local import LocalPool
from rollout.native.scheduler import EngineLimits
from rollout.pool.runner import EngineRunner
from rollout.pool.state import PoolSettings
from rollout.vllm_backend.settings import VllmSettings

CONF = Path(conf.__path__[0])
GROUPS = ("model", "data", "prompt", "algo", "reward", "rollout", "learner", "cluster")


def records(cls: type[Any]) -> Iterator[type[Any]]:
    yield cls
    for hint in typing.get_type_hints(cls).values():
        if dataclasses.is_dataclass(hint):
            yield from records(typing.cast(type[Any], hint))


def content(path: Path) -> dict[str, Any]:
    """A YAML file as it stands, without Hydra's own keys."""
    plain = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items() if key not in ("defaults", "hydra")}


def parents(path: Path) -> list[str]:
    """What it builds upon: options of its group, or an experiment's replacements for the usual."""
    listed = OmegaConf.to_container(OmegaConf.load(path)).get("defaults", [])  # type: ignore[union-attr]
    assert isinstance(listed, list)
    return [entry for entry in listed if isinstance(entry, str) and entry != "_self_"]


def inherited(path: Path) -> dict[str, Any]:
    """The values of an option's parents, the later ones over the earlier ones."""
    found: dict[str, Any] = {}
    for name in parents(path):
        parent = path.parent / f"{name}.yaml"
        found |= flat(content(parent), inherited(parent))
    return found


def flat(values: Mapping[str, Any], below: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    found = dict(below) if not where else {}
    for key, value in values.items():
        name = f"{where}{key}"
        found |= flat(value, {}, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return found


@pytest.mark.parametrize("cls", list(records(RunConfig)), ids=lambda cls: cls.__name__)
def test_no_record_has_a_default(cls: type[Any]) -> None:
    for entry in dataclasses.fields(cls):
        assert entry.default is dataclasses.MISSING, entry.name
        assert entry.default_factory is dataclasses.MISSING, entry.name


def test_so_a_key_that_no_file_gives_is_missing() -> None:
    plain = plain_values(dataclasses.asdict(compose_config("train", ())))
    assert plain.keys() == set(schema_keys())
    nested: dict[str, Any] = {}
    for key, value in plain.items():
        *sections, name = key.split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    del nested["learner"]["betas"]
    with pytest.raises(ValueError, match=r"learner\.betas is missing"):
        build_config(nested)


def default(function: Any, name: str) -> Any:
    """Of an argument; lists as YAML has them."""
    value = inspect.signature(function).parameters[name].default
    return list(value) if isinstance(value, tuple) else value


def test_what_works_without_a_configuration_has_its_defaults() -> None:
    """Engines, pools and small commands can be used alone; then they are as a run has them."""
    values = plain_values(dataclasses.asdict(compose_config("train", ["data=jsonl"])))
    keys = {
        EngineLimits: {"max_completions": "rollout", "max_prompt_tokens": "data", "prefill_tokens": "rollout"},
        SamplingParams: dict.fromkeys(("temperature", "top_p", "top_k", "max_tokens", "stop"), "rollout"),
        VllmSettings: {
            **dict.fromkeys(("max_completions", "max_tokens", "tensor_parallel_size", "kv_cache_gib"), "rollout"),
            "max_prompt_tokens": "data",
        },
    }
    for cls, sections in keys.items():
        for name, section in sections.items():
            assert default(cls, name) == values[f"{section}.{name}"], (cls, name)
    for name in ("silence", "stall", "start", "push"):
        assert default(PoolSettings, f"{name}_s") == values[f"cluster.{name}_timeout_s"]
    assert default(PoolSettings, "max_failures") == values["cluster.max_worker_failures"]
    assert default(VllmSettings, "gpu_memory_utilization") == MEMORY_SHARE
    assert default(SamplingParams, "seed") == values["seed"]
    for cls in (LocalPool, EngineRunner):
        assert default(cls, "on_push") == values["rollout.on_push"]
    assert default(Rubric.from_config, "timeout_s") == values["reward.timeout_s"]
    assert default(PromptRenderer, "template") == values["prompt.template"]
    asked = ask.parse_arguments(["x.png", "?", "--options", "a", "b"])
    assert (asked.model, asked.max_tokens) == (values["model.path"], values["eval.max_tokens"])


@pytest.mark.parametrize("group", GROUPS)
def test_within_a_group_a_value_stands_once(group: str) -> None:
    """One file of it is the root; every other builds upon it and has only what differs."""
    files = sorted((CONF / group).glob("*.yaml"))
    assert len([path for path in files if not parents(path)]) == 1
    for path in files:
        below = inherited(path)
        again = {key for key, value in flat(content(path), {}).items() if key in below and below[key] == value}
        assert again == set(), path.name


def test_no_two_files_give_the_same_key_of_a_whole_run() -> None:
    groups = {f"{group}.{key}" for group in GROUPS for path in (CONF / group).glob("*.yaml") for key in content(path)}
    train = flat(content(CONF / "train.yaml"), {})
    assert {key for key in train if any(key == name or key.startswith(f"{name}.") for name in groups)} == set()
    for program in ("sft", "evaluate", "reliability"):
        own = flat(content(CONF / f"{program}.yaml"), {})
        assert {key for key, value in own.items() if train.get(key) == value} == set()


@pytest.mark.parametrize("path", sorted((CONF / "experiment").rglob("*.yaml")), ids=lambda path: path.stem)
def test_an_experiment_holds_only_what_differs(path: Path) -> None:
    part = path.parent.name in group_options("experiment")  # of an experiment, for one profile
    for profile in [path.stem] if part else group_options("profile"):
        whole = path.parent.with_suffix(".yaml") if part else path
        built_upon = [f"+experiment={name}" for name in parents(whole)] or [f"+profile={profile}"]
        below = compose_config("train", [*built_upon, f"profile={profile}", *chosen(whole)])
        assert repeated(path, below) == set(), profile


def test_the_tiny_profile_holds_only_what_differs() -> None:
    """The paper's states the paper's numbers, whatever the defaults are."""
    path = CONF / "profile" / "tiny.yaml"
    assert repeated(path, compose_config("train", chosen(path))) == set()


def chosen(path: Path) -> list[str]:
    """The options that a file takes instead of the usual, as overrides."""
    return [
        f"{key.removeprefix('override /')}={value}"
        for entry in OmegaConf.to_container(OmegaConf.load(path)).get("defaults", [])  # type: ignore[union-attr]
        if isinstance(entry, dict)
        for key, value in entry.items()
        if key.startswith("override /")
    ]


def repeated(path: Path, below: RunConfig) -> set[str]:
    """The keys to which a file gives the value that they have without it."""
    before = flat(dataclasses.asdict(below), {})
    return {key for key, value in flat(content(path), {}).items() if before.get(key) == value}


def algo(name: str) -> AlgoConfig:
    return compose_config("train", [f"algo={name}"]).algo


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # arXiv 2402.03300, eq. 3 and 4; the group of 4 and beta are MedVLM-R1's
        ("grpo", {"advantage": "grpo", "clip": "ppo", "kl_coef": 0.04, "kl_estimator": "k3", "dynamic_sampling": False,
                  "aggregation": "sequence_mean", "mask_truncated": False, "clip_ratio_low": 0.2, "clip_ratio_high": 0.2}),
        ("grpo_dynamic", {"dynamic_sampling": True}),
        # arXiv 2502.19634, its code: one update a batch, groups without spread kept
        ("grpo_released", {"clip": "none"}),
        # arXiv 2503.14476, eq. 8 to 12, section 4.1 and overlong filtering of 3.4
        ("dapo", {"clip_ratio_high": 0.28, "aggregation": "token_mean", "dynamic_sampling": True, "mask_truncated": True,
                  "kl_coef": 0.0}),
        # arXiv 2503.20783: without std and without 1/|o|
        ("dr_grpo", {"advantage": "dr_grpo", "aggregation": "sequence_sum", "kl_coef": 0.0}),
        # arXiv 2402.14740: REINFORCE, a completion is one action
        ("rloo", {"advantage": "rloo", "clip": "none", "aggregation": "sequence_sum"}),
        # arXiv 2507.18071, section 5.1
        ("gspo", {"ratio_level": "sequence", "clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4, "kl_coef": 0.0}),
        # arXiv 2506.13585, eq. 4 and 5
        ("cispo", {"clip": "cispo", "clip_ratio_low": 1.0, "clip_ratio_high": 2.0, "aggregation": "token_mean",
                   "kl_coef": 0.0}),
    ],
)  # fmt: skip
def test_an_algorithm_is_grpo_but_for_what_its_paper_changes(name: str, expected: dict[str, Any]) -> None:
    grpo = algo("grpo")
    parts = [{key: value for key, value in expected.items() if hasattr(of, key)} for of in (grpo, grpo.loss)]
    assert sum(map(len, parts)) == len(expected)
    assert algo(name) == dataclasses.replace(grpo, **parts[0], loss=dataclasses.replace(grpo.loss, **parts[1]))


def test_every_algorithm_names_its_paper() -> None:
    for name in group_options("algo"):
        assert "arXiv 2" in (CONF / "algo" / f"{name}.yaml").read_text().partition("\ndefaults")[0], name


@pytest.mark.parametrize(
    ("overrides", "dynamic"),
    [
        (["+experiment=medvqa_600", "profile=tiny", "algo=rloo"], False),
        (["+experiment=medvqa_600", "profile=tiny", "algo=cispo"], False),
    ],
)
def test_dynamic_sampling_is_where_it_is_asked_for(overrides: list[str], dynamic: bool) -> None:
    assert compose_config("train", overrides).algo.dynamic_sampling is dynamic
