"""Prefill: the completion's beginning that the chat template writes, for example `<think>`.

The model continues from there, so its own text is only part of the completion: format, reasoning
and answer are read from both.
"""

from __future__ import annotations

import re

THINK, THINK_END, ANSWER, ANSWER_END = "<think>", "</think>", "<answer>", "</answer>"
TAGS = (THINK, THINK_END, ANSWER, ANSWER_END)


def prefill_of(turn: str) -> str:
    r"""Return a completion's beginning at a prompt's end, from the last opening tag on; "" if none.

    Args:
        turn: the assistant's turn as the template has begun it, header included.

    Example:
        >>> prefill_of("assistant\n<think>\n")
        '<think>\n'
    """
    if THINK not in turn and turn.rstrip().endswith(THINK_END):
        return turn[turn.rindex(THINK_END) :]  # the end tag alone switches reasoning off
    start = turn.rfind(THINK) if THINK in turn else turn.rfind(ANSWER)
    # a closed answer is an example, not a prefill
    return "" if start < 0 or ANSWER_END in turn[start:] else turn[start:]


def opens_thinking(prefill: str) -> bool:
    """Return True if the model continues inside the reasoning."""
    return prefill.startswith(THINK) and THINK_END not in prefill


def joined(prefill: str, written: str) -> str:
    r"""Return the whole completion: the template's prefill and the model's text.

    If the model opens its reasoning or answer again, as its instructions say, the template's tag is
    dropped.

    Example:
        >>> joined("<think>\n", "The liver.</think><answer>A</answer>")
        '<think>\nThe liver.</think><answer>A</answer>'
        >>> joined("<think>\n", "<think>The liver.</think><answer>A</answer>")
        '<think>The liver.</think><answer>A</answer>'
    """
    if not prefill:
        return written
    own = written.lstrip()
    if prefill.startswith(THINK_END) and own.startswith(THINK):
        return own
    for tag in (THINK, ANSWER):
        if own.startswith(tag) and tag in prefill:
            return prefill[: prefill.rindex(tag)] + own
    return prefill + written


def remaining(prefill: str, text: str) -> str:
    r"""Return what the model must write after the prefill for `text`; the inverse of `joined`.

    If the template has opened the reasoning and the text has none, the reasoning is closed first.

    Raises:
        ValueError: for a text with reasoning if the template has opened the answer.

    Example:
        >>> remaining("<think>\n", "<think>The liver.</think><answer>A</answer>")
        'The liver.</think><answer>A</answer>'
        >>> remaining("<think>\n", "<answer>A</answer>")
        '</think>\n<answer>A</answer>'
    """
    if not prefill:
        return text
    pieces = re.findall(r"</?\w+>|[^\s<]+|<", prefill)
    # white space between tags may differ; trailing white space only if the prefill ends in some
    pattern = r"\s*".join(map(re.escape, pieces)) + (r"\s*" if prefill[-1].isspace() else "")
    if begun := re.match(pattern, text):
        return text[begun.end() :]
    if prefill.rstrip().endswith(ANSWER):
        if not text.startswith(ANSWER):
            raise ValueError(
                f"the chat template has already opened {ANSWER}, so {text[:60]!r} cannot follow: remove "
                f"{ANSWER} from the template's generation prompt"
            )
        return text.removeprefix(ANSWER)
    return f"{THINK_END}\n{text}" if opens_thinking(prefill) and text.startswith(ANSWER) else text
