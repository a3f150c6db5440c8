"""What a run that does not fit is told to set."""

from __future__ import annotations

import re

import pytest

from rlmed.cluster import advice
from rlmed.cluster.advice import SPARING, advise, sparing_keys
from rlmed.core.config.composing import compose_config
from rlmed.core.config.rules import MODULES, may_change
from rlmed.core.config.schema import RunConfig


@pytest.fixture(autouse=True)
def eight_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where torchao is installed."""
    monkeypatch.setattr(advice, "has_eight_bits", lambda: True)


def config(*overrides: str) -> RunConfig:
    return compose_config("train", ["model.dtype=bfloat16", "learner.gradient_checkpointing=true", *overrides])


def needed(run: RunConfig) -> int:
    """Bytes of an imaginary machine, in which each setting counts."""
    moments = {"float32": 800, "bfloat16": 400, "8bit": 200}[run.learner.moments]
    reference = 300 if run.algo.loss.kl_coef else 0
    vision = 0 if "vision" in run.learner.freeze else 100
    rest = run.learner.token_budget // 16 + run.rollout.max_completions + reference + vision
    return rest + moments // run.cluster.learner_ranks


def settings(text: str) -> list[str]:
    return re.findall(r"[a-z_.]+=\S+", text)


def test_the_largest_value_that_fits_is_named() -> None:
    run = config("learner.token_budget=16384")
    need = needed(run)
    assert advise(run, needed, need - 512).startswith("set learner.token_budget=8192 or ")
    assert advise(run, needed, need - 513).startswith("set learner.token_budget=4096 or ")
    assert advise(run, needed, need - 800).startswith("set learner.token_budget=2048")


def test_of_several_settings_each_changes_as_little_as_it_takes() -> None:
    run = config("learner.token_budget=16384", "rollout.max_completions=64")
    need = needed(run)
    # all of the budget and some of the moments
    assert settings(advise(run, needed, need - 1200)) == ["learner.token_budget=2048", "learner.moments=bfloat16"]
    assert settings(advise(run, needed, need - 1490)) == ["learner.token_budget=2048", "learner.moments=8bit"]
    most = settings(advise(run, needed, need - 1590))
    assert most == ["learner.token_budget=1024", "rollout.max_completions=32", "learner.moments=8bit"]


@pytest.mark.parametrize("spared", range(100, 2000, 100))
def test_what_is_advised_fits(spared: int) -> None:
    run = config("cluster=ray", "learner.token_budget=16384")
    available = needed(run) - spared
    text = advise(run, needed, available)
    if text.startswith("set "):
        for choice in text.removeprefix("set ").split(" or "):
            assert needed(config("cluster=ray", "learner.token_budget=16384", *settings(choice))) <= available
    else:
        assert "use a smaller model" in text


def test_a_resumed_run_is_told_only_what_it_may_change() -> None:
    run = config("cluster=ray", "resume=auto", "learner.token_budget=16384")
    text = advise(run, needed, needed(run) - 500)
    assert settings(text) == ["cluster.learner_ranks=4"]
    assert all(may_change(entry.partition("=")[0]) for entry in settings(text))
    nothing = advise(config("resume=auto"), needed, 10)
    assert nothing == "use a device with more memory"
    assert "learner.token_budget=1024" in advise(config(), needed, 10)


def test_adapters_are_named_unless_there_are_some_or_the_run_is_resumed() -> None:
    def lora(run: RunConfig) -> int:
        return 2**40 if run.learner.lora.rank is None else 5 * 2**29

    assert "learner=lora (needs 2.5 GiB)" in advise(config(), lora, 5 * 2**29)
    frozen = advise(config("learner.freeze=[vision]"), lora, 5 * 2**29)
    assert "learner=lora learner.freeze=[] (needs 2.5 GiB)" in frozen
    compose_config("train", ["data=jsonl", "learner.freeze=[vision]", "learner=lora", "learner.freeze=[]"])
    assert "lora" not in advise(config(), lora, 5 * 2**29 - 1)
    assert "lora" not in advise(config("resume=auto"), lora, 5 * 2**29)
    assert "lora" not in advise(config("learner=lora"), lora, 2**29)


def test_commands_that_run_out_of_memory_name_the_keys_that_they_read() -> None:
    first, _, fresh = sparing_keys("train").partition("; in a new run also ")
    assert first == "learner.gradient_checkpointing, cluster.learner_ranks"
    assert "learner.token_budget, rollout.max_completions" in fresh
    assert {*first.split(", "), *fresh.split(", ")} == {*SPARING}
    assert "algo.loss.kl_coef" not in sparing_keys("sft")
    assert "learner.token_budget" in sparing_keys("sft")
    assert sparing_keys("evaluate") == "rollout.max_completions, rollout.prefill_tokens, model.dtype"
    assert sparing_keys("reliability") == (
        "learner.token_budget, rollout.max_completions, rollout.prefill_tokens, model.dtype"
    )
    assert all(sparing_keys(program) for program in MODULES)
