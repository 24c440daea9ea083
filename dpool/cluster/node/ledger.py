"""Keeps account of the batches that a node was given for a group: which wait, which workers have, which are lost.

Some wait for objects that are still on their way, the others for room in the workers' socket.

Pure: reads no clock and no socket; what workers claim to be in, and whether their socket is empty, are arguments.
Called by node/part.py and node/batches.py.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

# A batch that no worker is in is given up as lost after a worker's death if it still is in none after this time.
# Longer than a worker needs from taking a message off the socket to saying so.
LOST_AFTER_S = 0.1

Message = TypeVar("Message")


class Ledger(Generic[Message]):
    """The books about one part's batches. `Message` is what is handed to a worker."""

    def __init__(self) -> None:
        self.handed: dict[int, int] = {}  # batch -> its tasks; in the order in which they went into the socket
        self.parked: dict[int, tuple[int, Message]] = {}  # batch -> its tasks; objects that it needs are not here yet
        self.waiting: deque[tuple[int, int, Message]] = deque()  # the socket was full
        self._suspects: dict[int, float] = {}  # batch -> when to decide whether it is lost
        self._out: set[int] = set()  # suspects that were in no worker and not in the socket when last looked at
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
        self._acquit(batch)

    def reported(self, batch: int, count: int, done: bool) -> None:
        """A worker has reported so many tasks, and perhaps left the batch."""
        self.tasks_done += count
        if done:
            self.handed.pop(batch, None)
            self._acquit(batch)

    def died(self, batch: int, claimed: dict[int, int], now: float) -> None:
        """A worker has ended, in `batch` or in none (0): it may have taken another and not said so yet."""
        self.handed.pop(batch, None)
        self._acquit(batch)
        for number in self.handed:
            if number not in claimed:
                self._suspects.setdefault(number, now + LOST_AFTER_S)

    @property
    def deadline(self) -> float | None:
        """When to ask lost() next."""
        return min(self._suspects.values(), default=None)

    def lost(self, claimed: dict[int, int], unread: bool, now: float) -> list[int]:
        """The batches that no worker has begun and none will. `unread`: something is still in the socket."""
        due = [batch for batch, when in self._suspects.items() if when <= now]
        if not due:
            return []
        order = {batch: index for index, batch in enumerate(self.handed)}
        # Messages leave the socket in the order in which they went in.
        latest = max((order[batch] for batch in claimed if batch in order), default=-1)
        lost = []
        for batch in due:
            if batch in claimed or batch not in order:
                self._acquit(batch)
            elif unread and order[batch] > latest:
                self._suspects[batch] = now + LOST_AFTER_S  # it may be in there
                self._out.discard(batch)
            elif batch not in self._out:
                self._suspects[batch] = now + LOST_AFTER_S  # a worker may have taken it just now
                self._out.add(batch)
            else:
                self._acquit(batch)
                lost.append(batch)
        for batch in lost:
            del self.handed[batch]
        return lost

    def _acquit(self, batch: int) -> None:
        self._suspects.pop(batch, None)
        self._out.discard(batch)

    @property
    def running(self) -> int:
        """Tasks that were handed over and whose batch is not done."""
        return sum(self.handed.values())

    def validate(self) -> None:
        """Raise AssertionError unless the books agree. For tests."""
        assert self._out <= set(self._suspects) <= set(self.handed)
        waiting = {number for number, _, _ in self.waiting}
        assert not waiting & set(self.handed) and not self.parked.keys() & (waiting | set(self.handed))
