"""Decides which batches went with a worker: taken from the socket by one that ended before it could say so.

Pure: reads no clock and no socket; where a batch is, as far as can be seen, is asked of the caller. Used by
driver/group.py for workers of its own machine, and by node/ledger.py for those of another machine's driver.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

# A batch is given up as lost after a worker's death if it is in no worker and not in the socket when it is looked at
# after this time, and again after as much: between the two looks a worker that has it says so. Longer than a worker
# needs from taking a message off the socket to that.
LOST_AFTER_S = 0.1

# Where a batch is.
SAFE = "safe"  # a worker is in it; or it is none of those that any worker could have taken
WAITS = "waits"  # perhaps still in the socket
OUT = "out"  # in neither


class Suspects:
    """The batches that may have gone with a worker, until it is known."""

    def __init__(self) -> None:
        self._due: dict[int, float] = {}  # batch -> when it is looked at
        self._out: set[int] = set()  # those that were OUT when last looked at

    def add(self, batches: Iterable[int], now: float) -> None:
        """A worker has ended that may have taken one of these."""
        for batch in batches:
            self._due.setdefault(batch, now + LOST_AFTER_S)

    def acquit(self, batch: int) -> None:
        """It has been heard of."""
        self._due.pop(batch, None)
        self._out.discard(batch)

    def clear(self) -> None:
        self._due.clear()
        self._out.clear()

    @property
    def deadline(self) -> float | None:
        """When to ask lost() next; None if there are none."""
        return min(self._due.values(), default=None)

    def lost(self, where: Callable[[int], str], now: float) -> list[int]:
        """Those that no worker has and none will have."""
        lost = []
        for batch in [batch for batch, when in self._due.items() if when <= now]:
            place = where(batch)
            if place == SAFE:
                self.acquit(batch)
            elif place == OUT and batch in self._out:
                self.acquit(batch)
                lost.append(batch)
            else:
                self._due[batch] = now + LOST_AFTER_S
                (self._out.add if place == OUT else self._out.discard)(batch)
        return lost

    def validate(self, known: Collection[int]) -> None:
        """Raise AssertionError unless the books agree, and none but these are suspected. For tests."""
        assert self._out <= self._due.keys() <= set(known)
