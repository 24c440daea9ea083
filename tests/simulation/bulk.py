"""Simulated bulk connections: for wire/bulk.py, over the network of network.py, piece by piece and without a cipher.

They have room for a few pieces, break as links do, and sometimes swallow all that is sent without a word to either end.
Knows no object. Used by network.py's Place.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import cast

from dpool.cluster.wire.bulk import OFFER_S, Head

from .clock import Process
from .network import FIN, Connection, End, Network, SimListener

# Pieces that are on their way, or have come and were not taken.
ROOM = 8
_TAKEN = object()  # what the receiver's kernel says of a piece


class SimGate(End):
    """Stands for bulk.Gate. To its connections it is what a SimListener is to others'."""

    def __init__(self, network: Network, process: Process, host: str, port: int) -> None:
        self.network = network
        self.process = process
        self.address = f"tcp://{host}:{port or network.free_port()}"
        network.listeners[self.address] = cast(SimListener, self)
        network.hosts[self.address] = process.host
        self.knocks = network.source()
        self.descriptor = self.knocks.number
        self.pending: list[Connection] = []
        self.connections: dict[bytes, Connection] = {}
        self._offers: dict[bytes, float] = {}

    def offer(self, now: float) -> tuple[bytes, bytes]:
        name = self.network.world.new_id()
        self._offers[name] = now + OFFER_S
        return name, bytes(32)

    def withdraw(self, name: bytes) -> None:
        self._offers.pop(name, None)

    def accept(self, now: float) -> list[SimReceiver]:
        self.knocks.ready = False
        pending, self.pending = self.pending, []
        arrived = []
        for connection in pending:
            assert isinstance(connection, BulkConnection)
            if self._offers.pop(connection.name, 0.0) > now:
                arrived.append(SimReceiver(self, connection))
                connection.let_in()
            else:
                connection.abort(self)
        return arrived

    def on_ended(self, connection: Connection) -> None:
        assert isinstance(connection, BulkConnection) and connection.receiver is not None
        self.connections.pop(connection.peer, None)
        connection.receiver.ended = True
        connection.receiver.news.rise()

    def close(self) -> None:
        self.network.listeners.pop(self.address, None)
        for connection in (*self.connections.values(), *self.pending):
            connection.abort(self)
        self.network.sources.pop(self.descriptor, None)


class BulkConnection(Connection):
    """From a sender to a gate. What is said to the sender is only that there is room again."""

    def __init__(self, network: Network, sender: SimSender, address: str, name: bytes) -> None:
        super().__init__(network, sender, address)  # type: ignore[arg-type]
        self.name = name
        self.sender = sender
        self.receiver: SimReceiver | None = None
        self.pieces: deque[tuple[Head, bytes]] = deque()  # that have come and were not taken
        self.sent = self.taken = 0
        self.mute = False  # nothing of what is sent arrives any more, and neither end learns of it

    def _knock(self) -> None:
        if self.server_host not in self.network.walled:
            super()._knock()

    def _at_server(self, what: object) -> None:
        if what is FIN:
            super()._at_server(what)
        elif self.receiver is not None:
            self.pieces.append(cast(tuple[Head, bytes], what))
            self.receiver.news.rise()

    def _at_client(self, what: object) -> None:
        if what is _TAKEN:
            self.taken += 1
            self.sender.news.room_came()
        else:
            super()._at_client(what)

    @property
    def has_room(self) -> bool:
        return self.established and self.sent - self.taken < ROOM

    def carry(self, head: Head, piece: bytes) -> None:
        network = self.network
        network.messages += 1
        network.bytes += len(piece)
        network.bulk_pieces += 1
        if network.bulk_pieces in network.bulk_breaks:
            network.world.after(network.delay(), self._break)
        self.sent += 1
        if not self.mute:
            self.to_server.send((head, piece))
            if self.to_server.lost:
                self._reset_answer(cast(End, self.client), self.to_server)

    def take(self) -> tuple[Head, bytes]:
        self.to_client.send(_TAKEN)
        return self.pieces.popleft()

    def _break(self) -> None:
        """On the way, in the midst: both ends learn of it, one of them, or neither."""
        random = self.network.bulk_random
        who = random.choice([0, 1, 2, None])
        learns = "nobody" if who is None else ("both ends", "the sender", "the receiver")[who]
        self.network.world.say(f"the bulk connection from {self.client_host} to {self.server_host} breaks; {learns} to "
                               f"learn of it")
        if who is None:
            self.mute = True
        else:
            self.reset(who)


class SimSender(End):
    """Stands for bulk.Sender."""

    role = "bulk"
    blocked = False

    def __init__(self, network: Network, process: Process, address: str, name: bytes, is_node: bool) -> None:
        self.network = network
        self.process = process
        self.name = name
        self.ready = False
        self.broken = ""
        self.count = 0
        self.news = network.source()
        self.descriptor = self.news.number
        self._is_node = is_node
        self._ended = ""
        self._connection = BulkConnection(network, self, address, name)
        self.news.has_room = lambda: self._connection.has_room

    def on_event(self, connection: Connection, kind: str, why: str) -> None:
        if kind != "connected":
            self._ended = why
        self.news.rise()

    def watch(self) -> None:
        self.news.ready = False
        self.broken = self.broken or self._ended
        self.ready = self._connection.established

    def flush(self) -> bool:
        return not self.broken and (not self.ready or self._connection.has_room)

    def send(self, head: Head, piece: memoryview) -> bool:
        if self.broken or not self.ready or not self._connection.has_room:
            return False
        data = bytearray(piece)
        random = self.network.world.random
        if self._is_node and random.random() < self.network.spoils:
            data[random.randrange(len(data))] ^= 1
            self.network.world.say(f"a piece by bulk from {self.process.name} is spoilt")
        self.count += 1
        self._connection.carry(head, bytes(data))
        return True

    def close(self) -> None:
        if not self.broken:
            self.broken = "it was closed"
        if self._connection.client is not None:
            self._connection.abort(self)
        self.network.sources.pop(self.descriptor, None)


class SimReceiver:
    """Stands for bulk.Receiver."""

    def __init__(self, gate: SimGate, connection: BulkConnection) -> None:
        self.name = connection.name
        self.broken = ""
        self.ended = False
        self.count = 0
        self.news = gate.network.source()
        self.descriptor = self.news.number
        self._gate = gate
        self._connection = connection
        connection.receiver = self

    @property
    def after(self) -> int:
        pieces = self._connection.pieces
        return pieces[0][0].after if pieces else 0

    def receive(self, most: int, received: int = 0) -> Iterator[tuple[Head, memoryview]]:
        pieces = self._connection.pieces
        while most and pieces and not self.broken and pieces[0][0].after <= received:
            most -= 1
            head, piece = self._connection.take()
            self.count += 1
            yield head, memoryview(piece)
        if self.ended and not pieces:
            self.broken = self.broken or "the other side has ended it"
        self.news.ready = bool(pieces) or (self.ended and not self.broken)

    def close(self) -> None:
        self.broken = self.broken or "it was closed"
        if self._connection.server is not None:
            self._connection.abort(self._gate)
        self._gate.network.sources.pop(self.descriptor, None)

