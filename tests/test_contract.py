"""What every engine owes a door (dpool/engine.py): one body of tests, over each engine that there is.

The in-process engine is held to the same promises as real workers, so tests of doors may rely on it.
"""

from __future__ import annotations

import functools
import os
import pickle
import socket
import threading
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import deeds
import pytest
from leftovers import PATIENCE_S, Census, Watched

from dpool import engine, session
from dpool.embedded import EmbeddedEngine
from dpool.engine import CALL, MAP, MAP_CHUNK, STAR, STAR_CHUNK, Failure, GroupSpec
from dpool.errors import ForeignProcess, GroupBroken, GroupClosed, GroupTerminated, RemoteError, WorkerDied
from dpool.multiprocessing.pool import MaybeEncodingError, Pool  # type: ignore[attr-defined]
from dpool.testing import Die, InProcessEngine


def die() -> None:
    """What deeds.kill_self is to a process."""
    raise Die(-9)


def die_if_7(value: int) -> int:
    if value == 7:
        raise Die(-9)
    return value


def die_until(path: str, deaths: int) -> int:
    with open(path, "ab", buffering=0) as file:
        if file.tell() >= deaths:
            return deaths
        file.write(b".")
    raise Die(-9)


def kill_if_7(value: int) -> int:
    return deeds.kill_self_if(value, 7)


class House:
    """An engine under test, and what differs between engines by their nature."""

    def __init__(self, name: str) -> None:
        self.has_processes = name != "in-process"
        self.method = name if self.has_processes else "fork"
        self.engine: Any = EmbeddedEngine() if self.has_processes else InProcessEngine()
        self.kill: Callable[[], None] = deeds.kill_self if self.has_processes else die
        self.kill_if_7 = kill_if_7 if self.has_processes else die_if_7
        self.kill_until = deeds.kill_self_until if self.has_processes else die_until
        self.groups: list[Any] = []

    def open(self, processes: int = 2, **options: Any) -> Any:
        group = self.engine.open_group(GroupSpec(processes, get_context(self.method), **options))
        self.groups.append(group)
        return group


@pytest.fixture(params=["in-process", "fork"])
def house(request: pytest.FixtureRequest) -> Iterator[House]:
    """Every engine. Whatever a test does with its groups, they end, and nothing is left."""
    census = Census()
    made = House(request.param)
    yield made
    while made.groups:
        group = made.groups.pop()
        group.terminate()
        assert group.join(PATIENCE_S), "join() hangs after terminate()"
        assert not group.processes
        del group
    census.check()


# For what depends on how workers are started; the rest of the contract would say the same three times.
every_engine = pytest.mark.parametrize("house", ["in-process", "fork", "forkserver", "spawn"], indirect=True)


class Outcomes:
    """A sink that keeps what it is told, and fails the test if a task is told of twice."""

    def __init__(self, starts: bool = True) -> None:
        self.values: dict[int, Any] = {}
        self.failures: dict[int, Failure] = {}
        self.threads: set[threading.Thread] = set()
        self.twice: list[int] = []
        self.starts = starts
        self._told = threading.Condition()

    def start(self) -> bool:
        return self.starts

    def set(self, first: int, values: Any) -> None:
        with self._told:
            for index, value in enumerate(values, first):
                self._once(index)
                self.values[index] = value

    def fail(self, index: int, failure: Failure) -> None:
        with self._told:
            self._once(index)
            self.failures[index] = failure

    def _once(self, index: int) -> None:
        if index in self.values or index in self.failures:
            self.twice.append(index)
        self.threads.add(threading.current_thread())
        self._told.notify_all()

    def wait(self, count: int = 1) -> Outcomes:
        """Until `count` tasks have an outcome."""
        with self._told:
            assert self._told.wait_for(lambda: len(self.values) + len(self.failures) >= count, PATIENCE_S), "hangs"
        assert not self.twice
        return self

    def list(self) -> list[Any]:
        return [self.values[index] for index in range(len(self.values))]


def call(group: Any, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The value of one call, or what it failed with."""
    outcome = Outcomes()
    group.submit(function, args, kwargs, outcome)
    outcome.wait()
    return outcome.values[0] if outcome.values else outcome.failures[0]


def works(group: Any) -> None:
    outcome = Outcomes()
    group.submit_many(deeds.double, range(50), MAP, outcome)
    assert outcome.wait(50).list() == list(range(0, 100, 2))


def end(group: Any) -> None:
    group.close()
    assert group.join(PATIENCE_S), "join() hangs after close()"


class Held:
    """A group of one worker, which is in a task until the block ends, or release() is called."""

    def __init__(self, house: House, tmp_path: Path, **options: Any) -> None:
        self._fifo, self._answer = str(tmp_path / "fifo"), str(tmp_path / "answer")
        os.mkfifo(self._fifo)
        os.mkfifo(self._answer)
        self._told, self._release = (os.open(path, os.O_RDWR) for path in (self._fifo, self._answer))
        self.group = house.open(1, **options)
        self.outcome = Outcomes()
        self.released = False

    def __enter__(self) -> Held:
        self.job = self.group.submit(deeds.tell_and_wait, (self._fifo, self._answer), {}, self.outcome)
        os.read(self._told, 100)
        return self

    def release(self) -> None:
        if not self.released:
            self.released = True
            os.write(self._release, b"done\n")

    def __exit__(self, *_: object) -> None:
        self.release()
        self.group.terminate()
        assert self.group.join(PATIENCE_S)
        os.close(self._told)
        os.close(self._release)


# -- values


@pytest.mark.parametrize("function, args, kwargs, value", [
    (deeds.double, (21,), {}, 42),
    (dict, (), {"a": 1}, {"a": 1}),
    (lambda x: x + 1, (1,), {}, 2),
    (deeds.identity, (None,), {}, None),
    (deeds.identity, (ValueError("returned"),), {}, None),
])
def test_a_call_has_its_value(house: House, function: Any, args: Any, kwargs: Any, value: Any) -> None:
    found = call(house.open(), function, *args, **kwargs)
    assert found == value or (isinstance(found, ValueError) and found.args == ("returned",))


@pytest.mark.parametrize("mode, chunk, items, values", [
    (MAP, 1, [1, 2, 3], [2, 4, 6]),
    (STAR, 1, [(1,), (2,)], [2, 4]),
    (MAP_CHUNK, 2, [1, 2, 3], [[2, 4], [6]]),
    (STAR_CHUNK, 2, [(1,), (2,), (3,)], [[2, 4], [6]]),
    (MAP_CHUNK, 5, [1], [[2]]),
    (CALL, 1, [((1,), {}), ((), {"value": 2})], [2, 4]),
])
def test_each_mode_calls_as_it_says(house: House, mode: int, chunk: int, items: Any, values: Any) -> None:
    outcome = Outcomes()
    house.open().submit_many(deeds.double, items, mode, outcome, chunk)
    assert outcome.wait(len(values)).list() == values


@every_engine
def test_each_of_many_tasks_is_told_once_under_its_own_number(house: House) -> None:
    outcome = Outcomes()
    group = house.open()
    group.submit_many(deeds.double, range(2000), MAP, outcome)
    end(group)
    assert outcome.wait(2000).list() == list(range(0, 4000, 2))


def test_an_argument_is_a_copy(house: House) -> None:
    value = [1]
    found = call(house.open(), deeds.identity, value)
    assert found == value and found is not value


@pytest.mark.parametrize("size, count", [(1, 200), (100_000, 200), (2_000_000, 30)])
def test_a_result_is_what_it_was_when_its_task_ended(house: House, size: int, count: int) -> None:
    """Tasks that travel together return the same object, each with its own content."""
    outcome = Outcomes()
    house.open(1).submit_many(deeds.write, [(value, size) for value in range(count)], STAR, outcome)
    assert [(value, data[-1]) for value, data in outcome.wait(count).list()] == [(n, n) for n in range(count)]


@pytest.mark.parametrize("function, value", [
    (deeds.Counts(), (1, 0)),
    (deeds.Counts(1), (1, 1)),
    (deeds.Counts(100_000), (1, 1)),
    (functools.partial(deeds.add_to, []), 1),
    ([3, 2, 1].pop, 1),
])
def test_a_task_does_not_see_what_others_did_to_their_function(house: House, function: Any, value: Any) -> None:
    outcome = Outcomes()
    group = house.open(1)
    group.submit_many(function, [-1] * 200, MAP, outcome)
    assert outcome.wait(200).list() == [value] * 200
    calls = [Outcomes() for _ in range(200)]
    for each in calls:
        group.submit(function, (-1,), {}, each)
    assert [each.wait().values[0] for each in calls] == [value] * 200


def test_a_method_of_a_list_is_sent_with_the_list_as_it_is_at_each_call(house: House) -> None:
    group, numbers = house.open(1), [1]
    method = numbers.copy
    assert call(group, method) == [1]
    numbers.append(2)
    assert call(group, method) == [1, 2]


def test_sinks_are_told_by_the_group_and_may_submit_again(house: House) -> None:
    group = house.open()
    second = Outcomes()

    class Again(Outcomes):
        def set(self, first: int, values: Any) -> None:
            group.submit(deeds.double, (values[0],), {}, second)
            super().set(first, values)

    again = Again()
    group.submit(deeds.double, (1,), {}, again)
    assert second.wait().list() == [4]
    assert threading.main_thread() not in again.wait().threads


# -- failures, each kind


@every_engine
def test_what_a_task_raises_arrives_with_its_traceback(house: House) -> None:
    group = house.open()
    failure = call(group, deeds.raise_error, ValueError, "why")
    assert failure.kind == engine.RAISED
    assert type(failure.exception) is ValueError and failure.exception.args == ("why",)
    assert "in raise_error" in failure.traceback
    works(group)


def test_an_exception_that_cannot_be_rebuilt_arrives_as_its_text(house: House) -> None:
    failure = call(house.open(), deeds.raise_error, deeds.NeedsTwo, "one", "two")
    assert failure.kind == engine.RAISED
    assert type(failure.exception) is RemoteError
    assert str(failure.exception) == "one and two" and failure.exception.type_name == "deeds.NeedsTwo"


def test_a_result_that_cannot_be_pickled_is_lost(house: House) -> None:
    group = house.open()
    failure = call(group, deeds.make_lock)
    assert failure.kind == engine.RESULT_LOST
    assert "_thread.lock" in str(failure.exception) and "lock" in failure.value_repr
    works(group)


def test_a_result_that_cannot_be_rebuilt_is_broken(house: House) -> None:
    group = house.open()
    failure = call(group, deeds.make_loads, deeds.raise_error, ZeroDivisionError)
    assert failure.kind == engine.RESULT_BROKEN
    assert type(failure.exception) is ZeroDivisionError
    works(group)


def test_an_argument_that_cannot_be_pickled_is_lost(house: House) -> None:
    group = house.open()
    failure = call(group, deeds.identity, threading.Lock())
    assert failure.kind == engine.ARGUMENT_LOST
    assert isinstance(failure.exception, (TypeError, pickle.PicklingError))
    works(group)


def test_one_bad_argument_of_many_spoils_itself_alone(house: House) -> None:
    outcome = Outcomes()
    items = [*range(30), threading.Lock(), *range(31, 60)]
    house.open().submit_many(deeds.identity, items, MAP, outcome)
    outcome.wait(60)
    assert set(outcome.failures) == {30}
    assert outcome.values == {number: number for number in range(60) if number != 30}


def test_an_argument_that_cannot_be_rebuilt_is_broken(house: House) -> None:
    group = house.open()
    failure = call(group, deeds.identity, deeds.Loads(deeds.raise_error, ZeroDivisionError))
    assert failure.kind == engine.ARGUMENT_BROKEN
    assert type(failure.exception) is ZeroDivisionError
    works(group)


def test_a_function_that_cannot_be_sent_is_refused_at_the_call(house: House) -> None:
    group = house.open()
    lock = threading.Lock()
    with pytest.raises((TypeError, pickle.PicklingError)):
        group.submit(lambda: lock, (), {}, Outcomes())
    works(group)


def test_what_cannot_be_called_fails_like_any_call(house: House) -> None:
    failure = call(house.open(), 3)  # type: ignore[arg-type]
    assert failure.kind == engine.RAISED
    assert type(failure.exception) is TypeError and "'int' object is not callable" in str(failure.exception)


@every_engine
def test_a_death_fails_the_task_that_ran_and_the_worker_is_replaced(house: House) -> None:
    group = house.open()
    works(group)
    failure = call(group, house.kill)
    assert failure.kind == engine.WORKER_DIED
    error = failure.exception
    assert type(error) is WorkerDied
    assert (error.exitcode, error.host, error.task, error.attempts) == (-9, os.uname().nodename, 0, 1)
    works(group)
    assert len(group.processes) == 2
    assert error.pid not in {process.pid for process in group.processes}


@every_engine
def test_a_death_in_a_map_leaves_every_other_task_its_value(house: House) -> None:
    group = house.open()
    works(group)
    outcome = Outcomes()
    group.submit_many(house.kill_if_7, range(200), MAP, outcome)
    outcome.wait(200)
    assert set(outcome.failures) == {7}
    assert outcome.values == {number: number for number in range(200) if number != 7}


@pytest.mark.parametrize("deaths, attempts", [(2, 0), (99, 3)])
def test_retries_are_as_many_as_the_group_says(house: House, deaths: int, attempts: int, tmp_path: Path) -> None:
    group = house.open(retries=2)
    found = call(group, house.kill_until, str(tmp_path / "deaths"), deaths)
    if attempts:
        assert found.kind == engine.WORKER_DIED and found.exception.attempts == attempts
    else:
        assert found == deaths
    works(group)


def test_where_one_death_breaks_the_group_nothing_runs_any_more(house: House) -> None:
    group = house.open(break_on_death=True)
    guilty, others = Outcomes(), Outcomes()
    group.submit(house.kill, (), {}, guilty)
    try:
        group.submit_many(deeds.double, range(100), MAP, others)
        others.wait(100)
        assert {failure.kind for failure in others.failures.values()} <= {engine.ABANDONED}
    except GroupBroken:
        pass  # it broke before they were accepted
    assert guilty.wait().failures[0].kind == engine.WORKER_DIED
    assert group.join(PATIENCE_S)
    assert isinstance(group.ended, GroupBroken)
    with pytest.raises(GroupBroken):
        group.submit(deeds.double, (1,), {}, Outcomes())


@every_engine
def test_an_initializer_that_raises_breaks_the_group_with_its_exception(house: House) -> None:
    group = house.open(initializer=deeds.raise_error, initargs=(OSError, 5, "no such luck"))
    outcome = Outcomes()
    try:
        group.submit(deeds.double, (1,), {}, outcome)
        error: BaseException = outcome.wait().failures[0].exception
    except GroupBroken as broken:
        error = broken
    assert type(error) is GroupBroken and "no such luck" in str(error)
    assert type(error.__cause__) is OSError
    assert group.join(PATIENCE_S)


def test_an_initializer_that_kills_breaks_the_group_in_the_end(house: House) -> None:
    group = house.open(initializer=house.kill)
    outcome = Outcomes()
    try:
        group.submit(deeds.double, (1,), {}, outcome)
        error: BaseException = outcome.wait().failures[0].exception
    except GroupBroken as broken:
        error = broken
    assert type(error) is GroupBroken and "before they were ready" in str(error)
    assert group.join(PATIENCE_S)


# -- streams


def test_a_stream_s_items_run_as_they_come(house: House) -> None:
    group = house.open()
    outcome = Outcomes()
    stream = group.open_stream(deeds.double, MAP, outcome)
    for number in range(100):
        stream.push(number)
        if number % 10 == 0:
            outcome.wait(number + 1)
    stream.seal()
    assert outcome.wait(100).list() == list(range(0, 200, 2))


@every_engine
def test_a_closed_group_waits_for_its_open_streams(house: House) -> None:
    group = house.open()
    outcome = Outcomes()
    stream = group.open_stream(deeds.double, MAP, outcome)
    group.close()
    assert not group.join(0)
    stream.push(1)
    assert outcome.wait().list() == [2]
    stream.push(2)
    stream.seal()
    assert group.join(PATIENCE_S)
    assert outcome.wait(2).list() == [2, 4]


def test_a_stream_takes_items_as_they_are_when_they_are_pushed(house: House, tmp_path: Path) -> None:
    with Held(house, tmp_path) as held:
        outcome = Outcomes()
        stream = held.group.open_stream(deeds.identity, MAP, outcome, as_pushed=True)
        item = [0]
        for number in range(20):
            item[0] = number
            stream.push(item)
        stream.seal()
        held.release()
        assert outcome.wait(20).list() == [[number] for number in range(20)]


def test_a_stream_with_nothing_in_it_ends(house: House) -> None:
    group = house.open()
    group.open_stream(deeds.double, MAP, Outcomes()).seal()
    end(group)


def test_an_item_pushed_to_a_group_that_has_ended_is_dropped(house: House) -> None:
    group = house.open()
    outcome = Outcomes()
    stream = group.open_stream(deeds.double, MAP, outcome)
    group.terminate()
    stream.push(1)
    stream.seal()
    assert group.join(PATIENCE_S)
    assert not outcome.values


# -- cancel, stop, and tasks that do not start


@every_engine
def test_cancel_drops_what_was_not_sent_and_the_rest_is_told_once(house: House, tmp_path: Path) -> None:
    with Held(house, tmp_path) as held:
        outcome, other = Outcomes(), Outcomes()
        job = held.group.submit_many(deeds.identity, range(100), MAP, outcome)
        held.group.submit(deeds.double, (1,), {}, other)
        dropped = held.group.cancel(job)
        assert dropped > 0  # a worker has room for two batches of it
        assert held.group.cancel(job) == 0
        held.release()
        assert other.wait().list() == [2]
        end(held.group)
        assert len(outcome.values) + dropped == 100
        assert held.outcome.wait().list() == ["done\n"]


@every_engine
def test_stop_ends_what_runs_and_spares_the_others(house: House, tmp_path: Path) -> None:
    with Held(house, tmp_path) as held:
        other = Outcomes()
        held.group.submit_many(deeds.double, range(10), MAP, other)
        held.group.stop(held.job)
        if not house.has_processes:
            held.release()  # it cannot end a task that runs
        assert held.outcome.wait().failures[0].kind == engine.WORKER_DIED
        assert other.wait(10).list() == list(range(0, 20, 2))


def test_a_task_whose_sink_says_no_does_not_run(house: House) -> None:
    group = house.open()
    refused, other = Outcomes(starts=False), Outcomes()
    group.submit(house.kill, (), {}, refused, asks_start=True)
    group.submit(deeds.double, (1,), {}, other, asks_start=True)
    assert other.wait().list() == [2]
    end(group)
    assert not refused.values and not refused.failures


# -- the end


@every_engine
def test_terminate_abandons_every_task_once(house: House, tmp_path: Path) -> None:
    with Held(house, tmp_path) as held:
        many, one, stream_ = Outcomes(), Outcomes(), Outcomes()
        held.group.submit_many(deeds.identity, range(100), MAP, many)
        held.group.submit(deeds.double, (1,), {}, one)
        stream = held.group.open_stream(deeds.double, MAP, stream_)
        stream.extend(range(10))
        held.group.terminate()
        held.release()
        for outcome, count in ((held.outcome, 1), (many, 100), (one, 1), (stream_, 10)):
            outcome.wait(count)
            assert {failure.kind for failure in outcome.failures.values()} == {engine.ABANDONED}
            assert {type(failure.exception) for failure in outcome.failures.values()} == {GroupTerminated}
        assert held.group.join(PATIENCE_S)
        with pytest.raises(GroupTerminated):
            held.group.submit(deeds.double, (1,), {}, Outcomes())
        assert isinstance(held.group.ended, GroupTerminated)


@every_engine
def test_close_finishes_what_was_accepted_and_takes_no_more(house: House) -> None:
    group = house.open()
    outcome = Outcomes()
    group.submit_many(deeds.double, range(500), MAP, outcome)
    group.close()
    with pytest.raises(GroupClosed):
        group.submit(deeds.double, (1,), {}, Outcomes())
    with pytest.raises(GroupClosed):
        group.submit_many(deeds.double, [1], MAP, Outcomes())
    assert group.join(PATIENCE_S)
    assert outcome.wait(500).list() == list(range(0, 1000, 2))
    assert group.processes == []


def test_join_says_whether_the_workers_have_ended(house: House, tmp_path: Path) -> None:
    with Held(house, tmp_path) as held:
        held.group.close()
        assert held.group.join(0) is False
        held.release()
        assert held.group.join(PATIENCE_S) is True
        assert held.group.join(0) is True


@pytest.mark.parametrize("calls", ["close close join join", "terminate terminate join", "close terminate join",
                                   "terminate close join", "close join terminate close"])
def test_the_end_may_come_twice_and_in_any_order(house: House, calls: str) -> None:
    group = house.open()
    outcome = Outcomes()
    group.submit_many(deeds.double, range(100), MAP, outcome)
    for name in calls.split():
        getattr(group, name)()
    assert group.join(PATIENCE_S)
    outcome.wait(100)


def test_a_group_in_which_nothing_happened_ends(house: House) -> None:
    for options in ({}, {"on_demand": True}):
        end(house.open(**options))


@every_engine
def test_a_group_that_has_ended_writes_to_no_descriptor(house: House) -> None:
    """Whatever is done with it; another descriptor may have got the number of one of its own."""
    group = house.open()
    outcome = Outcomes()
    job = group.submit_many(deeds.double, range(10), MAP, outcome)
    stream = group.open_stream(deeds.double, MAP, Outcomes())
    group.terminate()
    assert group.join(PATIENCE_S)
    others = [end for _ in range(20) for end in socket.socketpair()]
    for call_ in (group.close, group.terminate, stream.seal, lambda: stream.push(1), lambda: group.cancel(job),
                  lambda: group.stop(job), lambda: group.attend(job), group.join):
        call_()
    for end_ in others:
        end_.setblocking(False)
        with pytest.raises(BlockingIOError):
            end_.recv(100)
    for end_ in others:
        end_.close()


# -- workers


@every_engine
def test_as_many_workers_as_were_asked_for(house: House) -> None:
    for count in (1, 3):
        group = house.open(count)
        works(group)
        assert len(group.processes) == count
        assert len({process.pid for process in group.processes}) == count
        assert all(process.is_alive() for process in group.processes)
        end(group)


@every_engine
def test_on_demand_no_more_workers_than_there_is_work(house: House) -> None:
    group = house.open(3, on_demand=True)
    assert group.processes == []
    assert call(group, deeds.double, 1) == 2
    assert len(group.processes) == 1
    works(group)
    assert len(group.processes) == 3


@every_engine
def test_a_worker_is_replaced_after_its_share_of_tasks(house: House) -> None:
    group = house.open(1, max_tasks=3)
    seen = []
    for _ in range(9):
        assert call(group, deeds.double, 1) == 2
        seen.append([process.pid for process in group.processes])
    end(group)
    # Of each three calls at least two find the same worker at work; there are three workers and no more than four.
    assert 3 <= len({pid for pids in seen for pid in pids}) <= 4


@every_engine
def test_an_initializer_runs_before_the_first_task(house: House, tmp_path: Path) -> None:
    path = tmp_path / "deaths"
    group = house.open(2, initializer=deeds.append, initargs=(str(path), "."))
    assert call(group, deeds.read, str(path)) in (".", "..")
    end(group)
    assert path.read_text() == ".."


@every_engine
def test_a_forked_child_is_told_that_the_group_is_not_its_own(house: House) -> None:
    group = house.open()
    works(group)
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            group.submit(deeds.double, (1,), {}, Outcomes())
        except ForeignProcess:
            os.write(write, b"f")
        finally:
            os._exit(0)
    os.close(write)
    assert Watched([pid]).left_after(PATIENCE_S) == []
    os.waitpid(pid, 0)
    assert os.read(read, 10) == b"f"
    os.close(read)
    works(group)


# -- a door over the engine


@pytest.fixture
def pool(house: House) -> Iterator[Pool]:
    before = session.use(house.engine)
    try:
        with Pool(2, context=get_context(house.method)) as made:
            yield made
        made.join()
    finally:
        session.use(before)


@every_engine
def test_pool_over_the_engine(pool: Pool) -> None:
    assert pool.apply(deeds.double, (2,)) == 4
    assert pool.map(deeds.double, range(100)) == list(range(0, 200, 2))
    assert pool.map(deeds.double, range(100), chunksize=1) == list(range(0, 200, 2))
    assert pool.starmap(deeds.add, [(1, 2), (3, 4)]) == [3, 7]
    assert list(pool.imap(deeds.double, iter(range(100)))) == list(range(0, 200, 2))
    assert sorted(pool.imap_unordered(deeds.double, iter(range(100)), chunksize=7)) == list(range(0, 200, 2))
    called: list[Any] = []
    pool.map_async(deeds.double, [1], callback=called.append).get(PATIENCE_S)
    assert called == [[2]]
    with pytest.raises(ValueError, match="why"):
        pool.apply(deeds.raise_error, (ValueError, "why"))
    with pytest.raises(MaybeEncodingError):
        pool.apply(deeds.make_lock)


def test_the_in_process_engine_does_the_same_in_the_same_order_each_time() -> None:
    runs = []
    for _ in range(5):
        group = InProcessEngine().open_group(GroupSpec(3, get_context("fork"), retries=1, max_tasks=7))
        outcome = Outcomes()
        gate = threading.Event()
        first = Outcomes()

        class Wait(Outcomes):
            def set(self, index: int, values: Any, gate: threading.Event = gate) -> None:
                gate.wait(PATIENCE_S)

        group.submit(deeds.double, (0,), {}, Wait())
        jobs = [group.submit_many(die_if_7, range(40), MAP, outcome), group.submit(deeds.double, (1,), {}, first)]
        gate.set()
        end(group)
        outcome.wait(40)
        pids = sorted({pid for pid, _, _ in group.history})
        runs.append([(pids.index(pid), jobs.index(job) if job in jobs else -1, task)
                     for pid, job, task in group.history])
        assert set(outcome.failures) == {7}
    assert all(run == runs[0] for run in runs)
