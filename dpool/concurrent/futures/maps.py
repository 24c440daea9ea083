"""One map(): its tasks as they are read, its results as they are taken, in order.

Knows a group's jobs and no executor. Made by process.py; the group's I/O thread fills what one iterator empties.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from concurrent.futures._base import CancelledError

from dpool import waiting
from dpool.concurrent.futures.failures import REFUSALS, to_exception
from dpool.engine import ARGUMENT_LOST, Failure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any

# How long map() reads a slow input before what it has read is sent. Longer: fewer steps. Shorter: workers wait less.
FLUSH_AFTER_S = 0.0005


class Unsendable(Exception):
    """The function of a map cannot be pickled; `reason` says why. For the iterator to raise, not for map() itself."""

    def __init__(self, reason: Exception) -> None:
        self.reason = reason


class _Raise:
    """Stands among the results of a map for an exception to raise there."""

    __slots__ = ("error",)

    def __init__(self, error: BaseException) -> None:
        self.error = error


class MapResults:
    """The results of one map(), in order: a Sink that the group's I/O thread fills and one iterator empties."""

    __slots__ = ("group", "condition", "items", "expected", "arrived", "total", "dropped", "unsorted", "open", "job",
                 "jobs", "closed", "__weakref__")

    def __init__(self, group: Any) -> None:
        self.group = group
        # Guards all below but `items`, whose ends may be used by one thread each.
        self.condition = waiting.Condition()
        self.items: deque[Any] = deque()
        self.expected = 0  # the next task whose result may be queued
        self.arrived = 0  # tasks that have an outcome
        self.total = 0  # tasks there are
        self.dropped = 0  # tasks that were cancelled and never will have an outcome
        self.unsorted: dict[int, Sequence[Any]] = {}  # first task -> results that came before their turn
        self.open = True  # more tasks may come
        self.job: Any = None  # what the group calls this map, while it may be cancelled
        self.jobs: deque[Any] = deque()  # the same for each task, where they are sent one by one
        self.closed = False  # nobody will take results any more

    # -- from map()

    def grow(self, count: int) -> None:
        self.total += count

    def attach(self, job: Any) -> None:
        self.job = job
        if self.arrived >= self.total and not self.open:
            self.job = None  # a job that is done would only keep its arguments alive

    def seal(self) -> None:
        """No more tasks will come."""
        with self.condition:
            self.open = False
            if self.arrived >= self.total:
                self.job = None
            self.condition.notify()

    def send_one(self, group: Any, fn: Callable[..., Any], item: Any, mode: int) -> None:
        """One more task, as a job of its own."""
        index = self.total
        self.total = index + 1
        try:
            job = group.submit_many(fn, (item,), mode, _Part(self, index))
        except REFUSALS:
            raise
        except Exception as error:
            self.fail(index, Failure(ARGUMENT_LOST, error))
            return
        while self.jobs and not self.jobs[0].unsettled:
            self.jobs.popleft()
        self.jobs.append(job)

    # -- from the iterator

    def wait(self, deadline: float | None) -> bool:
        """Wait for a result; False if none will come. Raises TimeoutError, and CancelledError where the next one was
        cancelled."""
        while True:
            with self.condition:
                if self.items:
                    return True
                if self.expected >= self.total and not self.open:
                    return False
                if self.dropped and self.arrived + self.dropped >= self.total:
                    raise CancelledError
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise TimeoutError
                self.condition.wait(left)

    def close(self) -> None:
        """The iterator is done: nobody takes results any more."""
        self.closed = True
        self.cancel()
        self.job = None
        self.jobs.clear()
        self.items.clear()
        self.unsorted.clear()

    def cancel(self) -> None:
        """Drop the tasks that were not sent to a worker yet."""
        jobs = [*self.jobs]
        job = self.job
        if job is not None:
            jobs.append(job)
        if jobs:
            dropped = sum(map(self.group.cancel, jobs))
            with self.condition:
                self.dropped += dropped
                self.condition.notify()

    # -- the Sink

    def start(self) -> bool:
        return True

    def set(self, first: int, values: Sequence[Any]) -> None:
        self._arrive(first, values, len(values))

    def fail(self, index: int, failure: Failure) -> None:
        self._arrive(index, [_Raise(to_exception(failure))], 1)

    def abandon(self, failure: Failure) -> None:
        """The group has ended: after the results that are there comes the reason."""
        with self.condition:
            self.unsorted.clear()
            self.items.append(_Raise(to_exception(failure)))
            self.expected = self.arrived = self.total
            self.open = False
            self.job = None
            self.condition.notify()

    def _arrive(self, first: int, values: Sequence[Any], count: int) -> None:
        with self.condition:
            self.arrived += count
            if self.arrived >= self.total and not self.open:
                self.job = None
            if self.closed:
                return
            if first != self.expected:
                self.unsorted[first] = values
                return
            self.items.extend(values)
            self.expected += count
            while self.unsorted and self.expected in self.unsorted:
                more = self.unsorted.pop(self.expected)
                self.items.extend(more)
                self.expected += len(more)
            if type(values) is list:
                # The group's thread still holds this list: the caller's objects must not live on in it.
                values.clear()
            self.condition.notify()


class _Part:
    """The Sink of one task of a map whose tasks are sent one by one."""

    __slots__ = ("results", "index")

    def __init__(self, results: MapResults, index: int) -> None:
        self.results = results
        self.index = index

    def start(self) -> bool:
        return True

    def set(self, first: int, values: Sequence[Any]) -> None:
        self.results._arrive(self.index, values, 1)

    def fail(self, index: int, failure: Failure) -> None:
        self.results.fail(self.index, failure)

    def abandon(self, failure: Failure) -> None:
        self.results.abandon(failure)


def feed(group: Any, fn: Callable[..., Any], source: Iterator[Any], mode: int, chunksize: int,
          results: MapResults) -> None:
    """Read all of a map's input in this thread; what was read is sent while the input takes its time."""
    try:
        stream = group.open_stream(fn, mode, results)
    except REFUSALS:
        raise
    except Exception as error:
        raise Unsendable(error) from None
    read: list[Any] = []
    sent_at = 0.0
    try:
        while True:
            if chunksize == 1:
                try:
                    item = next(source)
                except StopIteration:
                    break
            else:
                item = tuple(itertools.islice(source, chunksize))
                if not item:
                    break
            read.append(item)
            now = time.monotonic()
            if now - sent_at > FLUSH_AFTER_S:
                results.grow(len(read))
                stream.extend(read)
                read = []
                sent_at = now
    finally:
        # Also where the input raises: what was read before runs, as it does in the standard library.
        results.grow(len(read))
        stream.extend(read)
        stream.seal()
    results.attach(stream.job)


def iterate(results: MapResults, deadline: float | None, chunked: bool,
             read_one: Callable[[], None] | None = None) -> Iterator[Any]:
    items = results.items
    try:
        while True:
            if read_one is not None and results.open:
                read_one()
            if not items and not results.wait(deadline):
                return
            if type(items[0]) is _Raise:
                raise items.popleft().error
            # What is yielded is never held by a name here, so that it ends with the caller's last reference.
            if chunked:
                chunk = items.popleft()
                chunk.reverse()
                while chunk:
                    yield chunk.pop()
            else:
                yield items.popleft()
    finally:
        results.close()
