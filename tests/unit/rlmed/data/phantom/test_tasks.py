"""Generated tasks: boxes hold what was drawn, answers are true, nothing gives them away."""

from __future__ import annotations

import copy
import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rlmed.core.config.composing import compose_config
from rlmed.core.types import Example
from rlmed.data.examples import read_examples
from rlmed.data.phantom import render as drawing
from rlmed.data.phantom import tasks
from rlmed.data.phantom.anatomy import LESIONS, NO_LESION, QUADRANTS, REGIONS, SIZES, TECHNIQUES, TISSUES, Study
from rlmed.data.phantom.render import XRAY_LESION_GAIN, render, render_rays, render_with_box
from rlmed.data.phantom.studies import KINDS, MODALITIES, Split, sample_study, write_dataset
from rlmed.data.phantom.task_texts import QUESTIONS, SYNONYMS, accepted, reports
from rlmed.data.phantom.tasks import CATEGORIES, FILES, IMAGE_SIZE, TASKS, make_row, write_task_dataset
from rlmed.tasks.registry import task_named, task_of
from tests.configs import renderer_of

SCENE = re.compile(
    r"This is an? (.+) (MRI|CT|X-ray) of the (\w+)\. There is (?:a (\w+) (\w+) at the (\w+ \w+)|no lesion)\."
)


def study_in(text: str) -> Study:
    """The study that a description tells of."""
    found = SCENE.match(text.removeprefix("<think>"))
    assert found, text
    technique, modality, region, *lesion = found.groups()
    size, kind, quadrant = [NO_LESION if value is None else value for value in lesion]
    return Study(modality, technique, region, kind, size, quadrant)


def answer_in(row: dict) -> str:
    found = re.fullmatch(r"<think>.+</think>\n<answer>(.+)</answer>", row["completion"])
    assert found, row
    return found[1]


def with_and_without(study: Study, seed: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The picture before it is rounded, or for an X-ray the attenuation, with the lesion or not."""
    rng = np.random.default_rng(seed)
    view = drawing._view(study, rng)
    lesion = drawing._lesion(study, view, rng)
    body = drawing.sample_body(study.region, rng)
    if study.modality == "X-ray":
        excess = [TISSUES[shape.tissue].hu - TISSUES[shape.inside].hu for shape in (*body, *lesion)]
        excess[len(body) :] = [XRAY_LESION_GAIN[study.lesion] * value for value in excess[len(body) :]]
        attenuation = render_rays([*body, *lesion], excess, view, size)
        return attenuation, render_rays(body, excess[: len(body)], view, size)
    draw = drawing._render_ct if study.modality == "CT" else drawing._render_mri
    return (
        draw(study, [*body, *lesion], view, copy.deepcopy(rng), size),
        draw(study, body, view, copy.deepcopy(rng), size),
    )


@pytest.mark.parametrize("size", [112, 56])
@pytest.mark.parametrize("modality", MODALITIES)
def test_the_box_holds_the_pixels_that_the_lesion_changes_and_nothing_more(modality: str, size: int) -> None:
    rng = np.random.default_rng(7)
    for seed, technique in enumerate(np.repeat(TECHNIQUES[modality], 8)):
        study = sample_study(rng, modality, "disease", LESIONS[1 + seed % 4])
        study = Study(modality, str(technique), study.region, study.lesion, study.size, study.quadrant)
        _, box = render_with_box(study, np.random.default_rng(seed), size)
        assert box is not None
        shown, bare = with_and_without(study, seed, size)
        # sums of float32: 30 shapes' attenuations, of up to 3000 each, round to less than 0.1
        rows, columns = np.nonzero(np.abs(shown - bare) > (0.1 if modality == "X-ray" else 0))
        around = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert box[0] <= around[0], study
        assert box[1] <= around[1], study
        assert box[2] >= around[2], study
        assert box[3] >= around[3], study
        # a pixel that is touched at its very edge may not change
        assert max(abs(mine - theirs) for mine, theirs in zip(box, around, strict=True)) <= 1, study


@pytest.mark.parametrize("modality", MODALITIES)
def test_asking_for_the_box_changes_no_pixel(modality: str) -> None:
    study = sample_study(np.random.default_rng(2), modality, "disease", "mass")
    image, box = render_with_box(study, np.random.default_rng(5))
    np.testing.assert_array_equal(image, render(study, np.random.default_rng(5)))
    assert box is not None
    healthy = sample_study(np.random.default_rng(2), modality, "disease", NO_LESION)
    image, nothing = render_with_box(healthy, np.random.default_rng(5))
    np.testing.assert_array_equal(image, render(healthy, np.random.default_rng(5)))
    assert nothing is None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tasks") / "data"


@pytest.fixture(scope="module")
def written(folder: Path) -> dict[str, list[dict]]:
    paths = write_task_dataset(folder, 3, train_rows=30, test_rows=5)
    return {name: [json.loads(line) for line in path.read_text().splitlines()] for name, path in paths.items()}


def test_rows_have_the_fields_of_their_task(written: dict[str, list[dict]]) -> None:
    assert list(written) == [f"{part}_{task}" for task in FILES for part in ("train", "test")]
    assert [len(rows) for rows in written.values()] == [30, 5] * len(FILES)
    common = {"id", "image", "question", "answer", "modality", "kind", "completion"}
    for name, rows in written.items():
        task = name.rpartition("_")[2]
        assert [row.get("task", "choice") for row in rows] == [
            TASKS[n % len(TASKS)] if task == "mixed" else task for n in range(len(rows))
        ]
        for row in rows:
            extra = {"choice": {"options"}, "labels": {"options", "task"}}.get(row.get("task", "choice"), {"task"})
            assert set(row) == common | extra, row
    assert {row["modality"] for row in written["test_report"]} == set(MODALITIES)


def test_open_answers_are_true_and_come_first(written: dict[str, list[dict]]) -> None:
    for row in written["train_open"]:
        study = study_in(row["completion"])
        fields = dict(zip(KINDS, ("technique", "region", "lesion", "size", "quadrant"), strict=True))
        truth = getattr(study, fields[row["kind"]])
        answers = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
        assert answers == accepted(truth)
        assert answer_in(row) == truth
        assert row["question"] in QUESTIONS[row["kind"]]
    assert {row["kind"] for row in written["train_open"]} == set(KINDS)


def test_no_text_is_right_for_two_answers() -> None:
    values = {*(value for group in TECHNIQUES.values() for value in group), *REGIONS, *LESIONS, *SIZES, *QUADRANTS}
    for group in (*TECHNIQUES.values(), REGIONS, LESIONS, SIZES, QUADRANTS):
        texts = [text for value in group for text in accepted(value)]
        assert len(set(texts)) == len(texts)
    assert set(SYNONYMS) <= values


def test_boxes_lie_in_the_quadrant_and_are_written_in_thousandths_to_tens(written: dict[str, list[dict]]) -> None:
    found = Counter()
    for row in written["train_grounding"]:
        study = study_in(row["completion"])
        asked = re.search(r"\b(lesion|cyst|mass|hemorrhage|calcification)\b", row["question"])
        assert asked
        assert row["kind"] == ("any lesion" if asked[1] == "lesion" else "named lesion")
        there = study.lesion != NO_LESION and asked[1] in ("lesion", study.lesion)
        found[row["kind"], there] += 1
        assert len(row["answer"]) == there, row
        if there:
            left, top, right, bottom = row["answer"][0]
            middle = (
                "upper" if top + bottom < IMAGE_SIZE else "lower",
                "left" if left + right < IMAGE_SIZE else "right",
            )
            assert " ".join(middle) == study.quadrant
            assert {"small": 10, "medium": 16, "large": 26}[study.size] <= right - left <= 38
        assert json.loads(answer_in(row)) == [[10 * round(100 * edge / 112) for edge in box] for box in row["answer"]]
    assert len(found) == 4  # both kinds of question, with something to find and without


def test_labels_are_those_of_the_shown_that_are_true(written: dict[str, list[dict]]) -> None:
    for row in written["train_labels"]:
        study = study_in(row["completion"])
        true = (study.region, study.size, study.lesion, study.quadrant)
        shown = [values for values in CATEGORIES.values() if set(values) & set(row["options"])]
        assert sorted(row["options"]) == sorted(value for values in shown for value in values)
        assert len(shown) in (2, 3)
        assert row["answer"] == [value for value in true if value in row["options"]]
        assert answer_in(row) == (", ".join(row["answer"]) or "none")
    assert {len(row["answer"]) for row in written["train_labels"]} == {0, 1, 2, 3}


def test_reports_say_everything_twice(written: dict[str, list[dict]]) -> None:
    for row in written["train_report"]:
        study = study_in(row["completion"])
        assert row["answer"] == reports(study)
        assert answer_in(row) == row["answer"][0]
        for value in (study.technique, study.modality, study.region, study.lesion, study.size, study.quadrant):
            assert all(value.lower() in text.lower() for text in row["answer"]), row


@pytest.fixture(scope="module")
def examples(written: dict[str, list[dict]], folder: Path) -> list[Example]:
    return [
        example for name in written for example in read_examples(folder / f"{name}.jsonl", on_bad_row="error").examples
    ]


def test_a_run_reads_all_rows_and_judges_their_completions_right(examples: list[Example]) -> None:
    pytest.importorskip("rouge_score")
    pytest.importorskip("sacrebleu")
    assert Counter(example.task for example in examples) == {
        "choice": 7, "open": 42, "grounding": 42, "labels": 42, "report": 42,
    }  # fmt: skip
    for example in examples:
        assert example.completion is not None
        judged = task_of(example).judge(example, example.completion)
        assert judged.correct, example
        # boxes are written to tens of thousandths
        assert example.task == "grounding" or judged.answer == task_of(example).right_answer(example)


def test_prompts_fit_the_embedded_model(examples: list[Example]) -> None:
    config = compose_config("train", ["data=phantom_tasks", "+profile=tiny"])
    renderer = renderer_of(config)
    assert max(len(renderer.render(example).token_ids) for example in examples) <= config.data.max_prompt_tokens
    completions = [example.completion or "" for example in examples]
    longest = max(len(renderer.tokenizer.encode(text, add_special_tokens=False)) for text in completions)
    assert longest < config.rollout.max_tokens  # and one that ends the turn


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows without the time that pictures take."""
    blank = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    centre = {"upper": 30, "lower": 82, "left": 30, "right": 82}

    def box_of(study: Study, *_: object) -> tuple[np.ndarray, tuple[int, int, int, int] | None]:
        if study.lesion == NO_LESION:
            return blank, None
        y, x = (centre[word] for word in study.quadrant.split())
        return blank, (x - 10, y - 10, x + 10, y + 10)

    monkeypatch.setattr(tasks, "render_with_box", box_of)


def rows_of(name: str, count: int, seed: int) -> list[dict]:
    return [make_row(name, seed, index)[0] for index in range(count)]


def guess(fit: list[dict], rows: list[dict], *, leave_out: bool) -> float:
    """Accuracy of the answer most often right in `fit` to the same question, in other rows."""
    seen: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for row in fit:
        seen[row["question"]][json.dumps(row["answer"])] += 1
    score = 0.0
    for row in rows:
        mine = json.dumps(row["answer"])
        counts = seen[row["question"]] - Counter({mine: int(leave_out)})
        best = [text for text, count in counts.items() if count == max(counts.values())]
        score += (mine in best) / max(len(best), 1)
    return score / len(rows)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("seed", [0, 1])
def test_open_questions_alone_tell_little(seed: int) -> None:
    """Chance is 1/12 for techniques, 1/4 to 1/5 for others: 0.2 on average; three deviations."""
    train, test = rows_of("train_open", 600, seed), rows_of("test_open", 300, seed)
    assert guess(train, test, leave_out=False) < 0.27
    assert 0.12 < guess(test, test, leave_out=True) < 0.27
    for kind in KINDS[1:]:
        answers = Counter(str(row["answer"]) for row in train if row["kind"] == kind)
        assert max(answers.values()) - min(answers.values()) <= 4  # three extra turns, and a begun round


@pytest.mark.usefixtures("undrawn")
def test_boxes_alone_tell_little() -> None:
    rows = rows_of("train_grounding", 600, 0)
    boxes = Counter(json.dumps(row["answer"]) for row in rows)
    assert len(boxes) == 5
    assert max(boxes.values()) / 600 < 0.24
    for kind in ("any lesion", "named lesion"):
        nothing = [not row["answer"] for row in rows if row["kind"] == kind]
        assert 0.16 < np.mean(nothing) < 0.25
    asked = Counter(row["question"] for row in rows if row["kind"] == "named lesion" and row["answer"])
    per_kind = Counter(next(kind for kind in LESIONS[1:] if kind in question) for question in asked.elements())
    assert max(per_kind.values()) < 1.4 * min(per_kind.values())


@pytest.mark.usefixtures("undrawn")
def test_a_report_of_another_image_is_not_taken_for_right() -> None:
    pytest.importorskip("rouge_score")
    task = task_named("report")
    rows = [task.read(row["answer"], (), lambda: (1, 1)) for row in rows_of("train_report", 40, 0)]
    scores = [(task.score(task.write(mine), other) or {})["rouge_l"] for mine in rows for other in rows]
    assert 0.2 < np.mean(scores) < 0.45
    best = max(np.mean([(task.score(task.write(mine), other) or {})["rouge_l"] for other in rows]) for mine in rows)
    assert best < task.threshold


@pytest.mark.usefixtures("undrawn")
def test_neither_words_nor_places_of_labels_give_the_answer_away() -> None:
    rows = rows_of("train_labels", 1200, 0)
    counts = Counter(len(row["answer"]) for row in rows)
    # a fifth have no lesion: nothing is true if no region is shown either, in four of ten choices;
    # six of ten choices are of two categories
    expected = {0: 0.2 * 0.4, 1: 0.2 * 0.6, 2: 0.8 * 0.6, 3: 0.8 * 0.4}
    shown = Counter(option for row in rows for option in row["options"])
    true = Counter(label for row in rows for label in row["answer"])
    assert all(abs(counts[count] / 1200 - share) < 0.02 for count, share in expected.items())
    for values in CATEGORIES.values():
        share = (1.0 if values is REGIONS else 0.8) / len(values)
        # each category is in six of ten choices; the bound on shares is four deviations
        assert all(abs(shown[value] / 720 - 1) < 0.05 for value in values)
        assert all(abs(true[value] / shown[value] - share) < 4 * (share * (1 - share) / 720) ** 0.5 for value in values)
    places = Counter(row["options"].index(label) / len(row["options"]) < 0.5 for row in rows for label in row["answer"])
    assert abs(places[True] / places.total() - 0.5) < 0.06


def test_the_same_seed_gives_the_same_files_and_fewer_rows_are_a_prefix(tmp_path: Path) -> None:
    for name, seed, rows in (("a", 4, 6), ("b", 4, 9), ("c", 5, 6)):
        write_task_dataset(tmp_path / name, seed, ["mixed"], train_rows=rows, test_rows=1)
    lines = [(tmp_path / name / "train_mixed.jsonl").read_text().splitlines() for name in "abc"]
    assert lines[0] == lines[1][:6] != lines[2]
    image = json.loads(lines[0][4])["image"]
    assert (tmp_path / "a" / image).read_bytes() == (tmp_path / "b" / image).read_bytes()
    with Image.open(tmp_path / "a" / image) as picture:
        assert (picture.size, picture.mode) == ((112, 112), "L")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "images", "tasks.json", "test_mixed.jsonl", "train_mixed.jsonl",
    ]  # fmt: skip


def test_whole_data_is_left_alone_and_any_other_is_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(seed: int) -> Path:
        return write_task_dataset(tmp_path / "data", seed, ["open"], train_rows=3, test_rows=2)["train_open"]

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tasks, "render_with_box", killed)
        with pytest.raises(KeyboardInterrupt):
            write(0)
    assert not (tmp_path / "data").exists()
    first, stamp = write(0).read_text(), (tmp_path / "data").stat().st_ino
    assert write(0).read_text() == first
    assert (tmp_path / "data").stat().st_ino == stamp
    assert write(1).read_text() != first
    next((tmp_path / "data" / "images" / "test_open").glob("*.png")).unlink()
    write(1)
    assert len(list((tmp_path / "data" / "images" / "test_open").glob("*.png"))) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_errors_name_the_value(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="choice"):
        write_task_dataset(tmp_path / "x", 0, ["choice"])
    with pytest.raises(ValueError, match="test_rows=0"):
        write_task_dataset(tmp_path / "x", 0, ["open"], test_rows=0)
    with pytest.raises(ValueError, match="'train_boxes'"):
        make_row("train_boxes", 0, 0)
    write_dataset(tmp_path / "choice", 0, [Split("train_mri", "MRI", 2)])
    with pytest.raises(ValueError, match="choice holds files"):
        write_task_dataset(tmp_path / "choice", 0, ["open"])
    assert (tmp_path / "choice" / "train_mri.jsonl").is_file()
    write_task_dataset(tmp_path / "open", 0, ["open"], train_rows=1, test_rows=1)
    with pytest.raises(ValueError, match="open holds files"):
        write_dataset(tmp_path / "open", 0, [Split("train_mri", "MRI", 2)])
