"""The default executor of a loop, with worker processes behind it: asyncio accepts none but a ThreadPoolExecutor there.

Decides which calls belong into a process and which into a thread; runs none of its own. Used with
loop.set_default_executor().
"""

from __future__ import annotations

import functools
import types
from asyncio import AbstractEventLoop
from concurrent.futures import ThreadPoolExecutor

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from concurrent.futures import Executor, Future
    from typing import Any

# Their functions wait for the system rather than compute, and take or return what cannot leave the process.
_WAITING_MODULES = frozenset(("socket", "_socket", "io", "_io", "os", "posix"))


class DefaultExecutor(ThreadPoolExecutor):
    """Runs the calls of `loop.run_in_executor(None, ...)` on `executor`, say a dpool ProcessPoolExecutor.

    What belongs to this process stays in its threads: asyncio's own calls (name look-ups, files), asyncio.to_thread(),
    functions of `os`, `io` and `socket`, and methods of built-in objects such as files and locks. `max_workers`,
    `thread_name_prefix`, `initializer` and `initargs` are those of the threads. shutdown() shuts both down.
    """

    def __init__(self, executor: Executor, max_workers: int | None = None, thread_name_prefix: str = "",
                 initializer: Callable[..., object] | None = None, initargs: tuple[Any, ...] = ()) -> None:
        if not hasattr(executor, "submit"):
            raise TypeError(f"executor must be a concurrent.futures.Executor, not {type(executor).__name__}")
        super().__init__(max_workers, thread_name_prefix, initializer, initargs)
        self._executor = executor

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Queue `fn(*args, **kwargs)` where it belongs. Raises RuntimeError after shutdown()."""
        if _stays_here(fn):
            return super().submit(fn, *args, **kwargs)
        return self._executor.submit(fn, *args, **kwargs)

    def map(self, fn: Callable[..., Any], *iterables: Iterable[Any], **options: Any) -> Iterator[Any]:
        """As Executor.map(), where `fn` belongs."""
        if _stays_here(fn):
            return super().map(fn, *iterables, **options)
        return self._executor.map(fn, *iterables, **options)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Shut down the threads and the executor behind them."""
        super().shutdown(wait, cancel_futures=cancel_futures)
        self._executor.shutdown(wait, cancel_futures=cancel_futures)


def _stays_here(function: Any) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    owner = getattr(function, "__self__", None)
    if isinstance(function, types.BuiltinMethodType) and owner is not None and not isinstance(owner, types.ModuleType):
        return not isinstance(owner, type)  # a method of a file, a lock, a contextvars.Context
    return isinstance(owner, AbstractEventLoop) or getattr(function, "__module__", None) in _WAITING_MODULES
