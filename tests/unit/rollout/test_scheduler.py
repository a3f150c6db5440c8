"""Admission: in order, whole groups, within slots and prefill tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlmed.core.types import Example, Prompt, RolloutRequest, SamplingParams
from rollout.native.scheduler import EngineLimits, Scheduler


def scheduler(*requests, **limits):
    result = Scheduler(EngineLimits(**limits))
    for request in requests:
        result.submit(request)
    return result


def admitted(queue, free_rows):
    return [request.index for request in queue.admit(free_rows)]


def test_groups_start_in_order_while_all_their_completions_fit(make_request):
    queue = scheduler(*(make_request(i, group_size=4) for i in range(4)), max_completions=10)
    assert admitted(queue, 10) == [0, 1]
    assert len(queue) == 2
    assert admitted(queue, 3) == []
    assert admitted(queue, 4) == [2]
    assert admitted(queue, 10) == [3]
    assert admitted(queue, 10) == []


def test_a_backlog_beside_running_groups_waits_for_a_quarter_of_the_rows(make_request):
    queue = scheduler(*(make_request(i, group_size=2) for i in range(10)), max_completions=16)
    assert queue.admit(2, running=True) == []
    assert queue.admit(3, running=True) == []
    assert [request.index for request in queue.admit(4, running=True)] == [0, 1]
    # nothing would be gained by waiting if nothing runs
    assert [request.index for request in queue.admit(3)] == [2]


def test_all_that_waits_starts_at_once_where_it_fits(make_request):
    queue = scheduler(make_request(0, group_size=2), max_completions=16)
    assert [request.index for request in queue.admit(2, running=True)] == [0]


def test_a_small_group_does_not_overtake_a_large_one(make_request):
    queue = scheduler(make_request(0, group_size=8), make_request(1, group_size=1), max_completions=8)
    assert admitted(queue, 7) == []
    assert admitted(queue, 8) == [0]


def test_one_forward_pass_takes_so_many_prompt_tokens_and_at_least_one_prompt(make_request):
    requests = [make_request(i, length=length) for i, length in enumerate([30, 40, 31, 200, 1])]
    queue = scheduler(*requests, prefill_tokens=70)
    assert [admitted(queue, 64) for _ in range(4)] == [[0, 1], [2], [3], [4]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_size": 9}, r"group_size 9 exceeds rollout\.max_completions=8"),
        ({"group_size": 0}, "group_size must be at least 1, got 0"),
        ({"length": 21}, r"'q5' has 21 tokens; .* 1 to 20: raise data\.max_prompt_tokens"),
        ({"length": 0}, "prompt 'q5' has 0 tokens"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
    ],
)
def test_a_request_that_could_never_run_is_refused_and_not_queued(change, message, make_request):
    queue = scheduler(max_completions=8, max_prompt_tokens=20)
    with pytest.raises(ValueError, match=message):
        queue.submit(make_request(5, **change))
    assert len(queue) == 0
    queue.submit(make_request(6, group_size=8, length=20, max_tokens=1))
    assert admitted(queue, 8) == [6]


@given(st.lists(st.tuples(st.integers(1, 8), st.integers(1, 50)), max_size=30), st.integers(1, 60))
def test_every_request_is_admitted_once_in_order_within_the_limits(shapes, prefill_tokens):
    requests = [
        RolloutRequest(i, Prompt(Example(str(i), None, "?", ("a",), 0), "", [0] * length), group_size, SamplingParams())
        for i, (group_size, length) in enumerate(shapes)
    ]
    queue = scheduler(*requests, max_completions=8, prefill_tokens=prefill_tokens)
    order = []
    while len(queue):
        batch = queue.admit(8)
        assert batch
        assert sum(request.group_size for request in batch) <= 8
        assert len(batch) == 1 or sum(len(request.prompt.token_ids) for request in batch) <= prefill_tokens
        order += [request.index for request in batch]
    assert order == list(range(len(shapes)))
