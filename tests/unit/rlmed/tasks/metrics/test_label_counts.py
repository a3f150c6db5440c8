import numpy as np
import pytest

from rlmed.tasks.metrics.label_counts import LabelCounts
from rlmed.tasks.metrics.sets import macro_scores, micro_scores

FINDINGS = tuple(f"finding {number}" for number in range(20))


@pytest.mark.parametrize("known", [((),), (FINDINGS[:12], ()), (FINDINGS[:12], FINDINGS[9:], FINDINGS[17:])], ids=len)
def test_f1_of_resamples_equals_that_of_their_rows_exactly(known: tuple[tuple[str, ...], ...]) -> None:
    random = np.random.default_rng(0)
    rows = [tuple(tuple(np.array(FINDINGS)[random.random(20) < 0.05]) for _ in range(2)) for _ in range(40)]
    possible = [known[random.integers(len(known))] for _ in rows]
    counts = LabelCounts.of(rows, possible)
    found = []
    for size in (*[40] * 50, *[1] * 50):  # alone, a row may have no label, or none that is possible
        draw = random.integers(len(rows), size=size)
        drawn, labels = [rows[i] for i in draw], {label for i in draw for label in possible[i]} or None
        slow = {"micro_f1": micro_scores(drawn).f1}
        if {label for row in drawn for side in row for label in side if labels is None or label in labels}:
            slow["macro_f1"] = macro_scores(drawn, labels).f1
        found.append(counts.figures(draw))
        assert found[-1] == slow
    assert len({one["micro_f1"] for one in found}) > 20
    assert any("macro_f1" not in one for one in found)
