"""Owns the contract of ProcessPoolExecutor: what its callers may rely on, where no process dies.

It never sleeps to wait for something and asserts no times. Deaths and broken pickles are in test_executor_faults.py,
bad arguments in test_executor_inputs.py.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import inspect
import itertools
import multiprocessing
import pickle
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent import futures as stdlib
from concurrent.futures import process as stdlib_process
from pathlib import Path
from typing import Any

import executor_tasks as tasks
import pytest
from clusters import until
from executor_tasks import Gate

import dpool
from dpool.concurrent import futures
from dpool.concurrent.futures import ProcessPoolExecutor, as_completed, wait
from dpool.concurrent.futures.future import Call, Future

PATIENCE_S = 60.0
METHODS = ["fork", "forkserver", "spawn"]


@pytest.fixture(params=METHODS)
def context(request: pytest.FixtureRequest) -> Any:
    """Every start method."""
    return multiprocessing.get_context(request.param)


@pytest.fixture(autouse=True)
def leaves_nothing() -> Iterator[None]:
    """No worker and no thread of a group outlives its test."""
    with tasks.nothing_left(PATIENCE_S):
        yield


def executor_of(workers: int, **options: Any) -> ProcessPoolExecutor:
    """An executor with the fastest start method."""
    return ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), **options)


# -- what it is


def test_is_a_process_pool_executor_for_isinstance() -> None:
    assert issubclass(ProcessPoolExecutor, stdlib.ProcessPoolExecutor)
    assert dpool.ProcessPoolExecutor is ProcessPoolExecutor


def test_other_names_are_the_standard_librarys_own() -> None:
    for name in stdlib.__all__:
        assert (getattr(futures, name) is getattr(stdlib, name)) == (name != "ProcessPoolExecutor")
    process: Any = importlib.import_module("dpool.concurrent.futures.process")
    thread: Any = importlib.import_module("dpool.concurrent.futures.thread")
    assert process.BrokenProcessPool is stdlib_process.BrokenProcessPool
    assert process.EXTRA_QUEUED_CALLS is stdlib_process.EXTRA_QUEUED_CALLS
    assert thread.ThreadPoolExecutor is stdlib.ThreadPoolExecutor
    assert set(stdlib.__all__) <= set(dir(futures))


@pytest.mark.parametrize("name", ["__init__", "submit", "map", "shutdown", "terminate_workers", "kill_workers"])
def test_signature_is_the_running_pythons_and_keyword_options_more(name: str) -> None:
    mine = inspect.signature(getattr(ProcessPoolExecutor, name)).parameters
    theirs_function = getattr(stdlib.ProcessPoolExecutor, name, None)
    if theirs_function is None:
        assert name.endswith("_workers") and list(mine) == ["self"]
        return
    theirs = inspect.signature(theirs_function).parameters
    for parameter in theirs.values():
        assert mine[parameter.name].kind is parameter.kind
        assert mine[parameter.name].default == parameter.default
    fixed = [p for p in mine.values() if p.name in theirs]
    assert [p.name for p in fixed] == list(theirs)
    for extra in mine.keys() - theirs.keys():
        assert mine[extra].kind is inspect.Parameter.KEYWORD_ONLY, extra


def test_importing_the_package_loads_no_executor() -> None:
    program = ("import sys, dpool.concurrent.futures\n"
               "print('concurrent.futures' in sys.modules, 'logging' in sys.modules)")
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "False False\n"


def test_lookalikes_are_there_and_true(tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(1, context) as executor, gate:
        assert executor._max_workers == 1 and executor._mp_context is context
        manager: Any = executor._executor_manager_thread
        assert manager is None and len(executor._processes) == 0
        assert executor._broken is False and executor._queue_count == 0
        processes = executor._processes
        held = executor.submit(tasks.hold, gate.started, gate.opened)
        pid = gate.wait()
        assert list(processes) == [pid] and processes[pid].is_alive() and str(pid) in repr(processes)
        others = [executor.submit(tasks.double, i) for i in range(5)]
        assert [item.future for item in executor._pending_work_items.values()] == [held, *others]
        assert executor._pending_work_items[1].fn is tasks.double and executor._pending_work_items[1].args == (0,)
        manager = executor._executor_manager_thread
        assert executor._queue_count == 6 and manager.is_alive()
        assert executor._call_queue.qsize() > 0
        gate.open()
        wait([held, *others], PATIENCE_S)
        assert len(executor._pending_work_items) == 0


def test_cannot_be_pickled() -> None:
    with pytest.raises(NotImplementedError, match="cannot be passed between processes"):
        pickle.dumps(executor_of(1))


# -- submit


def test_submit_returns_the_value(context: Any) -> None:
    with ProcessPoolExecutor(2, context) as executor:
        future = executor.submit(pow, 2, 8)
        assert isinstance(future, stdlib.Future)
        assert future.result(PATIENCE_S) == 256


def test_every_keyword_reaches_the_function() -> None:
    with executor_of(1) as executor:
        future = executor.submit(tasks.capture, 1, self=2, fn=3, timeout=4, retries=5)
        assert future.result(PATIENCE_S) == ((1,), {"self": 2, "fn": 3, "timeout": 4, "retries": 5})
        with pytest.raises(TypeError):
            executor.submit(fn=tasks.capture)  # type: ignore[call-arg]


def test_many_submits_each_get_their_own_result() -> None:
    with executor_of(2) as executor:
        many = {executor.submit(tasks.double, i): i for i in range(3000)}
        assert all(future.result() == 2 * many[future] for future in as_completed(many, PATIENCE_S))


def test_functions_without_a_name_travel(context: Any) -> None:
    offset = 5
    with ProcessPoolExecutor(1, context) as executor:
        assert executor.submit(lambda x: x + offset, 1).result(PATIENCE_S) == 6
        assert list(executor.map(lambda x: x + offset, range(3))) == [5, 6, 7]


def test_exception_arrives_with_the_remote_traceback(context: Any) -> None:
    with ProcessPoolExecutor(1, context) as executor:
        error = executor.submit(tasks.raise_error, KeyError, 1, 2).exception(PATIENCE_S)
    assert type(error) is KeyError and error.args == (1, 2)
    assert type(error.__cause__) is stdlib_process._RemoteTraceback
    assert "raise kind(*args)  # the source line" in str(error.__cause__)


def test_a_function_that_returns_an_exception_returns_it() -> None:
    with executor_of(1) as executor:
        assert repr(executor.submit(ValueError, 1).result(PATIENCE_S)) == "ValueError(1)"
        assert repr(next(executor.map(ValueError, [1]))) == "ValueError(1)"


def test_calls_are_never_deduplicated(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    with executor_of(2) as executor:
        same = [executor.submit(tasks.mark, str(ran)) for _ in range(30)]
        assert not wait(same, PATIENCE_S).not_done
        assert list(executor.map(tasks.mark, [str(ran)] * 30)) == [None] * 30
    assert tasks.marks(ran) == 60


def test_states_are_true_and_what_was_not_sent_can_be_cancelled(tmp_path: Path) -> None:
    gate, ran = Gate(tmp_path), tmp_path / "ran"
    with executor_of(1) as executor, gate:
        held = executor.submit(tasks.hold, gate.started, gate.opened, "held")
        queued = [executor.submit(tasks.mark, str(ran)) for _ in range(20)]
        gate.wait()
        assert held.running() and not held.done() and not held.cancel()
        assert sum(future.running() for future in queued) <= 1  # two tasks a worker are in flight
        cancelled = [future for future in queued if future.cancel()]
        assert len(cancelled) >= 19
        gate.open()
        assert held.result(PATIENCE_S) == "held"
        done, not_done = wait(queued, PATIENCE_S)  # also the cancelled ones are reported
        assert len(done) == 20 and not not_done
    assert tasks.marks(ran) == 20 - len(cancelled)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_done_callbacks_may_submit_and_may_fail() -> None:
    again: list[stdlib.Future[int]] = []
    ready = threading.Event()

    def callback(future: stdlib.Future[int]) -> None:
        again.append(executor.submit(tasks.double, future.result()))
        ready.set()
        raise SystemExit  # what Future lets through must not end the executor

    with executor_of(1) as executor:
        executor.submit(tasks.double, 1).add_done_callback(callback)
        assert ready.wait(PATIENCE_S)
        assert again[0].result(PATIENCE_S) == 4
        assert executor.submit(tasks.double, 4).result(PATIENCE_S) == 8


def test_arguments_results_and_functions_are_dropped_when_done() -> None:
    with executor_of(1) as executor:
        thing = tasks.Thing()
        gone = threading.Event()
        reference = weakref.ref(thing, lambda _: gone.set())
        executor.submit(thing.method)
        del thing
        assert gone.wait(PATIENCE_S) and reference() is None


@pytest.mark.parametrize("ready", [False, True])
def test_a_raised_exception_is_dropped_with_its_future(ready: bool) -> None:
    """With all that its traceback's frames hold, and before the garbage collector comes by."""
    gc.disable()
    try:
        with executor_of(1) as executor:
            future = executor.submit(tasks.raise_error, subprocess.SubprocessError)
            if ready:
                wait([future])
            try:
                future.result(PATIENCE_S)
            except subprocess.SubprocessError as error:
                reference = weakref.ref(error)
            del future
            until(lambda: reference() is None, "the exception is dropped")
    finally:
        gc.enable()


def test_map_keeps_neither_arguments_nor_results() -> None:
    with executor_of(1) as executor:
        inputs = [tasks.Thing() for _ in range(5)]
        references = [weakref.ref(thing) for thing in inputs]
        results = executor.map(tasks.make_thing, inputs)
        for result in results:
            reference = weakref.ref(result)
            del result
            assert reference() is None
        del inputs, results
        executor.shutdown()
        gc.collect()
        assert [reference() for reference in references] == [None] * 5


# -- map


@pytest.mark.parametrize("chunksize", [1, 3, 10, 50])
@pytest.mark.parametrize("buffersize", [None, 1, 4, 100])
def test_map_keeps_the_order(chunksize: int, buffersize: int | None) -> None:
    kinds: list[Callable[[int], Any]] = [range, lambda n: list(range(n)), lambda n: iter(range(n)),
                                         lambda n: set(range(n))]
    with executor_of(2) as executor:
        for kind in kinds:
            results = executor.map(tasks.double, kind(20), chunksize=chunksize, buffersize=buffersize)
            assert list(results) == list(range(0, 40, 2))
        results = executor.map(pow, range(20), itertools.repeat(2), chunksize=chunksize, buffersize=buffersize)
        assert list(results) == [i * i for i in range(20)]
        assert list(executor.map(pow, [2, 3], (4, 5, 6), chunksize=chunksize, buffersize=buffersize)) == [16, 243]


def test_map_of_every_start_method(context: Any) -> None:
    with ProcessPoolExecutor(2, context) as executor:
        assert list(executor.map(tasks.double, range(1000))) == list(range(0, 2000, 2))


def test_map_goes_through_a_submit_of_the_users_own() -> None:
    class Counting(ProcessPoolExecutor):
        submitted = 0

        def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
            self.submitted += 1
            return super().submit(fn, *args, **kwargs)

    with Counting(1) as executor:
        assert list(executor.map(str, range(7), chunksize=3)) == list(map(str, range(7)))
        assert executor.submitted == 3

    done: list[Any] = []
    with ProcessPoolExecutor(1) as patched:
        submit = patched.submit

        def noted(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
            future = submit(fn, *args, **kwargs)
            done.append(future)
            return future

        patched.submit = noted  # type: ignore[method-assign]
        assert list(patched.map(pow, range(5), [2] * 5)) == [0, 1, 4, 9, 16]
    assert len(done) == 5 and all(future.done() for future in done)


@pytest.mark.parametrize("options", [{}, {"chunksize": 3}, {"buffersize": 2}])
def test_map_of_nothing_is_empty(options: dict[str, Any]) -> None:
    with executor_of(1) as executor:
        assert list(executor.map(tasks.double, [], **options)) == []
        assert list(executor.map(tasks.double, iter(()), **options)) == []
        assert list(executor.map(tasks.double, **options)) == []


def test_map_raises_at_the_item_that_failed_and_ends() -> None:
    with executor_of(1) as executor:
        results = executor.map(tasks.fail_at, range(5), [2] * 5)
        assert [next(results), next(results)] == [0, 1]
        with pytest.raises(ValueError) as caught:
            next(results)
        assert type(caught.value.__cause__) is stdlib_process._RemoteTraceback
        assert list(results) == []
        # A chunk fails as a whole.
        results = executor.map(tasks.fail_at, range(6), [4] * 6, chunksize=3)
        assert [next(results) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(ValueError):
            next(results)


def test_map_raises_at_once_what_its_input_raises(tmp_path: Path) -> None:
    ran = tmp_path / "ran"

    def inputs() -> Iterator[str]:
        yield str(ran)
        raise LookupError("input")

    with executor_of(1) as executor:
        with pytest.raises(LookupError) as caught:
            executor.map(tasks.mark, inputs())
        assert caught.value.__cause__ is None
        with pytest.raises(TypeError):
            executor.map(tasks.mark, 5)  # type: ignore[arg-type]
    assert tasks.marks(ran) == 1  # what came before runs, as in the standard library


def test_map_starts_while_its_input_is_still_read(tmp_path: Path) -> None:
    gate = Gate(tmp_path)

    def inputs() -> Iterator[str]:
        yield gate.started
        gate.wait()  # only the task of the first item can open this
        yield "/dev/null"

    with executor_of(1) as executor, gate:
        results = executor.map(tasks.hold, inputs(), [gate.opened, "/dev/null"], [1, 2])
        gate.open()
        assert list(results) == [1, 2]


def test_map_with_a_timeout_gives_what_is_there_and_drops_the_rest(tmp_path: Path) -> None:
    gate, ran = Gate(tmp_path), tmp_path / "ran"
    with executor_of(1) as executor, gate:
        first = executor.submit(tasks.hold, gate.started, gate.opened)
        gate.wait()
        results = executor.map(tasks.mark, [str(ran)] * 20, timeout=0.01)
        with pytest.raises(TimeoutError):
            next(results)
        assert list(results) == []
        gate.open()
        assert first.result(PATIENCE_S) is None
    assert tasks.marks(ran) < 20  # a batch may have been sent


def test_a_result_that_is_there_is_given_whatever_the_timeout() -> None:
    with executor_of(1) as executor:
        results = executor.map(tasks.double, [1], timeout=0.000001)
        executor.shutdown()
        assert next(results) == 2


def test_a_dropped_map_iterator_drops_what_was_not_sent(tmp_path: Path) -> None:
    gate, ran = Gate(tmp_path), tmp_path / "ran"
    with executor_of(1) as executor, gate:
        assert executor.submit(tasks.double, 1).result(PATIENCE_S) == 2
        inputs = [(tasks.mark, str(ran)), (tasks.hold, gate.started, gate.opened), *[(tasks.mark, str(ran))] * 20]
        results = executor.map(_call, inputs)
        next(results)
        gate.wait()
        del results
        gate.open()
    assert tasks.marks(ran) < 21


def _call(item: tuple[Any, ...]) -> Any:
    return item[0](*item[1:])


def test_buffersize_bounds_what_is_read(tmp_path: Path) -> None:
    with executor_of(2) as executor:
        source = itertools.count()
        results = executor.map(tasks.double, source, buffersize=3)
        assert next(source) == 3  # three were read; this takes the fourth
        assert next(results) == 0
        assert next(source) == 5
        results = executor.map(tasks.double, itertools.count(), buffersize=2, chunksize=10)
        assert list(itertools.islice(results, 1000)) == list(range(0, 2000, 2))


def test_buffersize_stops_with_its_executor() -> None:
    executor = executor_of(1)
    results = executor.map(tasks.double, itertools.count(), buffersize=2)
    assert next(results) == 0
    executor.shutdown()
    with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
        next(results)
    executor = executor_of(1)
    results = executor.map(tasks.double, itertools.count(), buffersize=2)
    assert next(results) == 0
    del executor
    gc.collect()
    assert list(results) == [2, 4]


def test_map_of_a_function_that_cannot_travel_raises_from_its_iterator() -> None:
    lock = threading.Lock()
    with executor_of(1) as executor:
        for inputs in ([1, 2], iter([1, 2])):
            results = executor.map(lambda x: (lock, x), inputs)
            with pytest.raises(TypeError, match="lock"):
                next(results)
        assert list(executor.map(tasks.double, [1])) == [2]


# -- the workers


def test_workers_are_started_on_demand_and_used_again(tmp_path: Path) -> None:
    gates = [Gate(tmp_path, str(i)) for i in range(2)]
    with ProcessPoolExecutor(4, multiprocessing.get_context("spawn")) as executor:
        assert len(executor._processes) == 0
        pids = {executor.submit(tasks.worker_pid).result(PATIENCE_S) for _ in range(3)}
        assert len(pids) == len(executor._processes) == 1
        held = [executor.submit(tasks.hold, gate.started, gate.opened) for gate in gates]
        assert len({gate.wait() for gate in gates}) == len(executor._processes) == 2
        for gate in gates:
            gate.open()
        wait(held, PATIENCE_S)


def test_forked_workers_are_started_all_at_once() -> None:
    with executor_of(3) as executor:
        assert len(executor._processes) == 0
        executor.submit(tasks.worker_pid).result(PATIENCE_S)
        assert len(executor._processes) == 3
        assert not any(process.daemon for process in executor._processes.values())


def test_initializer_runs_first_in_every_worker(context: Any) -> None:
    with ProcessPoolExecutor(2, context, tasks.initialize, ("ready",)) as executor:
        assert {future.result(PATIENCE_S) for future in [executor.submit(tasks.status) for _ in range(6)]} == {"ready"}


def test_a_worker_is_replaced_after_its_share() -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("forkserver"), max_tasks_per_child=2) as executor:
        pids = [executor.submit(tasks.worker_pid).result(PATIENCE_S) for _ in range(6)]
        assert pids[0] == pids[1] != pids[2] == pids[3] != pids[4] == pids[5]
        assert len(executor._processes) <= 1
    with ProcessPoolExecutor(3, multiprocessing.get_context("forkserver"), max_tasks_per_child=1) as executor:
        calls = [executor.submit(tasks.double, i) for i in range(6)]
        executor.shutdown()
        assert [call.result(0) for call in calls] == [0, 2, 4, 6, 8, 10]


def test_max_tasks_per_child_means_spawn_unless_said_otherwise() -> None:
    assert ProcessPoolExecutor(1, max_tasks_per_child=3)._mp_context.get_start_method() == "spawn"


def test_executors_nest() -> None:
    with executor_of(2) as executor:
        assert list(executor.map(tasks.nested_map, [[1, 2], [3]])) == [[2, 4], [6]]


@pytest.mark.parametrize("loop_kind", ["asyncio", "uvloop"])
def test_in_an_event_loop(loop_kind: str, tmp_path: Path) -> None:
    gate, ran = Gate(tmp_path), tmp_path / "ran"

    async def main() -> None:
        loop = asyncio.get_running_loop()
        with executor_of(1) as executor, gate:
            many = [loop.run_in_executor(executor, tasks.double, i) for i in range(50)]
            assert await asyncio.gather(*many) == list(range(0, 100, 2))
            with pytest.raises(KeyError) as caught:
                await loop.run_in_executor(executor, tasks.raise_error, KeyError, 1)
            assert type(caught.value.__cause__) is stdlib_process._RemoteTraceback
            held = loop.run_in_executor(executor, tasks.hold, gate.started, gate.opened, "held")
            await asyncio.to_thread(gate.wait)
            queued = [loop.run_in_executor(executor, tasks.mark, str(ran)) for _ in range(20)]
            for call in queued:
                call.cancel()  # reaches the executor's future
            await asyncio.sleep(0)
            await asyncio.to_thread(gate.open)
            assert await held == "held"
        assert tasks.marks(ran) <= 1  # two calls a worker are in flight

    factory = asyncio.new_event_loop
    if loop_kind == "uvloop":
        factory = pytest.importorskip("uvloop", reason="uvloop is not installed").new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main())


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_through_the_threads_of_anyio(backend: str) -> None:
    anyio = pytest.importorskip("anyio", reason="anyio is not installed")
    pytest.importorskip(backend, reason=f"{backend} is not installed")
    results: dict[int, int] = {}

    async def main() -> None:
        with executor_of(2) as executor:
            async def call(value: int) -> None:
                results[value] = await anyio.to_thread.run_sync(executor.submit(tasks.double, value).result)

            async with anyio.create_task_group() as group:
                for value in range(20):
                    group.start_soon(call, value)

    anyio.run(main, backend=backend)
    assert results == {value: 2 * value for value in range(20)}


def test_through_the_threads_of_trio() -> None:
    trio = pytest.importorskip("trio", reason="trio is not installed")

    async def main() -> Any:
        with executor_of(1) as executor:
            return await trio.to_thread.run_sync(executor.submit(tasks.double, 4).result)

    assert trio.run(main) == 8


# -- the end


def test_shutdown_finishes_what_was_accepted(context: Any) -> None:
    executor = ProcessPoolExecutor(2, context)
    calls = [executor.submit(tasks.double, i) for i in range(200)]
    executor.shutdown()
    assert [call.result(0) for call in calls] == list(range(0, 400, 2))
    assert executor._processes is None
    executor.shutdown()


def test_shutdown_without_waiting_finishes_too(tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    executor = executor_of(1)
    held = executor.submit(tasks.hold, gate.started, gate.opened, 1)
    last = executor.submit(tasks.double, 2)
    manager = executor._executor_manager_thread
    executor.shutdown(wait=False)
    gate.wait()
    assert manager.is_alive()
    gate.open()
    assert held.result(PATIENCE_S) == 1 and last.result(PATIENCE_S) == 4
    manager.join(PATIENCE_S)
    assert not manager.is_alive()


def test_nothing_can_be_submitted_after_shutdown() -> None:
    for used in (False, True):
        executor = executor_of(1)
        if used:
            executor.submit(tasks.double, 1)
        executor.shutdown()
        with pytest.raises(RuntimeError, match="^cannot schedule new futures after shutdown$"):
            executor.submit(tasks.double, 1)
        with pytest.raises(RuntimeError, match="^cannot schedule new futures after shutdown$"):
            executor.map(tasks.double, [1])


def test_shutdown_cancels_if_asked(tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    executor = executor_of(1)
    held = executor.submit(tasks.hold, gate.started, gate.opened, 1)
    gate.wait()
    calls = [executor.submit(tasks.double, i) for i in range(20)]
    results = executor.map(tasks.double, range(20))
    buffered = executor.map(tasks.double, range(20), buffersize=5)
    executor.shutdown(wait=False, cancel_futures=True)
    assert sum(call.cancelled() for call in calls) >= 19
    gate.open()
    assert held.result(PATIENCE_S) == 1
    assert all(call.cancelled() or call.result(PATIENCE_S) is not None for call in calls)
    for iterator in (results, buffered):
        with pytest.raises((stdlib.CancelledError, RuntimeError)):
            next(iterator)
    assert len(wait(calls, PATIENCE_S).done) == 20
    executor.shutdown()


def test_a_call_cancelled_just_before_shutdown_does_not_hang_it() -> None:
    for _ in range(20):
        executor = executor_of(1)
        executor.submit(int).cancel()
        executor.shutdown()


def test_an_executor_that_is_dropped_finishes_and_ends(context: Any) -> None:
    executor = ProcessPoolExecutor(2, context)
    calls = [executor.submit(tasks.double, i) for i in range(20)]
    results = executor.map(tasks.double, range(20))
    manager, processes = executor._executor_manager_thread, list(executor._processes.values())
    del executor
    gc.collect()
    assert [call.result(PATIENCE_S) for call in calls] == list(range(0, 40, 2))
    assert list(results) == list(range(0, 40, 2))
    manager.join(PATIENCE_S)
    for process in processes:
        process.join(PATIENCE_S)
        assert process.exitcode == 0


@pytest.mark.parametrize("stop", ["terminate_workers", "kill_workers"])
def test_stopping_the_workers_fails_what_runs_and_cancels_the_rest(tmp_path: Path, stop: str) -> None:
    gate = Gate(tmp_path)
    executor = executor_of(1)
    held = executor.submit(tasks.hold, gate.started, gate.opened)
    queued = [executor.submit(tasks.double, i) for i in range(10)]
    gate.wait()
    [process] = executor._processes.values()
    getattr(executor, stop)()
    with pytest.raises(stdlib_process.BrokenProcessPool, match="were stopped"):
        held.result(PATIENCE_S)
    assert sum(future.cancelled() for future in queued) >= 9
    with pytest.raises(RuntimeError):
        executor.submit(tasks.double, 1)
    executor.shutdown()  # not process.join(): of two threads that wait for a death one may learn no exit code
    assert process.exitcode == {"terminate_workers": -15, "kill_workers": -9}[stop]
    getattr(executor, stop)()
    getattr(executor_of(1), stop)()  # nothing was started: nothing to stop


@pytest.mark.parametrize("stop, handled, exitcode", [("terminate_workers", 1, 7), ("kill_workers", 0, -9)])
def test_only_terminate_workers_lets_a_task_handle_its_end(tmp_path: Path, stop: str, handled: int,
                                                           exitcode: int) -> None:
    gate, note = Gate(tmp_path), tmp_path / "handled"
    executor = executor_of(1)
    executor.submit(tasks.hold_and_handle_sigterm, gate.started, gate.opened, str(note))
    gate.wait()
    [process] = executor._processes.values()
    getattr(executor, stop)()
    executor.shutdown()
    assert (tasks.marks(note), process.exitcode) == (handled, exitcode)
    with pytest.raises(ValueError, match="Unsupported operation: 'stop'"):
        executor._force_shutdown("stop")


def run(program: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *options, "-c", program], capture_output=True, text=True,
                          timeout=PATIENCE_S, cwd=Path(__file__).parent, env=_environment(), start_new_session=True)


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": f"{Path(__file__).parent.parent}:{Path(__file__).parent}"}


EXIT = """
import atexit, multiprocessing, sys
def last():
    try:
        executor.submit(print, "never")
    except RuntimeError as error:
        print(error)
atexit.register(last)
from dpool.concurrent.futures import ProcessPoolExecutor
if __name__ == "__main__":
    executor = ProcessPoolExecutor(2, multiprocessing.get_context("{method}"))
    import time
    executor.submit(time.sleep, 0.2)
    for i in range(3):
        executor.submit(print, "pending", i)
    {then}
"""


@pytest.mark.parametrize("method", METHODS)
def test_pending_calls_finish_before_the_interpreter_exits(method: str) -> None:
    done = run(EXIT.format(method=method, then=""))
    assert sorted(done.stdout.splitlines()) == [
        "cannot schedule new futures after interpreter shutdown", "pending 0", "pending 1", "pending 2"]
    assert done.stderr == "" and done.returncode == 0


def test_the_exit_code_is_kept_and_a_shut_down_executor_finishes_at_exit() -> None:
    done = run(EXIT.format(method="fork", then="executor.shutdown(wait=False); sys.exit(3)"))
    assert sorted(done.stdout.splitlines()) == ["cannot schedule new futures after shutdown", "pending 0", "pending 1",
                                                "pending 2"]
    assert done.stderr == "" and done.returncode == 3


def test_warnings_are_silent_in_development_mode() -> None:
    program = ("from dpool.concurrent.futures import ProcessPoolExecutor\n"
               "with ProcessPoolExecutor(2) as executor: print(list(executor.map(abs, [-1, 2])))")
    done = run(program, "-X", "dev", "-W", "ignore::DeprecationWarning")
    assert (done.stdout, done.stderr) == ("[1, 2]\n", "")


class Intruded(Future):
    """Calls `intrude` in the moment before its state changes: what another thread may do then."""

    intrude: Any = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_state" and self.intrude is not None:
            intrude, self.intrude = self.intrude, None
            intrude()
        super().__setattr__(name, value)


def test_a_callback_that_comes_as_the_result_does_is_called_once() -> None:
    future = Intruded()
    assert future.set_running_or_notify_cancel()
    called: list[Any] = []
    future.intrude = lambda: future.add_done_callback(called.append)
    future.set_result(7)
    assert called == [future] and future.result() == 7
    future.add_done_callback(called.append)
    assert called == [future] * 2


def test_a_callback_that_comes_as_who_waits_receives_the_result_is_called_once() -> None:
    future = Intruded()
    assert future.set_running_or_notify_cancel()
    call = Call(future, {}, 0, abs, (), {})
    called: list[Any] = []

    class Group:
        def attend(self, job: Any, timeout: float | None = None) -> None:
            future.intrude = lambda: future.add_done_callback(called.append)
            assert call.set_alone(7)

    future._waits = (Group(), None)
    assert future.result(PATIENCE_S) == 7 and called == [future]
    future.add_done_callback(called.append)
    call.set(0, [7])  # as if the thread had been interrupted
    assert called == [future] * 2


def test_who_begins_to_wait_as_the_result_comes_is_woken() -> None:
    future = Intruded()
    assert future.set_running_or_notify_cancel()
    found: list[Any] = []
    waiting = [threading.Thread(target=lambda: found.append(future.result(PATIENCE_S))),
               threading.Thread(target=lambda: found.append(len(stdlib.wait([future], PATIENCE_S).done)))]

    def begin() -> None:
        for thread in waiting:
            thread.start()
        until(lambda: future._condition._waiters and future._waiters, "both wait")

    future.intrude = begin
    future.set_result(7)
    for thread in waiting:
        thread.join(PATIENCE_S)
    assert sorted(found) == [1, 7]


def test_a_call_that_is_cancelled_as_it_begins_is_one_or_the_other() -> None:
    future = Intruded()
    said: list[bool] = []
    future.intrude = lambda: said.append(future.cancel())
    assert future.set_running_or_notify_cancel() and said == [False] and future.running()
    future = Intruded()
    begins = threading.Thread(target=lambda: said.append(future.set_running_or_notify_cancel()))
    future.intrude = begins.start  # it waits for the condition, which cancel() has
    assert future.cancel()
    begins.join(PATIENCE_S)
    assert said == [False, False] and future.cancelled()
