"""Label-free reward: agreement within a group."""

from __future__ import annotations

from collections import Counter

import numpy as np

from rlmed.core.parsing import evaluated_letter
from rlmed.core.types import LETTERS, FloatArray, RolloutGroup


def self_consistency_reward(group: RolloutGroup) -> FloatArray:
    """Return the share of the group's other completions with the same letter; float32 [G], 0 to 1.

    The letter is the one that evaluation counts. A completion without one, or with a letter of no
    option, earns 0. Ignores the correct answer (a soft majority vote, as in test-time reinforcement
    learning, arXiv 2504.16084).
    """
    possible = LETTERS[: len(group.prompt.example.options)]
    letters = [evaluated_letter(completion.text) or "" for completion in group.completions]
    votes = Counter(letters)
    others = max(1, len(letters) - 1)
    shares = [(votes[letter] - 1) / others if letter and letter in possible else 0.0 for letter in letters]
    return np.array(shares, dtype=np.float32)
