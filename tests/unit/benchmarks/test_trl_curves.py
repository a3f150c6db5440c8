"""Both sides of the learning curves get the same rows in the same order; figures by hand."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.curves import common_level, compare, draw, reached, smooth
from benchmarks.text_questions import write_questions
from benchmarks.trl_curves import REWARDS, OurTrainer, ordered_rows, settings, trl_setting
from rlmed.core.config.composing import compose_config
from rlmed.data.examples import read_examples
from rlmed.data.prompts import PromptRenderer, load_processor
from tests.smol_text import CHATML, write_llama


def steps(rewards: list[float], seconds: float) -> list[dict[str, float]]:
    return [{"reward": reward, "seconds": seconds, "cpu_seconds": seconds / 2} for reward in rewards]


FAST = [1.0] * 6 + [2.0] * 6
SLOW = [1.0] * 8 + [2.0] * 6


def result(seed: int, shift: float = 0.0) -> dict[str, Any]:
    theirs = [value + shift / 2 for value in SLOW[: len(FAST)]]
    sides = {"rlmed": steps([value + shift for value in FAST], 2.0), "trl": steps(theirs, 10.0)}
    return {"seed": seed, "steps": sides, "test": {name: {"accuracy": 0.5} for name in sides}}


def test_a_level_is_reached_by_the_mean_of_the_last_steps() -> None:
    assert smooth(FAST)[5:11].tolist() == pytest.approx([1.0, 1.2, 1.4, 1.6, 1.8, 2.0])
    assert reached(steps(FAST, 1.0), 1.2) == 7
    assert reached(steps(FAST, 1.0), 2.1) is None
    # one good step at the start is no level reached
    assert reached(steps([2.0, *FAST], 1.0), 1.6) == 10
    assert common_level([steps(FAST, 1.0), steps(SLOW[:12], 1.0)]) == pytest.approx(1.8)


@pytest.mark.parametrize("reward", [0.15, 0.3, 0.35, 0.6, 0.7, 0.85, 1.15, 1.2, 1.4, 1.7])
def test_a_constant_reward_is_at_its_level_at_once(reward: float) -> None:
    run = steps([reward] * 10, 1.0)
    assert common_level([run]) == reward
    assert reached(run, reward) == 5


def test_sides_are_compared_at_the_level_that_all_reach() -> None:
    found = compare([result(0), result(1, shift=0.1)])
    assert found["level"] == 1.8
    assert found["rlmed"]["to_level"] == {"steps": [10, 10], "seconds": [20.0, 20.0], "cpu_seconds": [10.0, 10.0]}
    assert found["trl"]["to_level"] == {"steps": [12, 12], "seconds": [120.0, 120.0], "cpu_seconds": [60.0, 60.0]}
    assert found["ratio_of_seconds_to_level"] == 6.0
    assert found["ratio_of_step_cpu_seconds"] == 5.0
    # the last ten steps: 4 of 1 and 6 of 2, and with the shift; TRL 6 of 1 and 4 of 2
    assert found["rlmed"]["final"] == pytest.approx([1.6, 1.7])
    assert found["difference"]["difference"] == pytest.approx(0.225)
    assert found["difference"]["low"] < 0.225 < found["difference"]["high"]


def test_the_picture_is_written(tmp_path: Path) -> None:
    draw([result(0), result(1, shift=0.1)], tmp_path / "new" / "curves.png")
    assert (tmp_path / "new" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_our_side_learns_from_the_rows_that_trl_gets(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "model")
    (model / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    write_questions(tmp_path / "questions", written_rows=5)
    arguments = argparse.Namespace(
        questions=tmp_path / "questions",
        model=model,
        prompts=2,
        group_size=3,
        max_tokens=4,
        steps=2,
        lr=1e-3,
        kl_coef=0.04,
        threads=1,
    )
    config = compose_config("train", [*settings(arguments, seed=3), "data.max_prompt_tokens=512"])
    ordered_rows(tmp_path / "questions/train.jsonl", config, tmp_path / "rows.jsonl")
    ours = OurTrainer(config, tmp_path / "run")
    renderer = PromptRenderer(*load_processor(model), max_prompt_tokens=512, template=config.prompt.template)
    rows = read_examples(tmp_path / "rows.jsonl", on_bad_row="error").examples
    assert ours.prompts() == [renderer.render(row).token_ids.tolist() for row in rows]
    assert len({row.question for row in rows}) == 4

    setting = json.loads(json.dumps(trl_setting(arguments, config, tmp_path, ours.end_token_ids())))
    assert setting["end_token_ids"] == [2]
    assert (setting["learning_rate"], setting["kl_coef"], setting["clip_ratio"]) == (1e-3, 0.04, 0.2)
    taken = [ours.step() for _ in range(2)]
    assert [row["kl"] > 0 for row in taken] == [False, False]  # no reward, no change
    assert all(0 <= row[name] <= row["reward"] <= 2 for row in taken for name in REWARDS)
    ours.save(tmp_path / "saved")
    assert (tmp_path / "saved/model.safetensors").is_file()
