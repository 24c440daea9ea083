"""`concurrent.futures` with dpool's ProcessPoolExecutor. All other names are the standard library's, handed through.

Imports nothing until a name is asked for: workers load this package to get at their initializer.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from concurrent.futures import ALL_COMPLETED as ALL_COMPLETED
    from concurrent.futures import FIRST_COMPLETED as FIRST_COMPLETED
    from concurrent.futures import FIRST_EXCEPTION as FIRST_EXCEPTION
    from concurrent.futures import BrokenExecutor as BrokenExecutor
    from concurrent.futures import CancelledError as CancelledError
    from concurrent.futures import Executor as Executor
    from concurrent.futures import Future as Future
    from concurrent.futures import InvalidStateError as InvalidStateError
    from concurrent.futures import ThreadPoolExecutor as ThreadPoolExecutor
    from concurrent.futures import TimeoutError as TimeoutError
    from concurrent.futures import as_completed as as_completed
    from concurrent.futures import wait as wait
    from typing import Any

    from dpool.concurrent.futures.process import ProcessPoolExecutor as ProcessPoolExecutor


def __getattr__(name: str) -> Any:
    if name == "ProcessPoolExecutor":
        import dpool.concurrent.futures.process as mine

        value: Any = mine.ProcessPoolExecutor
    else:
        import concurrent.futures

        value = getattr(concurrent.futures, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    import concurrent.futures

    return sorted({*dir(concurrent.futures), *globals()})
