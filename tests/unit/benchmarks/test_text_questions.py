"""Generated questions on words: no word in two files, and completions that say what is right."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from benchmarks.text_questions import FILES, KINDS, TERMS, write_questions
from rlmed.core.parsing import evaluated_letter, has_format, reasoning_text
from rlmed.data.examples import read_examples


def test_files_share_no_word_and_right_answers_are_right(tmp_path: Path) -> None:
    counts = write_questions(tmp_path, written_rows=12)
    files = {name: read_examples(tmp_path / f"{name}.jsonl", on_bad_row="error").examples for name in FILES}
    assert {name: len(rows) for name, rows in files.items()} == counts
    asked = Counter(row.id for rows in files.values() for row in rows)
    assert asked == Counter(word for words in TERMS.values() for word in words)
    assert max(asked.values()) == 1
    assert all(row.options == KINDS for rows in files.values() for row in rows)
    of_word = {word: kind.partition(" ")[2] for kind, words in TERMS.items() for word in words}
    assert all(row.options[row.answer] == of_word[row.id] for rows in files.values() for row in rows)
    # as many of each kind as can be
    assert sorted(Counter(row.answer for row in files["written"]).values()) == [2, 2, 2, 3, 3]
    for row in files["written"]:
        assert row.completion is not None
        assert has_format(row.completion)
        assert evaluated_letter(row.completion) == row.letter
        assert reasoning_text(row.completion) in (
            f"The {row.id} is {article} {of_word[row.id]}." for article in ("a", "an")
        )
    assert all(row.completion is None for name in ("train", "test") for row in files[name])


def test_some_rows_are_left_to_train_on(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^200 rows .*0 to 95"):
        write_questions(tmp_path, written_rows=200)
    assert write_questions(tmp_path, written_rows=95)["train"] > 0


def test_another_seed_gives_other_rows(tmp_path: Path) -> None:
    for seed in (0, 0, 1):
        write_questions(tmp_path / str(seed), written_rows=5, seed=seed)
    assert (tmp_path / "0/test.jsonl").read_bytes() != (tmp_path / "1/test.jsonl").read_bytes()
