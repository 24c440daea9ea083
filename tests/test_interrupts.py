"""Ctrl-C between any two steps of a call: the call ends, and whatever else there is goes on."""

from __future__ import annotations

import _thread
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from interrupts import Interrupt

import dpool
from dpool import waiting
from dpool.cluster.store import store
from dpool.concurrent.futures import ProcessPoolExecutor
from dpool.multiprocessing import get_context
from dpool.multiprocessing.pool import Pool

PATIENCE_S = 60
BIG = np.ones(1 << 17)  # 1 MB: it goes by the store


def double(number: Any) -> Any:
    return number * 2


def first(values: Any) -> float:
    return float(values[0])


def ones(count: int) -> Any:
    return np.ones(count)


def open_and_close(fifo: str) -> None:
    open(fifo).close()


class Both:
    """A pool and an executor."""

    def __init__(self) -> None:
        self.pool = Pool(2, context=get_context("fork"))
        self.executor = ProcessPoolExecutor(1, mp_context=get_context("fork"))
        self.check()

    def check(self) -> None:
        """In a thread of its own, as what it waits for may never come."""
        fine = []

        def work() -> None:
            assert self.pool.map(double, range(6), 1) == [0, 2, 4, 6, 8, 10]
            assert self.executor.submit(double, 4).result() == 8
            assert self.pool.apply(first, (BIG,)) == 1.0
            fine.append(True)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(PATIENCE_S)
        assert fine

    def end(self) -> None:
        self.executor.shutdown()
        self.pool.close()
        assert self.pool._group.join(PATIENCE_S)


@pytest.fixture
def both(monkeypatch: Any, tmp_path: Path) -> Iterator[Both]:
    """With a store of their own: what is interrupted in the midst of the store's books, after a segment is made and
    before anybody has it, stays there."""
    here = store.Store(1 << 30, str(tmp_path))
    monkeypatch.setattr(store, "_store", here)
    opened = Both()
    yield opened
    opened.end()
    for segment in list(here._segments.values()):
        segment.close()


CALLS: dict[str, Callable[[Both], object]] = {
    "apply": lambda both: both.pool.apply(double, (3,)),
    "apply, large": lambda both: both.pool.apply(first, (BIG,)),
    "apply, large result": lambda both: both.pool.apply(ones, (1 << 17,)),
    "apply, ref": lambda both: both.pool.apply(first, (dpool.put(BIG),)),
    "get": lambda both: both.pool.apply_async(double, (3,)).get(),
    "map": lambda both: both.pool.map(double, range(20)),
    "map, large": lambda both: both.pool.map(first, [BIG] * 3, 1),
    "imap": lambda both: list(both.pool.imap(double, range(5))),
    "imap, any input": lambda both: list(both.pool.imap(double, iter(range(5)))),
    "imap_unordered": lambda both: list(both.pool.imap_unordered(double, range(5))),
    "result": lambda both: both.executor.submit(double, 3).result(),
    "Executor.map": lambda both: list(both.executor.map(double, range(5))),
    "put, get": lambda both: dpool.get(dpool.put(BIG)),
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a Ctrl-C in a finalizer ends there
@pytest.mark.parametrize("name", CALLS)
def test_a_ctrl_c_between_any_two_steps_of_a_call_leaves_the_pool_as_it_was(name: str, both: Both) -> None:
    call = CALLS[name]

    def interrupted(at: int) -> tuple[bool, int]:
        """Whether it was, and how many steps there were."""
        interrupt = Interrupt(at)
        try:
            with interrupt:
                call(both)
        except KeyboardInterrupt:
            return True, at
        return False, at - interrupt.left

    steps = max(interrupted(1_000_000)[1] for _ in range(20))
    assert steps > 5
    found = 0
    for _ in range(2):
        for at in range(1, steps + 1):
            found += interrupted(at)[0]
            both.check()
    assert found


# Functions that no main thread of a program calls: a Ctrl-C is raised in that one alone.
OTHERS = {"Group._send_by_value", "Group._on_death", "Shipping.stop", "Shipping.take", "Shipping.settle",
          "Workers.signal", "MapResults._arrive", "Shelf._keep_deadlines", "_wait_for_results",
          "Group._put_back"}  # which is about a Ctrl-C that has come


def test_no_loop_jumps_back_outside_of_the_with_that_it_is_in(tmp_path: Path) -> None:
    """See loops.py."""
    interpreters = pytest.importorskip("compat_tests.interpreters")
    newest = max([interpreters.running(), *interpreters.others()], key=lambda one: one.version)
    if newest.version < (3, 13):
        pytest.skip("earlier versions look when they have jumped")

    def loops(folder: Path) -> set[str]:
        command = [newest.executable, str(Path(__file__).with_name("loops.py")), str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE_S)
        return set(done.stdout.split())

    (tmp_path / "one.py").write_text("def f(lock, go):\n    with lock:\n        while not go:\n            pass\n")
    assert loops(tmp_path) == {"f"}
    assert loops(Path(dpool.__file__).parent) - OTHERS == set()


@pytest.mark.parametrize("wait", [
    lambda both, fifo: both.pool.apply(open_and_close, (fifo,)),
    lambda both, fifo: both.pool.apply_async(open_and_close, (fifo,)).get(),
    lambda both, fifo: both.pool.apply_async(open_and_close, (fifo,)).get(PATIENCE_S),
    lambda both, fifo: both.pool.map(open_and_close, [fifo]),
    lambda both, fifo: list(both.pool.imap(open_and_close, [fifo])),
    lambda both, fifo: both.executor.submit(open_and_close, fifo).result(),
    lambda both, fifo: both.executor.submit(open_and_close, fifo).result(PATIENCE_S),
    lambda both, fifo: list(both.executor.map(open_and_close, [fifo])),
    lambda both, fifo: (both.executor.submit(open_and_close, fifo), both.executor.shutdown()),
])
def test_a_ctrl_c_that_wakes_nobody_is_noticed(wait: Callable[[Both, str], object], both: Both, tmp_path: Any) -> None:
    """A signal that comes between Python's last look for one and the system call that waits: Python knows of it, and
    waits on. interrupt_main() makes just that of a thread that waits already."""
    fifo = str(tmp_path / "fifo")
    os.mkfifo(fifo)
    looks = threading.Timer(0.2, _thread.interrupt_main)
    looks.start()
    with pytest.raises(KeyboardInterrupt):
        wait(both, fifo)
    looks.join()
    open(fifo, "w").close()
    both.executor.shutdown()  # as one of these calls has begun to
    both.executor = ProcessPoolExecutor(1, mp_context=get_context("fork"))
    both.check()


def test_a_condition_wakes_as_many_as_it_is_told_to() -> None:
    condition = waiting.Condition()
    woken: list[int] = []
    waits = threading.Semaphore(0)

    def wait(number: int) -> None:
        with condition:
            waits.release()
            assert condition.wait(PATIENCE_S)
            woken.append(number)
            condition.notify_all()
            waits.release()

    threads = [threading.Thread(target=wait, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
        waits.acquire()
    with condition:
        assert len(condition._waiters) == 3
        condition.notify()
        assert len(condition._waiters) == 2
    for thread in threads:
        thread.join(PATIENCE_S)
    assert sorted(woken) == [0, 1, 2]
    with condition:
        assert not condition.wait(0) and not condition.wait(0.01) and not condition._waiters
    for use in (condition.wait, condition.notify, condition.notify_all):
        with pytest.raises(RuntimeError, match="un-acquired"):
            use()


def test_a_condition_that_is_interrupted_is_as_it_was() -> None:
    """Held until its block has ended, and by nobody after that; and nobody waits for it any more."""
    condition: Any = waiting.Condition()
    hits = 0
    for at in range(1, 60):
        left_held = True
        try:
            with Interrupt(at):
                with condition:
                    try:
                        condition.wait(0.001)
                    finally:
                        left_held = condition._is_owned()
        except KeyboardInterrupt:
            hits += 1
        assert left_held and not condition._is_owned() and not condition._waiters, at
    assert hits > 8
