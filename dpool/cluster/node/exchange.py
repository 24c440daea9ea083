"""The objects of a node: takes in what drivers and other nodes send of them, and sends other nodes what those ask for.

Owns the bytes of every object here and the connections to other nodes; what is to be done is objects.py's to decide.
Belongs to the agent's loop; the agent is told what concerns its parts: what they lack, and what they have now.

An object passes on piece by piece, while it still comes: a chain of nodes takes hardly longer than one of them. What is
said of it goes by ZeroMQ links; the pieces, too, until a bulk connection is there: see inlets.py and outlets.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable

import msgspec

from dpool.cluster.node.inlets import Inlets
from dpool.cluster.node.objects import CLOSE, LEAVE, PULL, Deed, Objects
from dpool.cluster.node.outlets import Outlets
from dpool.cluster.store import transfer
from dpool.cluster.store.transfer import Arrival, BadPiece
from dpool.cluster.wire import messages
from dpool.cluster.wire.bulk import Head
from dpool.cluster.wire.keys import AGENT
from dpool.cluster.wire.links import Dialer, Frame, Listener
from dpool.cluster.wire.links import Waker as LinksWaker
from dpool.cluster.wire.surroundings import Surroundings

# What may be under way from one node to another, of all objects that are on the move there; of each that is not, one
# piece. Larger: fills longer and faster links. Smaller: less memory on both sides.
WINDOW_BYTES = 16 << 20
# An object of which nothing has come for so long is asked for again, to hear whether its source is still there. Less
# than objects.py, SILENT_AFTER_S.
ASK_AGAIN_S = 0.9
# A connection to another node of which nothing is wanted is closed after this time. Longer: fewer handshakes, of a few
# milliseconds. Shorter: fewer descriptors.
IDLE_S = 3.0
# A bulk connection by which something is on its way is given up when nothing has come for so long. Longer: more stops
# of the network are ridden out. Less than objects.py, QUEUED_AFTER_S.
BULK_SILENT_S = 2.0
# Messages of other nodes that are taken in a turn of the agent's loop, before it looks after its workers again.
_BURST = 64


class _Source:
    """Another node, of which objects are wanted: how far each was asked for. See inlets.Owner."""

    def __init__(self, exchange: Exchange, address: str, dialer: Dialer, now: float) -> None:
        self.address = address
        self.dialer = dialer
        self.received = 0  # pieces that came by the dialer
        self.sent: dict[bytes, int] = {}  # how far it has sent what waits, as it says
        self.behind_at: float | None = None  # since when that is more than has come, and nothing comes
        self._exchange = exchange
        self.asked: dict[bytes, int] = {}
        self.moving: dict[bytes, None] = {}  # those of which the last that was said was a piece
        self.used_at = now

    def window(self, key: bytes) -> int:
        """How much of an object may be under way."""
        return max(WINDOW_BYTES // len(self.moving) if key in self.moving else 0, transfer.OBJECT_PIECE_BYTES)

    @property
    def place(self) -> Hashable:
        return self.address

    def on_bulk(self, head: Head, piece: memoryview) -> None:
        self._exchange.on_bulk(self, head, piece)

    def on_bulk_end(self, name: bytes) -> None:
        self._exchange.inlet_ended(self, name)

    def forget(self, key: bytes) -> bool:
        """An object is not wanted from here any more; whether it was."""
        self.moving.pop(key, None)
        self.sent.pop(key, None)
        return self.asked.pop(key, None) is not None


class _Puller:
    """Another node that wants an object: what it gets next, and where to stop until it says more."""

    __slots__ = ("next", "upto")

    def __init__(self, start: int) -> None:
        self.next = self.upto = start


class Exchange:
    """`tell` is called with what concerns a part: see objects.py, ASK, GOT and READY."""

    def __init__(self, around: Surroundings, waker: LinksWaker, listener: Listener, inlets: Inlets,
                 tell: Callable[[Deed], None]) -> None:
        self.objects = Objects()
        self._inlets = inlets
        self._outlets = Outlets(around, waker, self._next_piece, self._outlet_ended)
        self._by_link: Counter[bytes] = Counter()  # pieces that were sent by ZeroMQ, for each connection
        self._around = around
        self._waker = waker
        self._listener = listener
        self._tell = tell
        self._arrivals: dict[bytes, Arrival] = {}  # of every object of which there is something
        self._sources: dict[str, _Source] = {}  # by address
        self._pullers: dict[bytes, dict[bytes, _Puller]] = {}  # object -> connection -> how far it is

    # -- for the agent's parts

    def need(self, key: bytes, part: bytes, batch: int) -> bool:
        """Whether an object that a batch needs is here; if not, the agent is told when it is."""
        here, deeds = self.objects.need(key, part, batch, self._around.now())
        self._do(deeds)
        return here

    def descriptor(self, key: bytes) -> int:
        """Of an object that is here; it stays this one's."""
        return self._arrivals[key].descriptor

    def fetch(self, message: messages.Fetch, part: bytes) -> None:
        """A driver says what its part will need, and from where."""
        self._do(self.objects.fetch(message.key, message.size, part, message.source, message.own, self._around.now()))

    def let_go(self, key: bytes, part: bytes, batch: int = 0) -> None:
        """A part, or one of its batches, needs an object no longer."""
        self._do(self.objects.let_go(key, part, batch, self._around.now()))

    def part_ended(self, part: bytes) -> None:
        """A part is gone."""
        self._do(self.objects.part_ended(part, self._around.now()))

    def on_piece(self, part: bytes, header: tuple[bytes, int, int], piece: memoryview) -> None:
        """The driver of a part has sent a piece: see sessions.OBJECT_HEADER. Raises BadPiece if it is none, OSError if
        there is no memory for it."""
        key, size, start = header
        self._do(self.objects.sent(key, size, part, self._around.now()))
        self._add(key, size, start, piece)

    def on_bulk_piece(self, part: bytes, head: Head, piece: memoryview) -> None:
        """The same, by a bulk connection: it may be late for what the part does not need any more."""
        if self.objects.needs(head.key, part):
            self.on_piece(part, (head.key, head.size, head.start), piece)

    def lacking(self, part: bytes) -> None:
        """Some of what the driver of a part has sent by a bulk connection may not have come."""
        self._do(self.objects.lacking(part, self._around.now()))

    def _add(self, key: bytes, size: int, start: int, piece: memoryview, checksum: int | None = None) -> None:
        known = self.objects.get(key)
        if known is None or known.whole:
            return
        if size != known.size and known.size:
            raise BadPiece(f"a piece of an object of {size} bytes came for one of {known.size}")
        arrival = self._arrivals.get(key)
        if arrival is None:
            arrival = self._arrivals[key] = Arrival(size)
        if start < arrival.have:
            return  # another one has brought it meanwhile
        arrival.add(size, start, piece, checksum)
        known.size = size
        for peer in list(self._pullers.get(key, ())):
            self._serve(key, peer)
        self._do(self.objects.moved(key, arrival.have, self._around.now()))

    # -- what is decided

    def _do(self, deeds: list[Deed]) -> None:
        for deed in deeds:
            if deed.what == PULL:
                self._pull(deed.key, deed.source)
            elif deed.what == LEAVE:
                source = self._sources.get(deed.source)
                if source is not None:
                    self._leave(source, deed.key)
            elif deed.what == CLOSE:
                self._close(deed.key)
            else:
                self._tell(deed)

    @staticmethod
    def _leave(source: _Source, key: bytes) -> None:
        if source.forget(key):
            source.dialer.send((messages.encode(messages.Enough(key)),))

    def _close(self, key: bytes) -> None:
        for peer in self._pullers.pop(key, ()):
            self._listener.send(peer, (messages.encode(messages.NotHere(key)),))
        arrival = self._arrivals.pop(key, None)
        if arrival is not None:
            arrival.close()

    # -- other nodes' objects

    def _pull(self, key: bytes, address: str) -> None:
        """Ask for an object, or for more of it."""
        now = self._around.now()
        source = self._sources.get(address)
        if source is None:
            try:
                dialer = self._around.dialer(AGENT, AGENT, address)
            except (ValueError, OSError):  # no address, or there are no descriptors
                self._do(self.objects.refused(key, address, now))
                return
            source = self._sources[address] = _Source(self, address, dialer, now)
            self._waker.add(dialer.descriptors)
        offer = self._inlets.offer(source)
        if offer is not None:
            source.dialer.send((messages.encode(offer),))
        arrival = self._arrivals.get(key)
        have = arrival.have if arrival is not None else 0
        source.used_at = now
        source.asked[key] = have + source.window(key)
        source.dialer.send((messages.encode(messages.Pull(key, have, source.asked[key])),))

    def receive(self) -> bool:
        """Take in what other nodes have sent; whether there was anything, so that there may be more."""
        some = False
        for address, source in list(self._sources.items()):
            for count, frames in enumerate(source.dialer.receive(), 1):
                some = True
                self._from_source(address, source, frames)
                if count == _BURST:
                    break
            source.dialer.watch()
            if source.dialer.broken and self._sources.get(address) is source:
                some = True
                self._hang_up(address)
                self._do(self.objects.source_lost(address, self._around.now()))
        return some

    def _from_source(self, address: str, source: _Source, frames: list[memoryview]) -> None:
        try:
            message = messages.from_source.decode(frames[0])
        except msgspec.DecodeError:
            return
        now = self._around.now()
        self.objects.heard(address, now)
        if isinstance(message, messages.BulkOver):
            if message.name == self._inlets.name(source):
                self._inlets.over(source)
                if message.used:
                    self._pull_again(source)
            return
        if isinstance(message, messages.Piece):
            source.received += 1
            if len(frames) == 2:
                self._on_piece_of(source, message.key, message.size, message.start, message.checksum, frames[1])
                return
        known = self.objects.get(message.key)
        if known is None or known.source != address:
            return  # not wanted any more
        if isinstance(message, messages.Patience):
            source.moving.pop(message.key, None)
            source.sent[message.key] = message.sent
            return
        source.forget(message.key)
        self._do(self.objects.refused(message.key, address, now))

    def on_bulk(self, source: _Source, head: Head, piece: memoryview) -> None:
        """A source has sent a piece by its bulk connection."""
        source.behind_at = None
        self.objects.heard(source.address, self._around.now())
        self._on_piece_of(source, head.key, head.size, head.start, head.checksum, piece)

    def _on_piece_of(self, source: _Source, key: bytes, size: int, start: int, checksum: int,
                     piece: memoryview) -> None:
        now, address = self._around.now(), source.address
        known = self.objects.get(key)
        if known is None or known.source != address:
            return  # not wanted any more
        try:
            Arrival.check(piece, checksum)
            self._add(key, size, start, piece, checksum)
        except (BadPiece, OSError):
            self._do(self.objects.refused(key, address, now))
            return
        self.objects.brought(address, now)
        source.used_at = now
        if known.whole:
            if source.forget(key) and self._inlets.name(source):
                source.dialer.send((messages.encode(messages.Enough(key)),))  # it may still wait for more to be wanted
            return
        source.moving[key] = None
        if source.asked.get(key, 0) - known.have <= source.window(key) // 2:
            self._pull(key, address)

    def inlet_ended(self, source: _Source, name: bytes) -> None:
        """The bulk connection of a source has ended, or has been given up: what was on its way is asked for again."""
        source.dialer.send((messages.encode(messages.BulkOver(name)),))
        self._pull_again(source)

    def _pull_again(self, source: _Source) -> None:
        source.behind_at = None
        source.sent.clear()
        for key in list(source.asked):
            known = self.objects.get(key)
            source.dialer.send((messages.encode(messages.Enough(key)),))
            if known is not None and known.source == source.address:
                self._pull(key, source.address)
            else:
                source.forget(key)

    def _hang_up(self, address: str) -> None:
        source = self._sources.pop(address)
        self._inlets.end(source)
        self._waker.remove(source.dialer.descriptors)
        source.dialer.close()

    def tick(self) -> None:
        """Call this once a second: sources that are silent are given up, and asked whether they are still there."""
        now = self._around.now()
        self._do(self.objects.tick(now))
        for address, source in list(self._sources.items()):
            for key in list(source.asked):
                known = self.objects.get(key)
                if known is None or known.source != address:
                    self._leave(source, key)  # it came from elsewhere
                elif now >= known.moved_at + ASK_AGAIN_S:
                    self._pull(key, address)
            self._tick_inlet(source, now)
            if not source.asked and now >= source.used_at + IDLE_S:
                self._hang_up(address)
        self._outlets.tick()

    def _tick_inlet(self, source: _Source, now: float) -> None:
        """Give a bulk connection up by which nothing comes of what was sent."""
        name = self._inlets.name(source)
        wanted = [(self.objects.get(key), sent) for key, sent in source.sent.items()] if name else ()
        if not any(known is not None and known.source == source.address and sent > known.have
                   for known, sent in wanted):
            source.behind_at = None
        elif source.behind_at is None:
            source.behind_at = now
        elif now >= source.behind_at + BULK_SILENT_S:
            self._inlets.over(source)
            self.inlet_ended(source, name)

    # -- for other nodes

    def on_peer(self, peer: bytes, frame: Frame) -> None:
        """Another node has said something."""
        try:
            message = messages.to_source.decode(frame)
        except msgspec.DecodeError:
            return
        if isinstance(message, messages.BulkOffer):
            self._outlets.open(peer, message)
            return
        if isinstance(message, messages.BulkOver):
            if self._outlets.close(peer, message.name):
                self._forget_pullers(peer)  # it asks again for what it lacks
            return
        key = message.key
        if isinstance(message, messages.Enough):
            self._forget_puller(key, peer)
            return
        known = self.objects.get(key)
        if known is None:
            self._listener.send(peer, (messages.encode(messages.NotHere(key)),))
            return
        pullers = self._pullers.setdefault(key, {})
        puller = pullers.get(peer)
        if puller is None:
            puller = pullers[peer] = _Puller(message.start)
        # Not more than one may have under way, whatever it asks for.
        puller.upto = max(puller.upto, min(message.upto, message.start + WINDOW_BYTES))
        before = puller.next
        if self._serve(key, peer) and not (before > message.start and self._outlets.ready(peer)):
            return
        # By a bulk connection more may be on its way than has come, and nobody learns of it if that never comes.
        sent = puller.next if self._outlets.ready(peer) else 0
        if message.start >= known.have and self.objects.in_vain(key, self._around.now()):
            self._forget_puller(key, peer)
            self._listener.send(peer, (messages.encode(messages.NotHere(key)),))
        else:
            self._listener.send(peer, (messages.encode(messages.Patience(key, sent)),))

    def _serve(self, key: bytes, peer: bytes) -> bool:
        """Send a node what it has asked for and is here; whether there was anything."""
        arrival, puller = self._arrivals.get(key), self._pullers[key][peer]
        if self._outlets.ready(peer):
            if arrival is None or not arrival.has_after(puller.next, puller.upto):
                return False
            self._outlets.want(peer, key)
            return True
        some = False
        for start, checksum, content in arrival.after(puller.next, puller.upto) if arrival is not None else ():
            some = True
            puller.next = start + len(content)
            piece = messages.Piece(key, arrival.size, start, checksum)  # type: ignore[union-attr]
            if not self._listener.send(peer, (messages.encode(piece), content)):
                self._forget_puller(key, peer)
                return True
            self._by_link[peer] += 1
        if arrival is not None and puller.next == arrival.size:
            self._forget_puller(key, peer)
        return some

    def _next_piece(self, peer: bytes, key: bytes) -> tuple[Head, memoryview] | None:
        """The next piece of an object for a node that gets it by a bulk connection, if it is here and was asked for."""
        arrival, puller = self._arrivals.get(key), self._pullers.get(key, {}).get(peer)
        if arrival is None or puller is None:
            return None
        found = arrival.next_after(puller.next, puller.upto)
        if found is None:
            return None
        start, checksum, content = found
        puller.next = start + len(content)
        return (Head(key, arrival.size, start, checksum, len(content), self._by_link[peer]), memoryview(content))

    def _outlet_ended(self, peer: bytes, name: bytes, used: bool) -> None:
        """A bulk connection to another node has ended, or cannot be made."""
        if used:
            self._forget_pullers(peer)  # it asks again for what it lacks
        self._listener.send(peer, (messages.encode(messages.BulkOver(name, used)),))

    def turn(self, ready: set[int]) -> None:
        """Send more to other nodes that have room for it."""
        self._outlets.turn(ready)

    def _forget_puller(self, key: bytes, peer: bytes) -> None:
        pullers = self._pullers.get(key, {})
        pullers.pop(peer, None)
        if not pullers:
            self._pullers.pop(key, None)

    def peer_ended(self, peer: bytes) -> None:
        """A connection has ended."""
        self._outlets.close(peer)
        self._by_link.pop(peer, None)
        self._forget_pullers(peer)

    def _forget_pullers(self, peer: bytes) -> None:
        for key in [key for key, pullers in self._pullers.items() if peer in pullers]:
            self._forget_puller(key, peer)

    # -- the end

    def close(self) -> None:
        """Give everything back."""
        for address in list(self._sources):
            self._hang_up(address)
        self._outlets.close_all()
        for arrival in self._arrivals.values():
            arrival.close()
        self._arrivals.clear()
        self._pullers.clear()

    def validate(self) -> None:
        """Raise AssertionError unless the books agree with what is here. For tests."""
        self.objects.validate()
        for key, arrival in self._arrivals.items():
            known = self.objects.get(key)
            assert known is not None and known.have == arrival.have
        assert all(self.objects.get(key) is not None for key in self._pullers)
