"""What Pool promises in one process: the standard library's meaning, and PAINS that its peers have.

Faults are in test_faults.py, whole programs in test_pool_programs.py. Nothing relies on a time.
"""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import multiprocessing.pool
import os
import pickle
import socket
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import TimeoutError, get_context
from multiprocessing.pool import RemoteTraceback  # type: ignore[attr-defined]
from pathlib import Path
from typing import Any

import deeds
import pytest
from leftovers import PATIENCE_S, Census, Watched

import dpool.multiprocessing
from dpool import session
from dpool.cluster.worker.main import _is_plain
from dpool.errors import GroupTerminated
from dpool.multiprocessing.pool import Pool

METHODS = ["fork", "forkserver", "spawn"]


@pytest.fixture(scope="module")
def shared() -> Iterator[Pool]:
    """A pool for tests that leave it as they found it."""
    with Pool(2, context=get_context("fork")) as made:
        # What a pool makes at its first use it keeps.
        assert made.map(deeds.double, range(1000), chunksize=1) == list(range(0, 2000, 2))
        group: Any = made._group
        while group.port._leave is None:  # what apply() waits with, unless its result was quicker
            assert made.apply(deeds.double, (1,)) == 2
        yield made
    made.join()


@pytest.fixture
def pool(shared: Pool) -> Iterator[Pool]:
    """Whole before and after, and nothing is kept for results that were had."""
    census = Census()
    workers = [process.pid for process in shared._pool]
    yield shared
    assert shared.map_async(deeds.double, range(4)).get(PATIENCE_S) == [0, 2, 4, 6]
    assert [process.pid for process in shared._pool] == workers
    assert not shared._cache
    census.check()


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# -- the calls


def test_apply(pool: Pool) -> None:
    assert pool.apply(deeds.add, (1, 2)) == 3
    assert pool.apply(dict, (), {"a": 1}) == {"a": 1}
    assert pool.apply(deeds.identity, args=(1,), kwds={}) == 1
    assert pool.apply_async(dict, kwds={"b": 2}).get(PATIENCE_S) == {"b": 2}


@pytest.mark.parametrize("items", [[], (), range(0), iter(()), {}, range(1), range(37), (n for n in range(5)), "abc",
                                   {3, 1, 2}, {"k": 1}])
@pytest.mark.parametrize("chunksize", [None, 1, 2, 1000])
def test_map_gives_what_map_gives(pool: Pool, items: Any, chunksize: int | None) -> None:
    items = list(items)
    expected = [item * 2 for item in items]
    assert pool.map(deeds.double, items, chunksize) == expected
    assert pool.map_async(deeds.double, iter(items), chunksize=chunksize).get(PATIENCE_S) == expected
    assert pool.starmap(deeds.double, [(item,) for item in items], chunksize) == expected
    assert pool.starmap_async(deeds.double, iter([(item,) for item in items]),
                              chunksize=chunksize).get(PATIENCE_S) == expected
    assert list(pool.imap(deeds.double, items, chunksize or 1)) == expected
    assert list(pool.imap(deeds.double, iter(items), chunksize or 1)) == expected
    assert sorted(pool.imap_unordered(deeds.double, iter(items), chunksize=chunksize or 1)) == sorted(expected)


@pytest.mark.parametrize("function", [
    lambda value: value * 2, partial(deeds.multiply, 2), (2).__mul__, deeds.Doubler(2).times,
    deeds.Doubler(2), deeds.Doubler.static_double, deeds.Doubler.class_double, deeds.outer(2),
], ids=["lambda", "partial", "builtin method", "bound method", "callable", "static", "class method", "closure"])
def test_anything_that_can_be_called_can_be_mapped(pool: Pool, function: Callable[[int], int]) -> None:
    assert pool.map(function, range(10)) == list(range(0, 20, 2))
    assert pool.apply(function, (4,)) == 8


def test_a_closure_is_sent_as_it_is_at_each_call(pool: Pool) -> None:
    factor = 2

    def times(value: int) -> int:
        return value * factor

    assert pool.map(times, [1, 2]) == [2, 4]
    factor = 3
    assert pool.map(times, [1, 2]) == [3, 6]


def test_an_instance_of_a_local_class_comes_back_as_one(pool: Pool) -> None:
    class Local:
        def __init__(self, value: int) -> None:
            self.value = value

    assert pool.apply(lambda item: item.value, (Local(3),)) == 3


def test_local_classes_may_be_raised_and_caught(pool: Pool) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        pool.apply(lambda: 1 // 0)
    assert type(caught.value.__cause__) is RemoteTraceback
    assert f'File "{__file__}", line' in str(caught.value.__cause__) and "1 // 0" in str(caught.value.__cause__)


def test_apply_calls_an_apply_async_of_one_s_own() -> None:
    """A well-known recipe: a pool that wraps every function, to log what it raises."""
    class Doubling(Pool):
        def apply_async(self, func: Any, args: Any = (), kwds: Any = {}, *callbacks: Any) -> Any:  # noqa: B006
            return super().apply_async(lambda *values: func(*values) * 2, args, kwds, *callbacks)

    with Doubling(1) as pool:
        assert pool.apply(deeds.double, (1,)) == 4 == pool.apply_async(deeds.double, (1,)).get()


# -- results


def test_a_result_that_is_not_there_yet(tmp_path: Path, pool: Pool) -> None:
    with deeds.Gate(tmp_path) as gate:
        result = pool.apply_async(deeds.pass_gate, gate.args)
        assert not result.ready()
        with pytest.raises(ValueError, match="not ready"):
            result.successful()
        result.wait(0)
        for timeout in (0, 0.001, -1):
            with pytest.raises(TimeoutError):
                result.get(timeout)
        for kind in ("IMapIterator", "IMapUnorderedIterator"):
            iterator = (pool.imap if kind == "IMapIterator" else pool.imap_unordered)(deeds.pass_gate, [])
            with pytest.raises(StopIteration):
                iterator.next(0)
        gate.open()
        assert result.get(PATIENCE_S) == "open"
        assert result.ready() and result.successful()


def test_imap_next_times_out_and_goes_on(tmp_path: Path, pool: Pool) -> None:
    with deeds.Gate(tmp_path) as gate:
        results = pool.imap(deeds.pass_gate_star, iter([gate.args]))
        for timeout in (0, 0.001):
            with pytest.raises(TimeoutError):
                results.next(timeout)
        gate.open()
        assert results.next(PATIENCE_S) == "open"
        for _ in range(2):
            with pytest.raises(StopIteration):
                results.next()


@pytest.mark.parametrize("timeout, kind", [("5", TypeError), ([], TypeError)])
def test_a_timeout_that_is_none(pool: Pool, tmp_path: Path, timeout: Any, kind: type[Exception]) -> None:
    """Row 15 of bad input; a negative one polls, as in the standard library."""
    with deeds.Gate(tmp_path) as gate:
        result = pool.apply_async(deeds.pass_gate, gate.args)
        with pytest.raises(kind):
            result.get(timeout)
        with pytest.raises((ValueError, OverflowError, TimeoutError)):
            result.get(float("nan"))
        gate.open()
        result.get(PATIENCE_S)


def test_a_value_may_be_none_false_or_an_exception(pool: Pool) -> None:
    """Ray's Pool takes them for something else."""
    values = [None, False, 0, StopIteration, NotImplemented]
    assert pool.map(deeds.identity, values) == values
    returned = pool.map(deeds.identity, [ValueError("a"), KeyError("b")])
    assert [type(value) for value in returned] == [ValueError, KeyError]
    assert type(next(pool.imap(deeds.identity, [ValueError("a")]))) is ValueError


def test_imap_raises_where_the_item_stands_and_goes_on(pool: Pool) -> None:
    results = pool.imap(deeds.raise_if_odd, iter(range(4)))
    assert next(results) == 0
    with pytest.raises(ValueError, match="1 is odd") as caught:
        next(results)
    assert type(caught.value.__cause__) is RemoteTraceback
    assert next(results) == 2
    with pytest.raises(ValueError, match="3 is odd"):
        results.next(PATIENCE_S)
    with pytest.raises(StopIteration):
        next(results)


def test_map_raises_the_first_exception_after_all_have_run(pool: Pool, tmp_path: Path) -> None:
    path = tmp_path / "ran"
    with pytest.raises(ValueError, match="is odd"):
        pool.map(deeds.note_and_raise_if_odd, [(str(path), number) for number in range(20)], chunksize=1)
    assert len(path.read_text()) == 20


def test_callbacks_are_called_once_before_the_result_is_ready(pool: Pool) -> None:
    values: list[Any] = []
    errors: list[Any] = []
    pool.apply_async(deeds.double, (1,), callback=values.append, error_callback=errors.append).get(PATIENCE_S)
    pool.map_async(deeds.double, [1, 2], callback=values.append, error_callback=errors.append).get(PATIENCE_S)
    pool.starmap_async(deeds.add, [(1, 2)], None, values.append, errors.append).get(PATIENCE_S)
    assert (values, errors) == ([2, [2, 4], [3]], [])
    for result in (pool.apply_async(deeds.raise_if_odd, (1,), {}, values.append, errors.append),
                   pool.map_async(deeds.raise_if_odd, range(9), None, values.append, errors.append)):
        with pytest.raises(ValueError):
            result.get(PATIENCE_S)
    assert [type(error) for error in errors] == [ValueError, ValueError]
    assert len(values) == 3


def test_a_callback_may_use_the_pool(pool: Pool) -> None:
    second: list[Any] = []
    done = threading.Event()

    def last(value: int) -> None:
        second.append(value)
        done.set()

    def again(value: int) -> None:
        second.append(pool.apply_async(deeds.double, (value,), callback=last))

    pool.apply_async(deeds.double, (1,), callback=again)
    assert done.wait(PATIENCE_S)
    assert second[-1] == 4
    assert second[0].get(PATIENCE_S) == 4


def test_a_callback_that_raises_is_reported_and_harms_nobody(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", reported.append)

    def bad(value: object) -> None:
        raise ZeroDivisionError

    assert pool.apply_async(deeds.double, (1,), callback=bad).get(PATIENCE_S) == 2
    assert pool.map(deeds.double, range(10)) == list(range(0, 20, 2))
    assert [args.exc_type for args in reported] == [ZeroDivisionError]
    reported.clear()


def test_a_result_outlives_its_pool() -> None:
    with Pool(1, context=get_context("fork")) as made:
        result = made.apply_async(deeds.double, (1,))
        result.wait(PATIENCE_S)
    made.join()
    del made
    assert result.get(0) == 2


# -- order of service


@pytest.mark.parametrize("place", [0, 1, 199])
@pytest.mark.parametrize("warm", [False, True])
def test_no_short_task_waits_behind_a_long_one(pool: Pool, tmp_path: Path, place: int, warm: bool) -> None:
    """ray#29466: every other task ends while one is still running, wherever it stands."""
    if warm:
        pool.map(deeds.short_or_wait, [None] * 1000)  # so that tasks travel in batches
    with deeds.Gate(tmp_path) as gate:
        items: list[Any] = [None] * 200
        items.insert(place, gate.args)
        results = pool.imap_unordered(deeds.short_or_wait, items)
        assert [results.next(PATIENCE_S) for _ in range(200)] == ["short"] * 200
        gate.open()
        assert results.next(PATIENCE_S) == "open"


def test_a_long_task_holds_up_no_result_that_is_there(pool: Pool, tmp_path: Path) -> None:
    """The same in the middle of a batch: its first tasks have run, and their results should come."""
    pool.map(deeds.short_or_wait, [None] * 1000)
    with deeds.Gate(tmp_path) as gate:
        items: list[Any] = [None] * 200
        items.insert(100, gate.args)
        results = pool.imap_unordered(deeds.short_or_wait, items)
        try:
            assert [results.next(PATIENCE_S) for _ in range(200)] == ["short"] * 200
        finally:
            gate.open()
            for _ in results:
                pass


def test_results_before_a_long_task_come_also_when_no_worker_idles(method: str, tmp_path: Path) -> None:
    with deeds.Gate(tmp_path) as gate, Pool(1, context=get_context(method)) as pool:
        pool.map(deeds.short_or_wait, [None] * 1000)
        items: list[Any] = [None] * 400
        items.insert(100, gate.args)
        results = pool.imap_unordered(deeds.short_or_wait, items)
        assert [results.next(PATIENCE_S) for _ in range(100)] == ["short"] * 100
        gate.open()
        assert sorted(results) == ["open"] + ["short"] * 300


def test_only_what_runs_no_code_is_sent_in_the_midst_of_another_task() -> None:
    numpy = pytest.importorskip("numpy")
    for plain in (None, 1, "a", b"b", [1, (2.5, {"a": {3}})], numpy.zeros(3), [numpy.zeros(2)]):
        assert _is_plain(plain)
    deep: list[Any] = [[[[[[]]]]]]
    for other in (object(), [object()], {1: object()}, range(3), deep, [0] * 2000, numpy.array([object()]),
                  dpool.put(1), ValueError(), multiprocessing.Lock()):
        assert not _is_plain(other)


def test_only_its_own_chunk_waits_for_a_long_task(pool: Pool, tmp_path: Path) -> None:
    with deeds.Gate(tmp_path) as gate:
        items: list[Any] = [gate.args, *[None] * 199]
        results = pool.imap_unordered(deeds.short_or_wait, items, chunksize=10)
        assert [next(results) for _ in range(190)] == ["short"] * 190
        gate.open()
        assert sorted(results) == ["open", *["short"] * 9]


def test_calls_of_other_functions_do_not_wait_behind_a_long_one(pool: Pool, tmp_path: Path) -> None:
    with deeds.Gate(tmp_path) as gate:
        held = pool.apply_async(deeds.pass_gate, gate.args)
        results = [pool.apply_async(function, (1,)) for _ in range(50) for function in (deeds.double, deeds.identity)]
        assert [result.get(PATIENCE_S) for result in results] == [2, 1] * 50
        gate.open()
        assert held.get(PATIENCE_S) == "open"


# -- inputs of imap


def test_imap_reads_its_input_as_it_goes() -> None:
    """cpython#84291: an endless input is fine, and is read no more when the pool ends."""
    census = Census()
    with Pool(2, context=get_context("fork")) as made:
        results = made.imap(deeds.double, itertools.count())
        assert list(itertools.islice(results, 100)) == list(range(0, 200, 2))
        chunks = made.imap_unordered(deeds.double, itertools.count(), 7)
        assert len(set(itertools.islice(chunks, 100))) == 100
    made.join()
    with pytest.raises(GroupTerminated):
        for _ in results:
            pass
    del made, results, chunks
    census.check()


def test_imap_s_input_may_wait_for_its_own_results(pool: Pool) -> None:
    seen: list[int] = []
    told = threading.Condition()

    def source() -> Iterator[int]:
        for number in range(20):
            with told:
                assert told.wait_for(lambda number=number: len(seen) >= number, PATIENCE_S)  # type: ignore[misc]
            yield number

    for value in pool.imap(deeds.double, source()):
        with told:
            seen.append(value)
            told.notify_all()
    assert seen == list(range(0, 40, 2))


def test_an_input_that_raises_gives_the_results_before_it_and_then_its_exception(pool: Pool) -> None:
    """Row 14 of bad input."""
    def source() -> Iterator[int]:
        yield 1
        yield 2
        raise KeyError("source")

    results = pool.imap(deeds.double, source())
    assert [next(results), next(results)] == [2, 4]
    with pytest.raises(KeyError, match="source"):
        next(results)
    unordered = pool.imap_unordered(deeds.double, source())
    assert sorted([next(unordered), next(unordered)]) == [2, 4]
    with pytest.raises(KeyError, match="source"):
        next(unordered)
    with pytest.raises(KeyError, match="source"):
        pool.map(deeds.double, source())


# -- start methods, workers


def test_every_start_method_has_its_context_s_workers(method: str) -> None:
    census = Census()
    with Pool(2, context=get_context(method)) as made:
        assert made.map(deeds.double, range(10)) == list(range(0, 20, 2))
        names = made.map(deeds.name_of_process, range(2))
        assert all("PoolWorker" in name for name in names)
        assert type(made._pool[0]) is type(get_context(method).Process())  # type: ignore[attr-defined]
        assert made._ctx.get_start_method() == method
    made.join()
    del made
    census.check()


def test_the_private_attributes_that_programs_read(pool: Pool, tmp_path: Path) -> None:
    """mj-will/nessai#162, and others."""
    assert pool._processes == 2
    assert len(pool._pool) == 2
    assert all(process.is_alive() and process.exitcode is None and process.pid > 0 and process.daemon
               for process in pool._pool)
    assert pool._state == multiprocessing.pool.RUN
    assert set(multiprocessing.active_children()) >= set(pool._pool)
    with deeds.Gate(tmp_path) as gate:
        held = [pool.apply_async(deeds.pass_gate, gate.args) for _ in range(2)]
        queued: Any = pool.map_async(deeds.identity, range(100), chunksize=1)
        assert 0 < pool._taskqueue.qsize() <= 100 and not pool._taskqueue.empty()
        assert queued._number_left == 100 and len(pool._cache) == 3
        gate.open(2)
        assert queued.get(PATIENCE_S) == list(range(100))
        assert [result.get(PATIENCE_S) for result in held] == ["open"] * 2
    assert pool._taskqueue.qsize() == 0 and queued._number_left == 0


def test_a_worker_runs_no_more_than_its_share(method: str) -> None:
    census = Census()
    with Pool(2, maxtasksperchild=3, context=get_context(method)) as made:
        pids = made.map(deeds.pid_of_worker, range(18), chunksize=1)
        assert max(pids.count(pid) for pid in pids) <= 3
        made.close()
        made.join()
    del made
    census.check()


def test_a_chunk_is_one_task_of_a_worker_s_share() -> None:
    with Pool(1, maxtasksperchild=1, context=get_context("fork")) as made:
        pids = made.map(deeds.pid_of_worker, range(9), chunksize=3)
        made.close()
        made.join()
    assert [len(set(pids[start:start + 3])) for start in (0, 3, 6)] == [1, 1, 1]
    assert len(set(pids)) == 3


def test_initargs_may_hold_what_only_inheritance_passes_on(method: str) -> None:
    context = get_context(method)
    value, lock, queue = context.Value("i", 0), context.Lock(), context.Queue()
    with Pool(2, deeds.keep, (value, lock, queue), context=context) as made:
        made.map(deeds.count_up, range(20))
        assert value.value == 20
        assert {queue.get(timeout=PATIENCE_S) for _ in range(20)} == set(range(20))
        made.close()
        made.join()
    queue.close()
    queue.join_thread()


def test_a_manager_s_queue_may_be_an_argument(method: str) -> None:
    """ray#7542."""
    with get_context(method).Manager() as manager, Pool(2, context=get_context(method)) as made:
        queue = manager.Queue()
        made.starmap(deeds.put, [(queue, number) for number in range(5)])
        assert {queue.get(timeout=PATIENCE_S) for _ in range(5)} == set(range(5))
        made.close()
        made.join()


def test_sockets_and_connections_may_be_arguments_and_results(shared: Pool) -> None:
    """The standard library's thread for that stays, so this one is not counted."""
    pool = shared
    left, right = socket.socketpair()
    with left, right:
        pool.apply(deeds.send_hello, (left,))
        assert right.recv(10) == b"hello"
    with pool.apply(deeds.make_socket) as made:
        assert made.type == socket.SOCK_DGRAM


# -- threads and lifetimes


def test_many_threads_may_use_one_pool(pool: Pool) -> None:
    failed: list[BaseException] = []

    def use(base: int) -> None:
        try:
            for round_ in range(20):
                items = range(base, base + round_)
                assert pool.map(deeds.double, items, chunksize=1) == [item * 2 for item in items]
                assert pool.apply(deeds.double, (base,)) == base * 2
                assert list(pool.imap(deeds.double, iter(items))) == [item * 2 for item in items]
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=use, args=(number * 1000,), daemon=True) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    assert not failed


def test_a_pool_made_in_a_thread_outlives_it(method: str) -> None:
    """The death signal of a parent is its thread's: a pool must not rely on that."""
    census = Census()
    made: list[Pool] = []
    thread = threading.Thread(target=lambda: made.append(Pool(2, context=get_context(method))))
    thread.start()
    thread.join()
    pids = {process.pid for process in made[0]._pool}
    assert made[0].map_async(deeds.double, range(100)).get(PATIENCE_S) == list(range(0, 200, 2))
    assert {process.pid for process in made[0]._pool} == pids
    made[0].terminate()
    made[0].join()
    made.clear()
    census.check()


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_pool_that_is_forgotten_is_ended(method: str) -> None:
    census = Census()
    made = Pool(2, context=get_context(method))
    assert made.map(deeds.double, range(10)) == list(range(0, 20, 2))
    watched = Watched(process.pid for process in made._pool)
    forgotten = weakref.ref(made)
    del made
    gc.collect()
    assert forgotten() is None
    assert watched.left_after(PATIENCE_S) == []
    census.check()


def test_a_forgotten_pool_warns_as_the_standard_library_s_does() -> None:
    made = Pool(1, context=get_context("fork"))
    with pytest.warns(ResourceWarning, match="unclosed running multiprocessing pool"):
        del made
        gc.collect()


def test_a_result_keeps_its_pool_alive_until_it_is_there(tmp_path: Path) -> None:
    """cpython#79483: `Pool().apply_async(...).get()` and `for x in Pool().imap(...)`."""
    assert Pool(1, context=get_context("fork")).apply_async(deeds.double, (1,)).get(PATIENCE_S) == 2
    assert list(Pool(1, context=get_context("fork")).imap(deeds.double, range(10))) == list(range(0, 20, 2))
    gc.collect()


def test_the_end_of_a_with_block_terminates() -> None:
    census = Census()
    with Pool(2, context=get_context("fork")) as made:
        pending = made.map_async(deeds.wait_for_ever, range(10), chunksize=1)
    made.join()
    with pytest.raises(GroupTerminated):
        pending.get(PATIENCE_S)
    with pytest.raises(ValueError, match="Pool not running"), made:
        pass
    del made, pending
    census.check()


def test_closing_finishes_what_was_accepted() -> None:
    census = Census()
    made = Pool(2, context=get_context("fork"))
    results = [made.apply_async(deeds.double, (number,)) for number in range(100)]
    numbers = made.imap_unordered(deeds.double, iter(range(100)))
    made.close()
    made.join()
    assert made._pool == []
    assert all(result.ready() for result in results)
    assert [result.get(0) for result in results] == list(range(0, 200, 2))
    assert sorted(numbers) == list(range(0, 200, 2))
    del made, numbers, results
    census.check()


# -- bad input: nothing starts, nothing is left


@pytest.mark.parametrize("options, kind, text", [
    ({"processes": 0}, ValueError, "Number of processes must be at least 1"),
    ({"processes": -1}, ValueError, "Number of processes must be at least 1"),
    ({"processes": 2.5}, TypeError, "float"),
    ({"processes": "4"}, TypeError, "str"),
    ({"processes": True}, TypeError, "bool"),
    ({"processes": 10_000_000}, ValueError, "10000000"),
    ({"maxtasksperchild": 0}, ValueError, "maxtasksperchild must be a positive int or None"),
    ({"maxtasksperchild": -1}, ValueError, "maxtasksperchild must be a positive int or None"),
    ({"maxtasksperchild": "1"}, ValueError, "maxtasksperchild must be a positive int or None"),
    ({"initializer": 3}, TypeError, "initializer must be a callable"),
    ({"initializer": print, "initargs": 3}, TypeError, "not iterable"),
    ({"procs": 3}, TypeError, "procs"),
    ({"context": "banana"}, TypeError, r"context must be one that multiprocessing.get_context\(\) returns.*banana"),
])
def test_a_pool_that_cannot_be(options: dict[str, Any], kind: Any, text: str) -> None:
    """Rows 1, 2, 3, 5, 7, 8, 24, 33 of bad input."""
    census = Census()
    with pytest.raises(kind, match=text):
        Pool(**options)
    gc.collect()
    census.check()


def test_a_variable_that_is_misspelled_is_not_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 24 of bad input."""
    before = session.use(None)
    try:
        monkeypatch.setenv("DPOOL_OF_ANOTHER_PROGRAM", "1")
        monkeypatch.setenv("DPOOL_ADRESS", "tcp://head:7077")
        with pytest.raises(ValueError, match="no environment variable DPOOL_ADRESS: did you mean DPOOL_ADDRESS?"):
            Pool(1)
        monkeypatch.delenv("DPOOL_ADRESS")
        with Pool(1) as pool:
            assert pool.apply(deeds.double, (2,)) == 4
        pool.join()
    finally:
        session.use(before)


def test_a_start_method_that_is_none() -> None:
    """Row 33 of bad input."""
    with pytest.raises(ValueError, match="cannot find context for 'banana'"):
        dpool.multiprocessing.get_context("banana")


@pytest.mark.parametrize("chunksize, kind", [(0, ValueError), (-1, ValueError), ("a", TypeError), (2.0, TypeError)])
def test_a_chunksize_that_is_none(pool: Pool, chunksize: Any, kind: type[Exception]) -> None:
    """Row 4 of bad input."""
    calls: list[Any] = [pool.imap, pool.imap_unordered]
    for call in calls:
        with pytest.raises(kind, match="Chunksize must be 1\\+, not" if kind is ValueError else None):
            call(deeds.double, [1], chunksize)
    calls = [pool.map, pool.map_async, pool.starmap, pool.starmap_async]
    for call in calls:
        with pytest.raises(kind):
            call(deeds.double, [1], chunksize)
    with pytest.raises(TypeError):
        pool.imap(deeds.double, [1], None)


def test_what_cannot_be_iterated_is_refused(pool: Pool) -> None:
    """ray#24237."""
    calls: list[Any] = [pool.map, pool.map_async, pool.starmap, pool.starmap_async]
    for call in calls:
        with pytest.raises(TypeError, match="not iterable"):
            call(deeds.double, 3)
    with pytest.raises(TypeError, match="not iterable"):
        list(pool.imap(deeds.double, 3))  # type: ignore[arg-type]


def test_what_cannot_be_called_fails_as_in_the_standard_library(pool: Pool) -> None:
    """Row 6 of bad input."""
    with pytest.raises(TypeError, match="'int' object is not callable"):
        pool.apply(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="'int' object is not callable"):
        pool.map(3, [1])  # type: ignore[arg-type]


@pytest.mark.parametrize("make, text", [
    (lambda: (n for n in range(3)), "generator"),
    (lambda: open(os.devnull, "rb"), "BufferedReader"),
    (lambda: threading.Thread(), "lock|Event|Thread"),
    (lambda: {"a": [threading.Lock()]}, r"args\[0\]\['a'\]\[0\]: _thread.lock"),
])
def test_an_argument_that_cannot_travel_is_named(pool: Pool, make: Callable[[], Any], text: str) -> None:
    """Rows 9 and 12 of bad input."""
    value = make()
    with pytest.raises((TypeError, pickle.PicklingError), match=text):
        pool.apply(deeds.identity, (value,))
    if hasattr(value, "close"):
        value.close()


def test_modules_may_be_arguments(pool: Pool) -> None:
    """Row 12 of bad input, which is none here."""
    assert pool.apply(lambda module: module.__name__, (os,)) == "os"


def test_after_the_end_every_call_is_refused_in_the_standard_library_s_words() -> None:
    """Row 17 of bad input."""
    made = Pool(1, context=get_context("fork"))
    with pytest.raises(ValueError, match="Pool is still running"):
        made.join()
    for end in ("close", "terminate"):
        getattr(made, end)()
        for name in ("apply", "apply_async"):
            with pytest.raises(ValueError, match="Pool not running"):
                getattr(made, name)(deeds.double, (1,))
        for name in ("map", "map_async", "imap", "imap_unordered", "starmap", "starmap_async"):
            with pytest.raises(ValueError, match="Pool not running"):
                getattr(made, name)(deeds.double, [1])
    made.join()


def test_a_pool_cannot_be_sent(pool: Pool) -> None:
    """Row 32 of bad input."""
    with pytest.raises(NotImplementedError, match="pool objects cannot be passed between processes or pickled"):
        pickle.dumps(pool)
    with pytest.raises(NotImplementedError, match="pool objects cannot be passed between processes or pickled"):
        pool.apply(deeds.identity, (pool,))


def test_thread_pools_are_the_standard_library_s() -> None:
    with dpool.multiprocessing.pool.ThreadPool(2) as threads:
        assert threads.map(deeds.double, range(3)) == [0, 2, 4]
