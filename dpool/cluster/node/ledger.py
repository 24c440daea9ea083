"""Keeps account of the batches that a node was given for a group: which wait, which workers have, which are lost.

Some wait for objects that are still on their way, the others for room in the workers' socket.

Pure: reads no clock and no socket; what workers claim to be in, and whether their socket is empty, are arguments.
Called by node/part.py and node/batches.py.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

from dpool.cluster.suspects import OUT, SAFE, WAITS, Suspects

Message = TypeVar("Message")


class Ledger(Generic[Message]):
    """The books about one part's batches. `Message` is what is handed to a worker."""

    def __init__(self) -> None:
        self.handed: dict[int, int] = {}  # batch -> its tasks; in the order in which they went into the socket
        self.parked: dict[int, tuple[int, Message]] = {}  # batch -> its tasks; objects that it needs are not here yet
        self.waiting: deque[tuple[int, int, Message]] = deque()  # the socket was full
        self._suspects = Suspects()
        self.tasks_done = 0

    def add(self, batch: int, tasks: int, message: Message) -> None:
        """A batch has come; it waits until next() hands it over."""
        self.waiting.append((batch, tasks, message))

    def park(self, batch: int, tasks: int, message: Message) -> None:
        """A batch has come that cannot run yet; it waits until unpark() is called."""
        self.parked[batch] = tasks, message

    def unpark(self, batch: int) -> None:
        """It can run now: before those that were sent after it and still wait."""
        tasks, message = self.parked.pop(batch)
        index = next((index for index, (other, _, _) in enumerate(self.waiting) if other > batch), len(self.waiting))
        self.waiting.insert(index, (batch, tasks, message))

    def next(self) -> Message | None:
        """What to put into the socket next; call handed_over() if it went in."""
        return self.waiting[0][2] if self.waiting else None

    def handed_over(self) -> None:
        batch, tasks, _ = self.waiting.popleft()
        self.handed[batch] = tasks

    def take_back(self, batch: int) -> Message | None:
        """A batch that waits does so no longer; None if it is not waiting."""
        for index, (number, _, message) in enumerate(self.waiting):
            if number == batch:
                del self.waiting[index]
                return message
        return None

    def taken(self, batch: int) -> None:
        """A batch was taken from the socket before a worker had it."""
        self.handed.pop(batch, None)
        self._suspects.acquit(batch)

    def reported(self, batch: int, count: int, done: bool) -> None:
        """A worker has reported so many tasks, and perhaps left the batch."""
        self.tasks_done += count
        if done:
            self.handed.pop(batch, None)
            self._suspects.acquit(batch)

    def died(self, batch: int, claimed: dict[int, int], now: float) -> None:
        """A worker has ended, in `batch` or in none (0): it may have taken another and not said so yet."""
        self.handed.pop(batch, None)
        self._suspects.acquit(batch)
        self._suspects.add((number for number in self.handed if number not in claimed), now)

    @property
    def deadline(self) -> float | None:
        """When to ask lost() next."""
        return self._suspects.deadline

    def lost(self, claimed: dict[int, int], unread: bool, now: float) -> list[int]:
        """The batches that no worker has begun and none will. `unread`: something is still in the socket."""
        order = {batch: index for index, batch in enumerate(self.handed)}
        # Messages leave the socket in the order in which they went in.
        latest = max((order[batch] for batch in claimed if batch in order), default=-1)

        def where(batch: int) -> str:
            if batch in claimed:
                return SAFE
            return WAITS if unread and order[batch] > latest else OUT

        lost = self._suspects.lost(where, now)
        for batch in lost:
            del self.handed[batch]
        return lost

    @property
    def running(self) -> int:
        """Tasks that were handed over and whose batch is not done."""
        return sum(self.handed.values())

    def validate(self) -> None:
        """Raise AssertionError unless the books agree. For tests."""
        self._suspects.validate(self.handed)
        waiting = {number for number, _, _ in self.waiting}
        assert not waiting & set(self.handed) and not self.parked.keys() & (waiting | set(self.handed))
