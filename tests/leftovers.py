"""Owns the count of what a test leaves behind: processes, threads and descriptors of this process; strangers by a mark.

It ends nothing and prints nothing. Used by the tests of real processes.
"""

from __future__ import annotations

import gc
import os
import select
import threading
import time
import uuid
from collections.abc import Iterable

# Long enough for any machine that is merely busy: only a hang takes longer.
PATIENCE_S = 60.0
# Within which nothing may be left after a SIGKILL. An idle machine needs milliseconds, the promise is a second, and the
# rest is for the scheduler of a machine that is not idle.
GONE_S = 5.0

MARK = "DPOOL_TEST_MARK"


def new_mark() -> str:
    """A value for the variable MARK in a program's environment, by which its descendants are found."""
    return uuid.uuid4().hex


def marked(mark: str) -> set[int]:
    """The processes, zombies excepted, that inherited this mark, wherever in the tree they are now."""
    entry = f"{MARK}={mark}".encode()
    found: set[int] = set()
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/environ", "rb") as file:
                    if entry in file.read().split(b"\0"):
                        found.add(int(name))
            except OSError:  # gone meanwhile
                continue
    return found


class Watched:
    """Processes by pidfd: whether they have ended is asked without races of numbers that are used again."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._poll = select.poll()
        self._pidfds: dict[int, int] = {}
        for pid in pids:
            try:
                descriptor = os.pidfd_open(pid)
            except ProcessLookupError:
                continue
            self._pidfds[descriptor] = pid
            self._poll.register(descriptor, select.POLLIN)

    def left_after(self, seconds: float) -> list[str]:
        """Wait for the end of all; the command lines of those that live on after `seconds`. Closes the pidfds."""
        deadline = time.monotonic() + seconds
        try:
            while self._pidfds:
                ready = self._poll.poll(max(deadline - time.monotonic(), 0) * 1000)
                if not ready:
                    break
                for descriptor, _ in ready:
                    self._poll.unregister(descriptor)
                    os.close(descriptor)
                    del self._pidfds[descriptor]
            return [f"{pid}: {_command_line(pid)}" for pid in self._pidfds.values()]
        finally:
            for descriptor in self._pidfds:
                os.close(descriptor)
            self._pidfds.clear()


def _command_line(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return "?"


def read_line(descriptor: int) -> str:
    """The next line of a pipe, or what comes before its end; no byte more. Only a hang takes PATIENCE_S."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    deadline = time.monotonic() + PATIENCE_S
    line = b""
    while not line.endswith(b"\n"):
        assert poll.poll(max(deadline - time.monotonic(), 0) * 1000), f"nothing comes after {line!r}"
        byte = os.read(descriptor, 1)
        if not byte:
            break
        line += byte
    return line.decode()


def children() -> set[int]:
    """The children of this process, zombies included, but for multiprocessing's own two services."""
    found: set[int] = set()
    for name in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{name}/children") as file:
                found.update(map(int, file.read().split()))
        except OSError:
            continue
    return found - _services()


def _services() -> set[int]:
    from multiprocessing import forkserver, resource_tracker

    pids = (forkserver._forkserver._forkserver_pid,  # type: ignore[attr-defined]
            resource_tracker._resource_tracker._pid)  # type: ignore[attr-defined]
    return {pid for pid in pids if pid is not None}


def identity(descriptor: int) -> tuple[int, int]:
    """Of what it is a descriptor of."""
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


def descriptors() -> dict[int, str]:
    """The open descriptors of this process and what they are, but for segments that the store keeps warm."""
    from dpool.cluster.store import store

    # By inode: a mapping of Python's has a descriptor of its own.
    with store.current()._lock:
        kept = {identity(segment.descriptor) for segment in store.current()._segments.values()}
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            if identity(int(name)) not in kept:
                found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:  # the descriptor of the listing itself
            continue
    return found


class Census:
    """What there is now; check() says what has come since."""

    def __init__(self) -> None:
        from multiprocessing import forkserver, resource_tracker

        # They are started once and stay, whoever asks first.
        forkserver.ensure_running()
        resource_tracker.ensure_running()
        gc.collect()
        self._children = children()
        self._threads = set(threading.enumerate())
        self._descriptors = set(descriptors().items())

    def check(self) -> None:
        """Raise AssertionError if there are more processes, threads or descriptors than there were."""
        gc.collect()
        assert not children() - self._children, "processes are left"
        threads = set(threading.enumerate()) - self._threads
        for thread in threads:
            thread.join(PATIENCE_S)  # those that end are merely slow to be gone
        assert not [thread for thread in threads if thread.is_alive()], "threads are left"
        gc.collect()  # what they held in circles goes with them
        new = [what for number, what in set(descriptors().items()) - self._descriptors]
        assert not new, f"descriptors are left: {new}"
