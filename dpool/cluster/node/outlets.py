"""The bulk connections by which a node sends objects to other nodes: those that these have offered.

Owns the senders, and which objects each may be sent more of; the pieces are exchange.py's. Belongs to the agent's loop.
"""

from __future__ import annotations

from collections.abc import Callable

from dpool.cluster.wire import messages
from dpool.cluster.wire.bulk import Head, Sender, pour
from dpool.cluster.wire.links import Waker
from dpool.cluster.wire.surroundings import Surroundings

# A bulk connection that is not there after so long will not be. Less than it is expected, bulk.OFFER_S.
CONNECT_WITHIN_S = 3.0
# One by which nothing has been sent for so long is closed: its other end has gone without a word. Whoever lives closes
# it earlier, with the link: exchange.py, IDLE_S.
IDLE_S = 60.0


class _Outlet:
    def __init__(self, peer: bytes, sender: Sender, now: float) -> None:
        self.peer = peer
        self.sender = sender
        self.used_at = now
        self.wanted: dict[bytes, None] = {}  # objects of which there may be something to be sent
        self.waits = False  # for room: it is called again


class Outlets:
    """By the connection of the node that has offered them. `next_piece` gives what is to be sent to one, of an object;
    `ended` is told of a connection that has ended, by its name, and whether anything was sent on it."""

    def __init__(self, around: Surroundings, waker: Waker,
                 next_piece: Callable[[bytes, bytes], tuple[Head, memoryview] | None],
                 ended: Callable[[bytes, bytes, bool], None]) -> None:
        self._around = around
        self._waker = waker
        self._next_piece = next_piece
        self._ended = ended
        self._of: dict[bytes, _Outlet] = {}
        self._by_descriptor: dict[int, _Outlet] = {}

    def open(self, peer: bytes, offer: messages.BulkOffer) -> None:
        """A node offers a connection: in place of one that it had."""
        self.close(peer)
        try:
            sender = self._around.sender(offer.address, offer.name, offer.key)
        except (ValueError, OSError):
            self._ended(peer, offer.name, False)
            return
        outlet = self._of[peer] = self._by_descriptor[sender.descriptor] = _Outlet(peer, sender, self._around.now())
        self._waker.add([sender.descriptor])
        self._wait(outlet, True)

    def ready(self, peer: bytes) -> bool:
        """Whether there is a connection, which is to be used then."""
        outlet = self._of.get(peer)
        return outlet is not None and outlet.sender.ready

    def want(self, peer: bytes, key: bytes) -> None:
        """There is something of an object to be sent."""
        outlet = self._of[peer]
        outlet.wanted[key] = None
        if not outlet.waits:
            self._pour(outlet)

    def turn(self, ready: set[int]) -> None:
        """Something has come to these descriptors, or they have room."""
        for descriptor in ready & self._by_descriptor.keys():
            outlet = self._by_descriptor.get(descriptor)
            if outlet is not None:
                outlet.sender.watch()
                self._pour(outlet)

    def _pour(self, outlet: _Outlet) -> None:
        waits = pour(outlet.sender, lambda: self._next(outlet))
        if outlet.sender.broken:
            self._lose(outlet)
        else:
            self._wait(outlet, waits or outlet.sender.blocked)

    def _next(self, outlet: _Outlet) -> tuple[Head, memoryview] | None:
        """A piece of each object in turn."""
        while outlet.wanted:
            key = next(iter(outlet.wanted))
            del outlet.wanted[key]
            piece = self._next_piece(outlet.peer, key)
            if piece is not None:
                outlet.wanted[key] = None
                outlet.used_at = self._around.now()
                return piece
        return None

    def _wait(self, outlet: _Outlet, waits: bool) -> None:
        if waits != outlet.waits:
            outlet.waits = waits
            self._waker.want_room(outlet.sender.descriptor, waits)

    def tick(self) -> None:
        """Call this once a second."""
        now = self._around.now()
        for outlet in list(self._of.values()):
            if now >= outlet.used_at + (IDLE_S if outlet.sender.ready else CONNECT_WITHIN_S):
                self._lose(outlet)

    def _lose(self, outlet: _Outlet) -> None:
        name, used = outlet.sender.name, outlet.sender.count > 0
        self.close(outlet.peer)
        self._ended(outlet.peer, name, used)

    def close(self, peer: bytes, name: bytes | None = None) -> bool:
        """The connection of a node, if there is one (of this name, if one is given), is not to be used any more;
        whether it was."""
        outlet = self._of.get(peer)
        if outlet is None or name not in (None, outlet.sender.name):
            return False
        del self._of[peer], self._by_descriptor[outlet.sender.descriptor]
        self._waker.remove([outlet.sender.descriptor])
        outlet.sender.close()
        return outlet.sender.count > 0

    def close_all(self) -> None:
        for peer in list(self._of):
            self.close(peer)
