"""A source object with one key twice says two things: a bad row, counted; others are read."""

from __future__ import annotations

from typing import Any

import pytest

from rlmed.data.examples import read_examples
from rlmed.data.readers.base import Skipped, SourceRow
from rlmed.data.readers.formats import json_rows
from rlmed.data.readers.formats.json_rows import read_json_rows
from rlmed.data.readers.published import medvlm_r1, omnimedvqa, slake, vqa_rad
from rlmed.data.rows import BadRowError

R1 = '{"image": ["1.png"], "question": "q%s", "options": %s, "answer": "spleen", "subset": "MRI"}'
TWICE = '{"A": "liver", "B": "kidney", "B": "spleen"}'
SOUND = '{"A": "liver", "B": "spleen"}'
OMNI = (
    '{"question_id": "%s", "question": "q", "gt_answer": "spleen", "image_path": "1.png", "option_A": "liver", '
    '"option_B": "spleen", "modality_type": "CT"%s}'
)
VQA = '{"qid": %s, "image_name": "1.png", "question": "q", "answer": "yes"%s}'
SLAKE = '{"qid": %s, "img_name": "1.png", "question": "q", "answer": "yes", "q_lang": "en", "modality": "CT"%s}'


@pytest.mark.parametrize("chunk", [1, 5, 2**20])
@pytest.mark.parametrize("text", ['[{"a": 1}, %s, {"c": 3}]', '{"a": 1}\n%s\n{"c": 3}\n'])
@pytest.mark.parametrize("bad", ['{"b": 1, "b": 2}', '{"x": [{"y": {"b": 1, "b": 2}}]}', '{"b": 1, "x": "}", "b": 2}'])
def test_the_elements_around_it_are_read(tmp_path, monkeypatch, chunk, text, bad):
    monkeypatch.setattr(json_rows, "CHUNK", chunk)
    path = tmp_path / "rows.json"
    path.write_text(text % bad)
    (_, first), (number, error), (_, last) = read_json_rows(path)
    assert (first, number, last) == ({"a": 1}, 1, {"c": 3})
    assert isinstance(error, BadRowError)
    assert "the key 'b' twice, for 1 and 2" in str(error)


@pytest.mark.parametrize(
    ("reader", "name", "rows"),
    [
        (medvlm_r1, "test.json", [R1 % (0, TWICE), R1 % (1, SOUND)]),
        (medvlm_r1, "test.json", [R1 % (0, SOUND + ', "answer": "liver"'), R1 % (1, SOUND)]),
        (omnimedvqa, "QA_information/Open-access/x.json", [OMNI % (0, ', "option_B": "lung"'), OMNI % (1, "")]),
        (vqa_rad, "VQA_RAD Dataset Public.json", [VQA % (0, ', "answer": "no"'), VQA % (1, "")]),
        (slake, "train.json", [SLAKE % (0, ', "answer": "no"'), SLAKE % (1, "")]),
    ],
)
def test_every_reader_of_json_skips_it(tmp_path, reader: Any, name, rows):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"[{', '.join(rows)}]")
    bad, good = reader.read(tmp_path, without_images=True)
    assert isinstance(bad, Skipped)
    assert not bad.chosen
    assert "twice, for " in bad.reason
    assert isinstance(good, SourceRow)


def test_training_rows_of_the_paper(tmp_path):
    """There, rows of other data sets are counted, not listed; unreadable ones are none of these."""
    (tmp_path / "test.json").write_text(f"[{R1 % (0, SOUND)}]")
    (tmp_path / "train.json").write_text(f"[{R1 % (1, TWICE)}, {R1 % (2, SOUND)}]")
    test, bad, train = medvlm_r1.read(tmp_path / "test.json", train=tmp_path / "train.json", without_images=True)
    assert isinstance(test, SourceRow)
    assert isinstance(train, SourceRow)
    assert isinstance(bad, Skipped)
    assert "the key 'B' twice, for 'kidney' and 'spleen'" in bad.reason


def test_json_lines_of_a_run(tmp_path):
    path = tmp_path / "rows.jsonl"
    row = '{"image": null, "question": "q", "options": %s, "answer": "spleen"%s}\n'
    path.write_text(row % (TWICE, "") + row % (SOUND, ', "answer": "liver"') + row % (SOUND, ""))
    result = read_examples(path)
    assert len(result.examples) == 1
    assert [entry.line for entry in result.skipped] == [1, 2]
    assert "the key 'B' twice" in result.skipped[0].reason
    assert "the key 'answer' twice, for 'spleen' and 'liver'" in result.skipped[1].reason
