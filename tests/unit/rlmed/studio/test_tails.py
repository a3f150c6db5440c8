import pytest

from rlmed.studio.tails import PIECE, last_line, lines_backwards


@pytest.mark.parametrize(
    ("content", "expected"),
    [("", None), ('{"a": 1}', None), ('{"a": 1}\n{"a": 2}\n{"a"', {"a": 2}), ('{"a": 1}\nnot JSON\n', {"a": 1})],
)
def test_the_last_line_is_the_last_whole_one(tmp_path, content, expected):
    path = tmp_path / "lines"
    path.write_text(content)
    assert last_line(path) == expected
    assert last_line(tmp_path / "none") is None


@pytest.mark.parametrize("unfinished", ["", '{"a"', "x" * 2 * PIECE])
def test_lines_longer_than_a_piece_are_read_whole(tmp_path, unfinished):
    path = tmp_path / "lines"
    written = [{"step": step, "text": "x" * size} for step, size in enumerate((5, PIECE, 3, 2 * PIECE - 24, 0))]
    path.write_text("".join(f'{{"step": {one["step"]}, "text": "{one["text"]}"}}\n' for one in written) + unfinished)
    assert list(lines_backwards(path)) == written[::-1]
