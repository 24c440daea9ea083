"""What a group's workers print, cut into whole lines, so that those of different workers do not mix.

Reads pipes that never block it; sends nothing. One per part of a group, used by node/part.py.
"""

from __future__ import annotations

import os

# Read at most so much of one worker at a time. More: fewer steps. Less: the others wait less.
READ_BYTES = 64 * 1024
# A line that is longer is not waited for.
MAX_LINE_BYTES = 256 * 1024


class Output:
    """The reading ends of its workers' stdout (stream 1) and stderr (stream 2)."""

    def __init__(self) -> None:
        self._streams: dict[int, tuple[int, bytearray]] = {}  # descriptor -> stream, what is no whole line yet
        self.fresh: list[int] = []  # descriptors that were opened and are not yet waited for by the owner

    def open(self, stream: int) -> int:
        """A pipe for a new worker; the end it writes to, for the caller to close."""
        ours, theirs = os.pipe()
        os.set_blocking(ours, False)
        self._streams[ours] = (stream, bytearray())
        self.fresh.append(ours)
        return theirs

    @property
    def descriptors(self) -> list[int]:
        return list(self._streams)

    def read(self, descriptor: int) -> tuple[int, bytes, bool]:
        """What is new there: the stream, whole lines, and whether it has ended, which closes the descriptor."""
        stream, rest = self._streams[descriptor]
        try:
            data = os.read(descriptor, READ_BYTES)
        except BlockingIOError:
            return stream, b"", False
        if not data:
            del self._streams[descriptor]
            os.close(descriptor)
            return stream, bytes(rest), True
        rest += data
        end = rest.rfind(b"\n") + 1
        if not end and len(rest) > MAX_LINE_BYTES:
            end = len(rest)
        lines = bytes(rest[:end])
        del rest[:end]
        return stream, lines, False

    def close(self) -> None:
        for descriptor in self._streams:
            os.close(descriptor)
        self._streams.clear()
