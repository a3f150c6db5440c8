"""The in-process pool: each request is answered once, in order of completion."""

from __future__ import annotations

import pytest

from rollout.local import LocalPool
from rollout.native.engine import NativeEngine
from rollout.native.scheduler import EngineLimits


@pytest.fixture
def pool(chain):
    return LocalPool(NativeEngine(chain(), lambda _: "", EngineLimits(max_completions=4)))


def test_each_request_is_answered_once_in_order_of_completion(pool, make_request):
    for i, max_tokens in enumerate([9, 3, 3, 5, 2, 2]):
        pool.submit(make_request(i, max_tokens=max_tokens))
    assert pool.in_flight == 6
    order = []
    for left in range(5, -1, -1):
        order.append(pool.collect().request.index)
        assert pool.in_flight == left
    # four slots: 4 and 5 start when 1 and 2 have ended
    assert order == [1, 2, 4, 5, 3, 0]
    assert not pool.engine.busy


def test_requests_may_come_while_others_run(pool, make_request):
    pool.submit(make_request(0, max_tokens=30))
    pool.submit(make_request(1, max_tokens=2))
    assert pool.collect().request.index == 1
    pool.submit(make_request(2, max_tokens=2))
    assert [pool.collect().request.index for _ in range(2)] == [2, 0]


def test_collect_with_nothing_in_flight_is_an_error(pool, make_request):
    with pytest.raises(RuntimeError, match="no request in flight"):
        pool.collect()
    pool.submit(make_request(max_tokens=1))
    pool.collect()
    with pytest.raises(RuntimeError, match="no request in flight"):
        pool.collect()


def test_a_refused_request_is_not_in_flight(pool, make_request):
    with pytest.raises(ValueError, match="group_size"):
        pool.submit(make_request(group_size=5))
    assert pool.in_flight == 0


def test_update_weights_reaches_the_engine(pool, make_request):
    pool.update_weights(12)
    pool.submit(make_request(max_tokens=3))
    assert pool.collect().min_version == 12


def test_close_drops_what_is_in_flight_and_what_was_not_collected(pool, make_request):
    for i, max_tokens in enumerate([1, 1, 9]):
        pool.submit(make_request(i, max_tokens=max_tokens))
    pool.collect()
    pool.close()
    assert pool.in_flight == 0
    assert not pool.engine.busy
    pool.submit(make_request(7, max_tokens=1))
    assert pool.collect().request.index == 7
