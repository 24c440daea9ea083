"""Waits that a Ctrl-C ends, whenever it comes, and conditions that it leaves whole.

The standard library's Condition is taken and let go by functions written in Python, and a Ctrl-C between two lines of
those leaves it held for ever: by a result that the whole pool's thread then waits to tell of. And a signal that comes
just before a thread goes to sleep does not wake it. Used by the doors, and by the workers' port.
"""

from __future__ import annotations

import _thread
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    import threading
    from typing import Any

# Python looks for signals before it waits, and the system wakes it for those that come while it does. One in between is
# noticed by looking again, this often. Longer: such a Ctrl-C seems to do nothing for longer. Shorter: programs that
# wait wake for nothing.
LOOK_EVERY_S = 1.0


def acquire(lock: Any, timeout: float | None = None) -> bool:
    """Acquire a lock that somebody else will release; False if `timeout` seconds pass first."""
    if timeout is None:
        while not lock.acquire(timeout=LOOK_EVERY_S):
            pass
        return True
    end = time.monotonic() + timeout
    while not lock.acquire(timeout=min(max(timeout, 0), LOOK_EVERY_S)):
        timeout = end - time.monotonic()
        if timeout <= 0:
            return False
    return True


def join(thread: threading.Thread, timeout: float | None = None) -> bool:
    """Wait for the end of a thread; False if `timeout` seconds pass first."""
    if timeout is not None:
        thread.join(timeout)
    else:
        while thread.is_alive():
            thread.join(LOOK_EVERY_S)
    return not thread.is_alive()


class Condition(_thread.RLock):  # type: ignore[misc]  # it may be inherited from, whatever its stub says
    """A threading.Condition that is its own lock, so that a `with` statement takes it and lets it go in one step each.
    """

    __slots__ = ("_waiters",)

    def __init__(self) -> None:
        self._waiters: list[Any] = []  # a lock of each thread that waits, which is released to wake it

    def wait(self, timeout: float | None = None) -> bool:
        """Let go of the condition until notified; False if `timeout` seconds pass first. It is held again then, and so
        it is when a Ctrl-C is raised here."""
        if not self._is_owned():  # type: ignore[attr-defined]
            raise RuntimeError("cannot wait on un-acquired lock")
        waiter = _thread.allocate_lock()
        waiter.acquire()
        state: Any = None
        try:
            try:
                self._waiters.append(waiter)
                state = self._release_save()  # type: ignore[attr-defined]
                return acquire(waiter, timeout)
            finally:
                self._retake(state, waiter)
        finally:
            self._retake(state, waiter)  # again, for a Ctrl-C may have come in the midst of it

    def _retake(self, state: Any, waiter: Any) -> None:
        if not self._is_owned():  # type: ignore[attr-defined]
            if state is None:  # a Ctrl-C has come before it was noted
                self.acquire()
            else:
                self._acquire_restore(state)  # type: ignore[attr-defined]
        if waiter in self._waiters:
            self._waiters.remove(waiter)

    def notify(self, n: int = 1) -> None:
        """Wake `n` of those that wait."""
        if not self._is_owned():  # type: ignore[attr-defined]
            raise RuntimeError("cannot notify on un-acquired lock")
        for _ in range(min(n, len(self._waiters))):
            self._waiters.pop(0).release()

    def notify_all(self) -> None:
        """Wake all that wait."""
        self.notify(len(self._waiters))
