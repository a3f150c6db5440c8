"""The alignment corpus says what is true, binds it to its letter, mixes readers as documented."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from rlmed.core.types import LETTERS
from rlmed.data.examples import read_examples
from rlmed.data.phantom.anatomy import NO_LESION, REGIONS
from rlmed.data.phantom.corpus import (
    HASTY,
    completion,
    describe,
    read_by_someone,
    tokenizer_corpus,
    tokenizer_phrases,
    write_alignment,
)
from rlmed.data.phantom.studies import KINDS, MODALITIES, make_example, sample_study

FORMAT = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>", re.DOTALL)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("alignment")
    return write_alignment(folder, 5, lookup_rows=40, studies=30, reader_studies=20)


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", ["lookup", "careful", "readers"])
def test_every_row_is_a_usable_example_with_a_completion(corpus, name):
    result = read_examples(corpus[name], on_bad_row="error")
    assert len(result.examples) == len(rows_of(corpus[name]))
    assert all(example.completion for example in result.examples)
    assert {example.modality for example in result.examples} == set(MODALITIES)
    assert {example.kind for example in result.examples} == set(KINDS)
    assert all((example.image is None) == (name == "lookup") for example in result.examples)


@pytest.mark.parametrize("name", ["lookup", "careful"])
def test_careful_completions_name_the_right_option_and_its_letter(corpus, name):
    for row in rows_of(corpus[name]):
        letter = LETTERS[row["options"].index(row["answer"])]
        assert FORMAT.fullmatch(row["completion"])
        assert f" is {row['answer']} ({letter}).</think>\n<answer>{letter}</answer>" in row["completion"]


def test_questions_about_one_image_share_its_description(corpus):
    descriptions: dict[str, set[str]] = {}
    for row in rows_of(corpus["careful"]):
        descriptions.setdefault(row["image"], set()).add(row["completion"].split(" The ")[0])
    assert len(descriptions) == 30
    assert all(len(texts) == 1 for texts in descriptions.values())


def test_lookup_questions_hold_the_findings_that_the_completion_repeats(corpus):
    for row in rows_of(corpus["lookup"]):
        findings = row["completion"].removeprefix("<think>").split(" The ")[0]
        assert row["question"].startswith(f"Findings: {findings} ")


def test_the_same_seed_gives_the_same_files_and_another_seed_others(corpus, tmp_path):
    again = write_alignment(tmp_path / "a", 5, lookup_rows=40, studies=30, reader_studies=20)
    other = write_alignment(tmp_path / "b", 6, lookup_rows=40, studies=30, reader_studies=20)
    for name, path in corpus.items():
        assert path.read_bytes() == again[name].read_bytes()
        assert path.read_bytes() != other[name].read_bytes()
    image = "images/00007.png"
    assert (corpus["careful"].parent / image).read_bytes() == (tmp_path / "a" / image).read_bytes()


def test_readers_are_hasty_at_the_documented_rates_and_then_guess_blindly():
    rng = np.random.default_rng(0)
    hasty, right, letters, broken, count = Counter(), Counter(), Counter(), Counter(), 1200
    for kind in KINDS:
        for _ in range(count):
            study = sample_study(rng, "MRI", kind)
            example = make_example(study, kind, "x", None, rng, int(rng.integers(4)))
            text = read_by_someone(study, example, rng)
            broken[kind] += FORMAT.fullmatch(text) is None
            if describe(study) not in text:
                letter = re.search(r"\(([A-D])\)", text).group(1)
                hasty[kind] += 1
                letters[letter] += 1
                right[kind] += letter == example.letter
    for kind in KINDS:
        assert hasty[kind] / count == pytest.approx(HASTY[kind], abs=0.05)
    total = sum(hasty.values())
    assert sum(right.values()) / total == pytest.approx(0.25, abs=0.03)
    assert all(letters[letter] / total == pytest.approx(0.25, abs=0.03) for letter in "ABCD")
    assert broken["attribute"] / count == pytest.approx(0.65 * 0.5 + 0.35 * 0.03, abs=0.05)
    assert max(broken[kind] for kind in KINDS if kind != "attribute") / count < 0.1


def test_each_breach_breaks_the_format_and_keeps_the_letter():
    assert FORMAT.fullmatch(completion("x", "B"))
    for breach in range(4):
        text = completion("x", "B", breach)
        assert "B" in text
        assert FORMAT.fullmatch(text) is None


def test_the_tokenizer_is_shown_every_answer():
    phrases = tokenizer_phrases()
    assert {f" {region}" for region in REGIONS} < set(phrases)
    assert f" {NO_LESION}" in phrases
    assert "Your task:" in phrases[0]
    texts = "\n".join(tokenizer_corpus(0, rows=60))
    assert all(modality in texts for modality in MODALITIES)
    assert "<answer>C</answer>" in texts


def test_impossible_sizes_are_errors(tmp_path):
    with pytest.raises(ValueError, match="lookup_rows=0"):
        write_alignment(tmp_path, 0, lookup_rows=0, studies=8, reader_studies=8)
    with pytest.raises(ValueError, match="reader_studies=9"):
        write_alignment(tmp_path, 0, lookup_rows=4, studies=8, reader_studies=9)
