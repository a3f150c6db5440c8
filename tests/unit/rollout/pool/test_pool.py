"""The worker pool: every request is answered exactly once, whatever happens to the workers."""

from __future__ import annotations

import dataclasses
import random
import threading
import time
from concurrent.futures import Future

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlmed.core.config.checks import ConfigError
from rlmed.core.protocols import ClusterError
from rlmed.core.weights import PushReport
from rollout.pool.pool import WorkerPool
from rollout.pool.state import PoolSettings, RolloutError
from rollout.pool.worker import FinishedGroup
from tests.unit.rollout.fake_workers import FakeWorker, Update

PATIENT = PoolSettings(
    capacity=4, heartbeat_s=0.01, silence_s=600, stall_s=600, start_s=600, push_s=600, max_failures=3
)
"""No worker is given up if this machine stalls for a while; a limit's test shortens it alone."""
SHORT_S = 0.1


class Site:
    """Starts fake workers and remembers them all."""

    def __init__(self, **options):
        self.options = options
        self.workers: list[FakeWorker] = []

    def __call__(self, number):
        worker = FakeWorker(f"worker {number}", **self.options)
        self.workers.append(worker)
        return worker


@pytest.fixture
def make_pool():
    pools = []

    def make(site, workers=2, settings=PATIENT):
        pool = WorkerPool(site, workers, settings)
        pools.append(pool)
        return pool

    yield make
    for pool in pools:
        pool.close()


def wait_for(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.002)


def test_groups_come_back_with_their_own_requests(make_pool, make_request):
    channel = make_pool(Site()).channel()
    requests = {index: make_request(index, group_size=2) for index in (7, 3, 900)}
    for request in requests.values():
        channel.submit(request)
    assert channel.in_flight == 3
    groups = [channel.collect() for _ in requests]
    assert {group.request.index for group in groups} == set(requests)
    # the very prompt that was submitted: it need not travel back
    assert all(group.prompt is requests[group.request.index].prompt for group in groups)
    assert all(len(group.completions) == 2 for group in groups)
    assert channel.in_flight == 0
    with pytest.raises(RuntimeError, match="no request in flight"):
        channel.collect()


def test_what_is_submitted_before_a_collect_leaves_in_one_message(make_pool, make_request):
    site = Site()
    channel = make_pool(site, workers=1).channel()
    for index in range(4):
        channel.submit(make_request(index))
    channel.collect()
    assert [len(batch) for batch in site.workers[0].batches] == [4]


def test_the_least_busy_worker_is_given_the_next_prompt_up_to_its_capacity(make_pool, make_request):
    site = Site(auto=False)
    pool = make_pool(site)
    channel = pool.channel()
    wait_for(lambda: pool.metrics()["rollout/workers_ready"] == 2)
    for index, size in enumerate([3, 1, 1, 1, 1, 1, 1]):
        channel.submit(make_request(index, group_size=size))
    thread = threading.Thread(target=channel.collect)
    thread.start()
    first, second = site.workers
    wait_for(lambda: len(first.held) + len(second.held) == 6)
    # 3 | then 1, 1, 1 to the other; 4 completions each is all they take, and the seventh waits
    assert sorted(sum(request.group_size for request in worker.held.values()) for worker in site.workers) == [4, 4]
    busy = next(worker for worker in site.workers if len(worker.held) == 4)
    busy.finish(next(iter(busy.held)))
    thread.join(timeout=60)
    wait_for(lambda: sum(len(batch) for batch in busy.batches) == 5)


def test_two_channels_share_the_workers_and_keep_their_groups_apart(make_pool, make_request):
    pool = make_pool(Site())
    training, evaluation = pool.channel(), pool.channel()
    for index in range(5):
        training.submit(make_request(index))
        evaluation.submit(make_request(index, group_size=3))
    assert {len(evaluation.collect().completions) for _ in range(5)} == {3}
    assert {len(training.collect().completions) for _ in range(5)} == {1}


def test_a_dead_workers_requests_are_sampled_by_its_successor_with_the_current_weights(make_pool, make_request):
    site = Site(auto=False)
    pool = make_pool(site, workers=1)
    channel = pool.channel()
    wait_for(lambda: pool.metrics()["rollout/workers_ready"] == 1)
    pool.update_weights(Update(5).weights)
    for index in range(3):
        channel.submit(make_request(index))
    channel.flush()
    first = site.workers[0]
    wait_for(lambda: len(first.held) == 3)
    first.finish(next(iter(first.held)))
    one = channel.collect()
    first.die(OSError("gone"))
    wait_for(lambda: len(site.workers) == 2 and len(site.workers[1].held) == 2)
    second = site.workers[1]
    assert second.fetched == [5]
    for index in list(second.held):
        second.finish(index)
    groups = [one, channel.collect(), channel.collect()]
    assert sorted(group.request.index for group in groups) == [0, 1, 2]
    assert {group.min_version for group in groups} == {5}
    assert first.killed
    assert pool.metrics()["rollout/workers_lost"] == 1
    assert pool.metrics()["rollout/groups_sampled_again"] == 2


@pytest.mark.parametrize(
    ("limit", "property"), [("silence_s", "answers"), ("stall_s", "moves")], ids=["silent", "still"]
)
def test_a_worker_that_does_not_answer_or_does_not_move_is_replaced(make_pool, make_request, limit, property):
    site = Site(auto=False)
    pool = make_pool(site, workers=1)
    channel = pool.channel()
    wait_for(lambda: pool.metrics()["rollout/workers_ready"] == 1)
    channel.submit(make_request(0))
    channel.flush()
    frozen = site.workers[0]
    wait_for(lambda: frozen.held)
    site.options["auto"] = True  # its successors finish what they are given
    setattr(frozen, property, False)
    pool._settings = dataclasses.replace(PATIENT, **{limit: SHORT_S})
    assert channel.collect().request.index == 0
    wait_for(lambda: frozen.killed)
    assert frozen.held


def test_what_a_replaced_worker_still_sends_is_not_counted(make_pool, make_request):
    site = Site(auto=False)
    pool = make_pool(site, workers=1)
    channel = pool.channel()
    wait_for(lambda: pool.metrics()["rollout/workers_ready"] == 1)
    channel.submit(make_request(0))
    channel.flush()
    frozen = site.workers[0]
    wait_for(lambda: frozen.held and frozen.collects)
    (late,) = frozen.collects
    frozen.collects = []  # so this one call stays under way
    frozen.die(OSError("out of reach"))
    wait_for(lambda: len(site.workers) == 2 and site.workers[1].held)
    index = next(iter(frozen.held))
    frozen.error = None
    frozen.finish(index)
    late.set_result(frozen.ready)
    wait_for(lambda: pool.metrics()["rollout/groups_late"] == 1)
    site.workers[1].finish(index)
    assert channel.collect().request.index == 0
    assert channel._groups.empty()


def test_a_push_waits_for_all_workers_and_replaces_the_one_that_fails(make_pool):
    site = Site()
    pool = make_pool(site)
    wait_for(lambda: pool.metrics()["rollout/workers_ready"] == 2)
    site.workers[0].die(OSError("gone"))
    reports = pool.update_weights(Update().weights)
    assert len(reports) in (1, 2)
    wait_for(lambda: len(site.workers) == 3 and pool.metrics()["rollout/workers_ready"] == 2)
    assert [worker.version for worker in site.workers[1:]] == [1, 1]


def test_a_worker_that_hangs_in_a_push_is_replaced(make_pool):
    site = Site()
    pool = make_pool(site, workers=1)
    wait_for(lambda: pool.metrics()["rollout/workers_ready"] == 1)
    site.workers[0].answers = False
    pool._settings = dataclasses.replace(PATIENT, push_s=SHORT_S)
    pool.update_weights(Update().weights)
    wait_for(lambda: site.workers[0].killed and pool.metrics()["rollout/workers_ready"] == 1)
    assert site.workers[-1].fetched[-1] == 1


def push_in_thread(pool, update):
    """A push that has begun to be sent, and what it gives in the end."""
    reports: Future = Future()

    def push():
        try:
            reports.set_result(pool.update_weights(update.weights))
        except Exception as error:
            reports.set_exception(error)

    threading.Thread(target=push, daemon=True).start()
    wait_for(lambda: update.engines)
    return reports


def test_weights_that_were_sent_are_not_fetched(make_pool, make_request):
    site = Site(auto=False)
    pool = make_pool(site)
    wait_for(lambda: pool.metrics()["rollout/workers_ready"] == 2)
    update = Update(sending=Future())
    reports = push_in_thread(pool, update)
    assert [(entry.address, entry.devices) for entry in update.engines] == [
        (worker, (f"gpu of {worker.name}",)) for worker in site.workers
    ]
    assert "here" in update.engines[0].name
    channel = pool.channel()
    channel.submit(make_request(0))
    channel.flush()
    time.sleep(0.05)
    # nobody samples while weights are on their way
    assert not any(worker.held for worker in site.workers)
    update.sending.set_result(PushReport(0.0, 0.5))
    assert reports.result(timeout=60) == [PushReport(0.0, 0.5)] * 2
    wait_for(lambda: any(worker.held for worker in site.workers))
    assert not any(worker.fetched for worker in site.workers)
    assert pool.metrics()["rollout/workers_lost"] == 0


def test_who_comes_after_weights_were_sent_fetches_them(make_pool):
    site = Site()
    pool = make_pool(site)
    wait_for(lambda: pool.metrics()["rollout/workers_ready"] == 2)
    update = Update(sending=Future())
    update.sending.set_result(PushReport(0.0, 0.5))
    pool.update_weights(update.weights)
    site.workers[0].die(OSError("gone"))
    wait_for(lambda: len(site.workers) == 3 and site.workers[2].fetched)
    assert site.workers[2].fetched == [1]
    assert site.workers[1].fetched == []


def test_workers_that_weights_could_not_be_sent_to_fetch_them_and_a_dead_one_is_replaced(make_pool):
    site = Site()
    pool = make_pool(site)
    wait_for(lambda: pool.metrics()["rollout/workers_ready"] == 2)
    update = Update(sending=Future())
    reports = push_in_thread(pool, update)
    site.workers[0].die(OSError("gone"))  # which is why they cannot
    wait_for(lambda: len(site.workers) == 3 and site.workers[2].fetched)
    update.sending.set_result(None)
    assert len(reports.result(timeout=60)) == 2  # its successor, and the one that was there
    assert [worker.fetched for worker in site.workers] == [[], [1], [1]]
    assert pool.metrics()["rollout/workers_lost"] == 1


@pytest.mark.parametrize("error", [ClusterError("learner rank 0 was lost"), ConfigError("no such way")])
def test_an_error_of_the_learner_or_of_the_user_ends_the_push_as_it_is(make_pool, error):
    pool = make_pool(Site())
    wait_for(lambda: pool.metrics()["rollout/workers_ready"] == 2)
    update = Update(sending=Future())
    reports = push_in_thread(pool, update)
    update.sending.set_exception(error)
    assert reports.exception(timeout=60) is error


def test_workers_rest_where_their_engines_can_sleep_and_one_that_dies_of_it_is_replaced(make_pool):
    site = Site()
    pool = make_pool(site)
    wait_for(lambda: pool.metrics()["rollout/workers_ready"] == 2)
    pool.sleep()
    assert [worker.rests for worker in site.workers] == [0, 0]
    site = Site()
    pool = make_pool(site, settings=dataclasses.replace(PATIENT, sleeps=True))
    wait_for(lambda: pool.metrics()["rollout/workers_ready"] == 2)
    pool.sleep()
    assert [worker.rests for worker in site.workers] == [1, 1]
    pool.update_weights(Update().weights)
    site.workers[0].error = MemoryError("no memory to wake up")
    pool.sleep()
    wait_for(lambda: len(site.workers) == 3 and site.workers[2].fetched)


def test_all_workers_are_waited_for_unless_one_cannot_start(make_pool):
    pool = make_pool(Site())
    pool.wait_until_ready()
    assert pool.metrics()["rollout/workers_ready"] == 2
    hopeful = dataclasses.replace(PATIENT, start_s=SHORT_S)
    half = make_pool(lambda number: FakeWorker(f"worker {number}", answers=number == 0), settings=hopeful)
    half.wait_until_ready()
    wait_for(lambda: half.metrics()["rollout/workers_ready"] == 1)

    def stillborn(number):
        worker = FakeWorker(f"worker {number}")
        worker.die(MemoryError("no memory for the cache"))
        return worker

    broken = make_pool(stillborn, workers=1)
    with pytest.raises(RolloutError, match=r"worker 0 .*started: MemoryError: no memory"):
        broken.wait_until_ready()


def test_a_worker_that_dies_again_and_again_stops_the_run_with_the_cause(make_pool, make_request):
    class Doomed(FakeWorker):
        def submit(self, requests):
            self.die(MemoryError("no memory for the cache"))
            return super().submit(requests)

    pool = make_pool(lambda number: Doomed(f"worker {number}"), workers=1)
    channel = pool.channel()
    channel.submit(make_request(0))
    with pytest.raises(RolloutError, match=r"(?s)worker 0.*(4 times|4 workers).*no memory"):
        channel.collect()
    with pytest.raises(RolloutError):
        pool.update_weights(Update().weights)


def test_a_worker_that_cannot_be_built_stops_the_run_at_once(make_pool, make_request):
    starts = []

    def start(number):
        starts.append(number)
        worker = FakeWorker(f"worker {number}")
        worker.die(ValueError("model folder is missing"))
        return worker

    channel = make_pool(start, workers=1).channel()
    channel.submit(make_request(0))
    with pytest.raises(RolloutError, match="started: ValueError: model folder"):
        channel.collect()
    assert starts == [0]


def test_the_pool_goes_on_with_fewer_workers_while_one_cannot_be_placed(make_pool, make_request):
    class Unplaced(FakeWorker):
        def __init__(self, name):
            super().__init__(name, answers=False)

    started = []

    def start(number):
        worker = FakeWorker("worker 0") if number == 0 else Unplaced(f"worker {number}")
        started.append(worker)
        return worker

    pool = make_pool(start, settings=dataclasses.replace(PATIENT, start_s=SHORT_S))
    channel = pool.channel()
    wait_for(lambda: len(started) > PATIENT.max_failures + 3)
    for index in range(6):
        channel.submit(make_request(index))
    assert sorted(channel.collect().request.index for _ in range(6)) == list(range(6))


def test_a_request_that_can_never_run_is_an_error_for_the_caller_and_costs_no_worker(make_pool, make_request):
    class Strict(FakeWorker):
        def finish(self, index):
            if self.held[index].group_size == 3:
                del self.held[index]
                self.ready.append(FinishedGroup(index, (), "group_size 3 exceeds rollout.max_completions=2"))
                self._deliver()
            else:
                super().finish(index)

    pool = make_pool(lambda number: Strict(f"worker {number}"), workers=1)
    channel = pool.channel()
    for index, size in enumerate([1, 3, 1]):
        channel.submit(make_request(index, group_size=size))
    answers = []
    for _ in range(3):
        try:
            answers.append(channel.collect().request.index)
        except ValueError as error:
            answers.append(str(error))
    assert sorted(map(str, answers)) == ["0", "2", "prompt 'q1': group_size 3 exceeds rollout.max_completions=2"]
    assert pool.metrics()["rollout/workers_lost"] == 0


def test_a_replacement_that_fails_to_start_is_tried_again(make_pool, make_request):
    started = []

    def start(number):
        worker = FakeWorker(f"worker {number}")
        if len(started) in (1, 2):
            worker.die(OSError("node is rebooting"))
        started.append(worker)
        return worker

    pool = make_pool(start, workers=1)
    channel = pool.channel()
    wait_for(lambda: pool.metrics()["rollout/workers_ready"] == 1)
    started[0].die(OSError("gone"))
    channel.submit(make_request(0))
    assert channel.collect().request.index == 0
    assert len(started) == 4


def test_closing_kills_all_workers(make_pool, make_request):
    site = Site(auto=False)
    pool = make_pool(site)
    channel = pool.channel()
    channel.submit(make_request(0))
    channel.close()
    assert all(worker.killed for worker in site.workers)
    assert channel.in_flight == 0


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), count=st.integers(1, 30), workers=st.integers(1, 3))
def test_each_request_is_answered_exactly_once_whatever_dies(seed, count, workers):
    """Workers finish groups and die at random; late groups arrive after a replacement."""
    rng = random.Random(seed)
    site = Site(auto=False)
    limits = PoolSettings(
        capacity=4, heartbeat_s=0.002, silence_s=600, stall_s=600, start_s=600, push_s=600, max_failures=10**6
    )
    pool = WorkerPool(site, workers, limits)
    stopped = threading.Event()

    def life():
        # and no more: on a busy machine workers would else die faster than they are seen to finish
        deaths = 20
        while not stopped.is_set():
            for worker in list(site.workers):  # also the oldest, which may outlive all others
                with worker.lock:
                    if worker.held and (not worker.error or rng.random() < 0.5):
                        worker.finish(rng.choice(list(worker.held)))
                if deaths and not worker.error and rng.random() < 0.05:
                    worker.die(OSError("gone"))
                    deaths -= 1
            time.sleep(0.001)

    thread = threading.Thread(target=life)
    try:
        channel = pool.channel()
        wait_for(lambda: pool.metrics()["rollout/workers_ready"] > 0)
        thread.start()
        for index in range(count):
            channel.submit(_request(index, group_size=rng.choice([1, 2, 5])))
        assert sorted(channel.collect().request.index for _ in range(count)) == list(range(count))
        time.sleep(0.01)
        assert channel._groups.empty()
    finally:
        stopped.set()
        if thread.is_alive():
            thread.join()
        pool.close()


def _request(index, group_size):
    import numpy as np

    from rlmed.core.types import Example, Prompt, RolloutRequest, SamplingParams

    prompt = Prompt(Example(f"q{index}", None, "?", ("a", "b"), 0), "", np.ones(2, dtype=np.int64))
    return RolloutRequest(index, prompt, group_size, SamplingParams(seed=index))
