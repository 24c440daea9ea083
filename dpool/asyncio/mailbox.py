"""Carries outcomes from the groups' I/O threads into an event loop, many with one wake-up.

One mailbox a loop, shared by all pools. post() may be called from any thread; delivery happens in the loop, which is
never polled and never waited for.
"""

from __future__ import annotations

import weakref
from collections import deque

TYPE_CHECKING = False
if TYPE_CHECKING:
    from asyncio import AbstractEventLoop
    from typing import Any, Protocol

    class Addressee(Protocol):
        def deliver(self, first: int, values: Any) -> None: ...


class Mailbox:
    """The outcomes that wait for one loop."""

    __slots__ = ("_loop", "_posted", "_woken")

    def __init__(self, loop: AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)  # the table of mailboxes must not keep loops alive
        self._posted: deque[tuple[Addressee, int, Any]] = deque()
        self._woken = False

    def post(self, addressee: Addressee, first: int, values: Any) -> None:
        """Have `addressee.deliver(first, values)` called in the loop; forgotten if the loop is closed by then."""
        self._posted.append((addressee, first, values))
        # Read after the append, and set to False before anything is taken out: one of the two threads sees the other.
        if not self._woken:
            self._woken = True
            loop = self._loop()
            try:
                if loop is not None:
                    loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:  # closed: nobody waits any more
                self._posted.clear()

    def _deliver(self) -> None:
        self._woken = False
        posted = self._posted
        # No more than there are now: what comes in meanwhile wakes the loop again, which may have other work.
        for _ in range(len(posted)):
            addressee, first, values = posted.popleft()
            addressee.deliver(first, values)


_mailboxes: weakref.WeakKeyDictionary[AbstractEventLoop, Mailbox] = weakref.WeakKeyDictionary()


def mailbox_of(loop: AbstractEventLoop) -> Mailbox:
    """The loop's mailbox. Call it in the loop."""
    mailbox = _mailboxes.get(loop)
    if mailbox is None:
        mailbox = _mailboxes[loop] = Mailbox(loop)
    return mailbox
