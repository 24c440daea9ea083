"""Simulated time: events in order, and processes whose threads run when something wakes them.

Owns the one clock and the one random of a history; knows no message. Everything else here is built on it.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from random import Random

# Turns of one thread, one after the other, for which it neither waited nor got anything.
MAX_IDLE_TURNS = 200
# Turns of one thread within a second: more than any amount of news explains.
MAX_TURNS_A_SECOND = 30_000
# Lines of the trace that are kept.
TRACE_LINES = 100_000


class Violation(AssertionError):
    """A history in which something is wrong."""


class World:
    """The clock, the events to come, the random, and what has happened."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.now = 0.0
        self.events = 0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._counter = 0
        self.trace: deque[tuple[float, str]] = deque(maxlen=TRACE_LINES)
        self.ids = 0

    def at(self, when: float, what: Callable[[], None]) -> None:
        self._counter += 1
        heapq.heappush(self._heap, (max(when, self.now), self._counter, what))

    def after(self, delay: float, what: Callable[[], None]) -> None:
        self.at(self.now + delay, what)

    def say(self, text: str) -> None:
        self.trace.append((self.now, text))

    def new_id(self) -> bytes:
        self.ids += 1
        return self.ids.to_bytes(16, "big")

    def end(self) -> None:
        """Forget what was still to come."""
        self._heap.clear()

    def run(self, until: float, finished: Callable[[], bool]) -> bool:
        """Until `finished`, looked at after each event, or that time; whether it is finished."""
        heap = self._heap
        while not finished():
            if not heap or heap[0][0] > until:
                self.now = until
                return False
            self.now, _, what = heapq.heappop(heap)
            self.events += 1
            what()
        return True


class Source:
    """A descriptor: readable or not, and who waits for it, perhaps for room as well."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.ready = False
        self.wants_room = False
        self.has_room: Callable[[], bool] = lambda: False
        self.waker: Waker | None = None

    def rise(self) -> None:
        self.ready = True
        if self.waker is not None:
            self.waker.nudge()

    def room_came(self) -> None:
        if self.waker is not None and self.told:
            self.waker.nudge()

    @property
    def told(self) -> bool:
        """Whether a wait ends for it."""
        return self.ready or (self.wants_room and self.has_room())


class Process:
    """A process on a host: its threads run while it lives and is not stopped. Its clock started at its own time."""

    def __init__(self, world: World, host: str, name: str) -> None:
        self.world = world
        self.host = host
        self.name = name
        self.alive = True
        self.frozen = False
        self.threads: list[Thread] = []
        self.offset = 100.0 + world.random.random() * 1000
        self.lag = 0.0002  # how long it may take to wake up

    def now(self) -> float:
        return self.world.now + self.offset

    def freeze(self) -> None:
        self.frozen = True

    def thaw(self) -> None:
        self.frozen = False
        for thread in self.threads:
            thread.wake(0.0)

    def die(self) -> None:
        self.alive = False


class Thread:
    """Calls `step` again and again, as a loop would: when its waker says that there is something, or its time is up.

    `step` returns False when the loop ends.
    """

    def __init__(self, process: Process, name: str, step: Callable[[], bool], waker: Waker) -> None:
        self.process = process
        self.world = process.world
        self.name = name
        self.waker = waker
        self.ended = False
        self._step = step
        self._due = -1.0  # when the next turn is, if there is one to come
        self._idle_turns = 0
        self._turns = 0
        self._turns_since = 0.0
        waker.thread = self
        process.threads.append(self)
        self.wake(0.0)

    def wake(self, delay: float) -> None:
        """Have the next turn in so long at the latest."""
        when = self.world.now + delay
        if self._due < 0 or when < self._due:
            self._due = when
            self.world.at(when, lambda: self._turn(when))

    def _turn(self, when: float) -> None:
        process = self.process
        if self._due != when or self.ended or not process.alive:
            return
        self._due = -1.0
        if process.frozen:
            return
        waker, world = self.waker, self.world
        waker.waited = False
        self._count_turn()
        if not self._step():
            self.ended = True
            return
        if not waker.waited or waker.woke or waker.timeout == 0:
            self._idle_turns = 0 if not waker.waited or waker.woke else self._idle_turns + 1
            if self._idle_turns > MAX_IDLE_TURNS:
                raise Violation(f"{self.name} spins: it takes turn after turn in which nothing comes")
            self.wake(world.random.random() * 0.00005)
        elif waker.timeout is not None:
            self.wake(max(waker.timeout, 0.0) + 0.000001)
        if waker.any_ready():
            waker.nudge()

    def _count_turn(self) -> None:
        if self.world.now - self._turns_since > 1.0:
            self._turns, self._turns_since = 0, self.world.now
        self._turns += 1
        if self._turns > MAX_TURNS_A_SECOND:
            raise Violation(f"{self.name} spins: it is told again and again of what it does not take")


class Waker:
    """Stands for links.Waker; wait() returns at once and notes how long it would have waited."""

    def __init__(self, process: Process, sources: dict[int, Source]) -> None:
        self.process = process
        self.thread: Thread | None = None
        self.timeout: float | None = None
        self.waited = self.woke = False
        self._sources = sources
        self._watched: dict[int, Source] = {}
        self._rung = False

    def add(self, descriptors: list[int]) -> None:
        for number in descriptors:
            source = self._sources.get(number)
            if source is not None:  # else a real one, with nothing at its other end
                source.waker = self
                self._watched[number] = source
                if source.told:
                    self.nudge()

    def want_room(self, number: int, wanted: bool) -> None:
        source = self._watched[number]
        source.wants_room = wanted
        if source.told:
            self.nudge()

    def remove(self, descriptors: list[int]) -> None:
        for number in descriptors:
            source = self._watched.pop(number, None)
            if source is not None:
                source.waker = None

    def wake(self) -> None:
        self._rung = True
        self.nudge()

    def nudge(self) -> None:
        thread, process = self.thread, self.process
        if thread is not None and process.alive and not process.frozen:
            thread.wake(process.world.random.random() * process.lag)

    def any_ready(self) -> bool:
        return self._rung or any(source.told for source in self._watched.values())

    def wait(self, timeout: float | None) -> set[int]:
        ready = {number for number, source in self._watched.items() if source.told}
        self.waited = True
        self.woke = bool(ready) or self._rung
        self._rung = False
        self.timeout = None if timeout is None else max(timeout, 0.0)
        return ready

    def close(self) -> None:
        self.remove(list(self._watched))
