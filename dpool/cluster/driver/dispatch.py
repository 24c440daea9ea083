"""Decides which tasks of a group travel in which batch, and what becomes of them when a batch ends early.

Every change to a group's queue happens here. It owns no socket, thread or clock: the time is an argument, and what must
be sent or reported is returned. Called by driver/group.py, under the group's lock.
"""

from __future__ import annotations

import sys
from collections import deque

from dpool.batching import (
    CALLS_RUN_TIME_NS,
    CREDITS_PER_WORKER,
    MAP_RUN_TIME_NS,
    MAX_BATCH_TASKS,
    STEAL_AFTER_S,
    STEAL_RECHECK_S,
    batch_size,
    blend,
)
from dpool.cluster.suspects import OUT, SAFE, WAITS
from dpool.engine import CALL

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Container, Iterator, Sequence
    from typing import Any

    from dpool.engine import Sink

# A task whose node is lost is run again so often: it is hardly ever the task's fault.
NODE_LOSSES = 3


class Timing:
    """What is known of a function's tasks: how long one takes, in ns, None until the first one has finished; and how
    large its last results were, in bytes, 0 if too small to go beside the message."""

    __slots__ = ("estimate_ns", "result_bytes")

    def __init__(self) -> None:
        self.estimate_ns: int | None = None
        self.result_bytes = 0


class Job:
    """The tasks of one call of a door: one function, one mode, one sink. Task i is items[i*chunk : (i+1)*chunk]."""

    __slots__ = ("function", "timing", "mode", "items", "chunk", "sink", "asks_start", "next", "returned", "queued",
                 "open", "grows", "unsettled", "attempts", "stopped", "shared", "__weakref__")

    def __init__(self, function: Any, timing: Timing, mode: int, items: Sequence[Any], sink: Sink, chunk: int = 1,
                 asks_start: bool = False, open: bool = False) -> None:
        self.function = function
        self.timing = timing
        self.mode = mode
        self.items: Any = items
        self.chunk = chunk
        self.sink = sink
        self.asks_start = asks_start
        self.next = 0  # tasks before this one have been sent at least once
        self.returned: deque[tuple[int, int]] | None = None  # ranges that were sent and came back unstarted
        self.queued = False  # stands in Dispatch's queue
        self.open = open  # more items may come
        self.grows = open  # its items are a list of its own: those of settled tasks are let go of
        self.unsettled = -(-len(items) // chunk)  # tasks without an outcome
        self.attempts: dict[int, int] | None = None  # deaths of workers by task
        self.stopped = False  # its running tasks are to be ended; what comes back unbegun is dropped
        self.shared: Any = None  # what its tasks have in common and is stored once; the sender's

    def waiting(self) -> list[int]:
        """The numbers of the tasks that are queued."""
        ranges = [*(self.returned or ()), (self.next, -(-len(self.items) // self.chunk))]
        return [task for first, stop in ranges for task in range(first, stop)]

    def item(self, task: int) -> Any:
        """What travels as task `task`: an item, or a tuple of `chunk` of them."""
        if self.chunk == 1:
            return self.items[task]
        return tuple(self.items[task * self.chunk:(task + 1) * self.chunk])

# Stages of a batch.
TAKEN, LEAVING, LEFT = range(3)


class Batch:
    """Tasks that travel together: either task 0 of each of `jobs`, or tasks first, first+1, ... of `job`."""

    __slots__ = ("number", "function", "timing", "mode", "jobs", "job", "first", "reported", "stop", "sender",
                 "stage", "behind", "sent_at", "steal_at")

    def __init__(self, number: int, job: Job, jobs: list[Job] | None, first: int, count: int, now: float) -> None:
        self.number = number
        self.function = job.function
        self.timing = job.timing
        self.mode = job.mode
        self.jobs = jobs
        self.job = job
        self.first = first
        self.reported = 0  # tasks before this one have had their outcome reported by the worker
        self.stop = count  # tasks from this one on are not the batch's any more: they were taken back
        # The thread that is to send it, and how far it has come; for the group, if that is interrupted.
        self.sender = 0
        self.stage = TAKEN
        self.behind = sys.maxsize  # batches from this number on have left behind it
        self.sent_at = now
        self.steal_at = now + STEAL_AFTER_S

    def task(self, index: int) -> tuple[Job, int]:
        """The job, and the number within it, of the batch's task `index`."""
        return (self.jobs[index], 0) if self.jobs is not None else (self.job, self.first + index)

    def items(self) -> Sequence[Any]:
        """What travels: one entry a task."""
        if self.jobs is not None:
            return [job.items[0] for job in self.jobs[:self.stop]]
        job = self.job
        if job.chunk == 1:
            return job.items[self.first:self.first + self.stop]  # type: ignore[no-any-return]
        return [job.item(task) for task in range(self.first, self.first + self.stop)]


class Dispatch:
    """The queue of a group. One lock of the caller's guards it; it calls nothing but itself."""

    def __init__(self, workers: int = 0, retries: int = 0, max_tasks: int | None = None, splits: bool = True) -> None:
        self.workers = workers  # living workers: they bound what is in flight
        self.retries = retries
        # A worker that is replaced after few tasks must not be sent many; where running batches cannot be split,
        # a short task could wait behind a long one, so there tasks travel alone.
        self.max_batch = min(MAX_BATCH_TASKS, max_tasks or MAX_BATCH_TASKS) if splits else 1
        self.queue: deque[Job] = deque()
        self.queued = 0  # tasks in the queue
        self.inflight: dict[int, Batch] = {}
        self.streams: dict[Job, None] = {}  # open jobs: more items may come
        self.stopping = False  # tasks of stopped jobs may be in flight
        self._number = 0
        self._look_again_at = 0.0  # everyone had work when should_steal() was last asked

    # -- what comes in from the door

    def add(self, job: Job) -> None:
        """Queue every task of a new job."""
        if job.open:
            self.streams[job] = None
        if job.unsettled:
            # The call comes last: only after calls may a Ctrl-C come.
            job.queued = True
            self.queued += job.unsettled
            self.queue.append(job)

    def extend(self, job: Job, items: Sequence[Any]) -> None:
        """An open job has grown by these tasks (its chunk is 1). They are dropped if it was sealed, or cancelled."""
        if not job.open or not items:
            return
        job.items.extend(items)
        job.unsettled += len(items)
        self.queued += len(items)
        if not job.queued:
            job.queued = True
            self.queue.append(job)

    def seal(self, job: Job) -> None:
        """An open job grows no more."""
        job.open = False
        self.streams.pop(job, None)

    def cancel(self, job: Job) -> int:
        """Forget what is queued of `job`; returns the number of tasks dropped. What was sent is left alone."""
        self.seal(job)
        if not job.queued:  # also after abandon(), which has told of these tasks
            return 0
        dropped = self._waiting(job)
        self.queue.remove(job)
        job.queued = False
        self.queued -= dropped
        job.unsettled -= dropped
        job.returned = None
        job.next = -(-len(job.items) // job.chunk)
        return dropped

    def stop(self, job: Job) -> int:
        """cancel(), and have what was sent of the job ended: see to_stop()."""
        dropped = self.cancel(job)
        job.stopped = self.stopping = True
        return dropped

    def to_stop(self) -> list[tuple[int, int]]:
        """(batch, index) of each task in flight whose job is stopped."""
        found = [(batch.number, index) for batch in self.inflight.values()
                 for index in range(batch.reported, batch.stop) if batch.task(index)[0].stopped]
        self.stopping = bool(found)
        return found

    # -- what goes out

    @property
    def has_credit(self) -> bool:
        """Whether one more batch may be in flight."""
        return len(self.inflight) < CREDITS_PER_WORKER * self.workers

    def next_batch(self, now: float) -> Batch | None:
        """The batch to send next, already counted as in flight; None while there is no task or no credit."""
        queue = self.queue
        if not queue or not self.has_credit:
            return None
        job = queue[0]
        size = batch_size(job.timing.estimate_ns, self.queued, self.workers, self.max_batch,
                          CALLS_RUN_TIME_NS if job.mode == CALL else MAP_RUN_TIME_NS)
        jobs: list[Job] | None = None
        if job.returned:
            first, stop = job.returned.popleft()
            if stop - first > size:
                job.returned.appendleft((first + size, stop))
                stop = first + size
            count = stop - first
        elif job.open or job.unsettled > 1 or len(job.items) != 1 or job.chunk != 1:
            first = job.next
            count = min(size, -(-len(job.items) // job.chunk) - first)
            job.next = first + count
        else:
            # Calls of one task each: those of the same function that stand next to each other travel together.
            jobs = []
            function, mode, asks_start = job.function, job.mode, job.asks_start
            for job in queue:
                if (job.function is not function or job.mode != mode or job.asks_start != asks_start or job.open
                        or job.chunk != 1 or len(job.items) != 1 or job.returned):
                    break
                jobs.append(job)
                if len(jobs) == size:
                    break
            job, first, count = jobs[0], 0, len(jobs)
        number = self._number + 1
        batch = Batch(number, job, jobs, first, count, now)
        # From here on no step may be missing. A Ctrl-C can only come after a call, and there is none before the first
        # popleft(); so a single call, whose caller may well be at a terminal, is in one place at any time.
        self._number = number
        self.inflight[number] = batch
        self.queued -= count
        if jobs is not None:
            for job in jobs:
                job.queued = False
                job.next = 1
                queue.popleft()
        elif not self._waiting(job):
            job.queued = False
            queue.popleft()
        return batch

    def left(self, batch: Batch) -> None:
        """The batch is on its way to a worker, or may be. Needs no lock."""
        batch.behind = self._number + 1
        batch.stage = LEFT

    def where(self, number: int, claimed: Container[int], last: int, unread: bool) -> str:
        """Where a batch is, see suspects.py: if workers say that they are in the batches `claimed`, of which `last` is
        the last, and there is something in their socket or not."""
        batch = self.inflight.get(number)
        if batch is None or batch.stage == TAKEN or number in claimed:
            return SAFE
        # Messages leave the socket in the order in which they went in.
        return WAITS if unread and last < batch.behind else OUT

    def unsend(self, batch: Batch) -> None:
        """The batch could not be sent: its tasks stand at the head of the queue again."""
        del self.inflight[batch.number]
        self._take_back(batch, batch.reported)

    def drop(self, batch: Batch, indexes: Sequence[int]) -> list[tuple[Job, int]]:
        """These tasks of a batch that is not yet sent never will be; returns them. The others stay, or the batch
        ends with the last of them."""
        dropped = [batch.task(index) for index in indexes]
        gone = frozenset(indexes)
        kept = [batch.task(index) for index in range(batch.stop) if index not in gone]
        for job, _ in dropped:
            self._settle(job, 1)
        del self.inflight[batch.number]
        if batch.jobs is not None:
            batch.jobs = [job for job, _ in kept]
            batch.stop = len(kept)
            if kept:
                self.inflight[batch.number] = batch
        else:
            # What is left is no longer one range: it goes back, and leaves in as many batches as it takes.
            for job, task in reversed(kept):
                self._requeue(job, task, task + 1)
        return dropped

    # -- what comes back from the workers

    def report(self, number: int, first: int, count: int) -> Batch | None:
        """A worker reports the outcomes of `count` tasks of a batch. None if they are not wanted: the batch was given
        up as lost and its tasks run elsewhere."""
        batch = self.inflight.get(number)
        if batch is None or first != batch.reported or first + count > batch.stop:
            return None
        batch.reported += count
        if batch.jobs is None:
            self._settle(batch.job, count)
            if batch.job.grows:
                start = batch.first + first
                batch.job.items[start:start + count] = [None] * count
        else:
            for job in batch.jobs[first:first + count]:
                job.unsettled = 0
        return batch

    def done(self, number: int, run_ns: int, executed: int) -> None:
        """A worker has left a batch after `executed` tasks, which took `run_ns`; those it did not run are queued
        again. Frees a credit."""
        batch = self.inflight.pop(number, None)
        if batch is None:
            return
        if executed:
            batch.timing.estimate_ns = blend(batch.timing.estimate_ns, run_ns // executed)
        self._take_back(batch, batch.reported)

    def finish(self, number: int, run_ns: int) -> None:
        """report() and done() for a batch of one call, which was run. If it is interrupted, at any step, it is to be
        called again."""
        batch = self.inflight.get(number)
        if batch is not None and batch.jobs is not None:
            batch.jobs[0].unsettled = 0
            batch.reported = 1
            batch.timing.result_bytes = 0
            batch.timing.estimate_ns = blend(batch.timing.estimate_ns, run_ns)
            self.inflight.pop(number, None)

    def died(self, number: int, running: int, ended: bool = False) -> tuple[Job, int] | None:
        """The worker of batch `number` died in its task `running`. What it had not reported is queued again, but for
        that task itself: it is returned, unless it may be retried, or the driver has `ended` the worker to stop another
        one, which it had just left."""
        batch = self.inflight.pop(number, None)
        if batch is None:
            return None
        if not batch.reported <= running < batch.stop:
            # Between tasks: nothing was running.
            self._take_back(batch, batch.reported)
            return None
        guilty, task = batch.task(running)
        attempts = guilty.attempts = guilty.attempts or {}
        spared = ended and not guilty.stopped
        if not spared:
            attempts[task] = attempts.get(task, 0) + 1
        self._take_back(batch, running + 1)
        retried = spared or (attempts[task] <= self.retries and not guilty.stopped)
        if retried:
            self._requeue(guilty, task, task + 1)
        batch.stop = running
        self._take_back(batch, batch.reported)
        if retried:
            return None
        self._settle(guilty, 1)
        return guilty, task

    def lost(self, number: int) -> None:
        """A batch reached no worker: a worker died after taking it from the socket and before beginning it."""
        batch = self.inflight.pop(number, None)
        if batch is not None:
            self._take_back(batch, batch.reported)

    def node_lost(self, number: int) -> list[tuple[Job, int]]:
        """The node that had a batch is lost: its unreported tasks are queued again, but for those to which that has
        happened NODE_LOSSES times before: they are returned."""
        batch = self.inflight.pop(number, None)
        if batch is None:
            return []
        doomed = []
        for index in range(batch.reported, batch.stop):
            job, task = batch.task(index)
            # Kept beside the deaths of workers, under numbers that no task has.
            losses = job.attempts = job.attempts or {}
            losses[~task] = losses.get(~task, 0) + 1
            if losses[~task] > NODE_LOSSES:
                self._settle(job, 1)
                doomed.append((job, task))
        if not doomed:
            self._take_back(batch, batch.reported)
        else:
            gone = set(doomed)
            for index in range(batch.stop - 1, batch.reported - 1, -1):
                job, task = batch.task(index)
                if (job, task) not in gone:
                    self._requeue(job, task, task + 1)
        return doomed

    # -- long tasks in batches of several

    def steal_at(self) -> float | None:
        """When should_steal() is worth asking next, if nothing happens before; None while no batch of several tasks is
        in flight."""
        oldest: float | None = None
        for batch in self.inflight.values():
            if batch.stop - batch.reported > 1:
                if oldest is None or batch.steal_at < oldest:
                    oldest = batch.steal_at
                if batch.steal_at == batch.sent_at + STEAL_AFTER_S:
                    break  # those sent later are due later: a thousand workers are not gone through at each result
        return None if oldest is None else max(oldest, self._look_again_at)

    def should_steal(self, now: float) -> list[Batch]:
        """Batches of several tasks that a long one holds up: the tasks behind it are to be taken, the results before it
        to be asked for. While everyone has work, only those that have been out for far longer than a batch takes.

        A batch is named again only when it has been out for twice as long: perhaps no worker was in it yet, perhaps
        all its tasks are begun.
        """
        idle = not self.queue and len(self.inflight) < self.workers
        self._look_again_at = 0.0 if idle else now + STEAL_RECHECK_S
        due = [batch for batch in self.inflight.values()
               if batch.stop - batch.reported > 1 and batch.steal_at <= now
               and (idle or now - batch.sent_at >= STEAL_RECHECK_S)]
        for batch in due:
            batch.steal_at = now + (now - batch.sent_at)
        return due

    def stolen(self, number: int, count: int, now: float) -> None:
        """The last `count` tasks of a batch were taken from its worker before it began them."""
        batch = self.inflight.get(number)
        if batch is None or not count:
            return
        kept = batch.stop - count
        run_ns = int((now - batch.sent_at) * 1e9)
        batch.timing.estimate_ns = max(batch.timing.estimate_ns or 0, run_ns // max(kept, 1))
        self._take_back(batch, kept)
        batch.stop = kept

    # -- the end

    @property
    def idle(self) -> bool:
        """Nothing is queued, in flight or still to come."""
        return not (self.queue or self.inflight or self.streams)

    def abandon(self) -> list[tuple[Job, list[int]]]:
        """Forget everything; returns each job with the tasks of it that will have no outcome."""
        left: dict[Job, list[int]] = {job: [] for job in self.streams}
        for batch in self.inflight.values():
            for index in range(batch.reported, batch.stop):
                job, task = batch.task(index)
                left.setdefault(job, []).append(task)
        for job in self.queue:
            tasks = left.setdefault(job, [])
            for first, stop in job.returned or ():
                tasks.extend(range(first, stop))
            tasks.extend(range(job.next, -(-len(job.items) // job.chunk)))
            job.queued = False
        self.queue.clear()
        self.inflight.clear()
        self.streams.clear()
        self.queued = 0
        return list(left.items())

    def validate(self) -> None:
        """Raise AssertionError unless the books agree. For tests."""
        assert self.queued == sum(map(self._waiting, self.queue))
        assert len({id(job) for job in self.queue}) == len(self.queue)
        assert all(job.queued and self._waiting(job) > 0 for job in self.queue)
        seen: set[tuple[int, int]] = set()
        for job, task in self._known():
            assert (id(job), task) not in seen, "a task is in two places"
            seen.add((id(job), task))
        for batch in self.inflight.values():
            assert 0 <= batch.reported <= batch.stop
        counts: dict[int, int] = {}
        for key, _ in seen:
            counts[key] = counts.get(key, 0) + 1
        for job in {id(job): job for job, _ in self._known()}.values():
            assert counts[id(job)] == job.unsettled, "a task is nowhere, or is settled twice"

    # -- the pieces

    def _known(self) -> Iterator[tuple[Job, int]]:
        for batch in self.inflight.values():
            for index in range(batch.reported, batch.stop):
                yield batch.task(index)
        for job in self.queue:
            for first, stop in job.returned or ():
                yield from ((job, task) for task in range(first, stop))
            yield from ((job, task) for task in range(job.next, -(-len(job.items) // job.chunk)))

    def _waiting(self, job: Job) -> int:
        waiting = -(-len(job.items) // job.chunk) - job.next
        if job.returned:
            waiting += sum(stop - first for first, stop in job.returned)
        return waiting

    def _settle(self, job: Job, count: int) -> None:
        job.unsettled -= count

    def _take_back(self, batch: Batch, start: int) -> None:
        """Tasks start, start+1, ..., stop-1 of the batch stand in the queue again, before all others."""
        if start >= batch.stop:
            return
        if batch.jobs is None:
            self._requeue(batch.job, batch.first + start, batch.first + batch.stop)
        else:
            for job in reversed(batch.jobs[start:batch.stop]):
                self._requeue(job, 0, 1)

    def _requeue(self, job: Job, first: int, stop: int) -> None:
        if job.stopped:
            self._settle(job, stop - first)
            return
        if len(job.items) == 1 and not job.open:
            job.next = 0  # as if it had never left, so that it may travel with others again
        else:
            if job.returned is None:
                job.returned = deque()
            job.returned.appendleft((first, stop))
        self.queued += stop - first
        if not job.queued:
            job.queued = True
            self.queue.appendleft(job)
