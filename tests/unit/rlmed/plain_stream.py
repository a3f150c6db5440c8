"""A stream of requests without model or data, for tests of the loop."""

from __future__ import annotations

import numpy as np

from rlmed.core.types import Example, Prompt, RolloutRequest, SamplingParams

EXAMPLE = Example(id="x", image=None, question="?", options=("a", "b"), answer=0)


class PlainStream:
    """Two completions of the same one-token prompt at every index."""

    def request(self, index: int) -> RolloutRequest:
        """The request at `index`."""
        return RolloutRequest(index, Prompt(EXAMPLE, "", np.array([1])), 2, SamplingParams(seed=index))
