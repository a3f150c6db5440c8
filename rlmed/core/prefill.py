"""What a chat template has written of a completion before the model writes anything, for example `<think>`.

The model goes on from there, so its own text is half of what it says: format, reasoning and answer are read from both halves.
"""

from __future__ import annotations

import re

THINK, THINK_END, ANSWER, ANSWER_END = "<think>", "</think>", "<answer>", "</answer>"
TAGS = (THINK, THINK_END, ANSWER, ANSWER_END)


def prefill_of(turn: str) -> str:
    r"""The beginning of a completion at the end of a prompt: from the last opening tag on; "" without one.

    Args:
        turn: what the template has written of the assistant's turn, its header included.

    Example:
        >>> prefill_of("assistant\n<think>\n")
        '<think>\n'
    """
    if THINK not in turn and turn.rstrip().endswith(THINK_END):
        return turn[turn.rindex(THINK_END) :]  # reasoning is switched off by its end alone
    start = turn.rfind(THINK) if THINK in turn else turn.rfind(ANSWER)
    # an answer that is closed already is an example, and no beginning
    return "" if start < 0 or ANSWER_END in turn[start:] else turn[start:]


def opens_thinking(prefill: str) -> bool:
    """True where the model goes on inside a reasoning."""
    return prefill.startswith(THINK) and THINK_END not in prefill


def joined(prefill: str, written: str) -> str:
    r"""The whole completion: what the template and what the model has written.

    A model may open its reasoning or its answer again, as its instructions say; the template's tag is left out then.

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
    r"""What the model has to write so that, with the prefill, it has written `text`; the inverse of `joined`.

    Where the template has opened a reasoning and the text has none, the reasoning is closed first.

    Raises:
        ValueError: for a text with a reasoning where the template has opened the answer.

    Example:
        >>> remaining("<think>\n", "<think>The liver.</think><answer>A</answer>")
        'The liver.</think><answer>A</answer>'
        >>> remaining("<think>\n", "<answer>A</answer>")
        '</think>\n<answer>A</answer>'
    """
    if not prefill:
        return text
    pieces = re.findall(r"</?\w+>|[^\s<]+|<", prefill)
    # white space between the tags is the template's to choose; what follows it only where the prefill ends in some
    pattern = r"\s*".join(map(re.escape, pieces)) + (r"\s*" if prefill[-1].isspace() else "")
    if begun := re.match(pattern, text):
        return text[begun.end() :]
    if prefill.rstrip().endswith(ANSWER):
        if not text.startswith(ANSWER):
            raise ValueError(
                f"the chat template has opened {ANSWER} already, so {text[:60]!r} cannot be written after it: take "
                f"{ANSWER} out of the template's generation prompt"
            )
        return text.removeprefix(ANSWER)
    return f"{THINK_END}\n{text}" if opens_thinking(prefill) and text.startswith(ANSWER) else text
