"""Which batches went with a worker that died: the machine beside a model of the socket, and a group beside a port that
does as it is told.

Starts no process and no thread.
"""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dpool.cluster.driver.dispatch import LEAVING, Batch, Dispatch, Job, Timing
from dpool.cluster.driver.group import Group
from dpool.cluster.suspects import LOST_AFTER_S, OUT, SAFE, WAITS, Suspects
from dpool.cluster.wire import events, frames
from dpool.cluster.wire.death import Death
from dpool.engine import CALL, GroupSpec


def test_two_looks_in_a_row_are_needed() -> None:
    suspects = Suspects()
    suspects.add([7], 0.0)
    for now, place, found in [(0.05, OUT, []), (0.11, OUT, []), (0.15, OUT, []), (0.22, WAITS, []), (0.33, OUT, []),
                              (0.44, OUT, [7])]:
        assert suspects.lost(lambda batch, place=place: place, now) == found  # type: ignore[misc]
        suspects.validate([7])
    assert suspects.deadline is None


def test_what_is_heard_of_is_not_lost() -> None:
    suspects = Suspects()
    suspects.add([7, 8, 9], 0.0)
    assert suspects.lost(lambda batch: OUT, 0.11) == []
    suspects.acquit(7)
    suspects.add([8], 0.15)  # once more: it is looked at no later
    assert suspects.lost(lambda batch: SAFE if batch == 9 else OUT, 0.22) == [8]
    assert suspects.deadline is None


class Worker:
    """It takes a batch from the socket, then says so."""

    def __init__(self) -> None:
        self.batch: Batch | None = None
        self.claims = False


class DyingWorkers(RuleBasedStateMachine):
    """Two threads send, workers take, say so, finish and die; now and then the group looks. A worker that lives says
    what it has taken before the group looks again."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.dispatch = Dispatch(workers=8)
        self.suspects = Suspects()
        self.taken_out: list[Batch] = []  # by a thread that has not sent them yet
        self.socket: deque[Batch] = deque()
        self.workers = [Worker() for _ in range(3)]
        self.dead_with: set[int] = set()
        self.settled: set[int] = set()

    @precondition(lambda self: len(self.taken_out) < 2)
    @rule()
    def take_out(self) -> None:
        self.dispatch.add(Job("f", Timing(), CALL, (((1,), {}),), None, asks_start=True))  # type: ignore[arg-type]
        batch = self.dispatch.next_batch(self.now)
        if batch is not None:
            self.taken_out.append(batch)

    @precondition(lambda self: self.taken_out)
    @rule(last=st.booleans(), said=st.booleans())
    def send(self, last: bool, said: bool) -> None:
        """The one that was taken out first may leave last."""
        batch = self.taken_out.pop(-1 if last else 0)
        batch.stage = LEAVING
        self.socket.append(batch)
        if said:
            self.dispatch.left(batch)

    @precondition(lambda self: self.socket)
    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        idle = [worker for worker in self.workers if worker.batch is None]
        if idle:
            worker = data.draw(st.sampled_from(idle))
            worker.batch, worker.claims = self.socket.popleft(), False

    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        busy = [worker for worker in self.workers if worker.claims]
        if busy:
            worker = data.draw(st.sampled_from(busy))
            assert worker.batch is not None
            self.dispatch.left(worker.batch)
            self.dispatch.report(worker.batch.number, 0, 1)
            self.dispatch.done(worker.batch.number, 1, 1)
            self.settled.add(worker.batch.number)
            worker.batch, worker.claims = None, False

    def claimed(self) -> dict[int, int]:
        return {worker.batch.number: slot for slot, worker in enumerate(self.workers)
                if worker.claims and worker.batch is not None}

    @rule(slot=st.integers(0, 2))
    def die(self, slot: int) -> None:
        worker = self.workers[slot]
        if worker.batch is not None:
            if worker.claims:
                self.dispatch.died(worker.batch.number, 0)
                self.settled.add(worker.batch.number)
            else:
                self.dead_with.add(worker.batch.number)
        self.workers[slot] = Worker()
        claimed = self.claimed()
        self.suspects.add([number for number, batch in self.dispatch.inflight.items()
                           if batch not in self.taken_out and number not in claimed], self.now)

    @rule(seconds=st.sampled_from([0.0, LOST_AFTER_S / 2, LOST_AFTER_S]))
    def look(self, seconds: float) -> None:
        self.now += seconds
        claimed = self.claimed()
        lost = self.suspects.lost(
            lambda number: self.dispatch.where(number, claimed, max(claimed, default=0), bool(self.socket)), self.now)
        for number in lost:
            assert number in self.dead_with, f"batch {number} is given up, and no worker has died with it"
            self.dead_with.discard(number)
            self.dispatch.lost(number)
            self.settled.add(number)
        for worker in self.workers:
            if worker.batch is not None:
                self.dispatch.left(worker.batch)
                worker.claims = True

    @invariant()
    def the_books_agree(self) -> None:
        self.dispatch.validate()
        self.suspects.validate([*self.dispatch.inflight, *self.settled])

    def teardown(self) -> None:
        """In the end all that is taken is finished, and what is lost is known to be."""
        for batch in self.taken_out + list(self.socket):
            self.dispatch.left(batch)
        self.taken_out.clear()
        self.socket.clear()
        for worker in self.workers:
            if worker.batch is not None:
                self.dispatch.inflight.pop(worker.batch.number, None)
                worker.batch, worker.claims = None, False
        for _ in range(4):
            self.now += LOST_AFTER_S
            lost = self.suspects.lost(lambda number: self.dispatch.where(number, (), 0, False), self.now)
            self.dead_with -= set(lost)
        assert not self.dead_with


TestDyingWorkers = DyingWorkers.TestCase
TestDyingWorkers.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)


class ToldPort:
    """The way to two workers that do nothing: what happens to them is in `news`."""

    splits = shares_memory = False
    processes: list[Any] = []
    count = 2

    def __init__(self) -> None:
        self.news: list[tuple[int, Any, list[int]]] = []
        self.sent: list[int] = []
        self.takes = True
        self.interrupted = False

    def send(self, parts: list[bytes], descriptors: list[int]) -> bool:
        if self.interrupted:
            raise KeyboardInterrupt
        if self.takes:
            self.sent.append(frames.TASKS.unpack_from(parts[0])[4])
        return self.takes

    def poll(self, timeout: float | None) -> Sequence[tuple[int, Any, list[int]]]:
        news, self.news = self.news, []
        return news

    def claimed(self) -> dict[int, int]:
        return {}

    def unread(self) -> bool:
        return False

    def stop(self, tasks: list[tuple[int, int]]) -> set[int]:
        return set()

    def start(self, *_: Any) -> None:
        pass

    demand = wake = close_tasks = kill = close = start

    def steal(self, number: int) -> int:
        return 0


class Told:
    """A group over a ToldPort, with a clock that this test turns."""

    hopeless = False
    failed_starts = 0

    def __init__(self) -> None:
        self.time = 0.0
        self.port = ToldPort()
        self.group = Group(GroupSpec(2, multiprocessing.get_context("fork")), self.port, self, lambda: self.time)
        self.failures: list[Any] = []

    def worker_dies(self) -> None:
        """It was in no task, as far as anybody knows; and time goes by."""
        self.port.news.append((events.DEATH, Death(0, 1, -9, 0, 0, True, "", False), []))
        for _ in range(6):
            self.group.step()
            self.time += LOST_AFTER_S

    def start(self) -> bool:
        return True

    def set(self, first: int, values: Sequence[Any]) -> None:
        raise AssertionError("nothing ever returns here")

    def fail(self, index: int, failure: Any) -> None:
        self.failures.append(failure)

    def close(self) -> None:
        """End the group, so that it leaves the store."""
        self.port.count = 0
        self.group.terminate()
        while self.group.step():
            pass


@pytest.fixture
def told() -> Any:
    one = Told()
    yield one
    one.close()


class Pickled:
    """Calls something when it is pickled."""

    def __init__(self, call: Callable[[], None]) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        self.call()
        return int, ()


def test_a_batch_is_not_lost_that_is_still_being_pickled_when_a_worker_dies(told: Told) -> None:
    """It was sent twice: once more, with another number, while the first one was still to leave."""
    told.group.submit(print, (Pickled(told.worker_dies),), {}, told)
    told.worker_dies()
    assert told.port.sent == [1, 2], "what had left when the second worker died was lost with it, and that alone"


def test_a_batch_that_has_left_is_lost_with_the_worker_that_took_it(told: Told) -> None:
    told.group.submit(print, (), {}, told)
    assert told.port.sent == [1]
    told.worker_dies()
    assert told.port.sent == [1, 2] and not told.failures


def test_a_batch_that_could_not_leave_is_not_lost(told: Told) -> None:
    told.port.takes = False
    told.group.submit(print, (), {}, told)
    told.worker_dies()
    told.port.takes = True
    told.group.step()
    assert len(told.port.sent) == 1


def test_a_batch_of_which_ctrl_c_has_hidden_whether_it_left_is_looked_for(told: Told) -> None:
    told.port.interrupted = True
    with pytest.raises(KeyboardInterrupt):
        told.group.submit(print, (), {}, told)
    told.port.interrupted = False
    for _ in range(4):
        told.time += LOST_AFTER_S
        told.group.step()
    assert told.port.sent == [2]
