"""Worker processes for asyncio: a Pool whose methods are awaited, to_process() beside asyncio.to_thread(), an adapter.

Imports nothing until a name is asked for, so that workers may load parts of this package. See docs/asyncio.md.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from dpool.asyncio.pool import Pool as Pool
    from dpool.asyncio.pool import to_process as to_process
    from dpool.asyncio.threads import DefaultExecutor as DefaultExecutor

__all__ = ["DefaultExecutor", "Pool", "to_process"]

_names = {
    "DefaultExecutor": "dpool.asyncio.threads",
    "Pool": "dpool.asyncio.pool",
    "to_process": "dpool.asyncio.pool",
}


def __getattr__(name: str) -> Any:
    module = _names.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
