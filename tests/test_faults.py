"""Owns the tests of Pool under faults: each a row of the table of faults, named by what must hold.

They never rely on a time: only a hang reaches a deadline. Run by pytest; what the workers do is in deeds.py.
"""

from __future__ import annotations

import os
import pickle
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.pool import MaybeEncodingError, RemoteTraceback  # type: ignore[attr-defined]
from pathlib import Path
from typing import Any

import deeds
import pytest
from leftovers import GONE_S, MARK, PATIENCE_S, Census, Watched, marked, new_mark, read_line

from dpool.errors import ForeignProcess, GroupBroken, GroupTerminated, RemoteError, WorkerDied
from dpool.multiprocessing.pool import Pool

HERE = Path(__file__).resolve().parent
METHODS = ["fork", "forkserver", "spawn"]


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    """Every start method."""
    return str(request.param)


@contextmanager
def sturdy_pool(method: str = "fork", processes: int = 2, **options: Any) -> Iterator[Pool]:
    """A pool that must be whole after the body, and leave nothing when it is gone."""
    census = Census()
    pool = Pool(processes, context=get_context(method), **options)
    try:
        yield pool
        assert pool.map_async(deeds.double, range(20)).get(PATIENCE_S) == list(range(0, 40, 2))
        assert len(pool._pool) == processes
        pool.close()
        joined = threading.Thread(target=pool.join, daemon=True)
        joined.start()
        joined.join(PATIENCE_S)
        assert not joined.is_alive(), "close() and join() hang"
    finally:
        pool.terminate()
    del pool
    census.check()


class Neighbours:
    """Innocent tasks queued before and after a bad one."""

    def __init__(self, pool: Pool) -> None:
        self._results = [pool.apply_async(deeds.double, (number,)) for number in range(10)]
        self._pool = pool

    def __enter__(self) -> Neighbours:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._results += [self._pool.apply_async(deeds.double, (number,)) for number in range(10, 20)]
        if kind is None:
            assert [result.get(PATIENCE_S) for result in self._results] == list(range(0, 40, 2))


def fate(pool: Pool, function: Callable[..., Any], *args: object) -> BaseException:
    """What a task fails with, its neighbours unharmed."""
    with Neighbours(pool):
        result = pool.apply_async(function, args)
    result.wait(PATIENCE_S)
    assert result.ready(), "the task hangs"
    with pytest.raises(BaseException) as caught:  # noqa: B017  SystemExit too
        result.get()
    return caught.value


def make_fifo(path: Path) -> str:
    os.mkfifo(path)
    return str(path)


@contextmanager
def opened(fifo: str, text: str = "") -> Iterator[int]:
    """A FIFO with both ends open, so that neither side waits for the other to open it, and with `text` in it."""
    descriptor = os.open(fifo, os.O_RDWR)
    try:
        os.write(descriptor, text.encode())
        yield descriptor
    finally:
        os.close(descriptor)


def read_pids(fifo: str) -> list[int]:
    """Wait until a worker has written a line to the FIFO. A second writer may find nobody there: it wants `opened`."""
    with opened(fifo) as descriptor:
        return [int(word) for word in read_line(descriptor).split()]


# -- the worker ends


def test_a_killed_worker_fails_its_own_task_and_no_other(method: str) -> None:
    """Row 1."""
    with sturdy_pool(method) as pool:
        before = {process.pid for process in pool._pool}
        error = fate(pool, deeds.kill_self)
        assert type(error) is WorkerDied
        assert error.exitcode == -signal.SIGKILL
        assert error.pid in before
        assert error.host == os.uname().nodename
        assert "SIGKILL" in str(error) and str(error.pid) in str(error) and os.uname().nodename in str(error)
        assert error.pid not in {process.pid for process in pool._pool}
        copy = pickle.loads(pickle.dumps(error))
        assert (str(copy), copy.pid, copy.exitcode) == (str(error), error.pid, error.exitcode)


def test_a_worker_killed_from_outside_while_it_idles_is_replaced_and_nobody_notices(method: str) -> None:
    """Row 1, between tasks."""
    with sturdy_pool(method) as pool:
        pool.map(deeds.double, range(4))
        victims = [process.pid for process in pool._pool]
        gone = Watched(victims)
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        assert not gone.left_after(PATIENCE_S)
        assert pool.map_async(deeds.double, range(100), chunksize=1).get(PATIENCE_S) == list(range(0, 200, 2))
        assert not {process.pid for process in pool._pool} & set(victims)


def test_a_map_whose_worker_is_killed_raises_once_its_other_tasks_have_run() -> None:
    """Row 1, for the tasks that travelled with the bad one."""
    with sturdy_pool() as pool:
        pool.map(deeds.double, range(1000))  # so that tasks travel in batches
        results = pool.imap_unordered(_survive_but_7, range(500))
        values = []
        deaths = []
        for _ in range(500):
            try:
                values.append(results.next(PATIENCE_S))
            except WorkerDied as error:
                deaths.append(error)
        assert sorted(values) == [number for number in range(500) if number != 7]
        assert len(deaths) == 1
        assert deaths[0].task == 7
        with pytest.raises(StopIteration):
            results.next(PATIENCE_S)


def _survive_but_7(value: int) -> int:
    return deeds.kill_self_if(value, 7)


def test_a_crash_says_its_signal_and_where_in_the_code_it_was(method: str) -> None:
    """Row 2."""
    with sturdy_pool(method) as pool:
        error = fate(pool, deeds.segfault)
        assert type(error) is WorkerDied
        assert error.exitcode == -signal.SIGSEGV
        assert "SIGSEGV" in str(error)
        assert isinstance(error.__cause__, RemoteTraceback)
        assert "in segfault" in str(error.__cause__) and "deeds.py" in str(error.__cause__)


@pytest.mark.parametrize("code", [0, 3])
def test_a_task_that_exits_the_process_is_a_death_whatever_the_code(code: int, method: str) -> None:
    """Row 3."""
    with sturdy_pool(method) as pool:
        error = fate(pool, deeds.exit_process, code)
        assert type(error) is WorkerDied
        assert error.exitcode == code
        assert f"exited with code {code}" in str(error)


@pytest.mark.parametrize("code", [4, None, "text"])
def test_sys_exit_in_a_task_reaches_the_caller_and_the_worker_lives(code: object) -> None:
    """Row 4."""
    with sturdy_pool() as pool:
        before = {process.pid for process in pool._pool}
        error = fate(pool, deeds.exit_python, code)
        assert type(error) is SystemExit
        assert error.code == code
        assert {process.pid for process in pool._pool} == before


@pytest.mark.parametrize("kind", [KeyboardInterrupt, GeneratorExit, BaseException, StopIteration])
def test_any_exception_of_a_task_reaches_the_caller_and_the_worker_lives(kind: type[BaseException]) -> None:
    """Row 4, for the other exceptions that loops take for themselves."""
    with sturdy_pool() as pool:
        before = {process.pid for process in pool._pool}
        assert type(fate(pool, deeds.raise_error, kind, "why")) is kind
        assert {process.pid for process in pool._pool} == before


def test_a_task_out_of_memory_gets_memoryerror_and_the_worker_lives(method: str) -> None:
    """Row 6."""
    with sturdy_pool(method) as pool:
        before = {process.pid for process in pool._pool}
        assert type(fate(pool, deeds.allocate_beyond_limit)) is MemoryError
        assert {process.pid for process in pool._pool} == before


def test_a_worker_that_holds_the_gil_is_busy_and_not_dead(method: str, tmp_path: Path) -> None:
    """Row 8."""
    fifo = make_fifo(tmp_path / "fifo")
    census = Census()
    pool = Pool(2, context=get_context(method))
    try:
        stuck = pool.apply_async(deeds.tell_and_hold_gil, (fifo,))
        (busy,) = read_pids(fifo)
        assert pool.map_async(deeds.double, range(200), chunksize=1).get(PATIENCE_S) == list(range(0, 400, 2))
        assert busy in {process.pid for process in pool._pool}
        assert not stuck.ready()
        gone = Watched([busy])
    finally:
        pool.terminate()
    assert not gone.left_after(GONE_S)
    with pytest.raises(GroupTerminated):
        stuck.get(PATIENCE_S)
    del pool
    census.check()


def test_a_stopped_worker_that_ignores_sigterm_is_ended_by_terminate(tmp_path: Path) -> None:
    """Row 7, as far as a pool has no time limit: it is never mistaken for dead, and terminate() ends it."""
    census = Census()
    pool = Pool(2, deeds.ignore_sigterm, context=get_context("fork"))
    try:
        assert pool.map_async(deeds.double, range(20)).get(PATIENCE_S) == list(range(0, 40, 2))
        stopped = pool._pool[0].pid
        os.kill(stopped, signal.SIGSTOP)
        assert pool._pool[0].is_alive()
        gone = Watched([process.pid for process in pool._pool])
    finally:
        pool.terminate()
    assert not gone.left_after(GONE_S)
    pool.join()
    del pool
    census.check()


def test_terminate_lets_workers_that_handle_sigterm_finalize(method: str, tmp_path: Path) -> None:
    """Where the handler raises in a task, the worker does not begin another one, nor wait for one."""
    census = Census()
    path, fifo = str(tmp_path / "finalized"), str(tmp_path / "told")
    os.mkfifo(fifo)
    pool = Pool(2, deeds.exit_at_sigterm, (path,), context=get_context(method))
    try:
        pool.map_async(deeds.tell_and_wait_for_ever, [fifo, fifo], chunksize=1)
        told: list[str] = []
        while len(told) < 2:
            with open(fifo) as file:
                told += file.read().split()
        more = [pool.apply_async(deeds.wait_for_ever) for _ in range(20)]
    finally:
        pool.terminate()
    pool.join()
    assert sorted(deeds.read(path).split()) == sorted(told)
    del pool, more
    census.check()


class Record:
    """A Sink that keeps what it is told."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.values: list[Any] = []
        self.failures: list[Any] = []

    def start(self) -> bool:
        return True

    def set(self, first: int, values: Any) -> None:
        self.values.extend(values)
        self.done.set()

    def fail(self, index: int, failure: Any) -> None:
        self.failures.append(failure)
        self.done.set()


@pytest.mark.parametrize("deaths", [3, 99])
def test_a_group_with_retries_runs_a_task_again_as_often_as_it_says(deaths: int, tmp_path: Path) -> None:
    """Rows 1 and 9: three retries outlive three deaths; a task that kills every worker is given up after 1 + 3."""
    from dpool import session
    from dpool.engine import MAP, GroupSpec

    census = Census()
    group = session.current().open_group(GroupSpec(2, get_context("fork"), retries=3))
    try:
        bad, good = Record(), Record()
        path = tmp_path / "deaths"
        group.submit(deeds.kill_self_until, (str(path), deaths), {}, bad)
        group.submit_many(deeds.double, list(range(50)), MAP, good)
        assert bad.done.wait(PATIENCE_S)
        if deaths == 3:
            assert bad.values == [3]
        else:
            (failure,) = bad.failures
            assert type(failure.exception) is WorkerDied
            assert failure.exception.attempts == 4
            assert "attempt 4" in str(failure.exception)
            assert path.stat().st_size == 4
        again = Record()
        group.submit(deeds.double, (21,), {}, again)
        assert again.done.wait(PATIENCE_S) and again.values == [42]
        group.close()
        assert group.join(PATIENCE_S)
        assert sorted(good.values) == list(range(0, 100, 2))
    finally:
        group.terminate()
    del group
    census.check()


def test_an_initializer_that_raises_fails_all_tasks_with_its_exception_as_the_cause(method: str) -> None:
    """Row 10."""
    census = Census()
    pool = Pool(2, deeds.raise_error, (OSError, 5, "no such luck"), context=get_context(method))
    try:
        with pytest.raises(GroupBroken, match="initializer.*no such luck") as caught:
            pool.map_async(deeds.double, range(20)).get(PATIENCE_S)
        assert type(caught.value.__cause__) is OSError
        with pytest.raises(GroupBroken):
            pool.apply_async(deeds.double, (1,)).get(PATIENCE_S)
        pool.close()
        pool.join()
    finally:
        pool.terminate()
    del pool, caught
    census.check()


@pytest.mark.parametrize("initializer", [deeds.kill_self, deeds.segfault])
def test_an_initializer_that_kills_breaks_the_pool_after_a_bounded_number_of_workers(
        initializer: Callable[[], None]) -> None:
    """Row 10."""
    census = Census()
    pool = Pool(2, initializer, context=get_context("fork"))
    try:
        with pytest.raises(GroupBroken, match="before they were ready.*SIG"):
            pool.map_async(deeds.double, range(20)).get(PATIENCE_S)
        pool.close()
        pool.join()
    finally:
        pool.terminate()
    del pool
    census.check()


# -- the driver ends

# Both workers are there when the body begins: one that a fork server is just making is in the driver's process group
# still, so that a Ctrl-C would reach it.
DRIVER = """
import os
import sys
import threading
sys.path[:0] = [{here!r}]
import deeds
from multiprocessing import get_context
from dpool.multiprocessing.pool import Pool
if __name__ == "__main__":
    pool = Pool(2, context=get_context({method!r}))
    seen = set()
    while len(seen) < 2:
        seen.update(result.get() for result in [pool.apply_async(os.getpid) for _ in range(20)])
    {body}
"""


class Driver:
    """A program with a pool in a process, and a session, of its own. At the end of its block nothing of it is left, or
    the test fails; if it takes longer than PATIENCE_S everything of it is killed, so that no read waits for ever."""

    def __init__(self, method: str, body: str, tmp_path: Path) -> None:
        script = tmp_path / "driver.py"
        script.write_text(DRIVER.format(here=str(HERE), method=method, body=body))
        self.mark = new_mark()
        self._process = subprocess.Popen([sys.executable, str(script)], env={**os.environ, MARK: self.mark},
                                         start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                         stderr=subprocess.PIPE)
        assert self._process.stdout is not None
        self.pid = self._process.pid
        self.stdout = self._process.stdout.fileno()
        self._late = threading.Timer(PATIENCE_S, self._kill_all)
        self._late.daemon = True
        self._late.start()

    def _kill_all(self) -> None:
        for pid in marked(self.mark):
            os.kill(pid, signal.SIGKILL)

    def kill(self) -> None:
        self._process.kill()

    def rest(self) -> tuple[str, str, int]:
        """Wait for the end; what it printed that was not read yet, its stderr, its exit code."""
        out, err = self._process.communicate()
        return out.decode(), err.decode(), self._process.returncode

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                assert Watched(marked(self.mark)).left_after(GONE_S) == []
                assert marked(self.mark) == set()
        finally:
            self._kill_all()
            self._process.communicate()
            self._late.cancel()
            self._late.join()


@pytest.mark.parametrize("deed", ["tell_and_hold_gil", "tell_and_start_children", "tell_and_wait"])
def test_nothing_is_left_when_the_driver_is_killed(method: str, deed: str, tmp_path: Path) -> None:
    """Row 16: whatever the workers are doing, their own children too, and with tasks queued."""
    fifo = make_fifo(tmp_path / "fifo")
    answer = make_fifo(tmp_path / "answer")
    args = (fifo, answer) if deed == "tell_and_wait" else (fifo,)
    body = f"""
    pool.apply_async(deeds.{deed}, {args!r})
    pool.map(deeds.double, range(10 ** 6), chunksize=1)
    threading.Event().wait()
    """
    with Driver(method, body, tmp_path) as driver:
        read_pids(fifo)
        all_of_it = marked(driver.mark)
        assert len(all_of_it) >= 3
        gone = Watched(all_of_it)
        driver.kill()
        assert gone.left_after(GONE_S) == []


def test_a_killed_worker_takes_its_children_along(method: str, tmp_path: Path) -> None:
    """Row 1, for what the task had started."""
    fifo = make_fifo(tmp_path / "fifo")
    with sturdy_pool(method) as pool:
        result = pool.apply_async(deeds.tell_and_start_children, (fifo,))
        worker, child = read_pids(fifo)
        gone = Watched([worker, child])
        os.kill(worker, signal.SIGKILL)
        assert gone.left_after(GONE_S) == []
        with pytest.raises(WorkerDied):
            result.get(PATIENCE_S)


def test_a_daemon_that_a_task_starts_lives_on_as_with_the_stdlib_and_holds_nothing_up(method: str) -> None:
    """Row 44: who moves a process into a session of its own wants it to stay. Nothing waits for it."""
    with sturdy_pool(method) as pool:
        daemon = pool.apply(deeds.start_daemon)
    try:
        # Its worker has ended, and everything of the worker's; sturdy_pool has counted.
        descriptor = os.pidfd_open(daemon)
        with os.fdopen(descriptor, "rb"):
            poll = select.poll()
            poll.register(descriptor, select.POLLIN)
            assert not poll.poll(0)
    finally:
        os.kill(daemon, signal.SIGKILL)


@pytest.mark.parametrize("ending, code", [("sys.exit(5)", 5), ("raise SystemExit", 0), ("pass", 0)])
def test_a_driver_that_exits_with_tasks_pending_keeps_its_code_and_says_nothing(
        method: str, ending: str, code: int, tmp_path: Path) -> None:
    """Row 18."""
    fifo = make_fifo(tmp_path / "fifo")
    answer = make_fifo(tmp_path / "answer")
    body = f"""
    r = pool.map_async(deeds.double, range(10 ** 5), chunksize=1)
    pool.apply_async(deeds.tell_and_wait, {(fifo, answer)!r})
    {ending}
    """
    with Driver(method, body, tmp_path) as driver:
        assert driver.rest() == ("", "", code)


def test_ctrl_c_reaches_the_driver_alone_and_the_pool_goes_on(method: str, tmp_path: Path) -> None:
    """Row 19."""
    fifo = make_fifo(tmp_path / "fifo")
    body = f"""
    result = pool.apply_async(deeds.tell_and_wait, ({fifo!r}, {str(tmp_path / "answer")!r}))
    try:
        print("waiting", flush=True)
        result.get()
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    print(result.get(), pool.map(deeds.double, [1, 2]), flush=True)
    pool.close()
    pool.join()
    """
    answer = make_fifo(tmp_path / "answer")
    with Driver(method, body, tmp_path) as driver:
        read_pids(fifo)
        assert read_line(driver.stdout) == "waiting\n"
        os.killpg(driver.pid, signal.SIGINT)
        assert read_line(driver.stdout) == "interrupted\n"
        with opened(answer, "answered\n"):
            assert driver.rest() == ("answered\n [2, 4]\n", "", 0)


@pytest.mark.parametrize("wait", ["pool.map(deeds.tell_and_wait_for_ever, [{fifo!r}] * 100)",
                                  "pool.apply(deeds.tell_and_wait_for_ever, ({fifo!r},))",
                                  "list(pool.imap(deeds.tell_and_wait_for_ever, ({fifo!r} for _ in iter(int, 1))))"])
def test_ctrl_c_ends_a_driver_that_does_not_catch_it_and_only_the_driver_prints(
        wait: str, method: str, tmp_path: Path) -> None:
    """Row 19."""
    fifo = make_fifo(tmp_path / "fifo")
    with opened(fifo) as told, Driver(method, wait.format(fifo=fifo), tmp_path) as driver:
        read_line(told)
        os.killpg(driver.pid, signal.SIGINT)
        out, err, code = driver.rest()
        assert out == ""
        assert err.count("Traceback") == 1 and err.rstrip().endswith("KeyboardInterrupt")
        assert code == -signal.SIGINT


# -- memory


SHM_PROGRAM = """
import sys
import deeds
from dpool.multiprocessing.pool import Pool
if __name__ == "__main__":
    with Pool(2) as pool:
        sizes = [len(data) for data in pool.map(deeds.identity, [bytes(32 << 20)] * 4, chunksize=1)]
        values = pool.map(deeds.double, range(1000), chunksize=1)
    print(sizes == [32 << 20] * 4, values == list(range(0, 2000, 2)))
"""


@pytest.mark.parametrize("fill", [False, True])
def test_a_small_or_full_dev_shm_does_not_matter(fill: bool, tmp_path: Path) -> None:
    """Row 29."""
    script = tmp_path / "driver.py"
    script.write_text(SHM_PROGRAM)
    shell = "mount -t tmpfs -o size=1m none /dev/shm" + (" && ! cat /dev/zero > /dev/shm/full 2>/dev/null" if fill
                                                         else "")
    private = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
    if subprocess.run([*private, shell], capture_output=True).returncode:
        pytest.skip("needs the right to mount in a namespace of its own")
    done = subprocess.run([*private, f'{shell}; exec "$0" "$@"', sys.executable, str(script)], capture_output=True,
                          text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, timeout=PATIENCE_S)
    assert (done.stdout, done.stderr, done.returncode) == ("True True\n", "", 0)


def test_a_result_of_more_than_two_gigabytes_arrives() -> None:
    """Row 41."""
    with sturdy_pool() as pool:
        assert len(pool.apply_async(deeds.make_bytes, ((2 << 30) + 1,)).get(PATIENCE_S)) == (2 << 30) + 1


def test_full_pipes_in_both_directions_are_no_deadlock(method: str) -> None:
    """Row 41: many messages of the largest size that goes through a socket, while the results fill theirs."""
    with sturdy_pool(method) as pool:
        data = [bytes([number % 256]) * 30_000 for number in range(2000)]
        assert pool.map_async(deeds.identity, data, chunksize=1).get(PATIENCE_S) == data


def test_a_million_tasks_are_mapped_one_by_one() -> None:
    """Row 41."""
    with sturdy_pool() as pool:
        assert pool.map_async(deeds.identity, range(10 ** 6), chunksize=1).get(PATIENCE_S) == list(range(10 ** 6))


# -- what cannot be pickled, or rebuilt


def test_an_argument_that_cannot_be_pickled_fails_its_task_and_is_named() -> None:
    """Row 36."""
    with sturdy_pool() as pool:
        error = fate(pool, deeds.identity, {"model": [threading.Lock()]})
        assert isinstance(error, TypeError)
        assert "args[0]['model'][0]: _thread.lock" in str(error)
        with pytest.raises(TypeError, match=r"item\[1\]: _thread.lock"):
            pool.map_async(deeds.identity, [1, (2, threading.Lock()), 3], chunksize=1).get(PATIENCE_S)


def test_a_function_that_cannot_be_pickled_is_refused_at_the_call_and_named() -> None:
    """Row 36."""
    lock = threading.Lock()

    def locked(value: int) -> int:
        with lock:
            return value

    with sturdy_pool() as pool:
        with pytest.raises(TypeError, match=r"locked\.lock: _thread.lock"):
            pool.apply_async(locked, (1,))
        assert not pool._cache or all(not result.ready() for result in pool._cache.values())


@pytest.mark.parametrize("kind", [RuntimeError, SystemExit, RecursionError])
def test_an_argument_whose_pickling_raises_fails_its_task_with_that_exception(kind: type[BaseException]) -> None:
    """Row 36."""
    with sturdy_pool() as pool:
        error = fate(pool, deeds.identity, deeds.Dumps(deeds.raise_error, kind, "cannot pickle"))
        assert type(error) is kind
        assert error.args == ("cannot pickle",)


def test_a_result_that_cannot_be_pickled_fails_its_task_with_the_stdlib_s_error() -> None:
    """Row 37."""
    with sturdy_pool() as pool:
        before = {process.pid for process in pool._pool}
        error = fate(pool, deeds.make_lock)
        assert type(error) is MaybeEncodingError
        assert "_thread.lock" in str(error) and "result" in str(error)
        assert {process.pid for process in pool._pool} == before


def test_a_result_whose_pickling_kills_the_worker_fails_its_task_alone() -> None:
    """Row 37."""
    with sturdy_pool() as pool:
        assert type(fate(pool, deeds.make_dumps, deeds.exit_process, 3)) is WorkerDied


def test_an_exception_that_cannot_be_rebuilt_arrives_as_its_text_with_its_traceback() -> None:
    """Row 38."""
    with sturdy_pool() as pool:
        error = fate(pool, deeds.raise_error, deeds.NeedsTwo, "one", "two")
        assert type(error) is RemoteError
        assert str(error) == "one and two"
        assert error.type_name == "deeds.NeedsTwo"
        assert "raise_error" in str(error.__cause__) and "NeedsTwo" in str(error.__cause__)


def test_an_exception_that_cannot_be_pickled_arrives_as_the_stdlib_reports_it() -> None:
    """Row 38."""
    with sturdy_pool() as pool:
        error = fate(pool, deeds.raise_error, deeds.HoldsLock, "boo")
        assert type(error) is MaybeEncodingError
        assert "HoldsLock" in str(error) and "boo" in str(error)
        assert "raise_error" in str(error.__cause__)


@pytest.mark.parametrize("kind", [ZeroDivisionError, SystemExit, KeyboardInterrupt])
def test_a_result_that_raises_when_it_is_rebuilt_fails_its_task_alone(kind: type[BaseException]) -> None:
    """Row 39."""
    with sturdy_pool() as pool:
        assert type(fate(pool, deeds.make_loads, deeds.raise_error, kind)) is kind


def test_an_exception_that_exits_when_it_is_rebuilt_fails_its_task_alone() -> None:
    """Row 39."""
    with sturdy_pool() as pool:
        error = fate(pool, deeds.raise_error, deeds.ExitsOnLoad, "harmful")
        assert type(error) is RemoteError
        assert error.type_name == "deeds.ExitsOnLoad"


@pytest.mark.parametrize("kind", [ZeroDivisionError, SystemExit, pickle.UnpicklingError])
def test_an_argument_that_raises_when_it_is_rebuilt_fails_its_task_alone(kind: type[BaseException]) -> None:
    """Row 40."""
    with sturdy_pool() as pool:
        before = {process.pid for process in pool._pool}
        assert type(fate(pool, deeds.identity, deeds.Loads(deeds.raise_error, kind))) is kind
        assert {process.pid for process in pool._pool} == before


@pytest.mark.parametrize("end", [deeds.segfault, deeds.kill_self])
def test_an_argument_that_kills_the_worker_when_it_is_rebuilt_fails_its_task_alone(
        end: Callable[[], None], method: str) -> None:
    """Row 40."""
    with sturdy_pool(method) as pool:
        pool.map(deeds.double, range(1000))
        assert type(fate(pool, deeds.identity, deeds.Loads(end))) is WorkerDied


# -- forks, pools in pools, children


def test_a_forked_child_is_told_that_the_pool_is_not_its_own_and_can_make_one(method: str) -> None:
    """Row 42."""
    with sturdy_pool(method) as pool:
        read, write = os.pipe()
        pid = os.fork()
        if not pid:
            told = []
            try:
                for call in (lambda: pool.apply_async(deeds.double, (1,)), lambda: pool.map(deeds.double, [1]),
                             lambda: pool.imap(deeds.double, [1]), lambda: pool.imap(deeds.double, iter([1]))):
                    try:
                        call()
                        told.append("nothing")
                    except ForeignProcess as error:
                        told.append("foreign" if str(os.getppid()) in str(error) else str(error))
                with Pool(2, context=get_context(method)) as own:
                    told.append(str(own.map_async(deeds.double, range(3)).get(PATIENCE_S)))
                pool.terminate()
                pool.join()
            except BaseException as error:
                told.append(repr(error))
            os.write(write, ";".join(told).encode())
            os._exit(0)
        os.close(write)
        child = Watched([pid])
        assert read_line(read) == "foreign;foreign;foreign;foreign;[0, 2, 4]"
        os.close(read)
        assert child.left_after(PATIENCE_S) == []
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert pool.map_async(deeds.double, range(100), chunksize=1).get(PATIENCE_S) == list(range(0, 200, 2))


FORKING_DRIVER = """
    import os, warnings
    warnings.simplefilter("ignore")  # Python's own word about a fork beside threads
    pid = os.fork()
    if not pid:
        sys.exit(3)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print(code, pool.map(deeds.double, range(3)))
    pool.close()
    pool.join()
"""


def test_the_exit_of_a_forked_child_leaves_the_parent_s_pool_alone(method: str, tmp_path: Path) -> None:
    """Row 42, with the child's whole exit, finalizers and all."""
    with Driver(method, FORKING_DRIVER, tmp_path) as driver:
        assert driver.rest() == ("3 [0, 2, 4]\n", "", 0)


def test_a_child_forked_by_the_driver_keeps_no_worker_alive(method: str, tmp_path: Path) -> None:
    """Row 42 with row 16: the child outlives the driver; the workers do not."""
    fifo = make_fifo(tmp_path / "fifo")
    answer = make_fifo(tmp_path / "answer")
    body = f"""
    import os
    print(*[process.pid for process in pool._pool], flush=True)
    if not os.fork():
        deeds.tell_and_wait({fifo!r}, {answer!r})
        os._exit(0)
    pool.apply(deeds.tell_and_hold_gil, ({fifo!r},))
    """
    with Driver(method, body, tmp_path) as driver:
        workers = {int(word) for word in read_line(driver.stdout).split()}
        with opened(fifo) as pids:
            tellers = {int(read_line(pids)), int(read_line(pids))}
        assert len(tellers & workers) == 1
        # What multiprocessing started for itself lives as long as the child, as it does without dpool.
        others, child = Watched([driver.pid, *workers]), Watched(tellers - workers)
        driver.kill()
        assert others.left_after(GONE_S) == []
        with opened(answer, "go on\n"):
            assert child.left_after(GONE_S) == []


def test_pools_in_pools_in_pools_work(method: str) -> None:
    """Row 43."""
    with sturdy_pool(method) as pool:
        assert sum(pool.starmap_async(deeds.nested, [(method, 2)] * 2).get(PATIENCE_S)) == 8


def test_a_task_may_fork(method: str) -> None:
    """Row 43's neighbour: the child of a worker is a worker's no more."""
    with sturdy_pool(method) as pool:
        assert pool.apply_async(deeds.fork_in_task).get(PATIENCE_S) == 7


# -- user code that upsets its process


def test_a_task_that_closes_the_worker_s_descriptors_harms_no_other(method: str) -> None:
    """Row 45: the worker cannot report any more and is replaced."""
    with sturdy_pool(method) as pool:
        assert type(fate(pool, deeds.close_descriptors)) is WorkerDied


def test_a_task_that_changes_what_its_process_shares_harms_nobody(method: str, tmp_path: Path) -> None:
    """Row 45: directory, umask, environment, handlers and sys.stdout stay changed in that worker, as in the stdlib."""
    with sturdy_pool(method) as pool:
        before = {process.pid for process in pool._pool}
        with Neighbours(pool):
            assert pool.apply_async(deeds.upset_process, (str(tmp_path),)).get(PATIENCE_S) is None
        assert {process.pid for process in pool._pool} == before


def test_a_task_may_print_more_than_any_pipe_holds(method: str, tmp_path: Path) -> None:
    """Row 45: 64 MiB, while the driver waits for the result and something else reads its output."""
    body = """
    assert pool.apply(deeds.print_much, (64 << 10,)) == 64 << 10
    pool.close()
    pool.join()
    """
    with Driver(method, body, tmp_path) as driver:
        size = 0
        while data := os.read(driver.stdout, 1 << 20):
            size += len(data)
        assert size == 64 << 20
        assert driver.rest() == ("", "", 0)


# -- races at the end


def test_close_and_terminate_may_be_called_again_and_in_any_order() -> None:
    """Row 50."""
    census = Census()
    for calls in (
        ("close", "close", "join", "join"),
        ("terminate", "terminate", "join"),
        ("close", "terminate", "join"),
        ("terminate", "close", "join"),
        ("close", "join", "terminate", "join"),
    ):
        pool = Pool(2, context=get_context("fork"))
        pool.map_async(deeds.double, range(100))
        for call in calls:
            getattr(pool, call)()
        with pytest.raises(ValueError, match="Pool not running"):
            pool.apply_async(deeds.double, (1,))
        del pool
        census.check()


def test_tasks_submitted_by_many_threads_during_the_end_are_done_refused_or_abandoned() -> None:
    """Row 50: none of them hangs."""
    census = Census()
    for end in ("close", "terminate"):
        pool = Pool(2, context=get_context("fork"))
        started = threading.Barrier(4)
        outcomes: list[str] = []

        def submit(pool: Pool = pool, started: threading.Barrier = started, outcomes: list[str] = outcomes) -> None:
            started.wait()
            while True:
                try:
                    result = pool.apply_async(deeds.double, (1,))
                except (ValueError, GroupTerminated) as error:
                    outcomes.append(str(error))
                    return
                try:
                    assert result.get(PATIENCE_S) == 2
                except GroupTerminated:
                    outcomes.append("abandoned")

        threads = [threading.Thread(target=submit) for _ in range(3)]
        for thread in threads:
            thread.start()
        started.wait()
        getattr(pool, end)()
        for thread in threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()
        pool.join()
        assert set(outcomes) <= {"Pool not running", "abandoned", "this pool is closed: it takes no more tasks"} or all(
            "Pool" in outcome or "pool" in outcome or outcome == "abandoned" for outcome in outcomes), outcomes
        del pool, submit, threads
        census.check()


def test_terminate_with_a_full_socket_and_a_queue_returns(method: str, tmp_path: Path) -> None:
    """Row 50: ten thousand large tasks wait, both workers are busy."""
    fifo = make_fifo(tmp_path / "fifo")
    census = Census()
    with opened(fifo) as told:
        pool = Pool(2, context=get_context(method))
        try:
            stuck = [pool.apply_async(deeds.tell_and_hold_gil, (fifo,)) for _ in range(2)]
            queued = pool.map_async(deeds.identity, [bytes(20_000)] * 10_000, chunksize=1)
            assert len({read_line(told) for _ in stuck}) == len(stuck)
        finally:
            ended = threading.Thread(target=pool.terminate, daemon=True)
            ended.start()
            ended.join(PATIENCE_S)
            assert not ended.is_alive()
    for result in (*stuck, queued):
        with pytest.raises(GroupTerminated):
            result.get(PATIENCE_S)
    del pool
    census.check()


def test_terminate_from_a_callback_ends_the_pool() -> None:
    """Row 50: the callback runs in the pool's own thread."""
    census = Census()
    pool = Pool(2, context=get_context("fork"))
    called = threading.Event()

    def end(_: object) -> None:
        pool.terminate()
        called.set()

    pool.apply_async(deeds.double, (1,), callback=end)
    assert called.wait(PATIENCE_S)
    pool.join()
    del end
    census.check()
