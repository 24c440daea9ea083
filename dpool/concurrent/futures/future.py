"""One submit(): the future that its caller has, and the sink that resolves it.

Changes a future's state as the standard library does, and wakes and calls whom it would. Made by process.py; told by
the group.
"""

from __future__ import annotations

import itertools
import threading
import time
from concurrent.futures import _base
from concurrent.futures._base import CANCELLED, CANCELLED_AND_NOTIFIED, FINISHED, PENDING, RUNNING, InvalidStateError

from dpool import waiting
from dpool.concurrent.futures.failures import to_exception
from dpool.engine import Failure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any


class Future(_base.Future):  # type: ignore[type-arg]
    """The standard library's Future, but for two things that make it quicker. A thread that waits in result() may
    receive the result itself. And its condition, which costs more than all the rest of it, is made when somebody asks
    for it: most results are there before.

    Who sets a result without a condition looks afterwards whether there is one by now. Who has made it looks at the
    state, holding it, after that. So one of the two sees the other; and so it is with callbacks. Whether a call runs or
    is cancelled is settled by who is first to say so in the future's dictionary.
    """

    # The group and what it calls this future's call, until it has an outcome.
    _waits: tuple[Any, Any] | None = None
    _made: Any = None

    def __init__(self) -> None:
        self._state = PENDING
        self._result = self._exception = None
        self._waiters: list[Any] = []
        # By a number each: who takes one out calls it, so that each is called once, whoever else is about to.
        self._callbacks: dict[int, Callable[[Any], object]] = {}

    @property
    def _condition(self) -> Any:  # type: ignore[override]
        return self._made or self.__dict__.setdefault("_made", waiting.Condition())

    def set_running_or_notify_cancel(self) -> bool:
        """See concurrent.futures.Future."""
        if self._state == PENDING and self.__dict__.setdefault("_fate", RUNNING) is RUNNING:
            self._state = RUNNING
            return True
        return super().set_running_or_notify_cancel()

    def cancel(self) -> bool:
        """See concurrent.futures.Future."""
        if self._state == PENDING and self.__dict__.setdefault("_fate", CANCELLED) is not CANCELLED:
            return False
        return super().cancel()

    def set_result(self, result: Any) -> None:
        """See concurrent.futures.Future."""
        if self._made is not None or self._state != RUNNING:
            return super().set_result(result)
        self._result = result
        self._state = FINISHED
        if self._made is not None:
            with self._condition:
                for waiter in self._waiters:
                    waiter.add_result(self)
                self._condition.notify_all()
        if self._callbacks:
            self._invoke_callbacks()

    def add_done_callback(self, fn: Callable[[Any], object]) -> None:
        """See concurrent.futures.Future."""
        number = next(_callback_numbers)
        self._callbacks[number] = fn
        if self._state in _DONE:
            self._call_back(number)

    def _invoke_callbacks(self) -> None:
        for number in list(self._callbacks):
            self._call_back(number)

    def _call_back(self, number: int) -> None:
        callback = self._callbacks.pop(number, None)
        if callback is not None:
            try:
                callback(self)
            except Exception:
                _base.LOGGER.exception("exception calling callback for %r", self)

    def cancelled(self) -> bool:
        """See concurrent.futures.Future."""
        return self._state in _CANCELLED

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """See concurrent.futures.Future."""
        return self._exception if self._state == FINISHED else super().exception(timeout)

    def done(self) -> bool:
        """See concurrent.futures.Future."""
        return self._state in _DONE

    def result(self, timeout: float | None = None) -> Any:
        """See concurrent.futures.Future."""
        if self._state == FINISHED and self._exception is None:
            return self._result
        waits = self._waits
        if waits is not None and self._state == RUNNING:
            if timeout is None:
                waits[0].attend(waits[1])
            elif timeout > 0:
                deadline = time.monotonic() + timeout
                waits[0].attend(waits[1], timeout)
                timeout = max(deadline - time.monotonic(), 0)
            waits = None
            if self._callbacks and self._state == FINISHED:  # it has come as this thread received the result
                self._invoke_callbacks()
        try:
            return super().result(timeout)
        finally:
            del self  # or the exception's traceback would hold this future, which holds the exception


_CANCELLED = frozenset((CANCELLED, CANCELLED_AND_NOTIFIED))
_DONE = _CANCELLED | {FINISHED}
_callback_numbers = itertools.count()


class Call:
    """One submit(): the Sink that resolves its Future, and the look-alike of the standard library's work item."""

    __slots__ = ("future", "pending", "number", "fn", "args", "kwargs", "started")

    def __init__(self, future: Future, pending: dict[int, Any], number: int, fn: Callable[..., Any],
                 args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.future = future
        self.pending = pending
        self.number = number
        self.fn = fn
        self.args = args
        self.kwargs = kwargs
        self.started = False

    def start(self) -> bool:
        if self.started:
            return True  # it came back from a worker that had not begun it
        if self.future.set_running_or_notify_cancel():
            self.started = True
            return True
        self._settle()
        return False

    def _settle(self) -> None:
        self.pending.pop(self.number, None)
        self.future._waits = None

    def set_alone(self, value: Any) -> bool:
        future: Any = self.future
        condition = future._condition
        with condition:
            if future._callbacks or future._waiters or condition._waiters:
                return False
            future._result = value
            future._state = FINISHED
        self._settle()
        return True

    def set(self, first: int, values: Sequence[Any]) -> None:
        self._settle()
        try:
            self.future.set_result(values[0])
        except InvalidStateError:  # whoever holds the future has set it, or has received the result
            self.future._invoke_callbacks()
        except BaseException:
            _report()

    def fail(self, index: int, failure: Failure) -> None:
        self._settle()
        try:
            self.future.set_exception(to_exception(failure))
        except InvalidStateError:
            pass
        except BaseException:
            _report()

    def abandon(self, failure: Failure) -> None:
        if self.start():
            self.fail(0, failure)


def _report() -> None:
    """A done callback has raised what Future lets through, such as SystemExit: it must not end the group's thread."""
    import sys

    threading.excepthook(threading.ExceptHookArgs([*sys.exc_info(), threading.current_thread()]))
