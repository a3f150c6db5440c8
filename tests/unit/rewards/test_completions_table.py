"""The two rewards of MedVLM-R1 on completions of every kind, with values worked out by hand.

Format: 1 when the whole completion matches `<think>.*?</think>\\s*<answer>.*?</answer>`, where the
dot matches newlines. Choice: the letters A to J in the upper-cased text of the first answer tags;
exactly one and right gives 1 alone and 0.5 beside anything else, all other cases give 0. The right
letter here is B.
"""

import numpy as np
import pytest

from rewards.choice import choice_reward
from rewards.format import format_reward
from rlmed.core.types import Completion, Example

EXAMPLE = Example(id="q1", image=None, question="Which?", options=("head", "chest", "abdomen", "knee"), answer=1)

TABLE = [
    # the form that is asked for
    ("<think>ribs</think><answer>B</answer>", 1, 1),
    ("<think>ribs</think>\n<answer>B</answer>", 1, 1),
    ("<think>ribs</think> \t\r\n\n <answer>B</answer>", 1, 1),
    ("<think>line\nline\n</think><answer>B</answer>", 1, 1),
    ("<think></think><answer>B</answer>", 1, 1),
    ("<think>" + "long " * 2000 + "</think><answer>B</answer>", 1, 1),
    ("<think>Überweisung, 肺, 🫁</think><answer>B</answer>", 1, 1),
    ("<think>a < b > c </ think></think><answer>B</answer>", 1, 1),
    # the letter, right and wrong
    ("<think>x</think><answer>A</answer>", 1, 0),
    ("<think>x</think><answer>b</answer>", 1, 1),  # upper-cased first
    ("<think>x</think><answer> B </answer>", 1, 1),  # white space is nothing else
    ("<think>x</think><answer>\nB\n</answer>", 1, 1),
    ("<think>x</think><answer>B)</answer>", 1, 0.5),
    ("<think>x</think><answer>(B)</answer>", 1, 0.5),
    ("<think>x</think><answer>B.</answer>", 1, 0.5),
    ("<think>x</think><answer>**B**</answer>", 1, 0.5),
    ("<think>x</think><answer>b)</answer>", 1, 0.5),
    ("<think>x</think><answer>A)</answer>", 1, 0),
    ("<think>x</think><answer>B K</answer>", 1, 0.5),  # K is none of A to J
    ("<think>x</think><answer>B) lungs</answer>", 1, 0),  # B and G
    ("<think>x</think><answer>B) knoll</answer>", 1, 0.5),
    ("<think>x</think><answer>B) chest</answer>", 1, 0),  # B, C, H and E
    ("<think>x</think><answer>option B</answer>", 1, 0),  # I and B
    ("<think>x</think><answer>BB</answer>", 1, 0),  # twice is not exactly one
    ("<think>x</think><answer>B or C</answer>", 1, 0),
    ("<think>x</think><answer>A, B</answer>", 1, 0),
    ("<think>x</think><answer>chest</answer>", 1, 0),
    ("<think>x</think><answer>2</answer>", 1, 0),
    ("<think>x</think><answer>K</answer>", 1, 0),
    ("<think>x</think><answer></answer>", 1, 0),
    ("<think>x</think><answer>   </answer>", 1, 0),
    ("<think>x</think><answer>Ｂ</answer>", 1, 0),  # full width, another character
    ("<think>x</think><answer>В</answer>", 1, 0),  # Cyrillic Ve
    ("<think>x</think><answer>B 肺</answer>", 1, 0.5),
    ("<think>x</think><answer>B\u200b</answer>", 1, 0.5),  # a zero-width space is no white space
    # something outside the tags, or tags missing
    ("<answer>B</answer>", 0, 1),
    ("<think>x<answer>B</answer>", 0, 1),
    ("x</think><answer>B</answer>", 0, 1),
    (" <think>x</think><answer>B</answer>", 0, 1),
    ("<think>x</think><answer>B</answer>\n", 0, 1),
    ("<think>x</think><answer>B</answer>.", 0, 1),
    ("Sure! <think>x</think><answer>B</answer>", 0, 1),
    ("<think>x</think> so <answer>B</answer>", 0, 1),
    ("<think>x</think><answer>B", 0, 0),
    ("<think>x</think><answer>B<answer>", 0, 0),
    ("<think>x</think>B</answer>", 0, 0),
    ("<think>x</think>B", 0, 0),
    ("<think>x</think>", 0, 0),
    ("<think>x", 0, 0),
    ("B", 0, 0),
    ("", 0, 0),
    ("\n", 0, 0),
    ("</answer>B<answer>", 0, 0),
    ("<answer>B</answer><think>x</think>", 0, 1),
    # tags written otherwise
    ("<THINK>x</THINK><ANSWER>B</ANSWER>", 0, 0),
    ("<think>x</think><Answer>B</Answer>", 0, 0),
    ("<think>x</think>< answer >B</ answer >", 0, 0),
    ("<think>x</think><answer >B</answer>", 0, 0),
    ("＜think＞x＜/think＞＜answer＞B＜/answer＞", 0, 0),
    # tags more than once: `.*?` takes tags too, and the first pair of answer tags counts
    ("<think>x</think><answer>B</answer><answer>C</answer>", 1, 1),
    ("<think>x</think><answer>C</answer><answer>B</answer>", 1, 0),
    ("<think>x</think><answer>B</answer> or <answer>B</answer>", 1, 1),
    ("<think>I say <answer>B</answer></think><answer>C</answer>", 1, 1),
    ("<think>I say <answer>C</answer></think><answer>B</answer>", 1, 0),
    ("<think>x</think><answer><answer>B</answer></answer>", 1, 0),  # "<ANSWER>B" holds A, E and B
    ("<think>x</think><answer><b>B</b></answer>", 1, 0),  # B three times
    ("<think><think>x</think></think><answer>B</answer>", 1, 1),
    ("<think>x</think><think>y</think><answer>B</answer>", 1, 1),
    ("<think>x</think><answer>B</answer><think>y</think><answer>C</answer>", 1, 1),
    ("<think>x</think><think>y</think>", 0, 0),
]


def completion(text: str) -> Completion:
    return Completion(np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.float32), text, "stop")


@pytest.mark.parametrize(("text", "form", "choice"), TABLE, ids=range(len(TABLE)))
def test_rewards_worked_by_hand(text, form, choice):
    assert (format_reward(EXAMPLE, completion(text)), choice_reward(EXAMPLE, completion(text))) == (form, choice), text


def test_the_table_is_no_repetition():
    assert len({text for text, _, _ in TABLE}) == len(TABLE) >= 40


@pytest.mark.parametrize("answer", range(10))
def test_every_letter_is_right_for_its_own_option_only(answer):
    example = Example(id="q", image=None, question="?", options=tuple(str(n) for n in range(10)), answer=answer)
    rewards = [choice_reward(example, completion(f"<answer>{letter}</answer>")) for letter in "ABCDEFGHIJ"]
    assert rewards == [float(index == answer) for index in range(10)]
