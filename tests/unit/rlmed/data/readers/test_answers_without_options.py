"""VQA-RAD and SLAKE in small files: options for questions that come with an answer alone."""

from __future__ import annotations

import json
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from rlmed.data.examples import BadRowError, read_examples
from rlmed.data.prepare.prepared_data import write_prepared_data
from rlmed.data.readers.base import Encoded, Skipped, SourceRow
from rlmed.data.readers.options import AnswerPool, plain_answer
from rlmed.data.readers.published import slake, vqa_rad
from tests.unit.rlmed.data.pictures import marked


def rad_row(number: int, **changes) -> dict:
    row = {
        "qid": str(number),
        "phrase_type": "freeform",
        "qid_linked_id": "03f451ca-de62-4617-9679-e836026a7642",
        "image_case_url": "https://medpix.nlm.nih.gov/case?id=1",
        "image_name": "synpic1.jpg",
        "image_organ": "CHEST",
        "evaluation": "not evaluated",
        "question": f"Is finding {number} to be seen?",
        "question_rephrase": "NULL",
        "question_type": "PRES",
        "answer": "Yes",
        "answer_type": "CLOSED",
    }
    return {key: value for key, value in {**row, **changes}.items() if value is not ...}


def slake_row(number: int, **changes) -> dict:
    row = {
        "img_id": 1,
        "img_name": "xmlab1/source.jpg",
        "question": f"Which organ is number {number}?",
        "answer": "Liver",
        "q_lang": "en",
        "location": "Abdomen",
        "modality": "MRI",
        "answer_type": "OPEN",
        "base_type": "vqa",
        "content_type": "Organ",
        "triple": ["vhead", "_", "_"],
        "qid": number,
    }
    return {key: value for key, value in {**row, **changes}.items() if value is not ...}


@pytest.fixture
def rad(tmp_path) -> Path:
    folder = tmp_path / "VQA_RAD"
    (folder / vqa_rad.IMAGE_FOLDER).mkdir(parents=True)
    marked().save(folder / vqa_rad.IMAGE_FOLDER / "synpic1.jpg")
    return folder


@pytest.fixture
def slake_folder(tmp_path) -> Path:
    folder = tmp_path / "Slake1.0"
    (folder / "imgs" / "xmlab1").mkdir(parents=True)
    marked().save(folder / "imgs" / "xmlab1" / "source.jpg")
    return folder


def put(path: Path, *rows: object) -> Path:
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8", errors="backslashreplace")
    return path.parent


def usable(rows) -> list[SourceRow]:
    return [row for row in rows if isinstance(row, SourceRow)]


def test_vqa_rad_field_by_field(rad):
    put(rad / vqa_rad.QUESTIONS, rad_row(7, answer="Yes ", answer_type="CLOSED "), rad_row(8, answer="no"))
    first, second = vqa_rad.read(rad)
    assert first == SourceRow(
        where=f"row 0 of {vqa_rad.QUESTIONS}",
        split="train",
        id="7",
        question="Is finding 7 to be seen?",
        options=("yes", "no"),
        answer="yes",
        image=rad / vqa_rad.IMAGE_FOLDER / "synpic1.jpg",
        modality="X-ray",
        kind="PRES",
    )
    assert (second.options, second.answer) == (("yes", "no"), "no")


@pytest.mark.parametrize(
    ("changes", "split", "modality"),
    [
        ({"phrase_type": "para"}, "train", "X-ray"),
        ({"phrase_type": "test_freeform"}, "test", "X-ray"),
        ({"phrase_type": "test_para", "image_organ": "ABD"}, "test", "CT"),
        ({"image_organ": "HEAD"}, "train", ""),
    ],
)
def test_vqa_rad_splits_and_modalities(rad, changes, split, modality):
    put(rad / vqa_rad.QUESTIONS, rad_row(1, **changes))
    (row,) = vqa_rad.read(rad / vqa_rad.QUESTIONS)
    assert (row.split, row.modality) == (split, modality)


def test_a_training_question_that_the_test_asks_is_left_out(rad):
    rows = [rad_row(1), rad_row(2), rad_row(3, phrase_type="test_para", question="is finding 1 to be seen?")]
    put(rad / vqa_rad.QUESTIONS, *rows)
    left, second, third = vqa_rad.read(rad)
    assert isinstance(left, Skipped)
    assert (left.id, left.chosen) == ("1", True)
    assert (second.id, third.id, third.split) == ("2", "3", "test")


def test_open_questions_get_answers_of_their_kind(rad):
    answers = ["Liver", "Spleen", "Left kidney", "Right  kidney", 4]
    rows = [rad_row(n, answer=answers[n % 5], answer_type="OPEN", question_type="ORGAN") for n in range(40)]
    rows += [rad_row(50 + n, answer=answer, question_type="PLANE") for n, answer in enumerate(["Axial", "Coronal"])]
    put(rad / vqa_rad.QUESTIONS, *rows)
    found = usable(vqa_rad.read(rad))
    organs = {"Liver", "Spleen", "Left kidney", "Right kidney", "4"}
    for row in found[:40]:
        assert len(row.options) == len(set(row.options)) == 4
        assert set(row.options) < organs
        assert row.answer in row.options
    assert [set(row.options) for row in found[40:]] == [{"Axial", "Coronal"}] * 2
    places = Counter(row.options.index(row.answer) for row in found[:40])
    assert set(places) == {0, 1, 2, 3}  # the right one is anywhere
    assert usable(vqa_rad.read(rad)) == found
    assert usable(vqa_rad.read(rad, seed=1)) != found
    assert {len(row.options) for row in usable(vqa_rad.read(rad, distractors=2))[:40]} == {3}


def test_open_questions_can_be_left_out(rad):
    put(rad / vqa_rad.QUESTIONS, rad_row(1), rad_row(2, answer="Liver"), rad_row(3, answer="Spleen"))
    rows = list(vqa_rad.read(rad, open="skip"))
    assert [row.id for row in usable(rows)] == ["1"]
    assert all(row.chosen and "--open skip" in row.reason for row in rows[1:])


@pytest.mark.parametrize(("open", "tasks"), [("keep", "choice open open"), ("all", "open open open")])
def test_open_questions_can_be_kept(rad, open, tasks):
    answers = ["Yes", "Left  lung ", "All of the above", "Spleen"]
    put(rad / vqa_rad.QUESTIONS, *(rad_row(n, answer=answer) for n, answer in enumerate(answers)))
    rows = list(vqa_rad.read(rad, open=open))
    assert [row.task for row in usable(rows)] == tasks.split()
    assert [row.answer for row in usable(rows)] == ["yes", "Left lung", "Spleen"]
    assert [row.options for row in usable(rows)[1:]] == [(), ()]
    assert "refers to options" in rows[2].reason
    assert not rows[2].chosen


def test_distractors_are_drawn_as_often_as_they_are_right():
    """20,000 draws: 3 : 1 as in the pool, not 1 : 1 as its texts (10 standard deviations apart)."""
    pool = AnswerPool(seed=0, distractors=1)
    for answer in ("CT", "CT", "CT", "MRI", "Ultrasound"):
        pool.add("modality", answer)
    drawn = Counter(
        text for n in range(20_000) for text in pool.options(f"q{n}", "modality", "Ultrasound") if text != "Ultrasound"
    )
    assert drawn["CT"] / 20_000 == pytest.approx(0.75, abs=0.015)


def test_an_answer_that_speaks_of_options_has_none_to_speak_of():
    pool = AnswerPool(seed=0, distractors=9)
    for text in ("left", "right", "both", "All of the above", "A and C"):
        pool.add("side", text)
    # both sides may be shown in a picture; drawn as it is, its frequency gives nothing away
    assert sorted(pool.options("q1", "side", "both")) == ["both", "left", "right"]
    for text in ("All of the above", "A and C"):
        with pytest.raises(BadRowError, match="refers to options"):
            pool.options("q1", "side", text)


def test_answers_that_are_letters_are_written_so_that_they_are_read_as_texts(rad, tmp_path):
    put(rad / vqa_rad.QUESTIONS, *(rad_row(n, answer=text, question_type="PANEL") for n, text in enumerate("BACB")))
    source = vqa_rad.read(rad, without_images=True)
    layout = write_prepared_data(source, tmp_path / "out", reader=vqa_rad.READER, source=rad, options={})
    rows = [row for name in layout.splits for row in read_examples(tmp_path / "out" / f"{name}.jsonl").examples]
    assert [row.options[row.answer] for row in rows] == ["B", "A", "C", "B"]


def test_an_answer_that_contains_the_right_one_is_no_distractor():
    pool = AnswerPool(seed=0, distractors=9)
    for answer in ("lung", "Left lung", "LUNG", "heart", "yes", "no", ""):
        pool.add("organ", answer)
    assert set(pool.options("q", "organ", "Lung")) == {"Lung", "heart"}
    assert pool.options("q", "organ", "yes") == ("yes", "no")
    for kind, answer, reason in (("organ", "", "no answer"), ("plane", "axial", "nothing to choose")):
        with pytest.raises(BadRowError, match=reason):
            pool.options("q", kind, answer)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes", "yes"),
        (" NO. ", "no"),
        ("yes,  left", "yes, left"),
        ("Left\tlung ", "Left lung"),
        ("Nodule.", "Nodule."),
    ],
)
def test_answers_are_tidied(text, expected):
    assert plain_answer(text) == expected


def test_slake_field_by_field(slake_folder):
    put(slake_folder / "train.json", slake_row(1), slake_row(2, answer="Spleen"))
    put(slake_folder / "validate.json", slake_row(3, answer="Yes", modality="X-Ray", content_type="KG"))
    put(slake_folder / "test.json", slake_row(4, answer="No", modality="CT"))
    first, _, third, fourth = slake.read(slake_folder)
    assert (first.where, first.split, first.id) == ("row 0 of train.json", "train", "1")
    assert (first.question, first.answer, set(first.options)) == (
        "Which organ is number 1?",
        "Liver",
        {"Liver", "Spleen"},
    )
    assert (first.image, first.modality, first.kind) == (
        slake_folder / "imgs" / "xmlab1" / "source.jpg",
        "MRI",
        "Organ",
    )
    assert (third.split, third.modality, third.kind, third.options) == ("validate", "X-ray", "KG", ("yes", "no"))
    assert (fourth.split, fourth.modality, fourth.answer) == ("test", "CT", "no")


def test_slake_languages(slake_folder):
    rows = [slake_row(1, answer="Yes"), slake_row(2, q_lang="zh", answer="肝"), slake_row(3, q_lang="zh", answer="脾")]
    put(slake_folder / "train.json", *rows)
    english = list(slake.read(slake_folder))
    assert [row.id for row in usable(english)] == ["1"]
    assert all(row.chosen and "its language is zh" in row.reason for row in english[1:])
    assert [row.id for row in usable(slake.read(slake_folder, language="zh"))] == ["2", "3"]
    assert len(usable(slake.read(slake_folder, language="all"))) == 3
    put(slake_folder / "train.json", slake_row(1, answer="Yes", q_lang=...))
    (bad,) = slake.read(slake_folder)
    assert (bad.chosen, bad.reason) == (False, "it has no q_lang")
    assert len(usable(slake.read(slake_folder, language="all"))) == 1


def test_slake_images_in_the_archive(slake_folder):
    put(slake_folder / "train.json", slake_row(1, answer="Yes"))
    picture = slake_folder / "imgs" / "xmlab1" / "source.jpg"
    with zipfile.ZipFile(slake_folder / "imgs.zip", "w") as archive:
        archive.write(picture, "imgs/xmlab1/source.jpg")
        archive.write(picture, "imgs/xmlab2/source.jpg")
    content = picture.read_bytes()
    picture.unlink()
    picture.parent.rmdir()
    (slake_folder / "imgs").rmdir()
    (row,) = slake.read(slake_folder)
    assert isinstance(row.image, Encoded)
    assert row.image.load() == content


def detected(folder: Path, number: int, content: object) -> None:
    place = folder / "imgs" / f"xmlab{number}"
    place.mkdir(exist_ok=True)
    marked(number).save(place / "source.jpg")
    (place / slake.DETECTION).write_text(content if isinstance(content, str) else json.dumps(content))


def test_slake_boxes_become_corners_in_files_of_their_own(slake_folder):
    detected(slake_folder, 1, [{"Liver": [4, 6, 10.5, 20]}, {"Left  Lung": [0, 0, 5, 5]}, {"liver": [20, 2, 3, 4]}])
    detected(slake_folder, 2, {"Brain Edema": [[1, 2, 3, 4], [5, 6, 7, 8]]})
    others = [slake_row(2), slake_row(3, img_name="xmlab2/source.jpg", q_lang="zh")]
    put(slake_folder / "train.json", slake_row(1), *others)
    put(slake_folder / "test.json", slake_row(4, modality="CT"))
    rows = usable(slake.read(slake_folder, boxes=True))
    assert not [row for row in usable(slake.read(slake_folder)) if row.task == "grounding"]
    found = {row.id: row for row in rows if row.task == "grounding"}
    assert {key: (row.split, row.answer, row.modality) for key, row in found.items()} == {
        # the test asks about the image, too
        "xmlab1-liver": ("test_boxes", [[4, 6, 14.5, 26], [20, 2, 23, 6]], "CT"),
        "xmlab1-left lung": ("test_boxes", [[0, 0, 5, 5]], "CT"),
        "xmlab2-brain edema": ("train_boxes", [[1, 2, 4, 6], [5, 6, 12, 14]], "MRI"),
    }
    row = found["xmlab2-brain edema"]
    assert (row.question, row.options) == ("Where in the image is the brain edema?", ())
    assert row.image == slake_folder / "imgs" / "xmlab2" / "source.jpg"


def test_slake_boxes_in_the_archive(slake_folder):
    detected(slake_folder, 1, [{"Liver": [1, 1, 2, 2]}])
    put(slake_folder / "train.json", slake_row(1, answer="Yes"))
    with zipfile.ZipFile(slake_folder / "imgs.zip", "w") as archive:
        for path in (slake_folder / "imgs" / "xmlab1").iterdir():
            archive.write(path, f"imgs/xmlab1/{path.name}")
            path.unlink()
    (slake_folder / "imgs" / "xmlab1").rmdir()
    (slake_folder / "imgs").rmdir()
    _, row = slake.read(slake_folder, boxes=True)
    assert (row.answer, row.id) == ([[1, 1, 3, 3]], "xmlab1-liver")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([{"Liver": [1, 2, 0, 4]}], "[1, 2, 0, 4] has no area"),
        ([{"Liver": [1, 2, 3]}], "[1, 2, 3] is not four numbers"),
        ([{"Liver": [1, 2, "3", 4]}], "'3', 4] is not four numbers"),
        ([{"Liver": [-9, 2, 3, 4]}], "[-9, 2, 3, 4] leaves its image"),
        ([{"Liver": None}], "None is not four numbers"),
        ('{"Liver": [1, 2, NaN, 4]}', "nan, 4] is not four numbers"),
        ('{"Liver": [1, 2, 3, 4], "Liver": [5, 6, 7, 8]}', "Liver"),
        ("[7]", "not a JSON object but 7"),
        ("[{", "cannot be read"),
    ],
)
def test_bad_boxes_are_skipped(slake_folder, content, reason):
    detected(slake_folder, 1, content)
    put(slake_folder / "train.json", slake_row(1, answer="Yes"))
    _, bad = slake.read(slake_folder, boxes=True)
    assert reason in bad.reason
    assert bad.where == "detection.json of xmlab1"
    (slake_folder / "imgs" / "xmlab1" / slake.DETECTION).unlink()
    _, missing = slake.read(slake_folder, boxes=True)
    assert "detection.json' does not exist" in missing.reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"answer": ...}, "it has no answer"),
        ({"answer": ["yes"]}, "answer is ['yes'], not a text"),
        ({"question": " "}, "it has no question"),
        ({"image_name": ...}, "it has no image_name"),
        ({"image_name": "../x.jpg"}, "leaves the folder"),
        ({"image_name": "none.jpg"}, "does not exist"),
        ({"image_name": "broken.jpg"}, "is truncated or damaged"),
        ({"question": "a\0b"}, "NUL"),
        ({"image_name": "half \ud800.jpg"}, "not a path"),
        ({"image_name": "x" * 300}, "does not exist"),
        ({"answer": "Liver", "question_type": "half \ud800"}, "nothing to choose"),
        ({"answer": "Liver"}, "nothing to choose"),
    ],
)
def test_a_bad_row_is_skipped(rad, tmp_path, changes, reason):
    images = rad / vqa_rad.IMAGE_FOLDER
    (images / "broken.jpg").write_bytes((images / "synpic1.jpg").read_bytes()[:200])
    put(rad / vqa_rad.QUESTIONS, rad_row(1), rad_row(2, **changes), None)
    layout = write_prepared_data(vqa_rad.read(rad), tmp_path / "out", reader=vqa_rad.READER, source=rad, options={})
    first, second = layout.skipped
    assert first.where == f"row 1 of {vqa_rad.QUESTIONS}"
    assert reason in first.reason
    assert "not a JSON object" in second.reason
    assert layout.splits["train"].rows == 1


def test_sources_that_are_something_else(rad, slake_folder, tmp_path):
    with pytest.raises(ValueError, match=r"Public\.json .*No such file"):
        list(vqa_rad.read(rad))
    with pytest.raises(ValueError, match=r"holds none of train\.json"):
        list(slake.read(slake_folder))
    put(rad / vqa_rad.QUESTIONS, rad_row(1))
    for options, message in (
        ({"distractors": 0}, "1 to 9"),
        ({"distractors": 10}, "1 to 9"),
        ({"seed": -1}, "negative"),
    ):
        with pytest.raises(ValueError, match=message):
            list(vqa_rad.read(rad, **options))
