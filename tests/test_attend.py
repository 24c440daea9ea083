"""apply() receives its own result where it can: what becomes of it when other things happen meanwhile."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import pytest

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
