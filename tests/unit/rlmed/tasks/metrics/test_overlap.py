from __future__ import annotations

import itertools
import random
import subprocess
import sys
from typing import Any

import pytest
from sacrebleu.metrics.bleu import BLEU

from rlmed.tasks.metrics import overlap
from rlmed.tasks.metrics.overlap import bleu, bleu_counts, bleu_of, corpus_bleu, rouge_l

REPORT = "no acute fracture is seen in the left lower lobe, Small effusion ; heart size normal. 2.5 cm"
WORDS = REPORT.split()


def rouge_scorer(names: list[str]) -> Any:
    """Return rouge-score's own, with its log handler off the tests' streams."""
    rouge_l("a", ["a"])
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(names)


def texts(count: int, seed: int) -> list[str]:
    source = random.Random(seed)
    return [" ".join(source.choices(WORDS, k=source.randint(1, 25))) for _ in range(count)]


@pytest.fixture(name="rows")
def reports() -> list[tuple[str, list[str]]]:
    """An answer with one to three references, each made of parts of the answer and other words."""
    source = random.Random(7)
    rows = []
    for answer, *others in zip(*(texts(60, seed) for seed in range(4)), strict=True):
        parts = answer.split()
        references = [" ".join(parts[len(parts) // 3 :] + other.split()[:6]) for other in others]
        rows.append((answer, references[: source.randint(1, 3)]))
    return rows


def test_bleu_equals_sacrebleu(rows: list[tuple[str, list[str]]]) -> None:
    expected = [BLEU(effective_order=True).sentence_score(answer, references).score for answer, references in rows]
    assert [bleu(answer, references) for answer, references in rows] == [score / 100 for score in expected]
    assert len({*expected}) > 40


def test_corpus_bleu_equals_sacrebleu(rows: list[tuple[str, list[str]]]) -> None:
    answers = [answer for answer, _ in rows]
    for count in (1, 2):
        streams = [[references[place % len(references)] for _, references in rows] for place in range(count)]
        expected = BLEU().corpus_score(answers, streams).score / 100
        assert corpus_bleu(answers, list(zip(*streams, strict=True))) == expected
        assert 0.1 < expected < 0.9


def test_rows_of_a_corpus_may_have_other_numbers_of_references(rows: list[tuple[str, list[str]]]) -> None:
    answers, references = [answer for answer, _ in rows], [references for _, references in rows]
    assert {len(texts) for texts in references} == {1, 2, 3}
    repeated = [(texts * 3)[:3] if len(texts) != 2 else [*texts, texts[0]] for texts in references]
    # a reference given twice changes no count
    assert corpus_bleu(answers, references) == corpus_bleu(answers, repeated)


def test_sums_of_rows_counted_once_equal_sacrebleu_on_these_rows(rows: list[tuple[str, list[str]]]) -> None:
    rows = [*rows, ("", ["no fracture"]), ("heart", ["no acute fracture"])]
    counts = bleu_counts([answer for answer, _ in rows], [references for _, references in rows])
    source = random.Random(3)
    # few rows: some have no sequence of four words in common, which is smoothed
    draws = [[source.randrange(len(rows)) for _ in range(count)] for count in (1, 1, 2, 2, 3, 62, 62)] + [[60], [61]]
    for drawn in draws:
        answers, references = zip(*(rows[i] for i in drawn), strict=True)
        streams = [list(stream) for stream in itertools.zip_longest(*references)]
        assert bleu_of(counts[drawn].sum(axis=0)) == BLEU().corpus_score(list(answers), streams).score / 100


def test_rouge_is_the_best_f1_of_rouge_score(rows: list[tuple[str, list[str]]]) -> None:
    scorer = rouge_scorer(["rougeL"])
    best_first = 0
    for answer, references in rows:
        expected = [scorer.score(reference, answer)["rougeL"].fmeasure for reference in references]
        assert rouge_l(answer, references) == max(expected)
        best_first += expected[0] == max(expected)
    assert 0 < best_first < len(rows)


def test_rouge_by_hand() -> None:
    # longest common subsequence 2 of 3 and 4 words: 2 · 2 / (3 + 4)
    assert rouge_l("acute left fracture", "acute fracture is seen") == pytest.approx(4 / 7, abs=1e-15)
    assert rouge_l("fractures", "fracture") == 0.0  # no stemming


@pytest.mark.parametrize("score", [bleu, rouge_l], ids=["bleu", "rouge"])
def test_ends_of_the_scale(score) -> None:
    assert score("no acute fracture is seen", ["effusion", "no acute fracture is seen"]) == pytest.approx(1, abs=1e-12)
    assert score("heart", ["no acute fracture"]) == 0.0
    assert score("", ["no acute fracture"]) == 0.0
    assert score("no fracture", "no fracture") == score("no fracture", ["no fracture"])
    with pytest.raises(ValueError, match="references="):
        score("no", [])


def test_chinese_counts_by_character() -> None:
    # 5 characters of 6 and 5, in order
    assert rouge_l("左肺下叶结节", ["左肺下叶结"]) == pytest.approx(10 / 11, abs=1e-15)
    assert bleu("左肺下叶结节", ["左肺下叶结节"]) == pytest.approx(1, abs=1e-12)
    expected = BLEU(tokenize="zh", effective_order=True).sentence_score("左肺下叶结节灶", ["左肺下叶有结节"]).score
    assert bleu("左肺下叶结节灶", ["左肺下叶有结节"]) == expected / 100 > 0.2


@pytest.mark.parametrize(("answers", "references"), [([], []), (["a"], []), (["a"], [["a"], ["b"]]), (["a"], [[]])])
def test_a_corpus_needs_references_for_each_answer(answers: list[str], references: list[list[str]]) -> None:
    with pytest.raises(ValueError, match=r"references"):
        corpus_bleu(answers, references)


@pytest.mark.parametrize(("score", "library"), [(bleu, "sacrebleu"), (rouge_l, "rouge_score")], ids=["bleu", "rouge"])
def test_a_missing_library_is_named(score, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    for cached in (overlap._bleu, overlap._rouge):
        cached.cache_clear()
    with pytest.raises(ValueError, match=rf"{library.replace('_', '-')}: pip install .*\[metrics\]"):
        score("no fracture", ["no fracture"])


def test_the_library_of_rouge_never_closes_a_stream_of_the_program() -> None:
    # a stream in the place of stderr while it is imported, as pytest's or a notebook's
    code = (
        "import io, logging, sys\n"
        "from rlmed.tasks.metrics.overlap import rouge_l\n"
        "stream, sys.stderr = io.StringIO(), sys.stderr\n"
        "shown, sys.stderr = sys.stderr, stream\n"
        "assert rouge_l('a cyst', ['a cyst']) == 1\n"
        "sys.stderr = shown\n"
        "logging.shutdown()\n"
        "assert not stream.closed\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
