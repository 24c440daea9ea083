"""joblib's backend "dpool": every joblib.Parallel gets a backend of its own, which borrows a warm group for a call.

Translates between joblib and a worker group; joblib decides what is dispatched when. Found by joblib through its table
of backends, in which dpool.joblib enters it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import queue
import sys
import threading
import warnings
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import process
from multiprocessing.pool import RemoteTraceback  # type: ignore[attr-defined]

from joblib import parallel as _joblib
from joblib.parallel import AutoBatchingMixin, FallbackToBackend, ParallelBackendBase, SequentialBackend, cpu_count

from dpool import session
from dpool.engine import WORKER_DIED, Failure, GroupSpec
from dpool.errors import GroupBroken, GroupTerminated, WorkerDied
from dpool.joblib import warm, worker
from dpool.joblib.arrays import Arrays
from dpool.joblib.parcels import culprit, pack
from dpool.joblib.start import CleanContext
from dpool.joblib.worker import run, start_worker
from dpool.resources import parse as parse_resources

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any

# How long the calls of one batch should take together. Longer: fewer messages. Shorter: a batch that turns out longer
# than those before it delays the end of the call less.
BATCH_RUN_TIME_S = 0.02
# The next batch is at most so many times larger than the last one. More: many short tasks are up to speed sooner.
# Fewer: less is staked on how long the first few took.
BATCH_GROWTH = 16
# And has at most so many calls. More: nothing is gained, for what a batch costs is spread over enough already. Fewer:
# a worker waits less for the first batches of very short calls, which take longer to be made than to be run.
BATCH_CALLS = 1024
# joblib looks for results every 10 ms. A call that hands out its results one by one, or has a timeout, is waited for
# in here so long first, so that a short one ends sooner.
SHORT_CALL_S = 0.02

# What Parallel() and parallel_config() may pass on to this backend.
_OPTIONS = frozenset(("prefer", "require", "verbose", "context", "temp_folder", "max_nbytes", "mmap_mode",
                      "initializer", "initargs", "idle_worker_timeout", "maxtasksperchild", "resources"))


class TaskWorkerDied(WorkerDied, BrokenProcessPool):
    """The worker that ran this task ended before the task did: dpool's WorkerDied, and what joblib's own backends
    raise."""


class DpoolBackend(AutoBatchingMixin, ParallelBackendBase):  # type: ignore[misc]
    """Runs the calls of a joblib.Parallel in dpool's workers.

    One instance may be named in parallel_config() and serve many Parallel objects: it holds nothing of any call, but
    makes each Parallel that uses it a backend of its own. Options, in Parallel() or parallel_config(): those of
    joblib's own process backends, `idle_worker_timeout` in seconds, `maxtasksperchild` (in batches), and
    `resources`, what each worker takes of its machine.
    """

    supports_retrieve_callback = True
    supports_return_generator = True
    supports_timeout = True
    supports_inner_max_num_threads = True
    supports_sharedmem = False
    uses_threads = False

    def __init__(self, nesting_level: int | None = None, inner_max_num_threads: int | None = None,
                 **options: Any) -> None:
        _check_options(options)
        super().__init__(nesting_level=nesting_level, inner_max_num_threads=inner_max_num_threads, **options)
        self.parallel: Any = None
        self._workers: Lease | None = None
        self._lease: Lease | None = None
        self._seconds_per_call: float | None = None
        self._sample_size = 0  # how many calls the last batch had whose time was taken

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.nesting_level, self.inner_max_num_threads, self.backend_kwargs)

    # -- before a call

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        """How many workers a call with this `n_jobs` has: as many as asked for, below zero counted from what there is.

        In a worker, at most its share of the processors.
        """
        if n_jobs == 0:
            raise ValueError("n_jobs == 0 in Parallel has no meaning")
        if n_jobs is None:
            return 1
        if process.current_process().daemon:
            if n_jobs != 1:
                warnings.warn("dpool-backed parallel loops cannot be called in a daemonic process of "
                              "multiprocessing's, setting n_jobs=1", stacklevel=3)
            return 1
        if worker.budget == 1:
            return 1  # whatever the capacity is, which in a task on a cluster is asked of its head
        if n_jobs < 0:
            n_jobs = max(_capacity() + 1 + n_jobs, 1)
        if worker.budget is not None:
            n_jobs = min(n_jobs, worker.budget)
        return n_jobs

    def configure(self, n_jobs: int = 1, parallel: Any = None, prefer: str | None = None, require: str | None = None,
                  **options: Any) -> int:
        """Get ready for the calls of `parallel`; returns the number of workers. Starts none: the first task does."""
        n_jobs = self.effective_n_jobs(n_jobs)
        options = {**options, **self.backend_kwargs, **_given(options)}
        _check_options(options)
        if n_jobs > 1 and self.nesting_level:
            # Below threads of this process, which call at the same time: what they have together is bounded.
            n_jobs = min(n_jobs, max(_capacity() - warm.shelf.lent_workers, 1))
        if n_jobs == 1:
            raise FallbackToBackend(SequentialBackend(nesting_level=self.nesting_level))
        if self.parallel is not parallel:
            raise FallbackToBackend(self._for(parallel))
        self._give_up()
        self._n_jobs = n_jobs
        self._options = options
        self._workers = self._lease = Lease(self, n_jobs, options)
        return n_jobs

    def _for(self, parallel: Any) -> DpoolBackend:
        """A backend like this one for one Parallel."""
        mine = type(self)(self.nesting_level, self.inner_max_num_threads, **self.backend_kwargs)
        mine.parallel = parallel
        return mine

    # -- during a call

    def start_call(self) -> None:
        """A call begins."""
        if self._lease is not None:
            self._lease.arrays.clear()
            self._lease.arrays.batch = self._lease.arrays.made = 0

    def submit(self, func: Callable[[], Any], callback: Callable[[Any], object] | None = None) -> Task:
        """Run a batch of calls in a worker; `callback` gets the returned object when it has ended.

        Does not block and raises nothing that is the batch's fault: that is for retrieve_result_callback().
        """
        if self._lease is None:
            raise RuntimeError("submit() before configure()")
        return self._lease.submit(func, callback)

    def apply_async(self, func: Callable[[], Any], callback: Callable[[Any], object] | None = None) -> Task:
        """The name of submit() before joblib 1.5."""
        return self.submit(func, callback)

    def retrieve_result_callback(self, out: Task) -> Any:
        """The results of a batch that has ended. Raises what it raised."""
        size = getattr(out.callback, "batch_size", None)
        results = out.result()
        if size:
            sample = out.run_time_s / size
            before = self._seconds_per_call
            # A larger batch says more: what each batch costs, however small, is spread over more calls.
            blended = before is not None and size <= self._sample_size
            self._seconds_per_call = (before + sample) / 2 if blended else sample
            self._sample_size = size
        return results

    @contextlib.contextmanager
    def retrieval_context(self) -> Iterator[None]:
        """Around joblib's collecting of the results: waits for their coming first, which joblib does by looking."""
        lease, parallel = self._lease, self.parallel
        if lease is not None:
            if parallel.return_as == "list" and parallel.timeout is None:
                lease.idle.wait()
            else:
                lease.idle.wait(SHORT_CALL_S)
        yield

    def get_nested_backend(self) -> tuple[ParallelBackendBase, int | None]:
        """What tasks find as their backend: threads, below them nothing, as with joblib's own."""
        if self._lease is not None:
            # joblib asks for each batch as it makes it, having just taken its tasks from the program's iterator.
            self._lease.arrays.made += 1
        return super().get_nested_backend()  # type: ignore[no-any-return]

    def compute_batch_size(self) -> int:
        """How many calls the next batch takes, with batch_size="auto": for BATCH_RUN_TIME_S, BATCH_CALLS at most."""
        seconds = self._seconds_per_call
        if seconds is not None:
            size: int = self._effective_batch_size  # type: ignore[has-type]
            ideal = int(BATCH_RUN_TIME_S / max(seconds, 1e-9))
            self._effective_batch_size = max(min(ideal, size * BATCH_GROWTH, BATCH_CALLS), 1)
            if self._effective_batch_size != size and self.parallel.verbose >= 10:
                self.parallel._print(f"Batch computation took {seconds:.2g}s a task. "
                                     f"Setting batch_size={self._effective_batch_size}.")
        return self._effective_batch_size

    def batch_completed(self, batch_size: int, duration: float) -> None:
        """What joblib measures includes the waiting for a worker; what the worker has measured is used instead."""

    # -- after a call

    def stop_call(self) -> None:
        """The call has ended: what it has stored is not needed any more."""
        if self._lease is not None:
            self._lease.arrays.clear()
        self.reset_batch_stats()

    def reset_batch_stats(self) -> None:
        """Forget how long tasks take: the next call's are others."""
        self._seconds_per_call = None
        super().reset_batch_stats()

    def terminate(self) -> None:
        """The Parallel needs no workers any more; they stay warm for whoever does next."""
        self._give_up()
        self.reset_batch_stats()

    def abort_everything(self, ensure_ready: bool = True) -> None:
        """Stop what runs of this Parallel's call. Does not block: the workers are dead within about a second."""
        if self._lease is not None:
            self._lease.abort()
        self._workers = None
        if ensure_ready and self._lease is not None:
            self._workers = self._lease = Lease(self, self._n_jobs, self._options)

    def _give_up(self) -> None:
        if self._lease is not None:
            self._lease.end()
        self._workers = None

    def _spec(self, n_jobs: int, options: dict[str, Any]) -> tuple[tuple[Any, ...], GroupSpec]:
        """The group that a call needs, and a key that is equal for groups that will do as well."""
        environment = self._prepare_worker_env(n_jobs)
        threads = int(environment["OMP_NUM_THREADS"]) if environment["OMP_NUM_THREADS"].isdigit() else 1
        share = max(cpu_count() // n_jobs, 1)
        # What joblib, in whatever the tasks start, takes for the number of processors.
        environment["LOKY_MAX_CPU_COUNT"] = str(share)
        context = self.backend_kwargs.get("context") or _joblib.DEFAULT_MP_CONTEXT or _context
        initializer, first, digest = options.get("initializer"), None, b""
        if initializer is not None:
            if not callable(initializer):
                raise TypeError("initializer must be a callable")
            first = pack((initializer, tuple(options.get("initargs") or ())))
            hashed = hashlib.blake2b(first.data)
            for buffer in first.buffers:
                hashed.update(buffer)
            for ref in first.refs:
                hashed.update(ref.key)
            digest = hashed.digest()
        max_tasks = options.get("maxtasksperchild")
        needs = parse_resources(options.get("resources"))
        # Workers look for modules where the program does, and work where it does: they must not be older than that.
        # They are another engine's after dpool.init().
        key = (session.current(), n_jobs, type(context), context.get_start_method(), tuple(environment.items()), digest,
               max_tasks, tuple(sys.path), os.getcwd(), tuple(needs.items()))
        return key, GroupSpec(n_jobs, context, start_worker, (environment, share, threads, first), max_tasks,
                              on_demand=True, worker_name="JoblibWorker", resources=needs)


_context = CleanContext()


def _rebuild(kind: Any, nesting_level: int | None, threads: int | None, options: dict[str, Any]) -> Any:
    return kind(nesting_level, threads, **options)


def _check_options(options: dict[str, Any]) -> None:
    unknown = sorted(set(options) - _OPTIONS)
    if unknown:
        raise TypeError(f"the joblib backend 'dpool' has no option {', '.join(map(repr, unknown))}; it has "
                        f"{', '.join(sorted(_OPTIONS))}")


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """Those of Parallel's options that a parallel_config() around it does not override."""
    return {name: value for name, value in options.items() if name != "context"}


def _capacity() -> int:
    """How many workers can run at once: what the cluster says, on one machine the processors of this process."""
    count: int = session.default_processes() if session.is_elsewhere() else cpu_count()
    return count


class Task:
    """A batch of joblib's on its way: the future that joblib holds, and the sink that the group reports to."""

    __slots__ = ("lease", "callback", "job", "held", "outcome", "failure", "run_time_s")

    def __init__(self, lease: Lease, callback: Callable[[Any], object] | None) -> None:
        self.lease = lease
        self.callback = callback
        self.job: Any = None
        self.held: Sequence[Any] = ()  # the stored arrays that it needs
        self.outcome: Any = None
        self.failure: BaseException | None = None
        self.run_time_s = 0.0

    def result(self) -> Any:
        """The list of results. Raises what the batch raised. Can be called once."""
        if self.failure is not None:
            raise self.failure
        self.run_time_s, parcel, traceback = self.outcome
        self.outcome = None
        value = parcel.unpack()
        if traceback is None:
            return value
        value.__cause__ = RemoteTraceback(f'\n"""\n{traceback}"""')
        raise value

    # -- the Sink

    def start(self) -> bool:
        return True

    def set(self, first: int, values: Sequence[Any]) -> None:
        self.outcome = values[0]
        self.lease.settled(self)

    def fail(self, index: int, failure: Failure) -> None:
        error = failure.exception
        if failure.kind == WORKER_DIED and isinstance(error, WorkerDied):
            error = TaskWorkerDied(str(error), error.pid, error.exitcode, error.host, error.task, error.attempts)
        if failure.traceback:
            error.__cause__ = RemoteTraceback(f'\n"""\n{failure.traceback}"""')
        self.failure = error
        self.lease.settled(self)

    def abandon(self, failure: Failure) -> None:
        """The group has ended without an outcome of this."""
        self.failure = failure.exception
        self.lease.settled(self)


class Lease:
    """The use of one group by one Parallel, from configure() to terminate() or to an abort.

    Calls joblib back in a thread of its own: joblib takes the next tasks from the program's iterator in there, which
    may well wait for the results of another call.
    """

    def __init__(self, backend: DpoolBackend, n_jobs: int, options: dict[str, Any]) -> None:
        self._backend = backend
        self._n_jobs = n_jobs
        self._options = options
        folder = options.get("temp_folder") or os.environ.get("JOBLIB_TEMP_FOLDER")
        self.arrays = Arrays(not session.is_elsewhere(), options.get("max_nbytes"), options.get("mmap_mode"), folder)
        # Set while no batch is on its way and none has its callback still running; and for good once the call is over.
        self.idle = threading.Event()
        self.idle.set()
        # Guards what follows. Held for bookkeeping only.
        self._lock = threading.Lock()
        self._warm: warm.Warm | None = None
        self._running: set[Task] = set()  # submitted to the group, without an outcome
        self._unfinished = 0  # submitted, and the callback has not returned
        self._over = False
        self._callbacks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, batch: Callable[[], Any], callback: Callable[[Any], object] | None) -> Task:
        """Pack a batch and queue it in the group. joblib holds a lock of its own around this."""
        task = Task(self, callback)
        with self._lock:
            if self._over:
                return task  # joblib has not noticed yet; nobody waits for it
            self._running.add(task)
            self._unfinished += 1
            self.idle.clear()
            if self._thread is None:
                self._thread = threading.Thread(target=self._call_back, name="dpool-joblib-callbacks", daemon=True)
                self._thread.start()
        try:
            parcel = self._pack(task, batch)
            task.job = self._submit(parcel, task)
        except Exception as error:
            task.failure = error
            self.settled(task)
            return task
        if self._over and self._warm is not None:
            self._warm.group.cancel(task.job)
        return task

    def _pack(self, task: Task, batch: Callable[[], Any]) -> Any:
        arrays = self.arrays
        arrays.batch += 1
        arrays.used = []
        try:
            return pack(batch, arrays.reduce)
        except RecursionError:
            raise
        except Exception as error:
            raise pickle.PicklingError(f"Could not pickle the task to send to the workers: {type(error).__name__}: "
                                       f"{error} ({_culprit(batch)})") from error
        finally:
            task.held = arrays.used

    def _submit(self, parcel: Any, task: Task) -> Any:
        for attempt in (0, 1):
            lent = self._warm
            if lent is None:
                key, spec = self._backend._spec(self._n_jobs, self._options)
                timeout = self._options.get("idle_worker_timeout")
                lent = warm.shelf.take(key, spec, warm.IDLE_TIMEOUT_S if timeout is None else timeout)
                with self._lock:
                    if self._over:
                        warm.shelf.give_back(lent)
                        return None
                    self._warm = lent
            try:
                return lent.group.submit(run, (parcel,), {}, task)
            except (GroupBroken, GroupTerminated):
                # It broke while it stood idle; what broke under this call's own tasks is the call's to know.
                if attempt or len(self._running) > 1:
                    raise
                warm.shelf.drop(lent)
                self._warm = None
        raise AssertionError("unreachable")

    def settled(self, task: Task) -> None:
        """A task has its outcome. Called by the group's I/O thread, which must not wait for joblib."""
        with self._lock:
            if task not in self._running:
                return
            self._running.remove(task)
            task.held = ()
            drained = self._over and not self._running
        if drained and self._warm is not None:
            warm.shelf.give_back(self._warm)
        self._callbacks.put(task)

    def _call_back(self) -> None:
        """The thread that tells joblib of outcomes, one at a time, until the call is over."""
        parallel = self._backend.parallel
        while True:
            task = self._callbacks.get()
            if task is None:
                return
            if self._over:
                continue
            try:
                if task.callback is not None:
                    task.callback(task)
            except BaseException as error:
                _report(parallel, error)
            task = None
            with self._lock:
                self._unfinished -= 1
                if not self._unfinished:
                    self.idle.set()
            if parallel._aborting:
                self.idle.set()

    def end(self) -> None:
        """No more tasks will come; if any are still on their way, they are stopped."""
        with self._lock:
            if self._over:
                return
            self._over = True
            running = list(self._running)
        self._callbacks.put(None)
        lent = self._warm
        if lent is not None:
            for task in running:
                if task.job is not None and lent.group.cancel(task.job):
                    with self._lock:
                        self._running.discard(task)
            with self._lock:
                drained = not self._running
            if drained:
                warm.shelf.give_back(lent)
            else:
                warm.shelf.drain(lent)
                with self._lock:
                    drained = not self._running
                if drained:  # the last one ended just before
                    warm.shelf.give_back(lent)
        self.idle.set()
        self.arrays.clear()

    abort = end


def _culprit(batch: Any) -> str:
    """Where in a batch what cannot be pickled is: in the first call that has such a thing."""
    for number, call in enumerate(getattr(batch, "items", ())):
        function, args, kwargs = call
        parts = {getattr(function, "__name__", "the function"): function,
                 **{f"args[{index}]": value for index, value in enumerate(args)}, **kwargs}
        for name, part in parts.items():
            try:
                pack(part)
            except Exception:
                return f"in call {number} of the batch, {culprit(part, name)}"
    return culprit(batch, "the batch")


def _report(parallel: Any, error: BaseException) -> None:
    """joblib's own callback has raised, or the program's iterator has, with what joblib does not expect of one: the
    call fails with it, where it would wait for ever."""
    tracker = _joblib.BatchCompletionCallBack(0, 0, parallel)
    parallel._register_new_job(tracker)
    tracker._register_outcome({"status": _joblib.TASK_ERROR, "result": error})
