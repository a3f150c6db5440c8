import errno
import json
import os

import pytest

from rlmed.core.files.jsonlines import JsonLinesWriter, RecordError, finite, read_json_lines, whole_length


def test_lines_are_read_back_and_numbers_json_lacks_are_null(tmp_path):
    path = tmp_path / "new folder" / "a.jsonl"
    writer = JsonLinesWriter(path)
    writer.append(
        {"step": 1, "kl": float("nan"), "parts": {"x": [float("inf"), 1.5, -float("inf")]}, "text": "π\u2028\n"}
    )
    writer.append({"step": 2, "tuple": (1, "two")})
    assert list(read_json_lines(path)) == [
        {"step": 1, "kl": None, "parts": {"x": [None, 1.5, None]}, "text": "π\u2028\n"},
        {"step": 2, "tuple": [1, "two"]},
    ]
    assert path.read_bytes().count(b"\n") == 2, "a line break in a text must not end the line"


def test_a_line_is_on_disk_as_soon_as_append_returns(tmp_path):
    writer = JsonLinesWriter(tmp_path / "a.jsonl")
    writer.append({"step": 1})
    assert (tmp_path / "a.jsonl").read_text() == '{"step": 1}\n'
    assert writer.offset() == 12


def test_lone_surrogates_of_a_broken_decoder_do_not_stop_the_run(tmp_path):
    writer = JsonLinesWriter(tmp_path / "a.jsonl")
    writer.append({"text": "a\ud800b"})
    assert json.loads((tmp_path / "a.jsonl").read_bytes()) == {"text": "a?b"}


def test_the_half_line_of_a_killed_run_vanishes(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "rew')
    assert whole_length(path) == 12
    assert list(read_json_lines(path)) == [{"step": 1}]
    JsonLinesWriter(path).append({"step": 2})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_whole_length_finds_a_line_end_far_back(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"{}\n" + b"x" * 200_000)
    assert whole_length(path) == 3
    path.write_bytes(b"x" * 200_000)
    assert whole_length(path) == 0


def test_truncate_cuts_back_and_appending_goes_on_from_there(tmp_path):
    path = tmp_path / "a.jsonl"
    writer = JsonLinesWriter(path)
    writer.append({"step": 1})
    offset = writer.offset()
    writer.append({"step": 2})
    writer.truncate(offset)
    writer.append({"step": "two again"})
    assert list(read_json_lines(path)) == [{"step": 1}, {"step": "two again"}]
    writer.truncate(0)
    assert path.read_bytes() == b""


def test_a_shorter_file_than_the_checkpoint_knew_is_an_error(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"step": 1}\n')
    with pytest.raises(RecordError, match=r"a\.jsonl .*\b12 bytes.*\b30\b"):
        JsonLinesWriter(path).truncate(30)
    assert path.read_text() == '{"step": 1}\n'
    with pytest.raises(RecordError, match="has 0 bytes, but 5"):
        JsonLinesWriter(tmp_path / "missing.jsonl").truncate(5)


def test_a_full_disk_names_the_file_and_leaves_no_half_line(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    writer = JsonLinesWriter(path)
    writer.append({"step": 1})
    write = os.write

    def nearly_full(descriptor, content):
        if len(content) < 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, bytes(content[:7]))

    monkeypatch.setattr(os, "write", nearly_full)
    with pytest.raises(
        RecordError, match=r"a\.jsonl cannot be written: the disk is full.*Free .*resume=auto"
    ) as caught:
        writer.append({"step": 2, "text": "long enough"})
    assert caught.value.errno == errno.ENOSPC
    assert path.read_text() == '{"step": 1}\n'
    monkeypatch.setattr(os, "write", write)
    writer.append({"step": 2})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_folder_that_cannot_be_written_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordError, match="cannot be written"):
        JsonLinesWriter(tmp_path / "file" / "a.jsonl").append({})


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"step": 1}\nnonsense\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2 is not JSON"):
        list(read_json_lines(path))
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1 is not .* object"):
        list(read_json_lines(path))


def test_missing_file_has_no_lines(tmp_path):
    assert list(read_json_lines(tmp_path / "none.jsonl")) == []


def test_finite_keeps_what_json_can_write():
    assert finite({"a": [True, None, "x", 3, 0.5], "b": float("inf")}) == {"a": [True, None, "x", 3, 0.5], "b": None}
