"""A judge's mark is read from whatever it writes around it, or not at all."""

from __future__ import annotations

import pytest

from rewards.verdict import read_mark


@pytest.mark.parametrize(
    ("reply", "mark"),
    [
        ('{"score": 7}', 7),
        ('{"score": 0}', 0),
        ('{"score": 7.5, "reason": "misses 2 of 3 findings"}', 7.5),
        ('Here it is:\n```json\n{"reason": "fine {so far}", "Score": "7"}\n```', 7),
        ('{"verdict": "correct"}', 10),
        ('{"correct": false}', 0),
        ('{"score": "7/10"}', 7),
        ('{"marks": {"score": 4}}', 4),
        ('{"score": 3}\nNo, better:\n{"score": 6}', 6),
        ("Score: 8", 8),
        ("**Score:** 8/10", 8),
        ("The score is 8 out of 10.", 8),
        ("I first thought of score 2. Final score: 9", 9),
        ("Rating = [5]", 5),
        (r"\boxed{6}", 6),
        ("[[6]] since 2 of 3 findings are named", 6),
        ("7", 7),
        ("7.", 7),
        ("7/10", 7),
        (" 10 \n", 10),
        ("The answer deserves a 4, I think.", 4),
        ("<think>between 3 and 8</think>5", 5),
        ("Correct.", 10),
        ("Incorrect", 0),
        ("This is not correct.", 0),
        ("Yes", 10),
        ("No, that is wrong.", 0),
        ('{"score": 7', 7),  # cut off
        ("{'score': 7}", 7),  # Python's quotes
        ("评分:score:6分", 6),
        ('{"score": 8, "parts": {"answer": 2}}', 8),
        ('{"score": 8, "parts": {"answer": 2}', 8),  # cut off
        ('{"mark": {"score": 8, "parts": {"score": 2}}}', 8),
        ("Final score: 9. A score of 10 would name the side.", 9),
        ("Score: 7. Again, the score is 7/10.", 7),
        ("Score (0-10): 7", 7),
        ("A score of 8 out of 10.", 8),
        ("The answer is correct.", 10),
        ("**Verdict:** it isn't correct", 0),
    ],
)
def test_a_mark_is_found(reply: str, mark: float) -> None:
    assert read_mark(reply, 0, 10) == mark


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "good",
        "I cannot judge this.",
        '{"score": 11}',
        '{"score": -1}',
        '{"score": null}',
        '{"score": NaN}',
        '{"score": Infinity}',
        '{"score": [7]}',
        '{"score": "between 3 and 4"}',
        "Score: 70",
        "Score: -3",
        "4/5",
        "80%",
        "Score: 80%",
        "3 or 4",
        "It is correct, and it is wrong.",
        "Yes, that is wrong.",
        "The answer is not the correct one.",
        "not entirely correct.",
        "It is partially correct.",
        "Not a correct answer",
        "The answer says left lung, the truth says right lung.",
        "Right",
        "The answer is yes.",
        "It is not yet clear whether the answer is correct.",
        '{"verdict": "not entirely correct"}',
        "The score is 3. For a score of 10 it would have to name the side.",
        "It gets 3. For a score of 10 it would have to name the side.",
        r"Score: 3, or rather \boxed{8}",
        "Score: 7-8",
        '{"left": {"score": 3}, "right": {"score": 8}}',
        "<think>7</think>",
        "<think>There is no lesion, so 7",  # cut off
        "{" * 5000,
        '{"a":' * 5000,
        "score " * 5000,
    ],
)
def test_what_is_no_clear_mark_is_none(reply: str) -> None:
    assert read_mark(reply, 0, 10) is None


def test_the_scale_decides_what_a_number_means() -> None:
    assert read_mark("0.7", 0, 1) == 0.7
    assert read_mark("7", 0, 1) is None
    assert read_mark("-1", -1, 1) == -1
    assert read_mark("Score: 4/5", 1, 5) == 4
    assert read_mark("no", 1, 5) == 1
