"""`multiprocessing` with dpool's Pool. What dpool does not replace is the standard library's own, handed through.

Holds no state of its own but the contexts whose Pool is dpool's. docs/multiprocessing.md lists what is whose.
"""

from __future__ import annotations

import multiprocessing as _stdlib
from multiprocessing import *  # noqa: F403

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import Any

    from dpool.multiprocessing.pool import Pool as _Pool

__all__ = list(_stdlib.__all__)

_contexts: dict[type, Any] = {}


def get_context(method: str | None = None) -> Any:  # type: ignore[no-redef]
    """The standard library's context for `method`, None for the default one, with dpool's Pool."""
    context = _stdlib.get_context(method)
    kind = type(context)
    if kind not in _contexts:
        made: Any = type(kind.__name__, (_ContextWithPool, kind), {"__module__": kind.__module__})
        mine = made.__new__(made)
        mine.__dict__.update(context.__dict__)
        _contexts[kind] = mine
    return _contexts[kind]


def Pool(processes: int | None = None, initializer: Callable[..., object] | None = None,  # type: ignore[no-redef]
         initargs: Iterable[Any] = (), maxtasksperchild: int | None = None, *,
         resources: Mapping[str, float | str] | None = None) -> _Pool:
    """A pool of worker processes: see dpool.multiprocessing.pool.Pool."""
    from dpool.multiprocessing.pool import Pool

    return Pool(processes, initializer, initargs, maxtasksperchild, _stdlib.get_context(), resources=resources)


class _ContextWithPool:
    """Added to a context of the standard library's."""

    def Pool(self, processes: int | None = None, initializer: Callable[..., object] | None = None,
             initargs: Iterable[Any] = (), maxtasksperchild: int | None = None, *,
             resources: Mapping[str, float | str] | None = None) -> _Pool:
        """A pool of worker processes started by this context: see dpool.multiprocessing.pool.Pool."""
        from dpool.multiprocessing.pool import Pool

        return Pool(processes, initializer, initargs, maxtasksperchild, self, resources=resources)

    def get_context(self, method: str | None = None) -> Any:
        return self if method is None else get_context(method)


def __getattr__(name: str) -> Any:
    return getattr(_stdlib, name)
