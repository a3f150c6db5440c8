"""The corpus in plain English: true, consistent and varied."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rewards.conclusion import argued_option
from rlmed.core.parsing import evaluated_letter, has_format, reasoning_text
from rlmed.core.types import LETTERS
from rlmed.data.phantom.anatomy import Study
from rlmed.data.phantom.reports import LINE, all_lines, describe_freely, studies_of, visual_lines, write_readings


def rows_of(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_careful_readers_argue_for_the_right_option_and_answer_it(tmp_path: Path) -> None:
    for row in rows_of(write_readings(tmp_path, "careful", 3, studies_of(3, 0, 60), hasty=0.0)):
        text = str(row["completion"])
        assert has_format(text)
        options = row["options"]
        assert isinstance(options, list)
        place = argued_option(reasoning_text(text) or "", options)
        assert place is not None
        assert options[place] == row["answer"]
        assert evaluated_letter(text) == LETTERS[place]


def test_hasty_readers_answer_by_chance_and_describe_nothing(tmp_path: Path) -> None:
    rows = rows_of(write_readings(tmp_path, "hasty", 3, studies_of(3, 0, 80), hasty=1.0))
    right = [
        row["options"].index(row["answer"]) == "ABCD".index(evaluated_letter(str(row["completion"])) or "A")
        for row in rows
    ]  # type: ignore[attr-defined]
    # a quarter of 80, and five standard deviations of a binomial
    assert abs(sum(right) - 20) < 20
    assert not any("There is" in str(row["completion"]) for row in rows)


def test_descriptions_name_all_that_is_there_in_several_ways() -> None:
    ((study, _),) = studies_of(5, 1, 1)
    rng = np.random.default_rng(0)
    texts = {describe_freely(study, rng) for _ in range(40)}
    assert len(texts) >= 8
    for text in texts:
        assert all(value in text for value in (study.technique, study.region, study.lesion))


def test_the_lesion_is_told_in_its_quarter_and_the_scene_in_all_others() -> None:
    study = Study("CT", "soft-tissue window", "chest", "mass", "large", "lower left")
    rows = (" soft window",) * 2, (" CT chest",) * 2, (" large mass", " soft window"), (" lower left", " CT chest")
    assert visual_lines(study) == tuple(line for row in rows for line in row)
    assert LINE * len(visual_lines(study)) == 16
    assert set(visual_lines(study)) <= set(all_lines())


@pytest.mark.parametrize(("studies", "hasty"), [(0, 0.5), (5, 1.5)])
def test_impossible_sizes_are_refused(studies: int, hasty: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{studies} studies, hasty={hasty}"):
        write_readings(tmp_path, "x", 0, studies_of(0, 0, studies), hasty=hasty)
