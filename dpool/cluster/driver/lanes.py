"""The bulk connections of a group with its nodes, which large objects go by: made when a node offers one, and given up
when it is of no use.

Sends pieces when nothing else is to be sent to a node, and promises nothing: when a connection is over the node is told
by the session, and says what it lacks; that goes by the session. Called by driver/remote.py in the group's I/O thread.
"""

from __future__ import annotations

from dpool.cluster.driver.connections import Connections
from dpool.cluster.driver.nodes import Lane, Node
from dpool.cluster.driver.shipping import Shipping
from dpool.cluster.wire import messages, sessions
from dpool.cluster.wire.bulk import NO_CHECKSUM, Head, pour
from dpool.cluster.wire.surroundings import Surroundings

# A bulk connection that is not there after so long will not be; one by which something is on its way is given up when
# nothing has come for so long. Longer: more stops of the network are ridden out. Shorter: what is lost comes sooner.
SILENT_AFTER_S = 3.0


class Lanes:
    """Those of one group; a node has at most one."""

    def __init__(self, around: Surroundings, connections: Connections, shipping: Shipping) -> None:
        self._around = around
        self._connections = connections
        self._shipping = shipping

    def offered(self, node: Node, offer: messages.BulkOffer) -> None:
        """A node expects a connection."""
        if node.lost:
            return
        if node.lane is not None:
            self._over(node, node.lane)
        try:
            sender = self._around.sender(offer.address, offer.name, offer.key)
        except (ValueError, OSError):
            self._shipping.bulk_over(node, messages.BulkOver(offer.name), ())
            return
        node.lane = Lane(sender, self._around.now())
        self._connections.watch(node, sender.descriptor)
        self._connections.want_room(sender.descriptor, True)

    def stirred(self, node: Node) -> None:
        """Something may have come, or there may be room again."""
        lane = node.lane
        if lane is not None:
            lane.sender.watch()
            self.pour(node)

    def pour(self, node: Node) -> None:
        """Send as much as there is, and room for, now."""
        lane = node.lane
        if lane is None:
            return
        if lane.sender.ready and lane.sender.count == lane.echoed:
            lane.moved_at = self._around.now()  # nothing is on its way yet
        waits = pour(lane.sender, lambda: self._next(node, lane))
        if lane.sender.broken:
            self._over(node, lane)
            return
        waits = waits or lane.sender.blocked
        if waits != lane.waits:
            lane.waits = waits
            self._connections.want_room(lane.sender.descriptor, waits)

    def _next(self, node: Node, lane: Lane) -> tuple[Head, memoryview] | None:
        if not lane.sender.ready:
            return None
        while (one := self._shipping.take_for_bulk(node)) is not None:
            for _, (head, *_), _, _, piece in one:
                key, size, start = sessions.OBJECT_HEADER.unpack(head)
                assert piece is not None
                # All that was said of the object before has been given to the session by now.
                after = lane.after.setdefault(key, node.session.sent)
                return Head(key, size, start, NO_CHECKSUM, piece.nbytes, after), piece
        return None

    def echoed(self, node: Node, count: int) -> None:
        """The node has received so many pieces. Call this once a second."""
        lane, now = node.lane, self._around.now()
        if lane is None:
            return
        if count > lane.echoed:
            lane.echoed, lane.moved_at = count, now
        elif (lane.sender.count > count or not lane.sender.ready) and now >= lane.moved_at + SILENT_AFTER_S:
            self._over(node, lane)

    def got(self, node: Node, key: bytes) -> None:
        """The node has an object, whole."""
        if node.lane is not None:
            node.lane.after.pop(key, None)

    def ended(self, node: Node, name: bytes) -> None:
        """The node has seen the end of a connection."""
        if node.lane is not None and node.lane.sender.name == name:
            self._over(node, node.lane)

    def _over(self, node: Node, lane: Lane) -> None:
        self.close(node)
        self._shipping.bulk_over(node, messages.BulkOver(lane.sender.name, lane.sender.count > 0), lane.after)

    def close(self, node: Node) -> None:
        """The session is over, or its bulk connection."""
        lane, node.lane = node.lane, None
        if lane is not None:
            self._connections.unwatch(lane.sender.descriptor)
            lane.sender.close()
