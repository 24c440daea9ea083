"""Owns the tests of what a driver lends to workers on a cluster: locks, queues, values, pipes and managers' proxies do
there what they do on one machine.

Head, nodes and driver are processes of this machine; hosts of their own are in test_hosts.py, deaths in
test_lending_faults.py, the books in test_things.py.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import shared_memory, sharedctypes
from pathlib import Path
from textwrap import dedent
from typing import Any

import lent_tasks as tasks
import pytest
from clusters import Cluster, Driver, until, until_as_before, workers_of

from dpool.cluster.driver.lending import Lending
from dpool.concurrent.futures import ProcessPoolExecutor
from dpool.multiprocessing import Pool

PATIENCE_S = 30.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes with two CPUs each, which no test harms."""
    with Cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture
def driver(cluster: Cluster) -> Iterator[Cluster]:
    with lending_on(cluster):
        yield cluster


@contextmanager
def lending_on(cluster: Cluster) -> Iterator[None]:
    """This process uses the cluster, and nobody waits, or works, for it afterwards."""
    with Driver(cluster):
        yield
    until(lambda: not waiting_threads(), "nobody waits for a semaphore any more")
    until(lambda: not cluster.workers(), "all workers are gone")


def waiting_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "dpool-lock"]


def lending_of(pool: Any) -> Lending:
    lending: Lending = pool._group.port._lending
    return lending


def waits(pool: Any, count: int = 1) -> None:
    """Until so many calls of its workers stand in line."""
    until(lambda: lending_of(pool).waits == count, f"{count} wait")


def with_pool(workers: int, things: tuple[Any, ...], use: Callable[[Callable[..., list[Any]]], Any]) -> Any:
    """use(starmap) with the workers of a Pool."""
    with Pool(workers, tasks.keep, things) as pool:
        return use(lambda task, calls: pool.starmap(task, calls, chunksize=1))


def with_executor(workers: int, things: tuple[Any, ...], use: Callable[[Callable[..., list[Any]]], Any]) -> Any:
    """The same with those of an executor."""
    with ProcessPoolExecutor(workers, initializer=tasks.keep, initargs=things) as executor:
        return use(lambda task, calls: [one.result() for one in [executor.submit(task, *call) for call in calls]])


Door = Callable[[int, tuple[Any, ...], Any], Any]


# -- locks


@pytest.mark.parametrize("door", [with_pool, with_executor])
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_values_with_their_locks_are_exact(driver: Cluster, method: str, door: Door) -> None:
    value = multiprocessing.get_context(method).Value("i", 5)
    door(4, (value,), lambda starmap: starmap(tasks.count_up, [(25,)] * 8))
    assert value.value == 205


@pytest.mark.parametrize("kind", ["Lock", "RLock", "Semaphore", "BoundedSemaphore", "Condition"])
def test_one_at_a_time_has_a_lock(driver: Cluster, kind: str) -> None:
    """This process among them: its thread operates the lock itself."""
    context = multiprocessing.get_context("spawn")
    lock, value = getattr(context, kind)(), context.Value("i")
    with Pool(3, tasks.keep, (lock, value), maxtasksperchild=1) as pool:
        result = pool.map_async(tasks.one_at_a_time, [20] * 3, chunksize=1)
        for _ in range(20):
            with lock:
                value.value += 1
        result.get(PATIENCE_S)
    assert value.value == 80


def test_who_waits_gets_it_when_it_is_released_here(driver: Cluster) -> None:
    lock, said = multiprocessing.Lock(), tasks.simple_queue()
    with Pool(2, tasks.keep, (lock, said)) as pool, lock:
        results = [pool.apply_async(tasks.take, (0,)) for _ in range(2)]
        assert len({said.get(), said.get()}) == 2
        waits(pool, 2)
        assert waiting_threads() == ["dpool-lock"]  # one for the lock, however many wait
        assert not any(result.ready() for result in results)
        lock.release()
        assert [result.get(PATIENCE_S) for result in results] == [True, True]
        lock.acquire()
        assert lending_of(pool).waits == 0


def test_acquire_without_waiting_and_for_a_time(driver: Cluster) -> None:
    lock = multiprocessing.Lock()
    with Pool(1, tasks.keep, (lock,)) as pool:
        call = pool.apply
        assert call(tasks.call, (0, "acquire", False)) is True
        assert not lock.acquire(False)
        assert call(tasks.call, (0, "acquire", False)) is False
        assert call(tasks.call, (0, "acquire"), {"timeout": 0.01}) is False
        assert call(tasks.call, (0, "acquire", True, -1.0)) is False
        assert call(tasks.call, (0, "release")) is None
        assert call(tasks.call, (0, "acquire", True, 0.0)) is True  # free: it takes no time
        lock.release()


def test_errors_are_those_of_the_standard_library(driver: Cluster) -> None:
    things = multiprocessing.Lock(), multiprocessing.BoundedSemaphore(2), multiprocessing.RLock()
    many = "ValueError: semaphore or lock released too many times"
    with Pool(1, tasks.keep, things) as pool:
        assert pool.apply(tasks.error_of, (0, "release")) == many
        assert pool.apply(tasks.error_of, (1, "release")) == many
        assert pool.apply(tasks.error_of, (2, "release")) == (
            "AssertionError: attempt to release recursive lock not owned by thread")
    for thing, error in zip(things, (ValueError, ValueError, AssertionError), strict=True):
        with pytest.raises(error):
            thing.release()


def test_an_rlock_belongs_to_a_thread_of_a_process(driver: Cluster) -> None:
    not_owned = "attempt to release recursive lock not owned by thread"
    lock = multiprocessing.RLock()
    with Pool(1, tasks.keep, (lock,)) as pool:
        assert pool.apply(tasks.recursion, (0,)) == [False, False, not_owned, 0, not_owned]
    assert lock.acquire(False)


def test_semaphores_count(driver: Cluster) -> None:
    semaphore = multiprocessing.Semaphore(2)
    with Pool(2, tasks.keep, (semaphore,)) as pool:
        assert pool.apply(tasks.call, (0, "acquire")) and semaphore.acquire(False)
        assert pool.apply(tasks.call, (0, "get_value")) == 0
        assert not pool.apply(tasks.call, (0, "acquire", False))
        pool.apply(tasks.call, (0, "release"))
        assert semaphore.get_value() == 1
        assert "value=1" in pool.apply(tasks.call, (0, "__repr__"))


def test_conditions_events_and_barriers(driver: Cluster) -> None:
    condition, event, barrier = multiprocessing.Condition(), multiprocessing.Event(), multiprocessing.Barrier(4)
    said = tasks.simple_queue()
    with Pool(3, tasks.keep, (condition, event, barrier, said)) as pool:
        results = [pool.apply_async(tasks.notified, (0,)) for _ in range(3)]
        assert len({said.get() for _ in range(3)}) == 3
        with condition:  # nobody has it: all three wait to be notified
            condition.notify()
            condition.notify_all()
        assert [result.get(PATIENCE_S) for result in results] == [True] * 3
        results = [pool.apply_async(tasks.call, (1, "wait", 30)) for _ in range(3)]
        event.set()
        assert [result.get(PATIENCE_S) for result in results] == [True] * 3
        assert pool.apply(tasks.call, (1, "is_set"))
        meetings = [pool.apply_async(tasks.meet, (2,)) for _ in range(3)]
        places = [barrier.wait(PATIENCE_S), *(meeting.get(PATIENCE_S) for meeting in meetings)]
        assert sorted(places) == [0, 1, 2, 3]
        assert pool.apply(tasks.call, (2, "__repr__"))


def test_a_handler_that_raises_ends_the_waiting(driver: Cluster) -> None:
    lock, semaphore, queue = multiprocessing.Lock(), multiprocessing.Semaphore(0), tasks.simple_queue()
    said = tasks.simple_queue()
    with Pool(1, tasks.keep, (lock, semaphore, queue, said)) as pool:
        for index, name in enumerate(("acquire", "acquire", "get")):
            if index == 0:
                lock.acquire()
            result = pool.apply_async(tasks.interrupted, (index, name, 3))
            pid = said.get()
            waits(pool)
            os.kill(pid, signal.SIGALRM)
            assert result.get(PATIENCE_S) == "interrupted"
            waits(pool, 0)
        lock.release()
        semaphore.release()
        queue.put("item")
        assert lock.acquire(timeout=PATIENCE_S) and semaphore.acquire(timeout=PATIENCE_S)
        assert queue.get() == "item"


def test_sockets_that_have_a_timeout_by_default(driver: Cluster) -> None:
    lock, said = multiprocessing.Lock(), tasks.simple_queue()
    with Pool(1, tasks.keep, (lock, said)) as pool, lock:
        result = pool.apply_async(tasks.default_timeout_then_acquire, (0,))
        said.get()
        waits(pool)
        assert not result.ready()
        lock.release()
        assert result.get(PATIENCE_S)
        lock.acquire()


def test_a_process_that_a_task_forks_has_what_the_worker_has(driver: Cluster) -> None:
    lock = multiprocessing.Lock()
    with Pool(1, tasks.keep, (lock,)) as pool:
        assert pool.apply(tasks.in_a_forked_process, (0,)) == 1
    assert lock.acquire(timeout=PATIENCE_S)


def test_a_callback_waits_for_what_a_worker_has(driver: Cluster) -> None:
    """Callbacks run in the thread that reports results: the worker's release does not wait for it."""
    lock, go, said = multiprocessing.Lock(), multiprocessing.Semaphore(0), tasks.simple_queue()
    taken = threading.Event()

    def callback(_: object) -> None:
        go.release()
        if lock.acquire(timeout=PATIENCE_S):
            taken.set()
            lock.release()

    with Pool(2, tasks.keep, (lock, go, said)) as pool:
        holder = pool.apply_async(tasks.hold_until, (0, 1))
        said.get()
        pool.apply_async(tasks.pid, callback=callback)
        assert holder.get(PATIENCE_S) and taken.wait(PATIENCE_S)


def test_a_callback_waits_for_a_worker_s_first_call(driver: Cluster, tmp_path: Path) -> None:
    event, seen = multiprocessing.Event(), threading.Event()
    path = tmp_path / "waiting"

    def callback(_: object) -> None:
        path.write_text("")
        if event.wait(PATIENCE_S):
            seen.set()

    with Pool(2, tasks.keep, (event,)) as pool:
        result = pool.apply_async(tasks.call_when, (str(path), 0, "set"))
        pool.apply_async(tasks.pid, callback=callback)
        assert seen.wait(PATIENCE_S)
        result.get(PATIENCE_S)


# -- queues and connections


def test_queues_bound_and_time_out(driver: Cluster) -> None:
    expected = ["Empty", "Empty", "Full", "True", "2", "a", "b", "True"]
    with Pool(1, tasks.keep, (tasks.queue(2), tasks.joinable_queue(2))) as pool:
        for index in range(2):
            found = pool.apply(tasks.queues, (index,))
            # As on one machine, what a Queue's thread has not written yet is not there to be got.
            assert found[:5] == expected[:5] and found[5:7] == expected[5:7]


def test_workers_and_driver_share_queues(driver: Cluster) -> None:
    jobs, done = tasks.joinable_queue(), tasks.queue()
    with Pool(4, tasks.keep, (jobs, done)) as pool:
        served = pool.starmap_async(tasks.serve, [(0, 1)] * 4, chunksize=1)
        for number in range(60):
            jobs.put(number)
        for _ in range(4):
            jobs.put(None)
        jobs.join()
        assert sum(served.get(PATIENCE_S)) == 60
        assert sorted(done.get() for _ in range(60)) == [(number, number * number) for number in range(60)]


@pytest.mark.parametrize("duplex", [True, False], ids=["sockets", "pipes"])
def test_messages_of_any_size(driver: Cluster, duplex: bool) -> None:
    """Also those that no pipe and no message between machines has room for."""
    sizes = [0, 1, 16_384, 16_385, 32_768, 65_536, 200_000, 3_000_000]
    if duplex:
        ours, theirs = multiprocessing.Pipe()
        ends: tuple[Any, ...] = (theirs, theirs)
        send, receive = ours, ours
    else:
        first, send = multiprocessing.Pipe(False)
        receive, second = multiprocessing.Pipe(False)
        ends = (first, second)
    contents = [os.urandom(size) for size in sizes]
    with Pool(1, tasks.keep, ends) as pool, ThreadPoolExecutor(1) as threads:
        def exchange() -> list[bytes]:
            found = []
            for content in contents:
                send.send_bytes(content)
                found.append(receive.recv_bytes())
            return found

        result = threads.submit(exchange)
        task = tasks.echo if duplex else tasks.pass_on
        assert pool.apply(task, (0, sizes)) == sizes
        assert result.result(PATIENCE_S) == contents


def test_what_a_connection_can_do(driver: Cluster) -> None:
    ours, theirs = multiprocessing.Pipe()
    with Pool(1, tasks.keep, (theirs,)) as pool:
        theirs.close()  # the workers have one
        result = pool.apply_async(tasks.connections, (0,))
        assert ours.recv() == {"key": 1}
        ours.send([1, 2])
        ours.send_bytes(b"abc")
        ours.send_bytes(b"too long")
        assert result.get(PATIENCE_S) == [False, False, True, True, False, True, [1, 2], 3, b"abc", "no descriptor",
                                          "bad message length", True]
    with pytest.raises(EOFError):  # the group has ended, and nobody has the other end
        ours.recv()


def test_the_other_end_is_closed(driver: Cluster) -> None:
    first, send = multiprocessing.Pipe(False)
    receive, second = multiprocessing.Pipe(False)
    with Pool(1, tasks.keep, (first, second)) as pool:
        result = pool.apply_async(tasks.at_the_end, (0,))
        send.close()
        assert result.get(PATIENCE_S) == "EOFError"
        receive.close()
        assert pool.apply(tasks.error_of, (1, "send", 1)).startswith("BrokenPipeError")
        assert pool.apply(tasks.error_of, (0, "send", 1)) == "OSError: connection is read-only"


# -- memory


def test_arrays_and_structures(driver: Cluster) -> None:
    context = multiprocessing.get_context("spawn")
    numbers = context.Array("i", range(10))
    text: Any = context.Array("c", 8)
    point: Any = context.Value(tasks.Point, 1, 2.0)
    mirror: Any = context.Array("i", range(10)), context.Array("c", 8), context.Value(tasks.Point, 1, 2.0)
    tasks.keep(*mirror)
    expected = tasks.arrays(0, 1, 2)  # what the real ones do
    with Pool(1, tasks.keep, (numbers, text, point)) as pool:
        assert pool.apply(tasks.arrays, (0, 1, 2)) == expected
    assert numbers[:] == mirror[0][:]
    assert text.raw == mirror[1].raw
    assert (point.x, point.y, point.flag, list(point.sizes)) == (7, 2.5, 2, [0, 5])


def test_what_cannot_be_lent_is_refused_with_what_to_use(driver: Cluster) -> None:
    block = shared_memory.SharedMemory(create=True, size=16)
    try:
        for thing, says in ((sharedctypes.RawArray("i", 3), "use Value or Array"),
                            (sharedctypes.RawValue("i"), "use Value or Array"),
                            (block, "use multiprocessing.Array"),
                            (multiprocessing.Value(ctypes.c_void_p), "addresses")):
            with pytest.raises(RuntimeError, match=says):
                Pool(1, tasks.keep, (multiprocessing.Lock(), thing))
    finally:
        block.close()
        block.unlink()


def test_locks_stay_no_arguments_of_tasks(driver: Cluster) -> None:
    with Pool(1) as pool, pytest.raises(RuntimeError, match="through inheritance"):
        pool.apply(tasks.pid, (multiprocessing.Lock(),))


def test_a_function_that_refers_to_a_lock_of_its_program_fails(cluster: Cluster, tmp_path: Path) -> None:
    """As a global: with `fork` on one machine workers have it. Every call fails, once, and the pool goes on."""
    (tmp_path / "program.py").write_text(dedent("""
        import multiprocessing
        from dpool.multiprocessing import Pool

        lock = multiprocessing.Lock()

        def task(number):
            with lock:
                return number

        if __name__ == "__main__":
            with Pool(4) as pool:
                for _ in range(2):
                    results = [pool.apply_async(task, (number,)) for number in range(40)]
                    for result in results:
                        try:
                            result.get(30)
                        except RuntimeError as error:
                            assert "through inheritance" in str(error)
                        else:
                            raise AssertionError
                print(pool.map(abs, [-1]))
    """))
    done = subprocess.run([sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True, timeout=100,
                          env=cluster.environment() | {"DPOOL_ADDRESS": cluster.address})
    assert (done.stdout, done.stderr) == ("[1]\n", "")


# -- managers


def test_managers_are_reached_through_the_driver(driver: Cluster) -> None:
    """In initializers and tasks, nested, and back as results."""
    with multiprocessing.Manager() as manager:
        values, queue, lock, space = manager.dict(), manager.Queue(), manager.Lock(), manager.Namespace()
        nested = manager.list([manager.list()])
        space.count = 0
        with Pool(4, tasks.keep_without_sockets, (values, nested, queue, lock, space)) as pool:
            assert pool.map(tasks.managed, range(8), chunksize=1) == [1] * 8
            assert space.count == 8
            assert sorted(nested[0]) == sorted(queue.get() for _ in range(8)) == list(range(8))
            assert set(values.values()) <= {process.pid for process in workers_of(pool)}
            back = pool.apply(tasks.managed_argument, (manager.dict(), "key"))
            assert back["key"] in values.values()
            assert lending_of(pool).owned > 0
        with Pool(1, tasks.keep_without_sockets, (values,)) as pool:
            # Connections end with the processes that they were made for.
            child = pool.apply(tasks.in_a_process, (tasks.managed_argument, values, "child"))
            assert values["child"] == child
            assert pool.apply(tasks.managed_argument, (values, "again")) is not None
            until(lambda: lending_of(pool).owned <= 1, "the child's connections are closed")


def test_a_manager_that_the_program_has_not_got_is_not_reached(driver: Cluster, tmp_path: Path) -> None:
    with Pool(1, tasks.keep_without_sockets) as pool:
        assert pool.apply(tasks.connect, (str(tmp_path / "other"),)) == "FileNotFoundError"


# -- drivers that are workers


def test_what_was_lent_is_lent_on(driver: Cluster) -> None:
    context = multiprocessing.get_context("spawn")
    value, queue, event = context.Value("i"), tasks.simple_queue(), context.Event()
    with Pool(2, tasks.keep, (value, queue, event)) as pool:
        results = [pool.apply_async(tasks.nested_pool, (2, tasks.count_up, 10)) for _ in range(2)]
        for result in results:
            assert result.get(PATIENCE_S) == [None, None]
        assert value.value == 40
        result = pool.apply_async(tasks.nested_pool, (2, tasks.call, 1, "get"))
        waits(pool, 2)
        queue.put("a")
        queue.put("b" * 100_000)
        assert sorted(result.get(PATIENCE_S)) == ["a", "b" * 100_000]
        result = pool.apply_async(tasks.nested_pool, (2, tasks.call, 2, "wait", 30))
        event.set()
        assert result.get(PATIENCE_S) == [True, True]


def test_managers_are_reached_from_nested_pools(driver: Cluster) -> None:
    with multiprocessing.Manager() as manager:
        values = manager.dict()
        with Pool(1, tasks.keep, (values,)) as pool:
            found = pool.apply(tasks.nested_pool_without_sockets, (2, tasks.call, 0, "__setitem__", "key", 1))
            assert found == [None, None]
        assert values.copy() == {"key": 1}


# -- what is left


def test_nothing_is_left(cluster: Cluster) -> None:
    """Descriptors of this process and of the nodes, and threads, after pools that have ended in each way."""
    def once(end: str) -> None:
        lock, queue, said = multiprocessing.Lock(), tasks.queue(), tasks.simple_queue()
        pool = Pool(3, tasks.keep, (lock, queue, multiprocessing.Value("i"), said))
        pool.apply(tasks.call, (2, "acquire"))
        lock.acquire()
        result = pool.apply_async(tasks.wait_to_acquire, (0,))
        pool.apply_async(tasks.wait_to_get, (1,))
        said.get(), said.get()
        waits(pool, 2)
        if end == "close":
            lock.release()
            queue.put(1)
            pool.close()
            assert result.get(PATIENCE_S)
        else:
            pool.terminate()
        pool.join()
        queue.close()
        queue.join_thread()

    with Driver(cluster):
        once("close")
        until(lambda: not waiting_threads(), "nobody waits for a semaphore any more")
        before = sorted(os.listdir("/proc/self/fd")), threading.active_count()
        nodes = [node.descriptors() for node in cluster.nodes]
        for end in ("terminate", "close"):
            once(end)
        until(lambda: not waiting_threads(), "nobody waits for a semaphore any more")
        until(lambda: threading.active_count() <= before[1], "threads are gone")
        until(lambda: len(os.listdir("/proc/self/fd")) <= len(before[0]), "descriptors are closed")
        for node, then in zip(cluster.nodes, nodes, strict=True):
            until_as_before(node, then)
