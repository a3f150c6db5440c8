"""OmniMedVQA in small files of its layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlmed.data.prepare.prepared_data import write_prepared_data
from rlmed.data.readers.base import Skipped, SourceRow
from rlmed.data.readers.published.omnimedvqa import READER, read
from tests.unit.rlmed.data.pictures import marked


def question_row(number: int, **changes) -> dict:
    row = {
        "dataset": "ACRIMA",
        "question_id": f"ACRIMA_{number:04d}",
        "question_type": "Disease Diagnosis",
        "question": "What does this show?",
        "gt_answer": "Glaucoma",
        "image_path": f"Images/ACRIMA/{number}.png",
        "option_A": "Cataract",
        "option_B": "Glaucoma",
        "option_C": "Normal",
        "option_D": "Myopia",
        "modality_type": "Fundus Photography",
    }
    return {key: value for key, value in {**row, **changes}.items() if value is not ...}


@pytest.fixture
def folder(tmp_path) -> Path:
    root = tmp_path / "OmniMedVQA"
    (root / "Images" / "ACRIMA").mkdir(parents=True)
    for access in ("Open-access", "Restricted-access"):
        (root / "QA_information" / access).mkdir(parents=True)
    for number in range(4):
        marked(number).save(root / "Images" / "ACRIMA" / f"{number}.png")
    return root


def put(folder: Path, *rows: object, access: str = "Open-access", name: str = "ACRIMA.json") -> None:
    (folder / "QA_information" / access / name).write_text(json.dumps(rows))


def test_a_row_field_by_field(folder):
    put(folder, question_row(1))
    for source in (folder, folder.parent):  # the folder of the archive, or the one that it lies in
        assert list(read(source)) == [
            SourceRow(
                where="row 0 of ACRIMA.json",
                split="fundus_photography",
                id="ACRIMA_0001",
                question="What does this show?",
                options=("Cataract", "Glaucoma", "Normal", "Myopia"),
                answer="Glaucoma",
                image=folder / "Images" / "ACRIMA" / "1.png",
                modality="Fundus Photography",
                kind="Disease Diagnosis",
            )
        ]


@pytest.mark.parametrize(
    ("changes", "split", "modality"),
    [
        ({"modality_type": "MR (Mag-netic Resonance Imaging)"}, "mri", "MRI"),
        ({"modality_type": "CT(Computed Tomography)"}, "ct", "CT"),
        ({"modality_type": "X-Ray"}, "xray", "X-ray"),
        ({"modality_type": "OCT (Optical Coherence Tomography"}, "oct", "OCT"),
        ({"modality_type": ..., "modality": "CT(Computed Tomography)"}, "ct", "CT"),
    ],
)
def test_modalities_go_by_one_name(folder, changes, split, modality):
    put(folder, question_row(1, **changes))
    (row,) = read(folder)
    assert (row.split, row.modality) == (split, modality)


def test_two_options(folder):
    put(folder, question_row(1, option_C=None, option_D=...))
    assert next(read(folder)).options == ("Cataract", "Glaucoma")


def test_only_some_modalities_and_restricted_questions(folder):
    put(folder, question_row(1, modality_type="X-Ray"), question_row(2))
    put(folder, question_row(3, modality_type="CT(Computed Tomography)"), access="Restricted-access")
    rows = list(read(folder, access="all", modality=["ct", "X-ray"]))
    assert [row.id for row in rows if isinstance(row, SourceRow)] == ["ACRIMA_0001", "ACRIMA_0003"]
    (left,) = (row for row in rows if isinstance(row, Skipped))
    assert left.chosen
    assert "modality is Fundus Photography, which" in left.reason


def test_questions_about_one_image_are_held_out_together(folder):
    rows = [
        question_row(n, image_path=f"Images/ACRIMA/{n % 200}.png", modality_type="X-Ray", question_id=f"q{n}")
        for n in range(800)
    ]
    put(folder, *rows)
    found = list(read(folder, test_share=0.25, without_images=True))
    sides: dict[int, set[str]] = {}
    for row in found:
        sides.setdefault(int(row.id[1:]) % 200, set()).add(row.split)
    assert all(len(side) == 1 for side in sides.values())
    share = sum(row.split == "test_xray" for row in found) / 800
    assert 0.15 < share < 0.35
    assert {row.split for row in found} == {"test_xray", "train_xray"}
    again = list(read(folder, test_share=0.25, without_images=True))
    other = list(read(folder, test_share=0.25, seed=1, without_images=True))
    assert again == found != other


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"image_path": ...}, "it has no image_path"),
        ({"modality_type": ...}, "it has no modality_type"),
        ({"image_path": "Images/../../outside.png"}, "leaves the folder"),
        ({"image_path": "Images/ACRIMA/99.png"}, "does not exist"),
        ({"option_A": ["x"]}, "its option_A is ['x'], not a text"),
        ({"gt_answer": "Tumor"}, "'Tumor' is not among its options"),
        ({"gt_answer": ...}, "it has no answer"),
        ({"question": "a\0b"}, "NUL"),
        ({"image_path": "half \ud800.png"}, "not a path"),
        ({"image_path": "x" * 300}, "does not exist"),
        ({"option_B": ..., "option_C": ..., "option_D": ..., "gt_answer": "Cataract"}, "it has 1 option"),
    ],
)
def test_a_bad_row_is_skipped(folder, tmp_path, changes, reason):
    marked().save(tmp_path / "outside.png")
    put(folder, question_row(1), question_row(2, **changes), 7)
    layout = write_prepared_data(read(folder), tmp_path / "out", reader=READER, source=folder, options={})
    first, second = layout.skipped
    assert (first.where, first.id) == ("row 1 of ACRIMA.json", "ACRIMA_0002")
    assert reason in first.reason
    assert "not a JSON object but 7" in second.reason


def test_sources_that_are_something_else(folder, tmp_path):
    with pytest.raises(ValueError, match="holds no folder QA_information"):
        list(read(tmp_path / "elsewhere"))
    with pytest.raises(ValueError, match=r"QA_information .*no JSON files of Open-access"):
        list(read(folder))
    put(folder, question_row(1))
    for share in (1.0, -0.1):
        with pytest.raises(ValueError, match="--test-share"):
            list(read(folder, test_share=share))
