"""What travels to a node beside a group's batches, and stays there: functions and objects, each once.

Turns batches into messages of a session, and remembers what a node has; sends nothing. Where a node gets an object from
is spreading.py's to decide, for all groups of the process at once: they share a Sharing. Called by
driver/shipping.py, under its lock.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Sequence

from dpool.cluster.driver import spreading
from dpool.cluster.driver.spreading import HERE, SEND, Spreading
from dpool.cluster.store import segments, transfer
from dpool.cluster.store.transfer import pieces
from dpool.cluster.wire import frames, messages, sessions

# Functions and objects that a node keeps for a group, so that they travel once.
MAX_KEPT = 64
MAX_KEPT_OBJECTS = 1024

Pieces = list[tuple[int, int, memoryview]]
# A message of a session that is not numbered yet: its kind, its parts, its flags, how many segments came before it and
# belong to it, and what goes beside it. See sessions.Session.wrap().
Unsent = tuple[int, Sequence[bytes | memoryview], int, int, memoryview | None]


def control(message: messages.Message, segments: int = 0) -> Iterator[Unsent]:
    yield sessions.CONTROL, (messages.encode(message),), 0, segments, None


def segment(carried: Pieces) -> Iterator[Unsent]:
    """A segment that belongs to the next message that says how many came."""
    for size, start, piece in carried:
        yield sessions.CHUNK, (sessions.CHUNK_HEADER.pack(size, start),), 0, 0, piece


def stored(key: bytes, carried: Pieces, have: int = 0) -> Iterator[Unsent]:
    """An object, without what the node has of it."""
    for size, start, piece in carried:
        if start >= have:
            head = sessions.OBJECT_HEADER.pack(key, size, start)
            yield sessions.OBJECT, (head,), 0, 0, piece


class Sharing:
    """Where the objects of this process are, for all its groups. Any thread may call it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards the books; taken last, under the lock of a port
        self._spreading = Spreading(transfer.OBJECT_PIECE_BYTES)

    def want(self, key: bytes, size: int, node: str, session: bytes, now: float) -> tuple[str, str]:
        with self._lock:
            return self._spreading.want(key, size, node, session, now)

    def arrived(self, key: bytes, node: str) -> None:
        with self._lock:
            self._spreading.arrived(key, node)

    def failed(self, key: bytes, node: str, source: str, now: float) -> None:
        with self._lock:
            self._spreading.failed(key, node, source, now)

    def dropped(self, keys: Iterable[bytes], node: str, session: bytes) -> None:
        with self._lock:
            for key in keys:
                self._spreading.dropped(key, node, session)

    def places(self, objects: dict[bytes, int]) -> dict[str, int]:
        """How many bytes of these objects, by key, are on each node or on their way there."""
        found: dict[str, int] = {}
        with self._lock:
            for key, nbytes in objects.items():
                for node in self._spreading.nodes(key):
                    found[node] = found.get(node, 0) + nbytes
        return found


def large(objects: Iterable[frames.Entry]) -> dict[bytes, int]:
    """Those that are worth looking for a node that has them, and how large they are."""
    return {key: nbytes for key, nbytes, _, _ in objects if nbytes >= spreading.FETCH_MIN_BYTES}


class Luggage:
    """What one session has brought to its node, and what it has still to bring."""

    def __init__(self, sharing: Sharing, node: str, session: bytes) -> None:
        self._sharing = sharing
        self._node = node  # its address
        self._session = session
        self._functions: OrderedDict[int, None] = OrderedDict()
        # By key. An object's pieces are kept until the node says that it has it: it may ask for them till then.
        self.objects: OrderedDict[bytes, Pieces | None] = OrderedDict()
        # Large ones that the driver sends, by key: to be taken piece by piece when nothing else is to be sent.
        self.later: dict[bytes, Iterator[Unsent]] = {}
        # What the node has missed of objects: the same, but not by a bulk connection, which may lose it again.
        self.missed: dict[bytes, Iterator[Unsent]] = {}

    def pack(self, parts: list[bytes], descriptors: list[int], here: Collection[bytes],
             now: float) -> list[Iterator[Unsent]]:
        """A batch as messages. `here`: the objects that there are in this process. What is sent is mapped now: the
        descriptors may be closed when this returns."""
        flags, _, _, function, *_ = frames.TASKS.unpack_from(parts[0])
        objects = frames.unpack_refs(parts[2])[0] if parts[2] else []
        rest = iter(descriptors)
        carried: list[Pieces] = []
        link_flags = 0
        # Nothing is noted before all is mapped: that may fail.
        if flags & frames.FUNCTION_IN_SEGMENT:
            link_flags = sessions.FUNCTION_KNOWN
            descriptor = next(rest)
            if function not in self._functions:
                link_flags = sessions.FUNCTION_STORED
                carried.append(pieces(descriptor))
        if flags & frames.BODY_IN_SEGMENT:
            carried.append(pieces(next(rest), segments.places(parts[3])))
        new = {key: pieces(descriptor, segments.places(table), transfer.OBJECT_PIECE_BYTES)
               for (key, _, table, _), descriptor in zip(objects, rest, strict=True) if key not in self.objects}
        first: list[Iterator[Unsent]] = []
        if link_flags:
            if link_flags == sessions.FUNCTION_STORED and len(self._functions) >= MAX_KEPT:
                first.append(control(messages.Forget(self._functions.popitem(last=False)[0])))
            self._functions.pop(function, None)
        if objects:
            gone = self.gone(here) + self._too_many({entry[0] for entry in objects})
            if gone:
                first.append(control(messages.ForgetObjects(gone)))
        for key, *_ in objects:
            if key in new:
                first += self._bring(key, new[key], now)
            else:
                self.objects.move_to_end(key)
        batch = (sessions.TASKS, (b"".join(parts),), link_flags, len(carried), None)
        packed = [*first, *map(segment, carried), iter((batch,))]
        # Last, and with no call behind it: if a Ctrl-C keeps all this from being sent, the function is sent again.
        if link_flags:
            self._functions[function] = None
        return packed

    def _bring(self, key: bytes, carried: Pieces, now: float) -> list[Iterator[Unsent]]:
        size = carried[0][0]
        self.objects[key] = carried
        how, source = self._sharing.want(key, size, self._node, self._session, now)
        if how == SEND and size < spreading.FETCH_MIN_BYTES:
            return [stored(key, carried)]
        if how == SEND:
            self.later[key] = stored(key, carried)
        return [] if how == HERE else [control(messages.Fetch(key, size, source, own=how == SEND))]

    def one_piece(self) -> Iterator[Unsent]:
        """The next piece of the first of the large ones, which there must be; first of what was missed."""
        return self._first_of(self.missed or self.later)

    def one_for_bulk(self) -> Iterator[Unsent]:
        """The same, of what may go by a bulk connection."""
        return self._first_of(self.later)

    @staticmethod
    def _first_of(waiting: dict[bytes, Iterator[Unsent]]) -> Iterator[Unsent]:
        key, rest = next(iter(waiting.items()))
        for piece in rest:
            yield piece
            return
        waiting.pop(key, None)

    def got(self, key: bytes) -> None:
        """The node has an object, whole."""
        if key in self.objects:
            self.objects[key] = None
            self.later.pop(key, None)  # somebody else was faster
            self.missed.pop(key, None)
            self._sharing.arrived(key, self._node)

    def missing(self, message: messages.Missing, now: float) -> None:
        """The node lacks an object, or the rest of it: to be sent."""
        carried = self.objects.get(message.key)
        if carried is not None:
            self._sharing.failed(message.key, self._node, message.source, now)
            self.later.pop(message.key, None)
            self.missed[message.key] = stored(message.key, carried, message.have)

    def gone(self, here: Collection[bytes]) -> list[bytes]:
        """The objects that the node is to forget, for they are not in this process any more."""
        return self._forget([key for key, carried in self.objects.items() if carried is None and key not in here])

    def _too_many(self, needed: set[bytes]) -> list[bytes]:
        """The oldest, if the node would have too many with those that are needed now."""
        excess = len(self.objects) + len(needed) - MAX_KEPT_OBJECTS
        old = [key for key, carried in self.objects.items() if carried is None and key not in needed]
        return self._forget(old[:max(excess, 0)])

    def _forget(self, keys: list[bytes]) -> list[bytes]:
        for key in keys:
            del self.objects[key]
        self._sharing.dropped(keys, self._node, self._session)
        return keys

    def end(self) -> None:
        """The session is over."""
        self.later.clear()
        self.missed.clear()
        self._forget(list(self.objects))
