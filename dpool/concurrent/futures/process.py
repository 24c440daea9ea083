"""`concurrent.futures.process` with dpool's ProcessPoolExecutor: the standard library's promises over a worker group.

Translates between the two and decides nothing about where tasks run. wait(), as_completed() and the exceptions are the
standard library's own; futures are future.py's, map() is maps.py's.
"""

from __future__ import annotations

import itertools
import operator
import os
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from concurrent.futures import _base
from concurrent.futures import process as _stdlib
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import util

from dpool import session
from dpool.concurrent.futures.failures import REFUSALS, WorkerDeath, broken_pool
from dpool.concurrent.futures.future import Call, Future
from dpool.concurrent.futures.initializer import LoggedInitializer
from dpool.concurrent.futures.maps import MapResults, Unsendable, feed, iterate
from dpool.engine import ARGUMENT_LOST, MAP, MAP_CHUNK, STAR, STAR_CHUNK, Failure, GroupSpec
from dpool.errors import GroupBroken, GroupClosed, GroupTerminated
from dpool.resources import parse as parse_resources

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from multiprocessing.context import BaseContext
    from typing import Any

__all__ = ["BrokenProcessPool", "ProcessPoolExecutor", "WorkerDeath"]

# The groups of this process's executors that may still have work: the interpreter's exit waits for them.
_groups: weakref.WeakSet[Any] = weakref.WeakSet()
_exiting = False
_hooked = 0  # the process that has multiprocessing call _finish_all()


class ProcessPoolExecutor(_stdlib.ProcessPoolExecutor):
    """An executor of worker processes: `concurrent.futures.ProcessPoolExecutor`, several times faster.

    Parameters, methods, exceptions and attributes are those of the running Python's own, with terminate_workers(),
    kill_workers() and map(buffersize=) also where it has none. Two options more:

    `on_worker_death`: "break", the standard library's promise, fails every pending call when a worker process dies, and
    the executor takes no more. "fail" fails the one call that the worker was running, with WorkerDeath; the worker is
    replaced. `retries`: how often such a call is run again before it fails; for "fail" only.

    `resources`: what each worker takes of its machine beside a CPU, such as {"gpus": 1}; see docs/resources.md.
    """

    def __init__(self, max_workers: int | None = None, mp_context: BaseContext | None = None,
                 initializer: Callable[..., object] | None = None, initargs: Iterable[Any] = (), *,
                 max_tasks_per_child: int | None = None, on_worker_death: str = "break", retries: int = 0,
                 resources: Mapping[str, float | str] | None = None) -> None:
        self._group: Any = None  # opened by the first call
        self._limit = _workers(max_workers)
        self._spec: GroupSpec | None = None  # of the group
        self._mp_context: Any = _context(mp_context, max_tasks_per_child)
        self._safe_to_dynamically_spawn_children = self._mp_context.get_start_method(allow_none=False) != "fork"
        if initializer is not None and not callable(initializer):
            raise TypeError("initializer must be a callable")
        self._initializer: Any = initializer
        self._initargs = tuple(initargs)
        self._max_tasks_per_child = max_tasks_per_child
        if on_worker_death not in ("break", "fail"):
            raise ValueError(f'on_worker_death must be "break" or "fail", not {on_worker_death!r}')
        if isinstance(retries, bool) or not isinstance(retries, int):
            raise TypeError(f"retries must be an int, not {type(retries).__name__}")
        if retries < 0:
            raise ValueError(f"retries must be at least 0, got {retries}")
        if retries and on_worker_death == "break":
            raise ValueError('retries need on_worker_death="fail": with "break" a dead worker ends the executor')
        self._on_worker_death = on_worker_death
        self._retries = retries
        self._resources = parse_resources(resources)
        # Guards _group and _shutdown_thread where one follows from the other. Held while the first workers start, never
        # while something of the user's runs.
        self._shutdown_lock = threading.Lock()
        self._shutdown_thread = False
        self._cancel_pending_futures = False
        self._pending_work_items: dict[int, Any] = {}
        self._numbers = itertools.count()
        self._maps: weakref.WeakSet[MapResults] = weakref.WeakSet()
        # Look-alikes, for programs and tests that look inside the standard library's.
        self._processes: Any = _Processes()
        self._executor_manager_thread: Any = None
        self._call_queue: Any = _CallQueue()
        self._result_queue: Any = None

    @property
    def _max_workers(self) -> int:
        """How many workers there may be. Without a limit, as many as this machine, or the cluster, has CPUs now."""
        if self._limit is not None:
            return self._limit
        return self._spec.processes if self._spec is not None else session.default_processes(self._resources)

    @_max_workers.setter
    def _max_workers(self, count: int) -> None:
        self._limit = count

    @property
    def _broken(self) -> Any:  # type: ignore[override]
        """Why the executor is broken, a text; False if it is not."""
        why = None if self._group is None else self._group.ended
        return str(broken_pool(why)) if why is not None else False

    @property
    def _queue_count(self) -> int:  # type: ignore[override]
        return int(repr(self._numbers)[6:-1])  # what itertools.count would give next

    # -- calls

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> _base.Future[Any]:
        """Queue `fn(*args, **kwargs)` and return its Future; does not block.

        Raises BrokenProcessPool if the executor is broken, RuntimeError after shutdown() and in a forked child. What
        cannot be pickled is raised by the future.
        """
        group = self._group
        if group is None or self._shutdown_thread or _exiting:
            group = self._open()
        future = Future()
        call = Call(future, self._pending_work_items, next(self._numbers), fn, args, kwargs)
        self._pending_work_items[call.number] = call
        try:
            job = group.submit(fn, args, kwargs, call, True)
            future._waits = (group, job)
            if not job.unsettled:
                future._waits = None
        except REFUSALS as error:
            del self._pending_work_items[call.number]
            raise self._refusal(error) from error.__cause__
        except Exception as error:
            if future.set_running_or_notify_cancel():
                call.fail(0, Failure(ARGUMENT_LOST, error))
        return future

    def map(self, fn: Callable[..., Any], *iterables: Iterable[Any], timeout: float | None = None,
            chunksize: int = 1, buffersize: int | None = None) -> Iterator[Any]:
        """Call `fn` with an item of each of `iterables`, in parallel; an iterator of the results, in order.

        The inputs are read at once, unless `buffersize` says how many chunks may be in work ahead of the results that
        were taken. `timeout`: seconds from this call on, after which the iterator raises TimeoutError. `chunksize`:
        items in one task; one that raises takes the results of its chunk with it. When the iterator ends, raises or is
        dropped, calls that were not sent to a worker yet never run.
        """
        if "submit" in self.__dict__ or type(self).submit is not ProcessPoolExecutor.submit:
            # The standard library's map() calls submit(), and who has put one of their own there counts on that:
            # tqdm's process_map moves its bar so. Before 3.14 that map() has no buffersize.
            ahead: dict[str, Any] = {} if buffersize is None else {"buffersize": buffersize}
            if not ahead or sys.version_info >= (3, 14):
                return super().map(fn, *iterables, timeout=timeout, chunksize=chunksize, **ahead)
        if chunksize < 1:
            raise ValueError("chunksize must be >= 1.")
        chunksize = operator.index(chunksize)
        if buffersize is not None and not isinstance(buffersize, int):
            raise TypeError("buffersize must be an integer or None")
        if buffersize is not None and buffersize < 1:
            raise ValueError("buffersize must be None or > 0")
        deadline = None if timeout is None else timeout + time.monotonic()
        if deadline != deadline:
            raise ValueError("timeout must be a number of seconds or None, not nan")
        group = self._group
        if group is None or self._shutdown_thread or _exiting:
            group = self._open()
        single = len(iterables) == 1
        source: Any = iterables[0] if single else zip(*iterables, strict=False)
        if chunksize == 1:
            mode = MAP if single else STAR
        else:
            mode = MAP_CHUNK if single else STAR_CHUNK
        results = MapResults(group)
        self._maps.add(results)
        try:
            if buffersize is not None:
                return self._map_ahead(fn, iter(source), mode, chunksize, buffersize, results, deadline)
            if all(type(iterable) in (list, tuple, range) for iterable in iterables):
                # Reading these runs nothing of the user's and takes no time.
                items: Sequence[Any] = source if type(source) in (tuple, range) else list(source)
                results.grow(-(-len(items) // chunksize))
                if items:
                    try:
                        results.attach(group.submit_many(fn, items, mode, results, chunksize))
                    except REFUSALS:
                        raise
                    except Exception as error:
                        raise Unsendable(error) from None
            else:
                feed(group, fn, iter(source), mode, chunksize, results)
        except REFUSALS as error:
            raise self._refusal(error) from error.__cause__
        except Unsendable as error:
            results.fail(0, Failure(ARGUMENT_LOST, error.reason))
        results.seal()
        return iterate(results, deadline, chunksize > 1)

    def _map_ahead(self, fn: Callable[..., Any], source: Iterator[Any], mode: int, chunksize: int, buffersize: int,
                   results: MapResults, deadline: float | None) -> Iterator[Any]:
        """map() that reads its inputs as its results are taken."""
        reference = weakref.ref(self)  # the iterator must not keep its executor alive

        def read_one() -> None:
            executor = reference()
            if executor is None or not results.open:
                return results.seal()
            if mode in (MAP, STAR):
                try:
                    item = next(source)
                except StopIteration:
                    return results.seal()
            else:
                item = tuple(itertools.islice(source, chunksize))
                if not item:
                    return results.seal()
            group = executor._group
            if executor._shutdown_thread or _exiting:
                executor._open()
            try:
                results.send_one(group, fn, item, mode)
            except REFUSALS as error:
                raise executor._refusal(error) from error.__cause__

        for _ in range(buffersize):
            if not results.open:
                break
            read_one()
        return iterate(results, deadline, mode in (MAP_CHUNK, STAR_CHUNK), read_one)

    # -- the workers

    def _open(self) -> Any:
        """The group, opened now if it was not. Raises what submit() raises."""
        with self._shutdown_lock:
            broken = self._broken
            if broken:
                assert self._group is not None
                raise self._refusal(self._group.ended) from self._group.ended.__cause__
            if self._shutdown_thread:
                raise RuntimeError("cannot schedule new futures after shutdown")
            if _exiting:
                raise RuntimeError("cannot schedule new futures after interpreter shutdown")
            if self._group is None:
                initializer = LoggedInitializer(self._initializer) if self._initializer is not None else None
                spec = GroupSpec(
                    self._max_workers, self._mp_context, initializer, self._initargs, self._max_tasks_per_child,
                    # Forking once threads run is what can deadlock, so where workers are forked all are at once.
                    retries=self._retries, on_demand=self._safe_to_dynamically_spawn_children, worker_name="Process",
                    daemon=False, break_on_death=self._on_worker_death == "break", all_cpus=self._limit is None,
                    resources=self._resources)
                group: Any = session.current().open_group(spec)
                _finish_at_exit(group)
                weakref.finalize(self, _close_group, group, os.getpid()).atexit = False
                self._processes.living = getattr(group, "processes", ())
                self._call_queue.group = group
                self._executor_manager_thread = _ManagerThread(group)
                self._spec = spec
                self._group = group
            return self._group

    def _refusal(self, error: BaseException) -> BaseException:
        """What submit() raises where the group raises `error`."""
        if isinstance(error, GroupBroken):
            return broken_pool(error)
        if isinstance(error, (GroupClosed, GroupTerminated)):
            when = "shutdown" if self._shutdown_thread or not _exiting else "interpreter shutdown"
            return RuntimeError(f"cannot schedule new futures after {when}")
        return error

    # Programs that want their workers early call these of the standard library's.

    def _start_executor_manager_thread(self) -> None:
        self._open()

    def _adjust_process_count(self) -> None:
        self._open()

    # -- the end

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls; the workers end when the accepted ones are done. May be called again.

        `wait`: return when the workers have ended. `cancel_futures`: calls that were not sent to a worker yet are
        cancelled.
        """
        with self._shutdown_lock:
            self._shutdown_thread = True
            self._cancel_pending_futures = cancel_futures
            group = self._group
        if group is not None:
            if cancel_futures:
                for call in list(self._pending_work_items.values()):
                    call.future.cancel()
                for results in list(self._maps):
                    results.cancel()
            group.close()
            if wait:
                group.join()
        self._executor_manager_thread = None
        self._call_queue = None
        self._processes = None

    def terminate_workers(self) -> None:
        """Stop the workers with SIGTERM, whatever they are doing; SIGKILL follows a second later for those that go on.

        Returns at once. What was queued is cancelled; what was running fails with BrokenProcessPool.
        """
        self._force_shutdown(operation="terminate")

    def kill_workers(self) -> None:
        """Stop the workers with SIGKILL; otherwise like terminate_workers()."""
        self._force_shutdown(operation="kill")

    def _force_shutdown(self, operation: str) -> None:
        if operation not in ("terminate", "kill"):
            raise ValueError(f"Unsupported operation: {operation!r}")
        group = self._group
        self.shutdown(wait=False, cancel_futures=True)
        if group is not None and group.ended is None:
            group.terminate(at_once=False)
            for process in list(getattr(group, "processes", ())):
                if operation == "kill":
                    process.kill()
                else:
                    process.terminate()

    def __reduce__(self) -> Any:
        raise NotImplementedError("executor objects cannot be passed between processes or pickled")


class _Processes(Mapping):  # type: ignore[type-arg]
    """The look-alike of the standard library's `_processes`: pid to process, of the workers that live now."""

    def __init__(self) -> None:
        self.living: Sequence[Any] = ()

    def __getitem__(self, pid: int) -> Any:
        for process in list(self.living):
            if process.pid == pid:
                return process
        raise KeyError(pid)

    def __iter__(self) -> Iterator[int]:
        return iter([process.pid for process in list(self.living)])

    def __len__(self) -> int:
        return len(self.living)

    def __repr__(self) -> str:
        return repr(dict(self))


class _CallQueue:
    """The look-alike of `_call_queue`: there is no such queue, and no thread to join."""

    def __init__(self) -> None:
        self.group: Any = None

    def qsize(self) -> int:
        """Calls that were accepted and not yet sent to a worker."""
        return int(self.group.queued) if self.group is not None else 0

    def close(self) -> None:
        pass

    def join_thread(self) -> None:
        pass


class _ManagerThread:
    """The look-alike of `_executor_manager_thread`: what can be waited for is the end of the group."""

    def __init__(self, group: Any) -> None:
        self._group = group

    def join(self, timeout: float | None = None) -> None:
        self._group.join(timeout)

    def is_alive(self) -> bool:
        return not self._group.join(0)


def _workers(count: Any) -> int | None:
    if count is None:
        return None
    if isinstance(count, bool) or not hasattr(count, "__index__"):
        raise TypeError(f"max_workers must be an int or None, not {type(count).__name__}")
    number = int(count)
    if number <= 0:
        raise ValueError("max_workers must be greater than 0")
    if number > 256:
        session.check_processes(number)
    return number


def _context(context: Any, max_tasks: Any) -> Any:
    import multiprocessing

    if context is None:
        # The standard library's choice: forked workers cannot be replaced safely.
        context = multiprocessing.get_context("spawn" if max_tasks is not None else None)
    elif not hasattr(context, "get_start_method") or not hasattr(context, "Process"):
        methods = ", ".join(map(repr, multiprocessing.get_all_start_methods()))
        kind = ValueError if isinstance(context, str) else TypeError
        raise kind(f"mp_context must be what multiprocessing.get_context(method) returns, method one of {methods}; "
                   f"not {context!r}")
    if max_tasks is not None:
        if isinstance(max_tasks, bool) or not isinstance(max_tasks, int):
            raise TypeError("max_tasks_per_child must be an integer")
        if max_tasks <= 0:
            raise ValueError("max_tasks_per_child must be >= 1")
        if context.get_start_method(allow_none=False) == "fork":
            raise ValueError("max_tasks_per_child is incompatible with the 'fork' multiprocessing start method;"
                             " supply a different mp_context.")
    return context


def _close_group(group: Any, pid: int) -> None:
    """The executor was collected: its calls still finish, then its workers end."""
    if os.getpid() == pid:
        group.close()


def _finish_at_exit(group: Any) -> None:
    global _hooked
    _groups.add(group)
    if _hooked != os.getpid():
        # In a process of multiprocessing's own, children are waited for before threading's hooks run.
        _hooked = os.getpid()
        util.Finalize(None, _finish_all, exitpriority=15)


def _finish_all() -> None:
    """The interpreter exits: what was accepted is finished first, as in the standard library."""
    global _exiting
    _exiting = True
    groups = list(_groups)
    for group in groups:
        group.close()
    for group in groups:
        group.join()


threading._register_atexit(_finish_all)  # type: ignore[attr-defined]
os.register_at_fork(after_in_child=_groups.clear)


def __getattr__(name: str) -> Any:
    return getattr(_stdlib, name)
