"""The embedded engine: a driver and a node in one process. Nothing to start, no daemon, no port.

Composes the two roles and keeps the list of open groups; used by session.py, the only place that names it.
"""

from __future__ import annotations

import os
import threading

from dpool.cluster.driver.group import Group
from dpool.cluster.node.workers import Workers
from dpool.resources import room

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from dpool.engine import GroupSpec
    from dpool.resources import Stock

_looking = threading.Lock()
os.register_at_fork(after_in_child=lambda: globals().update(_looking=threading.Lock()))


class EmbeddedEngine:
    """Opens groups whose workers are children of this process; implements dpool.engine.Engine."""

    def __init__(self) -> None:
        # This machine's, looked at by the first group that needs some of it. A forked child looks anew: a worker has
        # what it was given.
        self._stock: Stock | None = None
        self._pid = 0  # whose stock that is

    def open_group(self, spec: GroupSpec) -> Group:
        """Start the workers, unless they are to be started on demand. Raises what starting the first one raises, and
        dpool.resources.Lacking, a ValueError, if the machine has not what they need."""
        grant = self._machine().take(spec.resources, spec.processes) if spec.resources else None
        try:
            workers = Workers(spec, grant)
            workers.open()
        except BaseException:
            if grant is not None:
                grant.give_back()
            raise
        return Group(spec, workers, workers.supervisor)

    def room(self, needs: Mapping[str, float]) -> int | None:
        """How many workers with such needs this machine has room for now; None if nothing limits them."""
        machine = self._machine()
        return room(machine.total, machine.used, needs)

    def _machine(self) -> Stock:
        if self._stock is None or self._pid != os.getpid():
            from dpool.cluster.node import machine

            with _looking:
                if self._stock is None or self._pid != os.getpid():
                    self._stock, self._pid = machine.stock(), os.getpid()
        return self._stock

    def close(self) -> None:
        """Groups belong to the doors that opened them; the engine itself holds nothing."""
