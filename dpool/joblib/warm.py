"""Worker groups that outlive the call that opened them, for the next call that wants the same.

Owns every group of the backend: hands each to one call at a time, and ends those that idle too long, that were aborted,
or that are left at exit. Runs no task. Used by backend.py.
"""

from __future__ import annotations

import os
import threading
import time
from multiprocessing import util

from dpool import session, waiting
from dpool.resources import Lacking

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from dpool.engine import GroupSpec

# Groups that are kept idle. More: programs that alternate between kinds of calls never wait. Fewer: less memory.
MAX_IDLE = 2
# How long an idle group is kept. Longer: later calls find it. Shorter: its memory is given back sooner.
IDLE_TIMEOUT_S = 300.0
# How long an aborted call's tasks may take to end by themselves before their workers are killed. Longer: workers stay
# warm for the next call. Shorter: the machine is free sooner.
ABORT_GRACE_S = 0.1
# How long the interpreter's exit waits for workers that do not die.
EXIT_TIMEOUT_S = 5.0


class Warm:
    """One group, and what a call must want to be given it."""

    __slots__ = ("group", "engine", "key", "workers", "idle_timeout_s", "deadline", "pid")

    def __init__(self, group: Any, engine: Any, key: tuple[Any, ...], workers: int, idle_timeout_s: float) -> None:
        self.group = group
        self.engine = engine
        self.key = key
        self.workers = workers
        self.idle_timeout_s = idle_timeout_s
        self.deadline = 0.0  # when to end it, while it is idle or drains
        self.pid = os.getpid()


class Shelf:
    """The groups of this process: idle, draining, or lent to a call."""

    def __init__(self) -> None:
        # Guards the collections. Held for bookkeeping only, never while a group is opened or ended.
        self._changed = waiting.Condition()
        self._idle: list[Warm] = []  # the longest idle first
        self._draining: list[Warm] = []
        self._lent: set[Warm] = set()
        self._janitor: threading.Thread | None = None
        self._at_exit: Any = None

    @property
    def idle(self) -> list[Warm]:
        """The groups that wait for a call, the longest idle first."""
        return list(self._idle)

    @property
    def lent_workers(self) -> int:
        """Workers of the groups that are lent to calls now."""
        return sum(warm.workers for warm in list(self._lent))

    def take(self, key: tuple[Any, ...], spec: GroupSpec, idle_timeout_s: float) -> Warm:
        """A group for one call: an idle one that was opened for an equal key, or a new one. Raises what opening one
        raises."""
        engine = session.current()
        with self._changed:
            warm = self._find(key, engine)
            if warm is not None:
                self._idle.remove(warm)
                self._lent.add(warm)
                warm.idle_timeout_s = idle_timeout_s
                return warm
            if self._at_exit is None:
                # Before multiprocessing's own, which ends all children one by one.
                self._at_exit = util.Finalize(None, self.clear, exitpriority=20)
        if spec.resources and hasattr(engine, "cpus"):
            self._end_idle()  # a cluster would wait for what they have
        try:
            group = engine.open_group(spec)
        except Lacking:
            if not self._end_idle():  # which may have what this one needs
                raise
            group = engine.open_group(spec)
        warm = Warm(group, engine, key, spec.processes, idle_timeout_s)
        with self._changed:
            self._lent.add(warm)
        return warm

    def _find(self, key: tuple[Any, ...], engine: Any) -> Warm | None:
        for warm in reversed(self._idle):
            if warm.key == key and warm.engine is engine:
                return warm
        return None

    def _end_idle(self) -> bool:
        """End the groups that wait for a call, and wait for their end; whether there were any."""
        with self._changed:
            groups = [warm.group for warm in self._idle]
            self._idle.clear()
            self._changed.notify()
        for group in groups:
            group.terminate()
        for group in groups:
            group.join(EXIT_TIMEOUT_S)
        return bool(groups)

    def give_back(self, warm: Warm) -> None:
        """The call has ended, nothing of it is running: keep the group for the next."""
        with self._changed:
            if warm not in self._lent and warm not in self._draining:
                return
            self._forget(warm)
            warm.deadline = time.monotonic() + warm.idle_timeout_s
            self._idle.append(warm)
            surplus = self._idle.pop(0) if len(self._idle) > MAX_IDLE else None
            self._watch()
        if surplus is not None:
            surplus.group.terminate()

    def drain(self, warm: Warm) -> None:
        """The call was aborted: end the group unless it is given back within ABORT_GRACE_S."""
        with self._changed:
            if warm in self._lent:
                self._lent.remove(warm)
                warm.deadline = time.monotonic() + ABORT_GRACE_S
                self._draining.append(warm)
                self._watch()

    def drop(self, warm: Warm) -> None:
        """The group is of no use any more."""
        with self._changed:
            self._forget(warm)
            self._changed.notify()
        warm.group.terminate()

    def _forget(self, warm: Warm) -> None:
        self._lent.discard(warm)
        for shelf in (self._idle, self._draining):
            if warm in shelf:
                shelf.remove(warm)

    def _watch(self) -> None:
        """See to it that deadlines are met. Called with the lock held."""
        if self._janitor is None:
            self._janitor = threading.Thread(target=self._keep_deadlines, name="dpool-joblib-idle", daemon=True)
            self._janitor.start()
        else:
            self._changed.notify()

    def _keep_deadlines(self) -> None:
        """The janitor's thread: lives while there is a group to watch."""
        while True:
            with self._changed:
                now = time.monotonic()
                watched = [*self._idle, *self._draining]
                due = [warm for warm in watched if warm.deadline <= now]
                for warm in due:
                    self._forget(warm)
                if not due:
                    if not watched:
                        self._janitor = None
                        return
                    self._changed.wait(min(warm.deadline for warm in watched) - now)
            for warm in due:
                warm.group.terminate()

    def clear(self) -> None:
        """End every group of this process, and wait until its workers have ended, EXIT_TIMEOUT_S at most for each."""
        with self._changed:
            janitor = self._janitor
            every = [*self._idle, *self._draining, *self._lent]
            self._idle.clear()
            self._draining.clear()
            self._lent.clear()
            self._changed.notify()
        groups = [warm.group for warm in every if warm.pid == os.getpid()]
        for group in groups:
            group.terminate()
        for group in groups:
            group.join(EXIT_TIMEOUT_S)
        if janitor is not None:
            janitor.join(EXIT_TIMEOUT_S)


shelf = Shelf()


def _start_anew() -> None:
    global shelf
    shelf = Shelf()  # the groups are the parent's


os.register_at_fork(after_in_child=_start_anew)
