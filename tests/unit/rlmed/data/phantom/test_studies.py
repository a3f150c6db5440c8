"""Generated data: physics by hand, geometry by brute force, balance and determinism of rows."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rlmed.data.phantom import render as phantom_render
from rlmed.data.phantom import studies as phantom
from rlmed.data.phantom.anatomy import (
    LESIONS,
    NO_LESION,
    QUADRANTS,
    RADII,
    REGIONS,
    SIZES,
    TECHNIQUES,
    TISSUES,
    Shape,
    Tissue,
)
from rlmed.data.phantom.render import SEQUENCES, View, render_rays, render_slice, spin_echo
from rlmed.data.phantom.studies import (
    KINDS,
    MODALITIES,
    Split,
    Study,
    make_example,
    render,
    sample_study,
    write_dataset,
    write_split,
)

STRAIGHT = View(np.zeros(3), *np.eye(3))
TILTED = Shape("liver", (0.1, -0.2, 0.05), (0.5, 0.3, 0.7), hole=(0.4, 0.2, 0.8), tilt=0.5, turn=0.8)


def inside(shape: Shape, points: np.ndarray) -> np.ndarray:
    """Whether points [..., 3] lie in the shape, by undoing its rotations one after the other."""
    x, y, z = np.moveaxis(points - np.array(shape.centre), -1, 0)
    x, y = x * np.cos(shape.turn) + y * np.sin(shape.turn), y * np.cos(shape.turn) - x * np.sin(shape.turn)
    y, z = y * np.cos(shape.tilt) + z * np.sin(shape.tilt), z * np.cos(shape.tilt) - y * np.sin(shape.tilt)
    found = (x / shape.radii[0]) ** 2 + (y / shape.radii[1]) ** 2 + (z / shape.radii[2]) ** 2 <= 1
    if shape.hole is not None:
        found &= (x / shape.hole[0]) ** 2 + (y / shape.hole[1]) ** 2 + (z / shape.hole[2]) ** 2 > 1
    return found


def line(size: int) -> np.ndarray:
    return (np.arange(size) + 0.5) * 2 / size - 1


def test_spin_echo_gives_the_values_of_the_equation() -> None:
    tissue = Tissue(t1=500, t2=100, pd=0.8, hu=0)
    assert spin_echo(tissue, tr=500, te=20) == pytest.approx(0.8 * 0.6321206 * 0.8187308, rel=1e-6)
    inverted = abs(1 - 2 * 0.1353353 + 0.0183156)  # TI = 2 T1, TR = 4 T1
    assert spin_echo(tissue, tr=2000, te=100, ti=1000) == pytest.approx(0.8 * inverted * 0.3678794, rel=1e-6)


def test_contrasts_are_those_that_a_radiologist_expects() -> None:
    signal = {
        name: {tissue: spin_echo(TISSUES[tissue], s.tr, s.te, s.ti) / s.white for tissue in TISSUES}
        for name, s in SEQUENCES.items()
    }
    t1, t2, flair = signal["T1-weighted"], signal["T2-weighted"], signal["FLAIR"]
    assert t1["fat"] > t1["white matter"] > t1["grey matter"] > 1.5 * t1["cerebrospinal fluid"]
    assert t2["cerebrospinal fluid"] > 2 * t2["grey matter"] > 2 * t2["white matter"]
    assert flair["cerebrospinal fluid"] < 0.1 * flair["grey matter"]
    assert t1["clot"] > 1.5 * t1["white matter"]
    assert all(contrast["calcium"] < 0.05 for contrast in signal.values())


def test_slice_of_a_tilted_hollow_ellipsoid_equals_brute_force() -> None:
    view = View(
        np.array([0.02, 0.01, 0.1]),
        np.array([0.96, 0.28, 0.0]),
        np.array([-0.28, 0.96, 0.0]),
        np.array([0.0, 0.0, 1.0]),
    )
    size = 56
    image = render_slice([TILTED], [3.0], 1.0, view, size)
    fine = line(size * 8)
    points = view.origin + fine[None, :, None] * view.right + fine[:, None, None] * view.down
    covered = inside(TILTED, points).reshape(size, 8, size, 8).mean((1, 3))
    interior, exterior = covered == 1, covered == 0
    assert interior.sum() > 100
    assert np.abs(image - (1 + 2 * covered)).mean() < 0.02
    assert (image[interior] > 2.5).mean() > 0.98
    assert (image[exterior] < 1.5).mean() > 0.98


def test_ray_lengths_equal_brute_force_and_are_cut_to_the_field_of_view() -> None:
    size = 24
    view = View(
        np.array([0.0, 0.1, 0.0]), np.array([1.0, 0.0, 0.0]), np.array([0.0, 0.0, -1.0]), np.array([0.0, 1.0, 0.0])
    )
    steps = np.linspace(-1.1, 1.1, 2201)
    grid = line(size)
    points = (
        view.origin
        + grid[None, :, None, None] * view.right
        + grid[:, None, None, None] * view.down
        + steps[None, None, :, None] * view.depth
    )
    expected = inside(TILTED, points).sum(2) * (steps[1] - steps[0])
    np.testing.assert_allclose(
        render_rays([TILTED], [1.0], view, size), expected, atol=5e-3
    )  # the sum is off by two of its steps at each edge
    column = Shape("fat", (0, 0, 0), (0.5, 50.0, 0.5))
    assert render_rays([column], [1.0], view, size)[size // 2, size // 2] == pytest.approx(2.2)


def test_excesses_over_the_surrounding_tissue_add_up_to_the_attenuation() -> None:
    outer, inner = Shape("fat", (0, 0, 0), (0.8, 0.8, 0.8), "air"), Shape("liver", (0, 0, 0), (0.3, 0.3, 0.3), "fat")
    total = render_rays([outer, inner], [2.0, 5.0 - 2.0], STRAIGHT, 101)[50, 50]
    assert total == pytest.approx(
        2.0 * (1.6 - 0.6) + 5.0 * 0.6, abs=1e-4
    )  # a ray through a pixel beside the middle is shorter


@pytest.mark.parametrize("modality", MODALITIES)
def test_lesions_have_their_size_and_lie_in_their_quadrant_and_in_the_body(modality: str) -> None:
    rng = np.random.default_rng(3)
    for technique in TECHNIQUES[modality]:
        for region in REGIONS:
            for quadrant in QUADRANTS:
                size = str(rng.choice(SIZES[1:]))
                study = Study(modality, technique, region, str(rng.choice(LESIONS[1:])), size, quadrant)
                view = phantom_render._view(study, rng)
                outline = phantom_render._lesion(study, view, rng)[:1]
                mask = render_slice(outline, [1.0], 0.0, view, 112) > 0.5
                low, high = RADII[size]
                assert low * 0.85 < np.sqrt(mask.sum() / np.pi) < high * 1.12, study
                rows, columns = np.nonzero(mask)
                vertical, horizontal = quadrant.split()
                assert (rows.min() >= 55) if vertical == "lower" else (rows.max() <= 56), study
                assert (columns.min() >= 55) if horizontal == "right" else (columns.max() <= 56), study
                body = render_rays(phantom_render.sample_body(region, rng)[:3], [1.0] * 3, view, 112) > 0
                assert body[mask].mean() > 0.95, study


@pytest.mark.parametrize("modality", MODALITIES)
def test_an_image_is_a_function_of_study_and_seed(modality: str) -> None:
    study = sample_study(np.random.default_rng(1), modality)
    first, again, other = (render(study, np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert first.shape == (112, 112)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.1
    assert first.std() > 20
    assert render(study, np.random.default_rng(5), size=224).shape == (224, 224)


def middle_of_lesion(modality: str, technique: str, lesion: str) -> float:
    """Mean grey value of the middle of large lesions in the brain."""
    values = []
    for seed in range(6):
        study = Study(modality, technique, "head", lesion, "large", "upper left")
        rng = np.random.default_rng(seed)
        view = phantom_render._view(study, rng)
        core = replace(phantom_render._lesion(study, view, rng)[0], radii=(0.12, 0.12, 0.12))
        mask = render_slice([core], [1.0], 0.0, view, 112) > 0.5
        values.append(render(study, np.random.default_rng(seed))[mask].mean())
    return float(np.mean(values))


def test_lesion_kinds_look_as_their_physics_says() -> None:
    t1 = {lesion: middle_of_lesion("MRI", "T1-weighted", lesion) for lesion in LESIONS[1:]}
    t2 = {lesion: middle_of_lesion("MRI", "T2-weighted", lesion) for lesion in LESIONS[1:]}
    ct = {lesion: middle_of_lesion("CT", "soft-tissue window", lesion) for lesion in LESIONS[1:]}
    xray = {lesion: middle_of_lesion("X-ray", "axial view", lesion) for lesion in LESIONS[1:]}
    assert max(t1, key=t1.__getitem__) == "hemorrhage"
    assert max(t2, key=t2.__getitem__) == "cyst"
    assert min(t1, key=t1.__getitem__) == min(t2, key=t2.__getitem__) == "calcification"
    assert ct["calcification"] > 1.3 * ct["hemorrhage"] > 1.3 * ct["cyst"]
    assert max(xray, key=xray.__getitem__) == "calcification"


def test_sampled_studies_are_uniform_and_fit_the_question() -> None:
    rng = np.random.default_rng(0)
    for kind in KINDS:
        answers = Counter(phantom.correct_answer(sample_study(rng, "CT", kind), kind) for _ in range(800))
        values = phantom.answer_values(kind, "CT")
        assert set(answers) == set(values)
        assert max(abs(count / 800 - 1 / len(values)) for count in answers.values()) < 0.05
    lesions = Counter(sample_study(rng, "MRI").lesion for _ in range(1000))
    assert max(abs(lesions[lesion] / 1000 - 0.2) for lesion in LESIONS) < 0.04


def test_questions_have_the_correct_answer_once_and_wordings_that_tell_nothing() -> None:
    rng = np.random.default_rng(0)
    for i in range(300):
        kind, modality = KINDS[i % 5], MODALITIES[i % 3]
        study = sample_study(rng, modality, kind)
        example = make_example(study, kind, str(i), None, rng, i % 4)
        assert example.answer == i % 4
        assert example.options[i % 4] == phantom.correct_answer(study, kind)
        assert len(set(example.options)) == 4
        assert set(example.options) <= set(phantom.answer_values(kind, modality))
        assert not [value for value in example.options if value in example.question]
    assert all(2 <= len(wordings) <= 4 for wordings in phantom.QUESTIONS.values())


def prior_accuracy(fit: list[dict], rows: list[dict], leave_out: bool) -> float:
    """Percent accuracy of the option most often right in `fit`, in other rows with `leave_out`."""
    right = Counter(row["answer"] for row in fit)
    score = 0.0
    for row in rows:
        counts = [right[text] - (leave_out and text == row["answer"]) for text in row["options"]]
        best = [text for text, count in zip(row["options"], counts, strict=True) if count == max(counts)]
        score += (row["answer"] in best) / len(best)
    return 100 * score / len(rows)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_without_the_image_nothing_can_be_told(seed: int) -> None:
    files = {}
    for split in phantom.SPLITS:
        rows = [phantom._row(split.name, split.modality, seed, i)[1] for i in range(split.rows)]
        files[split.name] = [{"options": row.options, "answer": row.options[row.answer]} for row in rows]
        letters = Counter(row.answer for row in rows)
        assert max(letters.values()) / len(rows) < 0.27
        assert [row.kind for row in rows[:10]] == [*KINDS, *KINDS]
    for rows in files.values():
        assert 20 <= prior_accuracy(rows, rows, leave_out=True) <= 30
        assert 20 <= prior_accuracy(files["train_mri"], rows, leave_out=False) <= 30


def test_a_split_is_the_same_on_each_call_and_the_beginning_of_a_longer_one(tmp_path: Path) -> None:
    for name, rows in (("a", 10), ("b", 10), ("c", 15)):
        (tmp_path / name).mkdir()
        write_split(tmp_path / name, name="few", modality="CT", rows=rows, seed=4)
    lines = [(tmp_path / name / "few.jsonl").read_text().splitlines() for name in "abc"]
    assert lines[0] == lines[1] == lines[2][:10]
    row = json.loads(lines[0][3])
    assert set(row) == {"id", "image", "question", "options", "answer", "modality", "kind"}
    assert row["answer"] in row["options"]
    assert (row["modality"], row["kind"]) == ("CT", "grading")
    images = [(tmp_path / name / row["image"]).read_bytes() for name in "abc"]
    assert images[0] == images[1] == images[2]
    with Image.open(tmp_path / "a" / row["image"]) as image:
        assert (image.size, image.mode) == ((112, 112), "L")


SMALL = (Split("train_mri", "MRI", 6), Split("test_ct", "CT", 5))


def test_a_whole_dataset_is_left_alone_and_any_other_is_written_anew(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "data"
    paths = write_dataset(folder, 0, SMALL)
    assert {name: len(path.read_text().splitlines()) for name, path in paths.items()} == {"train_mri": 6, "test_ct": 5}
    first = paths["train_mri"].read_text()
    stamp = paths["train_mri"].stat().st_mtime_ns
    assert write_dataset(folder, 0, SMALL) == paths
    assert paths["train_mri"].stat().st_mtime_ns == stamp
    write_dataset(folder, 1, SMALL)
    assert paths["train_mri"].read_text() != first
    image = next((folder / "images" / "test_ct").glob("*.png"))
    image.unlink()
    write_dataset(folder, 1, SMALL)
    assert image.is_file()
    assert [path.name for path in folder.parent.iterdir()] == ["data"]


def test_a_killed_write_is_never_taken_for_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: 7)
        patch.setattr(phantom, "render", killed)
        with pytest.raises(KeyboardInterrupt):
            write_dataset(tmp_path / "data", 0, SMALL)
    assert not (tmp_path / "data").exists()
    assert write_dataset(tmp_path / "data", 0, SMALL)["test_ct"].is_file()


def test_of_two_that_write_it_at_once_both_get_the_first_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that reads the first one's images must not find them replaced."""
    original = phantom.write_split
    inodes = []

    def overtaken(*args: object, **keywords: object) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(phantom, "write_split", original)
            write_dataset(tmp_path / "data", 0, SMALL)
        inodes.append((tmp_path / "data").stat().st_ino)
        original(*args, **keywords)  # type: ignore[arg-type]

    monkeypatch.setattr(phantom, "write_split", overtaken)
    paths = write_dataset(tmp_path / "data", 0, SMALL)
    assert set(inodes) == {(tmp_path / "data").stat().st_ino}
    assert all(path.is_file() for path in paths.values())
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_errors_name_the_value_and_advice(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    healthy = Study("MRI", "FLAIR", "head", NO_LESION, NO_LESION, NO_LESION)
    with pytest.raises(ValueError, match="'PET'"):
        sample_study(rng, "PET")
    with pytest.raises(ValueError, match="'huge'"):
        sample_study(rng, "CT", "grading", "huge")
    with pytest.raises(ValueError, match="'T1-weighted'; for CT"):
        Study("CT", "T1-weighted", "head", "cyst", "small", "upper left")
    with pytest.raises(ValueError, match="all three"):
        Study("MRI", "FLAIR", "head", NO_LESION, "small", NO_LESION)
    with pytest.raises(ValueError, match="needs a lesion"):
        make_example(healthy, "attribute", "x", None, rng, 0)
    with pytest.raises(ValueError, match="answer_index=4"):
        make_example(healthy, "anatomy", "x", None, rng, 4)
    with pytest.raises(ValueError, match="size=14"):
        render(healthy, rng, 14)
    with pytest.raises(ValueError, match="rows=0"):
        write_split(tmp_path, name="x", modality="CT", rows=0, seed=0)
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(ValueError, match="not a generated dataset"):
        write_dataset(tmp_path, 0, SMALL)
    assert (tmp_path / "letter.txt").read_text() == "mine"
