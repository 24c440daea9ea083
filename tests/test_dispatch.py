"""Dispatch, driven directly: what it decides, one behaviour a test; then any mix of events beside a model.

Starts no process and no thread. The model holds one state a task, so "never lost, never doubled" is what it checks.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dpool.batching import CREDITS_PER_WORKER, MAX_BATCH_TASKS, STEAL_AFTER_S, STEAL_RECHECK_S
from dpool.cluster.driver.dispatch import NODE_LOSSES, Batch, Dispatch, Job, Timing
from dpool.engine import CALL, MAP, MAP_CHUNK, Failure


class NoSink:
    """Dispatch only carries sinks along; nothing here is reported to one."""

    def start(self) -> bool:
        raise AssertionError("Dispatch talks to no sink")

    def set(self, first: int, values: Sequence[Any]) -> None:
        raise AssertionError("Dispatch talks to no sink")

    def fail(self, index: int, failure: Failure) -> None:
        raise AssertionError("Dispatch talks to no sink")

    def abandon(self, failure: Failure) -> None:
        raise AssertionError("Dispatch talks to no sink")


SINK = NoSink()


def known(estimate_ns: int | None = 1000) -> Timing:
    """The timing of a function that has run before, so that its tasks travel together."""
    timing = Timing()
    timing.estimate_ns = estimate_ns
    return timing


def call(value: Any, timing: Timing | None = None, function: str = "f", asks_start: bool = False) -> Job:
    return Job(function, timing or Timing(), CALL, (((value,), {}),), SINK, asks_start=asks_start)


def many(items: Iterable[Any], timing: Timing | None = None, chunk: int = 1) -> Job:
    return Job("f", timing or Timing(), MAP if chunk == 1 else MAP_CHUNK, list(items), SINK, chunk)


def stream(timing: Timing | None = None) -> Job:
    return Job("f", timing or Timing(), MAP, [], SINK, open=True)


def take(dispatch: Dispatch, now: float = 0.0) -> Batch:
    """The next batch, which must exist."""
    batch = dispatch.next_batch(now)
    assert batch is not None
    dispatch.validate()
    return batch


def take_all(dispatch: Dispatch) -> list[Batch]:
    batches = []
    while (batch := dispatch.next_batch(0.0)) is not None:
        batches.append(batch)
    dispatch.validate()
    return batches


def finish(dispatch: Dispatch, batch: Batch, run_ns: int = 1000) -> None:
    """A worker runs all of a batch and reports it at once."""
    count = batch.stop - batch.reported
    assert dispatch.report(batch.number, batch.reported, count) is batch
    dispatch.done(batch.number, run_ns, count)
    dispatch.validate()


# -- batches


def test_the_first_tasks_of_a_function_travel_one_by_one() -> None:
    dispatch = Dispatch(workers=2)
    dispatch.add(many(range(100)))
    assert [list(batch.items()) for batch in take_all(dispatch)] == [[0], [1], [2], [3]]


def test_in_flight_are_at_most_two_batches_a_worker() -> None:
    dispatch = Dispatch(workers=3)
    dispatch.add(many(range(1000), known()))
    assert len(take_all(dispatch)) == CREDITS_PER_WORKER * 3
    assert not dispatch.has_credit


def test_a_finished_batch_makes_room_for_the_next() -> None:
    dispatch = Dispatch(workers=1)
    dispatch.add(many(range(3)))
    first, _ = take_all(dispatch)
    assert dispatch.next_batch(0.0) is None
    finish(dispatch, first)
    assert list(take(dispatch).items()) == [2]


def test_without_workers_nothing_is_sent() -> None:
    dispatch = Dispatch(workers=0)
    dispatch.add(call(1))
    assert dispatch.next_batch(0.0) is None
    dispatch.workers = 1
    assert dispatch.next_batch(0.0) is not None


def test_short_tasks_of_a_map_travel_together_for_about_ten_milliseconds() -> None:
    dispatch = Dispatch(workers=1)
    dispatch.add(many(range(1000), known(200_000)))
    assert take(dispatch).stop == 50


def test_short_calls_travel_together_for_about_a_millisecond() -> None:
    dispatch = Dispatch(workers=1)
    for number in range(1000):
        dispatch.add(call(number, known(50_000)))
    assert take(dispatch).stop == 20


def test_a_batch_holds_at_most_its_fair_share_of_the_queue() -> None:
    dispatch = Dispatch(workers=5)
    dispatch.add(many(range(100), known(1)))
    assert take(dispatch).stop == 100 // (CREDITS_PER_WORKER * 5)


def test_no_batch_is_larger_than_the_limit() -> None:
    dispatch = Dispatch(workers=1)
    dispatch.add(many(range(100_000), known(1)))
    assert take(dispatch).stop == MAX_BATCH_TASKS


def test_a_worker_that_is_replaced_after_few_tasks_gets_no_more_at_once() -> None:
    dispatch = Dispatch(workers=1, max_tasks=3)
    dispatch.add(many(range(100), known(1)))
    assert take(dispatch).stop == 3


def test_where_batches_cannot_be_split_tasks_travel_alone() -> None:
    dispatch = Dispatch(workers=1, splits=False)
    dispatch.add(many(range(100), known(1)))
    assert take(dispatch).stop == 1


def test_calls_of_one_function_travel_together() -> None:
    dispatch = Dispatch(workers=1)
    timing = known()
    jobs = [call(value, timing) for value in range(8)]
    for job in jobs:
        dispatch.add(job)
    batch = take(dispatch)
    assert batch.items() == [((value,), {}) for value in range(4)]
    assert [batch.task(index) for index in range(4)] == [(job, 0) for job in jobs[:4]]


def test_calls_of_different_functions_do_not_travel_together() -> None:
    dispatch = Dispatch(workers=1)
    dispatch.add(call(1, known(), "f"))
    dispatch.add(call(2, known(), "g"))
    dispatch.add(call(3, known(), "f"))
    dispatch.add(call(4, known(), "f"))
    assert list(take(dispatch).items()) == [((1,), {})]


def test_calls_that_ask_for_their_start_travel_apart_from_those_that_do_not() -> None:
    dispatch = Dispatch(workers=1)
    timing = known()
    for value in range(8):
        dispatch.add(call(value, timing, asks_start=value > 0))
    assert len(take(dispatch).items()) == 1
    second = take(dispatch)
    assert second.jobs is not None and all(job.asks_start for job in second.jobs)


@pytest.mark.parametrize("length, chunk, sent", [
    (5, 2, [(0, 1), (2, 3), (4,)]),
    (1, 5, [(0,)]),
    (4, 4, [(0, 1, 2, 3)]),
])
def test_a_chunk_travels_as_a_tuple_also_if_it_is_the_only_item(length: int, chunk: int, sent: list[Any]) -> None:
    dispatch = Dispatch(workers=4)
    dispatch.add(many(range(length), chunk=chunk))
    assert [item for batch in take_all(dispatch) for item in batch.items()] == sent


def test_tasks_are_sent_in_the_order_of_their_coming() -> None:
    dispatch = Dispatch(workers=50)
    dispatch.add(many(range(3)))
    dispatch.add(call("a"))
    dispatch.add(many(range(3, 5)))
    sent = [item for batch in take_all(dispatch) for item in batch.items()]
    assert sent == [0, 1, 2, (("a",), {}), 3, 4]


# -- estimates


def test_the_estimate_follows_what_tasks_took() -> None:
    dispatch = Dispatch(workers=1)
    job = many(range(3))
    dispatch.add(job)
    finish(dispatch, take(dispatch), run_ns=8000)
    assert job.timing.estimate_ns == 8000
    finish(dispatch, take(dispatch), run_ns=2000)
    assert job.timing.estimate_ns == 5000


def test_a_batch_of_which_nothing_ran_says_nothing_about_time() -> None:
    dispatch = Dispatch(workers=1)
    job = many(range(3))
    dispatch.add(job)
    dispatch.done(take(dispatch).number, 5000, 0)
    assert job.timing.estimate_ns is None


def test_a_theft_raises_the_estimate_to_the_time_the_batch_has_taken() -> None:
    dispatch = Dispatch(workers=1)
    job = many(range(100), known(400_000))
    dispatch.add(job)
    batch = take(dispatch)
    dispatch.stolen(batch.number, batch.stop - 1, now=1.0)
    assert job.timing.estimate_ns == 1_000_000_000
    assert take(dispatch).stop == 1


# -- streams


def test_an_open_stream_keeps_the_group_busy_until_it_is_sealed() -> None:
    dispatch = Dispatch(workers=1)
    job = stream()
    dispatch.add(job)
    assert not dispatch.idle
    dispatch.extend(job, [1])
    dispatch.seal(job)
    assert not dispatch.idle
    finish(dispatch, take(dispatch))
    assert dispatch.idle


def test_items_pushed_while_others_are_in_flight_are_sent_later() -> None:
    dispatch = Dispatch(workers=1)
    job = stream()
    dispatch.add(job)
    dispatch.extend(job, ["a"])
    first = take(dispatch)
    assert dispatch.next_batch(0.0) is None
    dispatch.extend(job, ["b"])
    assert list(take(dispatch).items()) == ["b"]
    finish(dispatch, first)
    assert job.unsettled == 1


@pytest.mark.parametrize("end", [Dispatch.seal, Dispatch.cancel])
def test_a_stream_that_has_ended_takes_no_more(end: Callable[[Dispatch, Job], object]) -> None:
    dispatch = Dispatch(workers=1)
    job = stream()
    dispatch.add(job)
    end(dispatch, job)
    dispatch.extend(job, [1, 2])
    dispatch.validate()
    assert dispatch.idle and not job.items


# -- cancel


def test_cancel_drops_what_waits_and_leaves_what_was_sent() -> None:
    dispatch = Dispatch(workers=1)
    job = many(range(10))
    dispatch.add(job)
    first, second = take_all(dispatch)
    assert dispatch.cancel(job) == 8
    assert dispatch.cancel(job) == 0
    finish(dispatch, first)
    finish(dispatch, second)
    assert dispatch.idle and job.unsettled == 0


def test_cancel_of_one_job_leaves_the_others() -> None:
    dispatch = Dispatch(workers=1)
    first, second = many(range(3)), many(range(3, 5))
    dispatch.add(first)
    dispatch.add(second)
    assert dispatch.cancel(first) == 3
    dispatch.validate()
    assert [item for batch in take_all(dispatch) for item in batch.items()] == [3, 4]


def test_a_sent_task_of_a_cancelled_job_that_comes_back_is_sent_again() -> None:
    dispatch = Dispatch(workers=1)
    job = many(range(10))
    dispatch.add(job)
    batch = take(dispatch)
    assert dispatch.cancel(job) == 9
    dispatch.lost(batch.number)
    dispatch.validate()
    assert list(take(dispatch).items()) == [0]


def test_cancel_after_the_end_drops_nothing_a_second_time() -> None:
    dispatch = Dispatch(workers=1)
    job = many(range(10))
    dispatch.add(job)
    assert dispatch.abandon() == [(job, list(range(10)))]
    assert dispatch.cancel(job) == 0
    assert dispatch.queued == 0


# -- what comes back


def test_a_batch_that_could_not_be_sent_is_the_next_one_again() -> None:
    dispatch = Dispatch(workers=1)
    dispatch.add(many(range(100), known(5_000_000)))
    batch = take(dispatch)
    assert batch.items() == [0, 1]
    dispatch.unsend(batch)
    dispatch.validate()
    assert dispatch.queued == 100
    assert take(dispatch).items() == [0, 1]


def test_tasks_that_were_not_run_come_before_those_never_sent() -> None:
    dispatch = Dispatch(workers=1)
    dispatch.add(many(range(100), known(2_500_000)))
    batch = take(dispatch)
    assert batch.items() == [0, 1, 2, 3]
    dispatch.report(batch.number, 0, 2)
    dispatch.done(batch.number, 500_000, 2)
    dispatch.validate()
    assert take(dispatch).items() == [2, 3]


def test_calls_that_were_not_run_travel_together_again() -> None:
    dispatch = Dispatch(workers=1)
    timing = known(1000)
    for value in range(8):
        dispatch.add(call(value, timing))
    batch = take(dispatch)
    dispatch.lost(batch.number)
    dispatch.validate()
    assert take(dispatch).items() == [((value,), {}) for value in range(4)]


def test_a_report_of_a_batch_that_was_given_up_is_not_wanted() -> None:
    dispatch = Dispatch(workers=1)
    dispatch.add(many(range(2)))
    batch = take(dispatch)
    dispatch.lost(batch.number)
    assert dispatch.report(batch.number, 0, 1) is None
    dispatch.done(batch.number, 1, 1)
    dispatch.validate()
    assert dispatch.queued == 2


def test_a_report_that_repeats_itself_is_not_wanted() -> None:
    dispatch = Dispatch(workers=1)
    dispatch.add(many(range(100), known()))
    batch = take(dispatch)
    assert dispatch.report(batch.number, 0, 1) is batch
    assert dispatch.report(batch.number, 0, 1) is None
    dispatch.validate()


def test_the_refused_tasks_of_a_batch_are_dropped_and_the_others_sent() -> None:
    dispatch = Dispatch(workers=1)
    job = many(range(100), known(2_500_000))
    dispatch.add(job)
    batch = take(dispatch)
    assert dispatch.drop(batch, [1, 3]) == [(job, 1), (job, 3)]
    dispatch.validate()
    assert [item for _ in range(2) for item in take(dispatch).items()] == [0, 2]
    assert job.unsettled == 98


def test_a_batch_of_calls_goes_on_without_the_refused_ones() -> None:
    dispatch = Dispatch(workers=1)
    timing = known()
    jobs = [call(value, timing) for value in range(8)]
    for job in jobs:
        dispatch.add(job)
    batch = take(dispatch)
    assert dispatch.drop(batch, [0, 2]) == [(jobs[0], 0), (jobs[2], 0)]
    dispatch.validate()
    assert batch.items() == [((1,), {}), ((3,), {})]
    finish(dispatch, batch)
    assert dispatch.queued == 4


def test_a_batch_of_which_every_task_is_refused_frees_its_credit() -> None:
    dispatch = Dispatch(workers=1)
    dispatch.add(call(1))
    batch = take(dispatch)
    dispatch.drop(batch, [0])
    assert batch.stop == 0 and dispatch.idle


# -- deaths


def test_a_death_is_laid_on_the_task_that_ran() -> None:
    dispatch = Dispatch(workers=1)
    job = many(range(100), known(2_500_000))
    dispatch.add(job)
    batch = take(dispatch)
    dispatch.report(batch.number, 0, 1)
    assert dispatch.died(batch.number, 2) == (job, 2)
    dispatch.validate()
    assert [item for _ in range(2) for item in take(dispatch).items()] == [1, 3]
    assert job.unsettled == 98


def test_a_death_between_tasks_is_nobodys_fault() -> None:
    dispatch = Dispatch(workers=1)
    dispatch.add(many(range(100), known(2_500_000)))
    batch = take(dispatch)
    dispatch.report(batch.number, 0, 4)
    assert dispatch.died(batch.number, 3) is None
    dispatch.validate()
    assert dispatch.queued == 96


def test_a_death_in_a_batch_that_is_not_known_changes_nothing() -> None:
    dispatch = Dispatch(workers=1)
    dispatch.add(call(1))
    assert dispatch.died(99, 0) is None
    dispatch.validate()
    assert dispatch.queued == 1


@pytest.mark.parametrize("job", [call("x"), many(["x", "y"])])
def test_a_task_whose_worker_dies_is_run_again_as_often_as_allowed(job: Job) -> None:
    dispatch = Dispatch(workers=1, retries=2)
    dispatch.add(job)
    for _ in range(2):
        batch = take(dispatch)
        assert batch.task(0) == (job, 0)
        assert dispatch.died(batch.number, 0) is None
    assert dispatch.died(take(dispatch).number, 0) == (job, 0)
    dispatch.validate()


# -- stops


def test_what_is_stopped_is_dropped_where_it_waits_and_named_where_it_runs() -> None:
    dispatch = Dispatch(workers=1)
    first, second = many(range(100), known(2_500_000)), many(range(2))
    dispatch.add(first)
    dispatch.add(second)
    batch = take(dispatch)
    assert dispatch.stop(first) == 96
    dispatch.validate()
    assert dispatch.to_stop() == [(batch.number, index) for index in range(4)]
    assert dispatch.died(batch.number, 1) == (first, 1)
    dispatch.validate()
    assert first.unsettled == 0 and dispatch.to_stop() == [] and not dispatch.stopping
    assert list(take(dispatch).items()) == [0]


def test_a_stopped_task_is_not_run_again_whatever_the_retries() -> None:
    dispatch = Dispatch(workers=1, retries=3)
    job = call(1)
    dispatch.add(job)
    batch = take(dispatch)
    dispatch.stop(job)
    assert dispatch.died(batch.number, 0) == (job, 0)
    assert dispatch.idle


def test_a_task_whose_worker_was_ended_because_of_another_one_is_run_again() -> None:
    dispatch = Dispatch(workers=1)
    timing = known(1_000_000)
    jobs = [call(value, timing) for value in range(8)]
    for job in jobs:
        dispatch.add(job)
    batch = take(dispatch)
    dispatch.stop(jobs[0])
    assert dispatch.report(batch.number, 0, 1) is batch
    assert dispatch.died(batch.number, 1, ended=True) is None
    dispatch.validate()
    assert take(dispatch).task(0) == (jobs[1], 0)


# -- lost nodes


def test_tasks_of_a_lost_node_are_run_again_so_many_times() -> None:
    dispatch = Dispatch(workers=1)
    job = many(range(4), known(1))
    dispatch.add(job)
    for _ in range(NODE_LOSSES):
        assert dispatch.node_lost(take(dispatch).number) == []
        dispatch.validate()
    lost: list[tuple[Job, int]] = []
    while dispatch.queue:
        lost += dispatch.node_lost(take(dispatch).number)
        dispatch.validate()
    assert job.unsettled == 4 - len(set(lost)) == 0


# -- thefts


def stuck_batch() -> tuple[Dispatch, Batch]:
    """A batch of four, all there is, with an idle worker beside the one that has it."""
    dispatch = Dispatch(workers=2)
    timing = known(1)
    dispatch.add(many(range(16), timing))
    batch = take(dispatch)
    assert batch.stop == 4
    timing.estimate_ns = None
    while dispatch.queue:
        other = take(dispatch)
        finish(dispatch, other)
    return dispatch, batch


def test_a_batch_is_stuck_once_it_has_taken_long_while_a_worker_idles() -> None:
    dispatch, batch = stuck_batch()
    assert dispatch.steal_at() == STEAL_AFTER_S
    assert dispatch.should_steal(STEAL_AFTER_S / 2) == []
    assert dispatch.should_steal(STEAL_AFTER_S) == [batch]


def test_while_the_queue_feeds_everyone_a_batch_must_have_been_out_for_far_longer() -> None:
    dispatch, batch = stuck_batch()
    dispatch.add(call(1))
    assert dispatch.should_steal(STEAL_AFTER_S) == []
    assert dispatch.steal_at() == STEAL_AFTER_S + STEAL_RECHECK_S
    take(dispatch)
    assert dispatch.should_steal(2 * STEAL_AFTER_S) == []
    assert dispatch.steal_at() == 2 * STEAL_AFTER_S + STEAL_RECHECK_S
    assert dispatch.should_steal(STEAL_RECHECK_S) == [batch]
    assert dispatch.should_steal(2 * STEAL_RECHECK_S - 0.001) == []
    assert dispatch.should_steal(2 * STEAL_RECHECK_S) == [batch]


def test_a_stuck_batch_is_found_as_soon_as_a_worker_idles() -> None:
    dispatch, batch = stuck_batch()
    dispatch.add(call(1))
    other = take(dispatch)
    assert dispatch.should_steal(STEAL_AFTER_S) == []
    finish(dispatch, other)
    assert dispatch.should_steal(STEAL_AFTER_S + 0.001) == [batch]


def test_a_batch_from_which_nothing_could_be_taken_is_asked_for_less_and_less_often() -> None:
    dispatch, batch = stuck_batch()
    now, asked = 0.0, 0
    while now < 10.0:
        at = dispatch.steal_at()
        assert at is not None and at > now
        now = at
        asked += len(dispatch.should_steal(now))
    assert asked <= 12


def test_a_batch_of_one_task_is_never_stuck() -> None:
    dispatch = Dispatch(workers=2)
    dispatch.add(call(1))
    take(dispatch)
    assert dispatch.steal_at() is None
    assert dispatch.should_steal(100.0) == []


def test_the_unreported_rest_of_one_task_is_never_stuck() -> None:
    dispatch, batch = stuck_batch()
    dispatch.report(batch.number, 0, 3)
    assert dispatch.steal_at() is None
    assert dispatch.should_steal(100.0) == []


def test_stolen_tasks_go_to_the_idle_worker() -> None:
    dispatch, batch = stuck_batch()
    dispatch.stolen(batch.number, 3, 1.0)
    dispatch.validate()
    assert [item for _ in range(3) for item in take(dispatch).items()] == [1, 2, 3]
    assert dispatch.report(batch.number, 0, 1) is batch
    dispatch.done(batch.number, 1_000_000, 1)
    dispatch.validate()


def test_a_theft_from_a_batch_that_is_gone_changes_nothing() -> None:
    dispatch, batch = stuck_batch()
    finish(dispatch, batch)
    dispatch.stolen(batch.number, 3, 1.0)
    dispatch.validate()
    assert dispatch.idle


# -- the end


def test_abandon_names_every_task_without_an_outcome_once() -> None:
    dispatch = Dispatch(workers=1)
    job, open_job = many(range(100), known(2_500_000)), stream()
    dispatch.add(job)
    dispatch.add(open_job)
    batch = take(dispatch)
    dispatch.report(batch.number, 0, 1)
    dispatch.lost(take(dispatch).number)
    left = dict(dispatch.abandon())
    assert sorted(left[job]) == list(range(1, 100))
    assert left[open_job] == []
    assert dispatch.idle and dispatch.queued == 0
    assert dispatch.abandon() == []


# -- any mix of events, beside a model

WAITING, SETTLED, DROPPED, GUILTY, ABANDONED = "waiting", "settled", "dropped", "guilty", "abandoned"


class TaskState:
    """What the model knows about one task."""

    def __init__(self, job: Job, index: int) -> None:
        self.key = (job, index)
        self.state: str | int = WAITING  # or the number of the batch that it is in
        self.deaths = 0
        self.losses = 0

    def come_back(self) -> None:
        self.state = DROPPED if self.key[0].stopped else WAITING


class Books(RuleBasedStateMachine):
    """Every event in any order. The model keeps one state a task and knows nothing of queues or ranges."""

    def __init__(self) -> None:
        super().__init__()
        self.retries = 1
        self.dispatch = Dispatch(workers=2, retries=self.retries)
        self.now = 0.0
        self.jobs: list[Job] = []
        self.tasks: dict[tuple[Job, int], TaskState] = {}
        self.batches: dict[int, tuple[Batch, list[TaskState]]] = {}  # in flight, and their tasks
        self.gone: list[Batch] = []
        self.timings = {name: known(estimate) for name, estimate in [("f", 1000), ("g", None), ("h", 400_000)]}
        self.ended = False

    def waiting(self, job: Job | None = None) -> list[TaskState]:
        return [task for task in self.tasks.values() if task.state == WAITING and job in (None, task.key[0])]

    def _add(self, job: Job) -> None:
        self.jobs.append(job)
        self._grow(job)
        self.dispatch.add(job)

    def _grow(self, job: Job) -> None:
        for index in range(-(-len(job.items) // job.chunk)):
            self.tasks.setdefault((job, index), TaskState(job, index))

    def _batch(self, data: st.DataObject) -> tuple[Batch, list[TaskState]]:
        return self.batches[data.draw(st.sampled_from(sorted(self.batches)))]

    def _leave(self, batch: Batch, tasks: Sequence[TaskState]) -> None:
        del self.batches[batch.number]
        self.gone.append(batch)
        for task in tasks:
            task.come_back()

    # What the door does.

    @precondition(lambda self: not self.ended)
    @rule(name=st.sampled_from("fgh"), count=st.integers(1, 6), asks_start=st.booleans())
    def add_calls(self, name: str, count: int, asks_start: bool) -> None:
        for value in range(count):
            self._add(call(value, self.timings[name], name, asks_start))

    @precondition(lambda self: not self.ended)
    @rule(name=st.sampled_from("fgh"), length=st.integers(0, 40), chunk=st.sampled_from([1, 1, 2, 5]))
    def add_many(self, name: str, length: int, chunk: int) -> None:
        self._add(Job(name, self.timings[name], MAP if chunk == 1 else MAP_CHUNK, list(range(length)), SINK, chunk))

    @precondition(lambda self: not self.ended)
    @rule(name=st.sampled_from("fgh"))
    def open_stream(self, name: str) -> None:
        self._add(Job(name, self.timings[name], MAP, [], SINK, open=True))

    @precondition(lambda self: self.jobs and not self.ended)
    @rule(data=st.data(), count=st.integers(0, 5))
    def extend(self, data: st.DataObject, count: int) -> None:
        streams = [job for job in self.jobs if isinstance(job.items, list) and job.chunk == 1]
        if streams:
            job = data.draw(st.sampled_from(streams))
            before = len(job.items)
            was_open = job.open
            self.dispatch.extend(job, [before + i for i in range(count)])
            assert len(job.items) == before + (count if was_open else 0)
            self._grow(job)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def seal(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(self.jobs))
        self.dispatch.seal(job)
        assert not job.open

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(self.jobs))
        dropped = self.waiting(job)
        assert self.dispatch.cancel(job) == len(dropped)
        for task in dropped:
            task.state = DROPPED

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def stop(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(self.jobs))
        dropped = self.waiting(job)
        assert self.dispatch.stop(job) == len(dropped)
        for task in dropped:
            task.state = DROPPED

    # What the driver does.

    @rule()
    def look_for_what_is_to_be_stopped(self) -> None:
        expected = {(number, index) for number, (batch, tasks) in self.batches.items()
                    for index in range(batch.reported, batch.stop) if tasks[index].key[0].stopped}
        found = self.dispatch.to_stop()
        assert set(found) == expected and len(found) == len(expected)
        assert self.dispatch.stopping == bool(expected)

    @rule(workers=st.integers(0, 4))
    def workers_come_and_go(self, workers: int) -> None:
        self.dispatch.workers = workers

    @rule(limit=st.integers(1, 4))
    def send(self, limit: int) -> None:
        for _ in range(limit):
            self.now += 0.001
            waits = bool(self.waiting())
            room = len(self.batches) < CREDITS_PER_WORKER * self.dispatch.workers
            batch = self.dispatch.next_batch(self.now)
            assert (batch is not None) == (waits and room)
            if batch is None:
                return
            tasks = [self.tasks[batch.task(index)] for index in range(batch.stop)]
            assert 1 <= len(tasks) <= MAX_BATCH_TASKS
            assert len({job.function for job, _ in (task.key for task in tasks)}) == 1
            assert len({job.mode for job, _ in (task.key for task in tasks)}) == 1
            assert list(batch.items()) == [job.item(index) for job, index in (task.key for task in tasks)]
            for task in tasks:
                assert task.state == WAITING
                task.state = batch.number
            self.batches[batch.number] = batch, tasks

    def _fresh(self, data: st.DataObject) -> tuple[Batch, list[TaskState]] | None:
        fresh = [number for number, (batch, tasks) in self.batches.items()
                 if batch.reported == 0 and batch.stop == len(tasks)]
        return self.batches[data.draw(st.sampled_from(fresh))] if fresh else None

    @precondition(lambda self: self.batches)
    @rule(data=st.data())
    def unsend(self, data: st.DataObject) -> None:
        found = self._fresh(data)
        if found is not None:
            batch, tasks = found
            self.dispatch.unsend(batch)
            self._leave(batch, tasks)

    @precondition(lambda self: self.batches)
    @rule(data=st.data())
    def refuse(self, data: st.DataObject) -> None:
        found = self._fresh(data)
        if found is None:
            return
        batch, tasks = found
        indexes = sorted(data.draw(st.sets(st.integers(0, batch.stop - 1), min_size=1)))
        assert self.dispatch.drop(batch, indexes) == [tasks[index].key for index in indexes]
        kept = [task for index, task in enumerate(tasks) if index not in indexes]
        for index in indexes:
            tasks[index].state = DROPPED
        if batch.number in self.dispatch.inflight:
            assert [batch.task(index) for index in range(batch.stop)] == [task.key for task in kept]
            self.batches[batch.number] = batch, kept
        else:
            self._leave(batch, kept)

    # What the workers do.

    @precondition(lambda self: self.batches)
    @rule(data=st.data())
    def report(self, data: st.DataObject) -> None:
        batch, tasks = self._batch(data)
        count = data.draw(st.integers(0, batch.stop - batch.reported))
        first = batch.reported
        assert self.dispatch.report(batch.number, first, count) is batch
        for task in tasks[first:first + count]:
            assert task.state == batch.number
            task.state = SETTLED

    @precondition(lambda self: self.batches)
    @rule(data=st.data(), per_task_ns=st.sampled_from([1, 1000, 100_000, 1_000_000_000]))
    def done(self, data: st.DataObject, per_task_ns: int) -> None:
        batch, tasks = self._batch(data)
        reported = batch.reported
        estimate = batch.timing.estimate_ns
        self.dispatch.done(batch.number, per_task_ns * reported, reported)
        if reported:
            seen = batch.timing.estimate_ns
            assert seen is not None
            assert min(per_task_ns, estimate or per_task_ns) <= seen <= max(per_task_ns, estimate or per_task_ns)
        self._leave(batch, tasks[reported:batch.stop])

    @precondition(lambda self: self.batches)
    @rule(data=st.data(), ended=st.booleans())
    def died(self, data: st.DataObject, ended: bool) -> None:
        batch, tasks = self._batch(data)
        running = data.draw(st.integers(0, batch.stop))
        reported = batch.reported
        guilty = self.dispatch.died(batch.number, running, ended)
        rest = tasks[reported:len(tasks)]
        rest = [task for task in rest if task.state == batch.number]
        self._leave(batch, rest)
        if reported <= running < reported + len(rest):
            culprit = tasks[running]
            stopped = culprit.key[0].stopped
            spared = ended and not stopped
            culprit.deaths += not spared
            if not spared and (stopped or culprit.deaths > self.retries):
                assert guilty == culprit.key
                culprit.state = GUILTY
                return
        assert guilty is None

    @precondition(lambda self: self.batches)
    @rule(data=st.data())
    def lost(self, data: st.DataObject) -> None:
        batch, tasks = self._batch(data)
        reported, stop = batch.reported, batch.stop
        self.dispatch.lost(batch.number)
        self._leave(batch, tasks[reported:stop])

    @precondition(lambda self: self.batches)
    @rule(data=st.data())
    def node_lost(self, data: st.DataObject) -> None:
        batch, tasks = self._batch(data)
        rest = tasks[batch.reported:batch.stop]
        doomed = self.dispatch.node_lost(batch.number)
        self._leave(batch, rest)
        expected = []
        for task in rest:
            task.losses += 1
            if task.losses > NODE_LOSSES:
                expected.append(task.key)
                task.state = GUILTY
        assert doomed == expected

    @precondition(lambda self: self.batches)
    @rule(data=st.data())
    def steal(self, data: st.DataObject) -> None:
        batch, tasks = self._batch(data)
        count = data.draw(st.integers(0, batch.stop - batch.reported))
        kept = batch.stop - count
        self.now += 0.01
        self.dispatch.stolen(batch.number, count, self.now)
        for task in tasks[kept:kept + count]:
            assert task.state == batch.number
            task.come_back()

    @rule()
    def look_for_stuck_batches(self) -> None:
        at = self.dispatch.steal_at()
        several = [batch for batch, _ in self.batches.values() if batch.stop - batch.reported > 1]
        assert (at is None) == (not several)
        if at is not None:
            self.now = max(self.now, at)
            stuck = self.dispatch.should_steal(self.now)
            assert all(batch in several for batch in stuck)
            if self.waiting() or len(self.batches) >= self.dispatch.workers:  # everyone has work
                assert all(self.now - batch.sent_at >= STEAL_RECHECK_S for batch in stuck)
            again = self.dispatch.steal_at()
            assert again is not None and again > self.now

    @precondition(lambda self: self.gone)
    @rule(data=st.data(), first=st.integers(0, 3), count=st.integers(0, 3))
    def late_news(self, data: st.DataObject, first: int, count: int) -> None:
        batch = data.draw(st.sampled_from(self.gone))
        if batch.number in self.dispatch.inflight:
            return
        assert self.dispatch.report(batch.number, first, count) is None
        assert self.dispatch.died(batch.number, first) is None
        self.dispatch.done(batch.number, 1000, count)
        self.dispatch.lost(batch.number)
        assert self.dispatch.node_lost(batch.number) == []
        self.dispatch.stolen(batch.number, count, self.now)

    @precondition(lambda self: len(self.jobs) > 5)
    @rule()
    def abandon(self) -> None:
        named = [(job, index) for job, indexes in self.dispatch.abandon() for index in indexes]
        expected = [key for key, task in self.tasks.items() if task.state == WAITING or isinstance(task.state, int)]
        assert len(named) == len(set(named))
        assert set(named) == set(expected)
        for key in named:
            self.tasks[key].state = ABANDONED
        self.gone.extend(batch for batch, _ in self.batches.values())
        self.batches.clear()
        self.ended = True
        assert self.dispatch.idle

    # What must always hold.

    @invariant()
    def books_agree(self) -> None:
        self.dispatch.validate()
        assert self.dispatch.queued == len(self.waiting())
        assert set(self.dispatch.inflight) == set(self.batches)
        opened = any(job.open for job in self.jobs) and not self.ended
        assert self.dispatch.idle == (not self.waiting() and not self.batches and not opened)
        if not self.ended:
            for job in self.jobs:
                left = sum(1 for (owner, _), task in self.tasks.items()
                           if owner is job and (task.state == WAITING or isinstance(task.state, int)))
                assert job.unsettled == left

    def teardown(self) -> None:
        """Workers that run all there is: every task ends with exactly one outcome."""
        self.dispatch.workers = 2
        for job in self.jobs:
            self.dispatch.seal(job)
        for batch, tasks in list(self.batches.values()):
            self._run(batch, tasks)
        while (batch_ := self.dispatch.next_batch(self.now)) is not None:
            tasks = [self.tasks[batch_.task(index)] for index in range(batch_.stop)]
            for task in tasks:
                assert task.state == WAITING
                task.state = batch_.number
            self._run(batch_, tasks)
        assert self.dispatch.idle
        assert {task.state for task in self.tasks.values()} <= {SETTLED, DROPPED, GUILTY, ABANDONED}

    def _run(self, batch: Batch, tasks: list[TaskState]) -> None:
        for task in tasks[batch.reported:batch.stop]:
            assert task.state == batch.number
            task.state = SETTLED
        finish(self.dispatch, batch)


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)


# -- order of service: Dispatch, and workers that run in a time of their own


class Floor:
    """Workers on one shared queue of messages, as dpool.cluster.worker.main runs them, in simulated time."""

    def __init__(self, durations: Sequence[float], workers: int) -> None:
        self.durations = durations
        self.dispatch = Dispatch(workers)
        self.socket: deque[Batch] = deque()
        self.idle = workers
        self.running: dict[int, tuple[Batch, int, float]] = {}  # batch -> the task it is in, and since when
        self.events: list[tuple[float, int, int]] = []  # (when, batch, task that ends then)
        self.now = 0.0
        self.outcomes: list[int] = []

    def makespan(self) -> float:
        """Run every task; when the last one ended."""
        job = Job("f", Timing(), MAP, list(self.durations), SINK)
        self.dispatch.add(job)
        while True:
            self._pump()
            at = self.dispatch.steal_at()
            if self.events and (at is None or self.events[0][0] <= at):
                self.now, number, task = heapq.heappop(self.events)
                self._end_of_task(number, task)
            elif at is not None:
                self.now = max(self.now, at)
            else:
                break
            for batch in self.dispatch.should_steal(self.now):
                if batch.number in self.running:
                    begun = self.running[batch.number][1] + 1
                    self.dispatch.stolen(batch.number, batch.stop - begun, self.now)
            self.dispatch.validate()
        assert self.dispatch.idle
        assert sorted(self.outcomes) == list(range(len(self.durations)))
        return self.now

    def _pump(self) -> None:
        while (batch := self.dispatch.next_batch(self.now)) is not None:
            self.socket.append(batch)
        while self.idle and self.socket:
            self.idle -= 1
            batch = self.socket.popleft()
            self._begin(batch, 0, self.now)

    def _begin(self, batch: Batch, task: int, since: float) -> None:
        self.running[batch.number] = batch, task, since
        heapq.heappush(self.events, (self.now + batch.items()[task], batch.number, task))

    def _end_of_task(self, number: int, task: int) -> None:
        batch, _, since = self.running[number]
        if task + 1 < batch.stop:
            return self._begin(batch, task + 1, since)
        del self.running[number]
        assert self.dispatch.report(number, 0, batch.stop) is batch
        self.outcomes.extend(batch.first + index for index in range(batch.stop))
        self.dispatch.done(number, int((self.now - since) * 1e9), batch.stop)
        self.idle += 1


@pytest.mark.parametrize("place", [0, 1, 2, 5, 50, 100, 150, 198, 199, 200])
def test_short_tasks_do_not_wait_behind_a_long_one_wherever_it_stands(place: int) -> None:
    durations = [0.001] * 200
    durations.insert(place, 1.0)
    # The ideal with the long one last is 0.1 + 1 s: what comes before it takes its time first.
    begun = place * 0.001 / 2
    assert Floor(durations, workers=2).makespan() <= begun + 1.0 + 0.02


def test_tasks_that_become_a_thousand_times_longer_midway_keep_every_worker_busy() -> None:
    durations = [0.0001] * 2000 + [0.1] * 40
    ideal = sum(durations) / 4
    assert Floor(durations, workers=4).makespan() <= ideal * 1.05 + 0.1


def test_tasks_that_become_a_thousand_times_shorter_midway_keep_every_worker_busy() -> None:
    durations = [0.1] * 40 + [0.0001] * 2000
    ideal = sum(durations) / 4
    assert Floor(durations, workers=4).makespan() <= ideal * 1.05 + 0.1


def test_equal_tasks_end_within_five_percent_of_the_ideal() -> None:
    assert Floor([0.001] * 2000, workers=2).makespan() <= 1.0 * 1.05
