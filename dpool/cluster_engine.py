"""The cluster engine: groups whose workers are on the nodes of a cluster.

Composes a client with a port for each group, and ends the groups when it is closed; used by session.py, the only place
that names it.
"""

from __future__ import annotations

import os
import time
import weakref

from dpool import replacing
from dpool.cluster.driver.client import Client
from dpool.cluster.driver.group import Group
from dpool.cluster.driver.remote import ClusterPort
from dpool.cluster.wire import keys as cluster_keys
from dpool.cluster.wire.messages import Inside
from dpool.engine import GroupSpec
from dpool.errors import ForeignProcess

TYPE_CHECKING = False
if TYPE_CHECKING:
    from dpool.cluster.worker.home import Home

# How long the head may take to answer.
CONNECT_TIMEOUT_S = 10.0
# How long the groups that are still open may take to end when the engine is closed.
CLOSE_TIMEOUT_S = 5.0


class ClusterEngine:
    """Opens groups on the cluster at an address; implements dpool.engine.Engine.

    Raises KeyProblem without a good key, ValueError for an address that is none, ClusterError if no head of a dpool
    cluster with that key answers there within CONNECT_TIMEOUT_S. With `home`, in a worker, that is where the key and
    all else is from.
    """

    def __init__(self, address: str, key: str | os.PathLike[str] | None = None, home: Home | None = None) -> None:
        self._fetch = None
        if home is None:
            self._client = Client(cluster_keys.find(key), address)
        else:
            self._client = Client(cluster_keys.DriverKeys.of(home.keys), address,
                                  inside=Inside(home.node, home.group, home.worker))
            self._fetch = home.fetch
        self._pid = os.getpid()
        self._groups: weakref.WeakSet[Group] = weakref.WeakSet()
        try:
            self._client.connect(CONNECT_TIMEOUT_S)
        except BaseException:
            self._client.close()
            raise

    def cpus(self) -> int:
        """How many CPUs the cluster has now; at least 1."""
        return max(self._client.cpus, 1)

    def open_group(self, spec: GroupSpec) -> Group:
        """Have the workers placed and started. Raises ClusterError if there is no node, or none answers."""
        if self._pid != os.getpid():
            raise ForeignProcess(f"this process was forked from {self._pid}, which is connected to a cluster: call "
                                 f"dpool.init() here to be connected, too")
        port = ClusterPort(self._client, spec, replacing.installed(), self._fetch)
        port.open()
        group = Group(spec, port, port.supervisor)
        self._groups.add(group)
        return group

    def close(self) -> None:
        """Leave the cluster; groups that are still open are terminated. Blocks until they have ended, at most
        CLOSE_TIMEOUT_S."""
        if self._pid != os.getpid():
            return
        end = time.monotonic() + CLOSE_TIMEOUT_S
        groups = list(self._groups)
        for group in groups:
            group.terminate()
        ended = [group.join(max(end - time.monotonic(), 0.0)) for group in groups]
        self._client.close(all(ended))
