"""Decides where a node gets an object from: from this driver, from a node that has it, or from one that is getting it.

Counts only: who has what, who gets it from whom, and whom that keeps busy; the time is an argument. Sends nothing. One
a process, for all its groups: what one has brought to a node serves the others. Called by driver/luggage.py.
"""

from __future__ import annotations

from collections.abc import Collection

# A smaller object the driver sends itself. Larger: the driver sends more. Smaller: connections between nodes, and
# messages, for little: over links of 300 Mbit/s four nodes had 64 KiB from the driver in 8 ms and from each other in
# 25, 256 KiB in 37 and in 20.
FETCH_MIN_BYTES = 256 * 1024
# A node that could not get an object from another one is not sent there again for so long.
APART_S = 30.0

HERE = "here"  # the node has it, through another session
OTHER = "other"  # another session brings it
SEND = "send"  # the driver is to send it
FETCH = "fetch"  # the node is to get it from another one

DRIVER = ""  # in the place of a node

Node = str  # its address


class Copy:
    """An object on a node, or on its way there."""

    __slots__ = ("sessions", "here", "source", "depth", "pullers")

    def __init__(self, source: Node, depth: int) -> None:
        self.sessions: dict[bytes, None] = {}  # of this process; those that were told of it
        self.here = False
        self.source = source  # the node that it comes from, DRIVER if the driver sends it
        self.depth = depth  # how many nodes it passes before it is whole somewhere
        self.pullers = 0  # nodes that get it from this one now


class Object:
    """What is known of an object: its copies, and how many nodes the driver sends it to now."""

    __slots__ = ("pieces", "copies", "sent")

    def __init__(self, pieces: int) -> None:
        self.pieces = pieces
        self.copies: dict[Node, Copy] = {}
        self.sent = 0


class Spreading:
    """The books. `piece_bytes`: how much travels at a time."""

    def __init__(self, piece_bytes: int) -> None:
        self._piece_bytes = piece_bytes
        self._objects: dict[bytes, Object] = {}
        self._apart: dict[tuple[Node, Node], float] = {}  # (who wants, from whom) -> until when that is not tried

    def want(self, key: bytes, size: int, node: Node, session: bytes, now: float) -> tuple[str, Node]:
        """A session needs an object on its node, of which it was not told before: what to do, and from which node."""
        known = self._objects.get(key)
        if known is None:
            known = self._objects[key] = Object(-(-size // self._piece_bytes))
        copy = known.copies.get(node)
        if copy is not None:
            copy.sessions[session] = None
            if copy.here:
                return HERE, DRIVER
            return (OTHER if size >= FETCH_MIN_BYTES else SEND), DRIVER
        source = self._source(known, node, now) if size >= FETCH_MIN_BYTES else DRIVER
        if source == DRIVER:
            copy = Copy(DRIVER, 1)
            known.sent += 1
        else:
            copy = Copy(source, 1 if known.copies[source].here else known.copies[source].depth + 1)
            known.copies[source].pullers += 1
        copy.sessions[session] = None
        known.copies[node] = copy
        return (SEND if source == DRIVER else FETCH), source

    def _source(self, known: Object, node: Node, now: float) -> Node:
        """Where it would be whole first, in pieces that pass before: a source that has others to serve is as slow as
        if each of them came first; one that is getting it itself is a piece behind its own. The driver counts as one
        that is busy already: whatever else the program sends leaves by its link."""
        best, least = DRIVER, known.pieces * (known.sent + 1)
        for other, copy in known.copies.items():
            cost = (0 if copy.here else copy.depth) + known.pieces * copy.pullers
            if cost > least or (cost == least and best != DRIVER):
                continue
            if self._apart.get((node, other), now) > now or self._leads_to(known, other, node):
                continue
            best, least = other, cost
        return best

    def _leads_to(self, known: Object, start: Node, node: Node) -> bool:
        """Whether what `start` gets comes from `node`, directly or not: then that may not wait for it."""
        at = start
        while at not in (DRIVER, node):
            copy = known.copies.get(at)
            at = copy.source if copy is not None and not copy.here else DRIVER
        return at == node

    def arrived(self, key: bytes, node: Node) -> None:
        """The object is on the node."""
        known = self._objects.get(key)
        copy = known.copies.get(node) if known is not None else None
        if known is not None and copy is not None and not copy.here:
            self._release(known, copy)
            copy.here = True

    def failed(self, key: bytes, node: Node, source: Node, now: float) -> None:
        """The node has not got it: `source` could not give it, if it is not DRIVER. The driver sends it from now on."""
        self._apart = {pair: until for pair, until in self._apart.items() if until > now}
        if source != DRIVER:
            self._apart[node, source] = now + APART_S
        known = self._objects.get(key)
        copy = known.copies.get(node) if known is not None else None
        if known is None or copy is None:
            return
        if not copy.here:
            self._release(known, copy)
        copy.here, copy.source, copy.depth = False, DRIVER, 1
        known.sent += 1

    def dropped(self, key: bytes, node: Node, session: bytes) -> None:
        """A session has forgotten the object, or has ended."""
        known = self._objects.get(key)
        copy = known.copies.get(node) if known is not None else None
        if known is None or copy is None:
            return
        copy.sessions.pop(session, None)
        if not copy.sessions:
            if not copy.here:
                self._release(known, copy)
            del known.copies[node]
            if not known.copies:
                del self._objects[key]

    def _release(self, known: Object, copy: Copy) -> None:
        """Whoever was to give it has one less to serve."""
        if copy.source == DRIVER:
            known.sent -= 1
        elif (giving := known.copies.get(copy.source)) is not None and giving.pullers:
            giving.pullers -= 1

    def nodes(self, key: bytes) -> Collection[Node]:
        """Those on which the object is, or to which it is on its way."""
        known = self._objects.get(key)
        return known.copies.keys() if known is not None else ()

    def validate(self) -> None:
        """Raise AssertionError unless the books agree, and every object comes from somewhere. For tests."""
        for known in self._objects.values():
            assert known.copies
            coming = [copy for copy in known.copies.values() if not copy.here]
            assert known.sent == sum(copy.source == DRIVER for copy in coming)
            for node, copy in known.copies.items():
                # One that was dropped and is there again does not count those that came to it before.
                assert 0 <= copy.pullers <= sum(other.source == node for other in coming)
                assert copy.sessions
                passed = {node}
                while copy.source != DRIVER and not copy.here and copy.source in known.copies:
                    assert copy.source not in passed, "nodes that wait for one another"
                    passed.add(copy.source)
                    copy = known.copies[copy.source]
