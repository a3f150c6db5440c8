"""JSON arrays read object by object equal json.loads, whatever the size that is read at a time."""

from __future__ import annotations

import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlmed.data.readers.formats import json_rows
from rlmed.data.readers.formats.json_rows import read_json_rows

VALUES = [{"a": [1, {"b": '],}\\"'}], "text": "größer\u2028"}, 12345, "x", None, [], {}, -1.5e-7, True]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 2**20])
@pytest.mark.parametrize("indent", [None, 4])
def test_an_array_is_read_as_json_reads_it(tmp_path, monkeypatch, chunk, indent):
    monkeypatch.setattr(json_rows, "CHUNK", chunk)
    path = tmp_path / "rows.json"
    path.write_text("\ufeff \n" + json.dumps(VALUES, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
    assert list(read_json_rows(path)) == list(enumerate(VALUES))


@pytest.mark.parametrize("chunk", [1, 5, 2**20])
def test_json_lines(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(json_rows, "CHUNK", chunk)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(value) + "\n" for value in VALUES))
    assert [value for _, value in read_json_rows(path)] == VALUES


@pytest.mark.parametrize("text", ["[]", " [ ] "])
def test_an_empty_array(tmp_path, text):
    (tmp_path / "rows.json").write_text(text)
    assert list(read_json_rows(tmp_path / "rows.json")) == []


@pytest.mark.parametrize(
    ("content", "good", "message"),
    [
        (b'[{"a": 1}, {"b": 2}', 2, "element 2: .*the file ends"),
        (b'[{"a": 1}, {"b": ', 1, "element 1: not valid JSON"),
        (b'[{"a": 1} {"b": 2}]', 1, "element 1: .*instead of a comma"),
        (b"[{'a': 1}]", 0, "element 0: not valid JSON"),
        (b"version https://git-lfs.github.com/spec/v1", 0, "element 0: not valid JSON"),
        (b'[{"a": 1}] [{"b": 2}]', 1, "element 1: .*more .* end of .*array"),
        (b'[{"a": 1}]\n{"b": 2}', 1, "element 1: .*more .* end of .*array"),
        (b"[1]\n[2]\n[3]\n", 1, "element 1: .*more .* end of .*array"),
        (b'{"a": 1},\n{"b": 2}', 1, "element 1: not valid JSON"),
        (b'[{"a": 1},]', 1, "element 1: not valid JSON"),
        (b'[{"a": 1},,{"b": 2}]', 1, "element 1: not valid JSON"),
        (b"", 0, "is empty"),
        (b"  \n", 0, "is empty"),
        (b'["\xff"]', 0, "not UTF-8"),
        (b"[" + b"9" * 5000 + b"]", 0, "element 0: not valid JSON"),
        (b'[{"a":' * 100_000, 0, "element 0: not valid JSON"),
    ],
)
def test_a_damaged_file_says_where(tmp_path, content, good, message):
    (tmp_path / "rows.json").write_bytes(content)
    rows = read_json_rows(tmp_path / "rows.json")
    for _ in range(good):
        next(rows)
    with pytest.raises(ValueError, match=message):
        next(rows)


def test_an_object_without_an_end_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(json_rows, "MAX_OBJECT", 2**12)
    monkeypatch.setattr(json_rows, "CHUNK", 2**10)
    (tmp_path / "rows.json").write_text('["' + "x" * 2**16)
    with pytest.raises(ValueError, match="element 0: not valid JSON"):
        next(read_json_rows(tmp_path / "rows.json"))


def test_a_long_file_is_read_a_piece_at_a_time(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([{"question": f"{n}" + "x" * 300} for n in range(100_000)]))
    tracemalloc.start()
    assert sum(1 for _ in read_json_rows(tmp_path / "rows.json")) == 100_000
    assert tracemalloc.get_traced_memory()[1] < 8 * json_rows.CHUNK  # of 32
    tracemalloc.stop()


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"none\.json .*No such file"):
        next(read_json_rows(tmp_path / "none.json"))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from(VALUES), min_size=1, max_size=5),
    st.booleans(),
    st.integers(0, 200),
    st.sampled_from(["", ",", "]", "[", "{", '"', "1", "}"]),
)
def test_a_file_is_read_to_its_end_or_refused(tmp_path_factory, values, array, place, change):
    """One character lost or changed: whatever is read, the file holds nothing else."""
    text = json.dumps(values) if array else "".join(f"{json.dumps(value)}\n" for value in values)
    place %= len(text)
    text = text[:place] + change + text[place + 1 :]
    path = tmp_path_factory.mktemp("changed") / "a.json"
    path.write_text(text)
    try:
        found = [value for _, value in read_json_rows(path)]
    except ValueError:
        return
    again = json.dumps(found) if text.lstrip()[:1] == "[" else "".join(json.dumps(value) for value in found)
    assert "".join(again.split()) == "".join(_normal(text).split())


def _normal(text: str) -> str:
    """The text with its values as `json.dumps` writes them."""
    decoder, at, parts = json.JSONDecoder(), 0, []
    while at < len(text):
        if text[at] in " \n,[]":
            parts.append(text[at])
            at += 1
        else:
            value, at = decoder.raw_decode(text, at)
            parts.append(json.dumps(value))
    return "".join(parts)
