"""Owns the tests of ProcessPoolExecutor under faults: each a row of the table of faults, named by what must hold.

It asserts no times: only a hang reaches a deadline. The contract without faults is in test_executor.py.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import pickle
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from concurrent.futures.process import BrokenProcessPool, _RemoteTraceback
from pathlib import Path
from typing import Any

import executor_tasks as tasks
import pytest
from executor_tasks import Gate
from test_executor import METHODS, PATIENCE_S, executor_of, run

from dpool.concurrent.futures import ProcessPoolExecutor
from dpool.concurrent.futures.failures import WorkerDeath, to_exception
from dpool.engine import WORKER_DIED, Failure
from dpool.errors import NodeLost, RemoteError, WorkerDied


@pytest.fixture(params=METHODS)
def context(request: pytest.FixtureRequest) -> Any:
    """Every start method."""
    return multiprocessing.get_context(request.param)


@pytest.fixture(autouse=True)
def leaves_nothing() -> Iterator[None]:
    """No worker and no thread of a group outlives its test."""
    with tasks.nothing_left(PATIENCE_S):
        yield


DEATHS: list[tuple[Callable[..., Any], tuple[Any, ...], int, str]] = [
    (tasks.kill_self, (), -signal.SIGKILL, "SIGKILL"),
    (tasks.kill_self, (signal.SIGSEGV,), -signal.SIGSEGV, "SIGSEGV"),
    (tasks.exit_process, (0,), 0, "code 0"),
    (tasks.exit_process, (3,), 3, "code 3"),
]


# -- a worker dies


@pytest.mark.parametrize("death", DEATHS, ids=lambda death: str(death[3]))
def test_a_death_breaks_the_executor_and_says_how_it_happened(context: Any, death: Any, tmp_path: Path) -> None:
    function, arguments, exitcode, text = death
    gate, other = Gate(tmp_path), Gate(tmp_path, "other")
    with ProcessPoolExecutor(2, context) as executor, gate, other:
        held = executor.submit(tasks.hold, gate.started, gate.opened)
        gate.wait()
        guilty = executor.submit(tasks.hold_and_call, other.started, other.opened, function, *arguments)
        queued = [executor.submit(tasks.hold, gate.started, gate.opened) for _ in range(10)]
        other.wait()
        other.open()
        error = guilty.exception(PATIENCE_S)
        assert isinstance(error, BrokenProcessPool) and isinstance(error, WorkerDied)
        assert error.exitcode == exitcode and error.pid and text in str(error) and "terminated abruptly" in str(error)
        assert not wait([held, *queued], PATIENCE_S).not_done
        others = [future.exception() for future in [held, *queued]]
        assert all(isinstance(other, BrokenProcessPool) for other in others)
        words = f"Process {error.pid} terminated abruptly with exit code {exitcode}"
        assert all(type(one.__cause__) is _RemoteTraceback and words in str(one.__cause__)  # type: ignore[union-attr]
                   for one in [error, *others])
        assert len(set(map(id, [error, *others]))) == 12  # each has a traceback of its own
        assert text in executor._broken
        with pytest.raises(BrokenProcessPool, match=text):
            executor.submit(tasks.double, 1)
        with pytest.raises(BrokenProcessPool):
            executor.map(tasks.double, [1])


def test_the_death_of_an_idle_worker_breaks_the_executor_too() -> None:
    with executor_of(2) as executor:
        pid = executor.submit(tasks.worker_pid).result(PATIENCE_S)
        manager = executor._executor_manager_thread
        os.kill(pid, signal.SIGKILL)
        manager.join(PATIENCE_S)
        with pytest.raises(BrokenProcessPool, match="no task"):
            executor.submit(tasks.double, 1)


def test_a_map_ends_with_the_reason_after_the_results_it_has() -> None:
    with executor_of(1) as executor:
        results = executor.map(tasks.capture, [1, 2])
        assert next(results) == ((1,), {})
        pid = executor.submit(tasks.worker_pid).result(PATIENCE_S)
        os.kill(pid, signal.SIGKILL)
        broken = 0
        try:
            assert next(results) == ((2,), {})
            list(executor.map(tasks.double, range(100)))
        except BrokenProcessPool:
            broken = 1
        assert broken


def test_a_crash_with_much_data_on_its_way_does_not_hang() -> None:
    with executor_of(2) as executor:
        with pytest.raises(BrokenProcessPool):
            list(executor.map(_crash_with, ["a" * 4_000_000] * 10))


def _crash_with(data: str) -> None:
    tasks.kill_self()


@pytest.mark.parametrize("death", DEATHS, ids=lambda death: str(death[3]))
def test_with_fail_a_death_fails_one_call_and_the_worker_is_replaced(context: Any, death: Any) -> None:
    function, arguments, exitcode, text = death
    with ProcessPoolExecutor(2, context, on_worker_death="fail") as executor:
        before = [executor.submit(tasks.double, i) for i in range(20)]
        guilty = executor.submit(function, *arguments)
        after = [executor.submit(tasks.double, i) for i in range(20)]
        error = guilty.exception(PATIENCE_S)
        assert type(error) is WorkerDeath and error.exitcode == exitcode and text in str(error)
        if exitcode == -signal.SIGSEGV:
            assert "Fatal Python error: Segmentation fault" in str(error.__cause__)
            assert "in kill_self" in str(error.__cause__)
        assert [future.result(PATIENCE_S) for future in before + after] == 2 * list(range(0, 40, 2))
        assert list(executor.map(tasks.double, range(10))) == list(range(0, 20, 2))
        assert executor._broken is False


def test_with_fail_a_death_ends_the_map_at_its_item() -> None:
    with executor_of(1, on_worker_death="fail") as executor:
        results = executor.map(_kill_at, range(5), [2] * 5)
        assert [next(results), next(results)] == [0, 1]
        with pytest.raises(WorkerDeath):
            next(results)


def _kill_at(value: int, bad: int) -> int:
    if value == bad:
        tasks.kill_self()
    return value


def test_retries_run_a_call_again_and_end() -> None:
    with executor_of(2, on_worker_death="fail", retries=2) as executor:
        error = executor.submit(tasks.kill_self).exception(PATIENCE_S)
        assert isinstance(error, WorkerDeath) and error.attempts == 3


def test_a_retried_call_succeeds_when_its_worker_lives(tmp_path: Path) -> None:
    with executor_of(1, on_worker_death="fail", retries=2) as executor:
        assert executor.submit(tasks.die_until, str(tmp_path / "deaths"), 2).result(PATIENCE_S) == 2


def test_the_loss_of_its_nodes_is_a_broken_pool_for_its_call() -> None:
    lost = NodeLost("the nodes that were running task 0 were lost")
    error = to_exception(Failure(WORKER_DIED, lost))
    assert type(error) is BrokenProcessPool and str(error) == str(lost) and error.__cause__ is lost


def test_a_death_report_can_be_pickled() -> None:
    with executor_of(1) as executor:
        error = executor.submit(tasks.exit_process, 7).exception(PATIENCE_S)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is WorkerDeath and again.exitcode == 7 and str(again) == str(error)


def test_sys_exit_is_an_ordinary_outcome(context: Any) -> None:
    with ProcessPoolExecutor(1, context) as executor:
        pid = executor.submit(tasks.worker_pid).result(PATIENCE_S)
        with pytest.raises(SystemExit) as caught:
            executor.submit(tasks.exit_python, 4).result(PATIENCE_S)
        assert caught.value.code == 4
        assert executor.submit(tasks.worker_pid).result(PATIENCE_S) == pid


def test_a_death_during_shutdown_does_not_hang_it(tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    executor = executor_of(2)
    held = executor.submit(tasks.hold, gate.started, gate.opened)
    pid = gate.wait()
    thread = threading.Thread(target=executor.shutdown)
    thread.start()
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(BrokenProcessPool):
        held.result(PATIENCE_S)
    thread.join(PATIENCE_S)
    assert not thread.is_alive()


# -- the initializer


@pytest.mark.parametrize("mode", ["break", "fail"])
def test_a_failing_initializer_breaks_the_executor_with_its_cause(context: Any, mode: str) -> None:
    with ProcessPoolExecutor(2, context, _fail_quietly, on_worker_death=mode) as executor:
        future: Future[Any] | None = None
        try:
            future = executor.submit(tasks.double, 1)
        except BrokenProcessPool:
            pass  # so quickly
        if future is not None:
            error = future.exception(PATIENCE_S)
            assert type(error) is BrokenProcessPool and "no initializer today" in str(error)
            assert type(error.__cause__) is ValueError
        with pytest.raises(BrokenProcessPool, match="no initializer today"):
            executor.submit(tasks.double, 1).result(PATIENCE_S)


def _fail_quietly() -> None:
    logging.getLogger("concurrent.futures").addHandler(logging.NullHandler())
    tasks.fail_to_initialize()


def test_a_failing_initializer_is_logged_as_in_the_standard_library() -> None:
    done = run("""
from dpool.concurrent.futures import ProcessPoolExecutor
import executor_tasks
with ProcessPoolExecutor(1, initializer=executor_tasks.fail_to_initialize) as executor:
    try:
        executor.submit(abs, 1).result()
    except Exception as error:
        print(type(error).__name__)
""")
    assert done.stdout == "BrokenProcessPool\n"
    assert done.stderr.startswith("Exception in initializer:\nTraceback") and "no initializer today" in done.stderr


def test_an_initializer_that_dies_breaks_the_executor(context: Any) -> None:
    with ProcessPoolExecutor(1, context, os._exit, (5,)) as executor:
        with pytest.raises(BrokenProcessPool, match="code 5"):
            executor.submit(tasks.double, 1).result(PATIENCE_S)


def test_with_fail_an_initializer_that_always_dies_breaks_the_executor_after_some_attempts() -> None:
    with executor_of(1, initializer=os._exit, initargs=(5,), on_worker_death="fail") as executor:
        with pytest.raises(BrokenProcessPool, match="in a row"):
            executor.submit(tasks.double, 1).result(PATIENCE_S)


# -- what cannot be pickled or rebuilt


@pytest.mark.parametrize("bad", [tasks.BrokenWhenPickled(), tasks.ExitsWhenPickled(), threading.Lock(),
                                 (i for i in range(3))], ids=["raises", "exits", "lock", "generator"])
def test_an_argument_that_cannot_be_pickled_fails_its_call_alone(bad: Any) -> None:
    with executor_of(1) as executor:
        before = [executor.submit(tasks.double, i) for i in range(5)]
        guilty = executor.submit(tasks.capture, 1, bad)
        after = [executor.submit(tasks.double, i) for i in range(5)]
        error = guilty.exception(PATIENCE_S)
        assert isinstance(error, (pickle.PicklingError, SystemExit, TypeError)) and not guilty.running()
        assert [future.result(PATIENCE_S) for future in before + after] == 2 * [0, 2, 4, 6, 8]
        results = executor.map(tasks.capture, [1, bad, 3])
        assert next(results) == ((1,), {})
        with pytest.raises(type(error)):
            next(results)


def test_the_error_names_what_cannot_be_pickled() -> None:
    lock = threading.Lock()
    with executor_of(1) as executor:
        error = executor.submit(tasks.capture, {"a": [lock]}).exception(PATIENCE_S)
        assert "args[0]['a'][0]: _thread.lock" in str(error)
        error = executor.submit(lambda: lock).exception(PATIENCE_S)
        assert "<lambda>.lock: _thread.lock" in str(error)
        error = executor.submit(tasks.make_lock).exception(PATIENCE_S)
        assert "_thread.lock" in str(error) and type(error) is TypeError


@pytest.mark.parametrize("kind, expected", [(tasks.BrokenWhenPickled, pickle.PicklingError),
                                            (tasks.ExitsWhenPickled, SystemExit)])
def test_a_result_that_cannot_be_pickled_fails_its_call_alone(context: Any, kind: type, expected: type) -> None:
    with ProcessPoolExecutor(1, context) as executor:
        pid = executor.submit(tasks.worker_pid).result(PATIENCE_S)
        assert type(executor.submit(tasks.make, kind).exception(PATIENCE_S)) is expected
        assert executor.submit(tasks.worker_pid).result(PATIENCE_S) == pid


@pytest.mark.parametrize("kind", [tasks.BrokenWhenRebuilt, tasks.ExitsWhenRebuilt])
def test_what_cannot_be_rebuilt_is_a_broken_pool_for_its_call_alone(context: Any, kind: type) -> None:
    with ProcessPoolExecutor(1, context) as executor:
        for future in (executor.submit(tasks.capture, kind()), executor.submit(tasks.make, kind)):
            error = future.exception(PATIENCE_S)
            assert type(error) is BrokenProcessPool and "could not be rebuilt" in str(error)
            assert isinstance(error.__cause__, (pickle.UnpicklingError, SystemExit))
            assert executor.submit(tasks.double, 1).result(PATIENCE_S) == 2


@pytest.mark.parametrize("function, argument", [
    (tasks.capture, tasks.BrokenWhenPickled()), (tasks.capture, tasks.ExitsWhenPickled()),
    (tasks.capture, threading.Lock()), (tasks.make, tasks.BrokenWhenRebuilt), (tasks.make, tasks.ExitsWhenRebuilt),
], ids=["argument raises", "argument exits", "argument is a lock", "result raises", "result exits"])
@pytest.mark.parametrize("way", ["submit", "map", "map ahead"])
def test_what_cannot_be_pickled_or_rebuilt_keeps_nothing_alive(function: Any, argument: Any, way: str) -> None:
    gc.collect()
    gc.disable()  # a cycle would end with the next collection only
    try:
        executor = executor_of(1)
        if way == "submit":
            error = executor.submit(function, argument).exception(PATIENCE_S)
        else:
            results = executor.map(function, [argument], buffersize=None if way == "map" else 1)
            with pytest.raises(BaseException) as caught:
                next(results)
            error = caught.value.with_traceback(None)  # it leads to this frame
            del results, caught
        assert error is not None
        lost = error if error.__cause__ is None or type(error.__cause__) is _RemoteTraceback else error.__cause__
        assert lost.__traceback__ is None and type(lost.__cause__) is _RemoteTraceback
        assert "Traceback (most recent call last)" in str(lost.__cause__)
        group = executor._group
        executor.shutdown()
        ended = [weakref.ref(thing) for thing in (executor, group, group._thread)]
        del executor, group, error, lost
        assert [thing() for thing in ended] == [None] * 3
    finally:
        gc.enable()


def test_with_fail_an_argument_that_kills_its_worker_when_rebuilt_fails_its_call_alone(context: Any) -> None:
    with ProcessPoolExecutor(1, context, on_worker_death="fail") as executor:
        error = executor.submit(tasks.capture, tasks.DiesWhenRebuilt()).exception(PATIENCE_S)
        assert type(error) is WorkerDeath and error.exitcode == 6
        assert executor.submit(tasks.double, 1).result(PATIENCE_S) == 2


def test_an_exception_that_cannot_be_rebuilt_arrives_as_its_text() -> None:
    with executor_of(1) as executor:
        error = executor.submit(tasks.raise_picky).exception(PATIENCE_S)
        assert type(error) is RemoteError and str(error) == "this and that" and "PickyError" in error.type_name
        assert type(error.__cause__) is _RemoteTraceback and "raise PickyError" in str(error.__cause__)
        assert executor.submit(tasks.double, 1).result(PATIENCE_S) == 2


def test_connections_travel_as_arguments() -> None:
    here, there = multiprocessing.Pipe()
    with executor_of(1) as executor:
        executor.submit(_send, there, "hello").result(PATIENCE_S)
        assert here.recv() == "hello"
    here.close()
    there.close()


def _send(connection: Any, value: Any) -> None:
    connection.send(value)
    connection.close()


# -- processes


def test_a_forked_child_is_told_and_its_parent_is_unharmed() -> None:
    with executor_of(1) as executor:
        assert executor.submit(tasks.double, 1).result(PATIENCE_S) == 2
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                executor.submit(tasks.double, 1)
            except RuntimeError as error:
                os.write(write, str(error).encode())
            finally:
                executor.shutdown()
                os._exit(0)
        os.close(write)
        with os.fdopen(read) as file:
            assert f"created in process {os.getpid()}" in file.read()
        assert os.waitpid(child, 0)[1] == 0
        assert executor.submit(tasks.double, 2).result(PATIENCE_S) == 4


def test_an_executor_of_its_own_works_in_a_forked_child() -> None:
    with executor_of(1) as executor:
        executor.submit(tasks.double, 1).result(PATIENCE_S)
        process = multiprocessing.get_context("fork").Process(target=_use_an_executor)
        process.start()
        process.join(PATIENCE_S)
        assert process.exitcode == 0


def test_an_executor_left_open_does_not_hang_its_process(context: Any) -> None:
    process = context.Process(target=_leave_an_executor)
    process.start()
    process.join(PATIENCE_S)
    assert process.exitcode == 0


def _leave_an_executor() -> None:
    global _left
    _left = executor_of(2)
    _left.submit(tasks.double, 1)


_left: ProcessPoolExecutor | None = None


def _use_an_executor() -> None:
    with executor_of(1) as executor:
        assert list(executor.map(tasks.double, [1])) == [2]


def test_ctrl_c_reaches_the_driver_alone() -> None:
    done = run("""
import os, signal, time
from dpool.concurrent.futures import ProcessPoolExecutor
import executor_tasks
with ProcessPoolExecutor(2) as executor:
    executor.submit(abs, 1).result()
    try:
        os.killpg(os.getpgrp(), signal.SIGINT)
        time.sleep(60)
    except KeyboardInterrupt:
        print("interrupted", executor.submit(abs, -2).result())
""")
    assert (done.stdout, done.stderr) == ("interrupted 2\n", "")


def test_workers_of_a_killed_driver_end() -> None:
    read, write = os.pipe()
    # The workers inherit the write end: the pipe ends with the last of them.
    import subprocess
    import sys

    driver = subprocess.Popen(
        [sys.executable, "-c", "import time\nfrom dpool.concurrent.futures import ProcessPoolExecutor\n"
                               "executor = ProcessPoolExecutor(2)\nexecutor.submit(abs, 1).result()\n"
                               "executor.submit(time.sleep, 600)\nprint('ready', flush=True)\ntime.sleep(600)"],
        stdout=subprocess.PIPE, pass_fds=[write], text=True)
    os.close(write)
    assert driver.stdout is not None
    with driver.stdout:
        assert driver.stdout.readline() == "ready\n"
        driver.kill()
        driver.wait()
        with os.fdopen(read) as file:
            assert file.read() == ""


# -- races


def test_submitting_from_many_threads_while_it_shuts_down_loses_nothing() -> None:
    for _ in range(10):
        executor = executor_of(2)
        futures: list[Future[int]] = []
        barrier = threading.Barrier(4)

        def submit(executor: ProcessPoolExecutor = executor, futures: list[Future[int]] = futures,
                   barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            try:
                for i in range(200):
                    futures.append(executor.submit(tasks.double, i))
            except RuntimeError as error:
                assert str(error) == "cannot schedule new futures after shutdown"

        threads = [threading.Thread(target=submit) for _ in range(3)]
        for thread in threads:
            thread.start()
        barrier.wait()
        executor.shutdown()
        for thread in threads:
            thread.join(PATIENCE_S)
        assert all(future.result(0) % 2 == 0 for future in futures)


def test_cancelling_while_they_are_sent_resolves_each_future_once() -> None:
    with executor_of(2) as executor:
        futures = [executor.submit(tasks.double, i) for i in range(3000)]
        cancelled = [future.cancel() for future in reversed(futures)][::-1]
        assert not wait(futures, PATIENCE_S).not_done
        for i, (future, was_cancelled) in enumerate(zip(futures, cancelled, strict=True)):
            assert future.cancelled() == was_cancelled
            assert was_cancelled or future.result() == 2 * i
