"""A segment on its way between machines: cut into pieces here, put together there.

Reads and writes segments; sends nothing. Used by both ends of a session.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import resource
from collections.abc import Sequence

# The size is sealed, so that no reader can be made to fault beyond the end.
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
# Larger: fewer messages. Smaller: less memory for what is under way, and other messages wait less behind it.
PIECE_BYTES = 1 << 20


class BadPiece(Exception):
    """A piece that does not fit: the other side does not keep to the protocol."""


def pieces(descriptor: int, parts: Sequence[tuple[int, int]] | None = None) -> list[tuple[int, int, memoryview]]:
    """(size on the other side, where the piece belongs, the piece) for each piece of these (offset, bytes) parts, or of
    the whole segment. What lies between and behind the parts stays here: it may be of an earlier use of the segment.
    The views keep it mapped. Raises ValueError if a part is not in it."""
    size = os.fstat(descriptor).st_size
    if parts is None:
        parts = [(0, size)]
    end = 0
    for offset, count in parts:
        if offset < end or offset + count > size:
            raise ValueError(f"a segment of {size} bytes cannot have a part of {count} at {offset}")
        if count:
            end = offset + count
    if not end:
        return [(1, 0, memoryview(b"\0"))]  # nothing but empty parts: a segment has at least a byte
    whole = memoryview(mmap.mmap(descriptor, size, prot=mmap.PROT_READ))
    return [(end, at, whole[at:min(at + PIECE_BYTES, offset + count)])
            for offset, count in parts for at in range(offset, offset + count, PIECE_BYTES)]


class Arrivals:
    """The segments of which pieces have come, in order. Owns their descriptors until they are taken."""

    def __init__(self, most_bytes: int | None = None) -> None:
        # More than there can be is refused before the first byte is written.
        self._most = most_bytes if most_bytes is not None else _memory_bytes()
        self._whole: list[int] = []
        self._current = -1
        self._size = self._written = 0

    def add(self, size: int, start: int, piece: memoryview) -> None:
        """The next piece; what is left out between two of them is zeros. Raises BadPiece if it is not the next, OSError
        if there is no memory for it."""
        if self._current < 0:
            if not 0 < size <= self._most:
                raise BadPiece(f"a segment of {size} bytes is announced")
            self._current = os.memfd_create("dpool", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            self._size, self._written = size, 0
        if size != self._size or start < self._written or not piece.nbytes or start + piece.nbytes > size:
            raise BadPiece(f"{piece.nbytes} bytes at {start} of {size} came after {self._written} of {self._size}")
        self._written = start
        while piece.nbytes:
            count = os.pwrite(self._current, piece, self._written)
            self._written += count
            piece = piece[count:]
        if self._written == self._size:
            fcntl.fcntl(self._current, fcntl.F_ADD_SEALS, _SEALS)
            self._whole.append(self._current)
            self._current = -1

    def take(self, count: int) -> list[int]:
        """The descriptors of the last `count` segments, which are the caller's from now on. Raises BadPiece unless
        exactly so many are there."""
        if len(self._whole) != count or self._current >= 0:
            raise BadPiece(f"{count} segments were announced, {len(self._whole)} came")
        taken, self._whole = self._whole, []
        return taken

    def close(self) -> None:
        for descriptor in (*self._whole, *([self._current] if self._current >= 0 else [])):
            os.close(descriptor)
        self._whole, self._current = [], -1


def _memory_bytes() -> int:
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return total if limit == resource.RLIM_INFINITY else min(total, limit)
