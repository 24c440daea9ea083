"""`concurrent.futures` with dpool's ProcessPoolExecutor. Every other name is the standard library's own, handed through.

Imports nothing until a name is asked for: workers load this package to get at their initializer.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from concurrent.futures import *  # noqa: F403
    from typing import Any

    from dpool.concurrent.futures.process import ProcessPoolExecutor as ProcessPoolExecutor


def __getattr__(name: str) -> Any:
    if name == "ProcessPoolExecutor":
        from dpool.concurrent.futures.process import ProcessPoolExecutor as value
    else:
        import concurrent.futures

        value = getattr(concurrent.futures, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    import concurrent.futures

    return sorted({*dir(concurrent.futures), *globals()})
