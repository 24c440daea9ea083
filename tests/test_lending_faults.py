"""Owns the tests of lent locks and queues when somebody dies: who waits takes nothing along, who holds holds up nobody.

Processes of this machine; each cluster is harmed by one test only, unless it is workers alone that die.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import lent_tasks as tasks
import pytest
from clusters import Cluster, Driver, children_of, until, workers_of
from test_lending import PATIENCE_S, lending_of, lending_on, waiting_threads, waits

from dpool.concurrent.futures import ProcessPoolExecutor
from dpool.errors import WorkerDied
from dpool.multiprocessing import Pool


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes, of which only workers die."""
    with Cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture
def driver(cluster: Cluster) -> Iterator[Cluster]:
    with lending_on(cluster):
        yield cluster


@pytest.fixture
def doomed(tmp_path: Path) -> Iterator[Cluster]:
    """Two nodes of one CPU each, for one test, which this process uses."""
    with Cluster(tmp_path, cpus=1) as cluster, Driver(cluster):
        yield cluster
    until(lambda: not waiting_threads(), "nobody waits for a semaphore any more")


# -- workers


def test_who_dies_waiting_takes_no_lock(driver: Cluster) -> None:
    lock, semaphore, said = multiprocessing.Lock(), multiprocessing.Semaphore(0), tasks.simple_queue()
    with Pool(1, tasks.keep, (lock, semaphore, said)) as pool:
        lock.acquire()
        for index, thing in enumerate((lock, semaphore)):
            result = pool.apply_async(tasks.wait_to_acquire, (index,))
            pid = said.get()
            waits(pool)
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(WorkerDied):
                result.get(PATIENCE_S)
            waits(pool, 0)
            thing.release()
            assert thing.acquire(timeout=PATIENCE_S)
        assert not semaphore.acquire(False)


def test_who_dies_waiting_takes_no_item(driver: Cluster) -> None:
    """One waits for the item, the other for the lock of those who wait for it."""
    queue, said = tasks.queue(), tasks.simple_queue()
    with Pool(2, tasks.keep, (queue, said)) as pool:
        results = [pool.apply_async(tasks.wait_to_get, (0,)) for _ in range(2)]
        pids = [said.get(), said.get()]
        waits(pool, 2)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for result in results:
            with pytest.raises(WorkerDied):
                result.get(PATIENCE_S)
        waits(pool, 0)
        queue.put("item")
        assert pool.apply(tasks.wait_to_get, (0,)) == "item"


def test_who_dies_in_the_midst_of_a_message_leaves_it_to_the_next(driver: Cluster) -> None:
    """Of a message that no pipe has room for a part has come."""
    read, write = multiprocessing.Pipe(False)
    said = tasks.simple_queue()
    content = os.urandom(1_000_000)
    with Pool(1, tasks.keep, (read, said)) as pool:
        result = pool.apply_async(tasks.wait_to_receive, (0,))
        pid = said.get()
        waits(pool)
        framed = len(content).to_bytes(4, "big") + content
        sent = 0
        while sent < 500_000:  # more than a pipe holds: some of it has been read
            sent += os.write(write.fileno(), framed[sent:500_000])
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(WorkerDied):
            result.get(PATIENCE_S)
        waits(pool, 0)
        result = pool.apply_async(tasks.wait_to_receive, (0,))
        while sent < len(framed):
            sent += os.write(write.fileno(), framed[sent:])
        assert result.get(PATIENCE_S) == content


@pytest.mark.parametrize("kind", ["Lock", "RLock", "Condition"])
def test_a_lock_is_not_held_by_the_dead(driver: Cluster, kind: str) -> None:
    lock, said = getattr(multiprocessing, kind)(), tasks.simple_queue()
    with Pool(2, tasks.keep, (lock, said)) as pool:
        result = pool.apply_async(tasks.take_and_hold, (0,))
        pid = said.get()
        other = pool.apply_async(tasks.take, (0,))
        said.get()
        waits(pool)
        os.kill(pid, signal.SIGKILL)
        assert other.get(PATIENCE_S)
        with pytest.raises(WorkerDied):
            result.get(PATIENCE_S)
        assert lock.acquire(timeout=PATIENCE_S)
        # It is this process's now, and stays so whoever dies.
        [*rest] = [process.pid for process in workers_of(pool)]
        for pid in rest:
            os.kill(pid, signal.SIGKILL)
        assert pool.apply(tasks.call, (0, "acquire", False)) is False
        lock.release()


def test_a_lock_that_somebody_else_has_released_is_not_released_again(driver: Cluster) -> None:
    lock, said = multiprocessing.Lock(), tasks.simple_queue()
    with Pool(2, tasks.keep, (lock, said)) as pool:
        pool.apply_async(tasks.take_and_hold, (0,))
        holder = said.get()
        pool.apply(tasks.call, (0, "release"))
        pool.apply_async(tasks.take_and_hold, (0,))
        other = said.get()
        os.kill(holder, signal.SIGKILL)
        until(lambda: sorted(one.pid for one in workers_of(pool))[1:] and holder not in map(_pid, workers_of(pool)),
              "there is a new worker")
        assert pool.apply(tasks.call, (0, "acquire", False)) is False
        os.kill(other, signal.SIGKILL)
        assert lock.acquire(timeout=PATIENCE_S)


def _pid(process: Any) -> int:
    return int(process.pid)


def test_semaphores_are_left_as_they_are(driver: Cluster) -> None:
    semaphore, said = multiprocessing.Semaphore(1), tasks.simple_queue()
    with Pool(1, tasks.keep, (semaphore, said)) as pool:
        result = pool.apply_async(tasks.take_and_hold, (0,))
        os.kill(said.get(), signal.SIGKILL)
        with pytest.raises(WorkerDied):
            result.get(PATIENCE_S)
        assert pool.apply(tasks.call, (0, "get_value")) == 0


def test_a_forked_process_that_dies_with_a_lock(driver: Cluster) -> None:
    """The worker lives."""
    lock = multiprocessing.Lock()
    with Pool(1, tasks.keep, (lock,)) as pool:
        assert pool.apply(tasks.fork_that_dies_with, (0,)) == -signal.SIGKILL
        assert lock.acquire(timeout=PATIENCE_S)
        lock.release()
        assert pool.apply(tasks.call, (0, "acquire", True, PATIENCE_S))


def test_terminate_while_workers_wait(driver: Cluster) -> None:
    lock, queue, said = multiprocessing.Lock(), tasks.queue(), tasks.simple_queue()
    lock.acquire()
    pool = Pool(3, tasks.keep, (lock, queue, said))
    for task, index in ((tasks.wait_to_acquire, 0), (tasks.wait_to_get, 1), (tasks.wait_to_get, 1)):
        pool.apply_async(task, (index,))
    for _ in range(3):
        said.get()
    waits(pool, 3)
    pool.terminate()
    pool.join()
    lock.release()
    assert lock.acquire(timeout=PATIENCE_S)
    queue.put(1)
    assert queue.get(timeout=PATIENCE_S) == 1  # nobody has its lock


def test_an_executor_breaks_while_its_workers_wait(driver: Cluster) -> None:
    lock, said = multiprocessing.Lock(), tasks.simple_queue()
    with lock, ProcessPoolExecutor(2, initializer=tasks.keep, initargs=(lock, said)) as executor:
        futures = [executor.submit(tasks.wait_to_acquire, 0) for _ in range(2)]
        os.kill(said.get(), signal.SIGKILL)
        for future in futures:
            assert future.exception(PATIENCE_S) is not None
    assert lock.acquire(timeout=PATIENCE_S)


def test_a_process_that_outlives_its_worker_is_told(driver: Cluster, tmp_path: Path) -> None:
    lock = multiprocessing.Lock()
    lock.acquire()
    pool = Pool(1, tasks.keep, (lock,))
    child = pool.apply(tasks.leave_one_waiting, (0, str(tmp_path / "found")))
    waits(pool)
    pool.terminate()
    pool.join()
    until((tmp_path / "found").exists, "it says what it got")
    assert (tmp_path / "found").read_text() == "Gone"
    until(lambda: not os.path.exists(f"/proc/{child}"), "it has ended")


# -- nodes


def test_a_node_dies_with_a_lock_and_while_its_worker_waits(doomed: Cluster) -> None:
    """The worker of each node holds one lock, and waits for the other's."""
    locks, go, said = [multiprocessing.Lock() for _ in range(2)], multiprocessing.Semaphore(0), tasks.simple_queue()
    with Pool(2, tasks.keep, (*locks, go, said)) as pool:
        results = [pool.apply_async(tasks.take_one_then_other, (index, 1 - index)) for index in range(2)]
        holders = {index: pid for index, pid in (said.get(), said.get())}
        waits(pool, 2)
        for _ in range(3):  # the third time for the one that is to run again
            go.release()
        until(lambda: go.get_value() == 1, "both have it")
        waits(pool, 2)
        [victim] = [node for node in doomed.nodes
                    if any(holders[0] in children_of(zygote) for zygote in children_of(node.pid))]
        victim.end(signal.SIGKILL)
        assert results[1].get(PATIENCE_S) == holders[1]
        assert results[0].get(PATIENCE_S)  # it has run again, on the other node
        for lock in locks:
            assert lock.acquire(timeout=PATIENCE_S)


def test_what_a_lost_node_has_is_free_though_it_lives(doomed: Cluster) -> None:
    """It is stopped, so its connections stay; the driver gives it up all the same."""
    lock, said = multiprocessing.Lock(), tasks.simple_queue()
    with Pool(2, tasks.keep, (lock, said)) as pool:
        pool.apply_async(tasks.take_and_hold, (0,))
        holder = said.get()
        [victim] = [node for node in doomed.nodes
                    if any(holder in children_of(zygote) for zygote in children_of(node.pid))]
        victim.send(signal.SIGSTOP)
        assert lock.acquire(timeout=90)
        victim.send(signal.SIGKILL)


# -- drivers


WAITING = """
    import multiprocessing, os, sys, threading
    sys.path.insert(0, os.environ["TESTS"])
    import lent_tasks as tasks
    from dpool.multiprocessing import Pool

    lock, queue = multiprocessing.Lock(), tasks.queue()
    said = tasks.simple_queue()
    lock.acquire()
    with Pool(3, tasks.keep, (lock, queue, said)) as pool:
        results = [pool.apply_async(tasks.wait_to_acquire, (0,)), pool.apply_async(tasks.wait_to_get, (1,)),
                   pool.apply_async(tasks.wait_to_get, (1,))]
        for _ in results:
            said.get()
        while pool._group.port._lending.waits < 3:
            pass
        print("waiting", flush=True)
        results[0].get()
"""


def test_ctrl_c_in_a_driver_whose_workers_wait(cluster: Cluster, tmp_path: Path) -> None:
    """Again if it is not noticed: CPython itself loses one that comes just as its main thread begins to wait for a lock
    (one of a hundred, on a machine that is busy)."""
    process = _driver(cluster, tmp_path)
    for last in (False, True):
        process.send_signal(signal.SIGINT)
        try:
            _, errors = process.communicate(timeout=PATIENCE_S)
            break
        except subprocess.TimeoutExpired:
            if last:
                raise
    assert process.returncode in (1, -signal.SIGINT) and "KeyboardInterrupt" in errors
    until(lambda: not cluster.workers(), "its workers are gone")


def test_a_driver_dies_whose_workers_wait(cluster: Cluster, tmp_path: Path) -> None:
    process = _driver(cluster, tmp_path)
    process.kill()
    process.communicate(timeout=PATIENCE_S)
    until(lambda: not cluster.workers(), "its workers are gone")


def _driver(cluster: Cluster, directory: Path) -> subprocess.Popen[str]:
    (directory / "program.py").write_text(dedent(WAITING))
    environment = cluster.environment() | {"DPOOL_ADDRESS": cluster.address, "TESTS": os.path.dirname(__file__)}
    process = subprocess.Popen([sys.executable, "program.py"], cwd=directory, env=environment, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    return process


# -- drivers that are workers


def test_a_worker_of_a_nested_pool_dies_with_a_lock(driver: Cluster) -> None:
    lock, said = multiprocessing.Lock(), tasks.simple_queue()
    with Pool(1, tasks.keep, (lock, said)) as pool:
        result = pool.apply_async(tasks.error_of_nested, (tasks.take_and_hold, 0))
        os.kill(said.get(), signal.SIGKILL)
        assert result.get(PATIENCE_S) == "WorkerDied"
        assert lock.acquire(timeout=PATIENCE_S)


def test_a_worker_of_a_nested_pool_dies_waiting(driver: Cluster) -> None:
    lock, queue, said = multiprocessing.Lock(), tasks.queue(), tasks.simple_queue()
    lock.acquire()
    with Pool(1, tasks.keep, (lock, queue, said)) as pool:
        for task, index in ((tasks.wait_to_acquire, 0), (tasks.wait_to_get, 1)):
            result = pool.apply_async(tasks.error_of_nested, (task, index))
            pid: Any = said.get()
            waits(pool)
            os.kill(pid, signal.SIGKILL)
            assert result.get(PATIENCE_S) == "WorkerDied"
            waits(pool, 0)
        lock.release()
        assert lock.acquire(timeout=PATIENCE_S)
        queue.put("item")
        assert pool.apply(tasks.wait_to_get, (1,)) == "item"


def test_a_parent_dies_whose_worker_has_a_lock(driver: Cluster) -> None:
    lock, said = multiprocessing.Lock(), tasks.simple_queue()
    with Pool(1, tasks.keep, (lock, said)) as pool:
        result = pool.apply_async(tasks.error_of_nested, (tasks.take_and_hold, 0))
        said.get()
        [parent] = workers_of(pool)
        os.kill(parent.pid, signal.SIGKILL)
        with pytest.raises(WorkerDied):
            result.get(PATIENCE_S)
        assert lock.acquire(timeout=PATIENCE_S)
        assert lending_of(pool).waits == 0
