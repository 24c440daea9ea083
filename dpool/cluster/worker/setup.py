"""What a worker is born with: the arguments of its process, and its lifeline.

Carries and arms; runs no task. Made by the node, used by worker/main.py.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import sys

from dpool.cluster.store import segments
from dpool.cluster.store.refs import Accepted, Sending, resolve
from dpool.cluster.wire import pickling
from dpool.cluster.wire.handles import Handle, reopen

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_F_SETSIG = 10  # Linux, not named by the fcntl module


class Setup:
    """The argument of worker_main: descriptors, the slot in the group's page, and what to run first.

    `tasks` is read by all workers of the group, the kernel hands each message to one of them; `results` is written by
    all; `claims` counts the tasks of the running batch that nobody has begun, None if batches are never split;
    `environment` are variables for this worker alone.
    """

    def __init__(self, tasks: Handle, results: Handle, lifeline: Handle, page: Handle, slots: int, slot: int,
                 claims: Any, max_tasks: int | None, initializer: Initializer, environment: dict[str, str]) -> None:
        self.tasks = tasks
        self.results = results
        self.lifeline = lifeline
        self.page = page
        self.slots = slots
        self.slot = slot
        self.claims = claims
        self.max_tasks = max_tasks
        self.initializer = initializer
        self.environment = environment


class Initializer:
    """A group's initializer and its arguments, in a pickle of their own, so that a lambda is no obstacle and what
    cannot be rebuilt is reported like an initializer that raises. Large buffers in the arguments are stored once, for
    all workers of the group; close() gives them back."""

    def __init__(self, function: Callable[..., object] | None, args: tuple[Any, ...]) -> None:
        self.function = function
        self.args = args
        self._buffers: list[memoryview] = []  # what is in the segment
        self._segment = -1
        self._table = b""
        self._sending: Sending | None = None  # keeps the refs' descriptors open until the process is started

    def __getstate__(self) -> tuple[Any, ...]:
        buffers: list[memoryview] = []
        with Sending() as sending:
            function = self.function
            if function is not None and not main_is_imported_again():
                function = _ByValue(function)  # type: ignore[assignment]
            data = pickling.dumps((function, self.args), buffers, by_value=True)
        refs, descriptors = sending.export()
        handles = [Handle(descriptor) for descriptor in descriptors]
        if not buffers:
            self._sending = sending
            return data, None, b"", refs, handles
        if [id(view.obj) for view in buffers] != [id(view.obj) for view in self._buffers]:
            self.close()
            self._segment, self._table = segments.write(buffers)
            self._buffers = buffers
        self._sending = sending
        return data, Handle(self._segment), self._table, refs, handles

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        # Loaded here and not in run(): what refers to the parent, such as a lock, can be rebuilt only now.
        self._error: Exception | None = None
        data, handle, table, refs, handles = state
        try:
            import pickle

            buffers: list[memoryview] = []
            if handle is not None:
                buffers = segments.read(handle.descriptor, table)
                os.close(handle.descriptor)
            accepted = Accepted(refs, [handle.descriptor for handle in handles]) if refs else None
            self.function, self.args = pickle.loads(data, buffers=buffers)
            del accepted
        except Exception as error:
            self.function, self.args, self._error = None, (), error

    def close(self) -> None:
        """No more workers will be started."""
        if self._segment >= 0:
            os.close(self._segment)
            self._segment = -1
            self._buffers = []
        self._sending = None

    _error: Exception | None = None

    def run(self) -> None:
        if self._error is not None:
            raise self._error
        if self.function is not None:
            self.function(*map(resolve, self.args))


class _ByValue:
    """A function in a pickle of its own that needs nothing of its __main__ on the other side."""

    def __init__(self, function: Callable[..., object]) -> None:
        self.function = function

    def __reduce__(self) -> tuple[Any, ...]:
        import pickle

        from dpool.cluster.wire.functions import dumps_by_value

        return pickle.loads, (dumps_by_value(self.function),)


def main_is_imported_again() -> bool:
    """Whether a process that is not forked gets this program's __main__ by importing it: not that of `python -c`, of
    stdin, of a notebook, or of a package's __main__.py."""
    main = sys.modules["__main__"]
    name = getattr(getattr(main, "__spec__", None), "name", None)
    if name is not None:
        return not (name == "__main__" or name.endswith(".__main__"))
    path = getattr(main, "__file__", None)
    return path is not None and os.path.exists(path)


def arm_lifeline(descriptor: int) -> int:
    """Die, with every process of this process's group, when the last writer of the pipe `descriptor` is gone.

    The kernel sends the signal, so it works while C code holds the GIL. Returns the descriptor to keep open.
    Needs a description of its own, since the owner of the signal belongs to the description and workers share one.
    """
    try:
        own = reopen(descriptor, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:  # no /proc: the worker that armed last is protected, the others end when they next read
        own = os.dup(descriptor)
    fcntl.fcntl(own, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(own, _F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(own, fcntl.F_SETFL, fcntl.fcntl(own, fcntl.F_GETFL) | os.O_ASYNC)
    poll = select.poll()
    poll.register(own, select.POLLIN)
    if poll.poll(0):  # it ended before the signal was armed
        os._exit(1)
    return own
