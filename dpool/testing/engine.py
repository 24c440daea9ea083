"""The in-process engine: the protocols of dpool.engine over the real Dispatch and Supervisor, without a process.

Each group has one thread, which plays all its workers in turn: the same calls in the same order run the same tasks in
the same order. Functions, arguments and results are really pickled. A worker "dies" when a task raises Die. What it
cannot do: run two tasks at once, or end a task that runs; terminate() and stop() wait for it to return.
"""

from __future__ import annotations

import itertools
import os
import pickle
import threading
from collections.abc import Callable, Iterable, Sequence
from itertools import starmap
from typing import Any

from dpool import engine
from dpool.cluster.driver.dispatch import Batch, Dispatch, Job, Timing
from dpool.cluster.node.supervisor import MAX_FAILED_STARTS, Supervisor
from dpool.cluster.wire import pickling
from dpool.cluster.wire.functions import dumps_by_value
from dpool.cluster.worker.main import describe_exception, describe_unpicklable
from dpool.engine import Failure, GroupSpec, Sink
from dpool.errors import (
    DpoolError,
    ForeignProcess,
    GroupBroken,
    GroupClosed,
    GroupTerminated,
    RemoteError,
    WorkerDied,
)

# What every task is said to have taken. It makes batches, so that what happens inside of batches is tested too.
TASK_NS = 100_000

_pids = itertools.count(1 << 22)  # above any pid of Linux


class Die(BaseException):
    """Raised by a task or an initializer: its worker ends with this exit code, as if by os._exit or a signal."""

    def __init__(self, exitcode: int = -9) -> None:
        super().__init__(exitcode)
        self.exitcode = exitcode


class Worker:
    """The look-alike of a worker's process object."""

    def __init__(self, slot: int, name: str, left: int) -> None:
        self.slot = slot
        self.pid = next(_pids)
        self.name = name
        self.exitcode: int | None = None
        self.ready = False
        self.left = left  # tasks before it is replaced

    def is_alive(self) -> bool:
        return self.exitcode is None


class InProcessEngine:
    """Opens groups that run their tasks in a thread of this process; implements dpool.engine.Engine."""

    def open_group(self, spec: GroupSpec) -> InProcessGroup:
        """Raises what pickling the initializer and its arguments raises, unless the context forks."""
        return InProcessGroup(spec)

    def close(self) -> None:
        """Groups belong to who opened them."""


class _Function:
    """A function as it travels."""

    def __init__(self, target: Callable[..., Any]) -> None:
        try:
            self.data = pickling.dumps(target)
        except Exception:
            try:
                self.data = dumps_by_value(target, None)
            except (TypeError, pickle.PicklingError, AttributeError) as error:
                name = getattr(target, "__name__", type(target).__name__)
                error.args = (f"{error} ({pickling.culprit(target, name)})",)
                raise


_CALLS: dict[int, Callable[[Callable[..., Any], Any], Any]] = {
    engine.CALL: lambda function, item: function(*item[0], **item[1]),
    engine.MAP: lambda function, item: function(item),
    engine.STAR: lambda function, item: function(*item),
    engine.MAP_CHUNK: lambda function, item: list(map(function, item)),
    engine.STAR_CHUNK: lambda function, item: list(starmap(function, item)),
}


class InProcessGroup:
    """Implements dpool.engine.WorkerGroup. Sinks are called by the group's thread, under no lock."""

    def __init__(self, spec: GroupSpec) -> None:
        self.spec = spec
        self.processes: list[Worker] = []  # the living workers
        self.history: list[tuple[int, Job, int]] = []  # (pid, job, task) of each run of a task, in order
        self._supervisor = Supervisor(spec.processes, spec.on_demand)
        self._dispatch = Dispatch(0, spec.retries, spec.max_tasks)
        self._functions: dict[Any, _Function] = {}
        self._timings: dict[Any, Timing] = {}
        # Guards _dispatch, _supervisor, processes and the flags; told of every change of them. Never held while code of
        # the user's runs.
        self._changed = threading.Condition()
        self._closing = False
        self._ended: DpoolError | None = None
        self._turn = 0
        self._tasks_begun = 0
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._loop, name="dpool-in-process", daemon=True)
        self._thread.start()

    # -- what the doors call

    def submit(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], sink: Sink,
               asks_start: bool = False, attended: bool = False) -> Job:
        """See dpool.engine.WorkerGroup, here and below."""
        known, timing = self._known(function)
        return self._add(Job(known, timing, engine.CALL, ((args, kwargs),), sink, 1, asks_start))

    def submit_many(self, function: Callable[..., Any], items: Sequence[Any], mode: int, sink: Sink,
                    chunk: int = 1) -> Job:
        known, timing = self._known(function)
        return self._add(Job(known, timing if chunk == 1 else Timing(), mode, items, sink, chunk))

    def open_stream(self, function: Callable[..., Any], mode: int, sink: Sink, as_pushed: bool = False) -> Stream:
        known, timing = self._known(function)
        if mode not in (engine.MAP, engine.STAR):
            timing = Timing()
        return Stream(self, self._add(Job(known, timing, mode, [], sink, open=True)), as_pushed)

    def attend(self, job: Job, timeout: float | None = None) -> None:
        """Leaves it to the group's thread."""

    def cancel(self, job: Job) -> int:
        with self._changed:
            dropped = self._dispatch.cancel(job)
            self._changed.notify_all()
        return dropped

    def stop(self, job: Job) -> int:
        with self._changed:
            dropped = self._dispatch.stop(job)
            self._changed.notify_all()
        return dropped

    def close(self) -> None:
        with self._changed:  # re-entrant: the garbage collector may call this in a thread that holds it
            self._closing = True
            self._changed.notify_all()

    def terminate(self, at_once: bool = True) -> None:
        if self._pid == os.getpid():
            self._end(GroupTerminated("the pool was terminated before this task had a result"))

    def join(self, timeout: float | None = None) -> bool:
        if self._thread is threading.current_thread() or self._pid != os.getpid():
            return False
        self._thread.join(timeout)
        return not self._thread.is_alive()

    @property
    def ended(self) -> DpoolError | None:
        return self._ended

    @property
    def queued(self) -> int:
        return self._dispatch.queued

    def maintain(self) -> None:
        """The thread starts what is missing before every batch."""

    def _known(self, function: Callable[..., Any]) -> tuple[_Function, Timing]:
        # Anew each time, so that what a closure holds is sent as it is now; equal functions are one to Dispatch.
        made = _Function(function)
        known = self._functions.setdefault(made.data, made)
        return known, self._timings.setdefault(made.data, Timing())

    def _add(self, job: Job) -> Job:
        if self._pid != os.getpid():
            raise ForeignProcess(f"this pool was created in process {self._pid} and serves only that process; "
                                 f"this is process {os.getpid()}: create a pool of its own here")
        with self._changed:
            if self._ended is not None:
                raise type(self._ended)(*self._ended.args) from self._ended.__cause__
            if self._closing:
                raise GroupClosed("this pool is closed: it takes no more tasks")
            self._dispatch.add(job)
            self._changed.notify_all()
        return job

    # -- the thread

    def _loop(self) -> None:
        while True:
            self._start_workers()
            with self._changed:
                if self._ended is not None or (self._closing and self._dispatch.idle):
                    for worker in self.processes:
                        worker.exitcode = 0 if self._ended is None else -15
                        self._supervisor.ended(worker.slot, worker.ready)
                    self.processes.clear()
                    return
                batch = self._dispatch.next_batch(self._tasks_begun * TASK_NS / 1e9)
                if batch is None:
                    self._changed.wait()
                    continue
                worker = self.processes[self._turn % len(self.processes)]
                self._turn += 1
            self._send(batch, worker)

    def _start_workers(self) -> None:
        while True:
            with self._changed:
                if self._ended is not None:
                    return
                if self._supervisor.most > self._supervisor.wanted:
                    self._supervisor.demand(self._dispatch.queued, len(self._dispatch.inflight))
                slots = self._supervisor.to_start()
                if not slots:
                    self._dispatch.workers = len(self.processes)
                    return
                started = [Worker(slot, self.spec.worker_name, self.spec.max_tasks or 1 << 62) for slot in slots]
                self.processes.extend(started)
            for worker in started:
                self._initialize(worker)

    def _initialize(self, worker: Worker) -> None:
        spec = self.spec
        try:
            if spec.initializer is not None:
                spec.initializer(*spec.initargs)
            worker.ready = True
        except Die as death:
            self._bury(worker, death.exitcode)
            if self._supervisor.failed_starts >= MAX_FAILED_STARTS:
                self._end(GroupBroken(f"{MAX_FAILED_STARTS} workers in a row ended before they were ready; the last "
                                      f"one {_how(death.exitcode)}"))
        except BaseException as error:
            failure = _rebuild(describe_exception(error))
            broken = GroupBroken(f"the initializer of the workers failed: {type(failure.exception).__name__}: "
                                 f"{failure.exception}")
            broken.__cause__ = failure.exception
            self._end(broken)

    def _bury(self, worker: Worker, exitcode: int) -> None:
        with self._changed:
            worker.exitcode = exitcode
            self.processes.remove(worker)
            self._supervisor.ended(worker.slot, worker.ready)
            self._dispatch.workers = len(self.processes)

    def _send(self, batch: Batch, worker: Worker) -> None:
        dispatch = self._dispatch
        if batch.jobs is not None and batch.job.asks_start:
            refused = [index for index, job in enumerate(batch.jobs) if not job.sink.start()]
            if refused:
                with self._changed:
                    dispatch.drop(batch, refused)
        pickles: list[bytes] = []
        errors: list[tuple[int, BaseException]] = []
        for index, item in enumerate(batch.items()):
            try:
                pickles.append(pickling.dumps(item, by_value=True))
            except BaseException as error:
                if type(error) in (TypeError, pickle.PicklingError, AttributeError):
                    error.args = (f"{error} ({pickling.culprit(item, 'item')})",)
                errors.append((index, error))
        if errors:
            with self._changed:
                dropped = dispatch.drop(batch, [index for index, _ in errors])
                if batch.number in dispatch.inflight:
                    dispatch.unsend(batch)
            for (job, task), (_, why) in zip(dropped, errors, strict=True):
                job.sink.fail(task, Failure(engine.ARGUMENT_LOST, why))
        elif batch.stop:
            self._run(batch, worker, pickles)

    def _run(self, batch: Batch, worker: Worker, pickles: list[bytes]) -> None:
        """What a worker does with a batch, and what its driver does with the outcomes."""
        dispatch = self._dispatch
        executed = 0
        for index, data in enumerate(pickles):
            if not worker.left or self._ended is not None:
                break
            job, task = batch.task(index)
            worker.left -= 1
            executed += 1
            self._tasks_begun += 1
            self.history.append((worker.pid, job, task))
            try:
                value, failure = self._one(batch, data)
                exitcode = None
            except Die as death:
                exitcode = death.exitcode
            if job.stopped and exitcode is None:
                exitcode = -9  # as if it had been killed while it ran
            if exitcode is not None:
                return self._died(batch, index, worker, exitcode)
            with self._changed:
                wanted = dispatch.report(batch.number, index, 1) is not None
            if not wanted:
                return  # terminated meanwhile
            if failure is None:
                job.sink.set(task, (value,))
            else:
                job.sink.fail(task, failure)
        with self._changed:
            dispatch.done(batch.number, executed * TASK_NS, executed)
        if not worker.left:
            self._bury(worker, 0)

    def _one(self, batch: Batch, data: bytes) -> tuple[Any, Failure | None]:
        """The outcome of one task. Raises Die."""
        function: Any = batch.function
        try:
            call, item = pickle.loads(function.data), pickle.loads(data)
        except Die:
            raise
        except BaseException as error:
            return None, _rebuild(describe_exception(error, engine.ARGUMENT_BROKEN))
        try:
            result = _CALLS[batch.mode](call, item)
        except Die:
            raise
        except BaseException as error:
            return None, _rebuild(describe_exception(error))
        try:
            data = pickling.dumps(result)
        except Die:
            raise
        except BaseException as error:
            return None, _rebuild(describe_unpicklable(result, error))
        try:
            return pickle.loads(data), None
        except BaseException as error:
            return None, Failure(engine.RESULT_BROKEN, error)

    def _died(self, batch: Batch, index: int, worker: Worker, exitcode: int) -> None:
        with self._changed:
            guilty = self._dispatch.died(batch.number, index)
            attempts = (guilty[0].attempts or {}).get(guilty[1], 1) if guilty is not None else 1
        self._bury(worker, exitcode)
        text = f"the worker process {worker.pid} on {os.uname().nodename} {_how(exitcode)}"
        if guilty is None:
            failure = None
        else:
            text += f" while it was running task {guilty[1]}" + (f", at attempt {attempts}" if attempts > 1 else "")
            died = WorkerDied(text, worker.pid, exitcode, os.uname().nodename, guilty[1], attempts)
            failure = Failure(engine.WORKER_DIED, died)
            guilty[0].sink.fail(guilty[1], failure)
        if self.spec.break_on_death and not (guilty is not None and guilty[0].stopped):
            broken = GroupBroken(text)
            if failure is not None:
                broken.__cause__ = failure.exception
            self._end(broken)

    def _end(self, why: DpoolError) -> None:
        with self._changed:
            if self._ended is not None:
                return
            self._ended = why
            left = self._dispatch.abandon()
            self._changed.notify_all()
        failure = Failure(engine.ABANDONED, why)
        for job, tasks in left:
            abandon = getattr(job.sink, "abandon", None)
            if abandon is not None:
                abandon(failure)
            else:
                for task in tasks:
                    job.sink.fail(task, failure)


class Stream:
    """A job that grows."""

    def __init__(self, group: InProcessGroup, job: Job, as_pushed: bool) -> None:
        self._group = group
        self.job = job
        self._as_pushed = as_pushed

    def push(self, item: Any) -> int:
        """Append one task; returns 0, the bytes of a store that it takes."""
        self.extend((item,))
        return 0

    def extend(self, items: Iterable[Any]) -> None:
        """Append one task for each item."""
        items = list(items)
        if self._as_pushed:
            items = [_copy(item) for item in items]
        with self._group._changed:
            if self._group._ended is None:
                self._group._dispatch.extend(self.job, items)
                self._group._changed.notify_all()

    def seal(self) -> None:
        """No more items will come."""
        with self._group._changed:
            self._group._dispatch.seal(self.job)
            self._group._changed.notify_all()

    @property
    def backlog(self) -> int:
        """Tasks that were pushed and have no outcome yet."""
        return self.job.unsettled


def _copy(item: Any) -> Any:
    try:
        return pickle.loads(pickling.dumps(item, by_value=True))
    except Exception:
        return item  # it fails again, and is reported, when it is sent


def _rebuild(entry: tuple[Any, ...]) -> Failure:
    """A failure as a driver makes it of a worker's description."""
    kind, data, name, text, traceback, value_repr = entry
    if data is not None:
        try:
            error = pickle.loads(data)
            if isinstance(error, BaseException):
                return Failure(kind, error, traceback, value_repr)
        except BaseException:
            pass
    return Failure(kind, RemoteError(text or name, name), traceback, value_repr)


def _how(exitcode: int) -> str:
    return f"exited with code {exitcode}" if exitcode >= 0 else f"was killed by signal {-exitcode}"
