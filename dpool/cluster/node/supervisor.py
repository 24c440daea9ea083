"""Decides how many workers a group should have now, and when to give up starting them.

Counts only; starts, stops and waits for nothing, and reads no clock. Called by driver/group.py when workers start and
end.
"""

from __future__ import annotations

# Workers that end one after the other before any of them was ready. More: rides out a machine that is briefly out of
# memory. Fewer: a worker that cannot start is reported sooner.
MAX_FAILED_STARTS = 10


class Supervisor:
    """The books about a group's workers: `living` slots, and how many there should be."""

    def __init__(self, most: int, on_demand: bool) -> None:
        self.most = most
        self.wanted = 0 if on_demand else most
        self.living: set[int] = set()
        self.failed_starts = 0
        self.closing = False

    def demand(self, queued: int, inflight: int) -> None:
        """There is work: want as many workers as have something to do, up to `most`; never fewer than before."""
        self.wanted = max(self.wanted, min(self.most, queued + inflight))

    def to_start(self) -> list[int]:
        """The slots that should get a worker now; they count as living from here on."""
        if self.closing:
            return []
        missing = self.wanted - len(self.living)
        slots = [slot for slot in range(self.most) if slot not in self.living][:max(missing, 0)]
        self.living.update(slots)
        return slots

    def ended(self, slot: int, was_ready: bool) -> None:
        """The worker of a slot has ended; `was_ready` says whether its initializer had returned."""
        self.living.discard(slot)
        self.failed_starts = 0 if was_ready else self.failed_starts + 1

    @property
    def hopeless(self) -> bool:
        """Starting more workers would be no use."""
        return self.failed_starts >= MAX_FAILED_STARTS

    def validate(self) -> None:
        """Raise AssertionError unless the books agree. For tests."""
        assert self.living <= set(range(self.most))
        assert 0 <= self.wanted <= self.most
