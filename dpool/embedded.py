"""The embedded engine: a driver and a node in one process. Nothing to start, no daemon, no port.

Composes the two roles and keeps the list of open groups; used by session.py, the only place that names it.
"""

from __future__ import annotations

from dpool.cluster.driver.group import Group
from dpool.cluster.node.workers import Workers

TYPE_CHECKING = False
if TYPE_CHECKING:
    from dpool.engine import GroupSpec


class EmbeddedEngine:
    """Opens groups whose workers are children of this process; implements dpool.engine.Engine."""

    def open_group(self, spec: GroupSpec) -> Group:
        """Start the workers, unless they are to be started on demand. Raises what starting the first one raises."""
        workers = Workers(spec)
        workers.open()
        return Group(spec, workers, workers.supervisor)

    def close(self) -> None:
        """Groups belong to the doors that opened them; the engine itself holds nothing."""
