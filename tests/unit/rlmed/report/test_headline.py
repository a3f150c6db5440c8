import pytest

from rlmed.report.headline import headline


@pytest.mark.parametrize(
    ("values", "start", "end", "note"),
    [
        ([4.0], None, 4.0, "at the only step"),
        ([4.0, None, 6.0, 9.0], 4.0, 9.0, "at the first and the last step"),
        ([1.0, 3.0, 9.0, 5.0, 7.0], 2.0, 6.0, "means of the first and the last 2 steps"),
        (range(100), 4.5, 94.5, "means of the first and the last 10 steps"),
    ],
)
def test_the_ends_of_a_run_do_not_meet(values, start, end, note):
    found = headline([{"kl": value} for value in values], "kl")
    assert (found.start, found.end, found.note) == (start, end, note)


def test_a_metric_that_no_step_has():
    assert headline([{"step": 1, "kl": None}], "kl") is None
