"""The seam between doors and engines: what a door may ask of an engine, and what an engine owes a door.

Everything above (Pool, executors, joblib) speaks to a WorkerGroup; everything below (the embedded engine, a cluster,
the in-process fake of dpool.testing) is one. Holds no state and does no I/O.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from multiprocessing.context import BaseContext
    from typing import Any, Protocol
else:
    Protocol = object  # importing typing costs more than the rest of this file

# How a task's item becomes a call.
CALL = 0  # f(*item[0], **item[1])
MAP = 1  # f(item)
STAR = 2  # f(*item)
MAP_CHUNK = 3  # [f(x) for x in item]
STAR_CHUNK = 4  # [f(*x) for x in item]

# What went wrong with a task: Failure.kind.
RAISED = "raised"  # the function raised `exception`
RESULT_LOST = "result"  # the result, or the exception, cannot be pickled in the worker
RESULT_BROKEN = "rebuild"  # the result could not be rebuilt here; `exception` says why
ARGUMENT_LOST = "argument"  # the argument could not be pickled here
ARGUMENT_BROKEN = "unpickle"  # the function or argument could not be rebuilt in the worker
WORKER_DIED = "died"  # `exception` is a WorkerDied
ABANDONED = "abandoned"  # the group was terminated or is broken; `exception` says which


class Failure:
    """Why a task has no value. Doors turn it into the exception that their stdlib counterpart would raise.

    `exception` is what to raise; `traceback` the text of the remote traceback, "" if there is none; `value_repr` the
    repr of a result that could not be pickled.
    """

    __slots__ = ("kind", "exception", "traceback", "value_repr")

    def __init__(self, kind: str, exception: BaseException, traceback: str = "", value_repr: str = "") -> None:
        self.kind = kind
        self.exception = exception
        self.traceback = traceback
        self.value_repr = value_repr

    def __repr__(self) -> str:
        return f"Failure({self.kind!r}, {self.exception!r})"


class Sink(Protocol):
    """Where the outcomes of a job go. Called by the group's I/O thread, never under a lock of the group's."""

    def start(self) -> bool:
        """The task is about to be sent; False drops it. Asked only for jobs made with `asks_start`."""
        ...

    def set(self, first: int, values: Sequence[Any]) -> None:
        """Tasks first, first+1, ... of the job have these values. Each task is reported once, in any order."""
        ...

    def fail(self, index: int, failure: Failure) -> None:
        """Task `index` of the job has no value."""
        ...


class AttendedSink(Sink, Protocol):
    """One whose job may be waited for with attend()."""

    def set_alone(self, value: Any) -> bool:
        """set(0, [value]), called by the thread that waits for it, under a lock of the group's. False, and nothing has
        happened, if anybody else waits for it or is to be called. May be interrupted at any step and called again."""
        ...


class GroupSpec:
    """What a door asks for: how many workers, how they are started, what they run first.

    `processes`: how many workers at most. `context`: the multiprocessing context that starts them.
    `max_tasks`: a worker is replaced after so many tasks. `retries`: how often a task is run again whose worker died.
    `on_demand`: workers are started when there is work for them, not all at once.
    `worker_name`: what the stdlib's "Process" in a worker's name becomes. `daemon`: the stdlib's flag, seen by the
    driver alone; inside, every worker may have children. `start_process`: makes the process object, if not the
    context's `Process`. `on_broken`: called once, by the I/O thread, when the group has broken.
    `all_cpus`: the door was not told how many workers, so a cluster may give it as many as it has CPUs.
    `break_on_death`: one dead worker breaks the group, as ProcessPoolExecutor promises.
    `resources`: what each worker takes of its machine, as dpool.resources.parse() returns it.
    """

    __slots__ = ("processes", "context", "initializer", "initargs", "max_tasks", "retries", "on_demand", "worker_name",
                 "daemon", "start_process", "break_on_death", "all_cpus", "resources")

    def __init__(self, processes: int, context: BaseContext, initializer: Callable[..., object] | None = None,
                 initargs: Iterable[Any] = (), max_tasks: int | None = None, retries: int = 0,
                 on_demand: bool = False, worker_name: str = "PoolWorker", daemon: bool = True,
                 start_process: Callable[..., Any] | None = None, break_on_death: bool = False,
                 all_cpus: bool = False, resources: dict[str, float] | None = None) -> None:
        self.processes = processes
        self.context = context
        self.initializer = initializer
        self.initargs = tuple(initargs)
        self.max_tasks = max_tasks
        self.retries = retries
        self.on_demand = on_demand
        self.worker_name = worker_name
        self.daemon = daemon
        self.start_process = start_process
        self.break_on_death = break_on_death
        self.all_cpus = all_cpus
        self.resources = resources or {}


class WorkerGroup(Protocol):
    """The workers of one Pool or Executor: one initializer, one policy, one queue. Its methods may be called from any
    thread of the process that opened it."""

    def submit(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], sink: Sink,
               asks_start: bool = False, attended: bool = False) -> Any:
        """Queue one call; its outcome goes to `sink` as task 0. Returns the job, a token for cancel(). `attended` says
        that attend() follows at once.

        Raises GroupBroken if the group is broken, GroupClosed after close(), ForeignProcess after a fork, and what
        pickling the function raises.
        """
        ...

    def submit_many(self, function: Callable[..., Any], items: Sequence[Any], mode: int, sink: Sink,
                    chunk: int = 1) -> Any:
        """Queue one task for each `chunk` consecutive items, in one step."""
        ...

    def open_stream(self, function: Callable[..., Any], mode: int, sink: Sink, as_pushed: bool = False) -> Any:
        """A job that grows: see Stream. With `as_pushed` a task gets each item as it was when it was pushed."""
        ...

    def attend(self, job: Any, timeout: float | None = None) -> None:
        """The caller is about to wait for the outcome of `job`, for up to `timeout` seconds: see to it in this thread
        if that is quicker. May return before it is there. The job is one of submit(), with an AttendedSink."""
        ...

    def cancel(self, job: Any) -> int:
        """Drop what is queued of `job` and was not yet sent; returns how many tasks that was."""
        ...

    def stop(self, job: Any) -> int:
        """cancel(), and end the workers that run tasks of `job` now or come to run one; they are replaced. What ran
        fails with WORKER_DIED, what was sent and not begun is not reported."""
        ...

    def close(self) -> None:
        """Take no more tasks; the accepted ones still finish, then the workers end. Does not block."""
        ...

    def terminate(self, at_once: bool = True) -> None:
        """End the workers now; what has no result yet is reported as ABANDONED. Does not block.

        Not `at_once`: they are sent no SIGTERM, for the caller has signals of its own for them; SIGKILL comes all the
        same, to those that go on.
        """
        ...

    def join(self, timeout: float | None = None) -> bool:
        """Wait until every worker has ended; False if `timeout` seconds pass first. Call close or terminate before."""
        ...


class Engine(Protocol):
    """Opens worker groups."""

    def open_group(self, spec: GroupSpec) -> WorkerGroup: ...

    def close(self) -> None: ...
