"""Owns the contract of dpool.asyncio: Pool, to_process() and DefaultExecutor, with and without faults.

It never sleeps to wait for something and asserts no times. With uvloop installed every test of the pool runs on it too.
"""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import inspect
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures.process import _RemoteTraceback
from contextlib import aclosing
from pathlib import Path
from typing import Any

import executor_tasks as tasks
import pytest
from executor_tasks import Gate
from test_executor import METHODS, PATIENCE_S, run

import dpool.asyncio
from dpool.asyncio import DefaultExecutor, Pool, to_process
from dpool.asyncio.mailbox import mailbox_of
from dpool.concurrent.futures import ProcessPoolExecutor
from dpool.errors import GroupBroken, GroupTerminated, RemoteError, WorkerDied

Main = Callable[[], Coroutine[Any, Any, Any]]
FORK = multiprocessing.get_context("fork")


@pytest.fixture(params=["asyncio", "uvloop"])
def play(request: pytest.FixtureRequest) -> Callable[[Main], Any]:
    """Run a coroutine function in a new loop of each kind."""
    if request.param == "uvloop":
        uvloop = pytest.importorskip("uvloop", reason="uvloop is not installed")
        factory = uvloop.new_event_loop
    else:
        factory = asyncio.new_event_loop

    def run_it(main: Main) -> Any:
        async def limited() -> Any:
            async with asyncio.timeout(PATIENCE_S):
                return await main()

        with asyncio.Runner(loop_factory=factory) as runner:
            return runner.run(limited())

    return run_it


@pytest.fixture(params=METHODS)
def context(request: pytest.FixtureRequest) -> Any:
    """Every start method."""
    return multiprocessing.get_context(request.param)


@pytest.fixture(scope="module")
def shared_workers() -> None:
    """Those of to_process() stay until the process ends, whoever asks first."""
    asyncio.run(to_process(tasks.double, 1))


@pytest.fixture(autouse=True)
def leaves_nothing(shared_workers: None) -> Iterator[None]:
    """No worker and no thread of a group outlives its test."""
    with tasks.nothing_left(PATIENCE_S):
        yield


def pool_of(processes: int, **options: Any) -> Pool:
    return Pool(processes, context=FORK, **options)


async def in_thread(function: Callable[..., Any]) -> Any:
    """What would block the loop."""
    return await asyncio.to_thread(function)


async def numbers(count: int) -> AsyncIterator[int]:
    for i in range(count):
        await asyncio.sleep(0)
        yield i


# -- calls


def test_run_awaits_a_call_in_a_worker(context: Any) -> None:
    async def main() -> None:
        async with Pool(2, context=context) as pool:
            assert await pool.run(tasks.double, 4) == 8
            assert await pool.run(tasks.worker_pid) != os.getpid()
            assert await pool.run(tasks.capture, 1, self=2, function=3, kill=4) == ((1,),
                                                                                 {"self": 2, "function": 3, "kill": 4})
            assert await pool.run(lambda x: -x, 5) == -5

    asyncio.run(main())


def test_many_calls_at_once(play: Callable[[Main], Any]) -> None:
    async def main() -> None:
        async with pool_of(2) as pool:
            assert await asyncio.gather(*(pool.run(tasks.double, i) for i in range(2000))) == list(range(0, 4000, 2))
            async with asyncio.TaskGroup() as group:
                made = [group.create_task(pool.run(tasks.double, i)) for i in range(20)]
            assert [task.result() for task in made] == list(range(0, 40, 2))

    play(main)


def test_many_results_wake_the_loop_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Reader:
        def __init__(self) -> None:
            self.read: list[Any] = []

        def deliver(self, first: int, values: Any) -> None:
            self.read.append((first, values))
            if first == 999:
                ready.set()

    ready = asyncio.Event()
    reader = Reader()
    woken: list[Any] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        wake = loop.call_soon_threadsafe

        def counted(callback: Callable[..., Any], *args: Any) -> Any:
            woken.append(callback)
            return wake(callback, *args)

        monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
        mailbox = mailbox_of(loop)

        def post() -> None:
            for i in range(1000):
                mailbox.post(reader, i, str(i))

        thread = threading.Thread(target=post)
        thread.start()
        thread.join()  # the loop is busy meanwhile
        await asyncio.wait_for(ready.wait(), PATIENCE_S)

    asyncio.run(main())
    assert reader.read == [(i, str(i)) for i in range(1000)]
    assert len(woken) == 1


def test_maps(play: Callable[[Main], Any]) -> None:
    async def main() -> None:
        async with pool_of(2) as pool:
            for inputs in (range(1000), list(range(1000)), iter(range(1000)), numbers(1000)):
                assert await pool.map(tasks.double, inputs) == list(range(0, 2000, 2))
            assert await pool.starmap(pow, [(2, 3), (3, 2)]) == [8, 9]
            assert await pool.map(tasks.double, []) == []

    play(main)


@pytest.mark.parametrize("buffersize", [1, 3, 256])
def test_imaps(play: Callable[[Main], Any], buffersize: int) -> None:
    async def main() -> None:
        async with pool_of(2) as pool:
            kinds: list[Callable[[], Any]] = [lambda: range(500), lambda: iter(range(500)), lambda: numbers(500)]
            for kind in kinds:
                ordered = pool.imap(tasks.double, kind(), buffersize=buffersize)
                assert [x async for x in ordered] == list(range(0, 1000, 2))
                unordered = pool.imap_unordered(tasks.double, kind(), buffersize=buffersize)
                assert sorted([x async for x in unordered]) == list(range(0, 1000, 2))
            assert [x async for x in pool.imap(tasks.double, [], buffersize=buffersize)] == []

    play(main)


def test_imap_reads_no_further_ahead_than_it_may(play: Callable[[Main], Any]) -> None:
    read = 0

    def endless() -> Iterator[int]:
        nonlocal read
        while True:
            read += 1
            yield read

    async def endless_async() -> AsyncIterator[int]:
        for i in endless():
            yield i

    async def main() -> None:
        nonlocal read
        async with pool_of(2) as pool:
            for source in (endless(), endless_async()):
                read = taken = 0
                async with aclosing(pool.imap(tasks.double, source, buffersize=8)) as results:  # type: ignore[type-var]
                    async for _ in results:
                        taken += 1
                        assert read - taken <= 8
                        if taken == 100:
                            break

    play(main)


def test_imap_gives_results_while_its_input_waits(play: Callable[[Main], Any]) -> None:
    async def main() -> None:
        more = asyncio.Event()

        async def inputs() -> AsyncIterator[int]:
            yield 1
            await more.wait()  # set only once the result of the first item is there
            yield 2

        async with pool_of(1) as pool:
            results = []
            async for result in pool.imap(tasks.double, inputs()):
                results.append(result)
                more.set()
            assert results == [2, 4]

    play(main)


def test_errors_of_the_input_come_after_the_results_before_it(play: Callable[[Main], Any]) -> None:
    def broken() -> Iterator[int]:
        yield from (1, 2)
        raise LookupError("input")

    async def broken_async() -> AsyncIterator[int]:
        for i in broken():
            yield i

    async def main() -> None:
        async with pool_of(1) as pool:
            for source in (broken(), broken_async()):
                results = []
                with pytest.raises(LookupError):
                    async for result in pool.imap(tasks.double, source):
                        results.append(result)
                assert results == [2, 4]
            with pytest.raises(LookupError):
                await pool.map(tasks.double, broken())

    play(main)


def test_errors_arrive_with_the_remote_traceback(play: Callable[[Main], Any]) -> None:
    async def main() -> None:
        async with pool_of(2) as pool:
            for call in (pool.run(tasks.fail_at, 3, 3), pool.starmap(tasks.fail_at, [(i, 3) for i in range(100)])):
                with pytest.raises(ValueError) as caught:
                    await call
                assert caught.value.args == (3,) and "raise ValueError(value)" in str(caught.value.__cause__)
            results = []
            with pytest.raises(ZeroDivisionError):
                async for result in pool.imap(_reciprocal, [1, 2, 0, 3]):
                    results.append(result)
            assert results == [1, 0.5]
            with pytest.raises(RuntimeError, match="StopIteration"):
                await pool.run(tasks.raise_error, StopIteration)
            assert await pool.run(tasks.double, 1) == 2

    play(main)


def _reciprocal(x: int) -> float:
    return 1 / x


def test_a_failing_call_ends_its_task_group(play: Callable[[Main], Any], tmp_path: Path) -> None:
    gate = Gate(tmp_path)

    async def main() -> None:
        async with pool_of(2) as pool:
            with gate:
                with pytest.raises(ExceptionGroup) as caught:
                    async with asyncio.TaskGroup() as group:
                        held = group.create_task(pool.run(tasks.hold, gate.started, gate.opened))
                        await in_thread(gate.wait)
                        group.create_task(pool.run(tasks.raise_error, KeyError, 1))
                assert held.cancelled() and caught.group_contains(KeyError)
                await in_thread(gate.open)

    play(main)


# -- async functions


def test_async_functions_run_in_a_loop_of_the_worker(context: Any) -> None:
    async def main() -> None:
        async with Pool(1, context=context) as pool:
            assert await pool.run(tasks.double_async, 4) == 8
            assert await pool.run(tasks.AsyncCallable(), 4) == ("called", 4)
            assert await pool.map(tasks.double_async, range(5)) == [0, 2, 4, 6, 8]
            assert await pool.starmap(tasks.double_async, [(1,), (2,)]) == [2, 4]
            assert [x async for x in pool.imap(tasks.double_async, numbers(5))] == [0, 2, 4, 6, 8]
            # One loop for all calls, so that what belongs to a loop can be kept; but nothing goes on in it.
            assert await pool.run(tasks.loop_id) == await pool.run(tasks.loop_id)
            await pool.run(tasks.leave_a_task_behind)
            assert await pool.run(tasks.was_cancelled) is True

    asyncio.run(main())


# -- cancelling


def test_a_cancelled_call_that_was_not_sent_never_runs(play: Callable[[Main], Any], tmp_path: Path) -> None:
    gate, ran = Gate(tmp_path), tmp_path / "ran"

    async def main() -> None:
        async with pool_of(1) as pool:
            with gate:
                held = asyncio.create_task(pool.run(tasks.hold, gate.started, gate.opened, "held"))
                await in_thread(gate.wait)
                queued = [asyncio.create_task(pool.run(tasks.mark, str(ran))) for _ in range(20)]
                mapped = asyncio.create_task(pool.map(tasks.mark, [str(ran)] * 20))
                await asyncio.sleep(0)
                for task in [*queued, mapped]:
                    task.cancel()
                outcomes = await asyncio.gather(*queued, mapped, return_exceptions=True)
                assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)
                await in_thread(gate.open)
                assert await held == "held"

    play(main)
    assert tasks.marks(ran) <= 11  # what was in flight: a call, or a batch of the map


def test_a_timeout_leaves_the_running_call_alone(play: Callable[[Main], Any], tmp_path: Path) -> None:
    gate = Gate(tmp_path)

    async def main() -> None:
        async with pool_of(1) as pool:
            pid = await pool.run(tasks.worker_pid)
            with gate:
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.01):
                        await pool.run(tasks.hold, gate.started, gate.opened)
                await in_thread(gate.wait)
                await in_thread(gate.open)
            assert await pool.run(tasks.worker_pid) == pid

    play(main)


@pytest.mark.parametrize("form", ["run", "map", "imap"])
def test_with_kill_cancelling_ends_the_running_call(play: Callable[[Main], Any], tmp_path: Path, form: str) -> None:
    gate = Gate(tmp_path)

    async def call(pool: Pool) -> None:
        arguments = (gate.started, gate.opened)
        if form == "run":
            await pool.run(tasks.hold, *arguments)
        elif form == "map":
            await pool.starmap(tasks.hold, [arguments] * 5)
        else:
            async for _ in pool.imap(_hold, [arguments] * 5):
                pass

    async def main() -> None:
        async with pool_of(1, kill=True) as pool:
            task = asyncio.create_task(call(pool))
            with gate:
                pid = await in_thread(gate.wait)
                pidfd = os.pidfd_open(pid)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                # The gate was never opened: only its end can make the worker's descriptor readable.
                ended = asyncio.Event()
                asyncio.get_running_loop().add_reader(pidfd, ended.set)
                await ended.wait()
                asyncio.get_running_loop().remove_reader(pidfd)
                os.close(pidfd)
                assert await pool.run(tasks.double, 1) == 2
                assert await pool.run(tasks.worker_pid) != pid

    play(main)


def _hold(arguments: tuple[str, str]) -> Any:
    return tasks.hold(*arguments)


def test_with_kill_other_calls_are_not_harmed(play: Callable[[Main], Any], tmp_path: Path) -> None:
    gate, other = Gate(tmp_path), Gate(tmp_path, "other")

    async def main() -> None:
        async with pool_of(2, kill=True) as pool:
            with gate, other:
                doomed = asyncio.create_task(pool.run(tasks.hold, gate.started, gate.opened))
                spared = asyncio.create_task(pool.run(tasks.hold, other.started, other.opened, "spared"))
                await in_thread(gate.wait)
                await in_thread(other.wait)
                queued = [asyncio.create_task(pool.run(tasks.double, i)) for i in range(20)]
                doomed.cancel()
                await asyncio.gather(*queued)
                await in_thread(other.open)
                assert await spared == "spared"

    play(main)


def test_a_closed_imap_drops_what_was_not_sent(play: Callable[[Main], Any], tmp_path: Path) -> None:
    ran = tmp_path / "ran"

    async def main() -> None:
        async with pool_of(1) as pool:
            async with aclosing(pool.imap(tasks.mark, [str(ran)] * 1000, buffersize=4)) as results:  # type: ignore[type-var]
                async for _ in results:
                    break

    play(main)
    assert tasks.marks(ran) <= 5


# -- deaths


def test_a_death_fails_its_call_and_nothing_else(context: Any) -> None:
    async def main() -> None:
        async with Pool(2, context=context) as pool:
            calls = [pool.run(tasks.double, 1), pool.run(tasks.kill_self), pool.run(tasks.exit_process, 0),
                     pool.run(tasks.double, 2)]
            first, killed, exited, last = await asyncio.gather(*calls, return_exceptions=True)
            assert (first, last) == (2, 4)
            assert type(killed) is WorkerDied and killed.exitcode == -signal.SIGKILL
            assert type(exited) is WorkerDied and exited.exitcode == 0

    asyncio.run(main())


def test_retries(play: Callable[[Main], Any], tmp_path: Path) -> None:
    async def main() -> None:
        async with pool_of(1, retries=1) as pool:
            assert await pool.run(tasks.die_until, str(tmp_path / "deaths"), 1) == 1
            with pytest.raises(WorkerDied) as caught:
                await pool.run(tasks.kill_self)
            assert caught.value.attempts == 2

    play(main)


def test_a_failing_initializer_fails_every_call(context: Any) -> None:
    async def main() -> None:
        async with Pool(2, tasks.fail_to_initialize, context=context) as pool:
            for _ in range(2):
                with pytest.raises(GroupBroken, match="no initializer today"):
                    await pool.run(tasks.double, 1)

    asyncio.run(main())


def test_what_cannot_be_pickled_or_rebuilt_fails_its_call(play: Callable[[Main], Any]) -> None:
    async def main() -> None:
        async with pool_of(1) as pool:
            with pytest.raises(TypeError, match="lock"):
                await pool.run(tasks.capture, threading.Lock())
            lock = threading.Lock()
            with pytest.raises(TypeError, match="lock"):
                await pool.run(lambda: lock)
            with pytest.raises(TypeError, match="lock"):
                await pool.run(tasks.make_lock)
            with pytest.raises(pickle.UnpicklingError):
                await pool.run(tasks.make, tasks.BrokenWhenRebuilt)
            with pytest.raises(pickle.UnpicklingError):
                await pool.run(tasks.capture, tasks.BrokenWhenRebuilt())
            with pytest.raises(RemoteError, match="this and that"):
                await pool.run(tasks.raise_picky)
            assert await pool.run(tasks.double, 1) == 2

    play(main)


# -- the end


@pytest.mark.parametrize("function, argument", [
    (tasks.capture, tasks.BrokenWhenPickled()), (tasks.capture, tasks.ExitsWhenPickled()),
    (tasks.capture, threading.Lock()), (tasks.make, tasks.BrokenWhenRebuilt),
], ids=["argument raises", "argument exits", "argument is a lock", "result raises"])
@pytest.mark.parametrize("form", ["run", "map", "imap"])
def test_what_cannot_be_pickled_or_rebuilt_keeps_nothing_alive(function: Any, argument: Any, form: str) -> None:
    async def main() -> list[weakref.ref[Any]]:
        pool = pool_of(1)
        with pytest.raises(BaseException) as caught:
            if form == "run":
                await pool.run(function, argument)
            elif form == "map":
                await pool.map(function, [argument])
            else:
                async with aclosing(pool.imap(function, [argument])) as results:  # type: ignore[type-var]
                    await anext(results)
                del results
        error = caught.value
        del caught
        assert type(error.__cause__) is _RemoteTraceback and "Traceback (most recent call" in str(error.__cause__)
        error.__traceback__ = None  # it leads to this frame
        pool.close()
        pool._group.join()  # join() has a thread that knows the group and may end a little later
        return [weakref.ref(pool), weakref.ref(pool._group), weakref.ref(pool._group._thread)]

    gc.collect()
    gc.disable()  # a cycle would end with the next collection only
    try:
        assert [thing() for thing in asyncio.run(main())] == [None] * 3
    finally:
        gc.enable()


def test_under_anyio(tmp_path: Path) -> None:
    anyio = pytest.importorskip("anyio", reason="anyio is not installed")
    gate, ran = Gate(tmp_path), tmp_path / "ran"
    results: dict[int, int] = {}

    async def main() -> None:
        async with pool_of(1) as pool:
            async def call(value: int) -> None:
                results[value] = await pool.run(tasks.double, value)

            async with anyio.create_task_group() as group:
                for value in range(20):
                    group.start_soon(call, value)
            assert results == {value: 2 * value for value in range(20)}
            with gate:
                async with anyio.create_task_group() as group:
                    group.start_soon(pool.run, tasks.hold, gate.started, gate.opened)
                    await anyio.to_thread.run_sync(gate.wait)
                    for _ in range(20):
                        group.start_soon(pool.run, tasks.mark, str(ran))
                    await anyio.sleep(0)
                    group.cancel_scope.cancel()
                await anyio.to_thread.run_sync(gate.open)
            with anyio.CancelScope(shield=True), anyio.fail_after(PATIENCE_S):
                assert await pool.run(tasks.double, 1) == 2
        assert tasks.marks(ran) <= 2

    anyio.run(main)


def test_leaving_the_block_finishes_what_was_begun(play: Callable[[Main], Any]) -> None:
    async def main() -> None:
        async with pool_of(2) as pool:
            calls = [asyncio.create_task(pool.run(tasks.double, i)) for i in range(100)]
            await asyncio.sleep(0)
        assert await asyncio.gather(*calls) == list(range(0, 200, 2))
        with pytest.raises(RuntimeError, match="closed"):
            await pool.run(tasks.double, 1)
        with pytest.raises(RuntimeError, match="closed"):
            pool.imap(tasks.double, [1])
        with pytest.raises(RuntimeError, match="closed"):
            async with pool:
                pass

    play(main)


def test_leaving_the_block_by_an_exception_ends_what_runs(play: Callable[[Main], Any], tmp_path: Path) -> None:
    gate = Gate(tmp_path)

    async def main() -> None:
        with gate, pytest.raises(KeyError):
            async with pool_of(1) as pool:
                held = asyncio.create_task(pool.run(tasks.hold, gate.started, gate.opened))
                await in_thread(gate.wait)
                raise KeyError
        with pytest.raises(GroupTerminated):
            await held

    play(main)


def test_cancelled_while_leaving_it_ends_what_runs(play: Callable[[Main], Any], tmp_path: Path) -> None:
    gate = Gate(tmp_path)

    async def main() -> None:
        leaving = asyncio.Event()

        async def body() -> None:
            async with pool_of(1) as pool:
                held.append(asyncio.create_task(pool.run(tasks.hold, gate.started, gate.opened)))
                await in_thread(gate.wait)
                leaving.set()

        held: list[asyncio.Task[Any]] = []
        with gate:
            task = asyncio.create_task(body())
            await leaving.wait()
            await asyncio.sleep(0)  # now it waits for the call
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            with pytest.raises(GroupTerminated):
                await held[0]

    play(main)


def test_close_and_join_without_a_block(play: Callable[[Main], Any]) -> None:
    async def main() -> None:
        pool = pool_of(1)
        with pytest.raises(RuntimeError, match="still open"):
            await pool.join()
        assert await pool.run(tasks.double, 1) == 2
        pool.close()
        await pool.join()
        unused = pool_of(1)
        unused.terminate()
        await unused.join()

    play(main)


def test_a_dropped_pool_ends_its_workers(play: Callable[[Main], Any]) -> None:
    async def main() -> int:
        return await pool_of(1).run(tasks.worker_pid)  # type: ignore[no-any-return]

    play(main)  # the fixture looks for what is left


def test_a_pool_serves_one_loop_after_the_other() -> None:
    pool = pool_of(1)
    pids = {asyncio.run(pool.run(tasks.worker_pid)) for _ in range(3)}
    assert len(pids) == 1
    pool.terminate()


def test_results_for_a_loop_that_is_gone_are_forgotten(tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    pool = pool_of(1)

    async def leave() -> None:
        task = asyncio.create_task(pool.run(tasks.hold, gate.started, gate.opened))
        await in_thread(gate.wait)
        task.cancel()

    with gate:
        asyncio.run(leave())
        gate.open()
    assert asyncio.run(pool.run(tasks.double, 1)) == 2
    pool.terminate()


def test_ends_with_the_interpreter() -> None:
    done = run("""
import asyncio, time
from dpool.asyncio import Pool, to_process
async def main():
    print(await to_process(abs, -1))
    pool = Pool(2)
    print(await pool.run(abs, -2))
    asyncio.create_task(pool.run(time.sleep, 600))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return pool
pool = asyncio.run(main())
""")
    assert (done.stdout, done.stderr, done.returncode) == ("1\n2\n", "", 0)


# -- to_process and the default executor


def test_to_process() -> None:
    async def main() -> None:
        assert await to_process(tasks.capture, 1, func=2) == ((1,), {"func": 2})
        assert await to_process(tasks.double_async, 2) == 4
        pids = await asyncio.gather(*(to_process(tasks.worker_pid) for _ in range(20)))
        assert os.getpid() not in pids and len(set(pids)) <= (os.cpu_count() or 1)

    asyncio.run(main())
    asyncio.run(main())  # the workers are the process's, not the loop's
    assert list(inspect.signature(to_process).parameters) == list(inspect.signature(asyncio.to_thread).parameters)


def test_to_process_in_a_forked_child() -> None:
    asyncio.run(to_process(tasks.double, 1))
    child = FORK.Process(target=_to_process_in_child)
    child.start()
    child.join(PATIENCE_S)
    assert child.exitcode == 0


def _to_process_in_child() -> None:
    assert asyncio.run(to_process(tasks.double, 1)) == 2


def test_default_executor_sends_to_processes_what_may_leave(play: Callable[[Main], Any]) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(DefaultExecutor(ProcessPoolExecutor(1, FORK)))
        assert await loop.run_in_executor(None, tasks.worker_pid) != os.getpid()
        assert await loop.run_in_executor(None, tasks.double, 2) == 4
        assert await asyncio.to_thread(tasks.worker_pid) == os.getpid()
        assert await loop.getaddrinfo("127.0.0.1", 80)
        with open(__file__) as file:
            assert (await loop.run_in_executor(None, file.readline)).startswith('"""')
        await loop.shutdown_default_executor()

    play(main)


def test_default_executor_maps_and_shuts_down_both() -> None:
    processes = ProcessPoolExecutor(1, FORK)
    with DefaultExecutor(processes) as executor:
        assert list(executor.map(tasks.double, [1, 2])) == [2, 4]
        assert list(executor.map("a{}".format, [1, 2])) == ["a1", "a2"]
    with pytest.raises(RuntimeError, match="after shutdown"):
        processes.submit(tasks.double, 1)


# -- bad input


@pytest.mark.parametrize("options, kind, text", [
    (dict(processes=0), ValueError, "processes must be at least 1, got 0"),
    (dict(processes=2.5), TypeError, "processes must be an int or None, not float"),
    (dict(processes=True), TypeError, "not bool"),
    (dict(processes=10_000_000), ValueError, "more than this machine allows"),
    (dict(initializer=1), TypeError, "initializer must be a callable"),
    (dict(initargs=5), TypeError, "not iterable"),
    (dict(max_tasks_per_child=0), ValueError, "max_tasks_per_child must be at least 1, got 0"),
    (dict(max_tasks_per_child="1"), TypeError, "max_tasks_per_child must be an int, not str"),
    (dict(retries=-1), ValueError, "retries must be at least 0, got -1"),
    (dict(retries=None), TypeError, "retries must be an int, not NoneType"),
    (dict(context="banana"), ValueError, "'fork', 'spawn', 'forkserver'.* not 'banana'"),
    (dict(context=3), TypeError, "not 3"),
    (dict(timeout=3), TypeError, "timeout"),
])
def test_constructor_refuses(options: dict[str, Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        Pool(**options)


def test_calls_refuse() -> None:
    async def main() -> None:
        pool = pool_of(1)
        for buffersize, kind in ((0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)):
            with pytest.raises(kind, match="buffersize"):
                pool.imap(tasks.double, [1], buffersize=buffersize)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="not iterable"):
            pool.imap(tasks.double, 5)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="not iterable"):
            await pool.map(tasks.double, 5)  # type: ignore[arg-type]
        with pytest.raises(NotImplementedError, match="cannot be passed between processes"):
            pickle.dumps(pool)
        with pytest.raises(TypeError, match="must be a concurrent.futures.Executor"):
            DefaultExecutor(5)  # type: ignore[arg-type]

    asyncio.run(main())
    with pytest.raises(AttributeError, match="nothing"):
        dpool.asyncio.nothing  # noqa: B018


def test_importing_the_package_loads_no_asyncio() -> None:
    program = "import sys, dpool.asyncio, dpool.asyncio.worker; print('asyncio' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "False\n"
    assert importlib.util.find_spec("dpool.asyncio") is not None
