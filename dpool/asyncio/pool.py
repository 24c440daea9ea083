"""dpool.asyncio's Pool and to_process(): calls in worker processes that a coroutine awaits, over one worker group.

Never blocks the loop but to start workers, never polls. Outcomes come from the group's I/O thread through a mailbox.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
import os
import threading
import time
import weakref
from collections import deque
from multiprocessing import util

from dpool import session
from dpool.asyncio.mailbox import Mailbox, mailbox_of
from dpool.asyncio.worker import run_coroutine
from dpool.engine import ABANDONED, MAP, STAR, Failure, GroupSpec
from dpool.errors import GroupTerminated
from dpool.resources import parse as parse_resources

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
    from multiprocessing.context import BaseContext
    from types import TracebackType
    from typing import Any

# Items of an imap in work or waiting to be taken. More: short tasks travel in larger batches. Fewer: less memory.
BUFFER_SIZE = 256
# How long an input is read before the loop may do something else.
READ_AT_MOST_S = 0.001
# How long the interpreter's exit waits for workers that do not die.
TERMINATE_TIMEOUT_S = 5.0

# The groups of this process's pools: the interpreter's exit ends them.
_groups: weakref.WeakSet[Any] = weakref.WeakSet()
_hooked = 0  # the process that has multiprocessing call _end_all()


class Pool:
    """Worker processes whose calls are awaited. `async with Pool() as pool: await pool.run(f, x)`.

    `processes`: how many workers, by default one a processor. `initializer(*initargs)` runs first in each.
    `max_tasks_per_child`: a worker is replaced after so many calls. `context`: the multiprocessing context that starts
    them. `retries`: how often a call is run again whose worker died; then it fails with `dpool.errors.WorkerDied`, and
    the worker has been replaced. `kill`: cancelling an awaiting task also stops the call it waits for, by ending its
    worker; otherwise a call that was begun is finished, and its result dropped. `resources`: what each worker takes of
    its machine beside a CPU, such as {"gpus": 1}; see docs/resources.md.

    Leaving the `async with` block waits for the calls that were made; leaving it by an exception ends them. Functions
    that are `async def` run in an event loop in the worker. A pool may be used from several loops.
    """

    def __init__(self, processes: int | None = None, initializer: Callable[..., object] | None = None,
                 initargs: Iterable[Any] = (), *, max_tasks_per_child: int | None = None,
                 context: BaseContext | None = None, retries: int = 0, kill: bool = False,
                 resources: Mapping[str, float | str] | None = None) -> None:
        self._group: Any = None  # opened by the first call
        self._spec = _spec(processes, initializer, initargs, max_tasks_per_child, context, retries, resources)
        self._kill = kill
        self._pid = os.getpid()
        self._state = "open"

    # -- calls

    async def run(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """The result of `function(*args, **kwargs)`, called in a worker. Raises what it raises.

        Cancelled before it was sent to a worker, the call never runs. Raises RuntimeError if the pool is closed.
        """
        group = self._open()
        call = _Call(asyncio.get_running_loop())
        if _is_async(function):
            function, args = run_coroutine, (function, *args)
        job = group.submit(function, args, kwargs, call, True)
        try:
            return await call.future
        finally:
            if not call.settled:
                call.dropped = True
                if self._kill:
                    group.stop(job)

    async def map(self, function: Callable[..., Any], iterable: Iterable[Any] | AsyncIterable[Any]) -> list[Any]:
        """`[function(x) for x in iterable]`, in parallel. The first call that raises ends it: calls that were not sent
        to a worker yet never run."""
        return await self._gather(function, await _read_all(iterable), MAP)

    async def starmap(self, function: Callable[..., Any],
                      iterable: Iterable[Iterable[Any]] | AsyncIterable[Iterable[Any]]) -> list[Any]:
        """`[function(*x) for x in iterable]`, otherwise like map()."""
        return await self._gather(function, await _read_all(iterable), STAR)

    async def _gather(self, function: Callable[..., Any], items: list[Any], mode: int) -> list[Any]:
        group = self._open()
        results = _Map(asyncio.get_running_loop(), len(items))
        if not items:
            return []
        if _is_async(function):
            items = [(function, *item) for item in items] if mode == STAR else [(function, item) for item in items]
            function, mode = run_coroutine, STAR
        job = group.submit_many(function, items, mode, results)
        try:
            return await results.future  # type: ignore[no-any-return]
        finally:
            if results.left:
                results.closed = True
                self._drop(group, job)

    def imap(self, function: Callable[..., Any], iterable: Iterable[Any] | AsyncIterable[Any], *,
             buffersize: int = BUFFER_SIZE) -> AsyncIterator[Any]:
        """An async iterator of `function(x)` for each x of `iterable`, in order, each as soon as it is there.

        The input is read as results are taken: at most `buffersize` items are ahead of them. A call that raises ends
        the iterator, as does closing it: calls that were not sent to a worker yet never run. An exception of the
        input's own is raised after the results of what came before it.
        """
        return self._stream(function, iterable, buffersize, _Ordered)

    def imap_unordered(self, function: Callable[..., Any], iterable: Iterable[Any] | AsyncIterable[Any], *,
                       buffersize: int = BUFFER_SIZE) -> AsyncIterator[Any]:
        """Like imap(), but the results come in whatever order they are ready."""
        return self._stream(function, iterable, buffersize, _Unordered)

    def _stream(self, function: Callable[..., Any], iterable: Any, buffersize: Any,
                kind: type[_Stream]) -> AsyncIterator[Any]:
        if isinstance(buffersize, bool) or not isinstance(buffersize, int):
            raise TypeError(f"buffersize must be an int, not {type(buffersize).__name__}")
        if buffersize < 1:
            raise ValueError(f"buffersize must be at least 1, got {buffersize}")
        if not hasattr(iterable, "__aiter__"):
            iterable = iter(iterable)
        self._check()
        return self._results(function, iterable, buffersize, kind)

    async def _results(self, function: Callable[..., Any], source: Any, buffersize: int,
                       kind: type[_Stream]) -> AsyncIterator[Any]:
        group = self._open()
        results = kind(asyncio.get_running_loop(), buffersize)
        async_function = _is_async(function)
        if async_function:
            given = function
            results.tasks = group.open_stream(run_coroutine, STAR, results)
            results.wrap = lambda item: (given, item)
        else:
            results.tasks = group.open_stream(function, MAP, results)
        reader = None
        try:
            if hasattr(source, "__aiter__"):
                reader = asyncio.ensure_future(results.read_async(source))
            items = results.items
            while True:
                if reader is None and results.wants_more:
                    results.read(source)
                if items:
                    if type(items[0]) is _Raise:
                        raise items.popleft().error
                    results.taken += 1
                    if reader is not None and results.wants_more:
                        results.wake_reader()
                    yield items.popleft()
                elif results.ended:
                    if results.input_error is not None:
                        raise results.input_error
                    return
                elif reader is None and results.wants_more:
                    await asyncio.sleep(0)  # the input takes its time: let others have the loop
                else:
                    await results.wait()
        finally:
            if reader is not None:
                reader.cancel()
            job = results.close()
            if not results.ended:
                self._drop(group, job)

    def _drop(self, group: Any, job: Any) -> None:
        if self._kill:
            group.stop(job)
        else:
            group.cancel(job)

    # -- the workers

    def _check(self) -> None:
        if self._state != "open":
            raise RuntimeError("this pool is closed")

    def _open(self) -> Any:
        group = self._group
        if group is None or self._state != "open":
            self._check()
            group = self._group = session.current().open_group(self._spec)
            _end_at_exit(group)
            weakref.finalize(self, _close_group, group, self._pid).atexit = False
        return group

    def close(self) -> None:
        """Take no more calls; the workers end when the accepted ones are done. Does not block."""
        if self._state == "open":
            self._state = "closed"
            if self._group is not None:
                self._group.close()

    def terminate(self) -> None:
        """End the workers now: calls without an outcome fail with `dpool.errors.GroupTerminated`. Does not block."""
        self._state = "terminated"
        if self._group is not None:
            self._group.terminate()

    async def join(self) -> None:
        """Wait until the workers have ended. Raises RuntimeError unless close() or terminate() was called."""
        if self._state == "open":
            raise RuntimeError("this pool is still open: call close() or terminate() first")
        group = self._group
        if group is None:
            return
        call = _Call(asyncio.get_running_loop())

        def wait() -> None:
            group.join()
            call.set(0, (None,))

        # A thread of its own: the loop's default executor may be busy, or shut down, or this pool's own workers.
        threading.Thread(target=wait, name="dpool-join", daemon=True).start()
        await call.future

    async def __aenter__(self) -> Pool:
        self._check()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None,
                        traceback: TracebackType | None) -> None:
        if error is None:
            self.close()
        else:
            self.terminate()
        try:
            await self.join()
        except BaseException:  # cancelled while calls were still running
            self.terminate()
            raise

    def __reduce__(self) -> Any:
        raise NotImplementedError("pool objects cannot be passed between processes or pickled")


_default: Pool | None = None


async def to_process(func: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """The result of `func(*args, **kwargs)`, called in a worker process: asyncio.to_thread() for what computes.

    The workers are shared by all such calls of this process, one a processor, started on the first; they end with the
    interpreter. Context variables do not travel.
    """
    global _default
    if _default is None or _default._pid != os.getpid():
        _default = Pool()
    return await _default.run(func, *args, **kwargs)


class _Call:
    """One run(): a Sink of the group's whose outcome goes to a future of the loop's."""

    __slots__ = ("mailbox", "future", "dropped", "settled")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.mailbox = mailbox_of(loop)
        self.future: asyncio.Future[Any] = loop.create_future()
        self.dropped = False  # nobody waits: it need not be sent
        self.settled = False

    def start(self) -> bool:
        return not self.dropped

    def set(self, first: int, values: Sequence[Any]) -> None:
        self.mailbox.post(self, 0, values[0])

    def fail(self, index: int, failure: Failure) -> None:
        self.mailbox.post(self, -1, to_exception(failure))

    def abandon(self, failure: Failure) -> None:
        self.fail(0, failure)

    def deliver(self, first: int, value: Any) -> None:
        self.settled = True
        if not self.future.done():
            if first >= 0:
                self.future.set_result(value)
            else:
                self.future.set_exception(value)


class _Map:
    """A whole map(): a Sink that hands the loop a list, or the first exception."""

    def __init__(self, loop: asyncio.AbstractEventLoop, count: int) -> None:
        self.mailbox = mailbox_of(loop)
        self.future: asyncio.Future[Any] = loop.create_future()
        self.values: list[Any] = [None] * count
        self.left = count  # tasks without a value; written by the I/O thread alone
        self.closed = False

    def start(self) -> bool:
        return True

    def set(self, first: int, values: Sequence[Any]) -> None:
        if not self.closed:
            self.values[first:first + len(values)] = values
            self.left -= len(values)
            if not self.left:
                self.mailbox.post(self, 0, self.values)

    def fail(self, index: int, failure: Failure) -> None:
        if not self.closed:
            self.closed = True
            self.mailbox.post(self, -1, to_exception(failure))

    def abandon(self, failure: Failure) -> None:
        self.fail(0, failure)

    def deliver(self, first: int, value: Any) -> None:
        if not self.future.done():
            if first >= 0:
                self.future.set_result(value)
            else:
                self.future.set_exception(value)


class _Raise:
    """Stands among the results of an imap for an exception to raise there."""

    __slots__ = ("error",)

    def __init__(self, error: BaseException) -> None:
        self.error = error


class _Stream:
    """The results of an imap and the reading of its input. start(), set() and fail() are called by the group's I/O
    thread and only post; everything else happens in the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, buffersize: int) -> None:
        self.loop = loop
        self.mailbox: Mailbox = mailbox_of(loop)
        self.tasks: Any = None  # the group's stream
        self.wrap: Callable[[Any], Any] | None = None  # from an item to what travels
        self.items: deque[Any] = deque()
        self.buffersize = buffersize
        self.sent = 0
        self.arrived = 0
        self.taken = 0
        self.open = True  # the input has not ended
        self.input_error: BaseException | None = None
        self._waiting: asyncio.Future[None] | None = None
        self._reader_waiting: asyncio.Future[None] | None = None

    @property
    def wants_more(self) -> bool:
        """Whether to read on: not before half of what may be ahead was taken, so that tasks travel together."""
        return self.open and self.sent - self.taken <= self.buffersize // 2

    @property
    def ended(self) -> bool:
        """Whether no more results will come."""
        return not self.open and self.arrived >= self.sent

    # -- the input

    def read(self, source: Iterator[Any]) -> None:
        """Read on, until enough is ahead or the loop has waited long enough."""
        room = self.buffersize - (self.sent - self.taken)
        read: list[Any] = []
        until = time.monotonic() + READ_AT_MOST_S
        try:
            for item in itertools.islice(source, room):
                read.append(item)
                if time.monotonic() > until:
                    break
            else:
                if len(read) < room:
                    self._end_input(None, read)
                    return
        except Exception as error:
            self._end_input(error, read)
            return
        self._send(read)

    async def read_async(self, source: AsyncIterable[Any]) -> None:
        """The same for an async input, in a task of its own: it may wait while results come."""
        try:
            async for item in source:
                self._send([item])
                while self.sent - self.taken >= self.buffersize:
                    self._reader_waiting = self.loop.create_future()
                    await self._reader_waiting
        except Exception as error:
            self._end_input(error, [])
        else:
            self._end_input(None, [])

    def wake_reader(self) -> None:
        if self._reader_waiting is not None and not self._reader_waiting.done():
            self._reader_waiting.set_result(None)

    def _send(self, read: list[Any]) -> None:
        if read and self.tasks is not None:  # an input may go on when its reader is cancelled
            self.sent += len(read)
            self.tasks.extend(read if self.wrap is None else [self.wrap(item) for item in read])

    def _end_input(self, error: BaseException | None, read: list[Any]) -> None:
        self._send(read)
        self.open = False
        self.input_error = error
        if self.tasks is not None:
            self.tasks.seal()
        self._wake()

    # -- the results

    async def wait(self) -> None:
        """Return when a result has come, or the end."""
        self._waiting = self.loop.create_future()
        try:
            await self._waiting
        finally:
            self._waiting = None

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def close(self) -> Any:
        """Nobody takes results any more; returns the job, for the group's cancel()."""
        job = self.tasks.job
        self.open = False
        self.tasks.seal()
        self.tasks = None  # the job refers to this, its sink
        self.items.clear()
        return job

    def deliver(self, first: int, values: Any) -> None:
        if first < 0:  # the group has ended
            self.open = False
            self.items.append(_Raise(values))
            self.sent = self.arrived
        else:
            self.arrived += len(values)
            self.queue(first, values)
        self._wake()

    def queue(self, first: int, values: Sequence[Any]) -> None:
        raise NotImplementedError

    # -- the Sink

    def start(self) -> bool:
        return True

    def set(self, first: int, values: Sequence[Any]) -> None:
        self.mailbox.post(self, first, values)

    def fail(self, index: int, failure: Failure) -> None:
        self.mailbox.post(self, index, (_Raise(to_exception(failure)),))

    def abandon(self, failure: Failure) -> None:
        self.mailbox.post(self, -1, to_exception(failure))


class _Unordered(_Stream):
    """Results as they come."""

    def queue(self, first: int, values: Sequence[Any]) -> None:
        self.items.extend(values)


class _Ordered(_Stream):
    """Results in the order of their tasks."""

    def __init__(self, loop: asyncio.AbstractEventLoop, buffersize: int) -> None:
        super().__init__(loop, buffersize)
        self.expected = 0  # the next task whose result may be queued
        self.unsorted: dict[int, Sequence[Any]] = {}  # first task -> results that came before their turn

    def queue(self, first: int, values: Sequence[Any]) -> None:
        self.unsorted[first] = values
        while self.expected in self.unsorted:
            more = self.unsorted.pop(self.expected)
            self.items.extend(more)
            self.expected += len(more)


def to_exception(failure: Failure) -> BaseException:
    """What the awaiting coroutine gets for this failure."""
    error = failure.exception
    if failure.kind == ABANDONED:
        # A new one for each call: each will have a traceback of its own.
        text = "the pool was terminated before this call had a result" if isinstance(error, GroupTerminated) else error
        again = type(error)(text)
        again.__cause__ = error.__cause__
        return again
    trace = failure.traceback
    if error.__traceback__ is not None:
        # It could not be pickled or rebuilt here. The frames lead to the call that will hold this error: they would
        # keep it, and the group's thread, until the garbage collector comes by.
        import traceback

        trace = "".join(traceback.format_exception(error))
        error.__context__ = error.__traceback__ = None
    if trace:
        from concurrent.futures import process

        kind: Any = process._RemoteTraceback
        error.__cause__ = kind(f'\n"""\n{trace}"""')
    if isinstance(error, StopIteration):
        # A future refuses it, since it would end the coroutine that awaits it.
        instead = RuntimeError(f"the call raised {error!r}")
        instead.__cause__ = error
        return instead
    return error


async def _read_all(iterable: Any) -> list[Any]:
    if hasattr(iterable, "__aiter__"):
        return [item async for item in iterable]
    return list(iterable)


def _is_async(function: Any) -> bool:
    code = getattr(function, "__code__", None)
    if code is not None:
        return bool(code.co_flags & inspect.CO_COROUTINE) or hasattr(function, "_is_coroutine_mark")
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


def _spec(processes: Any, initializer: Any, initargs: Any, max_tasks: Any, context: Any, retries: Any,
          resources: Any) -> GroupSpec:
    import multiprocessing

    needs = parse_resources(resources)
    all_cpus = processes is None
    if processes is None:
        processes = session.default_processes(needs)
    if isinstance(processes, bool) or not hasattr(processes, "__index__"):
        raise TypeError(f"processes must be an int or None, not {type(processes).__name__}")
    processes = int(processes)
    if processes < 1:
        raise ValueError(f"processes must be at least 1, got {processes}")
    if processes > 256:
        session.check_processes(processes)
    if initializer is not None and not callable(initializer):
        raise TypeError("initializer must be a callable")
    for name, value, least in (("max_tasks_per_child", max_tasks, 1), ("retries", retries, 0)):
        if value is None and least:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, not {type(value).__name__}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if context is None:
        context = multiprocessing.get_context()
    elif not hasattr(context, "get_start_method") or not hasattr(context, "Process"):
        methods = ", ".join(map(repr, multiprocessing.get_all_start_methods()))
        kind = ValueError if isinstance(context, str) else TypeError
        raise kind(f"context must be what multiprocessing.get_context(method) returns, method one of {methods}; "
                   f"not {context!r}")
    # Forking once threads run is what can deadlock, so where workers are forked all are at once.
    on_demand = context.get_start_method(allow_none=False) != "fork"
    return GroupSpec(processes, context, initializer, initargs, max_tasks, retries, on_demand, "AsyncWorker",
                     all_cpus=all_cpus, resources=needs)


def _close_group(group: Any, pid: int) -> None:
    """The pool was collected: its calls still finish, then its workers end."""
    if os.getpid() == pid:
        group.close()


def _end_at_exit(group: Any) -> None:
    global _hooked
    _groups.add(group)
    if _hooked != os.getpid():
        # In a process of multiprocessing's own, children are waited for before threading's hooks run.
        _hooked = os.getpid()
        util.Finalize(None, _end_all, exitpriority=15)


def _end_all() -> None:
    """The interpreter exits, and with it every loop: nobody waits for anything any more."""
    groups = list(_groups)
    for group in groups:
        group.terminate()
    for group in groups:
        group.join(TERMINATE_TIMEOUT_S)


threading._register_atexit(_end_all)  # type: ignore[attr-defined]
os.register_at_fork(after_in_child=_groups.clear)
