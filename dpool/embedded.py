"""The embedded engine: a driver and a node in one process. Nothing to start, no daemon, no port.

Composes the two roles and keeps the list of open groups; used by session.py, the only place that names it.
"""

from __future__ import annotations

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


class EmbeddedEngine:
    """Opens groups whose workers are children of this process; implements dpool.engine.Engine."""

    def __init__(self) -> None:
        self._stock: Stock | None = None  # this machine's, looked at by the first group that needs some of it

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
        if self._stock is None:
            from dpool.cluster.node import machine

            with _looking:
                self._stock = self._stock or machine.stock()
        return self._stock

    def close(self) -> None:
        """Groups belong to the doors that opened them; the engine itself holds nothing."""
