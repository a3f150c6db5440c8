"""Controls: what each question shows, in files of single pictures, of several, and of both."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rlmed.core.types import Example
from rlmed.data.loading import EvalFile
from rlmed.evaluation.controls import reorder_images, shuffled_images
from rlmed.evaluation.results import EvalSummary, read_rows
from rlmed.evaluation.table import summary_table
from tests.unit.rlmed.evaluation.test_run import ScriptedPool, renderer, run

__all__ = ["renderer"]  # a fixture
NUMBERS = (2, 3, 1, 2, 3, 2, 2)
"""Of the pictures of the rows of a file."""


@pytest.fixture
def several(tmp_path: Path) -> EvalFile:
    """Rows with pictures of their own, each of another grey; a step of grey is 5."""
    rows, level = [], 0
    for index, number in enumerate(NUMBERS):
        paths = []
        for _ in range(number):
            level += 5
            paths.append(tmp_path / f"{level}.png")
            Image.new("RGB", (56, 84), (level,) * 3).save(paths[-1])
        more = tuple(paths[1:])
        rows.append(Example(str(index), paths[0], "Which?", ("head", "knee"), index % 2, more_images=more))
    return EvalFile("several", tuple(rows))


def levels_of(request, renderer) -> list[int]:
    """Grey levels of the pictures in the prompt, from their normalised pixels."""
    processor, inputs = renderer.pictures.image_processor, request.prompt.image_inputs
    starts = np.cumsum([0, *inputs["image_grid_thw"].prod(axis=1)])
    found = inputs["pixel_values"][starts[:-1], 0] * processor.image_std[0] + processor.image_mean[0]
    return [round(255 * float(value)) for value in found]


def scored(request, renderer) -> str:
    """Answers A where the first picture is a grey one, else B."""
    return f"<think>x</think><answer>{'A' if levels_of(request, renderer)[0] == 128 else 'B'}</answer>"


def test_each_control_changes_what_it_says_and_nothing_else(several, renderer, tmp_path):
    pool = ScriptedPool(renderer, scored)
    run([several], renderer, tmp_path / "eval", pool)
    own = {example.id: [int(path.stem) for path in example.images] for example in several.examples}
    many = [example.id for example in several.examples if len(example.images) > 1]
    rows = read_rows(tmp_path / "eval/step-000003")
    shown = {}
    for row, request in zip(rows, sorted(pool.requests, key=lambda request: request.index), strict=True):
        assert request.prompt.text.count("<|image_pad|>") == len(own[row.id])
        shown.setdefault(row.control, {})[row.id] = levels_of(request, renderer)
    assert list(shown) == ["none", "blank", "shuffled", "blank_one", "image_order", "reordered"]
    assert shown["none"] == shown["reordered"] == own
    assert shown["blank"] == {name: [128] * len(levels) for name, levels in own.items()}
    # the only row with one picture has nobody to change with
    assert [name for name in own if name not in shown["shuffled"]] == ["2"]
    for name, levels in shown["shuffled"].items():
        assert levels != own[name]
        assert len(levels) == len(own[name])
        assert levels in own.values()
    assert list(shown["blank_one"]) == list(shown["image_order"]) == many
    places = {tuple(level == 128 for level in levels) for levels in shown["blank_one"].values()}
    assert len(places) > 2  # not always the same one
    for name in many:
        assert sum(new != old for new, old in zip(shown["blank_one"][name], own[name], strict=True)) == 1
        assert shown["blank_one"][name].count(128) == 1
        assert shown["image_order"][name] != own[name]
        assert sorted(shown["image_order"][name]) == own[name]
    again = ScriptedPool(renderer, scored)
    run([several], renderer, tmp_path / "again", again)
    for one, other in zip(pool.requests, again.requests, strict=True):
        np.testing.assert_array_equal(
            one.prompt.image_inputs["pixel_values"], other.prompt.image_inputs["pixel_values"]
        )


def test_figures_of_several_pictures_are_in_summary_and_table(several, renderer, tmp_path, caplog):
    single = EvalFile("single", several.examples[2:3])
    with caplog.at_level("INFO"):
        summary = run([several, single], renderer, tmp_path, ScriptedPool(renderer, scored))
    found, plain = summary.files
    rows = [row for row in read_rows(tmp_path / "step-000003") if row.file == "several"]
    for control, accuracy in (("blank_one", found.blank_one), ("image_order", found.image_order)):
        correct = [row.correct for row in rows if row.control == control]
        assert (accuracy.correct, accuracy.rows) == (sum(correct), 6)
    assert found.image_order.correct == 3  # always B
    assert (plain.blank_one, plain.image_order) == (None, None)
    assert EvalSummary.read(tmp_path / "step-000003") == summary
    table = summary_table(None, summary, None)
    one = f"{100 * found.blank_one.value:.1f} ("
    assert f"several, 6 rows with several pictures: one of them grey {one}" in str(table.caption)
    assert ", in another order 50.0 (19–81)" in str(table.caption)
    assert "single, " not in str(table.caption)
    assert "6 with one of several pictures grey, 6 with several pictures in another order" in caplog.text


def test_files_of_single_pictures_have_the_controls_that_they_had(several, renderer, tmp_path, caplog):
    firsts = tuple(dataclasses.replace(example, more_images=()) for example in several.examples)
    with caplog.at_level("INFO"):
        summary = run([EvalFile("single", firsts)], renderer, tmp_path, ScriptedPool(renderer, scored))
    rows = read_rows(tmp_path / "step-000003")
    assert Counter(row.control for row in rows) == dict.fromkeys(("none", "blank", "shuffled", "reordered"), 7)
    assert "several" not in caplog.text
    assert "several" not in str(summary_table(None, summary, None).caption)
    # as written by earlier versions
    path = tmp_path / "step-000003/summary.json"
    content = json.loads(path.read_text())
    for name in ("blank_one", "image_order"):
        assert content["files"][0].pop(name) is None
    path.write_text(json.dumps(content))
    assert EvalSummary.read(tmp_path / "step-000003") == summary


def test_the_same_picture_twice_has_no_other_order():
    first, other = Path("a.png"), Path("b.png")
    same = Example("1", first, "?", ("x", "y"), 0, more_images=(first,))
    assert reorder_images(same, 0) is None
    assert reorder_images(dataclasses.replace(same, more_images=(other,)), 0).images == (other, first)
    assert reorder_images(dataclasses.replace(same, more_images=()), 0) is None
    long = dataclasses.replace(same, more_images=tuple(Path(f"{i}.png") for i in range(4)))
    orders = {reorder_images(dataclasses.replace(long, id=str(i)), 0).images for i in range(8)}
    assert len(orders) > 4
    assert reorder_images(long, 0) == reorder_images(long, 0)


def test_the_same_pictures_in_another_order_are_not_anothers():
    a, b, c, d = (Path(f"{name}.png") for name in "abcd")
    pairs = ((a, b), (b, a), (c, d))
    rows = [Example(str(i), one, "?", ("x", "y"), 0, more_images=(two,)) for i, (one, two) in enumerate(pairs)]
    shuffled = {row.id: row.images for row in shuffled_images(rows)}
    # each of the first two can only get the third's, and only one does
    assert sorted(shuffled.values()) in ([(a, b), (c, d)], [(b, a), (c, d)])


def test_rows_that_would_keep_one_of_their_pictures_are_left_out():
    prior, *current = (Path(f"{name}.png") for name in "pabc")
    rows = [Example(str(i), prior, "?", ("x", "y"), 0, more_images=(own,)) for i, own in enumerate(current)]
    assert shuffled_images(rows) == []
    slices = [(0, 1), (1, 2), (3, 4), (4, 5), (6, 7), (7, 8)]
    rows = [
        Example(str(i), Path(f"{one}.png"), "?", ("x", "y"), 0, more_images=(Path(f"{two}.png"),))
        for i, (one, two) in enumerate(slices)
    ]
    shuffled = {row.id: row for row in shuffled_images(rows)}
    assert shuffled
    assert all(set(shuffled[row.id].images).isdisjoint(row.images) for row in rows if row.id in shuffled)


@pytest.mark.parametrize("images", ["abcdefgh", "aabbccdd", "aaaabcde", "aaaabbbb", "abababac", "ab"])
def test_no_row_keeps_its_own_picture(images):
    rows = pictured(images)
    shuffled = shuffled_images(rows)
    assert [row.id for row in shuffled] == [row.id for row in rows]
    assert all(new.image != old.image for new, old in zip(shuffled, rows, strict=True))
    assert Counter(row.image for row in shuffled) == Counter(row.image for row in rows)
    assert shuffled == shuffled_images(rows)
    assert [dataclasses.replace(new, image=old.image) for new, old in zip(shuffled, rows, strict=True)] == rows


def test_the_shuffle_depends_on_the_seed():
    rows = pictured("abcdefgh")
    assert len({tuple(row.image for row in shuffled_images(rows, seed)) for seed in range(5)}) == 5


@pytest.mark.parametrize(("images", "kept"), [("aaaaab", 2), ("aaa", 0), ("a", 0), ("", 0), ("ab-c", 3)])
def test_rows_that_must_keep_their_picture_are_left_out(images, kept):
    rows = pictured(images)
    shuffled = shuffled_images(rows)
    own = {row.id: row.image for row in rows}
    assert len(shuffled) == kept
    assert all(row.image not in (None, own[row.id]) for row in shuffled)


def pictured(images: str) -> list[Example]:
    """One row a letter, with the picture of that name; "-" is a row without one."""
    return [
        Example(
            id=str(i), image=None if name == "-" else Path(f"/{name}.png"), question="?", options=("x", "y"), answer=0
        )
        for i, name in enumerate(images)
    ]
