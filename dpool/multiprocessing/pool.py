"""`multiprocessing.pool` with dpool's Pool: the standard library's signatures and promises, over one worker group.

Translates between the two and decides nothing about where tasks run. ThreadPool and the exceptions are the standard
library's own.
"""

from __future__ import annotations

import collections
import itertools
import operator
import os
import threading
import time
from multiprocessing import TimeoutError, get_context, util
from multiprocessing import pool as _stdlib
from multiprocessing.pool import (  # type: ignore[attr-defined]
    CLOSE,
    INIT,
    RUN,
    TERMINATE,
    MaybeEncodingError,
    RemoteTraceback,
    ThreadPool,
    starmapstar,
)

from dpool import session, waiting
from dpool.engine import (
    ABANDONED,
    MAP,
    MAP_CHUNK,
    RESULT_LOST,
    STAR,
    STAR_CHUNK,
    Failure,
    GroupSpec,
)
from dpool.errors import GroupTerminated
from dpool.resources import parse as parse_resources

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from typing import Any

    from dpool.engine import WorkerGroup

__all__ = ["Pool", "ThreadPool"]

# How long terminate() and the interpreter's exit wait for workers that do not die.
TERMINATE_TIMEOUT_S = 5.0
# Items of an imap that are read ahead of the workers. More: an uneven input stalls them less. Fewer: less memory.
LOOK_AHEAD = 4096
# Bytes of large items that are read ahead, and so many items in any case.
LOOK_AHEAD_BYTES = 64 << 20
LOOK_AHEAD_LEAST = 16

session.prepare()

_job_numbers = itertools.count()


class Pool(_stdlib.Pool):
    """A pool of worker processes: `multiprocessing.pool.Pool`, several times faster and harder to hang.

    Parameters, methods, exceptions and attributes are those of the running Python's own Pool. Differences, each a
    promise kept where the standard library's pool hangs: a worker that dies fails the task it was running with
    `dpool.errors.WorkerDied` and is replaced; an initializer that fails fails all tasks with
    `dpool.errors.GroupBroken`; terminate() fails what was pending with `dpool.errors.GroupTerminated`.

    One option more, `resources`: what each worker takes of its machine beside a CPU, such as {"gpus": 1}; see
    docs/resources.md.
    """

    # For __del__, should __init__ raise, or not even be entered.
    _state = INIT

    def __init__(self, processes: int | None = None, initializer: Callable[..., object] | None = None,
                 initargs: Iterable[Any] = (), maxtasksperchild: int | None = None, context: Any = None, *,
                 resources: Mapping[str, float | str] | None = None) -> None:
        self._pool: list[Any] = []
        self._ctx = context or get_context()
        if not hasattr(self._ctx, "Process"):
            raise TypeError(f"context must be one that multiprocessing.get_context() returns, not {context!r}")
        all_cpus = processes is None
        needs = parse_resources(resources)
        if processes is None:
            processes = session.default_processes(needs)
        _check_processes(processes)
        if maxtasksperchild is not None and (not isinstance(maxtasksperchild, int) or maxtasksperchild <= 0):
            raise ValueError("maxtasksperchild must be a positive int or None")
        if initializer is not None and not callable(initializer):
            raise TypeError("initializer must be a callable")
        self._maxtasksperchild = maxtasksperchild
        self._initializer = initializer
        self._initargs = tuple(initargs)
        self._cache: dict[int, Any] = {}
        make = type(self).Process
        spec = GroupSpec(processes, self._ctx, initializer, self._initargs, maxtasksperchild,
                         start_process=lambda **kwargs: make(self_ctx, **kwargs), all_cpus=all_cpus,
                         resources=needs)
        self_ctx = self._ctx
        self._spec = spec
        group: Any = session.current().open_group(spec)
        self._group: WorkerGroup = group
        self._pool = group.processes
        self._taskqueue = _TaskQueue(group)
        self._terminate = util.Finalize(self, _terminate_group, args=(group, os.getpid()), exitpriority=15)
        self._state = RUN

    @property
    def _processes(self) -> int:
        """How many workers there should be: without a number a cluster's group grows with its nodes."""
        return self._spec.processes

    @_processes.setter
    def _processes(self, processes: int) -> None:
        self._spec.processes = processes

    def _repopulate_pool(self) -> None:
        self._group.maintain()  # type: ignore[attr-defined]

    def apply(self, func: Callable[..., Any], args: Iterable[Any] = (),
              kwds: Mapping[str, Any] = {}) -> Any:  # noqa: B006
        """`func(*args, **kwds)` in a worker; waits for it. Raises what it raises."""
        if "apply_async" in self.__dict__ or type(self).apply_async is not Pool.apply_async:
            # The standard library's apply() calls it, and who has put one of their own there counts on that.
            return self.apply_async(func, args, kwds).get()
        if self._state != RUN:
            raise ValueError("Pool not running")
        result = ApplyResult(self, None, None)
        group: Any = self._group
        job = group.submit(func, tuple(args), dict(kwds) if kwds else {}, result, attended=True)
        group.attend(job)
        return result.get()

    def apply_async(self, func: Callable[..., Any], args: Iterable[Any] = (), kwds: Mapping[str, Any] = {},  # noqa: B006
                    callback: Callable[[Any], object] | None = None,
                    error_callback: Callable[[BaseException], object] | None = None) -> ApplyResult:
        """Queue `func(*args, **kwds)`; returns at once. Raises ValueError if the pool is not running."""
        if self._state != RUN:
            raise ValueError("Pool not running")
        result = ApplyResult(self, callback, error_callback)
        self._group.submit(func, tuple(args), dict(kwds) if kwds else {}, result)
        return result

    def _map_async(self, func: Callable[..., Any], iterable: Any, mapper: Any, chunksize: int | None = None,
                   callback: Callable[[Any], object] | None = None,
                   error_callback: Callable[[BaseException], object] | None = None) -> MapResult:
        """What map, map_async, starmap and starmap_async, which are inherited, have in common."""
        self._check_running()  # type: ignore[attr-defined]
        broken: Exception | None = None
        if hasattr(iterable, "__len__"):
            length = len(iterable)
            try:
                items: Sequence[Any] = list(iterable)
            except Exception as error:
                broken, items = error, []
        else:
            items = list(iterable)
            length = len(items)
        if chunksize is None:
            chunksize, extra = divmod(length, max(len(self._pool), 1) * 4)
            if extra:
                chunksize += 1
        else:
            chunksize = _check_chunksize(chunksize)
        result = MapResult(self, chunksize, len(items), callback, error_callback)
        if broken is not None:
            result._settle(False, broken)
        elif items:
            starred = mapper is starmapstar
            if chunksize == 1:
                mode = STAR if starred else MAP
            else:
                mode = STAR_CHUNK if starred else MAP_CHUNK
            self._group.submit_many(func, items, mode, result, chunksize)
        return result

    def imap(self, func: Callable[..., Any], iterable: Iterable[Any],
             chunksize: int | None = 1) -> IMapIterator:
        """Like map(), but an iterator of the results in order, each as soon as it is there. Returns at once."""
        return self._imap(IMapIterator, func, iterable, chunksize)  # type: ignore[no-any-return]

    def imap_unordered(self, func: Callable[..., Any], iterable: Iterable[Any],
                       chunksize: int | None = 1) -> IMapIterator:
        """Like imap(), but the results come in whatever order they are ready."""
        return self._imap(IMapUnorderedIterator, func, iterable, chunksize)  # type: ignore[no-any-return]

    def _imap(self, make: type[IMapIterator], func: Callable[..., Any], iterable: Iterable[Any],
              chunksize: Any) -> Any:
        self._check_running()  # type: ignore[attr-defined]
        chunksize = _check_chunksize(chunksize)
        result = make(self)
        mode = MAP if chunksize == 1 else MAP_CHUNK
        if type(iterable) in (list, tuple, range):
            # Nothing of the user's runs when these are read, so no thread is needed to read them.
            items = iterable if type(iterable) is not list else iterable.copy()
            if items:
                self._group.submit_many(func, items, mode, result, chunksize)  # type: ignore[arg-type]
            result._set_length(-(-len(items) // chunksize))  # type: ignore[arg-type]
        else:
            stream = self._group.open_stream(func, mode, result, as_pushed=True)
            feeder = threading.Thread(target=_feed, args=(stream, iterable, chunksize, result), name="dpool-imap",
                                      daemon=True)
            try:
                feeder.start()
            except BaseException:  # a Ctrl-C, or there can be no more threads
                stream.seal()  # or the group would wait for more
                raise
        if chunksize == 1:
            return result
        return (item for chunk in result for item in chunk)

    def close(self) -> None:
        """Take no more tasks; the workers end when the accepted ones are done. Does not block."""
        if self._state == RUN:
            self._state = CLOSE
            self._group.close()

    def terminate(self) -> None:
        """End the workers now, without finishing what is pending; returns when they have ended."""
        self._state = TERMINATE
        self._terminate()

    def join(self) -> None:
        """Wait until the workers have ended. Raises ValueError if neither close() nor terminate() was called."""
        if self._state == RUN:
            raise ValueError("Pool is still running")
        if self._state not in (CLOSE, TERMINATE):
            raise ValueError("In unknown state")
        self._group.join()


class _TaskQueue:
    """The look-alike of the standard library's Pool._taskqueue, for programs that ask how much is queued."""

    def __init__(self, group: Any) -> None:
        self._group = group

    def qsize(self) -> int:
        """Tasks that were accepted and not yet sent to a worker."""
        return int(self._group.queued)

    def empty(self) -> bool:
        return not self.qsize()


class ApplyResult(_stdlib.ApplyResult):  # type: ignore[type-arg]
    """The outcome of apply_async(): the standard library's AsyncResult, and a Sink of the group's."""

    def __init__(self, pool: Pool, callback: Callable[[Any], object] | None,
                 error_callback: Callable[[BaseException], object] | None) -> None:
        self._pool: Pool | None = pool
        self._job = next(_job_numbers)
        self._cache = pool._cache
        self._callback = callback
        self._error_callback = error_callback
        self._done = False
        # Made, and held, by the first who waits; released when the outcome is there. Most results are there before
        # anyone asks, and an Event costs more than all the rest of this object.
        self._waiter: Any = None
        self._cache[self._job] = self

    def ready(self) -> bool:
        """Whether the outcome is there."""
        return self._done

    def successful(self) -> bool:
        """Whether the call returned a value. Raises ValueError if there is no outcome yet."""
        if not self._done:
            raise ValueError(f"{self!r} not ready")
        return self._success

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the outcome is there or `timeout` seconds have passed."""
        if not self._done:
            with _waiters:
                waiter = self._waiter
                if waiter is None:
                    waiter = self._waiter = threading.Lock()
                    waiter.acquire()
            # The setter sets _done before it looks for a waiter, so one of the two sees the other.
            if not self._done:
                if waiting.acquire(waiter, timeout):
                    waiter.release()  # for the next who waits

    def get(self, timeout: float | None = None) -> Any:
        """The value, waiting up to `timeout` seconds for it. Raises what the call raised, or TimeoutError."""
        if not self._done:
            self.wait(timeout)
            if not self._done:
                raise TimeoutError
        if self._success:
            return self._value
        raise self._value

    def _settle(self, success: bool, value: Any, quiet: bool = False) -> None:
        self._success = success
        self._value = value
        callback = self._callback if success else self._error_callback
        try:
            if callback is not None and not quiet:
                callback(value)
        except Exception:
            # It ends nobody else's results; the thread's hook reports it like any other.
            threading.excepthook(threading.ExceptHookArgs([*_exc_info(), threading.current_thread()]))
        finally:
            self._callback = self._error_callback = None
            self._cache.pop(self._job, None)
            self._pool = None
            self._done = True
            waiter = self._waiter
            if waiter is not None and waiter.locked():
                waiter.release()

    # -- the Sink

    def start(self) -> bool:
        return True

    def set(self, first: int, values: Sequence[Any]) -> None:
        self._settle(True, values[0])

    def set_alone(self, value: Any) -> bool:
        """For apply(), whose caller alone has this."""
        self._success = True
        self._value = value
        self._cache.pop(self._job, None)
        self._pool = None
        self._done = True
        return True

    def fail(self, index: int, failure: Failure) -> None:
        self._settle(False, to_exception(failure))

    def abandon(self, failure: Failure) -> None:
        """The group has ended without an outcome of this."""
        if not self._done:
            # As with the standard library, terminating a pool calls nobody back.
            self._settle(False, failure.exception, quiet=isinstance(failure.exception, GroupTerminated))


AsyncResult = ApplyResult

# Guards the creation of _waiter in every ApplyResult: two threads may wait for one result.
_waiters = threading.Lock()


class MapResult(ApplyResult, _stdlib.MapResult):  # type: ignore[type-arg]
    """The outcome of a whole map: a list, or the first exception that arrived, once every chunk has ended."""

    def __init__(self, pool: Pool, chunksize: int, length: int, callback: Callable[[Any], object] | None,
                 error_callback: Callable[[BaseException], object] | None) -> None:
        super().__init__(pool, callback, error_callback)
        self._success = True
        self._value: Any = [None] * length
        self._chunksize = chunksize
        if length:
            self._number_left = -(-length // chunksize)
        else:
            self._number_left = 0
            self._cache.pop(self._job, None)
            self._done = True

    def set(self, first: int, values: Sequence[Any]) -> None:
        if self._success:
            size = self._chunksize
            if size == 1:
                self._value[first:first + len(values)] = values
            else:
                for number, chunk in enumerate(values, first):
                    self._value[number * size:number * size + len(chunk)] = chunk
        self._finish(len(values))

    def fail(self, index: int, failure: Failure) -> None:
        if self._success:
            self._success = False
            self._value = to_exception(failure)
        self._finish(1)

    def _finish(self, count: int) -> None:
        self._number_left -= count
        if not self._number_left:
            self._settle(self._success, self._value)


_nothing = object()


class _Raise:
    """Stands in an iterator's queue for an exception to raise there."""

    __slots__ = ("error",)

    def __init__(self, error: BaseException) -> None:
        self.error = error


class IMapIterator(_stdlib.IMapIterator):  # type: ignore[type-arg]
    """The results of imap() in the order of their tasks; a Sink of the group's."""

    def __init__(self, pool: Pool) -> None:
        self._pool: Pool | None = pool
        self._cond = waiting.Condition()
        self._job = next(_job_numbers)
        self._cache = pool._cache
        self._items: collections.deque[Any] = collections.deque()
        self._index = 0  # results handed to the caller
        self._arrived = 0  # results that came from the group
        self._expected = 0  # the next task whose result may be queued
        self._unsorted: dict[int, Any] = {}  # first task -> results that came before their turn
        self._length: int | None = None
        self._last: BaseException | None = None  # the input's own exception, raised after its last item's result
        self._cache[self._job] = self

    def __iter__(self) -> IMapIterator:
        return self

    def next(self, timeout: float | None = None) -> Any:
        """The next result, waiting up to `timeout` seconds. Raises what its call raised, TimeoutError, or
        StopIteration after the last."""
        try:
            item = self._items.popleft()
        except IndexError:
            item = _nothing
        if item is _nothing:  # outside the handler, or the traceback of a Ctrl-C would speak of an IndexError
            item = self._wait(timeout)
        self._index += 1
        if type(item) is _Raise:
            raise item.error
        return item

    __next__ = next

    def _wait(self, timeout: float | None) -> Any:
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            with self._cond:
                if self._items:
                    return self._items.popleft()
                if self._length is not None and self._index >= self._length:
                    self._pool = None
                    raise StopIteration from None
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise TimeoutError from None
                self._cond.wait(left)

    def _queue(self, first: int, items: Sequence[Any]) -> None:
        """Hold results until those before them are there. Called with the condition held."""
        if first != self._expected:
            self._unsorted[first] = items
            return
        while True:
            self._items.extend(items)
            self._expected += len(items)
            if self._expected not in self._unsorted:
                return
            items = self._unsorted.pop(self._expected)

    def _arrive(self, first: int, items: Sequence[Any]) -> None:
        with self._cond:
            self._arrived += len(items)
            self._queue(first, items)
            self._check_end()
            self._cond.notify_all()

    def _check_end(self) -> None:
        if self._length is not None and self._arrived >= self._length:
            if self._last is not None:
                self._items.append(_Raise(self._last))
                self._last = None
                self._length += 1
                self._arrived += 1
            self._cache.pop(self._job, None)

    def _set_length(self, length: int, error: BaseException | None = None) -> None:
        """The input had `length` tasks; `error` is what reading it raised then."""
        with self._cond:
            self._length = length
            self._last = error
            self._check_end()
            self._cond.notify_all()

    # -- the Sink

    def start(self) -> bool:
        return True

    def set(self, first: int, values: Sequence[Any]) -> None:
        self._arrive(first, values)

    def fail(self, index: int, failure: Failure) -> None:
        self._arrive(index, (_Raise(to_exception(failure)),))

    def abandon(self, failure: Failure) -> None:
        """The group has ended without the outcomes that are missing: after those that are there comes `failure`."""
        with self._cond:
            self._unsorted.clear()
            self._items.append(_Raise(failure.exception))
            self._length = self._index + len(self._items)
            self._arrived = self._length
            self._cache.pop(self._job, None)
            self._cond.notify_all()

    @property
    def _ended(self) -> bool:
        return self._length is not None


class IMapUnorderedIterator(IMapIterator, _stdlib.IMapUnorderedIterator):  # type: ignore[type-arg]
    """The results of imap_unordered(), as they come."""

    def _queue(self, first: int, items: Sequence[Any]) -> None:
        self._items.extend(items)


def _feed(stream: Any, iterable: Iterable[Any], chunksize: int, result: IMapIterator) -> None:
    """Read an imap's input in a thread of its own: it may block, raise, or wait for the imap's own results."""
    count = 0
    error: BaseException | None = None
    try:
        source = iter(iterable)
        while not result._ended:
            if chunksize == 1:
                try:
                    item = next(source)
                except StopIteration:
                    break
            else:
                item = tuple(itertools.islice(source, chunksize))
                if not item:
                    break
            # As with the standard library, whose thread has sent an item before it asks for the next one, the input
            # may yield the same buffer again and again.
            while True:
                try:
                    nbytes = stream.push(item)
                    break
                except MemoryError:
                    if not stream.backlog:
                        raise
                    _wait_for_results(stream, result, stream.backlog - 1)
            item = None
            count += 1
            ahead = min(LOOK_AHEAD, max(LOOK_AHEAD_BYTES // (nbytes + 1), LOOK_AHEAD_LEAST))
            if stream.backlog > ahead:
                _wait_for_results(stream, result, ahead // 2)
    except Exception as raised:
        error = raised
    if not result._ended:
        result._set_length(count, error)
    stream.seal()


def _wait_for_results(stream: Any, result: IMapIterator, backlog: int) -> None:
    """Until no more than `backlog` tasks are without an outcome, or the whole has ended."""
    with result._cond:
        while stream.backlog > backlog and not result._ended:
            result._cond.wait()


def _terminate_group(group: Any, pid: int) -> None:
    if os.getpid() == pid:
        group.terminate()
        group.join(TERMINATE_TIMEOUT_S)


class _Repr:
    """An object whose repr is a given text: MaybeEncodingError takes objects, the texts came from the worker."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


def to_exception(failure: Failure) -> BaseException:
    """What the standard library's Pool would raise for this failure, or dpool's own where that would hang."""
    error = failure.exception
    if failure.kind == RESULT_LOST:
        lost: BaseException = MaybeEncodingError(error, _Repr(failure.value_repr))
        if failure.traceback:
            lost.__cause__ = RemoteTraceback(f'\n"""\n{failure.traceback}"""')
        return lost
    if failure.traceback and failure.kind != ABANDONED:
        error.__cause__ = RemoteTraceback(f'\n"""\n{failure.traceback}"""')
    return error


def __getattr__(name: str) -> Any:
    """Names of the standard library's module that dpool does not replace, so that an import swap never fails."""
    return getattr(_stdlib, name)


def _exc_info() -> tuple[Any, Any, Any]:
    import sys

    return sys.exc_info()


def _check_chunksize(chunksize: Any) -> int:
    if chunksize < 1:
        raise ValueError(f"Chunksize must be 1+, not {chunksize:n}")
    return operator.index(chunksize)


def _check_processes(processes: Any) -> None:
    if isinstance(processes, bool) or not isinstance(processes, int) and not hasattr(processes, "__index__"):
        raise TypeError(f"processes must be an int or None, not {type(processes).__name__}")
    if processes < 1:
        raise ValueError("Number of processes must be at least 1")
    if processes > 256:
        session.check_processes(processes)
