"""A thread that polls a port in place of its group's own, so that calls to what is lent are answered at any time.

The group's I/O thread runs callbacks of the user's, and one of those may wait for a lock that a worker has: the
worker's release must not wait for the callback. Made by driver/remote.py for groups that lend something; decides
nothing.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from dpool.cluster.wire.links import Waker

Events = Sequence[tuple[int, Any, list[int]]]


class Pump:
    """`turn` is one turn of the port, `wake` ends its waiting; `count` is how many workers there are after it. Used by
    the group's I/O thread, but for wake()."""

    def __init__(self, turn: Callable[[float | None], Events], wake: Callable[[], None], count: Callable[[], int],
                 waker: Waker) -> None:
        self._turn = turn
        self._wake = wake
        self._count = count
        self._waker = waker
        self._news: deque[tuple[Events, int]] = deque()
        self._failed: BaseException | None = None
        self._ending = False
        # How many workers there are as far as poll() has told: one that has died counts until its death is told.
        self.count = count()
        self._thread = threading.Thread(target=self._run, name="dpool-pump", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        count = self.count
        try:
            while not self._ending:
                events = self._turn(None)
                before, count = count, self._count()
                if events or count != before:
                    self._news.append((events, count))
                    self._waker.wake()
        except BaseException as error:  # a bug of dpool's: the group's thread says so
            self._failed = error
            self._waker.wake()

    def poll(self, timeout: float | None) -> Events:
        """What has happened; waits for it up to `timeout` seconds. Raises what has ended the thread."""
        if not self._news:
            self._waker.wait(timeout)
        events: list[tuple[int, Any, list[int]]] = []
        while self._news:
            some, self.count = self._news.popleft()
            events += some
        if self._failed is not None and not events:
            raise self._failed
        return events

    def wake(self) -> None:
        """Make the current or next poll() return. Any thread may."""
        self._waker.wake()

    def stop(self) -> None:
        """End the thread, and wait for its end. May be called again."""
        self._ending = True
        self._wake()
        self._thread.join()
        self._waker.close()
