"""The exceptions that are dpool's own: one tree, so that `except DpoolError` catches them all.

Where the standard library has an exception for a case, the doors raise that. Imports nothing of dpool.
"""

from __future__ import annotations


class DpoolError(Exception):
    """The root of what dpool itself raises."""


class WorkerDied(DpoolError, RuntimeError):
    """The worker process that was running this task ended before the task did.

    The task is not run again unless the group was opened with retries; the worker has been replaced and every other
    task goes on. `exitcode` is that of `multiprocessing.Process`: negative means the signal of that number.
    """

    def __init__(self, message: str, pid: int | None = None, exitcode: int | None = None, host: str | None = None,
                 task: int | None = None, attempts: int = 1) -> None:
        super().__init__(message)
        self.pid = pid
        self.exitcode = exitcode
        self.host = host
        self.task = task
        self.attempts = attempts

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (str(self), self.pid, self.exitcode, self.host, self.task, self.attempts)


class GroupBroken(DpoolError, RuntimeError):
    """No worker of the group can run tasks: its initializer failed, or its workers end before they are ready."""


class GroupTerminated(DpoolError, RuntimeError):
    """The group was terminated before this task had a result."""


class GroupClosed(DpoolError, RuntimeError):
    """The group was closed: it finishes what it has accepted and takes no more tasks."""


class ForeignProcess(DpoolError, RuntimeError):
    """An object of dpool was used in a process that got it by os.fork(); it serves only the process that made it."""


class RemoteError(DpoolError, RuntimeError):
    """A task raised an exception that could not be rebuilt here.

    The message is the exception's own text, `type_name` its qualified type; the remote traceback is the cause.
    """

    def __init__(self, message: str, type_name: str = "") -> None:
        super().__init__(message)
        self.type_name = type_name

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (str(self), self.type_name)


class ClusterError(DpoolError, ConnectionError):
    """Something about the cluster: it cannot be reached, refuses this process, or has no node to run on."""


class KeyProblem(ClusterError):
    """The cluster's key cannot be used; the message says which file or variable, what is wrong, and what to do."""


class NodeLost(DpoolError, RuntimeError):
    """The nodes that were running this task were lost, one after the other, too many times to try another."""


class ObjectStoreFull(DpoolError, MemoryError):
    """There is no room for a value, not even after spilling what can be spilled. Sizes are in bytes."""

    def __init__(self, message: str, needed: int = 0, held: int = 0, limit: int = 0) -> None:
        super().__init__(message)
        self.needed = needed
        self.held = held
        self.limit = limit

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (str(self), self.needed, self.held, self.limit)


class ObjectLost(DpoolError, RuntimeError):
    """A stored object can no longer be had: its spill file is damaged, or its store has ended."""
