"""Which engine this process uses now: the embedded one unless another is set or named. Asked by the doors.

In a worker of a cluster that is the cluster: a task that opens a door drives the cluster that it runs on.

Starts nothing until a door opens a group, or init() is called.
"""

from __future__ import annotations

import os
import sys
import threading
from multiprocessing import process

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from dpool.cluster.worker.home import Home
    from dpool.engine import Engine

_engine: Any = None
_pid = 0
# Guards the making of the engine: two threads may open their first pool at once.
_lock = threading.Lock()


def current() -> Engine:
    """The engine to open groups on: what init() or use() have set; else, in a worker of a cluster and what is forked
    from it, that cluster; else the cluster at DPOOL_ADDRESS, else the embedded one. Raises what init() raises, if it is
    a cluster and nothing is connected yet."""
    engine: Engine | None = _engine
    if engine is None or _pid != os.getpid():
        with _lock:
            if not _is_chosen():
                _set(_make(None, None))
            engine = _engine
    assert engine is not None
    return engine


def _is_chosen() -> bool:
    """Whether there is an engine that this process can use. The connection of a process that it was forked from is
    none."""
    return _engine is not None and (_pid == os.getpid() or not hasattr(_engine, "cpus"))


def prepare() -> None:
    """Import now what the first pool on this machine needs, so that opening it is as quick as in the standard library.
    For doors, when they are imported. Does nothing in a worker process: most of those open none."""
    # The second is true while a spawned worker imports the program's main module: it has no parent yet.
    is_worker = process.parent_process() is not None or getattr(process.current_process(), "_inheriting", False)
    if not is_worker and not os.environ.get("DPOOL_ADDRESS"):
        import dpool.embedded  # noqa: F401


def init(address: str | None = None, key: str | os.PathLike[str] | None = None) -> None:
    """Use the cluster at `address` (tcp://host:port) from here on, DPOOL_ADDRESS if it is None; without either, this
    machine. `key` is the path of the key file; default: DPOOL_KEY_FILE, DPOOL_KEY, ~/.config/dpool/key. In a task on a
    cluster the default is that cluster, whatever DPOOL_ADDRESS says, and needs no key.

    Blocks until the head has answered, ten seconds at most. Raises ValueError for an address that is none,
    dpool.errors.KeyProblem without a good key, and dpool.errors.ClusterError if there is no such cluster.
    """
    engine = _make(address, key)
    with _lock:
        _set(engine)


def use(engine: Engine | None) -> Engine | None:
    """Set the engine for all doors opened from here on, None for the one that is used without init(); returns the one
    before."""
    before: Engine | None = _engine
    _set(engine)
    return before


def _set(engine: Any) -> None:
    global _engine, _pid
    _engine, _pid = engine, os.getpid()


# The variables that mean something to dpool.
_VARIABLES = ("DPOOL_ADDRESS", "DPOOL_KEY", "DPOOL_KEY_FILE", "DPOOL_OBJECT_MEMORY", "DPOOL_SPILL_DIR",
              "DPOOL_RESOURCES")


def _check_variables() -> None:
    """Raise ValueError for a variable whose name is nearly one of dpool's: its writer would wait for its effect in
    vain."""
    for name in os.environ:
        if name.startswith("DPOOL_") and name not in _VARIABLES:
            from difflib import get_close_matches

            if near := get_close_matches(name, _VARIABLES, 1, 0.85):
                raise ValueError(f"dpool knows no environment variable {name}: did you mean {near[0]}?")


def _make(address: str | None, key: str | os.PathLike[str] | None) -> Any:
    _check_variables()
    home = _home() if not address else None
    address = home.address if home is not None else address or os.environ.get("DPOOL_ADDRESS")
    if not address:
        from dpool.embedded import EmbeddedEngine

        return EmbeddedEngine()
    from dpool.cluster_engine import ClusterEngine

    return ClusterEngine(address, key, home)


def _home() -> Home | None:
    """The cluster that this process is in a worker of, if it is. Raises ClusterError if the node does not say."""
    if not _is_in_a_worker():
        return None
    from dpool.cluster.worker import home

    return home.find()


def _is_in_a_worker() -> bool:
    """Whether this process is a worker of a cluster, or was forked from one: all of them have that module."""
    return "dpool.cluster.worker.modules" in sys.modules


def is_elsewhere() -> bool:
    """Whether workers are on other machines, and so have a `__main__` of their own. Connects to nothing."""
    if _is_chosen():
        return hasattr(_engine, "cpus")
    return bool(os.environ.get("DPOOL_ADDRESS")) or _is_in_a_worker()


def default_processes(needs: Mapping[str, float] | None = None) -> int:
    """How many workers a door has that was not told how many: the CPUs of this machine, or of the cluster; fewer if
    each has `needs` of which there is not so much. At least 1."""
    engine: Any = current()
    cpus = getattr(engine, "cpus", None)
    if cpus is not None:
        count = int(cpus())
    else:
        count = getattr(os, "process_cpu_count", os.cpu_count)() or 1
    if needs:
        count = int(count / needs.get("cpus", 1.0))
        room = engine.room(needs) if hasattr(engine, "room") else None
        count = count if room is None else min(count, room)
    return max(count, 1)


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
