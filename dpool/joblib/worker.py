"""What runs in a worker: its set-up, and one batch of joblib's calls at a time.

Knows nothing of groups, queues or sockets, and imports little, so that a worker's environment is set before NumPy is
loaded. Called, by name, through the group that backend.py submits to.
"""

from __future__ import annotations

import os
import sys
from time import perf_counter

from dpool.errors import RemoteError
from dpool.joblib.parcels import Parcel, culprit, pack

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# How many processors the tasks of this worker may use among themselves; None in a process that is no worker.
budget: int | None = None


def start_worker(environment: dict[str, str], share: int, threads: int, first: Parcel | None) -> None:
    """The initializer of every group: limits the threads of numerical libraries, then runs the user's own initializer.

    `share`: processors for whatever the tasks start. `threads`: of each BLAS and OpenMP. `first`: the user's
    initializer and its arguments.
    """
    global budget
    budget = share
    os.environ.update(environment)
    if "numpy" in sys.modules:
        # Loaded before the environment said how many threads to make: it has to be told.
        _limit(threads)
    if first is not None:
        initializer, initargs = first.unpack()
        initializer(*initargs)


_limits: Any = None


def _limit(threads: int) -> None:
    global _limits
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        return
    _limits = threadpool_limits(limits=threads)


def run(parcel: Parcel) -> tuple[float, Parcel, str | None]:
    """Run one batch: the seconds it took, its results as a parcel, and None; or the exception, and its traceback."""
    started = perf_counter()
    try:
        batch = parcel.unpack()
    except BaseException as error:
        error.add_note("this task could not be rebuilt in the worker: a module, or a name in it, that the task needs "
                       "is missing there, or one of its arguments can be pickled but not unpickled")
        return 0.0, *_failed(error)
    try:
        values = batch()
    except BaseException as error:
        return perf_counter() - started, *_failed(error)
    took = perf_counter() - started
    try:
        from dpool.joblib.arrays import reduce_result

        return took, pack(values, reduce_result), None
    except BaseException as error:
        from pickle import PicklingError

        why = PicklingError(f"Could not pickle the result of a task: {type(error).__name__}: {error} "
                            f"({culprit(values, 'results')})")
        why.__traceback__ = error.__traceback__
        return took, *_failed(why)


def _failed(error: BaseException) -> tuple[Parcel, str]:
    """An exception as a parcel that is known to unpack into it, or into a RemoteError; and its traceback as text."""
    import traceback

    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    error.__traceback__ = None
    try:
        parcel = pack(error)
        if type(parcel.unpack()) is type(error):
            return parcel, text
    except BaseException:
        pass
    name = f"{type(error).__module__}.{type(error).__qualname__}".removeprefix("builtins.")
    try:
        what = str(error)
    except BaseException:
        what = ""
    return pack(RemoteError(what or name, name)), text
