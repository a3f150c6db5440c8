"""Texts that models or attackers write where an answer is expected."""

from __future__ import annotations

import random

LONG = 100_000
"""Characters of the longest texts: a parser of quadratic time takes minutes for them."""

FRAGMENTS = (
    "[", "]", "{", "}", "(", ")", "<", ">", '"', "'", "\\", ",", ":", "-", "+", ".", "\n", " ", "\t", "1", "e", "```", "`",
    "1,", "1.", "1,234", "e9", "-1", "10 ", "[1,", '{"a":', '"\\', "\\\"", "(1", "(1,2)", "<|box_start|>", "<a", "</answer>",
    "<answer>", "\\frac{", "\\text", "$", "and ", "none ", "none,", "between ", "between 1 and ", "1 to ", "肝", "肝，", "１",
    "a\u0301\u0316", "\u0301\u0316", "\u200b", "\ufdfa", "İ", "the ", "cyst and ", "mass;", "mm", "5 mm", "bbox_2d:", "\x00",
    "1e400 ", "NaN, ", "[[1,2,3,4],", "(1,2),(3,4)", "ß", "\U0001f600", "\ud800",
)  # fmt: skip


def repeated(length: int) -> list[str]:
    """Texts of a length: each fragment over and over, some behind the beginning of an answer."""
    texts = [(fragment * (length // len(fragment) + 1))[:length] for fragment in FRAGMENTS]
    half = length // 2
    texts += ["[" * half + "]" * half, '{"a":' * (half // 6) + "}" * (half // 6), "(" * half + ")" * half]
    return texts + [f"{start}{text[:half]}" for start in ("5", '["', "[[1,2,3,4],") for text in texts[:12]]


def mixed(count: int, seed: int) -> list[str]:
    """Random texts out of fragments."""
    source = random.Random(seed)
    return ["".join(source.choices(FRAGMENTS, k=source.randint(1, 40))) for _ in range(count)]
