"""The bulk connections by which objects come to a node: offered to drivers and to other nodes, and received from.

Owns the gate and every receiver. Whoever is offered one has it at most once at a time, and after one that has failed
not for a while: all goes by the ZeroMQ links meanwhile, as where there is no gate. Belongs to the agent's loop.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Protocol

from dpool.cluster.store.transfer import BadPiece
from dpool.cluster.wire import bulk, messages
from dpool.cluster.wire.bulk import Gate, Head, Receiver
from dpool.cluster.wire.links import Waker
from dpool.cluster.wire.surroundings import Surroundings

# After a bulk connection that was not made, or has failed, no other is offered there for so long. Longer: fewer
# attempts at what a firewall forbids. Shorter: objects are fast again sooner after an accident.
APART_S = 60.0


class Owner(Protocol):
    """Whom a connection is offered to: a part, for its driver; a source of objects. Each is equal to itself alone."""

    @property
    def place(self) -> Hashable:
        """What is remembered of failures belongs to it."""

    @property
    def received(self) -> int:
        """How much has come by the link to it, of what pieces may have to wait for: see bulk.Head.after."""

    def on_bulk(self, head: Head, piece: memoryview) -> None:
        """A piece has come. Raises BadPiece or OSError if it is of no use: the connection is given up then."""

    def on_bulk_end(self, name: bytes) -> None:
        """The connection has ended by itself, or was of no use; it is closed."""


class _Inlet:
    """What is offered to an owner, or connected."""

    __slots__ = ("owner", "name", "until", "receiver")

    def __init__(self, owner: Owner, name: bytes, until: float) -> None:
        self.owner = owner
        self.name = name
        self.until = until
        self.receiver: Receiver | None = None


class Inlets:
    """Those of one node; without a gate there are none."""

    def __init__(self, around: Surroundings, waker: Waker, gate: Gate | None) -> None:
        self._around = around
        self._waker = waker
        self._gate = gate
        self._of: dict[Owner, _Inlet] = {}
        self._by_name: dict[bytes, _Inlet] = {}
        self._by_descriptor: dict[int, _Inlet] = {}
        self._paused: dict[_Inlet, None] = {}
        self._apart: dict[Hashable, float] = {}  # place -> until when nothing is offered there
        if gate is not None:
            waker.add([gate.descriptor])

    @property
    def address(self) -> str:
        """Where senders connect; "" if they cannot."""
        return self._gate.address if self._gate is not None else ""

    def offer(self, owner: Owner) -> messages.BulkOffer | None:
        """What is to be told to the sender, if it should connect now."""
        now = self._around.now()
        if self._gate is None or owner in self._of or self._apart.get(owner.place, now) > now:
            return None
        offered = self._gate.offer(now)
        if offered is None:
            return None
        name, key = offered
        self._of[owner] = self._by_name[name] = _Inlet(owner, name, now + bulk.OFFER_S)
        return messages.BulkOffer(name, key, self._gate.address)

    def count(self, owner: Owner) -> int:
        """Pieces that have come by the owner's connection."""
        inlet = self._of.get(owner)
        return inlet.receiver.count if inlet is not None and inlet.receiver is not None else 0

    def name(self, owner: Owner) -> bytes:
        """Of the owner's connection; empty if there is none."""
        inlet = self._of.get(owner)
        return inlet.name if inlet is not None and inlet.receiver is not None else b""

    # -- the agent's turns

    def turn(self, ready: set[int]) -> None:
        """Take in some of what has come to these descriptors."""
        if self._gate is None:
            return
        if self._gate.descriptor in ready:
            self._accept()
        for descriptor in ready & self._by_descriptor.keys():
            inlet = self._by_descriptor.get(descriptor)
            if inlet is not None:
                self._receive(inlet)

    def _accept(self) -> None:
        assert self._gate is not None
        for receiver in self._gate.accept(self._around.now()):
            inlet = self._by_name.get(receiver.name)
            if inlet is None:
                receiver.close()
                continue
            inlet.receiver = receiver
            self._by_descriptor[receiver.descriptor] = inlet
            self._waker.add([receiver.descriptor])

    def _receive(self, inlet: _Inlet) -> None:
        receiver, owner = inlet.receiver, inlet.owner
        assert receiver is not None
        useless = False
        try:
            for head, piece in receiver.receive(bulk.BURST, owner.received):
                owner.on_bulk(head, piece)
        except (BadPiece, OSError):
            useless = True
        if self._of.get(owner) is not inlet:
            return  # the owner has ended meanwhile
        if receiver.broken or useless:
            self.over(owner)
            owner.on_bulk_end(inlet.name)
        elif receiver.after > owner.received:
            self._waker.remove([receiver.descriptor])
            self._paused[inlet] = None

    def go_on(self) -> None:
        """More has come by the links: what had to wait for that is received again."""
        for inlet in list(self._paused):
            receiver = inlet.receiver
            assert receiver is not None
            if receiver.after <= inlet.owner.received:
                del self._paused[inlet]
                self._waker.add([receiver.descriptor])

    def tick(self) -> None:
        """Call this once a second."""
        if self._gate is None:
            return
        self._accept()
        now = self._around.now()
        for inlet in [inlet for inlet in self._of.values() if inlet.receiver is None and inlet.until <= now]:
            self.over(inlet.owner)
        self._apart = {place: until for place, until in self._apart.items() if until > now}

    # -- the end

    def over(self, owner: Owner, name: bytes = b"") -> None:
        """The owner's offer or connection (if it has this name) has failed."""
        inlet = self._of.get(owner)
        if inlet is not None and name in (b"", inlet.name):
            self._apart[owner.place] = self._around.now() + APART_S
            self.end(owner)

    def end(self, owner: Owner) -> None:
        """The owner has ended, or wants nothing more."""
        inlet = self._of.pop(owner, None)
        if inlet is None:
            return
        del self._by_name[inlet.name]
        self._paused.pop(inlet, None)
        if inlet.receiver is not None:
            del self._by_descriptor[inlet.receiver.descriptor]
            self._waker.remove([inlet.receiver.descriptor])
            inlet.receiver.close()
        elif self._gate is not None:
            self._gate.withdraw(inlet.name)

    def close(self) -> None:
        for owner in list(self._of):
            self.end(owner)
        if self._gate is not None:
            self._waker.remove([self._gate.descriptor])
            self._gate.close()
            self._gate = None

    def validate(self) -> None:
        """Raise AssertionError unless the books agree. For tests."""
        assert {inlet.name for inlet in self._of.values()} == set(self._by_name)
        connected = {inlet.receiver.descriptor for inlet in self._of.values() if inlet.receiver is not None}
        assert connected == set(self._by_descriptor)
        assert all(self._of.get(inlet.owner) is inlet for inlet in self._paused)
