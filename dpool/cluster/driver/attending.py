"""A thread that would only wait for a call's result receives it itself, and need not be woken by one that has.

It does so while that call is all there is in the group; meanwhile the group's I/O thread sees no results. A Ctrl-C may
come between any two steps here, and nothing is lost: the message stays in the socket until its value is where the
caller finds it, each step may be done again, and the I/O thread ends what was begun. Owned by driver/group.py.
"""

from __future__ import annotations

import threading

from dpool.cluster.wire import frames, pickling

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection
    from typing import Any

    from dpool.cluster.driver.dispatch import Dispatch, Job
    from dpool.cluster.driver.port import NearPort
    from dpool.engine import AttendedSink

# A result without anything that somebody else must be told of, or must take along: no failure, ref or segment.
_SIMPLE = frames.DONE | frames.ONE_PICKLE


class Owed:
    """A result that somebody has begun to take in: of batch `number`, whose task took `run_ns`."""

    __slots__ = ("number", "run_ns", "sink", "value")

    def __init__(self, number: int, run_ns: int, sink: AttendedSink, value: Any) -> None:
        self.number = number
        self.run_ns = run_ns
        self.sink = sink
        self.value = value


class Attending:
    """`lock` is the group's, which guards `dispatch` and `lent`, the batches that somebody must be told of."""

    def __init__(self, lock: threading.Lock, dispatch: Dispatch, port: NearPort, lent: Collection[int]) -> None:
        self._lock = lock
        self._dispatch = dispatch
        self._port = port
        self._lent = lent
        # Changed with the lock held, but by the thread itself that ends to wait.
        self.leads = False  # the I/O thread sees no results
        self._thread = 0  # which receives them, if one waits now
        self.owed: Owed | None = None

    def wait(self, job: Job, timeout: float | None) -> bool:
        """Receive the outcome of `job`, for up to `timeout` seconds. True if it is there by this thread's own doing;
        else the I/O thread sees to it, at once or when it comes."""
        me = threading.get_ident()
        try:
            try:
                return self._begin(job, me) and self._receive(job, me, timeout)
            finally:
                self._end(job, me)
        finally:
            self._end(job, me)  # again, for a Ctrl-C may have come in the midst of it

    def _begin(self, job: Job, me: int) -> bool:
        with self._lock:
            if self._thread or self.owed is not None or not self._is_alone(job):
                return False
            self._thread = me
            if not self.leads:
                self.leads = True  # before it is so, as it is False only when it is not so any more
                try:
                    self._port.lead()
                except OSError:  # no descriptor is left for it
                    return False
        return True

    def _is_alone(self, job: Job) -> bool:
        """Whether a job of one task is all that the group has to do, and a worker has it."""
        inflight = self._dispatch.inflight
        if len(inflight) != 1 or self._dispatch.queue:
            return False
        [batch] = inflight.values()
        return batch.jobs is not None and batch.jobs[0] is job and batch.stop == 1 and batch.number not in self._lent

    def _receive(self, job: Job, me: int, timeout: float | None) -> bool:
        message = self._port.peek(timeout)
        if message is None:
            return False
        flags, _, _, number, _, _, _, run_ns, *beside = frames.RESULTS.unpack_from(message)
        if flags != _SIMPLE or any(beside):
            return False
        try:
            [value] = pickling.unpack(message[frames.RESULTS.size:], (), True)  # type: ignore[misc]
        except KeyboardInterrupt:
            raise
        except BaseException:  # code of the user's raises anything
            return False  # the I/O thread says what is wrong with it
        with self._lock:
            if not self.leads or not self._is_alone(job) or number not in self._dispatch.inflight:
                return False
            sink: AttendedSink = job.sink  # type: ignore[assignment]
            self.owed = Owed(number, run_ns, sink, value)
            if sink.set_alone(value):
                self._port.consume()
                self._dispatch.finish(number, run_ns)
            self.owed = None
        return not job.unsettled

    def _end(self, job: Job, me: int) -> None:
        if job.unsettled and self.leads:
            self.give_up()
        if self._thread == me:
            self._thread = 0
        if self.owed is not None:
            self._port.wake()

    def give_up(self) -> None:
        """Results are the I/O thread's again. Any thread may call it."""
        with self._lock:
            if self.leads:
                self._port.follow(self._thread not in (0, threading.get_ident()))
                self.leads = False

    def settle(self) -> None:
        """End what was begun and not ended. For the I/O thread."""
        with self._lock:
            owed = self.owed
            if owed is None or self._thread:
                return  # its thread is about to
            head = self._port.peek(0)
            if head is not None and frames.RESULTS.unpack_from(head)[3] == owed.number:
                self._port.consume()
            self._dispatch.finish(owed.number, owed.run_ns)
            self.owed = None
        owed.sink.set(0, (owed.value,))
