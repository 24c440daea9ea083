"""Owns the descendants of the runner: adopts those whose parent dies, and ends what a target leaves behind.

It never touches a process that did not begin in this one. Called by runner.py.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """From now on a descendant whose parent dies becomes a child of this process, and not of init."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def descendants(pid: int) -> list[int]:
    """The pids of children, their children and so on; those of processes that end meanwhile may be missing."""
    found: list[int] = []
    for task in _tasks(pid):
        try:
            children = [int(word) for word in Path(task, "children").read_text().split()]
        except OSError:
            continue
        for child in children:
            found += [child, *descendants(child)]
    return found


def _tasks(pid: int) -> list[str]:
    try:
        return [f"/proc/{pid}/task/{name}" for name in os.listdir(f"/proc/{pid}/task")]
    except OSError:
        return []


def end_descendants(within_s: float = 10.0) -> int:
    """Kill and reap every descendant of this process; how many of them were still running."""
    end = time.monotonic() + within_s
    killed: set[int] = set()
    while time.monotonic() < end:
        for pid in descendants(os.getpid()):
            if not _is_zombie(pid):
                killed.add(pid)
                # It is our descendant, so its pid cannot have been given to another process: we have not reaped it,
                # or its parent has not, whom we are about to kill as well.
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
        try:
            # The orphans come to us one generation after the other, and are reaped as they come.
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            break
        time.sleep(0.01)
    return len(killed)


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True
