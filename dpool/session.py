"""Which engine this process uses now: the embedded one unless another is set. Asked by the doors.

Starts nothing until a door opens a group.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from dpool.engine import Engine

_engine: Engine | None = None


def current() -> Engine:
    """The engine to open groups on."""
    global _engine
    if _engine is None:
        from dpool.embedded import EmbeddedEngine

        _engine = EmbeddedEngine()
    return _engine


def use(engine: Engine | None) -> Engine | None:
    """Set the engine for all doors opened from here on, None for the embedded one; returns the one before."""
    global _engine
    before, _engine = _engine, engine
    return before


def check_processes(processes: int) -> None:
    """Raise ValueError if so many workers cannot exist on this machine, naming the limit."""
    from dpool.cluster.node.limits import process_limit

    limit, name = process_limit()
    if processes > limit:
        raise ValueError(f"{processes} worker processes are more than this machine allows: {limit} ({name})")


def by_value_pickler() -> Any:
    """The pickler that sends functions and classes of `__main__` by value, for doors that pickle themselves."""
    from dpool.cluster.wire.functions import by_value_pickler

    return by_value_pickler()
