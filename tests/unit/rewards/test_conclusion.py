"""What a reasoning argues for, and whether that is what is answered: values worked by hand."""

import numpy as np
import pytest

from rewards.conclusion import argued_option
from rewards.reasoning_consistency import reasoning_consistency_reward
from rlmed.core.types import Completion, Example

ORGANS = ("liver", "left kidney", "kidney", "spleen")
LIVER, LEFT_KIDNEY, KIDNEY, SPLEEN = range(4)


@pytest.mark.parametrize(
    ("reasoning", "argued"),
    [
        # texts
        ("It is the liver.", LIVER),
        ("It is the LIVER", LIVER),
        ("Liver?\nNo: a spleen.", SPLEEN),
        ("the left kidney", LEFT_KIDNEY),  # the longest
        ("the left\n  kidney", LEFT_KIDNEY),
        ("the right kidney", KIDNEY),
        ("First the spleen comes to mind. Its edge shows the liver.", LIVER),  # the last
        ("slivers and kidneys", None),  # whole words only
        ("liver.", LIVER),
        ("the organ", None),
        ("", None),
        # letters
        ("B) fits", LEFT_KIDNEY),
        ("I choose (b)", LEFT_KIDNEY),
        ("Option d, clearly", SPLEEN),
        ("choice C", KIDNEY),
        ("the answer is A", LIVER),
        ("Answer: D", SPLEEN),
        ("**Answer:** D", SPLEEN),
        ("the answer is a mass", None),
        ("I see A mass", None),
        ("option E, (J)", None),  # there are four
        ("MRI (T2) shows B", None),
        # negations before
        ("not the liver", None),
        ("It is the spleen, not the liver", SPLEEN),
        ("not the liver but the kidney", KIDNEY),
        ("spleen rather than liver", SPLEEN),
        ("This rules out the spleen, so liver", LIVER),
        ("It isn't the spleen. Kidney.", KIDNEY),
        ("not option B (left kidney)", None),
        ("There is no doubt: liver", LIVER),
        ("Spleen is more likely than liver", SPLEEN),
        (
            "The spleen fits better than the liver. Other than the kidney, it is dark",
            LIVER,
        ),  # "better" is beyond the rule
        # negations after
        ("the liver is unlikely", None),
        ("kidney. The liver is clearly not shown", KIDNEY),
        ("liver can't be", None),
        ("D) spleen is wrong", None),  # letter and text are one mention
        ("spleen (D) doesn't fit", None),
        ("the liver is shown, not the spleen", LIVER),
        # negations of a list
        ("not the liver, kidney", KIDNEY),  # of two without "and" the second is what is set against the first
        ("Not the liver, the spleen.", SPLEEN),
        ("not the liver and kidney", None),
        ("rules out the liver, kidney and spleen", None),
        ("It rules out the liver, the kidney, and the spleen", None),
        ("not liver, kidney, spleen", None),
        ("the liver, kidney and spleen are unlikely", None),
        ("liver and spleen can't be", None),
        ("Unlike the liver and the kidney, the spleen is dark", SPLEEN),
        ("Spleen. The liver, the left kidney and A) are not shown", SPLEEN),
        ("rules out liver and kidney. So spleen", SPLEEN),
        ("not the liver, not the kidney, spleen", SPLEEN),
        ("the liver, the kidney and the spleen are shown", SPLEEN),
        # alternatives
        ("liver or spleen", None),
        ("the liver, the kidney, or the spleen: which?", None),
        ("neither liver nor kidney", None),
        ("liver or spleen? The liver!", LIVER),
        ("A) liver or D) spleen", None),
        ("liver or liver", LIVER),
        ("neither liver nor kidney, the spleen", SPLEEN),
        ("liver, or kidney, or spleen", None),
    ],
)
def test_the_last_affirmed_mention_is_what_is_argued_for(reasoning, argued):
    assert argued_option(reasoning, ORGANS) == argued


@pytest.mark.parametrize(
    ("reasoning", "options", "argued"),
    [
        ("a normal scan", ("normal", "abnormal"), 0),
        ("an abnormal scan", ("normal", "abnormal"), 1),
        ("a mass, (b)", ("a", "b"), 1),  # one-letter texts are words
        ("T1 (weighted)?", ("T1 (weighted)", "T1"), 0),
        ("not visible", ("visible", "not visible"), 1),
        ("Größe ist GROẞ", ("klein", "groß"), 1),
        ("肺 is seen", ("肝", "肺"), 1),
        ("İ", ("x y", "İ"), 1),
        ("C++ .*", ("C++", ".*"), 1),
        ("Not `y`: **C++**", ("C++", "y"), 0),
        ("Yes; no pneumothorax", ("Yes", "No"), 0),
        ("The answer is yes, no doubt", ("Yes", "No"), 0),
        ("No lesion is seen, so the answer is no.", ("Yes", "No"), 1),
        ("No", ("Yes", "No"), 1),
        ("No, the lung is clear", ("Yes", "No"), 1),
        ("Not in the liver. None", ("liver", "none"), 1),
    ],
)
def test_option_texts_of_every_kind(reasoning, options, argued):
    assert argued_option(reasoning, options) == argued


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<think>the liver</think><answer>A</answer>", 1),
        ("<think>the liver</think><answer>a) </answer>", 1),
        ("<think>the liver</think><answer>D</answer>", 0),
        ("<think>hm</think><answer>D</answer>", 0.5),
        ("<think> </think><answer>D</answer>", 0),
        ("<think>the liver</think><answer>A or D</answer>", 0),
        ("<think>the liver</think><answer></answer>", 0),
        ("the liver <answer>A</answer>", 0),
        ("", 0),
    ],
)
def test_agreement(text, reward):
    example = Example(id="q", image=None, question="?", options=ORGANS, answer=SPLEEN)
    completion = Completion(np.zeros(1, np.int64), np.zeros(1, np.float32), text, "stop")
    assert reasoning_consistency_reward(example, completion) == reward
