"""Judge answers as published evaluations do, where they differ from ours.

Each function gives the name, file and commit of its rule. They are for figures beside other papers'
figures, not for rewards: most can be satisfied by an answer that hedges.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from difflib import SequenceMatcher

from rlmed.core.parsing import answer_text
from rlmed.core.prefill import ANSWER, ANSWER_END
from rlmed.core.types import LETTERS
from rlmed.tasks.metrics.text import normalise

LONGEST = 2000
"""Characters that are compared with the options, which takes more than linear time."""
_BRACKETS = {")": re.compile(r"\([^)]*\)"), "）": re.compile("（[^）]*）")}
_WIDE = "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～、《》【】"
_SPACED = str.maketrans(dict.fromkeys(string.punctuation + _WIDE, " "))
_SLAKE_YES = {"yes", "yeah", "yep", "true", "是", "是的", "有", "包含", "可以", "能", "会", "正常"}
_SLAKE_NO = {"no", "nope", "false", "否", "不是", "没有", "无", "不包含", "不能", "不会", "不可以", "不正常", "异常"}
_MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))


def said(completion: str) -> str:
    """Return the answer in the first answer tags, or else what follows the reasoning, stripped.

    Example:
        >>> said("<think>dark</think><answer> liver </answer>"), said("<think>dark</think> The liver.")
        ('liver', 'The liver.')
    """
    answer = answer_text(completion)
    return completion.rpartition("</think>")[2].strip() if answer is None else answer


def all_answers(completion: str) -> str:
    """Return what stands in all answer tags, joined by spaces; the whole text without any.

    MedEvalKit's `extract` (blackkiring/MedEvalKit, utils/utils.py, commit f60b5be).

    Example:
        >>> all_answers("<answer>yes</answer> or <answer>no</answer>")
        'yes no'
    """
    found: list[str] = []
    rest = completion
    while True:
        _, opening, rest = rest.partition(ANSWER)
        answer, closing, rest = rest.partition(ANSWER_END)
        if not opening or not closing:
            return " ".join(found).strip() or completion
        found.append(answer)


def medevalkit_closed(completion: str, reference: str) -> bool:
    """Return whether the answer holds "yes" or "no" anywhere, not both, and the right one.

    MedEvalKit's `judge_judgement` (as `all_answers`), for VQA-RAD's questions whose answer is yes
    or no, and SLAKE's if it is written in small letters ("Yes" must be the whole answer there).
    They are letters, not words: "normal" holds "no". Left out here and below: boxed answers, and
    phrases such as "the answer is", after which it reads.

    Example:
        >>> medevalkit_closed("<answer>Yes, there is.</answer>", "yes")
        True
    """
    answer = all_answers(completion).lower()
    return ("yes" in answer) != ("no" in answer) and reference.strip().lower() in answer


def medevalkit_open(completion: str, reference: str) -> bool:
    """Return whether the answer is the reference, but for capitals and white space around it.

    "em" of MedEvalKit's `judge_open_end_vqa` (as `all_answers`): no article, punctuation or number
    word is normalised.

    Example:
        >>> medevalkit_open("<answer>Liver</answer>", "liver"), medevalkit_open("the liver", "liver")
        (True, False)
    """
    return all_answers(completion).lower().strip() == reference.lower().strip()


def medevalkit_choice(completion: str, options: Sequence[str], letter: str) -> bool:
    """Return whether the answer is the right letter or text, or is most alike to the right option.

    MedEvalKit's `judge_multi_choice` (as `all_answers`): what stands before the first point and
    behind the last colon is a letter, an option's text, or else the whole answer is taken for the
    option that it is most alike to (Python's `SequenceMatcher`). So every answer is one.

    Example:
        >>> medevalkit_choice("<answer>B. lung</answer>", ("liver", "lung"), "B")
        True
    """
    lowered = [option.lower() for option in options]
    answer = all_answers(completion).strip().lower().replace("\n", "")
    first = answer.partition(".")[0].rpartition(":")[2]
    letters = [one.lower() for one in LETTERS[: len(options)]]
    if first in letters:
        return first == letter.lower()
    right = lowered[letters.index(letter.lower())]
    if first in lowered:
        return first == right
    alike = [SequenceMatcher(None, option, answer[:LONGEST]).ratio() for option in lowered]
    return alike.index(max(alike)) == letters.index(letter.lower())


def vlmevalkit_choice(answer: str, options: Sequence[str], letter: str) -> bool:
    """Return whether the right letter is the only one named, or the right option the only text.

    VLMEvalKit's `can_infer` without a judge, its `exact_matching` (open-compass/VLMEvalKit,
    vlmeval/utils/matching_util.py, commit 18fc37a). A letter counts as a word of its own, a text
    anywhere. Some versions also ask where the letter stands and how long the answer is.

    Example:
        >>> vlmevalkit_choice("(B)", ("liver", "lung"), "B"), vlmevalkit_choice("the lung", ("liver", "lung"), "B")
        (True, True)
    """
    letters = LETTERS[: len(options)]
    words = answer.translate(_MARKS).split()
    named = [one for one in letters if one in words]
    if len(named) == 1:
        return named[0] == letter
    if not named and "Z" in words:
        return False
    lowered = answer.lower()
    held = [one for one, option in zip(letters, options, strict=True) if option.lower() in lowered]
    return held == [letter]


def slake_exact(answer: str, reference: str) -> bool:
    """Return whether both are equal after lmms-eval's normalisation for SLAKE.

    EvolvingLMMs-Lab/lmms-eval, lmms_eval/tasks/slake/utils.py, commit 65ef07d: lower case, without
    brackets and what is in them, spaces for punctuation; "yeah", "true", 有 and others are yes,
    "nope", "false", 没有 and others no; x-ray is one word. Articles and number words stay.

    Example:
        >>> slake_exact("Yeah (clearly).", "yes"), slake_exact("the liver", "liver")
        (True, False)
    """
    return _slake(answer) == _slake(reference)


def _slake(text: str) -> str:
    text = text.strip().lower()
    for closing, pair in _BRACKETS.items():
        # up to the last closing one: beyond it, each opening one would be followed to the end
        before, last, after = text.rpartition(closing)
        text = pair.sub(" ", before + last) + after
    words = " ".join(text.translate(_SPACED).split())
    if words in _SLAKE_YES:
        return "yes"
    if words in _SLAKE_NO:
        return "no"
    return "xray" if words == "x ray" else words


def llava_med_closed(answer: str, reference: str) -> bool:
    """Return whether the right one of "yes" and "no" stands anywhere in the answer.

    LLaVA-Med's accuracy of closed questions (microsoft/LLaVA-Med, llava/eval/run_eval.py, commit
    ad758b6), with our normalisation. Its code leaves out an answer that holds only the wrong word;
    here it counts as wrong.

    Example:
        >>> llava_med_closed("Yes, a mass", "yes"), llava_med_closed("It is not clear", "no")
        (True, True)
    """
    return normalise(reference) in normalise(answer)


def llava_med_recall(answer: str, reference: str) -> float:
    """Return LLaVA-Med's recall of an open answer, from 0 to 1.

    s / (s + m): s counts the answer's words that the reference has, repetitions included; m the
    reference's words that the answer lacks (llava/eval/eval_metrics/evaluate_metrics.py, as
    `llava_med_closed`). Unlike `text.recall`, a repeated word raises it.

    Example:
        >>> llava_med_recall("lung lung lung", "left lung")
        0.75
    """
    given, right = Counter(normalise(answer).split()), Counter(normalise(reference).split())
    shared = sum(count for word, count in given.items() if word in right)
    missing = sum(count for word, count in right.items() if word not in given)
    return shared / (shared + missing) if shared else 0.0
