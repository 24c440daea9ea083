"""apply() and a future's result() receive the result themselves where they can: what becomes of it when other things
happen meanwhile."""

from __future__ import annotations

import concurrent.futures
import gc
import os
import signal
import statistics
import sys
import threading
import weakref
from typing import Any

import pytest
from interrupts import Interrupt

from dpool.concurrent.futures import ProcessPoolExecutor
from dpool.concurrent.futures.process import BrokenProcessPool
from dpool.errors import GroupTerminated, WorkerDied
from dpool.multiprocessing import get_context
from dpool.multiprocessing.pool import Pool

PATIENCE_S = 60


def double(number: int) -> int:
    return number * 2


def begin_and_wait(begun: str, go: str) -> int:
    """Both are FIFOs: opening one waits for the other side."""
    open(begun, "w").close()
    open(go).close()
    return 1


class Leaving:
    """Whoever unpickles it raises SystemExit."""

    def __reduce__(self) -> Any:
        return sys.exit, (3,)


class Argument:
    """It can be referred to weakly."""


def is_argument(value: Any) -> bool:
    return isinstance(value, Argument)


def die(_: Any = None) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def pool() -> Any:
    with Pool(2, context=get_context("fork")) as opened:
        opened.map(double, range(10))
        yield opened


@pytest.fixture
def fifos(tmp_path: Any) -> tuple[str, str]:
    paths = str(tmp_path / "begun"), str(tmp_path / "go")
    for path in paths:
        os.mkfifo(path)
    return paths


def touch(fifo: str) -> None:
    open(fifo, "w").close()


def wait_for(fifo: str) -> None:
    open(fifo).close()


class Applying(threading.Thread):
    """An apply() in a thread of its own."""

    def __init__(self, pool: Any, *call: Any) -> None:
        super().__init__()
        self.pool, self.call = pool, call
        self.outcome: Any = None
        self.start()

    def run(self) -> None:
        try:
            self.outcome = self.pool.apply(*self.call)
        except BaseException as error:
            self.outcome = error

    def end(self) -> Any:
        self.join(PATIENCE_S)
        assert not self.is_alive()
        return self.outcome


def test_one_after_the_other(pool: Any) -> None:
    assert [pool.apply(double, (number,)) for number in range(300)] == list(range(0, 600, 2))


def test_it_alternates_with_everything_else(pool: Any) -> None:
    for number in range(50):
        assert pool.apply(double, (number,)) == number * 2
        assert pool.apply_async(double, (number,)).get(PATIENCE_S) == number * 2
        assert pool.apply(double, (number,)) == number * 2
        assert pool.map(double, range(20)) == list(range(0, 40, 2))
        assert pool.apply(double, (number,)) == number * 2
        assert list(pool.imap(double, iter(range(5)))) == list(range(0, 10, 2))


def test_another_thread_submits_while_one_waits(pool: Any, fifos: tuple[str, str]) -> None:
    begun, go = fifos
    waiting = Applying(pool, begin_and_wait, fifos)
    wait_for(begun)
    assert pool.apply(double, (4,)) == 8
    assert pool.map(double, range(100), chunksize=1) == list(range(0, 200, 2))
    called: list[int] = []
    pool.apply_async(double, (5,), callback=called.append).get(PATIENCE_S)
    assert called == [10]
    touch(go)
    assert waiting.end() == 1


def test_many_threads_apply_at_once(pool: Any) -> None:
    def apply_many(found: list[int]) -> None:
        found += [pool.apply(double, (number,)) for number in range(200)]

    founds: list[list[int]] = [[] for _ in range(4)]
    threads = [threading.Thread(target=apply_many, args=(found,)) for found in founds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    assert founds == [list(range(0, 400, 2))] * 4


def test_the_worker_dies(pool: Any) -> None:
    for _ in range(3):
        with pytest.raises(WorkerDied):
            pool.apply(die)
        assert pool.apply(double, (1,)) == 2


def test_another_worker_dies_while_one_waits(pool: Any, fifos: tuple[str, str]) -> None:
    begun, go = fifos
    waiting = Applying(pool, begin_and_wait, fifos)
    wait_for(begun)
    with pytest.raises(WorkerDied):
        pool.apply(die)
    touch(go)
    assert waiting.end() == 1
    assert pool.apply(double, (1,)) == 2


def test_an_exception_and_what_cannot_be_pickled(pool: Any) -> None:
    for _ in range(3):
        with pytest.raises(TypeError):
            pool.apply(double)
        with pytest.raises(TypeError, match="lock"):
            pool.apply(double, (threading.Lock(),))
    assert pool.apply(double, (1,)) == 2


def test_a_function_that_travels_by_value(pool: Any) -> None:
    assert [pool.apply(lambda x=number: x) for number in range(20)] == list(range(20))


def test_terminate_while_one_waits(pool: Any, fifos: tuple[str, str]) -> None:
    begun, _ = fifos
    waiting = Applying(pool, begin_and_wait, fifos)
    wait_for(begun)
    pool.terminate()
    assert isinstance(waiting.end(), GroupTerminated)


def test_close_while_one_waits(pool: Any, fifos: tuple[str, str]) -> None:
    begun, go = fifos
    waiting = Applying(pool, begin_and_wait, fifos)
    wait_for(begun)
    pool.close()
    touch(go)
    assert waiting.end() == 1
    pool.join()


def test_close_and_terminate_after_an_apply() -> None:
    for end in ("close", "terminate"):
        pool = Pool(2, context=get_context("fork"))
        assert pool.apply(double, (1,)) == 2
        getattr(pool, end)()
        pool.join()
        assert not pool._group._thread.is_alive()  # type: ignore[attr-defined]


def test_ctrl_c_while_one_waits(pool: Any, fifos: tuple[str, str]) -> None:
    begun, go = fifos

    def interrupt() -> None:
        wait_for(begun)
        os.kill(os.getpid(), signal.SIGINT)

    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            pool.apply(begin_and_wait, fifos)
        thread.join(PATIENCE_S)
    finally:
        signal.signal(signal.SIGINT, old)
    assert pool.apply(double, (3,)) == 6
    touch(go)
    assert pool.map(double, range(50)) == list(range(0, 100, 2))


def test_every_start_method_and_a_worker_that_is_replaced() -> None:
    for method in ("spawn", "forkserver"):
        with Pool(1, maxtasksperchild=2, context=get_context(method)) as pool:
            assert [pool.apply(double, (number,)) for number in range(5)] == [0, 2, 4, 6, 8]


# -- futures


def test_a_ctrl_c_between_any_two_steps_of_result_loses_nothing() -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as executor:
        group: Any = executor.submit(double, 1).result() and executor._group

        def interrupted(at: int) -> tuple[bool, int]:
            """Whether it was, and how many steps there were if not: few if the outcome was there already."""
            future = executor.submit(double, at)
            interrupt = Interrupt(at)
            try:
                with interrupt:
                    assert future.result(PATIENCE_S) == 2 * at
                return False, at - interrupt.left
            except KeyboardInterrupt:
                assert future.result(PATIENCE_S) == 2 * at, at
                assert future.done(), at
                return True, at

        steps = statistics.median_low(count for _ in range(200) if (count := interrupted(1_000_000)[1]) > 15)
        found = sum(any(interrupted(at)[0] for _ in range(30)) for at in range(1, steps + 1))
        assert found > 0.9 * steps
        assert list(executor.map(double, range(50))) == list(range(0, 100, 2))
        executor.shutdown()
        group._dispatch.validate()
        assert group._dispatch.idle and group._attending.owed is None and not executor._pending_work_items


def test_a_ctrl_c_between_any_two_steps_of_apply_harms_nobody_else(pool: Any) -> None:
    group = pool._group

    def interrupted(at: int) -> tuple[bool, int]:
        interrupt = Interrupt(at)
        try:
            with interrupt:
                assert pool.apply(double, (at,)) == 2 * at
            return False, at - interrupt.left
        except KeyboardInterrupt:
            assert pool.apply(double, (4,)) == 8
            return True, at

    counts = [interrupted(1_000_000)[1] for _ in range(50)]
    steps = statistics.median_low(counts)  # some calls have leftovers of others to see to
    assert steps > 40
    assert all(any(interrupted(at)[0] for _ in range(30)) for at in range(1, steps // 2))
    for at in range(steps // 2, max(counts) + 1):
        interrupted(at)
    assert pool.map(double, range(50)) == list(range(0, 100, 2))
    pool.close()
    pool.join()
    group._dispatch.validate()
    assert group._dispatch.idle


def test_who_is_called_back_is_called_by_the_other_thread(fifos: tuple[str, str]) -> None:
    begun, go = fifos
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as executor:
        executor.submit(double, 1).result()
        called: list[int] = []
        future = executor.submit(begin_and_wait, begun, go)
        future.add_done_callback(lambda done: called.append(threading.get_ident()))
        wait_for(begun)
        thread = threading.Thread(target=touch, args=(go,))
        thread.start()
        assert future.result() == 1
        thread.join(PATIENCE_S)
    assert len(called) == 1 and threading.get_ident() not in called


def test_a_future_that_raises_that_is_large_and_that_takes_its_time(fifos: tuple[str, str]) -> None:
    begun, go = fifos
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as executor:
        with pytest.raises(ValueError, match="invalid literal"):
            executor.submit(int, "x").result()
        assert executor.submit(bytes, 1 << 20).result() == bytes(1 << 20)
        assert executor.submit(bytes, 100_000).result() == bytes(100_000)
        future = executor.submit(begin_and_wait, begun, go)
        wait_for(begun)
        with pytest.raises(TimeoutError):
            future.result(0.01)
        with pytest.raises(TimeoutError):
            future.result(0)
        waiting = [threading.Thread(target=future.result) for _ in range(3)]
        for thread in waiting:
            thread.start()
        touch(go)
        assert future.result() == 1
        for thread in waiting:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()


def test_what_cannot_be_rebuilt_is_told_as_ever() -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as executor:
        executor.submit(double, 1).result()
        with pytest.raises(BrokenProcessPool, match="could not be rebuilt here: SystemExit"):
            executor.submit(Leaving).result()
        assert executor.submit(double, 2).result() == 4


def test_a_worker_dies_while_one_waits_for_its_future() -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as executor:
        executor.submit(double, 1).result()
        with pytest.raises(BrokenProcessPool):
            executor.submit(die).result()


def test_a_future_that_was_waited_for_keeps_nothing() -> None:
    gc.collect()
    gc.disable()
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("fork")) as executor:
            for wait in (True, False):
                thing = Argument()
                kept = weakref.ref(thing)
                future = executor.submit(is_argument, thing)
                del thing
                if not wait:
                    concurrent.futures.wait([future], PATIENCE_S)
                assert future.result(PATIENCE_S)
                ended = weakref.ref(future)
                del future
                executor.submit(double, 1).result()
                executor.submit(double, 1).result()
                assert kept() is None and ended() is None
    finally:
        gc.enable()
