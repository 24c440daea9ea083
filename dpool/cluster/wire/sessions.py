"""A session: messages in order, each once, over connections that may break, be replaced, and lose what they carried.

Pure: it numbers, remembers and sorts out; it sends nothing and reads no clock. One end each is held by a driver for
each node of a group, and by that node.

What is sent is kept until the other side says that it has it. When a connection is replaced, both sides say what they
have received, and what is missing goes out again, in order; what comes twice is dropped. So a message is lost only
with the whole session.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Sequence

# kind, flags, segments that came before and belong to this message, unused, number, highest number received.
HEADER = struct.Struct("<BBHIQQ")

CONTROL = 1  # a message of messages.py
TASKS = 2  # a batch, as a worker takes it: frames.TASKS
RESULTS = 3  # as a worker sends it: frames.RESULTS
CHUNK = 4  # a piece of a segment
ACK = 5  # no message: only says what was received
OBJECT = 6  # a piece of an object
KINDS = frozenset((CONTROL, TASKS, RESULTS, CHUNK, ACK, OBJECT))

# Flags of TASKS, about the first segment of a function that travels by segment.
FUNCTION_STORED = 1  # the first segment is the function's: keep it under its number
FUNCTION_KNOWN = 2  # the function's segment was kept before

# Before the bytes of a CHUNK: the size of the whole segment, and where this piece belongs.
CHUNK_HEADER = struct.Struct("<QQ")
# Before those of an OBJECT: its key, how large it is, and where this piece belongs.
OBJECT_HEADER = struct.Struct("<16sQQ")

# Say what was received at the latest after so many messages. More: fewer messages. Fewer: less is kept and resent.
ACK_EVERY = 32

Frames = tuple[bytes | memoryview, ...]


class ProtocolError(Exception):
    """The other side has sent what it could not have: the session cannot go on."""


class Session:
    """One end of a session."""

    __slots__ = ("sent", "received", "said", "unacknowledged")

    def __init__(self) -> None:
        self.sent = 0  # number of the last message that was sent
        self.received = 0  # number of the last message that came
        self.said = 0  # `received` as the other side was last told
        self.unacknowledged: deque[tuple[int, Frames]] = deque()

    def wrap(self, kind: int, parts: Sequence[bytes | memoryview], flags: int = 0, segments: int = 0,
             beside: memoryview | None = None) -> Frames:
        """The frames of the next message; they are kept until acknowledged. `beside` is a frame of its own."""
        self.sent += 1
        self.said = self.received
        head = b"".join((HEADER.pack(kind, flags, segments, 0, self.sent, self.received), *parts))
        frames: Frames = (head,) if beside is None else (head, beside)
        self.unacknowledged.append((self.sent, frames))
        return frames

    def acknowledgement(self) -> Frames:
        """The frames that tell the other side what was received."""
        self.said = self.received
        return (HEADER.pack(ACK, 0, 0, 0, 0, self.received),)

    @property
    def owes_acknowledgement(self) -> bool:
        return self.received - self.said >= ACK_EVERY

    def accept(self, kind: int, number: int, acknowledged: int) -> bool:
        """A header has come: whether its message is new. Raises ProtocolError if one before it is missing."""
        self.acknowledged(acknowledged)
        if kind == ACK or number <= self.received:
            return False
        if number != self.received + 1:
            raise ProtocolError(f"message {number} came after message {self.received}")
        self.received = number
        return True

    def acknowledged(self, number: int) -> None:
        """The other side has received all messages up to `number`. Raises ProtocolError if there is none such."""
        if number > self.sent:
            raise ProtocolError(f"message {number} was received, but {self.sent} was the last one sent")
        kept = self.unacknowledged
        while kept and kept[0][0] <= number:
            kept.popleft()

    def resume(self, received: int) -> list[Frames]:
        """A new connection, on which the other side has said what it has: what to send on it first."""
        self.acknowledged(received)
        if self.unacknowledged and self.unacknowledged[0][0] != received + 1:
            raise ProtocolError(f"message {received + 1} was acknowledged before, and is no longer here")
        return [frames for _, frames in self.unacknowledged]
