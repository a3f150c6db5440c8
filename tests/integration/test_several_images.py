"""A whole run on questions about one image, two and five of other sizes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlmed import ask
from rlmed.core.config.schema import RunConfig
from rlmed.export import command as export
from rlmed.run import Run
from tests.rounding import LOGPROBS
from tests.unit.rlmed.data.pictures import marked

pytestmark = pytest.mark.slow

COUNTS = (1, 2, 5, 2)
"""Images of each row."""


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A data file with a question for each of `COUNTS`, no image in two of them."""
    lines, number = [], 0
    for row, count in enumerate(COUNTS):
        images = []
        for _ in range(count):
            images.append(f"{number}.png")
            marked(9 * number + 20, (56 + 28 * (number % 3), 56 + 14 * (number % 4))).save(tmp_path / images[-1])
            number += 1
        question = {"question": "In which image is it larger?", "options": ["first", "last"], "answer": "first"}
        lines.append(json.dumps({"id": f"q{row}", "images": images, **question}) + "\n")
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def names(line: dict[str, Any]) -> list[str]:
    return [Path(path).name for path in (line["image"], *line.get("more_images", ()))]


def test_a_run_learns_from_shows_and_controls_all_images(
    make_config: Callable[..., RunConfig], rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(
        f"data.train={rows}", f"data.eval=[{rows}]", "data.leakage=off", "algo.groups_per_step=4", "steps=1",
        "preflight.enabled=false", "eval.at_start=false", "eval.controls=true", "data.max_prompt_tokens=400",
    )  # fmt: skip
    folder = tmp_path / "run"
    folder.mkdir()
    Run(config, folder).execute()

    own = {line["id"]: line["images"] for line in read_lines(rows)}
    groups = read_lines(folder / "rollouts.jsonl")
    assert {group["example_id"]: names(group) for group in groups} == own
    (metrics,) = read_lines(folder / "metrics.jsonl")
    assert metrics["mismatch_kl"] < LOGPROBS**2

    (step,) = (folder / "evaluations").iterdir()
    answers = read_lines(step / "rows.jsonl")
    asked = Counter((line["control"], line["id"]) for line in answers)
    several = [name for name, images in own.items() if len(images) > 1]
    assert asked == Counter(
        [(control, name) for control in ("none", "blank", "reordered") for name in own]
        # of the others, none has as many images
        + [("shuffled", "q1"), ("shuffled", "q3")]
        + [(control, name) for control in ("blank_one", "image_order") for name in several]
    )
    for line in answers:
        images = own[line["id"]]
        if line["control"] == "shuffled":
            assert names(line) == own[{"q1": "q3", "q3": "q1"}[line["id"]]]
        elif line["control"] == "image_order":
            assert sorted(names(line)) == sorted(images)
            assert names(line) != images
        else:
            assert names(line) == images
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "image 5 of 5 of the question" in page

    capsys.readouterr()
    (checkpoint,) = (folder / "checkpoints").iterdir()
    pictures = [str(tmp_path / name) for name in own["q1"]]
    ask.main([*pictures, "Which?", "--options", "a", "b", "--model", str(checkpoint), "--max-tokens", "4"])
    assert capsys.readouterr().out.strip()

    export.main([str(folder), "--out", str(tmp_path / "mine")])
    assert "4 of 4 answers" in capsys.readouterr().out
    card = (tmp_path / "mine" / "README.md").read_text(encoding="utf-8")
    header = next(line for line in card.splitlines() if "image-free prior" in line)
    assert "| options reordered | one of several images blank | images in another order | chance |" in header
    assert '{"image": 5, "video": 0}' in card
    assert "Give the images first, in order, at most 5, as 8-bit" in card


def test_questions_with_too_many_images_are_left_out_with_numbers(
    make_config: Callable[..., RunConfig], rows: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(make_config(f"data.train={rows}", "data.eval=[]", "data.max_images=2"), tmp_path)
    assert [example.id for example in run.data.train_examples] == ["q0", "q1", "q3"]
    with pytest.raises(ValueError, match=r"q2.*5 images.*2"):
        Run(make_config(f"data.train={rows}", "data.eval=[]", "data.max_images=2", "data.on_bad_row=error"), tmp_path)
