"""What the standard library's executor would raise: exceptions from a group's failures.

Makes them and raises none. Used by process.py, future.py and maps.py; their words and causes are those of the standard
library.
"""

from __future__ import annotations

from concurrent.futures import process as _stdlib
from concurrent.futures.process import BrokenProcessPool

from dpool.engine import ABANDONED, ARGUMENT_BROKEN, ARGUMENT_LOST, RESULT_BROKEN, WORKER_DIED, Failure
from dpool.errors import ForeignProcess, GroupBroken, GroupClosed, GroupTerminated, WorkerDied

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# What a group raises that takes no more.
REFUSALS = (GroupBroken, GroupTerminated, GroupClosed, ForeignProcess)

_TERMINATED = "the workers of this executor were stopped before this call had a result"
_ABRUPT = "A process in the process pool was terminated abruptly while the future was running or pending"

_RemoteTraceback: Any = _stdlib._RemoteTraceback


class WorkerDeath(WorkerDied, BrokenProcessPool):
    """A worker process died: `dpool.errors.WorkerDied`, with its pid, exit code and host, and a BrokenProcessPool."""


def to_exception(failure: Failure) -> BaseException:
    """What the standard library's executor would raise for this failure."""
    error, kind = failure.exception, failure.kind
    if kind == WORKER_DIED and isinstance(error, WorkerDied):
        return _death(error, failure.traceback)
    if kind == WORKER_DIED:  # the nodes it ran on were lost
        broken = BrokenProcessPool(str(error))
        broken.__cause__ = error
        return broken
    if kind == ABANDONED:
        return broken_pool(error)
    if kind == ARGUMENT_LOST:
        return _without_frames(error)
    if failure.traceback:
        error.__cause__ = _RemoteTraceback(f'\n"""\n{failure.traceback}"""')
    if kind in (ARGUMENT_BROKEN, RESULT_BROKEN):
        what = "the function or an argument of this call could not be rebuilt in the worker"
        if kind == RESULT_BROKEN:
            what = "the result of this call could not be rebuilt here"
            error = _without_frames(error)
        broken = BrokenProcessPool(f"{what}: {type(error).__name__}: {error}")
        broken.__cause__ = error
        return broken
    return error


def _without_frames(error: BaseException) -> BaseException:
    """The error with its traceback as text, as its cause: the standard library's form for what fails to be pickled.

    The frames themselves lead to the future that will hold this error, and to the group's thread: they would keep
    arguments, executor and thread until the garbage collector comes by.
    """
    if error.__traceback__ is not None:
        import traceback

        trace = "".join(traceback.format_exception(error))
        error.__cause__ = _RemoteTraceback(f'\n"""\n{trace}"""')
        error.__context__ = error.__traceback__ = None
    return error


def broken_pool(why: BaseException) -> BaseException:
    """A new exception for each call that has no outcome: each will have a traceback of its own."""
    cause = why.__cause__
    if isinstance(cause, WorkerDied):
        return _death(cause)
    if isinstance(why, GroupTerminated):
        return BrokenProcessPool(_TERMINATED)
    broken = BrokenProcessPool(str(why))
    broken.__cause__ = cause
    return broken


def _death(error: WorkerDied, trace: str = "") -> BaseException:
    death = WorkerDeath(f"{_ABRUPT}: {error}", error.pid, error.exitcode, error.host, error.task, error.attempts)
    # The standard library's words for it, since 3.15.
    text = f"Process {error.pid} terminated abruptly with exit code {error.exitcode}"
    death.__cause__ = _RemoteTraceback(f'\n"""\n{text}\n{trace}"""')
    return death
