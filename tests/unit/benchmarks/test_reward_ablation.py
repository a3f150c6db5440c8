"""The ablation of rewards: which runs it plans, and its table."""

from __future__ import annotations

from pathlib import Path

from benchmarks.reward_ablation import REWARDS, markdown, plan_runs


def test_chosen_rewards_are_planned_beside_the_first_in_folders_of_their_own(tmp_path: Path) -> None:
    first, second, third, *_ = REWARDS
    plan = plan_runs(tmp_path, [3, 5], ["steps=2"], [third])
    assert list(plan) == [first, third]
    assert second not in plan
    assert [run.seed for run in plan[third]] == [3, 5]
    assert len({run.folder for runs in plan.values() for run in runs}) == 4
    assert set(REWARDS[third]) <= set(plan[third][0].arguments)
    assert {"steps=2", "eval.controls=true"} <= set(plan[first][0].arguments)


def test_the_table_shows_shares_in_per_cent_and_words_as_they_are() -> None:
    figures = [{"mean": 0.5, "words": 20.0}, {"mean": 0.7, "words": 22.0}]
    assert markdown({"some": {"figures": figures}}).splitlines()[-1] == "| some | 60.0 ± 14.1 | 21.0 ± 1.4 |"
