"""A group of workers as its driver sees it: takes tasks in, sends batches, hands outcomes to the sinks.

Owns the group's one I/O thread and the lock of its Dispatch; decides nothing itself. The submitting thread sends when a
worker has room; the I/O thread receives, and sends what waited. Made by an engine, used by the doors.
"""

from __future__ import annotations

import itertools
import os
import socket
import threading
import time

from dpool import engine, waiting
from dpool.cluster.driver.attending import Attending
from dpool.cluster.driver.dispatch import LEAVING, LEFT, NODE_LOSSES, TAKEN, Batch, Dispatch, Job
from dpool.cluster.driver.functions import table
from dpool.cluster.driver.incoming import Incoming, tell
from dpool.cluster.driver.outgoing import Refused, TooManyRefs, encode, explain
from dpool.cluster.store import store
from dpool.cluster.suspects import Suspects
from dpool.cluster.wire import events, frames
from dpool.engine import Failure
from dpool.errors import (
    DpoolError,
    ForeignProcess,
    GroupBroken,
    GroupClosed,
    GroupTerminated,
    NodeLost,
    ObjectStoreFull,
    RemoteError,
    WorkerDied,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from dpool.cluster.driver.port import Port
    from dpool.cluster.driver.stream import Stream
    from dpool.engine import GroupSpec, Sink

# A task that is to be stopped may stand in a worker's socket, and no worker says when it begins it: this often that is
# looked at. Longer: it runs longer. Shorter: the driver wakes more often meanwhile.
STOP_RECHECK_S = 0.01

_names = itertools.count(1)


class Group:
    """The driver's side of a worker group; implements dpool.engine.WorkerGroup.

    Any thread of the process that made it may call its methods. Sinks are called by the I/O thread, holding no lock.
    """

    def __init__(self, spec: GroupSpec, port: Port, supervisor: Any, now: Callable[[], float] | None = None) -> None:
        """With a clock of its own it has no thread: whoever gives it `now` calls step()."""
        self._now = now or time.monotonic
        self.spec = spec
        self.port = port
        self._supervisor = supervisor
        # Guards _dispatch and the flags below. Held for bookkeeping only: never while something is pickled, sent, or
        # reported to a sink, for those run code of the user's, which may submit again.
        self._lock = threading.Lock()
        self._dispatch = Dispatch(port.count, spec.retries, spec.max_tasks, port.splits)
        self._closing = False
        self._tasks_closed = False
        self._ended: DpoolError | None = None  # why nothing more can run: GroupBroken or GroupTerminated
        self._doom: GroupBroken | None = None  # why it will end as soon as a worker has: its initializer failed
        self._suspects = Suspects()
        self._timer_armed = False
        self._stopped: set[int] = set()  # slots whose workers were ended to stop a task, until they are dead
        self._lent: set[int] = set()  # batches that were sent a segment of the store's
        self._attending = (Attending(self._lock, self._dispatch, port, self._lent)  # type: ignore[arg-type]
                           if port.shares_memory else None)
        self._pid = os.getpid()
        self._elsewhere = not port.shares_memory  # workers have not this process's __main__
        self._store = store.current()
        self._store.attach()
        self._thread = threading.Thread(target=self._loop, name=f"dpool-{next(_names)}", daemon=True)
        if now is None:
            self._thread.start()

    # -- what the doors call

    def submit(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], sink: Sink,
               asks_start: bool = False, attended: bool = False) -> Job:
        """Queue one call; its outcome goes to `sink` as task 0. See dpool.engine.WorkerGroup."""
        known = table.get(function, self._elsewhere)
        job = Job(known, known.timing, engine.CALL, ((args, kwargs),), sink, 1, asks_start)
        self._add(job, attended)
        return job

    def attend(self, job: Job, timeout: float | None = None) -> None:
        """Receive the outcome of `job` in this thread, which would only wait for it: see attending.py. Blocks until it
        is there, `timeout` seconds have passed, or other things happen in the group; then the I/O thread sees to it."""
        attending = self._attending
        if attending is None or self._pid != os.getpid():
            return
        if attending.wait(job, timeout):
            self._pump()
            if self._closing or not attending.leads:
                self.port.wake()  # the I/O thread waits for this result, too

    def _unattend(self) -> None:
        """Results are the I/O thread's again."""
        if self._attending is not None and self._attending.leads:
            self._attending.give_up()

    def submit_many(self, function: Callable[..., Any], items: Sequence[Any], mode: int, sink: Sink,
                    chunk: int = 1) -> Job:
        """Queue one task for each `chunk` consecutive items, in one step."""
        known = table.get(function, self._elsewhere)
        job = Job(known, known.timing if chunk == 1 else type(known.timing)(), mode, items, sink, chunk)
        self._add(job)
        return job

    def open_stream(self, function: Callable[..., Any], mode: int, sink: Sink, as_pushed: bool = False) -> Stream:
        """A job whose items come one after the other; it keeps the group open until it is sealed. With `as_pushed` a
        task gets an item as it was when it was pushed, though it may be changed before it is sent."""
        from dpool.cluster.driver.stream import Stream  # few programs need it

        known = table.get(function, self._elsewhere)
        timing = known.timing if mode in (engine.MAP, engine.STAR) else type(known.timing)()
        job = Job(known, timing, mode, [], sink, open=True)
        self._add(job)
        return Stream(job, as_pushed, self._elsewhere, self._extend, self._seal)

    def _extend(self, job: Job, items: Sequence[Any]) -> None:
        with self._lock:
            if self._ended is not None:
                return
            self._dispatch.extend(job, items)
        self._pump()

    def _seal(self, job: Job) -> None:
        with self._lock:
            self._dispatch.seal(job)
        self.port.wake()

    def cancel(self, job: Job) -> int:
        """Drop the tasks of `job` that were not sent yet; returns how many that was. Their sink is not told."""
        with self._lock:
            dropped = self._dispatch.cancel(job)
        self.port.wake()
        return dropped

    def stop(self, job: Job) -> int:
        """cancel(), and end the workers that run tasks of `job`; they are replaced. Does not block."""
        with self._lock:
            dropped = self._dispatch.stop(job)
        self.port.wake()
        return dropped

    def close(self) -> None:
        """Take no more tasks; the accepted ones still finish, then the workers end. Does not block."""
        # Takes no lock: the garbage collector may call this, from a thread that holds it.
        self._closing = True
        self.port.wake()

    def terminate(self, at_once: bool = True) -> None:
        """End the workers now; what has no outcome yet fails as ABANDONED. Does not block.

        Not `at_once`: they are sent no SIGTERM, for the caller has signals of its own for them; SIGKILL comes all the
        same, to those that go on.
        """
        if self._pid == os.getpid():
            self._end(GroupTerminated("the pool was terminated before this task had a result"), at_once)

    def join(self, timeout: float | None = None) -> bool:
        """Wait until every worker has ended; False if `timeout` seconds pass first, or in the I/O thread itself."""
        if self._thread is threading.current_thread() or self._pid != os.getpid():
            return False
        return waiting.join(self._thread, timeout)

    @property
    def processes(self) -> list[Any]:
        """The living workers' process objects; the list itself changes as workers come and go."""
        return self.port.processes

    @property
    def ended(self) -> DpoolError | None:
        """Why nothing more can run, a GroupBroken or GroupTerminated; None as long as something can."""
        return self._ended

    @property
    def queued(self) -> int:
        """Tasks that were accepted and not yet sent."""
        return self._dispatch.queued

    def maintain(self) -> None:
        """Start the workers that are missing, now, in this thread."""
        self.port.start()
        self._dispatch.workers = self.port.count

    def _add(self, job: Job, attended: bool = False) -> None:
        if self._pid != os.getpid():
            raise ForeignProcess(f"this pool was created in process {self._pid} and serves only that process; "
                                 f"this is process {os.getpid()}: create a pool of its own here")
        try:
            with self._lock:
                if self._ended is not None:
                    raise type(self._ended)(*self._ended.args) from self._ended.__cause__
                if self._closing:
                    raise GroupClosed("this pool is closed: it takes no more tasks")
                dispatch = self._dispatch
                dispatch.add(job)
                # The common case, in the same breath: a worker has room, and no more of them need be started.
                here = dispatch.has_credit and (not self.spec.on_demand or dispatch.workers >= self.spec.processes)
                batch = self._next_batch() if here else None
            if not attended:
                self._unattend()
            if batch is None or self._send(batch):
                self._pump()
        except DpoolError:  # refused
            raise
        except BaseException:
            self._put_back()
            if job.open:
                self._seal(job)  # its items will never come
            raise

    # -- sending

    def _put_back(self) -> None:
        """This thread was interrupted, by Ctrl-C or the like: what it has taken out and not sent goes back."""
        me = threading.get_ident()
        with self._lock:
            mine = [batch for batch in self._dispatch.inflight.values()
                    if batch.stage != LEFT and batch.sender in (0, me)]  # 0 is only seen if this thread has left it
            sent = [batch for batch in mine if batch.stage == LEAVING]  # perhaps
            unsent = [batch for batch in mine if batch.stage == TAKEN]
            for batch in unsent:
                self._dispatch.unsend(batch)
            for batch in sent:
                self._dispatch.left(batch)
            self._suspects.add([batch.number for batch in sent], self._now())
        for batch in unsent:
            self._lent.discard(batch.number)
            self._store.unsent((self, batch.number))  # if it was lent anything: that may not have been noted yet
        self.port.wake()

    def _next_batch(self) -> Batch | None:
        """What this thread is to send next. With the lock held."""
        batch = self._dispatch.next_batch(self._now())
        if batch is not None:
            batch.sender = threading.get_ident()
        return batch

    def _pump(self) -> None:
        """Send batches while there are tasks and credits."""
        try:
            self._send_all()
        except BaseException:
            self._put_back()
            raise

    def _send_all(self) -> None:
        dispatch = self._dispatch
        if not dispatch.queue:
            return
        if self.spec.on_demand and dispatch.queue:
            try:
                self.port.demand(dispatch.queued, len(dispatch.inflight))
            except Exception as error:
                self._cannot_start(error)
            dispatch.workers = self.port.count
        # Read without the lock: a result that frees a credit is followed by a pump of the I/O thread's own.
        while dispatch.queue and dispatch.has_credit:
            with self._lock:
                batch = self._next_batch()
            if batch is None or not self._send(batch):
                break

    def _send(self, batch: Batch) -> bool:
        """Encode and send; False if it must wait for the next result."""
        if batch.jobs is not None and batch.job.asks_start:
            refused = [i for i, job in enumerate(batch.jobs) if job.asks_start and not job.sink.start()]
            if refused:
                with self._lock:
                    self._dispatch.drop(batch, refused)
                if not batch.stop:
                    return True
        holder = (self, batch.number)
        try:
            message = encode(batch, self._store, holder, self.port.shares_memory)
        except Refused as refused:
            self._refuse(batch, refused.errors)
            refused.errors.clear()  # the frames of their tracebacks lead back to this one
            return True
        except TooManyRefs:
            return self._send_less(batch)
        except ObjectStoreFull as error:
            return self._wait_for_room(batch, error)
        if message.lent:
            self._lent.add(batch.number)
        batch.stage = LEAVING
        try:
            sent = self.port.send(message.parts, message.descriptors)
        except OSError:
            sent = False  # terminated meanwhile: whoever did that reports the tasks
        if sent:
            self._dispatch.left(batch)
        else:
            batch.stage = TAKEN
        if message.lent and not sent:
            self._lent.discard(batch.number)
            self._store.unsent(holder)
        if not sent:
            with self._lock:
                if batch.number in self._dispatch.inflight:
                    self._dispatch.unsend(batch)
        elif batch.stop > 1 and not self._timer_armed:
            # The I/O thread waits without a limit: make it look at the clock.
            self._timer_armed = True
            self.port.wake()
        return sent

    def _send_less(self, batch: Batch) -> bool:
        """The tasks of a batch have more large refs than a message can carry: send fewer tasks at a time."""
        if batch.stop == 1:
            self._refuse(batch, [(0, ValueError(f"a task may have at most {frames.MAX_DESCRIPTORS} large refs in its "
                                                "arguments: put() the values together and pass one ref"))])
            return True
        with self._lock:
            self._dispatch.max_batch = max(batch.stop // 2, 1)
            self._dispatch.unsend(batch)
        return True

    def _wait_for_room(self, batch: Batch, error: ObjectStoreFull) -> bool:
        """The store has no room for a batch: it waits for one of those in flight; if none is, nothing will help."""
        with self._lock:
            alone = len(self._dispatch.inflight) <= 1
            if not alone:
                self._dispatch.unsend(batch)
        if alone:
            self._refuse(batch, [(index, error) for index in range(batch.stop)])
        return alone

    def _refuse(self, batch: Batch, errors: Sequence[tuple[int, BaseException]]) -> None:
        """Some items of a batch cannot be pickled: they fail, the others go back to the queue."""
        items = batch.items()
        with self._lock:
            dropped = self._dispatch.drop(batch, [index for index, _ in errors])
            if batch.number in self._dispatch.inflight:
                self._dispatch.unsend(batch)
        for (job, task), (index, error) in zip(dropped, errors, strict=True):
            job.sink.fail(task, Failure(engine.ARGUMENT_LOST, explain(error, items[index], batch.mode)))

    # -- receiving

    def _loop(self) -> None:
        """The I/O thread."""
        try:
            while self.step():  # until every worker has ended and nothing is left to report
                pass
        except Exception as error:
            # A bug of dpool's, or a sink that raised: whoever waits must learn of it.
            self._end(GroupBroken(f"the pool's I/O thread has failed: {type(error).__name__}: {error}"))
            self.port.close_tasks()
            self.port.close()
            raise  # to threading.excepthook, which prints it

    def step(self) -> bool:
        """One turn of the I/O thread: wait for news, and see to it. False after the last one."""
        port, dispatch = self.port, self._dispatch
        with self._lock:
            times = [dispatch.steal_at(), self._suspects.deadline,
                     self._now() + STOP_RECHECK_S if dispatch.stopping else None]
            deadline = min((when for when in times if when is not None), default=None)
            self._timer_armed = deadline is not None
        timeout = None if deadline is None else max(deadline - self._now(), 0.001)
        if timeout is None and self._store.warm:
            timeout = store.TIDY_EVERY_S
            self._store.tidy()
        for kind, what, descriptors in port.poll(timeout):
            if kind == events.MESSAGE:
                self._on_results(what, descriptors)
            elif kind == events.DEATH:
                self._on_death(what)
            else:
                self._on_news(kind, what)
        self._unattend()  # whatever it was may have been the end of what is waited for
        if self._attending is not None and self._attending.owed is not None:
            self._attending.settle()
        if dispatch.stopping:
            self._stop_running()
        if deadline is not None:
            self._on_timer(self._now())
        self._pump()
        if self._closing and not self._tasks_closed and self._close_if_finished():
            port.close_tasks()
        if port.count or not (self._tasks_closed or self._ended is not None):
            return True
        self._unattend()
        port.close()
        for number in self._lent:
            self._store.lost((self, number))
        self._lent.clear()
        self._store.detach()
        return False

    def _finished(self) -> bool:
        with self._lock:
            return self._dispatch.idle

    def _close_if_finished(self) -> bool:
        with self._lock:  # whoever adds a task holds it too: what was accepted is seen here
            self._tasks_closed = self._dispatch.idle
            return self._tasks_closed

    def _on_results(self, message: memoryview, descriptors: list[int]) -> None:
        results = Incoming(message, descriptors, self._store)
        number, flags = results.number, results.flags
        if number in self._lent and flags & frames.DONE:
            self._lent.discard(number)
            self._store.pass_on((self, number), (self, "slot", results.slot))
        if results.released:
            self._store.released(results.released)
        if flags & frames.BROKEN:
            self._on_broken(results.initializer_failure())
            return
        reason = results.reason() if flags & frames.NEED_VALUE else None
        values, failed = results.outcomes() if reason is None else ([], {})
        with self._lock:
            batch = self._dispatch.report(number, results.first, results.count)
            if batch is not None and results.count:
                batch.timing.result_bytes = results.result_bytes // results.count
            if flags & frames.DONE:
                self._dispatch.done(number, results.run_ns, results.executed)
        if reason is not None:
            self._send_by_value(batch)
        # The worker's next batch goes out before anyone is told: a callback may take its time.
        self._pump()
        if batch is not None:
            tell(batch, results.first, values, failed)

    def _on_broken(self, failure: Failure) -> None:
        """The initializer has failed in a worker, which ends."""
        cause = failure.exception
        broken = GroupBroken(f"the initializer of the workers failed: {type(cause).__name__}: {cause}")
        broken.__cause__ = cause
        if failure.traceback:
            cause.__cause__ = RemoteError(f'\n"""\n{failure.traceback}"""')
        # Told to the sinks when that worker has ended: what it has logged is out then.
        self._doom = broken
        self.port.kill(at_once=False)

    def _send_by_value(self, batch: Batch | None) -> None:
        """A worker does not find the function by its name."""
        function: Any = batch.function if batch is not None else None
        if function is None:
            return
        if not function.by_value:
            try:
                table.send_by_value(function)
            except Exception as error:
                function.by_value = True
                function.problem = error
        # Again for each worker that says so: what had been sent to it is in the queue now.
        if function.problem is not None:
            failure = Failure(engine.ARGUMENT_LOST, function.problem)
            with self._lock:
                doomed = [job for job in self._dispatch.queue if job.function is function]
                tasks = [(job, job.waiting()) for job in doomed]
                for job in doomed:
                    self._dispatch.cancel(job)
            for job, numbers in tasks:
                for task in numbers:
                    job.sink.fail(task, failure)

    def _on_death(self, death: Any) -> None:
        """A worker has ended: settle what it ran, start its replacement."""
        stopped = death.stopped or death.slot in self._stopped
        self._stopped.discard(death.slot)
        with self._lock:
            guilty = self._dispatch.died(death.batch, death.task, stopped) if death.batch else None
            attempts = (guilty[0].attempts or {}).get(guilty[1], 1) if guilty is not None else 1
            self._dispatch.workers = self.port.count
            if not death.expected:
                # It may have taken a batch and died before it could say so: look again when the others have spoken.
                claimed = self.port.claimed()
                self._suspects.add([number for number, batch in self._dispatch.inflight.items()
                                    if batch.stage != TAKEN and number not in claimed], self._now())
        here = self._store
        if death.batch in self._lent:
            self._lent.discard(death.batch)
            here.lost((self, death.batch))
        here.lost((self, "slot", death.slot))
        failure = None
        if guilty is not None or (self.spec.break_on_death and not death.expected):
            failure = self._describe(death, guilty, attempts)
        if guilty is not None and failure is not None:
            guilty[0].sink.fail(guilty[1], failure)
        if self._doom is not None:
            self._end(self._doom)
        elif self._ended is None and not self._tasks_closed:
            if self.spec.break_on_death and not (death.expected or stopped) and failure is not None:
                broken = GroupBroken(str(failure.exception))
                broken.__cause__ = failure.exception
                self._end(broken)
            elif self._supervisor.hopeless:
                self._end(GroupBroken(f"{self._supervisor.failed_starts} workers in a row ended before they were "
                                      f"ready; the last one {death.describe()}"))
            else:
                self._replace()

    def _on_news(self, kind: int, what: Any) -> None:
        """News of a port whose workers are elsewhere."""
        doomed: list[tuple[Job, int]] = []
        with self._lock:
            self._dispatch.workers = self.port.count
            if kind == events.LOST:
                self._dispatch.lost(what)
            elif kind == events.NODE_LOST:
                doomed = self._dispatch.node_lost(what[0])
            elif kind == events.STOLEN:
                self._dispatch.stolen(what[0], what[1], self._now())
        if kind in (events.LOST, events.NODE_LOST):
            self._store.lost((self, what if kind == events.LOST else what[0]))
        elif kind == events.CHANGED:
            for slot in what:
                self._store.lost((self, "slot", slot))
        if kind == events.HOPELESS:
            self._end(GroupBroken(str(what)))
        for job, task in doomed:
            text = (f"the nodes that were running task {task} were lost {NODE_LOSSES + 1} times, the last one was "
                    f"{what[1]}: {what[2]}")
            job.sink.fail(task, Failure(engine.WORKER_DIED, NodeLost(text)))

    def _replace(self) -> None:
        if self._closing and self._finished():
            return
        try:
            self.maintain()
        except Exception as error:
            self._cannot_start(error)

    def _cannot_start(self, error: Exception) -> None:
        """Go on with the workers there are; without any, the group is broken."""
        if not self.port.count:
            broken = GroupBroken(f"no worker can be started: {type(error).__name__}: {error}")
            broken.__cause__ = error
            self._end(broken)

    def _describe(self, death: Any, guilty: tuple[Job, int] | None, attempts: int) -> Failure:
        what = f"task {guilty[1]}" if guilty is not None else "no task"
        host = death.host or socket.gethostname()
        text = (f"the worker process {death.pid} on {host} {death.describe()} "
                f"while it was running {what}")
        if attempts > 1:
            text += f", at attempt {attempts}"
        error = WorkerDied(text, death.pid, death.exitcode, host,
                           guilty[1] if guilty is not None else None, attempts)
        return Failure(engine.WORKER_DIED, error, death.trace)

    def _stop_running(self) -> None:
        with self._lock:
            tasks = self._dispatch.to_stop()
        if tasks:
            self._stopped |= self.port.stop(tasks)

    def _on_timer(self, now: float) -> None:
        with self._lock:
            stuck = self._dispatch.should_steal(now)
            looks_at = self._suspects.deadline
        for batch in stuck:
            count = self.port.steal(batch.number)
            if count:
                with self._lock:
                    self._dispatch.stolen(batch.number, count, now)
        if looks_at is not None and looks_at <= now:
            # In this order: what leaves the socket meanwhile is in one of them.
            unread, claimed = self.port.unread(), self.port.claimed()
            last = max(claimed, default=0)
            with self._lock:
                lost = self._suspects.lost(lambda number: self._dispatch.where(number, claimed, last, unread), now)
                for number in lost:
                    self._dispatch.lost(number)
            for number in lost:
                self._store.lost((self, number))

    # -- the end

    def _end(self, why: DpoolError, at_once: bool = True) -> None:
        """Nothing more will run: every task without an outcome fails with `why`, the workers are killed."""
        with self._lock:
            if self._ended is not None:
                return
            self._ended = why
            left = self._dispatch.abandon()
            self._suspects.clear()
        self._unattend()
        self.port.kill(at_once)
        failure = Failure(engine.ABANDONED, why)
        for job, tasks in left:
            abandon = getattr(job.sink, "abandon", None)
            if abandon is not None:
                abandon(failure)
            else:
                for task in tasks:
                    job.sink.fail(task, failure)
